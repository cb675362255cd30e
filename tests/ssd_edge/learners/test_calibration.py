"""Probabilities from scores, and the sums that they are calibrated with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.small_learners import DIM, OPTIONS

from ssd_edge import learners
from ssd_edge.errors import BundleRefusedError
from ssd_edge.learners.calibration import TEMPERATURES, confidence, promises, temperatures
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.priors import Priors
from ssd_edge.learners.retention import TrackRecord, promises_of
from ssd_edge.learners.unknown import Rejector

CLASSES = 6
TAUGHT = torch.arange(CLASSES) >= 4


def drawn(true: float, count: int = 3000, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores and labels that are drawn from softmax(scores/true)."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * true * torch.randn(count, CLASSES, generator=generator)
    return scores, torch.multinomial((scores.double() / true).softmax(1), 1, generator=generator)[:, 0]


def summed(scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sums = torch.zeros(CLASSES, len(TEMPERATURES), dtype=torch.float64).index_add(0, labels, promises(scores))
    counts = [
        torch.bincount(labels[part], minlength=CLASSES).double() for part in (scores.argmax(1) == labels, labels >= 0)
    ]
    return sums, *counts


@pytest.mark.parametrize("true", [0.05, 1.0, 7.0, 300.0])  # outputs of ridge regression … discriminants
def test_finds_the_temperature_that_the_labels_were_drawn_with(true: float) -> None:
    scores, labels = drawn(true)
    found = temperatures(*summed(scores, labels), TAUGHT)
    assert found is not None
    assert found.numpy() == pytest.approx(true, rel=0.15)
    scores, labels = drawn(true, seed=1)
    sure, right = confidence(scores, found), scores.argmax(1) == labels
    assert torch.equal(confidence(scores, found).argmax(), sure.argmax())
    for low, high in ((0.3, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 1.0)):
        part = (sure > low) & (sure <= high)
        assert float(sure[part].mean()) == pytest.approx(float(right[part].double().mean()), abs=0.05)


def test_taught_classes_have_a_temperature_of_their_own() -> None:
    (scores, labels), (few, others) = drawn(1.0), drawn(1.0, seed=1)
    part = TAUGHT[labels]
    scores[part], labels[part] = 4 * few[TAUGHT[others]][: int(part.sum())], others[TAUGHT[others]][: int(part.sum())]
    found = temperatures(*summed(scores, labels), TAUGHT)
    assert found is not None
    assert found[~TAUGHT].numpy() == pytest.approx(1, rel=0.2)
    assert found[TAUGHT].numpy() == pytest.approx(4, rel=0.2)
    before = temperatures(*summed(scores[~part], labels[~part]), TAUGHT)
    assert before is not None
    assert bool((before == before[0]).all())  # nothing was taught yet


def test_every_class_counts_alike() -> None:
    scores, labels = drawn(1.0)
    rare = labels == 0
    scores[rare] *= 4  # a class of its own kind
    many = [torch.cat([part, *[part[rare]] * 20]) for part in (scores, labels)]
    once, often = (temperatures(*summed(*images), TAUGHT & False) for images in ((scores, labels), many))
    assert once is not None
    assert once[0].item() == pytest.approx(often[0].item(), rel=0.01)  # type: ignore[index]


def test_few_images_without_an_error_are_not_certain() -> None:
    labels = torch.arange(12) % CLASSES
    scores = 100.0 * torch.nn.functional.one_hot(labels, CLASSES)
    found = temperatures(*summed(scores, labels), TAUGHT)
    assert found is not None
    assert float(confidence(scores, found).mean()) == pytest.approx(12.5 / 13, abs=0.01)


def test_nothing_is_known_without_images_or_with_one_class() -> None:
    nothing, zeros = torch.zeros(CLASSES, len(TEMPERATURES), dtype=torch.float64), torch.zeros(CLASSES)
    assert temperatures(nothing, zeros, zeros, TAUGHT) is None
    assert temperatures(nothing[:0], zeros[:0], zeros[:0], TAUGHT[:0]) is None
    assert temperatures(nothing, zeros + 1, zeros + 1, TAUGHT) is None  # counts without promises
    one = torch.ones(1)
    assert temperatures(promises(torch.ones(1, 1)), one, one, TAUGHT[:1]) is None


def test_promises_are_probabilities_whatever_the_scores() -> None:
    found = promises(torch.tensor([[-1e30, 1e30, 0.0], [1e-30, 0.0, 0.0], [-1e30, -1e30, -1e30]]))
    assert bool(((found > 0.3) & (found <= 1)).all())


# ── in the record ────────────────────────────────────────────────────────────────────────────────────
World = tuple[learners.Learner, ClassStatistics, Rejector, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def world() -> World:
    generator, labels = torch.Generator().manual_seed(1), torch.arange(240) % 4
    vectors = torch.randn(4, DIM, generator=generator)[labels] + torch.randn(240, DIM, generator=generator)
    learner, statistics = learners.build({"name": "ncm"}, DIM, Priors()), ClassStatistics(DIM)
    learner.learn(learners.Task(vectors[:120], labels[:120]))
    statistics.add(vectors[:120], labels[:120])
    return learner, statistics, Rejector.fit(statistics), vectors[120:], labels[120:]


def test_sums_add_up_and_belong_to_their_class(world: World) -> None:
    learner, statistics, rejector, images, rows = world
    whole = TrackRecord.tested_on(learner, statistics, rejector, images, rows)
    part = rows == 2
    rest = TrackRecord.tested_on(learner, statistics, rejector, images[~part], rows[~part])
    counts = (int(count) for count in whole.counts(2))
    added = rest.measured(learner, statistics, 2, *counts, images[:0], promises_of(learner, images[part]).sum(0))
    assert torch.allclose(added.promised, whole.promised, rtol=1e-12)
    assert torch.equal(whole.without_rows([1]).promised, whole.promised[[0, 2, 3]])
    joined = whole.joined(learner, statistics, [0], 3)
    assert torch.equal(joined.promised[3], whole.promised[3] + whole.promised[0])
    restored, scores = TrackRecord.from_state(whole.state()), learner.scores(images)
    assert torch.equal(restored.confidence(scores), whole.confidence(scores))


def test_a_record_grows_with_a_new_class(world: World) -> None:
    learner, statistics, rejector, images, rows = world
    few = TrackRecord.tested_on(learner, statistics, rejector, images, rows).without_rows([3])
    grown = few.measured(learner, statistics, 3, 1, 1, 1, images[:0], torch.ones(len(TEMPERATURES)))
    assert torch.equal(grown.promised[:3], few.promised)
    assert bool((grown.promised[3] == 1).all())
    assert grown.taught.tolist() == [0, 0, 0, 1]


def test_without_a_test_there_is_no_probability(world: World) -> None:
    learner, statistics, *_ = world
    untested = TrackRecord.of(learner, statistics, *[torch.zeros(4)] * 3)
    assert untested.confidence(torch.zeros(2, 4)) is None


def test_more_promises_than_images_are_refused(world: World) -> None:
    state = TrackRecord.tested_on(*world).state()
    with pytest.raises(BundleRefusedError, match="exceed their number"):
        TrackRecord.from_state({**state, "promised": state["promised"] + np.float64(1)})


@pytest.mark.parametrize("name", learners.LEARNERS)
def test_the_temperatures_cover_the_scores_of_every_learner(name: str, world: World) -> None:
    _, statistics, rejector, images, rows = world
    learner = learners.build(OPTIONS[name], DIM, Priors())
    learner.learn(learners.Task(images[:60], rows[:60]))
    record = TrackRecord.tested_on(learner, statistics, rejector, images[60:], rows[60:])
    means = record.promised.sum(0) / 60
    assert means[0] > 0.95
    assert means[-1] < 0.3
    sure = record.confidence(learner.scores(images[60:])[:, :4])
    right = float((learner.predict(images[60:]) == rows[60:]).double().mean())
    assert float(sure.mean()) == pytest.approx(right, abs=0.02)  # type: ignore[union-attr]  # it is known
