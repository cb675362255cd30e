"""The low-rank inverse root of a within-class covariance, against the exact one."""

import pytest
import torch

from ssd_edge.learners.closed_form.sums import LEAST_SHRINKAGE, shrink
from ssd_edge.learners.whitening import RANK, SMALL, Whitening


def covariance(dim: int, leading: int, seed: int = 0) -> torch.Tensor:
    """Return a covariance with a few large variances, and others that are the same."""
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    values = torch.ones(dim, dtype=torch.float64)
    values[:leading] = 400.0 * 0.9 ** torch.arange(leading)
    return (axes * values) @ axes.T


@pytest.mark.parametrize(("dim", "leading"), [(1, 0), (16, 0), (64, 12), (SMALL + 88, 20)])
def test_whitened_embeddings_have_the_lengths_and_angles_of_the_exact_ones(dim, leading):
    exact, generator = covariance(dim, leading), torch.Generator().manual_seed(1)
    whitening = Whitening.fit(exact, 1e9)
    assert whitening.axes.shape == (leading, dim)
    vectors = torch.randn(8, dim, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(exact).T
    factor = torch.linalg.cholesky(shrink(exact, 1e9, LEAST_SHRINKAGE))
    white = torch.linalg.solve_triangular(factor, vectors.T, upper=False).T
    found = whitening.of(vectors)
    products = white @ white.T
    assert torch.allclose(found @ found.T, products, rtol=0, atol=0.01 * float(products.diagonal().max()))
    expected = torch.linalg.solve(shrink(exact, 1e9, LEAST_SHRINKAGE), exact).trace()
    assert whitening.variance(exact) == pytest.approx(float(expected), rel=0.01)


def test_size_is_linear_in_the_number_of_features():
    spread = torch.diag(torch.arange(1000, dtype=torch.float64) ** 3 + 1)  # more large variances than axes
    state = Whitening.fit(spread, 1e9).state()
    assert state["axes"].shape == (RANK, 1000)
    assert sum(tensor.numel() * tensor.element_size() for tensor in state.values()) < 1000 * RANK * 2 + 1000


def test_fit_is_repeatable_and_leaves_the_global_generator_alone():
    exact = covariance(SMALL + 8, 20)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert Whitening.fit(exact, 100.0).equals(Whitening.fit(exact, 100.0))
    assert torch.equal(torch.get_rng_state(), before)
