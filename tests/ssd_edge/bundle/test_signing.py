"""Tests of keys and signatures: golden bytes, verification with OpenSSL, and refused keys and signatures."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import by_hand as hand

from ssd_edge import bundle, files
from ssd_edge.bundle import signing
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError

pytest.importorskip("cryptography")


@pytest.fixture
def key(tmp_path):
    """Return the path of a private key with a fixed seed."""
    return hand.write_key(tmp_path)


def read(tmp_path: Path, data: bytes) -> bundle.Bundle:
    path = tmp_path / "robot.ssdedge"
    path.write_bytes(data)
    return bundle.read(path)


def public(private: Path) -> dict[str, object]:
    key = signing.load_private(private).public_key()
    return {signing.key_id(key): key}


def test_golden_signature(key, tmp_path):
    data = bundle.pack(*hand.parts(), signing.signer(key))
    read_back = read(tmp_path, data)
    assert read_back.entries["manifest.sig"] == (
        b'{\n  "algorithm": "ed25519",\n  "key": "56475aa75463474c",\n  "signature": "aEhVtaM9Y27WY4ci+8RyKaf8NUV/'
        b'anO7uUkU7BDcZqZUdLvZFqtyok0z2rGAtvKrVtdX0FBw0jpl4hGy7BWkDA=="\n}\n'
    )
    # Changing this digest means changing the format: existing bundles would be refused.
    assert files.sha256(data) == "f9b661527f29c7eca17a34f615e5f73903b4722a395e145dac88f0112bcd611c"
    raw = signing.load_private(key).public_key().public_bytes_raw()
    assert read_back.signature.key == files.sha256(raw)[:16]
    assert signing.check(read_back, public(key)) == "56475aa75463474c"
    assert bundle.pack(*hand.parts(), signing.signer(key)) == data


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the command of docs/bundle.md needs openssl")
def test_openssl_agrees(tmp_path):
    """Run the commands of docs/bundle.md as they are printed there."""
    text = (Path(__file__).parents[3] / "docs" / "bundle.md").read_text(encoding="utf-8")
    lines = text.split("```sh\n", 1)[1].split("```", 1)[0]
    assert "openssl pkeyutl -verify" in lines
    private, shown = signing.new_key(tmp_path, "lab")
    (tmp_path / "robot.ssdedge").write_bytes(bundle.pack(*hand.parts(), signing.signer(private)))
    unpacked = hand.contents((tmp_path / "robot.ssdedge").read_bytes())
    if shutil.which("unzip") is None:
        for name in ("manifest.json", "manifest.sig"):
            (tmp_path / name).write_bytes(unpacked[name])
        lines = "\n".join(line for line in lines.splitlines() if not line.startswith("unzip"))

    def run() -> subprocess.CompletedProcess:
        return subprocess.run(["sh", "-c", lines], cwd=tmp_path, capture_output=True, text=True, check=False)

    done = run()
    assert done.returncode == 0, done.stderr
    assert "Signature Verified Successfully" in done.stdout
    assert signing.key_id(signing.load_public(shown)) in done.stdout
    other = signing.new_key(tmp_path, "other")[1]
    shutil.copy(other, shown)
    assert "Signature Verified Successfully" not in run().stdout


def test_new_keys(tmp_path):
    private, shown = signing.new_key(tmp_path / "a" / "b", "lab")
    assert (private, shown) == (tmp_path / "a" / "b" / "lab.key", tmp_path / "a" / "b" / "lab.pub")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert private.read_text().startswith("-----BEGIN PRIVATE KEY-----\n")
    assert shown.read_text().startswith("-----BEGIN PUBLIC KEY-----\n")
    assert signing.key_id(signing.load_public(shown)) == signing.key_id(signing.load_private(private).public_key())
    before = private.read_bytes(), shown.read_bytes()
    for lost in (None, shown, private):
        if lost is not None:
            lost.unlink()
        with pytest.raises(InputError, match=r"exists, and keys are never overwritten; choose another name"):
            signing.new_key(tmp_path / "a" / "b", "lab")
        if lost is not None:
            assert not lost.exists()
            lost.write_bytes(before[lost is shown])
    for name in ("", "a/b", "../a", ".a", "-a", "a b", "x" * 65):
        with pytest.raises(InputError, match="the name of a key must have 1 to 64 characters"):
            signing.new_key(tmp_path, name)


def test_private_key_is_created_with_mode_0600(tmp_path, monkeypatch):
    """Check the mode when the file is opened, with a umask of 0."""
    modes = []
    real = signing.os.fdopen

    def watch(handle, mode):
        modes.append(stat.S_IMODE(signing.os.fstat(handle).st_mode))
        return real(handle, mode)

    monkeypatch.setattr(signing.os, "fdopen", watch)
    before = signing.os.umask(0)
    try:
        signing.new_key(tmp_path, "lab")
    finally:
        signing.os.umask(before)
    assert modes == [0o600, 0o644]


def test_failed_write_leaves_no_half_key_pair(tmp_path, monkeypatch):
    real = signing._create

    def fail(path, data, mode):
        if path.suffix == ".pub":
            raise EnvironmentUnfitError("full")
        real(path, data, mode)

    monkeypatch.setattr(signing, "_create", fail)
    with pytest.raises(EnvironmentUnfitError, match="full"):
        signing.new_key(tmp_path, "lab")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_private_key_readable_by_others_is_refused(key, mode):
    key.chmod(mode)
    with pytest.raises(InputError, match=rf"is readable by others \(mode {mode:04o}.*run: chmod 600 .*fixed\.key"):
        signing.signer(key)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    path.chmod(0o600)
    return path


def test_invalid_key_files_are_refused(tmp_path, key):
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric import ec

    other = ec.generate_private_key(ec.SECP256R1())
    plain = (pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    encrypted = (pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.BestAvailableEncryption(b"x"))
    shown = (pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    for data, message in (
        (b"", "does not contain a private key in PEM format"),
        (b"\xff" * 99, "does not contain a private key in PEM format"),
        (key.read_bytes()[:60], "does not contain a private key in PEM format"),
        (other.private_bytes(*plain), "contains a key that is not Ed25519"),
        (signing.load_private(key).private_bytes(*encrypted), "has a password"),
    ):
        with pytest.raises(InputError, match=message):
            signing.load_private(write(tmp_path / "a.key", data))
    for data, message in (
        (b"", "does not contain a public key in PEM format"),
        (b"ssh-ed25519 AAAA", "does not contain a public key in PEM format"),
        (other.public_key().public_bytes(*shown), "contains a key that is not Ed25519"),
        (key.read_bytes(), r"contains a private key, which must stay where it was created; use NAME\.pub"),
    ):
        with pytest.raises(InputError, match=message):
            signing.load_public(write(tmp_path / "a.pub", data))
    with pytest.raises(InputError, match="does not exist"):
        signing.load_private(tmp_path / "none.key")
    with pytest.raises(InputError, match="does not exist"):
        signing.load_public(tmp_path / "none.pub")


def test_one_invalid_trusted_key_is_an_error(tmp_path):
    assert signing.trusted(tmp_path / "none") == {}
    folder = tmp_path / "trusted"
    for name in ("a", "b"):
        signing.new_key(folder, name)
    keys = signing.trusted(folder)
    assert len(keys) == 2
    assert all(signing.key_id(key) == identity for identity, key in keys.items())
    (folder / "c.pub").write_text("not a key")
    with pytest.raises(InputError, match=r"c\.pub does not contain a public key"):
        signing.trusted(folder)


def test_bundle_without_trusted_signature_is_refused(tmp_path, key):
    own = public(key)
    (identity,) = own
    other = public(signing.new_key(tmp_path, "other")[0])
    (other_id,) = other
    plain = read(tmp_path, bundle.pack(*hand.parts()))
    with pytest.raises(BundleRefusedError, match=f"'robot' is not signed, but must be signed by {identity}; sign"):
        signing.check(plain, own)
    with pytest.raises(BundleRefusedError, match="is not signed, but must be signed by a trusted key"):
        signing.check(plain, {})
    made = read(tmp_path, bundle.pack(*hand.parts(), signing.signer(key)))
    with pytest.raises(BundleRefusedError, match=f"{identity}, but trusted keys are: {other_id}; get it from"):
        signing.check(made, other)
    with pytest.raises(BundleRefusedError, match=f"with the key {identity}, but trusted keys are: none"):
        signing.check(made, {})
    assert signing.check(made, {**own, **other}) == identity


def test_signature_of_another_manifest_is_refused(tmp_path, key):
    """Use a signature on another manifest with valid digests, and under the id of another key."""
    made = hand.contents(bundle.pack(*hand.parts(), signing.signer(key)))
    own = public(key)
    edited = {**made, "manifest.json": made["manifest.json"].replace(b'"release": 7', b'"release": 8')}
    swapped = hand.relisted({**made, "learner.safetensors": hand.vector(9.0, 9.0)})
    for changed in (edited, swapped):
        opened = read(tmp_path, hand.sealed(changed))
        with pytest.raises(
            BundleRefusedError, match=r"signature of the bundle 'robot' by \w+ does not match its manifest"
        ):
            signing.check(opened, own)
    other = public(signing.new_key(tmp_path, "other")[0])
    (other_id,) = other
    renamed = made["manifest.sig"].replace(b"56475aa75463474c", other_id.encode())
    opened = read(tmp_path, hand.sealed({**made, "manifest.sig": renamed}))
    with pytest.raises(BundleRefusedError, match="does not match its manifest"):
        signing.check(opened, {**own, **other})


def test_missing_cryptography_is_an_error(tmp_path, key):
    signing.new_key(tmp_path / "trusted", "lab")
    data = tmp_path / "signed.ssdedge"
    data.write_bytes(bundle.pack(*hand.parts(), signing.signer(key)))
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "cryptography":
            raise ModuleNotFoundError("blocked", name=name)
sys.meta_path.insert(0, Block())
from ssd_edge import bundle
from ssd_edge.bundle import signing
from ssd_edge.errors import EnvironmentUnfitError
opened = bundle.read({str(data)!r})
assert opened.signature.key == "56475aa75463474c"
for call in (
    lambda: signing.check(opened, {{}}),
    lambda: signing.trusted({str(tmp_path / "trusted")!r}),
    lambda: signing.new_key({str(tmp_path)!r}, "x"),
    lambda: signing.signer({str(key)!r}),
):
    try:
        call()
    except EnvironmentUnfitError as error:
        assert "'cryptography' is needed" in str(error), error
    else:
        sys.exit("no error was raised")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
