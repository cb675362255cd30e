"""Tests of `der`: the reservoir, the stored logits, the loss, and what it retains."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.replayed import DIM, accuracy, task

from ssd_edge.learners.gradient.der import DER, Settings, reservoir
from ssd_edge.learners.gradient.finetune import FineTune
from ssd_edge.learners.gradient.finetune import Settings as FineTuneSettings
from ssd_edge.learners.priors import Priors

pytestmark = pytest.mark.usefixtures("one_thread")


def make(**options: object) -> DER:
    return DER(DIM, Settings(**{"neurons": 50, "epochs": 20, "memory": 30, **options}), Priors())


def test_the_reservoir_is_a_uniform_sample_of_everything_offered() -> None:
    """Every sample of three blocks is kept equally often."""
    generator, size, blocks = torch.Generator().manual_seed(0), 6, (4, 9, 17)
    kept = torch.zeros(sum(blocks))
    for _ in range(4000):
        memory, offered = torch.full((size,), -1), 0
        for count in blocks:
            taken = reservoir(int((memory >= 0).sum()), offered, size, count, generator)
            memory = torch.where(taken >= 0, taken + offered, memory)
            offered += count
        assert len(memory.unique()) == size
        kept[memory] += 1
    share = kept / 4000
    assert float((share - size / sum(blocks)).abs().max()) < 0.03  # the standard deviation is 0.006


def test_free_places_are_filled_first() -> None:
    generator = torch.Generator().manual_seed(0)
    assert reservoir(0, 0, 5, 3, generator).tolist() == [0, 1, 2, -1, -1]
    assert reservoir(3, 3, 5, 2, generator).tolist() == [-1, -1, -1, 0, 1]


def test_samples_are_stored_with_their_labels_and_logits() -> None:
    learner, first = make(epochs=2), task((0, 1))
    learner.expect(4)
    learner.learn(first)
    assert learner.offered == 200
    assert int(learner.kept.sum()) == 30
    torch.testing.assert_close(learner.exemplar_logits, learner.scores(learner.exemplars))
    for place in range(30):
        match = (first.embeddings == learner.exemplars[place]).all(1).nonzero()
        assert first.labels[match].flatten().tolist() == [int(learner.exemplar_rows[place])]
    stored = learner.exemplar_logits.clone(), learner.exemplars.clone()
    learner.learn(task((2, 3)))
    old = (learner.exemplars == stored[1]).all(1)
    assert 5 < int(old.sum()) < 25  # about half
    assert torch.equal(learner.exemplar_logits[old], stored[0][old])
    assert not torch.allclose(learner.scores(learner.exemplars[old]), stored[0][old])


def test_loss_equals_the_formula() -> None:
    learner = make(epochs=1, batch=500, logit_weight=0.7, label_weight=0.4)  # one step
    learner.expect(4)
    learner.learn(task((0, 1)))
    new = task((2, 3), 40)
    scores = learner.scores(new.embeddings)
    before, logits = learner.scores(learner.exemplars), learner.exemplar_logits.clone()
    draws, rows = learner.generator(purpose=4), learner.exemplar_rows.clone()
    first, second = (torch.randint(30, (40,), generator=draws) for _ in range(2))
    measured = learner.learn(new)
    assert measured["cross_entropy"] == pytest.approx(float(F.cross_entropy(scores, new.labels)), rel=1e-5)
    assert measured["distillation"] == pytest.approx(
        0.7 * float((before - logits)[first].square().mean()), rel=1e-5, abs=1e-12
    )
    assert measured["replay"] == pytest.approx(0.4 * float(F.cross_entropy(before[second], rows[second])), rel=1e-5)


def test_outputs_that_arrive_count_as_if_they_had_been_there() -> None:
    learner = make(epochs=1, lr=1e-6, outputs="arriving")
    learner.learn(task((0, 1)))
    learner.learn(task((2, 3)))
    assert learner.exemplar_logits.shape == (30, 4)
    torch.testing.assert_close(learner.exemplar_logits, learner.scores(learner.exemplars), atol=1e-3, rtol=0)


@pytest.mark.parametrize("label_weight", [0.0, 0.5])
def test_replay_retains_the_first_task(label_weight: float) -> None:
    learners = [
        FineTune(DIM, FineTuneSettings(neurons=50, epochs=20), Priors()),
        make(label_weight=label_weight, logit_weight=0.3),
    ]
    for learner in learners:
        learner.expect(4)
        for rows in ((0, 1), (2, 3)):
            learner.learn(task(rows))
    assert accuracy(learners[0], task((0, 1), seed=1)) < 0.3
    assert accuracy(learners[1], task((0, 1), seed=1)) > 0.9
    assert accuracy(learners[1], task((2, 3), seed=1)) > 0.9
    assert learners[1].display == ("DER++ (replay)" if label_weight else "DER (replay)")


def test_removing_a_class_removes_its_samples_and_logits() -> None:
    learner = make(epochs=2)
    learner.learn(task((0, 1, 2), 210))
    others = learner.exemplar_rows != 1
    samples, logits, left = learner.exemplars[others], learner.exemplar_logits[others], int(others.sum())
    learner.remove(1, approximately=True)
    assert 1 not in learner.exemplar_rows
    assert torch.equal(learner.exemplars[:left], samples)
    assert torch.equal(learner.exemplar_logits[:left, [0, 2]], logits[:, [0, 2]])
    assert not learner.exemplar_logits[:, 1].any()
    assert not learner.exemplar_logits[left:].any()
    assert learner.offered == 210 * left // 30
