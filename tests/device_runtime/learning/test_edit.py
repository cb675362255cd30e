"""Forget, merge labels, export and merge on a device; on tiny bundles."""

from __future__ import annotations

from pathlib import Path

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

STORE = vars(store_standins)
photos, COLOURS = STORE["photos"], ("cup", "nut", "screw", "wedge", "bolt")
ANY = Limits(max_forgetting=1.0)


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


# ── forget ───────────────────────────────────────────────────────────────────────────────────────────
def test_a_forgotten_class_is_never_answered_and_a_rollback_brings_it_back(device):
    before = scores(device)
    result = device.forget("nut")
    assert (result.generation, result.classes) == (2, ["cup", "screw"])
    assert (result.forgot, result.images, result.exact, result.left) == ("nut", 20, True, "")
    assert result.old_classes.drop <= 0
    assert labels(device, "screw") == {"screw"}
    assert labels(device, "nut") == {"unknown"}
    assert "nut" not in labels(device, "nut", reject=False)
    again = Device.open(device.store.root)
    assert again.classes == ["cup", "screw"]
    assert torch.equal(scores(again), scores(device))
    device.rollback()
    assert torch.equal(scores(device), before)
    assert labels(device, "nut") == {"nut"}


def test_learned_and_forgotten_is_as_never_learned(device):
    before = scores(device)
    device.learn("wedge", photos("wedge", 10))
    device.forget("wedge")
    assert torch.equal(scores(device), before)  # nearest class mean: exact
    assert device.classes == ["cup", "nut", "screw"]


def test_what_cannot_be_forgotten_exactly_says_so_or_is_refused(tiny_bundle, tmp_path):
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


def test_a_forgotten_name_can_be_taught_again(device):
    device.forget("nut")
    device.learn("nut", photos("nut", 10))
    assert device.classes == ["cup", "screw", "nut"]
    assert labels(device, "nut") == {"nut"}
    ids = [entry.id for entry in device.registry.entries]
    assert ids == [0, 2, 3]  # an id is never given twice


def test_an_unknown_label_changes_nothing(device):
    with pytest.raises(InputError, match=r"no class 'nutt' is known. Did you mean 'nut'"):
        device.forget("nutt")
    assert device.generation.number == 1


# ── merge labels ─────────────────────────────────────────────────────────────────────────────────────
def test_two_classes_become_one(device):
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


def test_a_class_can_be_merged_into_a_known_one(device):
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
def test_what_cannot_be_merged_changes_nothing(device, names, into, reason):
    with pytest.raises(InputError, match=reason):
        device.merge_labels(names, into)
    assert device.generation.number == 1


def test_an_edit_that_costs_the_others_too_much_is_refused(device, monkeypatch):
    def harm(self, row: int, into: int) -> None:
        self.sums[into] += self.sums[row]
        self.sums[1] = self.sums[0]

    monkeypatch.setattr("ssd_edge.learners.closed_form.ncm.NCM._join", harm)
    with pytest.raises(GateRefusedError, match="max_forgetting"):
        device.merge_labels(["cup"], "screw")
    assert device.generation.number == 1


# ── export ───────────────────────────────────────────────────────────────────────────────────────────
def test_an_export_is_a_bundle_that_answers_the_same(device, tmp_path):
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
    assert other.bundle.installation != device.bundle.installation
    other.forget("wedge")
    other.export(tmp_path / "third.ssdedge")  # the section about the device is replaced, not added again
    card = bundles.read(tmp_path / "third.ssdedge").read("card").decode()
    assert card.count("## Since it was deployed") == 1
    assert "forget 'wedge'" in card


def test_an_export_of_what_was_installed_keeps_its_card(device, tmp_path):
    device.export(tmp_path / "same.ssdedge")
    assert bundles.read(tmp_path / "same.ssdedge").read("card") == b"# tiny\n"


def test_an_export_can_be_signed(device, tmp_path):
    pytest.importorskip("cryptography")
    from ssd_edge.bundle import signing

    private, public = signing.new_key(tmp_path, "ours")
    result = device.export(tmp_path / "signed.ssdedge", private)
    install(tmp_path / "other", device.store.root.parent / "tiny.ssdedge")
    trust(tmp_path / "other", public)
    assert result.signed_by == install(tmp_path / "other", tmp_path / "signed.ssdedge").info["signed_by"]


def test_a_name_in_a_card_is_no_markup(device, tmp_path):
    device.learn("<b>[x](http://y)", photos("wedge", 10))
    device.export(tmp_path / "robot.ssdedge")
    card = bundles.read(tmp_path / "robot.ssdedge").read("card").decode()
    assert "<b>" not in card
    assert "[x](http" not in card


# ── merge ────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("learner", ["ncm", "slda", "ridge", "fecam"])
def test_two_devices_merged_are_one_that_was_taught_both(tiny_bundle, tmp_path, learner):
    (tmp_path / "tiny.ssdedge").write_bytes(tiny_bundle(learner=learner))
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
    wanted = scores(both)
    assert torch.allclose(scores(here), wanted, atol=1e-4 * float(wanted.abs().max()))
    assert torch.equal(scores(here).argmax(1), wanted.argmax(1))
    for name in COLOURS:
        assert name in labels(here, name)
    for name, tensor in both.statistics.state().items():
        assert torch.allclose(here.statistics.state()[name], tensor, rtol=1e-9, atol=1e-6), name


def test_nothing_counts_twice(new_device, tmp_path):
    here, there, third = new_device("here"), new_device("there"), new_device("third")
    there.learn("bolt", photos("bolt", 10))
    there.export(tmp_path / "there.ssdedge")
    here.merge(tmp_path / "there.ssdedge")
    with pytest.raises(InputError, match="would count twice"):
        here.merge(tmp_path / "there.ssdedge")
    third.merge(tmp_path / "there.ssdedge")  # a third that knows it already
    third.export(tmp_path / "third.ssdedge")
    with pytest.raises(InputError, match="would count twice"):
        here.merge(tmp_path / "third.ssdedge")
    with pytest.raises(InputError, match="would count twice"):  # its own, come back
        there.merge(tmp_path / "third.ssdedge")
    assert here.generation.number == 2


def test_only_what_left_one_bundle_can_be_merged(new_device, tiny_bundle, tmp_path):
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
def test_a_class_of_the_bundle_that_one_has_forgotten_stands_in_the_way(new_device, tmp_path, where):
    devices = {name: new_device(name) for name in ("here", "there")}
    devices["there"].learn("bolt", photos("bolt", 10))
    devices[where].forget("nut")
    devices["there"].export(tmp_path / "there.ssdedge")
    with pytest.raises(InputError, match="knows nut, which"):
        devices["here"].merge(tmp_path / "there.ssdedge")


def test_a_rename_is_known_by_its_class(new_device, tmp_path):
    here, there = new_device("here"), new_device("there")
    here.rename("cup", "mug")
    there.learn_all({"cup": photos("cup", 5, seed=2), "bolt": photos("bolt", 10)})
    there.export(tmp_path / "there.ssdedge")
    here.merge(tmp_path / "there.ssdedge")
    assert here.classes == ["mug", "nut", "screw", "bolt"]
    assert here.status().images["mug"] == 25


def test_what_cannot_be_merged_says_why(tiny_bundle, tmp_path):
    (tmp_path / "tuned.ssdedge").write_bytes(tiny_bundle(learner="finetune"))
    for name in ("here", "there"):
        install(tmp_path / name, tmp_path / "tuned.ssdedge")
    here, there = Device.open(tmp_path / "here"), Device.open(tmp_path / "there")
    there.learn("bolt", photos("bolt", 10), limits=ANY)
    there.export(tmp_path / "there.ssdedge")
    with pytest.raises(InputError, match="does not add up"):
        here.merge(tmp_path / "there.ssdedge")
    assert here.generation.number == 1


def test_a_trusted_key_is_asked_for(new_device, tmp_path):
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


def test_the_base_must_still_be_there(new_device, tmp_path):
    here, there = new_device("here"), new_device("there")
    there.learn("bolt", photos("bolt", 10))
    there.export(tmp_path / "there.ssdedge")
    here.learn("wedge", photos("wedge", 10))
    (here.store.folder(1) / "learner.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="is gone or damaged"):
        here.merge(tmp_path / "there.ssdedge")


def test_a_lineage_that_is_none_is_refused(new_device, tiny_bundle, tmp_path):
    here = new_device("here")
    (tmp_path / "odd.ssdedge").write_bytes(tiny_bundle(device={"installation": "x"}))
    with pytest.raises(BundleRefusedError, match="does not say where it comes from"):
        here.merge(tmp_path / "odd.ssdedge")


def test_history_says_what_was_done(device):
    device.learn("wedge", photos("wedge", 10))
    device.merge_labels(["nut", "screw"], "fastener")
    device.forget("cup")
    assert [entry.what for entry in device.history().generations] == [
        "install tiny.ssdedge",
        "learn 'wedge' (10 images)",
        "merge 'nut', 'screw' into 'fastener'",
        "forget 'cup'",
    ]


def test_the_journal_does_not_grow_for_ever(device, monkeypatch):
    monkeypatch.setattr("device_runtime.store.generations.EVENTS", 10)
    for number in range(30):
        device.rename("cup" if number % 2 == 0 else "mug", "mug" if number % 2 == 0 else "cup")
    events = device.store.journal()
    assert len(events) <= 21
    assert events[0]["event"] == "install"
    assert [event["seq"] for event in events] == sorted({event["seq"] for event in events})
    assert files.sha256(device.generation.read("learner.safetensors"))
    assert device.generation.number == 31


def renamed(device: Device, times: int) -> list[int]:
    for number in range(times):
        device.rename(("cup", "mug")[number % 2], ("mug", "cup")[number % 2])
    return list(device.store.numbers())


def test_how_many_generations_stay_can_be_chosen(device, monkeypatch):
    monkeypatch.setenv("SSD_EDGE_KEEP", "3")
    assert renamed(device, 8) == [1, 7, 8, 9]  # the installed one too


def test_generations_keep_within_a_disk_budget(device, monkeypatch):
    size = sum(path.stat().st_size for path in device.store.folder(1).iterdir())
    monkeypatch.setattr("device_runtime.store.generations.MIB", 6 * size)
    backbone = sum(path.stat().st_size for path in device.store.backbones())
    monkeypatch.setenv("SSD_EDGE_DISK_MB", "1")
    numbers = renamed(device, 10)
    kept = sum(path.stat().st_size for number in numbers for path in device.store.folder(number).iterdir())
    assert kept + backbone <= 6 * size
    assert 3 <= len(numbers) < 8  # of eleven
    assert numbers[0] == 1


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_a_limit_that_is_none_is_said(device, monkeypatch, caplog, value):
    monkeypatch.setenv("SSD_EDGE_KEEP", value)
    assert renamed(device, 1) == [1, 2]
    assert "must be a whole number above 0" in caplog.text
