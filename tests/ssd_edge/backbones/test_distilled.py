"""Distillation of a student: what it learns from, what it becomes, and that a run uses it like any backbone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssd_edge.backbones import distilled, names
from ssd_edge.backbones import package as packages
from ssd_edge.backbones.distilled import Answers, Distilled, distil, loss_of, open_student
from ssd_edge.backbones.embedder import open_backbone, write_backbone
from ssd_edge.backbones.graph import Network
from ssd_edge.backbones.onnx import OnnxEmbedder
from ssd_edge.config import BackboneConfig, DistillationConfig
from ssd_edge.data import Images
from ssd_edge.errors import InputError
from ssd_edge.images import Pixels

CPU = torch.device("cpu")
SETTINGS = DistillationConfig(epochs=15, batch=16, lr=0.03, crop=0)


def silent(*told: object) -> None:
    """Ignore what is told."""


def net() -> torch.nn.Module:
    torch.manual_seed(5)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, 2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
    )  # fmt: skip


NETWORK = Network("small", "digest", net, Pixels(12), (0.5,) * 3, (0.25,) * 3, {"terms": "MIT", "data": "drawn"})


@pytest.fixture(scope="module")
def photographs() -> Images:
    coarse = np.random.default_rng(0).integers(0, 256, (64, 3, 3, 3), dtype=np.uint8)
    return Images(coarse.repeat(4, 1).repeat(4, 2), [f"image {number}" for number in range(64)])


@pytest.fixture(scope="module")
def answers(photographs: Images) -> Answers:
    """What a teacher says that sees the colours of both halves of a photograph."""
    pixels = photographs.load(np.arange(64), NETWORK.pixels).astype(np.float64)
    views = np.stack([pixels, pixels[:, :, ::-1]])
    colours = np.concatenate([views[:, :, :, :6].mean((2, 3)), views[:, :, :, 6:].mean((2, 3))], axis=2)
    standard = ((colours - colours.mean((0, 1))) / colours.std((0, 1))).astype(np.float16)
    return Answers((standard,), None, ({"name": "eyes", "terms": "CC0"},))


def made(photographs: Images, answers: Answers, **settings: Any) -> Distilled:
    config = dataclasses.replace(SETTINGS, **settings)
    return distil(NETWORK, photographs, answers, config, CPU, silent, silent)


@pytest.fixture(scope="module")
def student(photographs: Images, answers: Answers) -> Distilled:
    return made(photographs, answers)


def test_a_student_learns_what_its_teacher_sees(student: Distilled, photographs: Images, answers: Answers) -> None:
    def explained(embedder: OnnxEmbedder) -> float:
        features = embedder.embed(photographs.load(np.arange(64), embedder.pixels)).astype(np.float64)
        features = np.c_[features[:, -8:], np.ones(64)]
        wanted = answers.features[0][0].astype(np.float64)
        left = wanted - features @ np.linalg.lstsq(features, wanted, rcond=None)[0]
        return float(1 - (left**2).sum() / (wanted**2).sum())

    before = explained(OnnxEmbedder(distilled.as_graph(NETWORK, net(), {})))
    after = explained(OnnxEmbedder(student.graph))
    assert student.loss < 0.6
    assert after > before + 0.1


def test_a_seed_gives_the_same_student(student: Distilled, photographs: Images, answers: Answers) -> None:
    again = made(photographs, answers)
    assert again.graph == student.graph
    assert made(photographs, answers, seed=1, epochs=1).graph.identity != student.graph.identity


def test_the_card_names_all_sources(student: Distilled, photographs: Images) -> None:
    card = student.graph.card
    assert card["terms"] == "start: MIT; eyes: CC0"
    assert card["photographs"] == photographs.digest().hex()
    assert card["teachers"] == [{"name": "eyes", "terms": "CC0"}]
    assert card["config"]["lr"] == SETTINGS.lr
    assert card["start"]["weights"] == "digest"


def test_minutes_become_epochs(photographs: Images, answers: Answers) -> None:
    said: list[str] = []
    told: list[int] = []
    config = dataclasses.replace(SETTINGS, minutes=1e-9)
    found = distil(NETWORK, photographs, answers, config, CPU, said.append, lambda epoch, *_: told.append(epoch))
    assert (found.epochs, told) == (1, [1])
    assert "fit into 1e-09 minutes" in said[0]


def test_the_loss_is_that_of_the_view_and_softened() -> None:
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(2, 5, 3)).astype(np.float16), rng.normal(size=(2, 5, 2)).astype(np.float16))
    scores = np.log(rng.dirichlet(np.ones(4), (2, 5))).astype(np.float16)
    config = DistillationConfig(temperature=3.0, features=2.0, scores=0.5)
    output, index, flipped = torch.randn(2, 9), torch.tensor([4, 1]), torch.tensor([True, False])
    got = loss_of(Answers(features, scores, ()), config, CPU)(output, index, flipped)

    def squares(part: np.ndarray, first: int) -> float:
        wanted = np.stack([part[1, 4], part[0, 1]]).astype(np.float64)
        return float(((output[:, first : first + part.shape[2]].numpy() - wanted) ** 2).mean())

    def softened(logits: np.ndarray) -> np.ndarray:
        powers = np.exp(logits.astype(np.float64) / 3.0)
        return powers / powers.sum(1, keepdims=True)

    p, q = softened(np.stack([scores[1, 4], scores[0, 1]])), softened(output[:, 5:].numpy())
    divergence = (p * np.log(p / q)).sum(1).mean()
    expected = 2.0 * (squares(features[0], 0) + squares(features[1], 3)) / 2 + 0.5 * 9.0 * divergence
    assert float(got) == pytest.approx(expected, rel=1e-4)


def test_something_must_be_matched(photographs: Images, answers: Answers) -> None:
    with pytest.raises(InputError, match=r"train\.features is 0 and no teacher has classes"):
        made(photographs, answers, features=0.0)


def test_a_distilled_folder_is_a_backbone(student: Distilled, photographs: Images, tmp_path: Path) -> None:
    own = OnnxEmbedder(student.graph)
    write_backbone(tmp_path, "package:small", own)
    name = f"package:{tmp_path}"
    found = open_backbone(BackboneConfig(name), CPU)
    images = photographs.load(np.arange(5), found.pixels)
    np.testing.assert_array_equal(found.embed(images), own.embed(images))
    assert (found.identity, found.provenance["terms"]) == (own.identity, "start: MIT; eyes: CC0")
    assert (own.dim, open_backbone(BackboneConfig(name, levels="last"), CPU).dim) == (16, 8)
    with pytest.raises(InputError, match=r"backbone\.size is fixed in a package"):
        open_backbone(BackboneConfig(name, size=16), CPU)


def test_students_by_name(tmp_path: Path) -> None:
    bundled = open_student(DistillationConfig(), silent)
    assert (bundled.arch, bundled.pixels) == ("resnet9", Pixels(64))
    assert open_student(DistillationConfig(size=96), silent).pixels == Pixels(96)
    packages.save(packages.load(), tmp_path)
    own = open_student(DistillationConfig(student=f"package:{tmp_path}"), silent)
    assert (own.weights, own.pixels) == (packages.load().identity, Pixels(32))
    assert names.public(f"package:{tmp_path}") == f"package:{tmp_path.name}"  # cards leave this machine
    for name in ("mobilenet-v3-small", "onnx:own.onnx", "resnet8"):
        with pytest.raises(InputError, match=rf"'{name}' is no network that can be trained here; students: resnet9"):
            open_student(DistillationConfig(student=name), silent)


def test_a_student_has_its_own_preprocessing_at_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    cropped = dataclasses.replace(NETWORK, pixels=Pixels(16, "crop", 20))
    monkeypatch.setattr(names, "_from_wheel", lambda config: cropped)
    assert open_student(DistillationConfig(student="lite0", size=8), silent).pixels == Pixels(8, "crop", 10)
