"""Tests of `finetune`: sequential and joint training, outputs, penalties, state."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ssd_edge.errors import InputError
from ssd_edge.learners import Task, build, pack, restore
from ssd_edge.learners.gradient.finetune import JOINT, FineTune
from ssd_edge.learners.priors import Priors

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


def test_learns_a_task_and_forgets_the_previous_one() -> None:
    learner = make()
    learner.expect(4)
    learner.learn(task((0, 1)))
    assert accuracy(learner, task((0, 1), seed=1)) > 0.95
    learner.learn(task((2, 3)))
    assert accuracy(learner, task((2, 3), seed=1)) > 0.95
    assert accuracy(learner, task((0, 1), seed=1)) < 0.3


def test_joint_training_learns_all_classes() -> None:
    settings = dataclasses.replace(JOINT, neurons=50, min_steps=200)
    learner = FineTune(DIM, settings, Priors())
    learner.learn(task((0, 1, 2, 3), 400))
    assert accuracy(learner, task((0, 1, 2, 3), 400, seed=1)) > 0.95


def test_one_step_equals_autograd() -> None:
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
    assert norm > 0.5  # the gradient is clipped
    measured = learner.learn(new)
    assert measured["cross_entropy"] == pytest.approx(float(loss.detach()), rel=1e-5)
    after = (learner.hidden_weight, learner.hidden_bias, learner.output_weight, learner.output_bias)
    for mine, weight, gradient in zip(after, weights, gradients, strict=True):
        torch.testing.assert_close(mine, (weight - 0.1 * 0.5 / norm * gradient).detach(), rtol=0, atol=1e-6)


def test_number_of_outputs_with_and_without_announcement() -> None:
    for outputs, sizes in (("announced", (6, 6)), ("arriving", (2, 4))):
        learner = make(outputs=outputs, epochs=1)
        learner.expect(6)
        for rows, size in zip(((0, 1), (2, 3)), sizes, strict=True):
            learner.learn(task(rows))
            assert learner.scores(torch.zeros(1, DIM)).shape == (1, size)


def test_announced_class_is_a_negative_from_the_start() -> None:
    learner = make()
    learner.expect(3)
    learner.learn(task((0, 1)))
    scores = learner.scores(task((0, 1), seed=1).embeddings)
    assert float((scores[:, 2] < scores[:, :2].amax(1)).double().mean()) > 0.95


def test_min_steps_adds_epochs() -> None:
    shares: list[float] = []
    make(epochs=2, batch=100, min_steps=9).learn(task((0, 1), 200), shares.append)  # 2 steps per epoch
    assert shares == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_divergence_raises() -> None:
    with pytest.raises(InputError, match=r"fine-tuning diverged in epoch \d+; lower learner.lr \(1000000000000000.0\)"):
        make(lr=1e15, clip=1e15).learn(task((0, 1)))


def test_weights_require_no_gradients_after_learning() -> None:
    learner = make(epochs=1)
    learner.learn(task((0, 1)))
    assert not any(tensor.requires_grad for tensor in (learner.hidden_weight, learner.output_bias))
    assert learner.hidden_weight.grad is None


# ── outputs ──────────────────────────────────────────────────────────────────────────────────────────


def test_untrained_learner_scores_every_announced_class() -> None:
    learner = make()
    assert learner.scores(torch.zeros(3, DIM)).shape == (3, 0)
    for announced in (4, 6, 2):  # the last announcement counts
        learner.expect(announced)
        assert learner.scores(torch.zeros(3, DIM)).shape == (3, announced)
    assert float(learner.scores(torch.ones(3, DIM)).abs().max()) > 0
    arriving = make(outputs="arriving")
    arriving.expect(4)
    assert arriving.scores(torch.zeros(3, DIM)).shape == (3, 0)


def test_outputs_do_not_depend_on_the_announcements() -> None:
    """The first task draws the same outputs whether none, too few or all were announced."""
    learners = []
    for announced in ((), (3,), (2, 4), (6,), (7, 6)):
        learner = make(epochs=1, lr=1e-9)
        for classes in announced:
            learner.expect(classes)
        learner.learn(task((0, 5)))
        learners.append(learner)
        assert torch.equal(learner.output_weight, learners[0].output_weight)
    assert len(learners[0].output_weight.unique(dim=0)) == 6
    before = learners[0].output_weight
    learners[0].expect(9)
    assert learners[0].output_weight is before  # later outputs are added by their task
    learners[0].learn(task((0, 1)))
    grown = learners[0].output_weight
    torch.testing.assert_close(grown[:6], before, rtol=0, atol=1e-6)
    assert len(torch.cat([grown, before[:3]]).round(decimals=5).unique(dim=0)) == 9  # no row drawn twice


# ── several layers, and penalties ────────────────────────────────────────────────────────────────────


def functional(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Compute two hidden layers in plain PyTorch."""
    x = (x @ parameters["hidden_weight"].T + parameters["hidden_bias"]).clamp_min(0)
    x = (x @ parameters["hidden_weight_1"].T + parameters["hidden_bias_1"]).clamp_min(0)
    return x @ parameters["output_weight"].T + parameters["output_bias"]


def test_two_layers_forward_and_per_sample_gradients() -> None:
    learner = make(layers=2, neurons=12, epochs=3)
    learner.learn(task((0, 1, 2), 60))
    inputs = task((0, 1, 2), 30, seed=5).embeddings
    weights = torch.randn(3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(learner.scores(inputs), functional(learner.parameters, inputs), rtol=1e-5, atol=1e-5)
    logits, pullback = learner.linearise(inputs)
    torch.testing.assert_close(logits, functional(learner.parameters, inputs), rtol=1e-5, atol=1e-5)
    one = torch.func.grad(lambda parameters, x: (functional(parameters, x).sin() * weights).sum())
    wanted = torch.func.vmap(one, in_dims=(None, 0))(learner.parameters, inputs)
    slots = pullback(logits.cos() * weights)
    assert slots.keys() == wanted.keys()
    for name, slot in slots.items():
        mine = slot.delta if slot.source is None else slot.delta[:, :, None] * slot.source[:, None, :]
        assert float(wanted[name].abs().max()) > 0
        torch.testing.assert_close(mine, wanted[name], rtol=1e-4, atol=1e-5)


def test_several_layers_learn() -> None:
    learner = make(layers=3)
    learner.learn(task((0, 1, 2, 3), 400))
    assert accuracy(learner, task((0, 1, 2, 3), 400, seed=1)) > 0.95
    assert {name for name in learner.state_dict() if "weight" in name} == {
        "hidden_weight", "hidden_weight_1", "hidden_weight_2", "output_weight",
    }  # fmt: skip


def test_one_step_with_a_penalty_equals_autograd() -> None:
    """SI over two tasks of one full batch each: path, importance, and the penalty's gradient before clipping."""
    options = {"penalty_beta": 0.5, "penalty_weight": 50.0}
    learner = make(epochs=1, batch=500, clip=0.5, lr=0.1, neurons=9, penalty="si", **options)
    learner.expect(4)
    anchor = importance = None
    for new in (task((0, 1)), task((2, 3))):
        before = {name: tensor.double().requires_grad_(True) for name, tensor in learner.parameters.items()}
        hidden = (new.embeddings.double() @ before["hidden_weight"].T + before["hidden_bias"]).clamp_min(0)
        logits = hidden @ before["output_weight"].T + before["output_bias"]
        leaves = list(before.values())
        observed = torch.autograd.grad(
            torch.nn.functional.cross_entropy(0.5 * logits, new.labels), leaves, retain_graph=True
        )
        loss = torch.nn.functional.cross_entropy(logits, new.labels)
        if anchor is not None:
            loss = loss + 50 * sum((importance[n] * (before[n] - anchor[n]).square()).sum() for n in before)
        gradients = list(torch.autograd.grad(loss, leaves))
        norm = float(sum(gradient.square().sum() for gradient in gradients) ** 0.5)
        assert norm > 0.5
        measured = learner.learn(new)
        assert ("penalty" in measured) == (anchor is not None)
        after, old = {}, importance
        importance = {}
        for (name, start), gradient, seen in zip(before.items(), gradients, observed, strict=True):
            change = -0.1 * 0.5 / norm * gradient
            after[name] = (start + change).detach()
            torch.testing.assert_close(learner.parameters[name].double(), after[name], rtol=0, atol=1e-6)
            importance[name] = (-seen * change / (change.square() + 0.1)).detach()
            importance[name] = (importance[name] + (0 if old is None else old[name])).clamp_min(0)
            torch.testing.assert_close(
                learner.penalty.importance[name].double(), importance[name], rtol=1e-3, atol=1e-8
            )
        anchor = after


@pytest.mark.parametrize(
    ("penalty", "weight"), [("ewc", 100.0), ("online_ewc", 100.0), ("mas", 1.0), ("si", 100.0), ("l2", 3.0)]
)
def test_penalty_reduces_forgetting(penalty: str, weight: float) -> None:
    known = []
    for used in (1e-6, weight):
        learner = make(penalty=penalty, penalty_weight=used, lr=0.02)
        learner.expect(4)
        learner.learn(task((0, 1)))
        measured = learner.learn(task((2, 3)))
        assert measured["penalty"] > 0
        known.append([accuracy(learner, task(rows, seed=1)) for rows in ((0, 1), (2, 3))])
    assert known[0][0] < 0.3
    assert known[1][0] > 0.9
    assert known[1][1] > 0.7


def test_penalty_of_weight_zero_equals_fine_tuning() -> None:
    plain, weightless = make(epochs=2), make(epochs=2, penalty="ewc", penalty_weight=0)
    for learner in (plain, weightless):
        learner.expect(4)
        for rows in ((0, 1), (2, 3)):
            learner.learn(task(rows))
    state = weightless.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    assert plain.memory_bytes() < weightless.memory_bytes()


def test_display_name_contains_the_penalty() -> None:
    assert (make().display, make(penalty="online_ewc").display) == ("fine-tuning", "online EWC")
    assert FineTune.display == "fine-tuning"


@pytest.mark.parametrize("options", [{"optimiser": "adamw"}, {"weight_decay": 0.1}], ids=str)
def test_penalty_requires_plain_sgd(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"learner.penalty=mas requires plain SGD, but learner.optimiser is"):
        make(penalty="mas", **options)


@pytest.mark.parametrize("penalty", ["ewc", "online_ewc", "si", "mas", "l2"])
def test_resume_with_a_penalty_gives_identical_weights(penalty: str) -> None:
    learner = make(epochs=2, layers=2, neurons=10, outputs="arriving", penalty=penalty, fisher="batch")
    for number, rows in enumerate(((0, 1), (2, 3), (1, 5))):
        again = restore(*pack(learner))
        for each in (learner, again):
            each.learn(task(rows))
        mine, theirs = learner.state_dict(), again.state_dict()
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == [], number
