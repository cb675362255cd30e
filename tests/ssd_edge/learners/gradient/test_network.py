"""Tests of the network: input step, initialisation, constraints, touched rows. test_oracle.py checks the gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ssd_edge.learners.gradient import topk
from ssd_edge.learners.gradient.distillation import cross_entropy
from ssd_edge.learners.gradient.network import SDMLP, Layer, initial_rows, prepare

pytestmark = pytest.mark.usefixtures("one_thread")


def make(neurons: int = 64, dim: int = 8, classes: int = 3, k: int = 4, closed: bool = True) -> SDMLP:
    generator = torch.Generator().manual_seed(0)
    keys = initial_rows(neurons, dim, dim, generator, torch.float64)
    values = initial_rows(neurons, classes, neurons, generator, torch.float64)
    counters = torch.full((neurons,), 10.0 if closed else 0.0, dtype=torch.float64)
    return SDMLP([Layer(keys, counters)], values, k, switch=10.0)


def batch(count: int = 16, dim: int = 8, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = prepare(torch.randn(count, dim, generator=generator, dtype=torch.float64), 0.0)
    return x, torch.randint(classes, (count,), generator=generator)


def descend(net: SDMLP, x: Tensor, labels: Tensor, lr: float, clip: float) -> float:
    """Take one step on the cross-entropy."""
    state = net.forward(x)
    _, gradient = cross_entropy(state.top.matmul(net.values), labels)
    return net.apply(net.gradients(state, gradient), lr, clip)


def test_prepare_shifts_rectifies_and_normalises() -> None:
    x = prepare(torch.tensor([[4.0, 5.0, 0.0], [1.0, 0.5, -3.0]]), shift=1.0)
    assert x[0].tolist() == pytest.approx([0.6, 0.8, 0.0])
    assert x[1].tolist() == [0.0, 0.0, 0.0]  # a zero row stays zero, not NaN


def test_prepare_without_shift_stays_signed() -> None:
    assert prepare(torch.tensor([[3.0, -4.0]]), None)[0].tolist() == pytest.approx([0.6, -0.8])


def test_initial_weights_are_uniform_and_half_of_them_zero() -> None:
    rows = initial_rows(200, 100, 25, torch.Generator().manual_seed(0), torch.float32)
    assert float(rows.min()) == 0.0
    assert 0.199 < float(rows.max()) < 0.2
    assert 0.48 < float((rows == 0).double().mean()) < 0.52
    assert float(rows[rows > 0].mean()) == pytest.approx(0.1, rel=0.02)


def test_construction_applies_the_constraints() -> None:
    keys = torch.tensor([[3.0, 4.0, -5.0], [-1.0, -1.0, -1.0]])
    net = SDMLP([Layer(keys, torch.zeros(2))], torch.tensor([[-1.0], [2.0]]), 1, 1.0)
    assert net.keys[0].tolist() == pytest.approx([0.6, 0.8, 0.0])
    assert net.keys[1].tolist() == [0.0, 0.0, 0.0]
    assert net.values.flatten().tolist() == [0.0, 2.0]


def test_network_copies_its_tensors() -> None:
    given = torch.eye(3), torch.ones(3, 2), torch.zeros(3)
    net = SDMLP([Layer(given[0], given[2])], given[1], 1, 5.0)
    state = net.forward(torch.eye(3))
    net.count(state)
    net.apply(net.gradients(state, torch.ones(3, 2)), 0.1, 1.0)
    assert torch.equal(given[0], torch.eye(3))
    assert torch.equal(given[1], torch.ones(3, 2))
    assert torch.equal(given[2], torch.zeros(3))


def test_gamma_is_none_once_every_switch_is_closed() -> None:
    net = make(closed=False)
    net.counters[0] = 5.0
    assert net.gamma[:2].tolist() == [0.0, -1.0]
    net.counters[:] = 10.0
    assert net.gamma is None
    net.switch = math.inf
    assert net.gamma.tolist() == [-1.0] * 64


def test_count_adds_the_samples_that_activate_a_neuron() -> None:
    net = make()
    x, _ = batch()
    before = net.counters.clone()
    net.count(net.forward(x))
    assert torch.equal(net.counters - before, (net.activate(x).to_dense() > 0).sum(0).double())


def test_grow_keeps_the_old_columns() -> None:
    net = make(classes=2)
    before = net.values.clone()
    net.grow(5, torch.Generator().manual_seed(3))
    assert net.values.shape == (64, 5)
    assert torch.equal(net.values[:, :2], before)
    assert 0 < float(net.values[:, 2:].max()) <= 1 / math.sqrt(64)
    net.grow(3, torch.Generator())  # already enough columns
    assert net.values.shape == (64, 5)


def test_logits_do_not_depend_on_the_batch_size_or_change_counters() -> None:
    net = make(closed=False)
    x, _ = batch(40)
    counters = net.counters.clone()
    torch.testing.assert_close(net.logits(x, batch=7), net.logits(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(net.counters, counters)
    assert net.logits(x[:0]).shape == (0, 3)


@pytest.mark.parametrize("dense", [False, True])
def test_step_does_not_change_untouched_rows(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if dense:
        monkeypatch.setattr(topk, "DENSE_ABOVE", 0.0)
    net = make()
    x, labels = batch()
    keys, values = net.keys.clone(), net.values.clone()
    state = net.forward(x)
    descend(net, x, labels, 0.5, 1.0)
    active = state.top.counts() > 0
    assert state.top.is_dense == dense
    assert 0 < int(active.sum()) < 64
    assert torch.equal(net.keys[~active], keys[~active])
    assert torch.equal(net.values[~active], values[~active])
    assert bool((net.values[active] != values[active]).any(1).all())


@pytest.mark.parametrize("closed", [True, False])
def test_step_keeps_the_constraints(closed: bool) -> None:
    net = make(closed=closed)
    x, labels = batch()
    net.keys[5] = 0.0  # a dead key
    for _ in range(20):
        descend(net, x, labels, 1.0, 10.0)
    assert float(net.keys.min()) >= 0
    assert float(net.values.min()) >= 0
    norms = net.keys.norm(dim=1)
    assert float(norms[5]) == 0.0
    torch.testing.assert_close(norms[norms > 0], torch.ones_like(norms[norms > 0]), rtol=1e-12, atol=1e-12)


def test_step_clips_the_gradient_and_returns_its_norm() -> None:
    x, labels = batch()
    moved = []
    for clip in (1e9, 1e-3):
        net = make()
        start = net.values.clone()
        norm = descend(net, x, labels, 1e-3, clip)
        moved.append(((net.values - start), norm))
    (free, norm), (clipped, same) = moved
    assert norm == same > 1e-3
    inside = (free != 0) & (make().values > 1e-2)  # where the clamp at zero has no effect
    torch.testing.assert_close(clipped[inside], free[inside] * 1e-3 / (norm + 1e-6), rtol=1e-6, atol=0.0)


def deep(closed: bool, inhibition: str = "gaba") -> SDMLP:
    """Return a network with hidden layers of 24 and 16 neurons."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for neurons, inputs in ((24, 8), (16, 24)):
        keys = initial_rows(neurons, inputs, inputs, generator, torch.float64)
        counters = torch.randint(0, 8, (neurons,), generator=generator).double() + (10.0 if closed else 0.0)
        layers.append(Layer(keys, counters))
    values = initial_rows(16, 3, 16, generator, torch.float64)
    return SDMLP(layers, values, 3, 10.0, inhibition)


@pytest.mark.parametrize("inhibition", ["gaba", "mask"])
@pytest.mark.parametrize("closed", [True, False])
def test_two_hidden_layers_equal_autograd(closed: bool, inhibition: str) -> None:
    """Compare gradients of a loss on logits and both layers' activations, through the normalisation between them."""
    net = deep(closed, inhibition)
    x, labels = batch()
    keys = [layer.keys.clone().requires_grad_(True) for layer in net.layers]
    values = net.values.clone().requires_grad_(True)
    inputs, codes = x, []
    for layer, matrix in zip(net.layers, keys, strict=True):
        u = torch.relu(inputs @ matrix.T)  # not clamp, whose gradient at 0 is 1
        ranked = u.sort(dim=1, descending=True).values
        if inhibition == "mask":
            a = u * (u >= ranked[:, 2:3])
        else:
            gamma = (2 * layer.counters / 10.0 - 1).clamp(-1, 1)
            a = torch.relu(u - gamma * ranked[:, 3:4].detach())
        codes.append(a)
        inputs = a / a.norm(dim=1, keepdim=True).clamp_min(1e-12)
    pulls = [torch.randn(part.shape, generator=torch.Generator().manual_seed(2)).double() for part in codes]
    loss = torch.nn.functional.cross_entropy(codes[1] @ values, labels)
    loss = loss + sum((part * pull).sum() for part, pull in zip(codes, pulls, strict=True))
    wanted = torch.autograd.grad(loss, [*keys, values])

    state = net.forward(x)
    for mine, theirs in zip(state.activations, codes, strict=True):
        torch.testing.assert_close(mine.to_dense(), theirs.detach(), rtol=1e-12, atol=1e-12)
    to_activations = [
        pull if part.is_dense else pull[part.sample, part.neuron]
        for part, pull in zip(state.activations, pulls, strict=True)
    ]
    _, to_logits = cross_entropy(state.top.matmul(net.values), labels)
    found = net.gradients(state, to_logits, to_activations)
    for number, layer in enumerate(net.layers):
        whole = torch.zeros_like(layer.keys)
        whole[found.rows[number]] = found.keys[number]
        torch.testing.assert_close(whole, wanted[number], rtol=1e-10, atol=1e-12)
    whole = torch.zeros_like(net.values)
    whole[found.rows[-1]] = found.values
    torch.testing.assert_close(whole, wanted[2], rtol=1e-10, atol=1e-12)
    assert float(wanted[0].abs().max()) > 1e-3  # the bottom layer has a gradient


def test_copy_is_independent_and_equal() -> None:
    net = deep(closed=True)
    twin = net.copy()
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(net.layers, twin.layers, strict=True))
    x, labels = batch()
    before = twin.logits(x)
    descend(net, x, labels, 1.0, 10.0)
    net.count(net.forward(x))
    assert torch.equal(twin.logits(x), before)
    assert not torch.equal(net.logits(x), before)


def test_widened_adds_zero_rows_in_order() -> None:
    net = make()
    x, labels = batch(2)
    state = net.forward(x)
    gradients = net.gradients(state, cross_entropy(state.top.matmul(net.values), labels)[1])
    more = torch.zeros(64, dtype=torch.bool)
    more[[0, 63]] = True
    wide = gradients.widened([more])
    assert wide.rows[0].tolist() == sorted({0, 63, *gradients.rows[0].tolist()})
    for part in ("keys", "values"):
        mine = gradients.keys[0] if part == "keys" else gradients.values
        theirs = wide.keys[0] if part == "keys" else wide.values
        kept = torch.isin(wide.rows[0], gradients.rows[0])
        assert torch.equal(theirs[kept], mine)
        assert float(theirs[~kept].abs().max()) == 0.0
    assert wide.norm() == pytest.approx(gradients.norm(), rel=1e-12)
