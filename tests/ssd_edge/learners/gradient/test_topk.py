"""Tests of Top-K inhibition against a loop over samples that follows docs/method.md."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssd_edge.learners.gradient import topk
from ssd_edge.learners.gradient.topk import Activations, gaba, inhibit

pytestmark = pytest.mark.usefixtures("one_thread")


def naive(scores: Tensor, k: int, gamma: Tensor | None) -> Tensor:
    """a_j = ReLU(ReLU(z_j) − γ_j·I), I the (k+1)-th largest ReLU(z), with Python loops."""
    rows = []
    for row in scores.tolist():
        u = [max(z, 0.0) for z in row]
        inhibition = sorted(u, reverse=True)[min(k + 1, len(u)) - 1]
        rates = [1.0] * len(u) if gamma is None else gamma.tolist()
        rows.append([max(value - rate * inhibition, 0.0) for value, rate in zip(u, rates, strict=True)])
    return torch.tensor(rows, dtype=scores.dtype).reshape(scores.shape)


@st.composite
def inputs(draw: st.DrawFn) -> tuple[Tensor, int, Tensor | None]:
    """Scores on a coarse grid (ties everywhere), with dead neurons and zero rows; k from 1 to r; any mix of γ."""
    count, neurons = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    k = draw(st.one_of(st.just(1), st.just(neurons), st.integers(1, neurons)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps = draw(st.sampled_from([1, 3, 1000]))
    scores = torch.randint(-steps, steps + 1, (count, neurons), generator=generator).double() / 8
    scores[:, torch.rand(neurons, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -0.25
    scores[torch.rand(count, generator=generator) < 0.2] = 0.0
    kind = draw(st.sampled_from(["closed", "all closed", "mixed", "open"]))
    if kind == "closed":
        return scores, k, None
    if kind == "all closed":
        return scores, k, torch.ones(neurons, dtype=torch.float64)
    if kind == "open":
        return scores, k, -torch.ones(neurons, dtype=torch.float64)
    return scores, k, torch.randint(-2, 3, (neurons,), generator=generator).double() / 2


@settings(max_examples=300)
@given(inputs())
def test_activations_equal_those_of_the_loop(case: tuple[Tensor, int, Tensor | None]) -> None:
    scores, k, gamma = case
    wanted = naive(scores, k, gamma)
    a = inhibit(scores, k, gamma)
    assert a.shape == scores.shape
    assert torch.equal(a.to_dense(), wanted)
    assert torch.equal(a.counts(), (wanted > 0).sum(0))
    active = wanted > 0
    if a.is_dense:
        assert torch.equal((a.dense > 0) & a.positive, active & (scores > 0))
        assert int(active.sum()) > topk.DENSE_ABOVE * scores.numel()
        return
    assert bool((a.value > 0).all())
    assert torch.equal(a.sample, a.sample.sort().values)
    assert torch.equal(a.positive, scores[a.sample, a.neuron] > 0)
    assert int(active.sum()) <= topk.DENSE_ABOVE * scores.numel() or gamma is None


@settings(max_examples=100)
@given(inputs(), st.integers(1, 20), st.integers(0, 2**31))
def test_products_and_columns_equal_those_of_the_dense_array(
    case: tuple[Tensor, int, Tensor | None], classes: int, seed: int
) -> None:
    scores, k, gamma = case
    neurons = scores.shape[1]
    dense, a = naive(scores, k, gamma), inhibit(scores, k, gamma)
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(neurons, classes, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(a.matmul(values), dense @ values, rtol=1e-12, atol=1e-12)
    chosen = torch.randperm(neurons, generator=generator)[: 1 + neurons // 2]
    slot = torch.full((neurons,), -1)
    slot[chosen] = torch.arange(len(chosen))
    assert torch.equal(a.columns(slot, len(chosen)), dense[:, chosen])


@settings(max_examples=100)
@given(inputs())
def test_closed_switch_leaves_at_most_k(case: tuple[Tensor, int, Tensor | None]) -> None:
    scores, k, _ = case
    assert int((inhibit(scores, k).to_dense() > 0).sum(1).max()) <= k


def test_no_gamma_means_one() -> None:
    scores = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    for k in (1, 8, 9, 40, 64):  # on both sides of r/8
        assert torch.equal(inhibit(scores, k).to_dense(), inhibit(scores, k, torch.ones(64)).to_dense())


def test_ties_with_the_inhibition_are_inactive() -> None:
    a = inhibit(torch.tensor([[3.0, 2.0, 2.0, 1.0]]), k=2)
    assert a.to_dense().tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_k_of_all_neurons_subtracts_the_smallest() -> None:
    assert inhibit(torch.tensor([[3.0, 2.0, 0.5]]), k=3).to_dense().tolist() == [[2.5, 1.5, 0.0]]


def test_open_switch_activates_neurons_but_passes_no_gradient_below_zero_scores() -> None:
    a = inhibit(torch.tensor([[3.0, 2.0, -1.0]]), k=1, gamma=-torch.ones(3))
    assert a.dense.tolist() == [[5.0, 4.0, 2.0]]
    assert a.positive.tolist() == [[True, True, False]]


def test_a_sparse_entry_below_zero_score_passes_no_gradient() -> None:
    """One open neuron among closed ones is active by excitation alone, in the sparse form."""
    scores = torch.cat([torch.tensor([[-1.0, 2.0, 1.0]]), torch.zeros(1, 29)], dim=1)
    gamma = torch.ones(32)
    gamma[0] = -1.0
    a = inhibit(scores, 1, gamma)
    assert not a.is_dense
    assert a.neuron.tolist() == [0, 1]
    assert a.value.tolist() == [1.0, 1.0]
    assert a.positive.tolist() == [False, True]


@pytest.mark.parametrize("k", [1, 32])
def test_no_samples(k: int) -> None:
    a = inhibit(torch.zeros(0, 64), k)
    assert isinstance(a, Activations)
    assert a.matmul(torch.ones(64, 3)).shape == (0, 3)
    assert a.counts().tolist() == [0] * 64


def test_gaba_rises_with_the_count() -> None:
    counters = torch.tensor([0.0, 25.0, 50.0, 100.0, 1e6])
    assert gaba(counters, 100.0).tolist() == [-1.0, -0.5, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("k", [1, 3, 20, 40])
def test_mask_passes_the_k_largest_positive_scores(k: int) -> None:
    scores = torch.randn(6, 40, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    scores[0] = -1.0  # no positive score
    found = inhibit(scores, k, mask=True)
    assert found.is_dense == (k > topk.DENSE_ABOVE * 40)
    wanted = torch.zeros_like(scores)
    for sample, row in enumerate(scores.tolist()):
        for neuron in sorted(range(40), key=lambda j: -row[j])[:k]:
            wanted[sample, neuron] = max(row[neuron], 0.0)
    assert torch.equal(found.to_dense(), wanted)
    assert torch.equal(found.counts(), (wanted > 0).sum(0))
    flags = found.spread(found.positive)
    assert torch.equal(flags, wanted > 0)


@pytest.mark.parametrize("dense", [False, True])
def test_products_and_norms_equal_those_of_the_dense_matrix(dense: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(7, 40, generator=generator, dtype=torch.float64)
    found = inhibit(scores, 30 if dense else 3)
    a = found.to_dense()
    assert found.is_dense == dense
    torch.testing.assert_close(found.norms(), a.norm(dim=1, keepdim=True))
    above, beside = torch.randn(40, 5, generator=generator).double(), torch.randn(7, 4, generator=generator).double()
    entries = torch.randn(7, 40, generator=generator).double() if dense else torch.randn(len(found.value)).double()
    whole = found.spread(entries)
    touched = torch.arange(40) if dense else found.neuron.unique()
    position = torch.full((40,), -1)
    position[touched] = torch.arange(len(touched))
    for numbers, matrix in ((None, a), (entries, whole)):
        torch.testing.assert_close(found.entries_matmul(numbers, above), matrix @ above)
        sums = found.transposed_matmul(numbers, beside, position, len(touched))
        torch.testing.assert_close(sums, (matrix.T @ beside)[touched])
