"""Algorithm 1 of SSD: every switch runs, and does what it says.

That the gradients are right is test_oracle.py's business.
"""

from __future__ import annotations

import typing
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssd_edge.errors import InputError
from ssd_edge.learners import Learner, Task, build, pack, restore
from ssd_edge.learners.gradient.distillation import TopNTable, count_activations, select, teacher_targets
from ssd_edge.learners.gradient.network import SDMLP, Layer, Pass
from ssd_edge.learners.gradient.sdmlp import SDMLPLearner
from ssd_edge.learners.gradient.ssd import SSD, Settings
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
    """Pretrained keys, a third of whose switches never closed."""
    keys = np.abs(np.random.default_rng(0).normal(size=(NEURONS, DIM)))
    counters = np.where(np.arange(NEURONS) % 3, 2 * switch, 0.4 * switch)
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    return Priors(keys=unit.astype(np.float32), counters=counters.astype(np.float32), student={"switch": switch})


class Watched(SSD):
    """Remembers, for each task, the network before its first step and what the teacher said."""

    def _begin(self, inputs: Tensor, labels: Tensor) -> None:
        super()._begin(inputs, labels)
        net = self.net
        self.start = net.copy()
        self.taught, self.inputs, self.steps = self.targets, inputs, []

    def _observe(self, state: Pass) -> None:
        super()._observe(state)
        self.steps.append(state.top.counts())


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


# ── every value of every switch ──────────────────────────────────────────────────────────────────────


def switches() -> list[tuple[str, Any]]:
    """Read from the settings themselves, so that a new switch is tested as soon as it exists."""
    values: list[tuple[str, Any]] = []
    for name, kind in typing.get_type_hints(Settings).items():
        if typing.get_origin(kind) is typing.Literal:
            values += [(name, choice) for choice in typing.get_args(kind)]
        elif kind is bool:
            values += [(name, False), (name, True)]
    extremes = {
        "ce_weight": (0.0, 1.0), "hidden_weight": (0.0, 1.0), "temperature": (0.1, 1000.0), "teacher_decay": (0.0, 1.0),
        "top_n": ("4", "64", "2.5k", "0.5"), "k": (1, 64), "batch": (1, 1000), "switch": (1.0, 1e9), "clip": (1e-3,),
        "shift": (-5.0, 50.0),  # 50: every input is zero
    }  # fmt: skip
    return values + [(name, value) for name, choices in extremes.items() for value in choices]


@pytest.mark.parametrize(("name", "value"), switches())
@pytest.mark.parametrize("given", ["pretrained", "nothing"])
def test_every_switch_runs(name: str, value: Any, given: str) -> None:
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
    ("options", "told"),
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
        ({"teacher": "last"}, r"learner.teacher must be one of previous, ema, first"),
    ],
    ids=str,
)
def test_settings(options: dict[str, Any], told: str | None) -> None:
    if told is None:
        build({"name": "ssd", **SMALL, **options}, DIM, Priors())
        return
    with pytest.raises(InputError, match=told):
        build({"name": "ssd", **SMALL, **options}, DIM, Priors())


# ── the losses ───────────────────────────────────────────────────────────────────────────────────────


def test_the_first_task_is_that_of_sdmlp() -> None:
    plain = SDMLPLearner(DIM, SDMLPLearner.Settings(**SMALL), priors(), seed=1)
    plain.learn(task(TASKS[0]))
    assert same(plain, learned(1))
    plain.learn(task(TASKS[1]))
    assert not same(plain, learned(2))
    assert same(plain, learned(2, ce_weight=1.0))  # no weight on distillation: SDMLP again


def test_first_task_weight_scales_its_learning_rate() -> None:
    """Without clipping, α·CE at a rate is CE at α times that rate."""
    weighed = learned(1, first_task_weight="alpha", ce_weight=0.5, clip=1e9)
    slower = learned(1, first_task_weight="one", ce_weight=0.5, clip=1e9, lr=0.15)
    torch.testing.assert_close(weighed.net.keys, slower.net.keys, rtol=0, atol=1e-5)
    torch.testing.assert_close(weighed.net.values, slower.net.values, rtol=0, atol=1e-5)
    assert not same(weighed, learned(1, ce_weight=0.5, clip=1e9))


def test_distillation_holds_the_student_to_its_teacher() -> None:
    """The more weight it has, the closer the student's answers on the new data stay to the former ones."""
    gaps = []
    for weight in (1.0, 0.5, 0.1):
        learner = learned(2, ce_weight=weight, hidden_weight=0.1)
        gaps.append(float((learner.net.logits(learner.inputs) - learner.taught.logits).norm()))
    assert gaps[0] > gaps[1] > gaps[2]


@pytest.mark.parametrize("source", ["after_inhibition", "before_inhibition"])
def test_hidden_distillation_holds_the_activations(source: str) -> None:
    gaps = []
    for weight in (0.0, 0.9):
        options = {"ce_weight": 0.01, "hidden_weight": weight, "hidden": "mse", "top_n": "64", "lr": 1.0}
        learner = learned(2, hidden_source=source, **options)
        table = learner.teacher_tables[0].indices
        before, after = (
            (learner.inputs @ net.keys[table].T).clamp_min(0)
            if source == "before_inhibition"
            else net.activate(learner.inputs, net.gamma).to_dense()[:, table]
            for net in (learner.start, learner.net)
        )
        gaps.append(float((after - before).norm()))
    assert gaps[1] < gaps[0]


def test_the_kinds_of_hidden_loss_differ() -> None:
    states = [learned(2, hidden=kind, hidden_weight=0.9) for kind in ("kl_softmax", "mse", "normalised_mse", "cosine")]
    for number, one in enumerate(states):
        assert not any(same(one, other) for other in states[:number])


@pytest.mark.parametrize(("scope", "outputs"), [("all", None), ("old", [0, 4]), ("seen", [0, 2, 4, 5])])
def test_logit_scope_with_gaps_between_rows(scope: str, outputs: list[int] | None) -> None:
    learner = watched(logit_scope=scope)
    learner.expect(8)
    learner.learn(task((0, 4)))
    learner.learn(task((2, 5)))
    assert (learner.outputs if outputs is None else learner.outputs.tolist()) == outputs


# ── whose neurons ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("init", ["continue", "pretrained"])
@pytest.mark.parametrize("mode", ["teacher", "student", "rank_matched", "union", "intersection"])
def test_index_modes(mode: str, init: str) -> None:
    learner = watched(index_mode=mode, student_init=init, top_n="12", pretrained=False)
    learner.learn(task(TASKS[0]))
    mine = learner.tables[0].indices.tolist()
    learner.learn(task(TASKS[1]))
    # the student as it stood before its first step on the new data
    counts = count_activations(learner.start, learner.inputs)[0]
    theirs = select((counts / 64).float(), 12).indices.tolist()
    assert mine != theirs
    tables = learner.teacher_tables[0].indices.tolist(), learner.student_tables[0].indices.tolist()
    both = [index for index in mine if index in theirs]
    assert (
        tables
        == {
            "teacher": (mine, mine),
            "student": (theirs, theirs),
            "rank_matched": (mine, theirs),
            "union": (sorted({*mine, *theirs}),) * 2,
            "intersection": (both, both),
        }[mode]
    )
    assert len(learner.tables[0].indices) == 12


@pytest.mark.parametrize("hidden", ["kl_softmax", "mse", "normalised_mse", "cosine"])
@pytest.mark.parametrize("source", ["after_inhibition", "before_inhibition"])
def test_an_empty_intersection_leaves_the_logits(source: str, hidden: str) -> None:
    learner = watched(index_mode="intersection", hidden=hidden, hidden_source=source, hidden_weight=0.5)
    learner.learn(task(TASKS[0]))
    counts = count_activations(learner.net, learner.prepared(task(TASKS[1]).embeddings))[0]
    silent = counts.argsort()[:K]
    learner.tables = [TopNTable(silent, torch.zeros(K))]
    measured = learner.learn(task(TASKS[1]))
    assert len(learner.teacher_tables[0].indices) == 0
    assert "hidden_distillation" not in measured
    assert measured["logit_distillation"] > 0


# ── how often ────────────────────────────────────────────────────────────────────────────────────────


def shares(learner: Watched, net: SDMLP) -> Tensor:
    """Share of the present task's samples that activate each neuron of a network."""
    return (count_activations(net, learner.inputs)[0] / len(learner.inputs)).float()


def test_frequencies_of_the_end_pass_are_those_of_the_trained_network() -> None:
    learner = learned(2, top_n="64")
    wanted = select(shares(learner, learner.net), NEURONS)
    assert torch.equal(learner.tables[0].indices, wanted.indices)
    assert torch.equal(learner.tables[0].frequencies, wanted.frequencies)


@pytest.mark.parametrize("init", ["continue", "pretrained"])
@pytest.mark.parametrize("source", ["running", "gaba_counter"])
def test_frequencies_of_the_training(source: str, init: str) -> None:
    learner = learned(2, top_n="64", frequency_source=source, student_init=init, lr=1.0)
    wanted = select((torch.stack(learner.steps).sum(0) / (64 * 4)).float(), NEURONS)
    assert torch.equal(learner.tables[0].indices, wanted.indices)
    torch.testing.assert_close(learner.tables[0].frequencies, wanted.frequencies)
    assert not torch.equal(wanted.indices, select(shares(learner, learner.net), NEURONS).indices)


def test_frequencies_add_up_over_tasks() -> None:
    learner = watched(top_n="64", accumulate_tasks=True)
    total, samples = torch.zeros(NEURONS, dtype=torch.float64), 0
    for rows, count in zip(TASKS, (64, 32, 16), strict=True):
        learner.learn(task(rows, count))
        total, samples = total + count_activations(learner.net, learner.inputs)[0], samples + count
    wanted = select((total / samples).float(), NEURONS)
    assert torch.equal(learner.tables[0].indices, wanted.indices)
    torch.testing.assert_close(learner.tables[0].frequencies, wanted.frequencies)


@pytest.mark.parametrize("source", ["end_pass", "running"])
def test_selection_by_class_entropy(source: str) -> None:
    learner = learned(1, selection="class_entropy", frequency_source=source, top_n="6")
    by_class = count_activations(learner.net, learner.inputs, task(TASKS[0]).labels, 2)[0]
    chosen = by_class[learner.tables[0].indices]
    assert bool((chosen.sum(1) > 0).all())
    assert bool((chosen.min(1).values == 0).all())  # pure neurons exist, so only those are chosen


def test_selection_rules_choose_differently() -> None:
    tables = {
        rule: tuple(learned(1, selection=rule, top_n="8").tables[0].indices.tolist())
        for rule in ("frequency", "low_entropy", "class_entropy", "random", "all")
    }
    assert len(set(tables.values())) == 5
    assert tables["all"] == tuple(range(NEURONS))


# ── the teacher and the student's start ──────────────────────────────────────────────────────────────


def test_the_previous_self_teaches_and_nothing_of_it_is_kept() -> None:
    learner = learned(1)
    former = learner.net.copy()
    assert not any(name.startswith("teacher") for name in learner.state_dict())
    learner.learn(task(TASKS[1]))
    torch.testing.assert_close(learner.taught.logits[:, :2], former.logits(learner.inputs))


def test_the_first_self_stays_the_teacher() -> None:
    learner = learned(1, teacher="first")
    first = {name: tensor.clone() for name, tensor in learner.state_dict().items() if name.startswith("teacher")}
    assert torch.equal(first["teacher_keys"], learner.net.keys)
    layers = [Layer(first["teacher_keys"], first["teacher_counters"])]
    former = SDMLP(layers, first["teacher_values"], K, learner.net.switch)
    for rows in TASKS[1:]:
        learner.learn(task(rows))
        torch.testing.assert_close(learner.taught.logits[:, :2], former.logits(learner.inputs))
        # classes that came after it: it never had an output for them, whatever the student learned since
        assert float(learner.taught.logits[:, 2:].abs().max()) == 0.0
    state = learner.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in first.items())


def test_the_averaged_teacher_follows_the_student() -> None:
    learner = learned(1, teacher="ema", teacher_decay=0.75)
    first = learner.net.copy()
    learner.learn(task(TASKS[1]))
    state, net = learner.state_dict(), learner.net
    torch.testing.assert_close(state["teacher_keys"], 0.75 * first.keys + 0.25 * net.keys)
    torch.testing.assert_close(state["teacher_counters"], 0.75 * first.counters + 0.25 * net.counters)
    torch.testing.assert_close(state["teacher_values"][:, :2], 0.75 * first.values + 0.25 * net.values[:, :2])
    torch.testing.assert_close(state["teacher_values"][:, 2:], net.values[:, 2:])  # new outputs: nothing to average
    learner.learn(task(TASKS[2]))
    layers = [Layer(state["teacher_keys"], state["teacher_counters"])]
    average = SDMLP(layers, state["teacher_values"], K, net.switch)
    torch.testing.assert_close(learner.taught.logits[:, :4], average.logits(learner.inputs))


@pytest.mark.parametrize("given", ["pretrained", "nothing"])
def test_a_student_that_starts_again_from_its_first_keys(given: str) -> None:
    learner = watched(priors() if given == "pretrained" else Priors(), student_init="pretrained")
    keys, counters = learner.net.keys.clone(), learner.net.counters.clone()
    learner.learn(task(TASKS[0]))
    former = learner.net.copy()
    old = learner.net.values.clone()
    learner.learn(task(TASKS[1]))
    torch.testing.assert_close(learner.start.keys, keys)
    assert torch.equal(learner.start.counters, counters)
    assert learner.start.values.shape == (NEURONS, 4)
    assert not torch.equal(learner.start.values[:, :2], old)  # the head is new as well
    # the teacher is the former self all the same
    wanted = teacher_targets(former, learner.inputs, learner.teacher_tables)
    torch.testing.assert_close(learner.taught.logits[:, :2], wanted.logits)
    index = torch.arange(64)
    torch.testing.assert_close(learner.taught.hidden[0].table(index), wanted.hidden[0].table(index))


def test_distillation_forgets_less_than_none() -> None:
    """The method as such, on data where it can: five tasks' worth is for the benchmark."""
    kept = []
    for weight in (1.0, 0.3):
        learner = watched(ce_weight=weight, epochs=15, logit_scope="old", lr=0.5)
        learner.expect(4)
        for rows in TASKS[:2]:
            learner.learn(task(rows, 200))
        test = task(TASKS[0], 200, seed=8)
        kept.append(float((learner.predict(test.embeddings) == test.labels).double().mean()))
    assert kept[1] > kept[0]
