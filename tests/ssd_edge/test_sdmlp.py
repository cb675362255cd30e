"""The network: input step, initialisation, constraints, and a step that touches only what was active.

That a step computes the right numbers is test_oracle.py's business.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ssd_edge.distillation import cross_entropy
from ssd_edge.sdmlp import SDMLP, initial_rows, prepare, unit_rows

pytestmark = pytest.mark.usefixtures("one_thread")


def make(neurons: int = 64, dim: int = 8, classes: int = 3, k: int = 4, closed: bool = True) -> SDMLP:
    generator = torch.Generator().manual_seed(0)
    keys = initial_rows(neurons, dim, dim, generator, torch.float64)
    values = initial_rows(neurons, classes, neurons, generator, torch.float64)
    counters = torch.full((neurons,), 10.0 if closed else 0.0, dtype=torch.float64)
    return SDMLP(keys, values, counters, k, switch=10.0)


def batch(count: int = 16, dim: int = 8, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = prepare(torch.randn(count, dim, generator=generator, dtype=torch.float64), 0.0)
    return x, torch.randint(classes, (count,), generator=generator)


def test_prepare_shifts_rectifies_and_normalises() -> None:
    x = prepare(torch.tensor([[4.0, 5.0, 0.0], [1.0, 0.5, -3.0]]), shift=1.0)
    assert x[0].tolist() == pytest.approx([0.6, 0.8, 0.0])
    assert x[1].tolist() == [0.0, 0.0, 0.0]  # a zero row stays zero and is not NaN


def test_prepare_without_shift_stays_signed() -> None:
    assert prepare(torch.tensor([[3.0, -4.0]]), None)[0].tolist() == pytest.approx([0.6, -0.8])


def test_initial_rows_are_uniform_and_half_of_them_zero() -> None:
    rows = initial_rows(200, 100, 25, torch.Generator().manual_seed(0), torch.float32)
    assert float(rows.min()) == 0.0
    assert 0.199 < float(rows.max()) < 0.2
    assert 0.48 < float((rows == 0).double().mean()) < 0.52
    assert float(rows[rows > 0].mean()) == pytest.approx(0.1, rel=0.02)


def test_construction_puts_the_weights_where_a_step_would() -> None:
    keys = torch.tensor([[3.0, 4.0, -5.0], [-1.0, -1.0, -1.0]])
    net = SDMLP(keys, torch.tensor([[-1.0], [2.0]]), torch.zeros(2), 1, 1.0)
    assert net.keys[0].tolist() == pytest.approx([0.6, 0.8, 0.0])
    assert net.keys[1].tolist() == [0.0, 0.0, 0.0]
    assert net.values.flatten().tolist() == [0.0, 2.0]


def test_a_network_owns_its_tensors() -> None:
    given = torch.eye(3), torch.ones(3, 2), torch.zeros(3)
    net = SDMLP(*given, 1, 5.0)
    x = torch.eye(3)
    activations = net.activate(x, net.gamma)
    net.count(activations)
    net.step(x, activations, torch.ones(3, 2), None, 0.1, 1.0)
    assert torch.equal(given[0], torch.eye(3))
    assert torch.equal(given[1], torch.ones(3, 2))
    assert torch.equal(given[2], torch.zeros(3))


def test_gamma_is_dropped_once_every_switch_is_closed() -> None:
    net = make(closed=False)
    net.counters[0] = 5.0
    assert net.gamma[:2].tolist() == [0.0, -1.0]
    net.counters[:] = 10.0
    assert net.gamma is None
    net.switch = math.inf
    assert net.gamma.tolist() == [-1.0] * 64


def test_count_adds_the_samples_that_a_neuron_answered() -> None:
    net = make()
    x, _ = batch()
    before = net.counters.clone()
    net.count(net.activate(x))
    assert torch.equal(net.counters - before, (net.activate(x).to_dense() > 0).sum(0).double())


def test_grow_keeps_the_old_columns() -> None:
    net = make(classes=2)
    before = net.values.clone()
    net.grow(5, torch.Generator().manual_seed(3))
    assert net.values.shape == (64, 5)
    assert torch.equal(net.values[:, :2], before)
    assert 0 < float(net.values[:, 2:].max()) <= 1 / math.sqrt(64)
    net.grow(3, torch.Generator())  # there are enough
    assert net.values.shape == (64, 5)


def test_logits_do_not_depend_on_the_batch_and_are_not_counted() -> None:
    net = make(closed=False)
    x, _ = batch(40)
    counters = net.counters.clone()
    torch.testing.assert_close(net.logits(x, batch=7), net.logits(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(net.counters, counters)
    assert net.logits(x[:0]).shape == (0, 3)


def test_a_step_leaves_untouched_rows_bit_for_bit() -> None:
    net = make()
    x, labels = batch()
    keys, values = net.keys.clone(), net.values.clone()
    activations = net.activate(x)
    _, gradient = cross_entropy(activations.matmul(net.values), labels)
    net.step(x, activations, gradient, None, 0.5, 1.0)
    active = activations.counts() > 0
    assert 0 < int(active.sum()) < 64
    assert torch.equal(net.keys[~active], keys[~active])
    assert torch.equal(net.values[~active], values[~active])
    assert bool((net.values[active] != values[active]).any(1).all())


@pytest.mark.parametrize("closed", [True, False])
def test_a_step_keeps_the_constraints(closed: bool) -> None:
    net = make(closed=closed)
    x, labels = batch()
    net.keys[5] = 0.0  # a dead key
    for _ in range(20):
        activations = net.activate(x, net.gamma)
        _, gradient = cross_entropy(activations.matmul(net.values), labels)
        net.step(x, activations, gradient, None, 1.0, 10.0)
    assert float(net.keys.min()) >= 0
    assert float(net.values.min()) >= 0
    norms = net.keys.norm(dim=1)
    assert float(norms[5]) == 0.0
    torch.testing.assert_close(norms[norms > 0], torch.ones_like(norms[norms > 0]), rtol=1e-12, atol=1e-12)


def test_a_step_clips_the_whole_gradient_and_gives_its_norm() -> None:
    x, labels = batch()
    moved = []
    for clip in (1e9, 1e-3):
        net = make()
        start = net.values.clone()
        activations = net.activate(x)
        _, gradient = cross_entropy(activations.matmul(net.values), labels)
        norm = net.step(x, activations, gradient, None, 1e-3, clip)
        moved.append(((net.values - start), norm))
    (free, norm), (clipped, same) = moved
    assert norm == same > 1e-3
    inside = (free != 0) & (make().values > 1e-2)  # where the clamp at zero plays no part
    torch.testing.assert_close(clipped[inside], free[inside] * 1e-3 / (norm + 1e-6), rtol=1e-6, atol=0.0)


def test_a_gradient_on_scores_reaches_inactive_neurons() -> None:
    """A loss before the inhibition moves its table's keys, active or not, and no values."""
    net = make()
    x, _ = batch(1)
    activations = net.activate(x)
    table = (activations.counts() == 0).nonzero().flatten()[:2]
    keys, values = net.keys.clone(), net.values.clone()
    slope = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    net.step(x, activations, torch.zeros(1, 3, dtype=torch.float64), None, 1.0, 1e9, (table, slope))
    wanted = unit_rows((keys[table] - slope.T @ x).clamp_min(0))
    torch.testing.assert_close(net.keys[table], wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(net.values, values)
