"""Tests of `packnet`, `piggyback` and `supsup`: what a later task may change, and which task is inferred."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssd_edge.errors import BundleRefusedError
from ssd_edge.learners import build
from ssd_edge.learners.base import Task
from ssd_edge.learners.gradient.masks import MaskedNetwork, certainties, straight_through
from ssd_edge.learners.priors import Priors

pytestmark = pytest.mark.usefixtures("one_thread")

DIM = 8
QUICK: dict[str, dict[str, Any]] = {
    "packnet": {"retrain": 5},
    "piggyback": {"mask_lr": 0.001},
    "supsup": {"score_lr": 0.01},
}


def task(rows: tuple[int, ...], count: int = 200, seed: int = 0) -> Task:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(rows).repeat(count // len(rows))
    means = 3.0 * torch.randn(7, DIM, generator=torch.Generator().manual_seed(99))
    return Task(means[labels] + torch.randn(len(labels), DIM, generator=generator), labels)


def make(name: str, **options: object) -> Any:
    return build({"name": name, "neurons": 50, "epochs": 10, "batch": 32, **QUICK[name], **options}, DIM, Priors())


def used(learner: MaskedNetwork, number: int) -> torch.Tensor:
    """Return the weights of a task's network."""
    return learner.hidden_weight * learner._mask(number)


@pytest.mark.parametrize("name", QUICK)
def test_a_later_task_leaves_the_networks_of_earlier_ones_bit_identical(name: str) -> None:
    learner, rows = make(name), ((0, 1), (2, 3), (4, 5))
    before: list[tuple[torch.Tensor, ...]] = []
    scores: list[torch.Tensor] = []
    test = task((0, 1), seed=1).embeddings
    for number, classes in enumerate(rows):
        learner.learn(task(classes))
        for old, saved in enumerate(before):
            index = torch.tensor(rows[old])
            now = (used(learner, old), learner.hidden_bias, learner.output_weight[index], learner.output_bias[index])
            assert all(torch.equal(one, other) for one, other in zip(now, saved, strict=True))
        index = torch.tensor(classes)
        parts = (used(learner, number), learner.hidden_bias, learner.output_weight[index], learner.output_bias[index])
        before.append(tuple(part.clone() for part in parts))
        scores.append(learner.scores(test)[:, :2])
        assert torch.equal(scores[0], scores[-1])
    assert not torch.equal(used(learner, 1), used(learner, 2))


def test_packnet_gives_each_task_free_weights_of_its_own() -> None:
    learner = make("packnet", prune=0.75)
    total = free = 50 * DIM
    for rows in ((0, 1), (2, 3), (4, 5)):
        learner.learn(task(rows))
        own = learner.masks[-1]
        assert int(own.sum()) == round(0.25 * free)
        assert int(learner.masks.sum(0).max()) == 1  # no weight belongs to two tasks
        assert bool((learner.hidden_weight[own] != 0).all())
        free -= int(own.sum())
    assert int((learner.hidden_weight == 0).sum()) == free
    assert int(learner._mask(2).sum()) == total - free


def test_packnet_keeps_the_largest_weights() -> None:
    """Learn with steps too small to change the order of the weights."""
    learner = make("packnet", lr=1e-9, epochs=1, retrain=1)
    before = learner.hidden_weight.clone()
    learner.learn(task((0, 1)))
    assert before.abs()[learner.masks[0]].min() > before.abs()[~learner.masks[0]].max()


def test_packnet_without_free_weights_learns_outputs_only() -> None:
    learner = make("packnet", prune=0.0)
    learner.learn(task((0, 1)))
    assert bool(learner.masks[0].all())
    weights = learner.hidden_weight.clone()
    learner.learn(task((2, 3)))
    assert torch.equal(learner.hidden_weight, weights)
    assert not learner.masks[1].any()
    assert bool(learner.output_weight[2:].any())


@pytest.mark.parametrize(("name", "after"), [("supsup", 0), ("piggyback", 1)])
def test_fixed_weights_never_change(name: str, after: int) -> None:
    """Those of SupSup are random; those of Piggyback are the first task's, which uses all of them."""
    learner, stream = make(name), (task((0, 1)), task((2, 3)), task((4, 5)))
    for each in stream[:after]:
        learner.learn(each)
    weights, bias = learner.hidden_weight.clone(), learner.hidden_bias.clone()
    for each in stream[after:]:
        learner.learn(each)
        assert torch.equal(learner.hidden_weight, weights)
        assert torch.equal(learner.hidden_bias, bias)
        assert 0 < int(learner.masks[-1].sum()) < learner.masks[-1].numel()
    if name == "piggyback":
        assert bool(learner.masks[0].all())


def test_supsup_uses_a_share_of_weights_of_one_size() -> None:
    learner = make("supsup", kept=0.25)
    learner.learn(task((0, 1, 2)))
    assert int(learner.masks[0].sum()) == 50 * DIM // 4
    assert len(learner.hidden_weight.abs().unique()) == 1
    sizes = learner.output_weight.abs().unique()
    assert len(sizes) == 2
    assert sizes[0] == 0
    assert int((learner.output_weight != 0).sum()) == round(0.25 * 3 * 50)
    assert not learner.output_bias.any()


def test_straight_through() -> None:
    numbers = torch.tensor([0.2, -0.3, 0.9], requires_grad=True)
    mask = straight_through(numbers, numbers > 0.5)
    assert mask.tolist() == [0.0, 0.0, 1.0]
    (mask * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert numbers.grad is not None
    assert numbers.grad.tolist() == [1.0, 2.0, 3.0]


# ── the inferred task ────────────────────────────────────────────────────────────────────────────────


def test_certainties_order_tasks_by_entropy_and_classes_by_logit() -> None:
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    found = certainties(logits)
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(found.amax(1), -entropy)
    assert torch.equal(found.argsort(1), logits.argsort(1))
    torch.testing.assert_close(found - found[:, :1], logits - logits[:, :1])
    assert certainties(torch.tensor([[1e6, -1e6]])).tolist() == [[0.0, -2e6]]


@pytest.mark.parametrize("infer", ["entropy", "logit"])
@pytest.mark.parametrize("name", QUICK)
def test_the_task_is_inferred_where_tasks_look_different(name: str, infer: str) -> None:
    """Each task has features of its own, so the network of another task is not certain of its samples."""

    def apart(number: int, seed: int) -> Task:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.tensor((0, 1)).repeat(100)
        embeddings = 0.1 * torch.randn(200, DIM, generator=generator)
        embeddings[torch.arange(200), 2 * number + labels] += 4.0
        return Task(embeddings, labels + 2 * number)

    learner = make(name, infer=infer)
    for number in range(3):
        learner.learn(apart(number, 0))
    tests = [apart(number, 1) for number in range(3)]
    found = [float((learner.predict(one.embeddings) == one.labels).double().mean()) for one in tests]
    for number, one in enumerate(tests):
        told = learner.scores(one.embeddings)[:, 2 * number : 2 * number + 2].argmax(1) + 2 * number
        assert float((told == one.labels).double().mean()) > 0.95
    assert sum(found) / 3 > 0.8


def test_a_class_taught_again_belongs_to_the_later_task() -> None:
    learner = make("packnet")
    learner.learn(task((0, 1, 2)))
    learner.learn(task((1, 3)))
    assert learner.class_task.tolist() == [1, 2, 1, 2]
    learner.remove(3, approximately=True)
    assert learner.class_task.tolist() == [1, 2, 1, 0]


# ── the state ────────────────────────────────────────────────────────────────────────────────────────


def test_masks_are_stored_in_a_bit_per_weight() -> None:
    learner = make("packnet")
    for rows in ((0, 1), (2, 3)):
        learner.learn(task(rows))
    state = learner.state_dict()
    assert state["masks"].shape == (2, 50, 1)
    assert state["masks"].dtype == torch.uint8
    again = make("packnet")
    again.load_state_dict(state)
    assert torch.equal(again.masks, learner.masks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks_learned": torch.tensor([3])}, "there are masks of 2 tasks, but 3 were learned"),
        ({"class_task": torch.tensor([1, 1, 2, 3])}, "the tasks of the classes do not match the learned classes"),
        ({"class_task": torch.tensor([1, 1, 2, 0])}, "the tasks of the classes do not match the learned classes"),
    ],
)
def test_states_that_contradict_themselves_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    learner = make("packnet", epochs=1)
    for rows in ((0, 1), (2, 3)):
        learner.learn(task(rows))
    with pytest.raises(BundleRefusedError, match=message):
        make("packnet").load_state_dict({**learner.state_dict(), **change})
