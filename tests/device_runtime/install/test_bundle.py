"""Installation: the checks before a bundle becomes the current generation, their order and refusals."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from device_runtime import Device
from device_runtime.install import trust
from device_runtime.install.bundle import install
from ssd_edge.bundle import signing
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, GateRefusedError, InputError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def put(root: Path, tiny_bundle, tmp_path: Path):
    """Return ``put(release=…)``, which installs a tiny bundle; it accepts the keyword arguments of `install`."""

    def run(allow_downgrade: bool = False, **made):
        path = tmp_path / "tiny.ssdedge"
        path.write_bytes(tiny_bundle(**made))
        return install(root, path, allow_downgrade=allow_downgrade, say=said.append)

    said: list[str] = []
    run.said = said
    return run


@pytest.fixture
def keys(tmp_path: Path):
    """Return ``keys("a")``, which creates a pair of key files."""

    def make(name: str):
        signing.new_key(tmp_path, name)
        return tmp_path / f"{name}.key", tmp_path / f"{name}.pub"

    return make


def nothing_is_current(root: Path) -> bool:
    return not (root / "CURRENT").exists()


def test_self_test_result_is_stored(put, root):
    generation = put(release=7)
    assert generation.info["release"] == 7
    assert generation.info["signed_by"] is None
    assert generation.info["provider"] == "CPUExecutionProvider"
    tested = generation.info["self_test"]
    assert tested["images"] == 4
    assert tested["max_difference"] <= 1e-5
    assert tested["agreement"] == 1.0
    assert "self-test on 4 images with CPUExecutionProvider: cosine 1.0" in put.said[-1]
    assert Device.open(root).status().release == 7


def test_facts_are_kept_in_learned_generations(put, root, tmp_path):
    from PIL import Image

    put()
    photos = [tmp_path / f"{n}.png" for n in range(3)]
    for number, path in enumerate(photos):
        Image.new("RGB", (8, 8), (200, 200, 20 + number)).save(path)
    device = Device.open(root)
    device.learn("wedge", photos)
    assert set(device.generation.files) >= {"probe.safetensors", "device.json"}
    assert Device.open(root).predict(photos)[0].label == "wedge"


def test_backbone_with_other_results_is_refused(put, root):
    with pytest.raises(
        GateRefusedError,
        match=r"gives other embeddings on this machine .*at most 0\.001 is allowed\); run ssd-edge doctor",
    ):
        put(shift=0.5)
    assert nothing_is_current(root)


def test_learner_with_other_decisions_is_refused(put, root):
    with pytest.raises(GateRefusedError, match=r"decisions agree with the bundle on \d+% of the probe images"):
        put(roll=1)
    assert nothing_is_current(root)


def test_refused_bundle_leaves_the_old_generation(put, root):
    put(release=1)
    with pytest.raises(GateRefusedError):
        put(release=2, shift=0.5)
    assert Device.open(root).generation.number == 1


def test_lower_release_is_refused_unless_allowed(put, root):
    put(release=5)
    put(release=5)  # the same release is no downgrade
    with pytest.raises(
        BundleRefusedError, match=r"release 4, but release 5 was installed on this device; .*--allow-downgrade"
    ):
        put(release=4)
    assert put(release=4, allow_downgrade=True).number == 3
    with pytest.raises(BundleRefusedError, match="release 5 was installed"):  # also after a downgrade
        put(release=4)


def test_rollback_and_learning_do_not_allow_a_downgrade(put, root):
    put(release=1)
    put(release=2)
    Device.open(root).rollback(1)
    with pytest.raises(BundleRefusedError, match="release 1, but release 2"):
        put(release=1)


def test_pruning_does_not_allow_a_downgrade(put, root):
    put(release=2)
    for _ in range(12):
        put(release=3)
    put(release=1, allow_downgrade=True)
    for _ in range(12):
        put(release=1, allow_downgrade=True)
    assert len(list((root / "generations").iterdir())) <= 12
    with pytest.raises(BundleRefusedError, match="release 2, but release 3 was installed"):
        put(release=2)


def test_trusted_key_requires_its_signature(put, root, keys):
    private, public = keys("ours")
    stranger, _ = keys("stranger")
    identity = trust.trust(root, public)
    assert trust.trusted(root) == [identity]
    with pytest.raises(BundleRefusedError, match="not signed"):
        put()
    with pytest.raises(BundleRefusedError, match=identity):
        put(sign=signing.signer(stranger))
    assert nothing_is_current(root)
    assert put(sign=signing.signer(private)).info["signed_by"] == identity
    trust.distrust(root, identity)
    with pytest.raises(BundleRefusedError, match="accepts only signed bundles, but no key is trusted"):
        put()
    trust.accept_unsigned(root)
    assert put().info["signed_by"] is None


def test_signature_is_optional_without_a_trusted_key(put, keys):
    private, _ = keys("ours")
    assert put(sign=signing.signer(private)).info["signed_by"] is None


def test_trusted_key_without_cryptography_is_refused(put, root, keys, monkeypatch):
    private, public = keys("ours")
    sign = signing.signer(private)
    trust.trust(root, public)
    for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(EnvironmentUnfitError, match="cryptography"):
        put(sign=lambda data: sign(data))
    assert nothing_is_current(root)


def test_distrust_of_an_unknown_key_names_the_trusted_ones(root, keys):
    identity = trust.trust(root, keys("ours")[1])
    with pytest.raises(InputError, match=f"no key 0123 is trusted in .*trusted: {identity}"):
        trust.distrust(root, "0123")


def test_files_that_are_no_public_key_are_refused(root, keys, tmp_path):
    (tmp_path / "x.pub").write_text("ssh-ed25519 AAAA")
    with pytest.raises(InputError, match=r"x\.pub"):
        trust.trust(root, tmp_path / "x.pub")
    with pytest.raises(InputError):  # a private key must not be on a device
        trust.trust(root, keys("ours")[0])
    assert trust.trusted(root) is None
