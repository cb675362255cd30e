"""Tests of the decision to compile an epoch: by the setting, the installed packages, and the task."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from ssd_edge.errors import EnvironmentUnfitError, InputError
from ssd_edge.learners import Task, build
from ssd_edge.learners.gradient import epoch
from ssd_edge.learners.gradient.sdmlp import SDMLPLearner
from ssd_edge.learners.priors import Priors

pytestmark = pytest.mark.usefixtures("one_thread")

DIM = 8


def task(rows: tuple[int, int] = (0, 1)) -> Task:
    return Task(torch.randn(40, DIM, generator=torch.Generator().manual_seed(1)), torch.tensor(rows).repeat(20))


def learner(name: str = "sdmlp", **options: Any) -> SDMLPLearner:
    return build({"name": name, "neurons": 60, "k": 3, "epochs": 2, "inhibition": "subtract", **options}, DIM, Priors())


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "ssd_edge.learners.gradient.kernels", raising=False)


def test_auto_uses_pytorch_without_numba(without_numba: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epoch, "MIN_WORK", 0.0)
    automatic, plain = learner(engine="auto"), learner(engine="torch")
    assert automatic.learn(task()) == plain.learn(task())
    assert torch.equal(automatic.net.keys, plain.net.keys)


def test_compiled_raises_without_numba(without_numba: None) -> None:
    asked = learner(engine="compiled")
    before = asked.net.keys.clone()
    with pytest.raises(EnvironmentUnfitError, match=r"engine=compiled needs the package numba.*ssd-edge\[fast\]"):
        asked.learn(task())
    assert torch.equal(asked.net.keys, before)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("sdmlp", {"layers": 2}, "learner.layers is 2"),
        ("sdmlp", {"k": 8}, "learner.k = 8 of 60 neurons is not sparse"),
    ],
)
def test_compiled_raises_for_unsupported_tasks(name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=f"learner.engine is compiled, but {reason}.*set learner.engine=auto"):
        learner(name, engine="compiled", **options).learn(task())
    assert learner(name, engine="auto", **options).learn(task())["epochs"] == 2.0


@pytest.mark.parametrize(
    "options",
    [{"hidden": "mse"}, {"direction": "student_teacher"}, {"layers": 2}],
    ids=str,
)
def test_other_distillation_is_not_compiled(options: dict[str, Any]) -> None:
    student = learner("ssd", **options)
    student.learn(task())
    assert student.trainer(task((2, 3))).loss.compiled() is None


def test_compiled_raises_where_the_distillation_is_not_supported() -> None:
    student = learner("ssd", engine="compiled", hidden="mse")
    student.learn(task())  # the first task has no teacher
    with pytest.raises(InputError, match="it does not support this loss"):
        student.learn(task((2, 3)))


def test_observed_learner_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[epoch.CompiledLoss | None] = []
    monkeypatch.setattr(epoch, "start", lambda net, settings, loss, *others: given.append(loss))
    plain, observed = learner("ssd"), learner("ssd")
    observed.observer = lambda state: None
    for each in (plain, observed):
        each.trainer(task())
    assert given == [epoch.CompiledLoss(1.0), None]


def test_short_tasks_are_not_compiled() -> None:
    short = learner(engine="auto")
    loss = epoch.CompiledLoss(1.0)
    moved = torch.zeros(60, dtype=torch.bool)
    assert (
        epoch.start(short.net, short.settings, loss, short.penalty, moved, torch.rand(40, DIM), task().labels) is None
    )
