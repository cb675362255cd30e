"""The linear discriminant against scikit-learn, and its scores of held-out samples against solving it without them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from ssd_edge.learners.closed_form import discriminant
from ssd_edge.learners.closed_form.discriminant import Discriminant
from ssd_edge.learners.closed_form.sums import ClassStatistics, oas_shrinkage, probes, shrink


def world(counts: list[int], size: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return overlapping classes of these numbers of samples."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    means = 1.5 * torch.randn(len(counts), size, generator=generator)
    spread = torch.linspace(0.3, 2.0, size)
    return means[labels] + spread * torch.randn(len(labels), size, generator=generator), labels


class Fixed:
    """Covariance estimator that returns a fixed matrix."""

    def __init__(self, covariance: NDArray) -> None:
        self.covariance_ = covariance

    def fit(self, _: NDArray) -> Fixed:
        return self


def test_discriminant_matches_scikit_learn() -> None:
    vectors, labels = world([100, 80, 120, 90], size=33)
    statistics = ClassStatistics(33)
    statistics.add(vectors, labels)
    covariance = statistics.within_covariance()
    values, bias = Discriminant.fit(covariance.clone(), statistics.total).weights(statistics.means, statistics.counts)
    reference = LinearDiscriminantAnalysis(
        solver="lsqr", covariance_estimator=Fixed(shrink(covariance, statistics.total).numpy()), priors=[0.25] * 4
    ).fit(vectors.double().numpy(), labels.numpy())
    np.testing.assert_allclose(values, reference.coef_.T, rtol=1e-5, atol=1e-8)
    noise = bias.numpy() - reference.intercept_ + np.log(0.25)  # of the means: in proportion to 1/n
    np.testing.assert_allclose(noise * statistics.counts.numpy(), np.full(4, noise[0] * float(statistics.counts[0])))
    assert noise[0] > 0


def test_discriminant_never_predicts_a_class_without_samples() -> None:
    means = torch.zeros(2, 3, dtype=torch.float64)
    _, bias = Discriminant.fit(torch.eye(3).double(), 3.0).weights(means, torch.tensor([4.0, 0.0]).double())
    assert bias[1] == -torch.inf
    assert torch.isfinite(bias[0])


def test_the_trace_of_many_dimensions_is_estimated_within_a_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    size, count = 400, 600
    vectors = torch.randn(count, size, generator=torch.Generator().manual_seed(0)).double() * torch.linspace(
        0.1, 3, size
    )
    covariance = vectors.T @ vectors / count
    means, counts = torch.zeros(2, size, dtype=torch.float64), torch.tensor([1.0, 10.0], dtype=torch.float64)
    _, estimated = Discriminant.fit(covariance.clone(), count).weights(means, counts)
    monkeypatch.setattr(discriminant, "EXACT_TRACE", size)
    _, exact = Discriminant.fit(covariance.clone(), count).weights(means, counts)
    assert not torch.equal(estimated, exact)
    torch.testing.assert_close(estimated, exact, rtol=0.02, atol=0)


def test_the_bias_of_a_class_does_not_depend_on_its_number_of_images() -> None:
    """μᵀΛ⁻¹μ of few samples is too large; on average over many draws the corrected bias is that of the true mean."""
    size, known, few = 60, 240, 6
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(40):
        samples = torch.randn(known, size, generator=generator, dtype=torch.float64)
        covariance = samples.T @ samples / known
        mean = torch.randn(size, generator=generator, dtype=torch.float64)
        noise = torch.randn(size, generator=generator, dtype=torch.float64) / few**0.5
        counts = torch.tensor([float(few), 0.0])
        _, bias = Discriminant.fit(covariance.clone(), known).weights(torch.stack([mean + noise, 0 * mean]), counts)
        inverse = torch.linalg.inv(shrink(covariance, known))
        errors.append([float(bias[0] + 0.5 * mean @ inverse @ mean), float(-0.5 * noise @ inverse @ noise)])
        assert bias[1] == -torch.inf
    corrected, plain = np.mean(errors, axis=0)
    assert abs(corrected) < 0.1 * abs(plain)


def test_the_trace_of_samples_left_out() -> None:
    """The factor of Sherman & Morrison equals a covariance solved without the sample, on average over the samples."""
    size, count = 30, 90
    x = torch.randn(count, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    covariance = x.T @ x / count
    share, variance = oas_shrinkage(covariance, count), float(covariance.trace()) / size
    regular = shrink(covariance, count)
    left_out = [row @ torch.linalg.solve(regular - (1 - share) * torch.outer(row, row) / count, row) for row in x]
    wanted = float(torch.stack(left_out).mean())
    means = torch.zeros(1, size, dtype=torch.float64)
    noise = 2 * float(Discriminant.fit(covariance.clone(), count).weights(means, torch.ones(1))[1][0])
    assert share * variance > 0
    assert noise == pytest.approx(wanted, rel=0.05)  # the mean of quotients against the quotient of means


def test_held_out_scores_equal_those_solved_without_the_samples() -> None:
    """With the same weight of the identity; one class loses all of its samples at once, another is not touched."""
    vectors, labels = world([9, 7, 2, 30])
    statistics = ClassStatistics(12)
    statistics.add(vectors, labels)
    part = torch.where(labels == 3, -1, torch.arange(len(labels)) % 3)
    part[labels == 2] = 1
    samples = statistics.degrees_of_freedom
    found = Discriminant.fit(statistics.within_covariance(), samples)
    scores = found.held_out(statistics.means, statistics.counts, vectors, labels, part)
    identity = found.factor @ found.factor.T - (1 - found.share) * statistics.within_covariance()
    for number in range(3):
        held, rest = part == number, ClassStatistics(12)
        rest.add(vectors[~held], labels[~held])
        rest.grow(4)
        left = samples - int(held.sum())
        regular = ((1 - found.share) * rest.scatter_within() / samples + identity) * samples / left
        own = Discriminant(torch.linalg.cholesky(regular), found.share, found.trace, left)
        values, bias = own.weights(rest.means, rest.counts)
        torch.testing.assert_close(scores[held], vectors[held].double() @ values + bias, rtol=1e-9, atol=1e-9)
        assert bool((scores[held][:, 2] == -torch.inf).all()) == (number == 1)
    assert bool((scores[labels == 3] == -torch.inf).all())


def test_held_out_scores_are_no_better_than_a_guess_where_labels_mean_nothing() -> None:
    """Far more dimensions than samples: the discriminant knows its own samples by heart, and nothing else."""
    generator = torch.Generator().manual_seed(0)
    vectors, labels = torch.randn(60, 200, generator=generator), torch.arange(60) % 2
    statistics = ClassStatistics(200)
    statistics.add(vectors, labels)
    found = Discriminant.fit(statistics.within_covariance(), statistics.degrees_of_freedom)
    values, bias = found.weights(statistics.means, statistics.counts)
    assert float(((vectors.double() @ values + bias).argmax(1) == labels).double().mean()) > 0.9
    scores = found.held_out(statistics.means, statistics.counts, vectors, labels, torch.arange(60) // 2)
    assert 0.3 < float((scores.argmax(1) == labels).double().mean()) < 0.7


def two_views(labels: torch.Tensor, size: int, seed: int = 1) -> torch.Tensor:
    """Return differences of two views, mostly along some features."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linspace(1.0, 0.1, size) * torch.randn(len(labels), size, generator=generator)


def test_held_out_scores_of_two_views_equal_those_solved_without_the_samples() -> None:
    first, labels = world([9, 7, 2, 30])
    second = first.double() + two_views(labels, 12)
    statistics = ClassStatistics(12, views=True)
    statistics.add(first, labels, second)
    part = torch.where(labels == 3, -1, torch.arange(len(labels)) % 3)
    part[labels == 2] = 1
    samples = statistics.degrees_of_freedom
    found = Discriminant.fit(statistics.within_covariance(), samples, statistics.sketch / samples)
    middle, apart = (first + second) / 2, (first - second) / 2
    scores = found.held_out(statistics.means, statistics.counts, middle, labels, part, apart)
    identity = found.factor @ found.factor.T - (1 - found.share) * statistics.within_covariance()
    for number in range(3):
        held, rest = part == number, ClassStatistics(12, views=True)
        rest.add(first[~held], labels[~held], second[~held])
        rest.grow(4)
        left = samples - int(held.sum())
        regular = ((1 - found.share) * rest.scatter_within() / samples + identity) * samples / left
        own = Discriminant(torch.linalg.cholesky(regular), found.share, found.trace, left)
        values, bias = own.weights(rest.means, rest.counts)
        torch.testing.assert_close(scores[held], first[held].double() @ values + bias, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [40, 400])
def test_the_trace_of_two_views_is_that_of_their_means(size: int) -> None:
    first, labels = world([30, 50, 100], size=size)
    statistics = ClassStatistics(size, views=True)
    second = first.double() + two_views(labels, size)
    statistics.add(first, labels, second)
    samples = statistics.degrees_of_freedom
    found = Discriminant.fit(statistics.within_covariance(), samples, statistics.sketch / samples)
    middle = (first + second) / 2
    white = torch.linalg.solve_triangular(found.factor, (middle - statistics.means[labels]).T, upper=False)
    exact, whole = float(white.square().sum()) / samples, Discriminant.fit(statistics.within_covariance(), samples)
    assert abs(whole.trace - exact) > 0.05 * exact
    assert found.trace == pytest.approx(exact, rel=1e-9 if size == 40 else 0.03)


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_the_bias_of_a_class_of_two_views_does_not_depend_on_its_number_of_images(spread: float) -> None:
    """As above, with more features than samples; Σ_d takes most of the rank if its views are far apart."""
    size, known, few = 100, 60, 4
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(40):
        x, d = (torch.randn(known, size, generator=generator, dtype=torch.float64) for _ in range(2))
        d *= spread
        covariance = (x.T @ x + d.T @ d) / known
        noise = torch.randn(size, generator=generator, dtype=torch.float64) / few**0.5
        found = Discriminant.fit(covariance, known, d.T @ (d @ probes(size)) / known)
        _, bias = found.weights(noise[None], torch.tensor([float(few)]))
        white = torch.linalg.solve_triangular(found.factor, noise[:, None], upper=False)
        errors.append([float(bias[0]), -0.5 * float(white.square().sum())])
    corrected, plain = np.mean(errors, axis=0)
    assert abs(corrected) < 0.15 * abs(plain)
