"""Drift: too few images give no level, a shift is detected, and memory is constant."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from device_runtime.service.drift import BINS, MINIMUM, WINDOW, Monitor, Reference, level, psi
from ssd_edge import files
from ssd_edge.errors import InputError
from ssd_edge.learners.closed_form.sums import ClassStatistics

DIM, CLASSES = 24, 4


class World:
    """Classes with heavier tails than a Gaussian, as real embeddings have."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.means = self.rng.normal(0, 2, (CLASSES, DIM))
        self.mixing = self.rng.normal(size=(DIM, DIM)) / np.sqrt(DIM)

    def draw(self, count: int, classes: int = CLASSES, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return embeddings and labels; `shift` is in standard deviations along one direction of the noise."""
        labels = self.rng.integers(0, classes, count)
        noise = self.rng.standard_t(8, (count, DIM)) * np.sqrt(6 / 8)
        vectors = self.means[labels] + (noise + shift * np.ones(DIM)) @ self.mixing
        return torch.from_numpy(vectors).float(), torch.from_numpy(labels)

    def reference(self, images: int = 4000) -> Reference:
        """Return a reference of classes with this many images in total."""
        statistics = ClassStatistics(DIM)
        statistics.add(*self.draw(images))
        return Reference(statistics)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def reference(world: World) -> Reference:
    return world.reference()


def scores(count: int, level: float = 0.9) -> np.ndarray:
    return np.full(count, level)


def fed(reference: Reference, *parts: torch.Tensor) -> Monitor:
    monitor = Monitor(reference)
    for part in parts:
        monitor.add(part, scores(len(part)))
    return monitor


def test_index_follows_its_formula():
    observed = np.array([300] + [100] * 9)
    expected = np.full(BINS, 0.1)
    shares = (observed + 0.5) / (1200 + 5)
    by_hand = sum((o - 0.1) * np.log(o / 0.1) for o in shares)
    assert psi(observed, expected) == pytest.approx(by_hand)
    assert psi(np.full(BINS, 29), expected) is None
    assert [level(v) for v in (None, 0.0999, 0.1, 0.2499, 0.25)] == [
        "collecting", "stable", "moderate", "moderate", "drifted",
    ]  # fmt: skip


def test_bins_are_the_deciles_of_whole_embeddings(world: World):
    """The reference samples products of embeddings only; here are the embeddings themselves."""
    statistics = ClassStatistics(DIM)
    statistics.add(*world.draw(400))
    reference = Reference(statistics)
    factor = torch.linalg.cholesky(statistics.shrunk_covariance())
    noise = torch.randn(40_000, DIM, generator=torch.Generator().manual_seed(7), dtype=torch.float64) @ factor.T
    offsets = reference.measure(statistics.means.double()[torch.arange(40_000) % CLASSES] + noise)[0]
    for column, edges in zip(offsets.T, reference.edges, strict=True):
        shares = np.bincount(np.searchsorted(edges, column), minlength=BINS) / len(column)
        assert np.abs(shares - 0.1).max() < 0.012  # four standard deviations of both samples


def test_too_few_images_give_no_level(world: World, reference: Reference):
    monitor = Monitor(reference)
    assert monitor.report().level == "collecting"
    assert monitor.report().reject_rate is None
    monitor.add(world.draw(MINIMUM - 1, shift=9.0)[0], scores(MINIMUM - 1))
    assert (monitor.report().psi, monitor.report().images_needed) == (None, 1)
    monitor.add(world.draw(1)[0], scores(1))
    assert monitor.report().level == "drifted"


def test_no_shift_is_stable_with_few_and_many_images(world: World, reference: Reference):
    found = [fed(reference, world.draw(MINIMUM)[0]).report().psi for _ in range(60)]
    assert max(found) < 0.1
    report = fed(reference, world.draw(2 * WINDOW + MINIMUM)[0]).report()
    assert report.psi_distance < 0.03
    assert report.psi_score == pytest.approx(0.0, abs=0.01)
    assert report.level == "stable"


def test_one_class_only_is_no_drift(world: World, reference: Reference):
    report = fed(reference, world.draw(WINDOW)[0], world.draw(WINDOW, classes=1)[0]).report()
    assert report.level == "stable", report


def test_shift_is_detected_until_it_ends(world: World, reference: Reference):
    monitor = fed(reference, world.draw(WINDOW)[0])
    assert monitor.report().level == "stable"
    monitor.add(world.draw(2 * WINDOW, shift=1.0)[0], scores(2 * WINDOW))
    assert monitor.report().level == "drifted"
    monitor.add(world.draw(2 * WINDOW)[0], scores(2 * WINDOW))
    assert monitor.report().level == "stable"


def test_wider_spread_is_detected_by_the_distance(world: World, reference: Reference):
    usual = world.draw(WINDOW)
    wide, labels = world.draw(WINDOW)
    means = torch.from_numpy(world.means).float()[labels]
    report = fed(reference, usual[0], means + 1.3 * (wide - means)).report()
    assert report.psi_distance > 0.25


def test_larger_index_decides(world: World, reference: Reference):
    report = fed(reference, world.draw(WINDOW)[0], world.draw(WINDOW, shift=0.5)[0]).report()
    assert report.psi == max(report.psi_directions, report.psi_distance)


def test_report_does_not_depend_on_order_or_batches(world: World, reference: Reference):
    vectors = world.draw(WINDOW - 1)[0]
    shares = torch.linspace(0, 1, len(vectors))
    order = torch.randperm(len(vectors))
    one, other = Monitor(reference), Monitor(reference)
    one.add(vectors, shares)
    for part in order.split(37):
        other.add(vectors[part], shares[part])
    assert all(np.array_equal(a, other.state()[name]) for name, a in one.state().items())
    many = world.draw(2 * WINDOW + 77)[0]  # more than two windows
    assert fed(reference, many).report() == fed(reference, *many.split(333)).report()


def test_memory_does_not_grow(world: World, reference: Reference):
    few, many = fed(reference, world.draw(5)[0]), fed(reference, world.draw(5 * WINDOW)[0])
    sizes = [len(files.tensor_bytes(monitor.state())) for monitor in (few, many)]
    assert sizes[0] == sizes[1] < 6000
    assert many.report().images == WINDOW


def test_rejects_are_counted(world: World, reference: Reference):
    monitor = Monitor(reference)
    monitor.add(world.draw(WINDOW)[0], scores(WINDOW), np.arange(WINDOW) % 10 > 0)
    monitor.add(world.draw(WINDOW)[0], scores(WINDOW), np.arange(WINDOW) % 2 > 0)
    assert monitor.report().reject_rate == 0.5
    assert monitor.report().reject_rate_at_first == 0.1


def test_scores_are_reported_but_do_not_decide(world: World, reference: Reference):
    monitor = fed(reference, world.draw(WINDOW)[0])
    monitor.add(world.draw(WINDOW)[0], scores(WINDOW, 0.4))
    assert monitor.report().psi_score > 1
    assert monitor.report().level == "stable"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda v, s: (v.index_fill(1, torch.tensor([3]), float("nan")), s, None), "NaN"),
        (lambda v, s: (v.index_fill(0, torch.tensor([3]), float("inf")), s, None), "NaN or infinite"),
        (lambda v, s: (v, np.where(np.arange(len(s)) == 2, np.nan, s), None), "score"),
        (lambda v, s: (v, s * 7, None), "Pass probabilities, not logits"),
        (lambda v, s: (v[:, 1:], s, None), "are required; nothing was counted"),
        (lambda v, s: (v, s[1:], None), "are required; nothing was counted"),
        (lambda v, s: (v[0], s, None), "are required; nothing was counted"),
        (lambda v, s: (v, s, [True]), "are required; nothing was counted"),
    ],
)
def test_bad_input_is_refused_and_not_counted(world: World, reference: Reference, spoil, words: str):
    monitor = Monitor(reference)
    with pytest.raises(InputError, match=words):
        monitor.add(*spoil(world.draw(8)[0], scores(8)))
    assert monitor.report().images == 0


def test_stored_counts_continue(world: World, reference: Reference):
    before = fed(reference, world.draw(WINDOW + 500)[0])
    arrays, _ = files.parse_tensors(files.tensor_bytes(before.state()), "drift.safetensors")
    after = Monitor.from_state(reference, arrays)
    more = world.draw(700)[0]
    for monitor in (before, after):
        monitor.add(more, scores(700))
    assert after.report() == before.report()
    assert before.report().images == WINDOW + 200
    again = World(0)
    assert np.array_equal(again.reference().digest, World(0).reference().digest)  # the same after a restart


@pytest.mark.parametrize("spoil", ["shape", "name", "images", "negative", "rejected", "reference"])
def test_damaged_or_foreign_counts_start_anew(world: World, reference: Reference, spoil: str, caplog):
    caplog.set_level(logging.INFO)
    state = fed(reference, world.draw(WINDOW + 9)[0]).state()
    if spoil == "shape":
        state["counts"] = state["counts"][:, 1:]
    elif spoil == "name":
        state["more"] = state.pop("images")
    elif spoil == "images":
        state["images"][2] = WINDOW + 5
    elif spoil == "negative":
        state["counts"][2, 0, 0] = -1
    elif spoil == "rejected":
        state["rejected"][2] = 10
    else:
        state["reference"] = world.reference().digest
    monitor = Monitor.from_state(reference, state)
    assert monitor.report().images == 0
    assert "counting starts anew" in caplog.text
    monitor.add(world.draw(3)[0], scores(3))
    assert monitor.report().images == 3


def test_first_window_is_the_reference_for_small_classes(world: World):
    reference = world.reference(images=40)
    assert not reference.solid
    monitor = fed(reference, world.draw(WINDOW + MINIMUM - 1)[0])
    assert (monitor.report().level, monitor.report().images_needed) == ("collecting", 1)
    monitor.add(world.draw(MINIMUM)[0], scores(MINIMUM))
    assert monitor.report().level == "stable"
    monitor.add(world.draw(2 * WINDOW, shift=1.0)[0], scores(2 * WINDOW))
    assert monitor.report().level == "drifted"


def test_images_near_a_small_class_are_not_counted(world: World):
    statistics = ClassStatistics(DIM)
    vectors, labels = world.draw(4000)
    kept = (labels < CLASSES - 1) | (torch.arange(4000) < 40)
    statistics.add(vectors[kept], labels[kept])
    assert 3 <= int(statistics.counts[-1]) < 30
    reference = Reference(statistics)
    vectors, labels = world.draw(8000)
    report = fed(reference, vectors[labels == CLASSES - 1][:MINIMUM]).report()
    assert (report.level, report.images) == ("collecting", MINIMUM)
    assert fed(reference, vectors[labels < CLASSES - 1][:MINIMUM]).report().level == "stable"


def test_no_class_gives_no_reference():
    with pytest.raises(InputError, match="teach it"):
        Reference(ClassStatistics(DIM))


def test_overlap_of_classes_is_expected():
    rng = np.random.default_rng(1)
    means = rng.normal(0, 0.4, (12, DIM))

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = rng.integers(0, 12, count)
        return torch.from_numpy(means[labels] + rng.normal(size=(count, DIM))).float(), torch.from_numpy(labels)

    statistics = ClassStatistics(DIM)
    statistics.add(*draw(12_000))
    assert fed(Reference(statistics), draw(WINDOW)[0]).report().psi < 0.03
