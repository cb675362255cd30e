"""Learn several classes at once, add images to a known class, and rename; on a tiny bundle."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import store_standins

from device_runtime import Device
from device_runtime.install.bundle import install
from device_runtime.learning.guard import Limits
from device_runtime.store.generations import Generations
from ssd_edge.errors import EnvironmentUnfitError, GateRefusedError, InputError, SlowerProviderError
from ssd_edge.images.second import second_view
from tests.device_runtime.conftest import tiny_embed

STORE = vars(store_standins)
COLOURS = ("cup", "wedge", "bolt")
photos = STORE["photos"]


@pytest.fixture
def root(tiny_bundle, tmp_path: Path) -> Path:
    (tmp_path / "tiny.ssdedge").write_bytes(tiny_bundle())
    install(tmp_path / "root", tmp_path / "tiny.ssdedge")
    return tmp_path / "root"


def labels(device: Device, name: str) -> set[str]:
    """Return the labels of new images, with those that are not accepted: some of a class of few images."""
    predictions = device.predict(photos(name, 10, seed=9))
    assert sum(prediction.label == "unknown" for prediction in predictions) <= 3
    return {prediction.nearest for prediction in predictions}


def test_several_classes_make_one_generation(root):
    device = Device.open(root)
    result = device.learn_all({"wedge": photos("wedge", 10), "bolt": photos("bolt", 5)})
    assert result.generation == 2
    assert result.classes == ["cup", "nut", "screw", "wedge", "bolt"]
    assert (result.label, result.images) == ("wedge, bolt", 15)
    assert [(one.label, one.images, one.new) for one in result.taught] == [
        ("wedge", 10, True),
        ("bolt", 5, True),
    ]
    assert [one.held_out.to_dict() for one in result.taught] == [
        {"images": 10, "accuracy": 1.0},  # each image is held out once
        {"images": 5, "accuracy": 1.0},
    ]
    assert result.held_out.to_dict() == {"images": 15, "accuracy": 1.0}
    for name in COLOURS:
        assert labels(device, name) == {name}
    assert Device.open(root).status().images == {"cup": 20, "nut": 20, "screw": 20, "wedge": 10, "bolt": 5}


def test_more_images_of_a_known_class_update_it(root):
    device = Device.open(root)
    before = device.learner.state_dict()["sums"][0]
    with pytest.raises(InputError, match="a known class needs at least 3 different images, but 'cup' has 1; --force"):
        device.learn("cup", photos("cup", 1))
    result = device.learn("cup", photos("cup", 1), Limits(force=True))
    assert result.classes == ["cup", "nut", "screw"]
    taught = result.taught[0].to_dict()
    assert len(taught.pop("digest")) == 32
    assert taught == {"label": "cup", "images": 1, "new": False, "held_out": {"images": 0, "accuracy": None}}
    assert not device.learner.state_dict()["sums"][0].equal(before)
    assert device.status().images["cup"] == 21
    assert device.statistics.counts.tolist() == [21, 20, 20]
    assert device.status().learned_here == []
    device.rollback()
    assert device.learner.state_dict()["sums"][0].equal(before)


def test_a_learner_that_wants_second_views_learns_the_mean_of_both_and_answers_for_one(tiny_bundle, tmp_path):
    (tmp_path / "tiny.ssdedge").write_bytes(tiny_bundle(learner="slda", settings={"second_view": True}))
    install(tmp_path / "root", tmp_path / "tiny.ssdedge")
    device, images = Device.open(tmp_path / "root"), photos("wedge", 6)
    result = device.learn("wedge", images)
    assert result.held_out.to_dict() == {"images": 6, "accuracy": 1.0}
    pixels = np.stack([np.asarray(image) for image in images])
    first, second = device.embed(images).double(), torch.from_numpy(tiny_embed(second_view(pixels))).double()
    assert not torch.allclose(first, second, atol=1e-3)
    learned = Device.open(tmp_path / "root").learner.state_dict()
    torch.testing.assert_close(learned["sums"][3].double(), (first + second).sum(0) / 2, rtol=1e-5, atol=1e-5)
    assert learned["counts"][3] == 6
    assert labels(device, "wedge") == {"wedge"}


def test_new_and_known_classes_can_be_learned_together(root):
    device = Device.open(root)
    result = device.learn_all({"cup": photos("cup", 4), "wedge": photos("wedge", 4)})
    assert [one.new for one in result.taught] == [False, True]
    assert labels(device, "wedge") == {"wedge"}


def test_copies_count_once(root):
    device, different = Device.open(root), photos("wedge", 5)
    result = device.learn("wedge", [*different, *different, different[0]])
    assert (result.images, device.status().images["wedge"]) == (5, 5)
    assert result.warnings[0].startswith(
        "6 of 11 images of 'wedge' are the same as others or nearly so, and count once"
    )
    with pytest.raises(
        InputError, match="a new class needs at least 3 different images, but 'bolt' has only 2 among 20"
    ):
        device.learn("bolt", photos("bolt", 2) * 10)
    with pytest.raises(InputError, match="only 2 among 20"):  # a new class needs three in any case
        device.learn("bolt", photos("bolt", 2) * 10, Limits(force=True))


def test_the_same_images_count_once(root):
    device, images = Device.open(root), photos("wedge", 6)
    device.learn("wedge", images)
    with pytest.raises(InputError, match="the 6 images of 'wedge' were taught before, as 'wedge'; they count once"):
        Device.open(root).learn("wedge", images[::-1])  # in any order
    with pytest.raises(InputError, match="the 6 images of 'nut' were taught before, as 'wedge'"):
        device.learn("nut", images)
    result = device.learn_all({"wedge": images, "bolt": photos("bolt", 6)})
    assert ([one.label for one in result.taught], device.status().images["wedge"]) == (["bolt"], 6)
    assert result.warnings[0].startswith("the 6 images of 'wedge' were taught before")
    device.learn("wedge", images, Limits(force=True))
    assert device.status().images["wedge"] == 12
    device.rollback(1)  # they are not part of this generation
    assert device.learn("wedge", images).generation == 5


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({}, "there is nothing to learn"),
        ({"wedge": 2}, "a new class needs at least 3 different images, but 'wedge' has 2"),
        ({"cup": 0}, "a known class needs at least 3 different images, but 'cup' has 0"),
        ({"cup": 3, " cup": 3}, "the class ' cup' is given twice"),
        ({"wedge": 3, "wedge ": 3}, "the class 'wedge ' is given twice"),
        ({"unknown": 3}, "reserved"),
    ],
)
def test_refused_learn_changes_nothing(root, images, message):
    device = Device.open(root)
    with pytest.raises(InputError, match=message):
        device.learn_all({name: photos("cup", count) for name, count in images.items()})
    assert Device.open(root).generation.number == 1


def test_learn_that_causes_forgetting_is_refused_and_changes_nothing(root):
    device = Device.open(root)
    before = device.predict(photos("cup", 5))
    with pytest.raises(GateRefusedError, match=r"nothing was changed: .*'cup' loses most") as raised:
        device.learn("mug", photos("cup", 20, seed=1))
    assert raised.value.exit_code == 4
    assert device.predict(photos("cup", 5)) == before
    assert Device.open(root).generation.number == 1
    result = device.learn_all({"mug": photos("cup", 20, seed=1)}, Limits(max_forgetting=0.5))
    assert "'mug' looks like 'cup'" in result.warnings[0]
    assert result.old_classes.worst.label == "cup"
    assert device.history().generations[-1].info["warnings"] == result.warnings


def test_rename_changes_only_the_name(root):
    device = Device.open(root)
    before = device.learner.scores(device.embed(photos("cup", 5)))
    result = device.rename("cup", "mug")
    assert (result.generation, result.renamed) == (2, ("cup", "mug"))
    assert labels(device, "cup") == {"mug"}
    assert device.learner.scores(device.embed(photos("cup", 5))).equal(before)
    assert device.history().generations[-1].info == {"renamed": ["cup", "mug"]}
    with pytest.raises(InputError, match="no class 'cup' is known"):
        device.rename("cup", "x")
    device.rollback()
    assert "cup" in device.classes


def test_strict_refuses_a_slower_provider_than_the_target_expects(root, tiny_bundle, tmp_path, caplog):
    assert Device.open(root, strict=True).predict(photos("cup", 1))  # the bundle targets the CPU
    path = tmp_path / "jetson.ssdedge"
    path.write_bytes(tiny_bundle(target="jetson"))
    with pytest.raises(SlowerProviderError, match="CPUExecutionProvider runs the backbone, slower") as raised:
        install(tmp_path / "strict", path, strict=True)
    assert raised.value.exit_code == 6
    assert not (tmp_path / "strict" / "CURRENT").exists()
    install(root, path)
    assert Device.open(root).predict(photos("cup", 1))
    assert "warning: CPUExecutionProvider runs the backbone" in caplog.text
    caplog.clear()
    assert Device.open(root).predict(photos("cup", 1))  # said once
    assert not caplog.text
    assert "CPUExecutionProvider runs the backbone" in Device.open(root).status().note
    with pytest.raises(SlowerProviderError):
        Device.open(root, strict=True).predict(photos("cup", 1))


def test_readers_get_consistent_states_while_another_thread_learns(root):
    device = Device.open(root)
    probes = photos("cup", 3, seed=5) + photos("wedge", 3, seed=5)
    answers: dict[int, set[tuple]] = {}
    errors: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                predictions = device.predict(probes)
                (number,) = {one.generation for one in predictions}
                answers.setdefault(number, set()).add(tuple((one.label, one.score) for one in predictions))
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(8)]
    for reader in readers:
        reader.start()
    for step in range(6):
        label, kind = ("wedge", "wedge") if step == 0 else (f"class {step}", "bolt")
        device.learn(label, photos(kind, 4, seed=step), Limits(force=True))  # five names for one class
    device.rollback(1)
    done.set()
    for reader in readers:
        reader.join(30)
    assert not errors
    assert len(answers) > 2
    assert all(len(seen) == 1 for seen in answers.values())  # one answer per generation, bit for bit
    for number, seen in answers.items():
        expected = Device(FixedGeneration(device.store.root, number)).predict(probes)
        assert seen == {tuple((one.label, one.score) for one in expected)}


class FixedGeneration(Generations):
    """Store whose current generation is fixed."""

    def __init__(self, root: Path, number: int) -> None:
        super().__init__(root)
        self.number = number

    def pointer(self):
        return self.number


def test_refresh_loads_the_commit_of_another_process(root):
    here, there = Device.open(root), Device.open(root)
    assert here.refresh() is False
    there.learn("wedge", photos("wedge", 4))
    assert "wedge" not in {prediction.nearest for prediction in here.predict(photos("wedge", 10, seed=9))}
    assert here.refresh() is True
    assert labels(here, "wedge") == {"wedge"}
    assert here.refresh() is False


def test_second_writer_is_refused(root):
    first, second = Device.open(root), Device.open(root)
    with first.store.writer(), pytest.raises(EnvironmentUnfitError, match="another process is writing"):
        second.learn("wedge", photos("wedge", 4))
    assert second.learn("wedge", photos("wedge", 4)).generation == 2
