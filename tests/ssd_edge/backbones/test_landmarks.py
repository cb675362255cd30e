"""Tests of landmarks and discriminant directions computed from pretraining data."""

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
    """Return embeddings and labels of classes whose means differ in 4 dimensions, with unit noise in all."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.zeros(classes, DIM)
    means[:, :4] = 2.0 * torch.randn(classes, 4, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(count) % classes
    return means[labels] + torch.randn(count, DIM, generator=generator), labels


def example(count: int = 3000, neurons: int = 120, directions: int = 60) -> tuple[Landmarks, list[str]]:
    lines: list[str] = []
    vectors, labels = embeddings(count)
    return make_landmarks(vectors, labels, CLASSES, neurons, directions, 0, lines.append), lines


def features(landmarks: Landmarks, vectors: Tensor) -> Tensor:
    return build({"name": "landmark"}, DIM, Priors(landmarks=landmarks)).features(vectors).double()


def test_features_have_unit_within_class_variance_and_sorted_signal() -> None:
    landmarks, lines = example()
    vectors, labels = embeddings(3000)
    x = features(landmarks, vectors)
    means = torch.stack([x[labels == row].mean(0) for row in range(CLASSES)])
    spread = (x - means[labels]).square().mean(0)
    assert 0.5 < float(spread.mean()) < 1.5
    between = means.var(0) - spread / 100
    assert float(between[:4].min()) > 10 * float(between[20:].abs().max())  # discriminative directions come first
    assert (np.diff(landmarks.signal) <= 0).all()
    assert landmarks.signal.min() >= np.float32(FLOOR)
    assert lines == [line for line in lines if "120 neurons, 60 directions" in line] != []


def test_prior_mean_weighs_classes_equally() -> None:
    """Features are centred at the mean of the class means, regardless of the number of images per class."""
    vectors, labels = embeddings(3000)
    unbalanced = torch.cat([torch.arange(3000), (labels == 0).nonzero().flatten().repeat(20)])
    landmarks = make_landmarks(vectors[unbalanced], labels[unbalanced], CLASSES, 120, 60, 0, lambda line: None)
    x = features(landmarks, vectors)
    means = torch.stack([x[labels == row].mean(0) for row in range(CLASSES)])
    offset = means.mean(0).norm()
    assert float(offset) < 0.15 * float(means.norm(dim=1).mean())


def test_landmarks_are_exact_in_fp16() -> None:
    landmarks, _ = example()
    for name in ("keys", "projection"):
        array = getattr(landmarks, name)
        assert np.array_equal(array, array.astype(np.float16).astype(np.float32)), name
        assert np.isfinite(array).all()


def test_fewer_images_give_fewer_neurons_and_directions() -> None:
    landmarks, lines = example(count=90, neurons=1500, directions=900)
    assert landmarks.keys.shape == (90, DIM)
    assert landmarks.projection.shape[1] == 22  # a quarter of the images
    assert "90 neurons, 22 directions" in lines[0]


def test_the_same_seed_gives_the_same_landmarks() -> None:
    (first, _), (second, _) = example(), example()
    assert all(np.array_equal(getattr(first, name), getattr(second, name)) for name in ("keys", "mean", "projection"))


def test_landmarks_improve_few_shot_accuracy_on_new_classes() -> None:
    landmarks, _ = example()
    vectors, labels = embeddings(2050, classes=10, seed=3)
    few, test = torch.arange(50), torch.arange(50, 2050)
    accuracy = {}
    for case, priors in (("landmarks", Priors(landmarks=landmarks)), ("random", Priors())):
        learner = build({"name": "landmark", "directions": 60}, DIM, priors)
        learner.learn(Task(vectors[few], labels[few]))
        accuracy[case] = float((learner.predict(vectors[test]) == labels[test]).double().mean())
    assert accuracy["landmarks"] > accuracy["random"] + 0.03
