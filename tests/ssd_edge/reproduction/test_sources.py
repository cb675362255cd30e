"""Data sets that are subsampled, read as pixels or replaced, and keys pretrained where the shipped ones do not fit."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ssd_edge import learners
from ssd_edge.backbones import keys
from ssd_edge.config import DataConfig
from ssd_edge.data import load
from ssd_edge.errors import InputError
from ssd_edge.images import Pixels
from ssd_edge.report.terminal import Console
from ssd_edge.reproduction import sources as module
from ssd_edge.reproduction.sources import PRETRAINING, Sources, pixels, subset
from ssd_edge.reproduction.specs import streams

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a data folder with five shapes in place of the pretraining data."""
    folder = tmp_path / "data"
    folder.mkdir()
    with tarfile.open(folder / PRETRAINING, "w:xz", preset=0) as archive:
        for part in ("train", "test"):
            archive.add(shapes / part, part)
    monkeypatch.setenv("SSD_EDGE_DATA", str(folder))
    return folder


def make_sources() -> Sources:
    return Sources(torch.device("cpu"), Console(io.StringIO()))


def sdmlp(**settings: object) -> dict[str, object]:
    return dataclasses.asdict(learners.settings_class("sdmlp")(**settings))


def test_a_subset_has_the_given_number_of_images_per_class() -> None:
    full = load(DataConfig(path="digits"), 0)
    part, again = subset(full, 7, 3), subset(full, 7, 3)
    assert np.bincount(part.train_labels).tolist() == [7] * 10
    assert np.bincount(part.test_labels).tolist() == [3] * 10
    assert len(part.train) == 70
    np.testing.assert_array_equal(part.train.load([5], Pixels(8)), again.train.load([5], Pixels(8)))
    images = {image.tobytes() for image in full.train.load(range(len(full.train)), Pixels(8))[full.train_labels == 4]}
    assert all(image.tobytes() in images for image in part.train.load(range(70), Pixels(8))[part.train_labels == 4])
    assert len({full.fingerprint, part.fingerprint, subset(full, 7, 2).fingerprint}) == 3


def test_pixels_are_those_of_the_image_without_its_border(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (6, 28, 28), dtype=np.uint8), np.array([0, 1, 2] * 2)
    np.savez(tmp_path / "mnist.npz", x_train=x, y_train=y, x_test=x[::-1], y_test=y[::-1])
    made = pixels(load(DataConfig(path=str(tmp_path / "mnist.npz")), 0))
    np.testing.assert_allclose(made["train"], x.reshape(6, 784) / 255, rtol=1e-6)
    np.testing.assert_allclose(made["test"], x[::-1].reshape(6, 784) / 255, rtol=1e-6)
    assert made["train"].dtype == np.float32


def test_digits_stand_in_for_missing_data() -> None:
    inputs = make_sources().inputs(streams()["mnist-pixels"], (5, 2), True)
    assert inputs.stand_in
    assert inputs.notes == ("digits in place of mnist.npz: data not found",)
    assert inputs.embedded["train"].shape == (50, 784)
    with pytest.raises(InputError, match=r"no data set at .*mnist\.npz"):
        make_sources().inputs(streams()["mnist-pixels"], (5, 2), False)


def test_shipped_keys_are_used_where_they_fit(data: Path) -> None:
    sources, stream = make_sources(), streams()["cifar10"]
    inputs = module.Inputs(None, {}, "identity", sources.embedder("shipped").priors)
    priors, made, notes = sources.keys(inputs, sdmlp(), stream, True)
    assert priors is inputs.priors
    assert (made["source"], made["k"], made["neurons"], notes) == ("backbone", 10, 1000, ())
    priors, made, notes = sources.keys(inputs, {"neurons": 1000}, stream, True)  # a learner without keys
    assert (priors is inputs.priors, made, notes) == (True, None, ())


def test_keys_are_pretrained_once_where_the_shipped_ones_do_not_fit(data: Path, monkeypatch) -> None:
    sources, stream = make_sources(), streams()["cifar10"]
    embedder = sources.embedder("shipped")
    inputs = module.Inputs(None, {}, embedder.identity, embedder.priors)
    priors, made, notes = sources.keys(inputs, sdmlp(neurons=16, k=3, shift=0.5), stream, True)
    dataset = load(DataConfig(path=PRETRAINING), 0)
    vectors = torch.from_numpy(np.concatenate([embedder.embed(part) for part in dataset.train.batches(Pixels(32))]))
    config = module.StudentConfig(neurons=16, k=3, shift=0.5)
    wanted, counters, switch, _ = keys.pretrain_student(
        vectors, torch.from_numpy(dataset.train_labels), 5, config, 0, lambda text: None
    )
    np.testing.assert_allclose(priors.keys, wanted.numpy(), atol=1e-5)
    np.testing.assert_array_equal(priors.counters.shape, counters.shape)
    assert (priors.student["switch"], priors.student["shift"], priors.student["k"]) == (switch, 0.5, 3)
    assert notes == ("keys pretrained here for r = 16, k = 3, s = 0.5",)
    assert (made["source"], made["neurons"], made["k"]) == ("pretrained here", 16, 3)
    learner = learners.build({"name": "sdmlp", **sdmlp(neurons=16, k=3, shift=0.5)}, 256, priors)
    assert learner.note == ""  # the learner accepts them
    monkeypatch.setattr(module, "pretrain_student", None)
    again, _, _ = make_sources().keys(inputs, sdmlp(neurons=16, k=3, shift=0.5), stream, True)
    np.testing.assert_array_equal(again.keys, priors.keys)


@pytest.mark.parametrize(
    ("settings", "may", "source", "note"),
    [
        ({"neurons": 16, "k": 3}, True, "random", "random keys: pretraining data not found"),
        ({"neurons": 16, "k": 3}, False, "random", "random keys: none are pretrained for this budget"),
        ({"k": 1}, True, "backbone", "keys pretrained for k = 10, not 1: pretraining data not found"),
    ],
)
def test_a_note_explains_why_keys_are_not_available(settings: dict, may: bool, source: str, note: str) -> None:
    sources = make_sources()
    inputs = module.Inputs(None, {}, "identity", sources.embedder("shipped").priors)
    priors, made, notes = sources.keys(inputs, sdmlp(**settings), streams()["cifar10"], may)
    assert priors is inputs.priors
    assert (made, notes) == ({"source": source}, (note,))
