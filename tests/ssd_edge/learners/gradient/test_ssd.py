"""Tests of `ssd`: every setting runs and has its documented effect. test_oracle.py checks the gradients."""

from __future__ import annotations

import typing
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssd_edge.errors import InputError
from ssd_edge.learners import Learner, Task, build, pack, restore
from ssd_edge.learners.gradient.distillation import count_activations, select
from ssd_edge.learners.gradient.network import SDMLP
from ssd_edge.learners.gradient.sdmlp import SDMLPLearner
from ssd_edge.learners.gradient.ssd import SSD, DistillationLoss, Settings
from ssd_edge.learners.gradient.trainer import TaskLoss
from ssd_edge.learners.priors import Priors

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, NEURONS, K = 10, 64, 4
SMALL = {"neurons": NEURONS, "k": K, "epochs": 4, "batch": 16, "shift": 0.0, "lr": 0.3}
TASKS = ((0, 1), (2, 3), (4, 5))


def task(rows: tuple[int, ...], count: int = 64, seed: int = 0) -> Task:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(rows).repeat(count // len(rows))
    means = 2.0 * torch.randn(8, DIM, generator=torch.Generator().manual_seed(99))
    return Task(means[labels] + torch.randn(len(labels), DIM, generator=generator), labels)


def priors(switch: float = 100.0) -> Priors:
    """Return pretrained keys, a third of which have open switches."""
    keys = np.abs(np.random.default_rng(0).normal(size=(NEURONS, DIM)))
    counters = np.where(np.arange(NEURONS) % 3, 2 * switch, 0.4 * switch)
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    return Priors(keys=unit.astype(np.float32), counters=counters.astype(np.float32), student={"switch": switch})


class Watched(SSD):
    """SSD that keeps, for each task, the network before its first step and the answers of the teacher."""

    def _task_loss(self, inputs: Tensor, labels: Tensor) -> TaskLoss:
        loss = super()._task_loss(inputs, labels)
        self.start, self.inputs = self.net.copy(), inputs
        if isinstance(loss, DistillationLoss):
            self.taught, self.outputs = loss.targets, loss.outputs
        return loss


def watched(given: Priors | None = None, **options: Any) -> Watched:
    return Watched(DIM, Settings(**{**SMALL, **options}), given or priors(), seed=1)


def learned(tasks: int = 2, given: Priors | None = None, **options: Any) -> Watched:
    learner = watched(given, **options)
    for rows in TASKS[:tasks]:
        learner.learn(task(rows))
    return learner


def same(one: Learner, other: Learner) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in ("keys", "values"))


# ── every value of every setting ─────────────────────────────────────────────────────────────────────


def choices_of_settings() -> list[tuple[str, Any]]:
    """Return (name, value) pairs, read from the settings class so that new settings are tested as well."""
    values: list[tuple[str, Any]] = []
    for name, kind in typing.get_type_hints(Settings).items():
        if typing.get_origin(kind) is typing.Literal:
            values += [(name, choice) for choice in typing.get_args(kind)]
        elif kind is bool:
            values += [(name, False), (name, True)]
    extremes = {
        "ce_weight": (0.0, 1.0), "hidden_weight": (0.0, 1.0), "temperature": (0.1, 1000.0),
        "top_n": ("4", "64", "2.5k", "0.5"), "k": (1, 64), "batch": (1, 1000), "switch": (1.0, 1e9), "clip": (1e-3,),
        "shift": (-5.0, 50.0),  # 50: every input is zero
    }  # fmt: skip
    return values + [(name, value) for name, choices in extremes.items() for value in choices]


@pytest.mark.parametrize(("name", "value"), choices_of_settings())
@pytest.mark.parametrize("given", ["pretrained", pytest.param("nothing", marks=pytest.mark.slow)])
def test_every_setting_runs(name: str, value: Any, given: str) -> None:
    options = {"epochs": 2, "hidden_weight": 0.5, name: value}
    if name == "k" and value == 64:
        options["top_n"] = "64"
    learner = build({"name": "ssd", **SMALL, **options}, DIM, priors() if given == "pretrained" else Priors())
    for rows in TASKS:
        measured = learner.learn(task(rows, 32))
        assert all(np.isfinite(value) for value in measured.values())
    for tensor in learner.state_dict().values():
        assert bool(torch.isfinite(tensor.double()).all())
    assert float(learner.net.keys.min()) >= 0
    assert float(learner.net.values.min()) >= 0
    assert learner.predict(task(TASKS[0]).embeddings).shape == (64,)
    again = restore(*pack(learner))
    for each in (learner, again):
        each.learn(task((0, 6), 32))
    assert same(learner, again)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 65}, r"learner.k .* 65 .* 64"),
        ({"top_n": "3"}, r"learner.top_n gives 3 neurons.* at least learner.k = 4"),
        ({"top_n": "0.9k"}, None),  # rounds to k
        ({"top_n": "0.5k"}, r"learner.top_n gives 2 neurons.* at least learner.k = 4"),
        ({"top_n": "65"}, r"learner.top_n gives 65 neurons.* between 1 and .* 64"),
        ({"top_n": "17k"}, r"learner.top_n gives 68 neurons.* between 1 and .* 64"),
        ({"top_n": "many"}, r"learner.top_n must be a whole number.* 'many'"),
        ({"top_n": "1.5"}, r"learner.top_n must be a whole number.* '1.5'"),
        ({"top_n": 8}, None),
        ({"top_n": 0.25}, None),
        ({"ce_weight": 1.1}, r"learner.ce_weight must be at most 1.0, but is 1.1"),
        ({"temperature": 0}, r"learner.temperature must be greater than 0"),
        ({"selection": "first"}, r"learner.selection must be one of frequency, random, all"),
    ],
    ids=str,
)
def test_settings(options: dict[str, Any], message: str | None) -> None:
    if message is None:
        build({"name": "ssd", **SMALL, **options}, DIM, Priors())
        return
    with pytest.raises(InputError, match=message):
        build({"name": "ssd", **SMALL, **options}, DIM, Priors())


# ── the losses ───────────────────────────────────────────────────────────────────────────────────────


def test_first_task_equals_sdmlp() -> None:
    plain = SDMLPLearner(DIM, SDMLPLearner.Settings(**SMALL), priors(), seed=1)
    plain.learn(task(TASKS[0]))
    assert same(plain, learned(1))
    plain.learn(task(TASKS[1]))
    assert not same(plain, learned(2))
    assert same(plain, learned(2, ce_weight=1.0))  # distillation of weight 0 equals SDMLP


def test_distillation_keeps_the_logits_near_the_teacher() -> None:
    """The larger its weight, the closer the student's logits on the new data stay to the previous ones."""
    gaps = []
    for weight in (1.0, 0.5, 0.1):
        learner = learned(2, ce_weight=weight, hidden_weight=0.1)
        gaps.append(float((learner.net.logits(learner.inputs) - learner.taught.logits).norm()))
    assert gaps[0] > gaps[1] > gaps[2]


def test_hidden_distillation_keeps_the_activations_near_the_teacher() -> None:
    gaps = []
    for weight in (0.0, 0.9):
        options = {"ce_weight": 0.01, "hidden_weight": weight, "hidden": "mse", "top_n": "64", "lr": 1.0}
        learner = learned(2, **options)
        before, after = (net.activate(learner.inputs, net.gammas).to_dense() for net in (learner.start, learner.net))
        gaps.append(float((after - before).norm()))
    assert gaps[1] < gaps[0]


def test_hidden_losses_differ() -> None:
    assert not same(learned(2, hidden="kl_softmax", hidden_weight=0.9), learned(2, hidden="mse", hidden_weight=0.9))


@pytest.mark.parametrize(("scope", "outputs"), [("all", None), ("old", [0, 4]), ("seen", [0, 2, 4, 5])])
def test_logit_scope_with_gaps_between_rows(scope: str, outputs: list[int] | None) -> None:
    learner = watched(logit_scope=scope)
    learner.expect(8)
    learner.learn(task((0, 4)))
    learner.learn(task((2, 5)))
    assert (learner.outputs if outputs is None else learner.outputs.tolist()) == outputs


# ── frequencies ──────────────────────────────────────────────────────────────────────────────────────


def shares(learner: Watched, net: SDMLP) -> Tensor:
    """Return the share of the current task's samples that activate each neuron of a network."""
    return (count_activations(net, learner.inputs)[0] / len(learner.inputs)).float()


def test_frequencies_come_from_the_trained_network() -> None:
    learner = learned(2, top_n="64")
    wanted = select(shares(learner, learner.net), NEURONS)
    assert torch.equal(learner.tables[0].indices, wanted.indices)
    assert torch.equal(learner.tables[0].frequencies, wanted.frequencies)


def test_selection_rules_differ() -> None:
    tables = {
        rule: tuple(learned(1, selection=rule, top_n="8").tables[0].indices.tolist())
        for rule in ("frequency", "random", "all")
    }
    assert len(set(tables.values())) == 3
    assert tables["all"] == tuple(range(NEURONS))


# ── the teacher ──────────────────────────────────────────────────────────────────────────────────────


def test_teacher_is_the_previous_self_and_is_not_stored() -> None:
    learner = learned(1)
    former = learner.net.copy()
    assert not any(name.startswith("teacher") for name in learner.state_dict())
    learner.learn(task(TASKS[1]))
    torch.testing.assert_close(learner.taught.logits[:, :2], former.logits(learner.inputs))


def test_distillation_reduces_forgetting() -> None:
    """The method works on easy data; benchmarks measure real streams."""
    kept = []
    for weight in (1.0, 0.3):
        learner = watched(ce_weight=weight, epochs=15, logit_scope="old", lr=0.5)
        learner.expect(4)
        for rows in TASKS[:2]:
            learner.learn(task(rows, 200))
        test = task(TASKS[0], 200, seed=8)
        kept.append(float((learner.predict(test.embeddings) == test.labels).double().mean()))
    assert kept[1] > kept[0]
