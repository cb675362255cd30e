"""Forget, merge labels, export and merge on devices with tiny bundles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import store_standins

from device_runtime import Device
from device_runtime.install.bundle import install
from device_runtime.install.trust import trust
from device_runtime.learning.guard import Limits
from ssd_edge import bundle as bundles
from ssd_edge import files
from ssd_edge.errors import BundleRefusedError, GateRefusedError, InputError
from ssd_edge.learners.unknown import Rejector

STORE = vars(store_standins)
photos, COLOURS = STORE["photos"], ("cup", "nut", "screw", "wedge", "bolt")
ANY = Limits(force=True)


@pytest.fixture
def bundle(tiny_bundle, tmp_path: Path) -> Path:
    (tmp_path / "tiny.ssdedge").write_bytes(tiny_bundle())
    return tmp_path / "tiny.ssdedge"


@pytest.fixture
def new_device(bundle: Path, tmp_path: Path):
    def make(name: str) -> Device:
        install(tmp_path / name, bundle)
        return Device.open(tmp_path / name)

    return make


@pytest.fixture
def device(new_device) -> Device:
    return new_device("root")


def labels(device: Device, name: str, **options) -> set[str]:
    return {prediction.label for prediction in device.predict(photos(name, 10, seed=9), **options)}


def scores(device: Device) -> torch.Tensor:
    return device.learner.scores(device.embed([one for name in COLOURS for one in photos(name, 5, seed=7)]))


def greys(count: int, seed: int) -> list[np.ndarray]:
    """Return images of a class unlike those of the bundle: any shade of grey."""
    shades = np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)
    return [np.full((8, 8, 3), shade, np.uint8) for shade in shades]


def answers(device: Device) -> list[tuple[str, float, float]]:
    """Return label, score and margin for images of known classes, of taught ones, and of none."""
    images = [one for name in COLOURS for one in photos(name, 12, seed=7)] + greys(20, 9)
    images += list(np.random.default_rng(5).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
    return [(one.label, one.score, one.margin) for one in device.predict(images)]


# ── forget ───────────────────────────────────────────────────────────────────────────────────────────
def test_forgotten_class_is_never_predicted_and_rollback_restores_it(device):
    before = scores(device)
    result = device.forget("nut")
    assert (result.generation, result.classes) == (2, ["cup", "screw"])
    assert (result.forgot, result.images, result.exact, result.left) == ("nut", 20, True, "")
    assert result.old_classes.drop <= 0
    assert labels(device, "screw") == {"screw"}
    assert labels(device, "nut") == {"unknown"}
    assert "nut" not in labels(device, "nut", reject=False)
    reopened = Device.open(device.store.root)
    assert reopened.classes == ["cup", "screw"]
    assert torch.equal(scores(reopened), scores(device))
    device.rollback()
    assert torch.equal(scores(device), before)
    assert labels(device, "nut") == {"nut"}


def test_forget_undoes_learn(device):
    before = scores(device)
    device.learn("wedge", photos("wedge", 10))
    device.forget("wedge")
    assert torch.equal(scores(device), before)  # exact for nearest class mean
    assert device.classes == ["cup", "nut", "screw"]


def test_inexact_forget_is_reported_or_refused(tiny_bundle, tmp_path):
    (tmp_path / "slda.ssdedge").write_bytes(tiny_bundle(learner="slda"))
    install(tmp_path / "root", tmp_path / "slda.ssdedge")
    device = Device.open(tmp_path / "root")
    with pytest.raises(InputError, match="per_class=true"):
        device.forget("nut", exactly=True)
    assert device.generation.number == 1
    result = device.forget("nut")
    assert not result.exact
    assert "covariance that all classes share" in result.left
    assert labels(device, "screw") == {"screw"}


def test_all_classes_can_be_forgotten_and_others_learned(device):
    for name in ("cup", "nut", "screw"):
        device.forget(name)
    assert device.classes == []
    with pytest.raises(InputError, match="knows no class yet"):
        device.predict(photos("cup", 1))
    device = Device.open(device.store.root)
    device.learn_all({"wedge": photos("wedge", 10), "cup": photos("cup", 10)})
    assert labels(device, "wedge") == {"wedge"}
    assert labels(device, "cup") == {"cup"}


def test_forgotten_name_can_be_learned_again(device):
    device.forget("nut")
    device.learn("nut", photos("nut", 10))
    assert device.classes == ["cup", "screw", "nut"]
    assert labels(device, "nut", reject=False) == {"nut"}
    ids = [entry.id for entry in device.registry.entries]
    assert ids == [0, 2, 3]  # ids are never reused


def test_forget_unknown_label_changes_nothing(device):
    with pytest.raises(InputError, match=r"no class 'nutt' is known. Did you mean 'nut'"):
        device.forget("nutt")
    assert device.generation.number == 1


# ── merge labels ─────────────────────────────────────────────────────────────────────────────────────
def test_merge_two_classes_into_a_new_one(device):
    device.learn("wedge", photos("wedge", 10))
    result = device.merge_labels(["nut", "screw"], "fastener")
    assert result.classes == ["cup", "fastener", "wedge"]
    assert (result.merged_labels, result.into) == (["nut", "screw"], "fastener")
    assert device.registry.entries[1].images == 40
    assert float(device.statistics.counts[1]) == 40
    for name in ("nut", "screw"):
        assert labels(device, name, reject=False) == {"fastener"}
    assert labels(device, "cup") == {"cup"}
    assert labels(device, "wedge") == {"wedge"}
    assert Device.open(device.store.root).classes == device.classes


def test_merge_a_class_into_a_known_one(device):
    result = device.merge_labels(["cup"], "screw")
    assert result.classes == ["nut", "screw"]
    assert labels(device, "nut") == {"nut"}


@pytest.mark.parametrize(
    ("names", "into", "reason"),
    [
        (["cup"], "cup", "at least one besides it"),
        (["cup"], "new", "at least one besides it"),
        (["cup", "cup"], "new", "at least one besides it"),
        (["cup", "nuts"], "new", "no class 'nuts' is known"),
        (["cup", "nut"], "unknown", "reserved"),
        ([], "cup", "at least one besides it"),
        ([], "new", "at least one besides it"),
    ],
)
def test_refused_merge_of_labels_changes_nothing(device, names, into, reason):
    with pytest.raises(InputError, match=reason):
        device.merge_labels(names, into)
    assert device.generation.number == 1


def test_edit_that_harms_other_classes_is_refused(device, monkeypatch):
    def harm(self, row: int, into: int) -> None:
        self.sums[into] += self.sums[row]
        self.sums[1] = self.sums[0]

    monkeypatch.setattr("ssd_edge.learners.closed_form.ncm.NCM._join", harm)
    with pytest.raises(GateRefusedError, match="max_forgetting"):
        device.merge_labels(["cup"], "screw")
    assert device.generation.number == 1


# ── export ───────────────────────────────────────────────────────────────────────────────────────────
def test_export_predicts_the_same_after_install(device, tmp_path):
    device.learn("wedge", photos("wedge", 10))
    device.rename("cup", "mug")
    result = device.export(tmp_path / "robot.ssdedge")
    assert (result.generation, result.signed_by) == (3, None)
    opened = bundles.read(tmp_path / "robot.ssdedge")
    assert opened.sha256 == result.sha256
    assert opened.manifest["name"] == "robot"
    assert opened.manifest["classes"] == ["mug", "nut", "screw", "wedge"]
    assert opened.manifest["release"] == 1
    card = opened.read("card").decode()
    assert card.startswith("# tiny\n")
    assert "- learn 'wedge' (10 images)\n- rename 'cup' to 'mug'\n" in card
    install(tmp_path / "other", tmp_path / "robot.ssdedge")
    other = Device.open(tmp_path / "other")
    assert torch.equal(scores(other), scores(device))
    assert answers(other) == answers(device)
    assert other.bundle.installation != device.bundle.installation
    other.forget("wedge")
    other.export(tmp_path / "third.ssdedge")  # the section about the device is replaced, not duplicated
    card = bundles.read(tmp_path / "third.ssdedge").read("card").decode()
    assert card.count("## Since it was deployed") == 1
    assert "forget 'wedge'" in card


def test_everything_that_answers_is_exported(device):
    """A file of a generation that is not exported would be lost with a backup."""
    assert device.state.contents().keys() - bundles.ROLES.values() == {"device.json"}


def test_thresholds_survive_a_backup(device, tmp_path):
    """Also those of classes unlike the bundle's, taught several times, and after a second export."""
    device.learn_all({"wedge": photos("wedge", 10), "grey": greys(12, 0)}, ANY)
    device.learn("grey", greys(9, 1), ANY)
    before = answers(device)
    unknown = sum(label == "unknown" for label, _, _ in before)
    assert 0 < unknown < len(before)
    device.export(tmp_path / "first.ssdedge")
    install(tmp_path / "second", tmp_path / "first.ssdedge")
    restored = Device.open(tmp_path / "second")
    assert answers(restored) == before
    assert restored.state.contents()["unknown.safetensors"] == device.state.contents()["unknown.safetensors"]
    restored.learn("bolt", photos("bolt", 10), ANY)
    device.learn("bolt", photos("bolt", 10), ANY)
    both = list(zip(answers(restored), answers(device), strict=True))
    assert all((a[0], a[2]) == (b[0], b[2]) for a, b in both)
    assert all(a[1] == pytest.approx(b[1], abs=0.01) for a, b in both)  # which images were held out is another choice
    restored.export(tmp_path / "third.ssdedge")
    install(tmp_path / "fourth", tmp_path / "third.ssdedge")
    assert answers(Device.open(tmp_path / "fourth")) == answers(restored)


def test_a_deployed_bundle_has_no_thresholds(bundle, device):
    assert "unknown" not in bundles.read(bundle).roles
    assert device.state.rejector.state()["thresholds"].tolist() == [
        *Rejector.fit(device.statistics).thresholds.tolist()
    ]


@pytest.mark.parametrize("pruned", [False, True])
def test_export_without_history(device, tmp_path, pruned):
    for number in range(2):
        device.learn(f"wedge {number}", photos("wedge", 10), limits=ANY)
    if pruned:
        with device.store.writer():
            device.store.keep_only_current()
    device.export(tmp_path / "robot.ssdedge", history=pruned)
    opened = bundles.read(tmp_path / "robot.ssdedge")
    card = opened.read("card").decode()
    assert "learn '" not in card
    assert ("- earlier changes, which the journal no longer lists\n" if pruned else "- not listed, because") in card
    assert opened.manifest["metrics"] == {}  # they are those of the bundle before it was changed
    assert opened.manifest["device"]["generation"] == (3 if pruned else 1)
    install(tmp_path / "other", tmp_path / "robot.ssdedge")
    assert torch.equal(scores(Device.open(tmp_path / "other")), scores(device))


def test_export_without_changes_keeps_the_card(device, tmp_path):
    device.export(tmp_path / "same.ssdedge")
    assert bundles.read(tmp_path / "same.ssdedge").read("card") == b"# tiny\n"


def test_signed_export(device, tmp_path):
    pytest.importorskip("cryptography")
    from ssd_edge.bundle import signing

    private, public = signing.new_key(tmp_path, "ours")
    result = device.export(tmp_path / "signed.ssdedge", private)
    install(tmp_path / "other", device.store.root.parent / "tiny.ssdedge")
    trust(tmp_path / "other", public)
    assert result.signed_by == install(tmp_path / "other", tmp_path / "signed.ssdedge").info["signed_by"]


def test_markup_in_class_names_is_escaped_in_the_card(device, tmp_path):
    device.learn("<b>[x](http://y)", photos("wedge", 10))
    device.export(tmp_path / "robot.ssdedge")
    card = bundles.read(tmp_path / "robot.ssdedge").read("card").decode()
    assert "<b>" not in card
    assert "[x](http" not in card


# ── merge ────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("learner", "settings"),
    [("ncm", {}), ("slda", {}), ("slda", {"second_view": True}), ("ridge", {}), ("fecam", {})],
)
def test_merge_equals_learning_both(tiny_bundle, tmp_path, learner, settings):
    (tmp_path / "tiny.ssdedge").write_bytes(tiny_bundle(learner=learner, settings=settings))
    devices = {}
    for name in ("here", "there", "both"):
        install(tmp_path / name, tmp_path / "tiny.ssdedge")
        devices[name] = Device.open(tmp_path / name)
    here, there, both = devices.values()
    for one in (here, both):
        one.learn_all({"wedge": photos("wedge", 10), "cup": photos("cup", 4, seed=3)}, limits=ANY)
    for one in (there, both):
        one.learn_all({"bolt": photos("bolt", 10), "wedge": photos("wedge", 6, seed=1)}, limits=ANY)
    there.export(tmp_path / "there.ssdedge")
    result = here.merge(tmp_path / "there.ssdedge", ANY)
    assert result.classes == both.classes == ["cup", "nut", "screw", "wedge", "bolt"]
    assert [one.to_dict() for one in result.taught] == [
        {"label": "bolt", "images": 10, "new": True},
        {"label": "wedge", "images": 6, "new": False},
    ]
    assert here.status().images == both.status().images
    expected = scores(both)
    assert torch.allclose(scores(here), expected, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(scores(here).argmax(1), expected.argmax(1))
    for name in COLOURS:
        assert name in labels(here, name)
    for name, tensor in both.statistics.state().items():
        rounding = 1e-6 if tensor.dtype == torch.float32 else 1e-9
        assert torch.allclose(here.statistics.state()[name], tensor, rtol=rounding, atol=1e-6), name


@pytest.mark.parametrize("learner", ["ncm", "slda", "ridge", "fecam"])
def test_merged_into_a_new_device_everything_is_answered_as_there(tiny_bundle, tmp_path, learner):
    (tmp_path / "tiny.ssdedge").write_bytes(tiny_bundle(learner=learner))
    for name in ("here", "there"):
        install(tmp_path / name, tmp_path / "tiny.ssdedge")
    here, there = Device.open(tmp_path / "here"), Device.open(tmp_path / "there")
    there.learn_all({"wedge": photos("wedge", 10), "cup": photos("cup", 5, seed=2), "grey": greys(12, 0)}, ANY)
    there.export(tmp_path / "there.ssdedge")
    here.merge(tmp_path / "there.ssdedge", ANY)
    assert answers(here) == answers(there)


def test_a_merged_class_is_accepted_as_where_it_was_taught(new_device, tmp_path):
    here, there = new_device("here"), new_device("there")
    here.learn("wedge", photos("wedge", 10), ANY)
    there.learn("grey", greys(12, 0), ANY)
    there.learn("grey", greys(9, 1), ANY)
    there.export(tmp_path / "there.ssdedge")
    here.merge(tmp_path / "there.ssdedge", ANY)

    def margins(device: Device) -> list[float]:
        row = torch.full((40,), device.classes.index("grey"))
        return device.state.rejector.accepts(device.embed(greys(40, 9)), row)[1].tolist()

    assert margins(here) == margins(there)


def test_merge_refuses_images_that_would_count_twice(new_device, tmp_path):
    here, there, third = new_device("here"), new_device("there"), new_device("third")
    there.learn("bolt", photos("bolt", 10))
    there.export(tmp_path / "there.ssdedge")
    here.merge(tmp_path / "there.ssdedge")
    with pytest.raises(InputError, match="would count twice"):
        here.merge(tmp_path / "there.ssdedge")
    third.merge(tmp_path / "there.ssdedge")  # a third device that has merged it already
    third.export(tmp_path / "third.ssdedge")
    with pytest.raises(InputError, match="would count twice"):
        here.merge(tmp_path / "third.ssdedge")
    with pytest.raises(InputError, match="would count twice"):  # its own classes, returned
        there.merge(tmp_path / "third.ssdedge")
    assert here.generation.number == 2


def test_merge_requires_the_same_bundle(new_device, tiny_bundle, tmp_path):
    here, there = new_device("here"), new_device("there")
    with pytest.raises(InputError, match="not exported by a device"):
        here.merge(tmp_path / "tiny.ssdedge")
    there.export(tmp_path / "there.ssdedge")
    with pytest.raises(InputError, match="has learned nothing since"):
        here.merge(tmp_path / "there.ssdedge")
    (tmp_path / "two.ssdedge").write_bytes(tiny_bundle(release=2))
    install(tmp_path / "there", tmp_path / "two.ssdedge")
    there.refresh()
    there.learn("bolt", photos("bolt", 10))
    there.export(tmp_path / "there.ssdedge")
    with pytest.raises(InputError, match="started from the bundle"):
        here.merge(tmp_path / "there.ssdedge")
    assert here.generation.number == 1


@pytest.mark.parametrize("where", ["here", "there"])
def test_merge_refuses_a_forgotten_class_of_the_bundle(new_device, tmp_path, where):
    devices = {name: new_device(name) for name in ("here", "there")}
    devices["there"].learn("bolt", photos("bolt", 10))
    devices[where].forget("nut")
    devices["there"].export(tmp_path / "there.ssdedge")
    with pytest.raises(InputError, match="knows nut, which"):
        devices["here"].merge(tmp_path / "there.ssdedge")


def test_merge_follows_renamed_classes(new_device, tmp_path):
    here, there = new_device("here"), new_device("there")
    here.rename("cup", "mug")
    there.learn_all({"cup": photos("cup", 5, seed=2), "bolt": photos("bolt", 10)})
    there.export(tmp_path / "there.ssdedge")
    here.merge(tmp_path / "there.ssdedge")
    assert here.classes == ["mug", "nut", "screw", "bolt"]
    assert here.status().images["mug"] == 25


def test_merge_refuses_learners_without_sums(tiny_bundle, tmp_path):
    (tmp_path / "tuned.ssdedge").write_bytes(tiny_bundle(learner="finetune"))
    for name in ("here", "there"):
        install(tmp_path / name, tmp_path / "tuned.ssdedge")
    here, there = Device.open(tmp_path / "here"), Device.open(tmp_path / "there")
    there.learn("bolt", photos("bolt", 10), limits=ANY)
    there.export(tmp_path / "there.ssdedge")
    with pytest.raises(InputError, match="do not add up"):
        here.merge(tmp_path / "there.ssdedge")
    assert here.generation.number == 1


def test_merge_requires_a_trusted_signature(new_device, tmp_path):
    pytest.importorskip("cryptography")
    from ssd_edge.bundle import signing

    here, there = new_device("here"), new_device("there")
    there.learn("bolt", photos("bolt", 10))
    there.export(tmp_path / "there.ssdedge")
    private, public = signing.new_key(tmp_path, "ours")
    trust(here.store.root, public)
    with pytest.raises(BundleRefusedError, match=r"not signed|unsigned"):
        here.merge(tmp_path / "there.ssdedge")
    there.export(tmp_path / "signed.ssdedge", private)
    assert here.merge(tmp_path / "signed.ssdedge").classes[-1] == "bolt"


def test_merge_requires_an_intact_base(new_device, tmp_path):
    here, there = new_device("here"), new_device("there")
    there.learn("bolt", photos("bolt", 10))
    there.export(tmp_path / "there.ssdedge")
    here.learn("wedge", photos("wedge", 10))
    (here.store.folder(1) / "learner.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="is gone or damaged"):
        here.merge(tmp_path / "there.ssdedge")


def test_invalid_lineage_is_refused(new_device, tiny_bundle, tmp_path):
    here = new_device("here")
    (tmp_path / "odd.ssdedge").write_bytes(tiny_bundle(device={"installation": "0" * 16}))
    with pytest.raises(BundleRefusedError, match="does not say where it comes from"):
        here.merge(tmp_path / "odd.ssdedge")


def test_history_describes_each_change(device):
    device.learn("wedge", photos("wedge", 10))
    device.merge_labels(["nut", "screw"], "fastener")
    device.forget("cup")
    assert [entry.what for entry in device.history().generations] == [
        "install tiny.ssdedge",
        "learn 'wedge' (10 images)",
        "merge 'nut', 'screw' into 'fastener'",
        "forget 'cup'",
    ]


def test_journal_size_is_bounded(device, monkeypatch):
    monkeypatch.setattr("device_runtime.store.generations.EVENTS", 10)
    for number in range(30):
        device.rename("cup" if number % 2 == 0 else "mug", "mug" if number % 2 == 0 else "cup")
    events = device.store.journal()
    assert len(events) <= 21
    assert events[0]["event"] == "install"
    assert [event["seq"] for event in events] == sorted({event["seq"] for event in events})
    assert files.sha256(device.generation.read("learner.safetensors"))
    assert device.generation.number == 31


def rename_repeatedly(device: Device, times: int) -> list[int]:
    for number in range(times):
        device.rename(("cup", "mug")[number % 2], ("mug", "cup")[number % 2])
    return list(device.store.numbers())


def test_number_of_kept_generations_can_be_set(device, monkeypatch):
    monkeypatch.setenv("SSD_EDGE_KEEP", "3")
    assert rename_repeatedly(device, 8) == [1, 7, 8, 9]  # the installed one is kept as well


def test_generations_keep_within_a_disk_budget(device, monkeypatch):
    size = sum(path.stat().st_size for path in device.store.folder(1).iterdir())
    monkeypatch.setattr("device_runtime.store.generations.MIB", 6 * size)
    backbone = sum(path.stat().st_size for path in device.store.backbones())
    monkeypatch.setenv("SSD_EDGE_DISK_MB", "1")
    numbers = rename_repeatedly(device, 10)
    kept = sum(path.stat().st_size for number in numbers for path in device.store.folder(number).iterdir())
    assert kept + backbone <= 6 * size
    assert 3 <= len(numbers) < 8  # of eleven generations
    assert numbers[0] == 1


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_invalid_limit_logs_a_warning(device, monkeypatch, caplog, value):
    monkeypatch.setenv("SSD_EDGE_KEEP", value)
    assert rename_repeatedly(device, 1) == [1, 2]
    assert "must be a whole number above 0" in caplog.text
