"""Tests of `sdmlp`: initial keys, GABA switches, outputs, measurements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ssd_edge.errors import InputError
from ssd_edge.learners import Task, build
from ssd_edge.learners.gradient.distillation import count_activations
from ssd_edge.learners.gradient.sdmlp import SDMLPLearner, Settings
from ssd_edge.learners.priors import Priors

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, NEURONS = 10, 64
SMALL = {"neurons": NEURONS, "k": 4, "epochs": 4, "batch": 16, "shift": 0.0, "lr": 0.3}


def task(rows: tuple[int, ...], seed: int = 0) -> Task:
    generator = torch.Generator().manual_seed(seed)
    return Task(torch.randn(64, DIM, generator=generator), torch.tensor(rows).repeat(64 // len(rows)))


def priors(switch: float = 100.0) -> Priors:
    """Return pretrained keys, a third of which have open switches."""
    keys = np.abs(np.random.default_rng(0).normal(size=(NEURONS, DIM)))
    counters = np.where(np.arange(NEURONS) % 3, 2 * switch, 0.4 * switch)
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    return Priors(keys=unit.astype(np.float32), counters=counters.astype(np.float32), student={"switch": switch})


def make(given: Priors, **options: Any) -> SDMLPLearner:
    return SDMLPLearner(DIM, Settings(**{**SMALL, **options}), given, seed=1)


def learned(given: Priors, **options: Any) -> SDMLPLearner:
    learner = make(given, **options)
    learner.learn(task((0, 1)))
    return learner


def test_pretrained_keys_start_closed_unless_kept() -> None:
    given = priors()
    closed, kept, other = make(given), make(given, gaba="keep"), make(given, pretrained=False)
    torch.testing.assert_close(closed.net.keys, torch.from_numpy(given.keys))
    assert closed.net.gamma is None
    assert torch.equal(kept.net.counters, torch.from_numpy(given.counters))
    assert float(kept.net.gamma.min()) == pytest.approx(-0.2)
    assert float(other.net.counters.max()) == 0.0
    assert not torch.allclose(other.net.keys, closed.net.keys)


def test_keys_of_another_size_or_without_counters_are_ignored() -> None:
    given = priors()
    for learner in (make(given, neurons=65), make(Priors(keys=given.keys))):
        assert float(learner.net.counters.max()) == 0.0
        assert learner.switch == 0.0


def test_learners_of_one_package_have_separate_counters() -> None:
    given = priors()
    first = learned(given, gaba="keep")
    assert not torch.equal(first.net.counters, torch.from_numpy(given.counters))
    assert torch.equal(make(given, gaba="keep").net.counters, torch.from_numpy(priors().counters))


def test_switch_comes_from_the_settings_the_package_or_the_first_task() -> None:
    assert learned(priors(50.0), switch=77.0).switch == 77.0
    assert learned(priors(50.0)).switch == 50.0
    learner = learned(Priors())
    assert learner.switch == 0.5 * 64 * 4
    learner.learn(Task(torch.zeros(8, DIM), torch.zeros(8, dtype=torch.int64)))
    assert learner.switch == learner.net.switch == 0.5 * 64 * 4  # later tasks do not change it


def test_number_of_outputs_with_and_without_announcement() -> None:
    for outputs, widths in (("announced", (6, 6)), ("arriving", (2, 4))):
        learner = make(priors(), outputs=outputs)
        learner.expect(6)
        for rows, width in zip(((0, 1), (2, 3)), widths, strict=True):
            learner.learn(task(rows))
            assert learner.net.values.shape == (NEURONS, width)


def test_divergence_raises() -> None:
    with pytest.raises(InputError, match=r"SDMLP diverged in epoch \d.*; lower learner.lr \(1e\+38\)"):
        learned(priors(), lr=1e38, clip=1e38)


def test_k_above_the_number_of_neurons_raises() -> None:
    with pytest.raises(InputError, match=r"learner.k .* 65 .* 64"):
        make(Priors(), k=65)


def test_note_on_keys_of_another_shift_or_size() -> None:
    keys = torch.rand(NEURONS, 8).numpy()
    given = Priors(keys=keys, counters=torch.ones(NEURONS).numpy(), student={"shift": 0.0, "switch": 1.0})
    options = {"name": "sdmlp", "neurons": NEURONS, "k": 4}
    assert build({**options, "shift": 0.0}, 8, given).note == ""
    assert "pretrained for shift 0, not 1" in build({**options, "shift": 1.0}, 8, given).note
    assert "random ones are used" in build(options, 9, given).note
    assert build({**options, "pretrained": False}, 9, given).note == ""


def test_inhibitions_follow_their_rules() -> None:
    """`subtract` behaves like a switch closed from the start; `mask` passes scores unchanged."""
    closed = learned(priors(), pretrained=False, switch=1e-9)  # every counter exceeds it after the first batch
    subtract = learned(priors(), pretrained=False, inhibition="subtract")
    mask = learned(priors(), pretrained=False, inhibition="mask")
    assert closed.net.gamma is None
    assert subtract.net.gamma is None
    assert float(subtract.net.counters.max()) < 64 * 4  # few neurons are active from the start
    x = subtract.prepared(task((0, 1), seed=5).embeddings)
    assert int(subtract.net.activate(x).counts().sum()) <= 4 * len(x)
    assert int(mask.net.activate(x).counts().sum()) == 4 * len(x)
    scores = (x @ mask.net.keys.T).topk(4, dim=1)
    torch.testing.assert_close(mask.net.activate(x).to_dense().gather(1, scores.indices), scores.values)


def test_two_hidden_layers_learn() -> None:
    learner = make(priors(), layers=2, epochs=30, inhibition="subtract")
    apart = 3.0 * torch.eye(2, DIM)
    given, test = (Task(one.embeddings + apart[one.labels], one.labels) for one in (task((0, 1)), task((0, 1), 5)))
    learner.learn(given)
    assert [tuple(layer.keys.shape) for layer in learner.net.layers] == [(NEURONS, DIM), (NEURONS, NEURONS)]
    assert float((learner.predict(test.embeddings) == test.labels).double().mean()) > 0.85


def test_announced_outputs_exist_before_training() -> None:
    learner, other = make(priors()), make(priors())
    learner.expect(6)
    assert learner.scores(task((0, 1)).embeddings).shape[1] == 6
    columns = learner.net.values.clone()
    other.net.grow(6, other.generator(purpose=2))
    assert torch.equal(columns, other.net.values)
    learner.expect(6)
    assert torch.equal(learner.net.values, columns)


def test_columns_beyond_the_announced_ones_differ_from_them() -> None:
    learner = make(priors(), lr=1e-30)
    learner.expect(2)
    learner.learn(task((0, 3)))
    values = learner.net.values
    assert values.shape[1] == 4
    assert not torch.equal(values[:, 2:], values[:, :2])


def test_gradient_norm_of_each_loss_term_is_measured() -> None:
    learner = make(priors(), penalty="l2", penalty_weight=0.1)
    learner.expect(4)
    first, second = learner.learn(task((0, 1))), learner.learn(task((2, 3)))
    assert "penalty" not in first
    assert second["penalty"] > 0
    assert second["penalty_gradient_first"] == 0.0  # at the anchor
    assert second["penalty_gradient_last"] > 0
    assert second["cross_entropy_gradient_first"] > 0
    assert second["cross_entropy_gradient_last"] > 0
    assert 0 <= second["clipped"] <= 1
    assert 0 < second["active_neurons"] <= 4
    assert learner.display == "SDMLP+L2"


# ── few images ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "samples", "epochs"),
    [
        ({}, 20, 300),  # one step per epoch
        ({}, 300, 100),
        ({}, 10_000, 40),
        ({"epochs": 41}, 20, 41),  # a schedule in epochs is left alone
        ({"epochs": 2000}, 20, 2000),
        ({"min_steps": 1}, 20, 40),
        ({"epochs": 3, "min_steps": 7}, 200, 4),  # two steps per epoch
        ({"epochs": 3, "min_steps": 7, "batch": 10}, 200, 3),
    ],
    ids=str,
)
def test_few_images_are_repeated(options: dict[str, int], samples: int, epochs: int) -> None:
    assert Settings(**options).epochs_of(samples) == epochs


def test_repeated_images_are_learned() -> None:
    """A few images of a class after many of others: only with enough steps is the loss on them low."""
    few, losses = Task(task((0, 1), seed=4).embeddings[:8], torch.full((8,), 2)), []
    for min_steps in (1, 0):
        learner, shares = make(priors(), epochs=40, min_steps=min_steps, lr=1.0), []
        learner.expect(3)
        learner.learn(task((0, 1)))
        measured = learner.learn(few, shares.append)
        assert measured["epochs"] == len(shares) == (300 if not min_steps else 40)
        assert shares[-1] == 1.0
        losses.append(measured["cross_entropy"])
    assert losses[1] < 0.5 * losses[0]


def test_sparse_memory_finetuning_changes_only_unusual_neurons() -> None:
    """After the first task, those change that the task activates often and earlier counts do not."""
    for engine in ("torch", "compiled"):
        learner = make(priors(), memory_rows=6, inhibition="subtract", engine=engine)
        learner.expect(4)
        first = learner.net.copy()
        learner.learn(task((0, 1)))
        before = learner.net.copy()
        assert int((before.keys != first.keys).any(1).sum()) > 6
        learner.learn(task((2, 3), seed=7))
        after = learner.net
        changed = ((before.keys != after.keys) | (before.values[:, :1] != after.values[:, :1])).any(1)
        assert 0 < int(changed.sum()) <= 6
        assert float((after.counters - before.counters).sum()) > 6  # frozen neurons are counted too
        counts = count_activations(before, learner.prepared(task((2, 3), seed=7).embeddings))[0]
        frequency, rarity = counts / counts.sum(), (before.counters.sum() / 4 + 1) / (before.counters + 1)
        assert set(changed.nonzero().flatten().tolist()) <= set((frequency * rarity.log()).topk(6).indices.tolist())
