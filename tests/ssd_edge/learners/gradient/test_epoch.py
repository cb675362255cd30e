"""When an epoch is compiled: what the setting says, what is installed, and what the task is."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from ssd_edge.errors import EnvironmentUnfitError, InputError
from ssd_edge.learners import LEARNERS, Task, build
from ssd_edge.learners.gradient import epoch
from ssd_edge.learners.gradient.network import Pass
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


def test_without_numba_everything_is_learned_by_pytorch(without_numba: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epoch, "FEW", 0.0)
    automatic, plain = learner(engine="auto"), learner(engine="torch")
    assert automatic.learn(task()) == plain.learn(task())
    assert torch.equal(automatic.net.keys, plain.net.keys)


def test_without_numba_compiled_is_refused(without_numba: None) -> None:
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
        ("sdmlp", {"penalty": "si"}, "its loss is none that"),
    ],
)
def test_compiled_is_refused_where_it_does_not_fit(name: str, options: dict[str, Any], reason: str) -> None:
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
    new = task((2, 3))
    student.net.grow(4, student.generator(5))
    student._begin(student.prepared(new.embeddings), new.labels)
    assert epoch.known_terms(student) is None


def test_a_subclass_that_looks_at_each_step_is_not_compiled() -> None:
    class Watching(LEARNERS["ssd"]):  # type: ignore[misc, valid-type]
        def _observe(self, state: Pass) -> None:
            super()._observe(state)

    class Named(LEARNERS["ssd"]):  # type: ignore[misc, valid-type]
        pass

    settings = LEARNERS["ssd"].Settings(neurons=60, k=3)
    assert epoch.known_terms(Watching(DIM, settings, Priors())) is None
    assert epoch.known_terms(Named(DIM, settings, Priors())) == epoch.Terms(1.0)


def test_short_tasks_are_not_worth_the_loading() -> None:
    short = learner(engine="auto")
    assert epoch.start(short.net, short.settings, epoch.Terms(1.0), torch.rand(40, DIM), task().labels) is None
