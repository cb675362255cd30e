"""Rejection of unknown images, on Gaussian embeddings."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_edge import files
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.unknown import NEVER, Rejector, strength, t_quantile

DIM = 32


class World:
    """Gaussian classes with one covariance, as a backbone might embed them."""

    def __init__(self, classes: int = 4, dim: int = DIM, length: float = 6.0, seed: int = 0) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.mix = torch.eye(dim) + 0.3 * torch.randn(dim, dim, generator=self.rng)
        directions = torch.linalg.qr(torch.randn(dim, dim, generator=self.rng)).Q[:classes]
        self.means = length * directions @ self.mix.T

    def draw(self, row: int, count: int) -> torch.Tensor:
        noise = torch.randn(count, self.means.shape[1], generator=self.rng)
        return self.means[row] + noise @ self.mix.T

    def statistics(self, counts: list[int], per_class: bool = False) -> ClassStatistics:
        found = ClassStatistics(self.means.shape[1], per_class)
        found.grow(len(counts))
        for row, count in enumerate(counts):
            if count:
                found.add(self.draw(row, count), torch.full((count,), row))
        return found

    def accepted(self, rejector: Rejector, row: int, of: int | None = None) -> float:
        """Return the share of 2,000 new samples of class `of` (default: `row`) that are accepted as class `row`."""
        fresh = self.draw(row if of is None else of, 2000)
        return float(rejector.accepts(fresh, torch.full((2000,), row))[0].double().mean())


def rows(embeddings: torch.Tensor, row: int = 0) -> torch.Tensor:
    return torch.full((len(embeddings),), row)


def calibrated(world: World, counts: list[int], tested: int = 100, away: float = 0.0) -> Rejector:
    """Return a rejector calibrated on a training run whose test images lie further from their class by `away`."""
    train = [world.draw(row, count) for row, count in enumerate(counts)]
    test = [
        world.draw(row, tested) + away * torch.randn(tested, DIM, generator=world.rng) for row in range(len(counts))
    ]
    labels = [torch.cat([rows(part, row) for row, part in enumerate(parts)]) for parts in (train, test)]
    statistics = ClassStatistics(world.means.shape[1])
    statistics.add(torch.cat(train), labels[0])
    return Rejector.calibrate(statistics, torch.cat(train), labels[0], torch.cat(test), labels[1])


@pytest.mark.parametrize("count", [5, 20, 500])
def test_rate_is_met_after_calibration(count):
    accepted = []
    for seed in range(3):
        world = World(seed=seed)
        rejector = calibrated(world, [count] * 4)
        accepted += [world.accepted(rejector, row) for row in range(4)]
    assert np.mean(accepted) == pytest.approx(0.95, abs=0.035)
    assert min(accepted) > 0.8


def test_test_images_of_another_occasion_lower_the_thresholds():
    plain, shifted = (calibrated(World(), [100] * 4, away=away) for away in (0.0, 2.0))
    assert shifted.shift < plain.shift <= 0
    assert bool((shifted.thresholds < plain.thresholds).all())
    assert calibrated(World(), [100] * 4, tested=0).shift == 0.0


def test_rate_is_nearly_met_from_statistics_alone():
    world = World()
    rejector = Rejector.fit(world.statistics([2000] * 4))
    assert min(world.accepted(rejector, row) for row in range(4)) >= 0.9


@pytest.mark.parametrize(("freedom", "exact"), [(10, 1.8125), (20, 1.7247), (60, 1.6706), (1e6, 1.6449)])
def test_quantile_of_student(freedom, exact):
    assert t_quantile(0.95, freedom) == pytest.approx(exact, abs=2e-3)


def test_distant_clusters_are_rejected():
    world = World(classes=5)
    rejector = Rejector.fit(world.statistics([500] * 4))
    own, unseen = world.draw(0, 500), world.draw(4, 500)
    best = torch.stack([rejector.score(unseen, rows(unseen, row)) for row in range(4)]).amax(0)
    auroc = (rejector.score(own, rows(own))[:, None] > best[None]).double().mean()
    assert auroc > 0.95
    passed, margin = rejector.accepts(unseen, rows(unseen))
    assert passed.double().mean() < 0.05
    assert torch.equal(passed, margin >= 0)


@pytest.mark.parametrize("count", [3, 5, 20, 200])
def test_new_class_accepts_its_own_samples_only(count):
    world = World(classes=5)
    statistics = world.statistics([500] * 4)
    rejector, samples = calibrated(world, [500] * 4), world.draw(4, count)
    statistics.add(samples, rows(samples, 4))
    with_new = rejector.with_class(4, statistics, samples)
    assert world.accepted(with_new, 4) >= 0.8
    assert world.accepted(with_new, 4, of=0) < 0.3


def test_statistics_allow_for_the_uncertain_mean_of_few_images():
    # with five images in 128 dimensions, most of the norm of their mean is noise that new images do not share
    accepted = []
    for seed in range(6):
        world = World(dim=128, length=4.0, seed=seed)
        accepted.append(world.accepted(Rejector.fit(world.statistics([1000, 1000, 1000, 5])), 3))
    assert np.mean(accepted) >= 0.9


def test_embeddings_are_scored_against_a_mean_without_them():
    accepted = []
    for seed in range(3):
        world = World(dim=128, length=4.0, seed=seed)
        statistics = world.statistics([1000] * 3)
        rejector, samples = Rejector.fit(statistics, deviation=0.05), world.draw(3, 20)
        statistics.add(samples, rows(samples, 3))
        accepted.append(world.accepted(rejector.with_class(3, statistics, samples), 3))
    assert 0.85 <= np.mean(accepted) <= 0.99


@pytest.mark.parametrize("count", [5, 20, 100])
def test_new_class_meets_the_rate(count):
    accepted = []
    for seed in range(6):
        world = World(classes=5, seed=seed)
        rejector = calibrated(world, [50] * 4)
        statistics, samples = world.statistics([50] * 4), world.draw(4, count)
        statistics.add(samples, rows(samples, 4))
        accepted.append(world.accepted(rejector.with_class(4, statistics, samples), 4))
    assert np.mean(accepted) == pytest.approx(0.95, abs=0.05)


def test_new_class_leaves_the_others_bit_identical():
    world = World(classes=5)
    statistics = world.statistics([200] * 4)
    rejector, samples = Rejector.fit(statistics), world.draw(4, 10)
    before = {name: array.copy() for name, array in rejector.state().items()}
    statistics.add(samples, rows(samples, 4))
    after = rejector.with_class(4, statistics, samples).state()
    for name in ("thresholds", "directions", "scores"):
        assert after[name][:4].tobytes() == before[name].tobytes()
        assert rejector.state()[name].tobytes() == before[name].tobytes()
    for name in ("whitening", "axes"):
        assert after[name].tobytes() == before[name].tobytes()


def test_more_images_count_in_proportion_to_their_number():
    world = World()
    rejector = calibrated(world, [180, 30, 50, 50])
    statistics = world.statistics([180, 30, 50, 50])
    odd = world.draw(0, 20) + 3 * torch.randn(20, DIM, generator=world.rng)
    moved = []
    for row in (0, 1):
        after = ClassStatistics.from_state(statistics.state())
        after.add(odd, rows(odd, row))
        updated = rejector.with_class(row, after, odd)
        moved.append(
            abs(
                float(updated.scores[row, 1] / updated.scores[row, 0])
                - float(rejector.scores[row, 1] / rejector.scores[row, 0])
            )
        )
        assert torch.equal(updated.thresholds[2:], rejector.thresholds[2:])
    assert 0 < 3 * moved[0] < moved[1]


def test_acceptance_of_earlier_images_after_a_change():
    world = World()
    rejector, statistics = calibrated(world, [100] * 4), world.statistics([100] * 4)
    assert rejector.acceptance(0, rejector) == pytest.approx(world.accepted(rejector, 0), abs=0.05)
    other = 20 * world.means[3:4] + 0.01 * torch.randn(100, DIM, generator=world.rng)  # images of something else
    statistics.add(other, rows(other, 0))
    after = rejector.with_class(0, statistics, other)
    assert rejector.acceptance(0, after) == pytest.approx(world.accepted(after, 0), abs=0.15)
    assert rejector.acceptance(1, after) == rejector.acceptance(1, rejector)


def test_calibration_does_not_depend_on_the_order_of_classes():
    world = World(classes=6)
    statistics = world.statistics([300] * 4)
    rejector, samples = Rejector.fit(statistics), {row: world.draw(row, 15) for row in (4, 5)}
    for row, embeddings in samples.items():
        statistics.add(embeddings, rows(embeddings, row))
    ends = []
    for order in ((4, 5), (5, 4)):
        now = rejector
        for row in order:
            now = now.with_class(row, statistics, samples[row])
        ends.append(now)
    assert torch.equal(ends[0].thresholds, ends[1].thresholds)
    assert torch.equal(ends[0].directions, ends[1].directions)
    assert min(world.accepted(ends[0], row) for row in range(6)) >= 0.8


def test_start_without_classes():
    world = World()
    statistics = ClassStatistics(DIM)
    rejector = Rejector.fit(statistics)
    assert rejector.accepts(torch.zeros(0, DIM), torch.zeros(0, dtype=torch.int64))[0].shape == (0,)
    for row in range(3):
        samples = world.draw(row, 10)
        statistics.add(samples, rows(samples, row))
        rejector = rejector.with_class(row, statistics, samples)
        assert world.accepted(rejector, row) >= 0.8


@pytest.mark.parametrize("counts", [[3], [500], [3, 3], [1, 1], [5, 400]], ids=str)
def test_fewer_samples_than_dimensions_or_a_single_class(counts):
    world = World()
    rejector = Rejector.fit(world.statistics(counts))
    assert all(np.isfinite(array).all() for array in rejector.state().values())
    for row, count in enumerate(counts):
        if count >= 3:
            assert world.accepted(rejector, row) >= 0.75


def test_identical_images_and_constant_features():
    statistics, same = ClassStatistics(DIM), torch.ones(5, DIM)
    statistics.add(same, rows(same))
    rejector = Rejector.fit(statistics).with_class(0, statistics, same)
    assert rejector.accepts(same, rows(same))[0].all()
    assert not rejector.accepts(-same, rows(same))[0].any()
    zero = ClassStatistics(DIM)
    zero.add(0 * same, rows(same))
    assert not Rejector.fit(zero).accepts(same, rows(same))[0].any()


def test_row_without_samples_accepts_nothing_until_it_is_learned():
    world = World()
    statistics = world.statistics([200, 0, 200])
    rejector = Rejector.fit(statistics)
    assert float(rejector.thresholds[1]) == NEVER
    assert world.accepted(rejector, 1) == 0.0
    samples = world.draw(1, 10)
    statistics.add(samples, rows(samples, 1))
    assert world.accepted(rejector.with_class(1, statistics, samples), 1) >= 0.8


@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 40), st.integers(0, 2**31))
@settings(max_examples=40)
def test_state_round_trip_bit_for_bit_without_a_sample_dimension(classes, dim, count, seed):
    statistics = ClassStatistics(dim)
    statistics.grow(classes)
    generator = torch.Generator().manual_seed(seed)
    if count:
        labels = torch.randint(classes, (count,), generator=generator)
        statistics.add(100 * torch.randn(count, dim, generator=generator), labels)
    rejector = Rejector.fit(statistics)
    arrays, _ = files.parse_tensors(files.tensor_bytes(rejector.state()), "unknown.safetensors")
    axes = len(arrays["axes"])
    assert axes < dim
    assert {name: a.shape for name, a in arrays.items()} == {
        "fitted": (3,),
        "whitening": (axes + 1,),
        "axes": (axes, dim),
        "directions": (classes, dim),
        "thresholds": (classes,),
        "scores": (classes, 3),
    }
    restored = Rejector.from_state(arrays)
    fresh, taken = torch.randn(9, dim, generator=generator), torch.arange(9) % classes
    assert torch.equal(restored.accepts(fresh, taken)[1], rejector.accepts(fresh, taken)[1])
    assert all(restored.state()[name].tobytes() == array.tobytes() for name, array in arrays.items())


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda s: s.pop("thresholds"),
        lambda s: s.update(thresholds=s["thresholds"][:-1]),
        lambda s: s.update(whitening=s["whitening"][:-1]),
        lambda s: s["whitening"].__setitem__(0, 0.0),
        lambda s: s["axes"].__setitem__(1, s["axes"][0]),
        lambda s: s["axes"].__imul__(np.float16(1.01)),
        lambda s: s.update(axes=np.eye(33, 32, dtype=np.float16), whitening=np.ones(34, np.float32)),
        lambda s: s.update(directions=s["directions"].ravel()),
        lambda s: s.update(fitted=s["fitted"][:1]),
        lambda s: s["directions"].__setitem__((0, 0), np.nan),
        lambda s: s["scores"].__setitem__((0, 0), 1.5),
        lambda s: s["scores"].__setitem__(0, [2.0, 4.0, 1.0]),
        lambda s: s["fitted"].__setitem__(1, 0.5),
    ],
)
def test_damaged_state_is_refused(corrupt):
    state = Rejector.fit(World().statistics([20] * 4)).state()
    corrupt(state)
    with pytest.raises(BundleRefusedError, match="'unknown'"):
        Rejector.from_state(state)


def test_invalid_embeddings_are_refused():
    world = World()
    statistics = world.statistics([50] * 4)
    rejector, good = Rejector.fit(statistics), world.draw(0, 4)
    for bad, message in ((torch.nan, "NaN"), (torch.inf, "NaN"), (-torch.inf, "infinity")):
        broken = good.clone()
        broken[2, 7] = bad
        with pytest.raises(InputError, match=message):
            rejector.accepts(broken, rows(broken))
        with pytest.raises(InputError, match=message):
            rejector.with_class(0, statistics, broken)
    with pytest.raises(InputError, match=r"\(N, 32\).*\(4, 31\)"):
        rejector.accepts(good[:, 1:], rows(good))
    with pytest.raises(InputError, match="below 4"):
        rejector.accepts(good, rows(good, 4))
    with pytest.raises(InputError, match="below 4"):
        rejector.accepts(good, rows(good, -1))
    with pytest.raises(InputError, match="rows"):
        rejector.accepts(good, rows(good)[1:])


def test_invalid_calibration_is_refused():
    world = World()
    statistics = world.statistics([50] * 4)
    rejector = Rejector.fit(statistics)
    for row, count in ((0, 0), (4, 3), (-1, 3), (1, 51)):
        with pytest.raises(InputError, match=f"row {row} was taught"):
            rejector.with_class(row, statistics, world.draw(0, count))
    for rate in (0.5, 1.0, float("nan")):
        with pytest.raises(InputError, match="rate"):
            Rejector.fit(statistics, rate)
    statistics.sums[0, 0] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        Rejector.fit(statistics)


def test_removing_rows_leaves_the_others_bit_identical():
    world = World()
    rejector = Rejector.fit(world.statistics([200] * 4))
    fewer = rejector.without_rows([1, 2])
    fresh = world.draw(3, 50)
    assert fewer.thresholds.tolist() == rejector.thresholds[[0, 3]].tolist()
    assert torch.equal(fewer.accepts(fresh, rows(fresh, 1))[1], rejector.accepts(fresh, rows(fresh, 3))[1])
    assert len(rejector.thresholds) == 4
    assert len(rejector.without_rows(range(4)).thresholds) == 0
    for row in (-1, 4):
        with pytest.raises(InputError, match=f"there are 4 rows, so there is no row {row}"):
            rejector.without_rows([0, row])


def test_joined_class_accepts_both_and_the_others_do_not_change():
    world = World()
    rejector, statistics = calibrated(world, [200, 40, 200, 30]), world.statistics([200, 40, 200, 30])
    assert world.accepted(rejector, 1, of=3) < 0.3
    statistics.join(3, 1)
    joined = rejector.joined([3], 1, statistics)
    assert min(world.accepted(joined, 1), world.accepted(joined, 1, of=3)) > 0.7
    for name in ("thresholds", "directions", "scores"):
        before, after = rejector.state()[name], joined.state()[name]
        assert after[[0, 2, 3]].tobytes() == before[[0, 2, 3]].tobytes()
        assert after[1].tobytes() != before[1].tobytes()
    assert joined.whitening.equals(rejector.whitening)
    for row in (-1, 4):
        with pytest.raises(InputError, match=f"there are 4 rows, so there is no row {row}"):
            rejector.joined([3], row, statistics)


def test_class_of_another_device_is_accepted_as_there():
    world = World(classes=6)
    base, statistics = calibrated(world, [100] * 4), world.statistics([100] * 4)
    here, there = statistics.copy(), statistics.copy()
    samples, more = world.draw(4, 20), world.draw(5, 20)
    here.add(more, rows(more, 4))  # this device has another class in row 4
    there.add(samples, rows(samples, 4))
    ours, theirs = base.with_class(4, here, more), base.with_class(4, there, samples)
    merged = statistics.copy()
    merged.add(more, rows(more, 4))
    merged.add(samples, rows(samples, 5))
    after = ours.merged(5, theirs, 4, None, merged)
    fresh = world.draw(4, 200)
    assert torch.equal(after.accepts(fresh, rows(fresh, 5))[1], theirs.accepts(fresh, rows(fresh, 4))[1])
    assert torch.equal(after.thresholds[:5], ours.thresholds)


def test_class_taught_on_two_devices_counts_the_images_of_both():
    world = World()
    base, statistics = calibrated(world, [50] * 4), world.statistics([50] * 4)
    states, merged = [], statistics.copy()
    for _ in range(2):
        own, samples = statistics.copy(), world.draw(1, 20)
        own.add(samples, rows(samples, 1))
        merged.add(samples, rows(samples, 1))
        states.append(base.with_class(1, own, samples))
    after = states[0].merged(1, states[1], 1, base.scores[1], merged)
    assert float(after.scores[1, 0]) == 50 + 20 + 20
    assert world.accepted(after, 1) == pytest.approx(0.95, abs=0.06)


def test_thresholds_in_another_space_follow_from_the_statistics():
    world = World(classes=5)
    statistics = world.statistics([200] * 4)
    ours, samples = Rejector.fit(statistics), world.draw(4, 30)
    theirs = Rejector.fit(world.statistics([200] * 5))
    statistics.add(samples, rows(samples, 4))
    after = ours.merged(4, theirs, 4, None, statistics)
    assert world.accepted(after, 4) > 0.8
    assert float(after.scores[4, 0]) == 0
    assert float(strength(after.thresholds[4].double())) < 5
