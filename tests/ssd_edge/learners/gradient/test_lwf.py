"""Tests of `lwf`: distillation on classes taught before, with targets computed once per task."""

from __future__ import annotations

import pytest
import torch

from ssd_edge.learners.base import Task
from ssd_edge.learners.gradient.distillation import divergence
from ssd_edge.learners.gradient.lwf import LwF, Settings
from ssd_edge.learners.priors import Priors

pytestmark = pytest.mark.usefixtures("one_thread")

DIM = 8


def task(rows: tuple[int, ...], count: int = 200, seed: int = 0) -> Task:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(rows).repeat(count // len(rows))
    means = 3.0 * torch.randn(6, DIM, generator=torch.Generator().manual_seed(99))
    return Task(means[labels] + torch.randn(len(labels), DIM, generator=generator), labels)


def accuracy(learner: LwF, test: Task) -> float:
    return float((learner.predict(test.embeddings) == test.labels).double().mean())


def make(**options: object) -> LwF:
    return LwF(DIM, Settings(**{"neurons": 50, "epochs": 20, **options}), Priors())


@pytest.mark.parametrize("temperature", [2.0, 0.7])
def test_distillation_equals_the_closed_form(temperature: float) -> None:
    """Value and gradient equal the closed form of SSD on classes taught before, and are zero on all others."""
    learner = make(temperature=temperature, distillation_weight=0.3, epochs=2)
    learner.expect(6)
    learner.learn(task((0, 3, 4)))
    new = task((1, 2), 40)
    teacher = learner.scores(new.embeddings)[:, [0, 3, 4]]
    learner._begin(new.embeddings, new.labels)
    index = torch.tensor([5, 30, 2, 17])
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    losses = learner._loss(logits, new.labels[index], index)
    assert losses.keys() == {"cross_entropy", "distillation"}
    wanted, slope = divergence(logits.detach()[:, [0, 3, 4]], teacher[index], temperature)
    assert float(losses["distillation"].detach()) == pytest.approx(0.3 * float(wanted), rel=1e-5)
    (gradient,) = torch.autograd.grad(losses["distillation"], logits)
    torch.testing.assert_close(gradient[:, [0, 3, 4]], 0.3 * slope, rtol=1e-4, atol=1e-7)
    assert not gradient[:, [1, 2, 5]].any()


def test_only_the_first_step_of_a_task_equals_fine_tuning() -> None:
    """Old and new outputs are equal before the first step, so distillation has no gradient there."""
    for epochs in (1, 2):
        plain, distilled = (make(epochs=epochs, batch=500, distillation_weight=weight) for weight in (0.0, 1.0))
        for rows in ((0, 1), (2, 3)):
            plain.learn(task(rows))
            measured = distilled.learn(task(rows))
        difference = float((plain.hidden_weight - distilled.hidden_weight).abs().max())
        if epochs == 1:
            assert measured["distillation"] == pytest.approx(0, abs=1e-6)
            assert difference < 1e-7
        else:
            assert measured["distillation"] > 1e-4
            assert difference > 1e-5


def test_first_task_equals_fine_tuning() -> None:
    learner = make(epochs=2)
    assert learner.learn(task((0, 1))).keys() == {"cross_entropy", "epochs"}


def test_distillation_reduces_forgetting() -> None:
    for weight, low, high in ((0.0, 0.0, 0.3), (3.0, 0.6, 1.0)):
        learner = make(distillation_weight=weight)
        learner.expect(4)
        for rows in ((0, 1), (2, 3)):
            learner.learn(task(rows))
        assert low <= accuracy(learner, task((0, 1), seed=1)) <= high
        assert accuracy(learner, task((2, 3), seed=1)) > 0.95


def test_teacher_logits_are_discarded_after_the_task() -> None:
    learner = make(epochs=1)
    for rows in ((0, 1), (2, 3)):
        learner.learn(task(rows))
        assert learner.targets.numel() == 0
    assert learner.state_dict().keys() == {
        "hidden_weight", "hidden_bias", "output_weight", "output_bias", "announced", "seen", "tasks_learned",
    }  # fmt: skip


def test_resume_gives_identical_weights() -> None:
    learner = make(epochs=2)
    for rows in ((0, 1), (2, 3), (1, 5)):
        again = make(epochs=2)
        again.load_state_dict(learner.state_dict())
        for each in (learner, again):
            each.learn(task(rows))
        theirs = again.state_dict()
        assert [name for name, tensor in learner.state_dict().items() if not torch.equal(tensor, theirs[name])] == []


def test_with_a_penalty() -> None:
    learner = make(epochs=3, penalty="ewc", penalty_weight=10.0)
    assert (learner.display, make().display) == ("LwF+EWC", "LwF")
    learner.learn(task((0, 1)))
    assert learner.learn(task((2, 3))).keys() == {"cross_entropy", "distillation", "penalty", "epochs"}
