"""Sufficient statistics against the data they summarise, solvers against NumPy and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.covariance import oas
from sklearn.linear_model import Ridge
from torch import Tensor

from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.learners.closed_form.sums import (
    PROBES,
    RIDGE_GRID,
    ClassStatistics,
    oas_shrinkage,
    pack_symmetric,
    probes,
    ridge,
    shrink,
    unpack_symmetric,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def data(count: int = 400, dim: int = 33, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return float32 samples of classes with different means and a shared anisotropic covariance."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    labels[:classes] = torch.arange(classes)
    means, mixing = torch.randn(classes, dim, generator=generator), torch.randn(dim, dim, generator=generator)
    return means[labels] + torch.randn(count, dim, generator=generator) @ mixing / 4 + 2, labels


def collect(vectors: Tensor, labels: Tensor, per_class: bool = False) -> ClassStatistics:
    statistics = ClassStatistics(vectors.shape[1], per_class)
    statistics.add(vectors, labels)
    return statistics


def within(vectors: Tensor, labels: Tensor) -> NDArray:
    """Return the residuals around the class means, computed from the data."""
    x, y = vectors.double().numpy(), labels.numpy()
    return np.concatenate([x[y == c] - x[y == c].mean(0) for c in np.unique(y)])


def test_statistics_match_the_data() -> None:
    vectors, labels = data(count=9000)  # more than one inner batch
    statistics = collect(vectors, labels)
    x, y = vectors.double().numpy(), labels.numpy()
    assert statistics.counts.tolist() == np.bincount(y).tolist()
    assert statistics.total == 9000
    np.testing.assert_allclose(statistics.means, [x[y == c].mean(0) for c in range(4)], rtol=1e-12)
    np.testing.assert_allclose(statistics.second, x.T @ x, rtol=1e-12)
    residuals = within(vectors, labels)
    np.testing.assert_allclose(statistics.scatter_within(), residuals.T @ residuals, rtol=1e-8, atol=1e-8)


def test_a_class_without_samples_has_no_mean_and_no_scatter() -> None:
    vectors, labels = data()
    gap = torch.where(labels == 3, 5, labels)
    full, sparse = collect(vectors, labels), collect(vectors, gap)
    assert sparse.counts[3:5].tolist() == [0.0, 0.0]
    assert float(sparse.means[3:5].abs().max()) == 0.0
    torch.testing.assert_close(sparse.scatter_within(), full.scatter_within())


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_the_order_and_the_split_into_tasks_do_not_matter(seed: int, tasks: int) -> None:
    vectors, labels = data()
    combined = collect(vectors, labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = ClassStatistics(vectors.shape[1])
    for index in order.chunk(tasks):
        parts.add(vectors[index], labels[index])
    torch.testing.assert_close(parts.counts, combined.counts, rtol=0, atol=0)
    torch.testing.assert_close(parts.sums, combined.sums, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.second, combined.second, rtol=1e-12, atol=1e-12)
    for actual, expected in zip(ridge(parts)[:2], ridge(combined)[:2], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("per_class", [False, True])
def test_second_moments_are_exactly_symmetric(per_class: bool) -> None:
    """Only the upper triangle is saved, so any asymmetry would change later results after a restart."""
    statistics = collect(*data(count=100), per_class)
    statistics.add(*data(count=77, seed=1))
    assert torch.equal(statistics.moments, statistics.moments.mT)


@pytest.mark.parametrize(("per_class", "shape"), [(False, (33 * 34 // 2,)), (True, (4, 33 * 34 // 2))])
def test_state_round_trip_is_exact(per_class: bool, shape: tuple[int, ...]) -> None:
    statistics = collect(*data(), per_class)
    again = ClassStatistics.from_state(statistics.state())
    assert again.per_class == per_class
    for name in ("counts", "sums", "moments"):
        assert torch.equal(getattr(again, name), getattr(statistics, name))
    assert statistics.state()["second"].shape == shape


def test_moments_of_each_class_match_its_data() -> None:
    vectors, labels = data(count=9000)
    labels = torch.where(labels == 3, 5, labels)
    statistics = collect(vectors, labels, per_class=True)
    x, y = vectors.double().numpy(), labels.numpy()
    assert statistics.moments.shape == (6, 33, 33)
    for row in (0, 1, 2, 5):
        np.testing.assert_allclose(statistics.covariance(row), np.cov(x[y == row].T), rtol=1e-9, atol=1e-12)
    assert float(statistics.covariance(4).abs().max()) == 0.0
    pooled = collect(vectors, labels)
    torch.testing.assert_close(statistics.second, pooled.second, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(statistics.scatter_within(), pooled.scatter_within(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("count", [1, 7])
def test_equal_samples_have_no_covariance(count: int) -> None:
    """Rounding in the difference of two large numbers must not appear as variance."""
    vectors, labels = data(count=4)
    statistics = collect(vectors[:1].expand(count, -1) * 1000, labels[:1].expand(count), per_class=True)
    assert float(statistics.covariance(0).abs().max()) == 0.0


def test_removing_a_class_leaves_the_others_bit_identical() -> None:
    vectors, labels = data()
    statistics = collect(vectors, labels, per_class=True)
    statistics.remove(2)
    never = collect(vectors[labels != 2], labels[labels != 2], per_class=True)
    for name in ("counts", "sums", "moments"):
        torch.testing.assert_close(getattr(statistics, name), getattr(never, name), rtol=1e-14, atol=0)
    with pytest.raises(InputError, match="a class cannot be removed exactly"):
        collect(vectors, labels).remove(2)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 4), st.integers(1, 6), st.integers(0, 99))
def test_an_approximate_removal_keeps_the_pooled_covariance(counts: list[int], row: int, dim: int, seed: int) -> None:
    row %= len(counts)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    vectors = 30 * torch.randn(len(counts), dim, generator=generator)[labels]
    vectors += torch.randn(len(labels), dim, generator=generator)
    statistics = ClassStatistics(dim)
    statistics.grow(len(counts))
    if len(labels):
        statistics.add(vectors, labels)
    before, freedom = statistics.scatter_within(), statistics.degrees_of_freedom
    exact = statistics.remove(row, approximately=True)
    assert exact == (counts[row] <= 1 or counts[row] == sum(counts))
    moments, scale = statistics.moments, 1e-12 * float(vectors.double().square().sum()) + 1e-300
    assert torch.equal(moments, moments.mT)
    assert float(torch.linalg.eigvalsh(moments).min()) >= -scale
    assert statistics.counts.tolist() == [0 if c == row else count for c, count in enumerate(counts)]
    if not statistics.counts.any():
        assert not moments.any()
    elif statistics.degrees_of_freedom:
        torch.testing.assert_close(statistics.within_covariance(), before / freedom, rtol=0, atol=scale)
    else:  # one sample per class equals its mean: the scatter is zero
        torch.testing.assert_close(statistics.scatter_within(), torch.zeros_like(before), rtol=0, atol=scale)
    if exact:
        never = ClassStatistics(dim)
        if (labels != row).any():
            never.add(vectors[labels != row], labels[labels != row])
        torch.testing.assert_close(moments, never.moments, rtol=0, atol=scale)


def test_removing_a_class_without_samples_changes_nothing() -> None:
    vectors, labels = data()
    statistics = collect(vectors, torch.where(labels == 2, 5, labels))
    before = statistics.moments.clone()
    assert statistics.remove(2, approximately=True)
    assert torch.equal(statistics.moments, before)


@settings(max_examples=20)
@given(st.booleans(), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=6))
def test_joined_classes_equal_one_class_from_the_start(per_class: bool, joins: list[tuple[int, int]]) -> None:
    """Covers repeated joins and rows that became empty."""
    vectors, labels = data(classes=5)
    statistics, now = collect(vectors, labels, per_class), torch.arange(5)
    for row, into in joins:
        if row == into:
            with pytest.raises(InputError, match=f"row {row} cannot be joined with itself"):
                statistics.join(row, into)
        else:
            statistics.join(row, into)
            now[now == row] = into
    direct = collect(vectors, now[labels], per_class)
    direct.grow(5)
    for name in ("counts", "sums", "moments"):
        torch.testing.assert_close(getattr(statistics, name), getattr(direct, name), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("per_class", [False, True])
def test_subtracting_leaves_the_samples_that_the_other_has_not_seen(per_class: bool) -> None:
    """Rows 0, 1, 2, 3 of the other map to 5, 0, 1 and 1; its row 4 is empty, so its target is irrelevant."""
    one, two, rows = data(), data(count=300, seed=1), torch.tensor([5, 0, 1, 1, 70])
    statistics, other = collect(*one, per_class), collect(*two, per_class)
    statistics.merge(other, rows[:4])
    other.grow(5)
    statistics.subtract(other, rows)
    never = collect(*one, per_class)
    never.grow(6)
    assert torch.equal(statistics.counts, never.counts)
    assert not statistics.sums[5].any()
    assert torch.equal(statistics.moments, statistics.moments.mT)
    for name in ("sums", "moments"):
        torch.testing.assert_close(getattr(statistics, name), getattr(never, name), rtol=1e-10, atol=1e-10)
    state = {name: tensor.clone() for name, tensor in statistics.state().items()}
    with pytest.raises(
        InputError, match=r"row 5 has 0 samples, the other \d+; subtract only what was learned or merged"
    ):
        statistics.subtract(other, rows)
    assert all(torch.equal(tensor, state[name]) for name, tensor in statistics.state().items())
    statistics.subtract(statistics, torch.arange(6))
    assert not any(tensor.any() for tensor in statistics.state().values())


@pytest.mark.parametrize("per_class", [False, True])
def test_only_empty_rows_can_be_deleted(per_class: bool) -> None:
    vectors, labels = data()
    statistics = collect(vectors, torch.tensor([0, 2, 3, 5])[labels], per_class)
    with pytest.raises(InputError, match=r"only empty rows of the 6 can be deleted, but rows \[2, 6\] are not"):
        statistics.without_rows([1, 2, 6])
    fewer, direct = statistics.without_rows([4, 1]), collect(vectors, labels, per_class)
    for name in ("counts", "sums", "moments"):
        assert torch.equal(getattr(fewer, name), getattr(direct, name))
    fewer.add(vectors, labels)
    assert statistics.total == len(labels)


@pytest.mark.parametrize("per_class", [False, True])
def test_merging_adds_statistics_and_can_map_rows(per_class: bool) -> None:
    """Rows 0, 1, 2, 3 of the other map to 5, 0, 1 and 1."""
    one, two, rows = data(), data(count=300, seed=1), torch.tensor([5, 0, 1, 1])
    merged, other = collect(*one, per_class), collect(*two, per_class)
    before = {name: tensor.clone() for name, tensor in other.state().items()}
    merged.merge(other, rows)
    combined = collect(torch.cat([one[0], two[0]]), torch.cat([one[1], rows[two[1]]]), per_class)
    for name in ("counts", "sums", "moments"):
        torch.testing.assert_close(getattr(merged, name), getattr(combined, name), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state().items())


def test_restored_statistics_share_no_memory() -> None:
    state = collect(*data()).state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    ClassStatistics.from_state(state).add(*data())
    assert all(torch.equal(state[name], before[name]) for name in state)


@pytest.mark.parametrize("size", [0, 1, 2, 7])
def test_pack_symmetric(size: int) -> None:
    matrix = torch.rand(size, size)
    matrix = matrix + matrix.T
    packed = pack_symmetric(matrix)
    assert packed.shape == (size * (size + 1) // 2,)
    assert torch.equal(unpack_symmetric(packed, size), matrix)
    several = torch.stack([matrix, 2 * matrix, 3 * matrix])
    assert torch.equal(pack_symmetric(several), torch.stack([packed, 2 * packed, 3 * packed]))
    assert torch.equal(unpack_symmetric(pack_symmetric(several), size), several)


# ── shrinkage and the discriminant ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [5, 40, 4000])
def test_shrinkage_matches_scikit_learn(count: int) -> None:
    x = within(*data(count))
    wanted, share = oas(x, assume_centered=True)
    covariance = torch.from_numpy(x.T @ x / len(x))
    assert oas_shrinkage(covariance, len(x)) == pytest.approx(share, rel=1e-9)
    np.testing.assert_allclose(shrink(covariance, len(x)), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("dim", "least", "most"), [(3, 1e-2, 1.0), (150, 0.0, 1e-2)])
def test_shrinkage_omits_the_two_over_p_terms_like_scikit_learn(dim: int, least: float, most: float) -> None:
    """The difference from Eq. 23 of Chen et al. is large in three dimensions and negligible in hundreds."""
    x = np.random.default_rng(0).normal(size=(50, dim)) * np.linspace(1, 4, dim)
    covariance = x.T @ x / 50
    square, trace = (covariance**2).sum(), np.trace(covariance)
    printed = ((1 - 2 / dim) * square + trace**2) / ((51 - 2 / dim) * (square - trace**2 / dim))
    share = oas_shrinkage(torch.from_numpy(covariance), 50)
    assert share == pytest.approx(oas(x, assume_centered=True)[1], rel=1e-9)
    assert least < abs(share - printed) / printed < most


@pytest.mark.parametrize("samples", [0.0, 1.0, 50.0])
def test_an_unknown_covariance_becomes_an_invertible_one(samples: float) -> None:
    shrunk = shrink(torch.zeros(5, 5, dtype=torch.float64), samples)
    assert bool(torch.isfinite(torch.linalg.cholesky(shrunk)).all())


# ── ridge ────────────────────────────────────────────────────────────────────────────────────────────


def generalised_cross_validation(vectors: Tensor, labels: Tensor, penalty: float) -> float:
    """Return (RSS/N) / (1 − df/N)² from the hat matrix, counting the bias as one degree of freedom."""
    x, y = vectors.double().numpy(), np.eye(int(labels.max()) + 1)[labels.numpy()]
    x, y = x - x.mean(0), y - y.mean(0)
    hat = x @ np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T)
    total = len(x)
    return float(((y - hat @ y) ** 2).sum() / total / (1 - (np.trace(hat) + 1) / total) ** 2)


@pytest.mark.parametrize(("count", "seed"), [(40, 0), (40, 10), (60, 1), (400, 0), (400, 2)])
def test_ridge_equals_the_direct_solution_at_the_best_penalty_of_the_grid(count: int, seed: int) -> None:
    vectors, labels = data(count, seed=seed)
    values, bias, penalty = ridge(collect(vectors, labels))
    centred = vectors.double() - vectors.double().mean(0)
    grid = [relative * float(centred.square().sum()) / vectors.shape[1] for relative in RIDGE_GRID]
    best = min(grid, key=lambda candidate: generalised_cross_validation(vectors, labels, candidate))
    assert penalty == pytest.approx(best, rel=1e-6)
    reference = Ridge(alpha=penalty).fit(vectors.double().numpy(), np.eye(4)[labels.numpy()])
    np.testing.assert_allclose(values, reference.coef_.T, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(bias, reference.intercept_, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("count", [4, 10, 20])
def test_ridge_of_fewer_samples_than_features(count: int) -> None:
    """The criterion is nearly 0/0: any choice must score as well as the best and fit the training data."""
    vectors, labels = data(count, dim=80)
    values, bias, penalty = ridge(collect(vectors, labels))
    scores = [generalised_cross_validation(vectors, labels, penalty * factor) for factor in (1.0, 1e-2, 1e2)]
    assert scores[0] <= 1.01 * min(scores)
    assert torch.isfinite(values).all()
    assert torch.equal((vectors.double() @ values + bias).argmax(1), labels)


def test_ridge_of_one_sample() -> None:
    values, bias, _ = ridge(collect(torch.ones(1, 3), torch.tensor([0])))
    assert float(values.abs().max()) == 0.0
    assert float(bias[0]) == 1.0


@pytest.mark.parametrize("strength", [0.0, 2.5])
def test_ridge_of_no_sample(strength: float) -> None:
    statistics = ClassStatistics(3)
    statistics.grow(2)
    values, bias, chosen = ridge(statistics, strength)
    assert values.tolist() == [[0.0, 0.0]] * 3
    assert bias.tolist() == [-np.inf, -np.inf]
    assert chosen == strength


@pytest.mark.parametrize("strength", [1e-3, 0.7, 300.0])
def test_ridge_at_a_given_strength_matches_scikit_learn(strength: float) -> None:
    """alpha equals λ: both weigh |W|² against the sum, not the mean, of squared errors."""
    vectors, labels = data()
    values, bias, chosen = ridge(collect(vectors, labels), strength)
    assert chosen == strength
    reference = Ridge(alpha=strength).fit(vectors.double().numpy(), np.eye(4)[labels.numpy()])
    np.testing.assert_allclose(values, reference.coef_.T, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(bias, reference.intercept_, rtol=1e-6, atol=1e-9)


def recursive_least_squares(x: NDArray, targets: NDArray, strength: float) -> tuple[NDArray, NDArray]:
    """Apply one rank-one (Woodbury) update per sample, from P = I/λ.

    K = P x/(1 + xᵀP x), P −= K xᵀP, W += K (y − xᵀW). The bias is not penalised: samples and targets are centred.
    """
    centre, level = x.mean(0), targets.mean(0)
    inverse, weights = np.eye(x.shape[1]) / strength, np.zeros((x.shape[1], targets.shape[1]))
    for sample, target in zip(x - centre, targets - level, strict=True):
        gain = inverse @ sample / (1.0 + sample @ inverse @ sample)
        weights += np.outer(gain, target - sample @ weights)
        inverse -= np.outer(gain, sample @ inverse)
    return weights, level - centre @ weights


@pytest.mark.parametrize(("count", "strength"), [(20, 0.1), (400, 0.1), (400, 50.0)])
def test_ridge_equals_recursive_least_squares(count: int, strength: float) -> None:
    """The order of the samples does not matter, and there may be fewer samples than features."""
    vectors, labels = data(count)
    values, bias, _ = ridge(collect(vectors, labels), strength)
    order = np.random.default_rng(1).permutation(count)
    for index in (np.arange(count), order):
        wanted = recursive_least_squares(vectors.double().numpy()[index], np.eye(4)[labels.numpy()[index]], strength)
        np.testing.assert_allclose(values, wanted[0], rtol=0, atol=1e-8 * np.abs(wanted[0]).max())
        np.testing.assert_allclose(bias, wanted[1], rtol=0, atol=1e-8 * np.abs(wanted[1]).max())


def test_the_prior_weight_adapts_to_the_data() -> None:
    from ssd_edge.learners.closed_form.sums import PRIOR_GRID, likeliest_weight

    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    prior = root @ root.T / 12 + 0.1 * torch.eye(12, dtype=torch.float64)
    factor = torch.linalg.cholesky(prior)
    likely = torch.randn(2000, 12, generator=generator, dtype=torch.float64) @ factor.T
    unlike = torch.randn(2000, 12, generator=generator, dtype=torch.float64) @ torch.linalg.inv(factor)
    assert likeliest_weight(likely.T @ likely, 2000.0, prior) >= 1000.0
    assert likeliest_weight(unlike.T @ unlike, 2000.0, prior) == PRIOR_GRID[0]


def test_the_evidence_equals_the_marginal_likelihood() -> None:
    """In one dimension the prior is inverse-gamma and the integral is computed numerically."""
    import numpy as np

    from ssd_edge.learners.closed_form.sums import PRIOR_GRID, likeliest_weight

    sigma = np.linspace(0.02, 60, 400_001)

    def integral(weight: float, scatter: float, count: float, mean: float) -> float:
        shape, scale = (weight + 2) / 2, weight * mean / 2
        log_prior = shape * np.log(scale) - (shape + 1) * np.log(sigma) - scale / sigma
        log_prior -= torch.lgamma(torch.tensor(shape, dtype=torch.float64)).item()
        log_all = log_prior - count / 2 * np.log(sigma) - scatter / (2 * sigma)
        top = log_all.max()
        return top + np.log(np.exp(log_all - top).sum())

    for scatter, count, mean in ((30.0, 20.0, 1.0), (60.0, 20.0, 1.0), (21.0, 20.0, 1.0), (400.0, 100.0, 3.0)):
        wanted = max(PRIOR_GRID, key=lambda w: integral(w, scatter, count, mean))
        one = torch.tensor([[1.0]], dtype=torch.float64)
        assert likeliest_weight(scatter * one, count, mean * one) == wanted


# ── the scale of the class means ─────────────────────────────────────────────────────────────────────


def test_float32_statistics_survive_a_restart_exactly() -> None:
    statistics = ClassStatistics(8, single=True)
    statistics.add(*(part for part in (torch.randn(50, 8), torch.arange(50) % 3)))
    statistics.settle()
    again = ClassStatistics.from_state(statistics.state())
    assert again.single
    assert torch.equal(again.sums, statistics.sums)
    assert torch.equal(again.moments, statistics.moments)
    assert statistics.state()["second"].dtype == torch.float32


@pytest.mark.parametrize("per_class", [False, True])
def test_two_views_of_a_sample_count_half_each(per_class: bool) -> None:
    vectors, labels = data(40)
    second = vectors + data(40, seed=1)[0] / 3
    found = ClassStatistics(33, per_class)
    found.add(vectors, labels, second)
    apart = collect(torch.cat([vectors, second]), torch.cat([labels, labels]), per_class)
    assert torch.equal(found.counts, apart.counts / 2)
    assert torch.allclose(found.sums, apart.sums / 2, atol=1e-9)
    assert torch.allclose(found.moments, apart.moments / 2, atol=1e-9)
    found.check()


def collect_views(vectors: Tensor, labels: Tensor, per_class: bool = False) -> ClassStatistics:
    """Return statistics of samples and of a second view of each."""
    statistics = ClassStatistics(vectors.shape[1], per_class, views=True)
    statistics.add(vectors, labels, vectors.double() + torch.sin(5 * vectors))
    return statistics


def apart_of(vectors: Tensor) -> Tensor:
    half = torch.sin(5 * vectors).double() / 2
    return half.T @ half


@pytest.mark.parametrize("per_class", [False, True])
def test_the_sketch_of_two_views_is_a_sum_like_the_others(per_class: bool) -> None:
    vectors, labels = data()
    statistics, first = collect_views(vectors, labels, per_class), labels < 2
    torch.testing.assert_close(statistics.sketch, apart_of(vectors))  # of 33 features it is the matrix itself
    merged = collect_views(vectors[first], labels[first], per_class)
    merged.merge(collect_views(vectors[~first], labels[~first] - 2, per_class), torch.tensor([2, 3]))
    torch.testing.assert_close(merged.sketch, statistics.sketch)
    merged.subtract(collect_views(vectors[first], labels[first], per_class), torch.tensor([0, 1]))
    torch.testing.assert_close(merged.sketch, apart_of(vectors[~first]))
    torch.testing.assert_close(merged.copy().without_rows([0, 1]).sketch, merged.sketch)
    joined = collect_views(vectors, labels, per_class)
    joined.join(3, into=0)
    torch.testing.assert_close(joined.sketch, statistics.sketch)
    again = ClassStatistics.from_state(statistics.state())
    assert torch.equal(again.apart, statistics.apart)


@pytest.mark.parametrize("per_class", [False, True])
def test_samples_of_one_view_have_no_differences(per_class: bool) -> None:
    vectors, labels = data()
    statistics, one = collect_views(vectors, labels, per_class), collect(vectors[:9], labels[:9], per_class)
    before, rows = statistics.sketch, torch.arange(4)
    statistics.merge(one, rows)
    assert torch.equal(statistics.sketch, before)
    statistics.subtract(one, rows)
    assert torch.equal(statistics.sketch, before)


def test_the_sketch_of_a_removed_class() -> None:
    vectors, labels = data()
    exact, pooled = collect_views(vectors, labels, per_class=True), collect_views(vectors, labels)
    assert exact.remove(3)
    torch.testing.assert_close(exact.sketch, apart_of(vectors[labels < 3]))
    before, freedom = pooled.sketch, pooled.degrees_of_freedom
    assert not pooled.remove(3, approximately=True)
    torch.testing.assert_close(pooled.sketch / pooled.degrees_of_freedom, before / freedom)
    for row in range(2):
        pooled.remove(row, approximately=True)
    assert pooled.remove(2, approximately=True)
    assert not pooled.apart.any()


def test_a_single_sample_of_two_views_leaves_their_difference_behind() -> None:
    vectors, labels = data()
    labels[labels == 3] = 2
    labels[0] = 3
    assert collect(vectors, labels).remove(3, approximately=True)
    assert not collect_views(vectors, labels).remove(3, approximately=True)


def test_the_sketch_of_many_features_estimates_a_trace() -> None:
    vectors, labels = data(count=300, dim=200)
    statistics = collect_views(vectors, labels)
    assert statistics.apart.shape == (200, PROBES)
    estimated = float((probes(200) * statistics.sketch).sum()) / PROBES
    assert estimated == pytest.approx(float(apart_of(vectors).trace()), rel=0.05)


@pytest.mark.parametrize("factor", [-1.0, 100.0])
@pytest.mark.parametrize("per_class", [False, True])
def test_differences_that_the_second_moments_rule_out_are_refused(per_class: bool, factor: float) -> None:
    state = collect_views(*data(), per_class).state()
    with pytest.raises(BundleRefusedError, match="the differences of two views are not those of samples"):
        ClassStatistics.from_state({**state, "apart": factor * state["apart"]})
