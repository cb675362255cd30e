"""Doubt about mean and standard deviation: the wrong pair is noticed, the right one is not doubted."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from ssd_edge.backbones import names
from ssd_edge.backbones.embedder import open_backbone
from ssd_edge.config import BackboneConfig, DataConfig, TrainConfig, merge, parse
from ssd_edge.data import Dataset, Images, load
from ssd_edge.errors import InputError
from ssd_edge.images import Pixels
from ssd_edge.run import preprocessing

HALF, ZERO = ((0.5,) * 3, (0.5,) * 3), ((0.0,) * 3, (1.0,) * 3)


@dataclass(frozen=True)
class Graph:
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Saturating:
    """A network for normalised pixels from -1 to 1, whose features grow blurred where they leave this range."""

    opened = 0

    def __init__(self, graph: Graph) -> None:
        Saturating.opened += 1
        self.graph, self.pixels, self.widths = graph, Pixels(8), (192,)
        self.identity = f"saturating {graph.mean} {graph.std}"
        if graph.std[0] < 0.01:
            raise InputError("it overflows")

    def embed(self, images: np.ndarray) -> np.ndarray:
        normalised = (images / 255 - np.array(self.graph.mean)) / np.array(self.graph.std)
        beyond = np.abs(normalised.mean()) + np.abs(normalised.std() - 0.35)
        noise = np.random.default_rng(0).normal(0, 3 * beyond, normalised.shape)
        return (normalised + noise).reshape(len(images), -1).astype(np.float32)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> type[Saturating]:
    monkeypatch.setattr(preprocessing, "OnnxEmbedder", Saturating)
    Saturating.opened = 0
    return Saturating


def data(classes: int = 10, each: int = 12) -> Dataset:
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(classes), each)
    patterns = rng.uniform(80, 175, (classes, 8, 8, 3))
    pixels = np.clip(patterns[labels] + rng.normal(0, 60, (len(labels), 8, 8, 3)), 0, 255).astype(np.uint8)
    images = Images(pixels, [str(number) for number in range(len(labels))])
    known = tuple(map(str, range(classes)))
    return Dataset("d", known, images, labels, images, labels, f"{classes} {each}", "", False)


def doubted(pair: tuple[tuple[float, ...], ...], dataset: Dataset | None = None) -> str | None:
    embedder = Saturating(Graph(*pair))
    return preprocessing.doubt(dataset or data(), embedder, True, lambda text: None)


def test_the_wrong_pair_is_noticed(opened: type[Saturating]) -> None:
    sentence = doubted(ZERO)
    assert sentence is not None
    assert (
        "with 0.5 and 0.5 (pixels from -1 to 1), 120 training images lie nearer to their classes than with" in sentence
    )
    lever = sentence.partition("; try: ")[2].split()
    config = parse(TrainConfig, merge({}, lever)).backbone  # can be typed as it stands
    assert (config.mean, config.std) == HALF


def test_the_right_pair_is_not_doubted(opened: type[Saturating]) -> None:
    assert doubted(HALF) is None
    assert opened.opened == 1 + 3  # compared with the other three, one of which overflows


def test_the_result_is_kept(opened: type[Saturating]) -> None:
    first = doubted(ZERO)
    before = opened.opened
    assert doubted(ZERO) == first
    assert opened.opened == before + 1


def test_few_images_say_nothing(opened: type[Saturating]) -> None:
    assert doubted(ZERO, data(classes=10, each=3)) is None  # 30 images
    assert doubted(ZERO, data(classes=40, each=1)) is None
    assert opened.opened == 2


def test_only_what_its_source_states_is_trusted() -> None:
    assert preprocessing.stated(BackboneConfig(name="lite0"))
    assert not preprocessing.stated(BackboneConfig(name="onnx:x.onnx"))
    assert not preprocessing.stated(BackboneConfig(name="lite0", mean=(0.1, 0.1, 0.1)))


@pytest.mark.slow
@pytest.mark.skipif("SSD_EDGE_DATA" not in os.environ, reason="needs grocery50-224.tar")
def test_photographs_and_a_real_network(tmp_path: Path) -> None:
    """EfficientNet-Lite0 wants 0.5 and 0.5, but a user's file is taken to want ImageNet's mean and deviation."""
    (tmp_path / "own.onnx").write_bytes(names.resolve(BackboneConfig(name="lite0"), print).model)
    dataset = load(DataConfig(path="grocery50-224.tar"), 0)
    for own, right in (
        ({}, False),
        ({"mean": HALF[0], "std": HALF[1]}, True),
        ({"mean": ZERO[0], "std": ZERO[1]}, False),
    ):
        config = BackboneConfig(name=f"onnx:{tmp_path / 'own.onnx'}", **own)
        embedder = open_backbone(config, torch.device("cpu"))
        sentence = preprocessing.doubt(dataset, embedder, False, print)
        assert (sentence is None) == right
        assert right or "backbone.mean=0.5,0.5,0.5 backbone.std=0.5,0.5,0.5" in sentence
