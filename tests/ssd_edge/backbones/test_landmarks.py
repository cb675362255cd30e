"""Landmarks and directions: what they promise about the data that they were made from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ssd_edge.backbones.landmarks import FLOOR, make_landmarks
from ssd_edge.learners import Task, build
from ssd_edge.learners.priors import Landmarks, Priors

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, CLASSES = 24, 30


def embeddings(count: int, classes: int = CLASSES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Classes whose means differ in four dimensions only, and images that vary in all."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.zeros(classes, DIM)
    means[:, :4] = 2.0 * torch.randn(classes, 4, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(count) % classes
    return means[labels] + torch.randn(count, DIM, generator=generator), labels


def made(count: int = 3000, neurons: int = 120, directions: int = 60) -> tuple[Landmarks, list[str]]:
    said: list[str] = []
    vectors, labels = embeddings(count)
    return make_landmarks(vectors, labels, CLASSES, neurons, directions, 0, said.append), said


def features(landmarks: Landmarks, vectors: Tensor) -> Tensor:
    return build({"name": "landmark"}, DIM, Priors(landmarks=landmarks)).features(vectors).double()


def test_the_spread_within_classes_is_about_one_and_signal_comes_first() -> None:
    landmarks, said = made()
    vectors, labels = embeddings(3000)
    x = features(landmarks, vectors)
    means = torch.stack([x[labels == row].mean(0) for row in range(CLASSES)])
    spread = (x - means[labels]).square().mean(0)
    assert 0.5 < float(spread.mean()) < 1.5
    between = means.var(0) - spread / 100
    assert float(between[:4].min()) > 10 * float(between[20:].abs().max())  # what tells classes apart is in front
    assert (np.diff(landmarks.signal) <= 0).all()
    assert landmarks.signal.min() >= np.float32(FLOOR)
    assert said == [line for line in said if "120 neurons, 60 directions" in line] != []


def test_new_classes_are_expected_around_the_mean_of_the_old_ones() -> None:
    """Each class counts alike, however many images it has."""
    vectors, labels = embeddings(3000)
    many = torch.cat([torch.arange(3000), (labels == 0).nonzero().flatten().repeat(20)])
    landmarks = make_landmarks(vectors[many], labels[many], CLASSES, 120, 60, 0, lambda line: None)
    x = features(landmarks, vectors)
    means = torch.stack([x[labels == row].mean(0) for row in range(CLASSES)])
    middle = means.mean(0).norm()
    assert float(middle) < 0.15 * float(means.norm(dim=1).mean())


def test_what_a_package_keeps_in_fp16_is_exact() -> None:
    landmarks, _ = made()
    for name in ("keys", "projection"):
        array = getattr(landmarks, name)
        assert np.array_equal(array, array.astype(np.float16).astype(np.float32)), name
        assert np.isfinite(array).all()


def test_fewer_images_give_fewer_neurons_and_directions() -> None:
    landmarks, said = made(count=90, neurons=1500, directions=900)
    assert landmarks.keys.shape == (90, DIM)
    assert landmarks.projection.shape[1] == 22  # a quarter of the images
    assert "90 neurons, 22 directions" in said[0]


def test_the_same_seed_gives_the_same_landmarks() -> None:
    (one, _), (two, _) = made(), made()
    assert all(np.array_equal(getattr(one, name), getattr(two, name)) for name in ("keys", "mean", "projection"))


def test_they_help_with_few_images_of_classes_that_were_not_in_it() -> None:
    landmarks, _ = made()
    vectors, labels = embeddings(2050, classes=10, seed=3)
    few, test = torch.arange(50), torch.arange(50, 2050)
    right = {}
    for case, priors in (("landmarks", Priors(landmarks=landmarks)), ("random", Priors())):
        learner = build({"name": "landmark", "directions": 60}, DIM, priors)
        learner.learn(Task(vectors[few], labels[few]))
        right[case] = float((learner.predict(vectors[test]) == labels[test]).double().mean())
    assert right["landmarks"] > right["random"] + 0.03
