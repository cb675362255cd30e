"""Tests of distillation: closed-form gradients against autograd, selection rules, teacher targets."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_edge.errors import InputError
from ssd_edge.learners.gradient.distillation import (
    TopNTable,
    count_activations,
    cross_entropy,
    divergence,
    hidden_loss,
    parse_top_n,
    select,
    teacher_targets,
)
from ssd_edge.learners.gradient.network import SDMLP, Layer, initial_rows, prepare

pytestmark = pytest.mark.usefixtures("one_thread")

DIRECTIONS = ["teacher_student", "student_teacher"]


def pair(count: int = 5, width: int = 7) -> tuple[Tensor, Tensor]:
    """Return a student's and a teacher's activations, some of them zero as after Top-K."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, count, width, generator=generator, dtype=torch.float64).clamp_min(0)
    return student, teacher


def autograd(loss: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    point = at.clone().requires_grad_(True)
    value = loss(point)
    (gradient,) = torch.autograd.grad(value, point)
    return value.detach(), gradient


def kl(student: Tensor, teacher: Tensor, temperature: float, direction: str) -> Tensor:
    """Compute T² KL of the softened softmaxes, averaged over the batch, with PyTorch's functions."""
    q, p = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    forward = F.kl_div(q, p, log_target=True, reduction="batchmean") * temperature**2
    backward = F.kl_div(p, q, log_target=True, reduction="batchmean") * temperature**2
    return {"teacher_student": forward, "student_teacher": backward}[direction]


def test_cross_entropy() -> None:
    logits, _ = pair()
    labels = torch.tensor([0, 6, 3, 3, 1])
    wanted = autograd(lambda z: F.cross_entropy(z, labels), logits)
    torch.testing.assert_close(cross_entropy(logits, labels), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [0.5, 2.0, 8.0])
def test_divergence(direction: str, temperature: float) -> None:
    student, teacher = pair()
    wanted = autograd(lambda z: kl(z, teacher, temperature, direction), student)
    torch.testing.assert_close(divergence(student, teacher, temperature, direction), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_divergence_at_high_temperature(direction: str) -> None:
    """T²·KL → (1/2m) Σ (D_i − mean D)², D = student − teacher: T has no effect."""
    student, teacher = pair()
    difference = student - teacher
    limit = (difference - difference.mean(1, keepdim=True)).square().sum(1).mean() / (2 * student.shape[1])
    loss, gradient = divergence(student, teacher, 1e3, direction)
    assert float(loss) == pytest.approx(float(limit), rel=1e-3)
    slope = (difference - difference.mean(1, keepdim=True)) / student.shape[1] / len(student)
    torch.testing.assert_close(gradient, slope, rtol=0, atol=1e-3 * float(slope.abs().max()))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", ["kl_softmax", "mse"])
def test_hidden_loss(kind: str, direction: str) -> None:
    student, teacher = pair()

    def loss(a: Tensor) -> Tensor:
        squares = (a - teacher).square().sum(1)
        return {
            "kl_softmax": lambda: kl(a, teacher, 8.0, direction),
            "mse": lambda: squares.mean(),
        }[kind]()

    wanted = autograd(loss, student)
    torch.testing.assert_close(hidden_loss(student, teacher, 8.0, kind, direction), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["kl_softmax", "mse"])
def test_inactive_teacher_gives_a_finite_gradient(kind: str) -> None:
    student = torch.full((2, 3), 0.1)
    loss, gradient = hidden_loss(student, torch.zeros(2, 3), 8.0, kind, "teacher_student")
    assert math.isfinite(float(loss))
    assert float(gradient.abs().max()) < 1.0


def test_table_of_one_neuron_has_no_loss() -> None:
    loss, gradient = hidden_loss(torch.rand(4, 1), torch.rand(4, 1), 8.0, "kl_softmax", "teacher_student")
    assert float(loss) == 0.0
    assert float(gradient.abs().max()) == 0.0


# ── the Top-n table ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "count"),
    [
        ("1.0k", 10), ("1k", 10), ("2.5k", 25), (" 0.5k ", 5), ("100k", 1000),
        (10, 10), ("10", 10), ("10.0", 10), (1000, 1000), (1, 1), ("1e2", 100),
        (0.1, 100), ("0.25", 250), (0.999, 999),
    ],
)  # fmt: skip
def test_top_n_forms(value: str | float, count: int) -> None:
    assert parse_top_n(value, k=10, neurons=1000) == count


@pytest.mark.parametrize("value", ["", "k", "ten", "1.5", "1,0k", "nan", "inf", "nank", "infk", "1.0kk", "10 %"])
def test_malformed_top_n_raises(value: str) -> None:
    with pytest.raises(InputError, match=r"learner.top_n must be a whole number, a multiple of k .*, but is"):
        parse_top_n(value, k=10, neurons=1000)


@pytest.mark.parametrize(
    ("value", "count"), [("0", 0), ("-3", -3), ("-1k", -10), ("1001", 1001), ("101k", 1010), ("0.0001", 0)]
)
def test_top_n_out_of_range_raises(value: str, count: int) -> None:
    with pytest.raises(InputError, match=f"learner.top_n gives {count} neurons.* between 1 and .* 1000"):
        parse_top_n(value, k=10, neurons=1000)


FREQUENCIES = torch.tensor([0.2, 0.9, 0.0, 0.5, 0.5, 0.0, 0.1])


def test_select_by_frequency_breaks_ties_by_index() -> None:
    table = select(FREQUENCIES, 4)
    assert table.indices.tolist() == [1, 3, 4, 0]
    assert table.frequencies.tolist() == pytest.approx([0.9, 0.5, 0.5, 0.2])
    assert select(FREQUENCIES, 7).indices.tolist() == [1, 3, 4, 0, 6, 2, 5]


def test_random_selection_depends_only_on_the_generator() -> None:
    p = torch.rand(50)
    tables = [select(p, 10, "random", generator=torch.Generator().manual_seed(s)).indices for s in (1, 1, 2)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    assert len(tables[0].unique()) == 10


def test_select_all() -> None:
    assert select(FREQUENCIES, 3, "all").indices.tolist() == list(range(7))


def test_slots() -> None:
    assert TopNTable(torch.tensor([4, 0]), torch.ones(2)).slots(5).tolist() == [1, -1, -1, -1, 0]


# ── the teacher ──────────────────────────────────────────────────────────────────────────────────────


def network(closed: bool, neurons: int = 48, dim: int = 6) -> tuple[SDMLP, Tensor]:
    generator = torch.Generator().manual_seed(4)
    keys = initial_rows(neurons, dim, dim, generator, torch.float64)
    values = initial_rows(neurons, 3, neurons, generator, torch.float64)
    counters = torch.full((neurons,), 8.0) if closed else torch.randint(0, 9, (neurons,), generator=generator)
    inputs = prepare(torch.randn(50, dim, generator=generator, dtype=torch.float64), 0.0)
    inputs[7] = 0.0  # a sample that activates no neuron
    return SDMLP([Layer(keys, counters.double())], values, 4, 8.0), inputs


def dense_activations(net: SDMLP, inputs: Tensor) -> Tensor:
    u = F.relu(inputs @ net.keys.T)
    gamma = (2 * net.counters / net.switch - 1).clamp(-1, 1)
    return F.relu(u - gamma * u.sort(1, descending=True).values[:, net.k : net.k + 1])


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("batch", [2048, 16])
def test_targets_equal_those_of_a_dense_teacher(closed: bool, batch: int) -> None:
    net, inputs = network(closed)
    indices = torch.tensor([3, 40, 0, 17, 21, 5, 30])
    targets = teacher_targets(net, inputs, [TopNTable(indices, torch.zeros(7))], batch)
    a = dense_activations(net, inputs)
    index = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(targets.hidden[0].table(index), a[index][:, indices], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(targets.logits, a @ net.values, rtol=1e-12, atol=1e-12)


def test_targets_with_closed_switches_are_stored_sparse() -> None:
    net, inputs = network(closed=True)
    targets = teacher_targets(net, inputs, [TopNTable(torch.arange(48), torch.zeros(48))])
    assert targets.hidden[0].activations.shape[1] <= net.k


def test_targets_of_an_empty_table() -> None:
    net, inputs = network(closed=True)
    targets = teacher_targets(net, inputs, [TopNTable(torch.zeros(0, dtype=torch.int64), torch.zeros(0))])
    assert targets.hidden[0].table(torch.arange(9)).shape == (9, 0)
    assert targets.logits.shape == (50, 3)


@pytest.mark.parametrize("closed", [True, False])
def test_counting_pass(closed: bool) -> None:
    net, inputs = network(closed)
    labels = torch.arange(50) % 3
    active = dense_activations(net, inputs) > 0
    counters = net.counters.clone()
    assert torch.equal(count_activations(net, inputs, batch=16)[0], active.sum(0).double())
    by_class = torch.stack([active[labels == c].sum(0) for c in range(4)], dim=1).double()
    assert torch.equal(count_activations(net, inputs, labels, 4, batch=16)[0], by_class)
    assert torch.equal(net.counters, counters)
