"""Tests of `pmr`: the samples closest to the prototypes stay, prototypes move with the network, and replay works."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.replayed import DIM, task

from ssd_edge.errors import InputError
from ssd_edge.learners.gradient.pmr import PMR
from ssd_edge.learners.gradient.replay import Settings
from ssd_edge.learners.priors import Priors

pytestmark = pytest.mark.usefixtures("one_thread")


def make(**options: object) -> PMR:
    return PMR(DIM, Settings(**{"neurons": 50, "epochs": 20, "memory": 20, **options}), Priors())


def closest(learner: PMR, members: torch.Tensor, count: int) -> torch.Tensor:
    """Return the samples whose features are closest to their mean, in order."""
    features = F.normalize(F.relu(F.linear(members, learner.hidden_weight, learner.hidden_bias)))
    return members[(features - features.mean(0)).norm(dim=1).argsort(stable=True)[:count]]


def test_the_samples_closest_to_the_prototypes_stay() -> None:
    learner, first, second = make(epochs=2), task((0, 1)), task((2, 3))
    learner.learn(first)
    for row in (0, 1):
        wanted = closest(learner, first.embeddings[first.labels == row], 10)
        assert torch.equal(learner.exemplars[learner.exemplar_rows == row], wanted)
    before = {row: learner.exemplars[learner.exemplar_rows == row] for row in (0, 1)}
    learner.learn(second)
    assert learner.exemplar_rows.bincount().tolist() == [5] * 4  # as many as before in all
    for row, members in before.items():  # old classes by the prototype that the network gives them now
        assert torch.equal(learner.exemplars[learner.exemplar_rows == row], closest(learner, members, 5))
    for row in (2, 3):
        wanted = closest(learner, second.embeddings[second.labels == row], 5)
        assert torch.equal(learner.exemplars[learner.exemplar_rows == row], wanted)


def test_prototypes_move_with_the_network() -> None:
    learner = make(epochs=2)
    learner.learn(task((0, 1)))
    before = learner.means.clone()
    learner.learn(task((2, 3)))
    features = learner._features(learner.exemplars)
    now = torch.stack([features[learner.exemplar_rows == row].mean(0) for row in range(4)])
    torch.testing.assert_close(learner.means, F.normalize(now))
    assert not torch.allclose(learner.means[:2], before, atol=1e-4)


def test_a_step_replays_as_many_samples_as_it_learns() -> None:
    learner = make(epochs=1, batch=500)  # one step
    learner.expect(4)
    learner.learn(task((0, 1)))
    places = torch.randint(20, (40,), generator=learner.generator(purpose=4))
    logits = learner._forward(learner.exemplars[places])
    wanted = float(F.cross_entropy(logits, learner.exemplar_rows[places]))
    measured = learner.learn(task((2, 3), 40))
    assert measured["replay"] == pytest.approx(wanted, rel=1e-5)


def test_few_samples_retain_the_first_task() -> None:
    learner = make(memory=20)
    learner.expect(4)
    for rows in ((0, 1), (2, 3)):
        learner.learn(task(rows))
    for rows in ((0, 1), (2, 3)):
        test = task(rows, seed=1)
        assert float((learner.predict(test.embeddings) == test.labels).double().mean()) > 0.9


def test_too_small_memory_raises() -> None:
    learner = make(memory=3, epochs=1)
    learner.learn(task((0, 1)))
    with pytest.raises(InputError, match=r"learner.memory is 3, but 4 classes need an exemplar each"):
        learner.learn(task((2, 3)))
