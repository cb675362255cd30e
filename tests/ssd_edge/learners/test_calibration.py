"""Probabilities from scores, and the sums that they are calibrated with."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.small_learners import DIM, OPTIONS

from ssd_edge import learners
from ssd_edge.learners.calibration import TEMPERATURES, WORST, losses, probabilities, temperature
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.priors import Priors
from ssd_edge.learners.retention import TrackRecord, losses_of
from ssd_edge.learners.unknown import Rejector

CLASSES = 6


def drawn(true: float, count: int = 3000) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores and labels that are drawn from softmax(scores/true)."""
    generator = torch.Generator().manual_seed(0)
    scores = 2 * true * torch.randn(count, CLASSES, generator=generator)
    return scores, torch.multinomial((scores.double() / true).softmax(1), 1, generator=generator)[:, 0]


def summed(scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sums = torch.zeros(CLASSES, len(TEMPERATURES), dtype=torch.float64)
    return sums.index_add(0, labels, losses(scores, labels)), torch.bincount(labels, minlength=CLASSES).double()


@pytest.mark.parametrize("true", [0.05, 1.0, 7.0, 300.0])  # outputs of ridge regression … discriminants
def test_finds_the_temperature_that_the_labels_were_drawn_with(true: float) -> None:
    scores, labels = drawn(true)
    found = temperature(*summed(scores, labels))
    assert found is not None
    assert abs(math.log2(found / true)) <= 0.25
    best = probabilities(scores, found).max(1)
    assert float(best.values.mean()) == pytest.approx(float((best.indices == labels).double().mean()), abs=0.03)


def test_every_class_counts_alike() -> None:
    scores, labels = drawn(1.0)
    rare = labels == 0
    scores[rare] /= 4  # a class of its own kind
    many = [torch.cat([part, *[part[rare]] * 20]) for part in (scores, labels)]
    assert temperature(*summed(scores, labels)) == temperature(*summed(*many))


def test_few_images_without_an_error_are_not_certain() -> None:
    labels = torch.arange(12) % CLASSES
    scores = 100.0 * torch.nn.functional.one_hot(labels, CLASSES)
    found = temperature(*summed(scores, labels))
    assert found is not None
    assert 0.85 < float(probabilities(scores, found).max(1).values.mean()) < 0.97


def test_nothing_is_known_without_images_or_with_one_class() -> None:
    nothing = torch.zeros(CLASSES, len(TEMPERATURES), dtype=torch.float64)
    assert temperature(nothing, torch.zeros(CLASSES)) is None
    assert temperature(nothing[:0], torch.zeros(0)) is None
    assert temperature(losses(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64)), torch.ones(1)) is None


def test_losses_are_finite_whatever_the_scores() -> None:
    found = losses(torch.tensor([[-1e30, 1e30, 0.0], [1e-30, 0.0, 0.0]]), torch.tensor([0, 1]))
    assert bool(((found >= 0) & (found <= WORST)).all())


# ── in the record ────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def world() -> tuple[learners.Learner, ClassStatistics, Rejector, torch.Tensor, torch.Tensor]:
    generator, labels = torch.Generator().manual_seed(1), torch.arange(240) % 4
    vectors = torch.randn(4, DIM, generator=generator)[labels] + torch.randn(240, DIM, generator=generator)
    learner, statistics = learners.build({"name": "ncm"}, DIM, Priors()), ClassStatistics(DIM)
    learner.learn(learners.Task(vectors[:120], labels[:120]))
    statistics.add(vectors[:120], labels[:120])
    return learner, statistics, Rejector.fit(statistics), vectors[120:], labels[120:]


def test_sums_add_up_and_belong_to_their_class(world) -> None:
    learner, statistics, rejector, images, rows = world
    whole = TrackRecord.tested_on(learner, statistics, rejector, images, rows)
    assert whole.temperature is not None
    part = rows == 2
    rest = TrackRecord.tested_on(learner, statistics, rejector, images[~part], rows[~part])
    sums = losses_of(learner, images[part], rows[part]).sum(0)
    counts = (int(count) for count in whole.counts(2))
    added = rest.measured(learner, statistics, 2, *counts, images[:0], sums)
    assert torch.allclose(added.losses, whole.losses, rtol=1e-12)
    assert torch.equal(whole.without_rows([1]).losses, whole.losses[[0, 2, 3]])
    joined = whole.joined(learner, statistics, [0], 3)
    assert torch.equal(joined.losses[3], whole.losses[3] + whole.losses[0])
    restored = TrackRecord.from_state(whole.state())
    scores = learner.scores(images)
    assert torch.equal(restored.probabilities(scores), whole.probabilities(scores))


def test_a_record_grows_with_a_new_class(world) -> None:
    learner, statistics, rejector, images, rows = world
    few = TrackRecord.tested_on(learner, statistics, rejector, images, rows).without_rows([3])
    grown = few.measured(learner, statistics, 3, 1, 1, 1, images[:0], torch.ones(len(TEMPERATURES)))
    assert torch.equal(grown.losses[:3], few.losses)
    assert bool((grown.losses[3] == 1).all())


def test_without_a_test_there_is_no_probability(world) -> None:
    learner, statistics, *_ = world
    untested = TrackRecord.of(learner, statistics, *[torch.zeros(4)] * 3)
    assert untested.temperature is None
    assert untested.probabilities(torch.zeros(2, 4)) is None


@pytest.mark.parametrize("name", learners.LEARNERS)
def test_the_temperatures_cover_the_scores_of_every_learner(name: str, world) -> None:
    _, statistics, rejector, images, rows = world
    learner = learners.build(OPTIONS[name], DIM, Priors())
    learner.learn(learners.Task(images[:60], rows[:60]))
    found = TrackRecord.tested_on(learner, statistics, rejector, images[60:], rows[60:])
    assert found.temperature is not None
    assert TEMPERATURES[2] < found.temperature < TEMPERATURES[-3]
    shares = found.probabilities(learner.scores(images[60:]))
    assert shares is not None
    right = float((shares.argmax(1) == rows[60:]).double().mean())
    assert float(shares.amax(1).mean()) == pytest.approx(right, abs=0.2)
