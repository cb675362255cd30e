"""Tests against an oracle: SDMLP and SSD implemented densely with autograd, from docs/method.md and not from the code.

The learner computes closed-form gradients on active neurons and updates only touched rows. In float64 both must agree
for 200 steps; in float32, one step from equal states must agree.
"""

# ruff: noqa: B023  functions defined in loops are called within the same iteration
from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_edge.learners import LEARNERS, Learner, Task
from ssd_edge.learners.gradient.network import Pass
from ssd_edge.learners.gradient.trainer import TaskLoss
from ssd_edge.learners.priors import Priors

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, NEURONS, K, BATCH, EPOCHS = 16, 96, 4, 32, 20  # 320 samples: 10 steps per epoch, 200 in total


class Oracle:
    """A dense SDMLP trained by autograd, `torch.optim.SGD` and `clip_grad_norm_`."""

    def __init__(self, w1: Tensor, w2: Tensor, counters: Tensor, switch: float, dtype: torch.dtype) -> None:
        self.w1, self.w2 = w1.clone().to(dtype), w2.T.clone().to(dtype).contiguous()  # (r, D), (C, r)
        self.counters, self.switch = counters.clone().to(dtype), switch

    def activations(self, x: Tensor, k: int = K) -> Tensor:
        """Return the activations after Top-K, ``(B, r)``."""
        u = F.relu(x @ self.w1.T)
        inhibition = u.topk(min(k + 1, u.shape[1]), dim=1).values.min(1, keepdim=True).values.detach()
        gamma = torch.clip(-1 + 2 * self.counters / self.switch, -1, 1)
        return F.relu(u - gamma * inhibition)

    def step(
        self, x: Tensor, labels: Tensor, lr: float, clip: float, distil: Any = None, penalty: Any = None
    ) -> Tensor:
        """Take one step and return the activations before it.

        `distil(logits, a)` returns α and a term added to α·CE; `penalty(w1, w2)` is added to the sum.
        """
        self.w1.requires_grad_(True)
        self.w2.requires_grad_(True)
        optimiser = torch.optim.SGD([self.w1, self.w2], lr=lr)
        a = self.activations(x)
        self.counters = self.counters + (a.detach() > 0).sum(0)
        logits = a @ self.w2.T
        loss = F.cross_entropy(logits, labels)
        if distil is not None:
            alpha, extra = distil(logits, a)
            loss = alpha * loss + extra
        if penalty is not None:
            loss = loss + penalty(self.w1, self.w2)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([self.w1, self.w2], clip)
        optimiser.step()
        with torch.no_grad():
            self.w1, self.w2 = self.w1.detach().clamp(min=0), self.w2.detach().clamp(min=0)
            self.w1 = F.normalize(self.w1, dim=1)
        return a.detach()


def softened(student: Tensor, teacher: Tensor, temperature: float, direction: str) -> Tensor:
    """Compute T² KL between the softened softmaxes over the last axis, averaged over the batch."""
    p, q = F.softmax(teacher / temperature, 1), F.softmax(student / temperature, 1)
    forward, backward = (p * (p / q).log()).sum(1).mean(), (q * (q / p).log()).sum(1).mean()
    return (
        temperature**2
        * {
            "teacher_student": forward,
            "student_teacher": backward,
        }[direction]
    )


def distillation(settings: Any, table: Tensor, teacher: tuple[Tensor, Tensor], scope: list[int]) -> Any:
    """Return a function that computes (α, (1 − α)(λ·hidden + (1 − λ)·logits)) of one batch.

    `teacher` holds the logits and activations of the teacher.
    """
    wanted_logits, wanted_a = teacher

    def losses(logits: Tensor, a: Tensor) -> tuple[float, Tensor]:
        mine, theirs = a[:, table], wanted_a[:, table]
        if settings.hidden == "mse":
            hidden = ((mine - theirs) ** 2).sum(1).mean()
        else:
            hidden = softened(mine, theirs, settings.temperature, settings.direction)
        answers = softened(logits[:, scope], wanted_logits[:, scope], settings.temperature, settings.direction)
        lam = settings.hidden_weight
        return settings.ce_weight, (1 - settings.ce_weight) * (lam * hidden + (1 - lam) * answers)

    return losses


def watched(name: str, dtype: torch.dtype, options: dict[str, Any], switches: str) -> Learner:
    """Return a learner of a given dtype that records its state before each task and the form of its batches.

    Switches are ``open`` (C in `options`), ``closed``, or ``mixed``: four open ones among closed ones, two of them of
    dead keys, which are excited without a score.
    """

    class Watched(LEARNERS[name]):  # type: ignore[misc, valid-type]
        def _task_loss(self, inputs: Tensor, labels: Tensor) -> TaskLoss:
            self.start = (self.net.keys.clone(), self.net.values.clone(), self.net.counters.clone())
            self.forms = []
            self.observer = self.record
            return super()._task_loss(inputs, labels)

        def record(self, state: Pass) -> None:
            activations = state.top
            self.forms.append("dense" if activations.is_dense else "sparse")
            self.excited = not activations.is_dense and not bool(activations.positive.all())
            self.last = activations

    Watched.dtype = dtype
    priors = Priors()
    if switches != "open":
        keys = torch.randn(NEURONS, DIM, generator=torch.Generator().manual_seed(5)).clamp_min(0)
        keys[:2] = 0.0
        counters = torch.where(torch.arange(NEURONS) < 4, 0.0, 1e6)
        priors = Priors(keys=F.normalize(keys).numpy(), counters=counters.numpy(), student={"switch": 1e6})
        options = {**options, "gaba": "keep" if switches == "mixed" else "close"}
    settings = LEARNERS[name].Settings(neurons=NEURONS, k=K, batch=BATCH, shift=0.0, **options)
    return Watched(DIM, settings, priors, seed=3)


def task(first_row: int, seed: int, count: int = 320) -> Task:
    """Return samples of two Gaussian classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    means = 1.5 * torch.randn(2, DIM, generator=generator)
    return Task(means[labels] + torch.randn(count, DIM, generator=generator), labels + first_row)


def inputs_of(embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    x = F.relu(embeddings.to(dtype))
    return x / x.norm(dim=1, keepdim=True)


def walk(learner: Learner, new: Task, make_distillation: Any = None, penalty: Any = None) -> Oracle:
    """Train the learner, then the oracle from the same state with the same order of samples."""
    generator = learner.generator()
    learner.learn(new)
    oracle = Oracle(*learner.start, switch=learner.net.switch, dtype=learner.dtype)
    x, settings = inputs_of(new.embeddings, learner.dtype), learner.settings
    for _ in range(settings.epochs):
        for index in torch.randperm(len(x), generator=generator).split(settings.batch):
            distil = make_distillation(index) if make_distillation else None
            oracle.step(x[index], new.labels[index], settings.lr, settings.clip, distil, penalty)
    return oracle


def assert_same(learner: Learner, oracle: Oracle, tolerance: float) -> None:
    torch.testing.assert_close(learner.net.keys, oracle.w1, rtol=0, atol=tolerance)
    torch.testing.assert_close(learner.net.values, oracle.w2.T, rtol=0, atol=tolerance)
    torch.testing.assert_close(learner.net.counters, oracle.counters, rtol=0, atol=0)
    assert float((learner.net.keys - learner.start[0]).abs().max()) > 1e-3  # the keys have changed


@pytest.mark.parametrize("clip", [1.0, 0.02])
def test_closed_switch(clip: float) -> None:
    learner = watched("sdmlp", torch.float64, {"epochs": EPOCHS, "lr": 0.5, "clip": clip}, "closed")
    learner.expect(4)
    oracle = walk(learner, task(0, 1))
    assert set(learner.forms) == {"sparse"}
    assert len(learner.forms) == 200
    assert_same(learner, oracle, 1e-9)


def test_dead_keys_excited_among_closed_switches() -> None:
    learner = watched("sdmlp", torch.float64, {"epochs": EPOCHS, "lr": 0.5}, "mixed")
    oracle = walk(learner, task(0, 1))
    assert set(learner.forms) == {"sparse"}
    assert learner.excited
    assert_same(learner, oracle, 1e-9)
    assert float(learner.net.keys[:2].abs().max()) == 0.0
    assert bool((learner.net.values[:2] != learner.start[1][:2]).any())  # their values are trained


def test_closing_switch() -> None:
    """Switches close from all neurons active (dense, γ = −1) to sparse: both forms and the transition."""
    learner = watched("sdmlp", torch.float64, {"epochs": EPOCHS, "lr": 0.3, "switch": 1500.0}, "open")
    oracle = walk(learner, task(0, 1))
    changes = sum(a != b for a, b in zip(learner.forms, learner.forms[1:], strict=False))
    assert learner.forms[0] == "dense"
    assert learner.forms[-1] == "sparse"
    assert changes >= 1
    assert learner.net.gamma is not None  # some switches are still closing at the end
    assert_same(learner, oracle, 1e-9)


def taught(learner: Learner, first: Task, second: Task) -> Any:
    """Learn the first task; return a function of the losses of a batch of the second against that teacher."""
    learner.learn(first)
    net, settings = learner.net, learner.settings
    teacher = Oracle(net.keys, net.values, net.counters, net.switch, learner.dtype)
    a = teacher.activations(inputs_of(first.embeddings, learner.dtype))
    count = (a > 0).sum(0)
    table = torch.tensor(sorted(range(NEURONS), key=lambda j: (-int(count[j]), j))[: learner.n])
    assert torch.equal(learner.tables[0].indices, table)
    old, new = first.labels.unique().tolist(), second.labels.unique().tolist()
    outputs = list(range(max(learner.announced, 1 + max(new))))
    scope = {"all": outputs, "old": old, "seen": sorted({*old, *new})}[settings.logit_scope]
    x = inputs_of(second.embeddings, learner.dtype)

    def make(index: Tensor) -> Any:
        wanted_a = teacher.activations(x[index])
        return distillation(settings, table, (wanted_a @ teacher.w2.T, wanted_a), scope)

    return make


CASES = [
    pytest.param({"hidden": "kl_softmax", "direction": "teacher_student"}, marks=pytest.mark.slow),
    {"hidden": "kl_softmax", "direction": "student_teacher", "temperature": 2.0},
    pytest.param(
        {"hidden": "kl_softmax", "direction": "student_teacher", "hidden_weight": 0.9, "temperature": 0.5},
        marks=pytest.mark.slow,
    ),
    pytest.param({"hidden": "mse", "hidden_weight": 0.9}, marks=pytest.mark.slow),
    {"hidden": "mse", "hidden_weight": 0.9, "direction": "student_teacher", "logit_scope": "old"},
    {"hidden": "mse", "hidden_weight": 0.5, "logit_scope": "seen"},
    {"hidden": "mse", "hidden_weight": 0.9, "top_n": "0.25"},
    pytest.param({"hidden": "kl_softmax", "hidden_weight": 0.9, "temperature": 0.2}, marks=pytest.mark.slow),
    {"hidden": "kl_softmax", "hidden_weight": 1.0, "temperature": 0.1, "top_n": "96"},
]


@pytest.mark.parametrize("options", CASES, ids=lambda options: " ".join(map(str, options.values())))
def test_distillation_with_a_closed_switch(options: dict[str, Any]) -> None:
    options = {"epochs": EPOCHS, "lr": 0.3, "ce_weight": 0.4, **options}
    learner = watched("ssd", torch.float64, options, "closed")
    learner.expect(6)  # the first and the last output are never taught
    oracle = walk(learner, task(3, 2), taught(learner, task(1, 1), task(3, 2)))
    assert set(learner.forms) == {"sparse"}
    assert_same(learner, oracle, 1e-9)


@pytest.mark.parametrize("hidden", ["kl_softmax", "mse"])
def test_distillation_while_the_switch_closes(hidden: str) -> None:
    """Batches with a gradient on table activations are dense first, then sparse; the teacher is half open as well."""
    options = {"hidden": hidden, "hidden_weight": 0.8, "temperature": 0.5, "top_n": "3k"}
    options = {**options, "epochs": EPOCHS, "lr": 0.3, "ce_weight": 0.4, "switch": 2500.0}
    learner = watched("ssd", torch.float64, options, "open")
    learner.expect(4)
    first, second = task(0, 1, count=96), task(2, 2)
    make = taught(learner, first, second)
    assert learner.forms[-1] == "dense"
    oracle = walk(learner, second, make)
    assert (learner.forms[0], learner.forms[-1]) == ("dense", "sparse")
    assert_same(learner, oracle, 1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("switches", ["open", "closed", "mixed"])
def test_one_step_in_float32(switches: str, seed: int) -> None:
    """From equal states, selection equals that of the float64 oracle except for near ties, and weights within 1e-5."""
    options = {"epochs": 1, "lr": 3.0, "hidden": "mse", "hidden_weight": 0.5, "ce_weight": 0.5}
    learner = watched("ssd", torch.float32, {**options, "switch": 800.0}, switches)
    learner.expect(6)
    for number in (0, 2):
        learner.learn(task(number, seed + 5 * number))
    net, table = learner.net.copy(), learner.tables[0].indices
    teacher = Oracle(net.keys, net.values, net.counters, switch=800.0, dtype=torch.float64)
    new, order = task(4, seed + 20, count=BATCH), learner.generator()
    learner.learn(new)
    index = torch.randperm(BATCH, generator=order)
    x, labels = inputs_of(new.embeddings, torch.float64)[index], new.labels[index]
    oracle = Oracle(*learner.start, switch=800.0, dtype=torch.float64)
    wanted_a = teacher.activations(x)
    distil = distillation(learner.settings, table, (wanted_a @ teacher.w2.T, wanted_a), list(range(6)))
    a = oracle.step(x, labels, learner.settings.lr, learner.settings.clip, distil)
    selected = learner.last.to_dense()
    torch.testing.assert_close(
        selected.double(), a, rtol=0, atol=1e-6
    )  # so a neuron selected by only one is a near tie
    same = ((selected > 0) == (a > 0)).all(0)
    assert float(same.double().mean()) > 0.9
    assert len(learner.forms) == 1
    torch.testing.assert_close(learner.net.keys[same].double(), oracle.w1[same], rtol=0, atol=1e-5)
    torch.testing.assert_close(learner.net.values.double(), oracle.w2.T, rtol=0, atol=1e-5)
    assert float((learner.net.keys - learner.start[0]).abs().max()) > 1e-3


# ── penalties ────────────────────────────────────────────────────────────────────────────────────────


def importances(oracle: Oracle, x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return Ω of W1 and W2 on a task's data, by autograd for one sample and class at a time."""
    if kind == "l2":
        return torch.ones_like(oracle.w1), torch.ones_like(oracle.w2)
    total = [torch.zeros_like(oracle.w1), torch.zeros_like(oracle.w2)]
    w1, w2 = oracle.w1.clone().requires_grad_(True), oracle.w2.clone().requires_grad_(True)
    frozen = Oracle(oracle.w1, oracle.w2.T, oracle.counters, oracle.switch, oracle.w1.dtype)
    for sample in x:
        frozen.w1, frozen.w2 = w1, w2
        logits = (frozen.activations(sample[None]) @ w2.T)[0]
        if kind == "mas":
            gradients = torch.autograd.grad(logits.square().sum(), [w1, w2])
            parts = [(1.0, gradients)]
        else:
            log_p = logits.log_softmax(0)
            parts = [
                (float(log_p[y].detach().exp()), torch.autograd.grad(log_p[y], [w1, w2], retain_graph=True))
                for y in range(len(logits))
            ]
        for weight, gradients in parts:
            for place, gradient in enumerate(gradients):
                size = gradient.abs() if kind == "mas" else gradient.square()
                total[place] += weight * size / len(x)
    return total[0], total[1]


PENALTIES = [("ewc", 40.0), ("online_ewc", 40.0), ("mas", 20.0), ("l2", 0.2)]
EACH = [  # by default each penalty with one learner
    pytest.param(name, kind, weight, marks=[] if (place % 2 == 0) == (name == "ssd") else pytest.mark.slow)
    for place, (kind, weight) in enumerate(PENALTIES)
    for name in ("sdmlp", "ssd")
]


@pytest.mark.parametrize(("name", "kind", "weight"), EACH)
def test_penalties_over_three_tasks(name: str, kind: str, weight: float) -> None:
    """The penalty acts on rows that moved since an anchor, active or not; importances add up or are replaced."""
    options = {"epochs": 10, "lr": 0.3, "penalty": kind, "penalty_weight": weight, "penalty_decay": 0.7}
    if name == "ssd":
        options |= {"ce_weight": 0.4, "hidden": "mse", "hidden_weight": 0.5}
    learner = watched(name, torch.float64, options, "closed")
    learner.expect(6)
    tasks = [task(0, 1, 96), task(2, 2, 96), task(4, 3, 96)]
    slots: list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = []  # of (importances, anchors)
    learner.learn(tasks[0])
    for previous, new in itertools.pairwise(tasks):
        net = learner.net
        at_anchor = Oracle(net.keys, net.values, net.counters, net.switch, torch.float64)
        new_one = importances(at_anchor, inputs_of(previous.embeddings, torch.float64), kind)
        if kind != "ewc" and slots:  # one slot: importances add up, only the newest anchor counts
            keep = {"online_ewc": 0.7, "mas": 1.0, "l2": 0.0}[kind]
            new_one = tuple(keep * old + now for old, now in zip(slots.pop()[0], new_one, strict=True))
        slots.append((new_one, (net.keys.clone(), net.values.T.clone())))

        def penalty(w1: Tensor, w2: Tensor) -> Tensor:
            return weight * sum(
                (omega * (now - then).square()).sum()
                for both in slots
                for omega, then, now in zip(*both, (w1, w2), strict=True)
            )

        make = None
        if name == "ssd":
            counts = (at_anchor.activations(inputs_of(previous.embeddings, torch.float64)) > 0).sum(0)
            table = torch.tensor(sorted(range(NEURONS), key=lambda j: (-int(counts[j]), j))[: learner.n])
            x = inputs_of(new.embeddings, torch.float64)

            def make(index: Tensor) -> Any:
                a = at_anchor.activations(x[index])
                return distillation(learner.settings, table, (a @ at_anchor.w2.T, a), list(range(6)))

        oracle = walk(learner, new, make, penalty)
        assert_same(learner, oracle, 1e-9)
    free = watched(name, torch.float64, {**options, "penalty": "none", "penalty_weight": -1.0}, "closed")
    free.expect(6)
    for each in tasks:
        free.learn(each)
    assert float((free.net.values - learner.net.values).abs().max()) > 1e-3  # the penalty has an effect


def test_synaptic_intelligence_along_the_path() -> None:
    """SI accumulates −g·Δθ over the actual updates, with g of the β-softmax cross-entropy alone."""
    beta, weight, damping = 0.5, 2.0, 0.1
    options = {
        "epochs": 5, "lr": 0.3, "penalty": "si", "penalty_weight": weight, "penalty_beta": beta,
        "si_damping": damping,
    }  # fmt: skip
    learner = watched("sdmlp", torch.float64, options, "closed")
    learner.expect(6)
    omega: list[Tensor] | None = None
    anchor: list[Tensor] = []
    for new in (task(0, 1, 96), task(2, 2, 96), task(4, 3, 96)):
        generator = learner.generator()
        learner.learn(new)
        oracle = Oracle(*learner.start, switch=learner.net.switch, dtype=torch.float64)
        x, begin = inputs_of(new.embeddings, torch.float64), [oracle.w1.clone(), oracle.w2.clone()]
        path = [torch.zeros_like(part) for part in begin]
        for _ in range(options["epochs"]):
            for index in torch.randperm(len(x), generator=generator).split(BATCH):
                w1, w2 = oracle.w1.clone().requires_grad_(True), oracle.w2.clone().requires_grad_(True)
                twin = Oracle(oracle.w1, oracle.w2.T, oracle.counters, oracle.switch, torch.float64)
                twin.w1, twin.w2 = w1, w2
                loss = F.cross_entropy(beta * (twin.activations(x[index]) @ w2.T), new.labels[index])
                slopes = torch.autograd.grad(loss, [w1, w2])
                before = [oracle.w1.clone(), oracle.w2.clone()]

                def penalty(w1: Tensor, w2: Tensor) -> Tensor:
                    extra = torch.zeros((), dtype=torch.float64)
                    if omega is not None:
                        for part, then, now in zip(omega, anchor, (w1, w2), strict=True):
                            extra = extra + weight * (part * (now - then).square()).sum()
                    return extra

                oracle.step(x[index], new.labels[index], 0.3, 1.0, None, penalty)
                for part, slope, was, now in zip(path, slopes, before, (oracle.w1, oracle.w2), strict=True):
                    part -= slope * (now - was)
        assert_same(learner, oracle, 1e-9)
        anchor = [oracle.w1.clone(), oracle.w2.clone()]
        new_omega = [
            part / ((now - was).square() + damping) for part, now, was in zip(path, anchor, begin, strict=True)
        ]
        total = new_omega if omega is None else [a + b for a, b in zip(omega, new_omega, strict=True)]
        omega = [part.clamp_min(0) for part in total]
