"""Fine-tuning: the lower bound, and with another schedule the joint upper bound."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ssd_edge.errors import InputError
from ssd_edge.learners import Task, build
from ssd_edge.learners.finetune import JOINT, FineTune
from ssd_edge.priors import Priors

pytestmark = pytest.mark.usefixtures("one_thread")

DIM = 8


def task(rows: tuple[int, ...], count: int = 200, seed: int = 0) -> Task:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(rows).repeat(count // len(rows))
    means = 3.0 * torch.randn(6, DIM, generator=torch.Generator().manual_seed(99))
    return Task(means[labels] + torch.randn(len(labels), DIM, generator=generator), labels)


def accuracy(learner: FineTune, test: Task) -> float:
    return float((learner.predict(test.embeddings) == test.labels).double().mean())


def make(**options: object) -> FineTune:
    return build({"name": "finetune", "neurons": 50, "epochs": 20, **options}, DIM, Priors())


def test_it_learns_and_forgets() -> None:
    learner = make()
    learner.expect(4)
    learner.learn(task((0, 1)))
    assert accuracy(learner, task((0, 1), seed=1)) > 0.95
    learner.learn(task((2, 3)))
    assert accuracy(learner, task((2, 3), seed=1)) > 0.95
    assert accuracy(learner, task((0, 1), seed=1)) < 0.3


def test_joint_training_knows_all_classes() -> None:
    settings = dataclasses.replace(JOINT, neurons=50, min_steps=200)
    learner = FineTune(DIM, settings, Priors())
    learner.learn(task((0, 1, 2, 3), 400))
    assert accuracy(learner, task((0, 1, 2, 3), 400, seed=1)) > 0.95


def test_one_step_is_that_of_autograd() -> None:
    """One full batch: plain SGD on the cross-entropy, clipped, over all outputs."""
    learner, new = make(epochs=1, batch=500, clip=0.5, lr=0.1), task((0, 1))
    learner.expect(3)
    generator = torch.Generator().manual_seed(learner.generator(purpose=2).initial_seed())
    bound = 50**-0.5
    drawn = (torch.rand(3, 51, generator=generator) * 2 - 1) * bound
    weights = [learner.hidden_weight, learner.hidden_bias, drawn[:, :-1], drawn[:, -1]]
    weights = [weight.clone().requires_grad_(True) for weight in weights]
    hidden = (new.embeddings @ weights[0].T + weights[1]).clamp_min(0)
    loss = torch.nn.functional.cross_entropy(hidden @ weights[2].T + weights[3], new.labels)
    gradients = torch.autograd.grad(loss, weights)
    norm = float(sum(gradient.square().sum() for gradient in gradients) ** 0.5)
    assert norm > 0.5  # so that the clip is at work
    measured = learner.learn(new)
    assert measured["cross_entropy"] == pytest.approx(float(loss.detach()), rel=1e-5)
    after = (learner.hidden_weight, learner.hidden_bias, learner.output_weight, learner.output_bias)
    for mine, weight, gradient in zip(after, weights, gradients, strict=True):
        torch.testing.assert_close(mine, (weight - 0.1 * 0.5 / norm * gradient).detach(), rtol=0, atol=1e-6)


def test_outputs_are_announced_or_arrive() -> None:
    for outputs, sizes in (("announced", (6, 6)), ("arriving", (2, 4))):
        learner = make(outputs=outputs, epochs=1)
        learner.expect(6)
        for rows, size in zip(((0, 1), (2, 3)), sizes, strict=True):
            learner.learn(task(rows))
            assert learner.scores(torch.zeros(1, DIM)).shape == (1, size)


def test_an_announced_class_is_a_negative_from_the_start() -> None:
    learner = make()
    learner.expect(3)
    learner.learn(task((0, 1)))
    scores = learner.scores(task((0, 1), seed=1).embeddings)
    assert float((scores[:, 2] < scores[:, :2].amax(1)).double().mean()) > 0.95


def test_min_steps_adds_epochs() -> None:
    told: list[float] = []
    make(epochs=2, batch=100, min_steps=9).learn(task((0, 1), 200), told.append)  # 2 steps an epoch
    assert told == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_divergence_is_told() -> None:
    with pytest.raises(InputError, match=r"fine-tuning diverged in epoch \d+; lower learner.lr \(1e\+30\)"):
        make(lr=1e30, clip=1e30).learn(task((0, 1)))


def test_weights_do_not_carry_gradients() -> None:
    learner = make(epochs=1)
    learner.learn(task((0, 1)))
    assert not any(tensor.requires_grad for tensor in (learner.hidden_weight, learner.output_bias))
    assert learner.hidden_weight.grad is None
