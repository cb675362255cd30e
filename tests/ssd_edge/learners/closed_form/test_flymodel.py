"""FlyModel against its definition in NumPy, one sample at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ssd_edge.errors import InputError
from ssd_edge.learners import Learner, Task, build
from ssd_edge.learners.priors import Priors

pytestmark = pytest.mark.usefixtures("one_thread")

DIM = 20
SMALL = {"name": "flymodel", "neurons": 101, "inputs_per_neuron": 6, "active": 0.07}


def draw(counts: dict[int, int], seed: int = 0) -> Task:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(8, DIM, generator=torch.Generator().manual_seed(99))
    labels = torch.tensor([row for row, count in counts.items() for _ in range(count)])
    return Task(means[labels] + torch.randn(len(labels), DIM, generator=generator), labels)


def make(**settings: Any) -> Learner:
    return build({**SMALL, **settings}, DIM, Priors())


def codes(learner: Learner, embeddings: torch.Tensor) -> NDArray:
    projection, found = learner.projection.double().numpy(), []
    for x in embeddings.double().numpy():
        h = ((x - x.min()) / (x.max() - x.min())) @ projection
        h[h <= 0] = 0
        h[h < np.quantile(h, 1 - learner.settings.active)] = 0
        found.append(h / h.max())
    return np.array(found)


@pytest.mark.parametrize("settings", [{}, {"neurons": 100, "active": 0.5}, {"active": 1.0}, {"active": 1e-4}], ids=str)
def test_the_code_keeps_activations_at_or_above_the_quantile(settings: dict[str, Any]) -> None:
    learner, embeddings = make(**settings), draw({0: 40, 1: 40}).embeddings
    np.testing.assert_allclose(learner.code(embeddings), codes(learner, embeddings), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("neurons", "active"), [(11, 0.1), (101, 0.07), (1000, 0.01), (7, 0.3), (50, 0.29), (2, 0.5)])
def test_number_of_active_neurons(neurons: int, active: float) -> None:
    values = np.arange(float(neurons))
    assert make(neurons=neurons, active=active).kept == (values >= np.quantile(values, 1 - active) - 1e-9).sum()


def test_ties_with_the_quantile_stay_active_and_constant_inputs_give_no_code() -> None:
    learner = build({"name": "flymodel", "neurons": 5, "inputs_per_neuron": 1, "active": 0.4}, 2, Priors())
    learner.projection = torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0, 1.0]])
    assert learner.code(torch.tensor([[7.0, -7.0], [3.0, 3.0]])).tolist() == [[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]]


def test_every_neuron_has_distinct_inputs_drawn_from_the_seed() -> None:
    projections = [build(SMALL, DIM, Priors(), seed).projection for seed in (3, 3, 4)]
    assert projections[0].unique().tolist() == [0.0, 1.0]
    assert projections[0].sum(0).tolist() == [6.0] * 101
    assert torch.equal(projections[0], projections[1])
    assert not torch.equal(projections[0], projections[2])


@pytest.mark.parametrize("lr", [0.002, 0.05])
def test_learning_adds_codes_to_the_row_of_the_class_and_clips_once_per_task(lr: float) -> None:
    learner, tasks = make(lr=lr), [draw({0: 30, 2: 50}), draw({1: 20, 2: 40}, seed=1)]
    weights = np.zeros((3, 101))
    for task in tasks:
        for code, row in zip(codes(learner, task.embeddings), task.labels.tolist(), strict=True):
            weights[row] += lr * code
        share = (weights > 1).mean()
        weights = np.minimum(weights, 1)
        assert learner.learn(task) == {"clipped": pytest.approx(share)}
        np.testing.assert_allclose(learner.weights, weights[: len(learner.weights)], rtol=1e-5, atol=1e-7)
    assert (weights.max() == 1) == (lr == 0.05)
    test = draw({0: 10, 1: 10, 2: 10}, seed=2).embeddings
    wanted = codes(learner, test) @ weights.T
    np.testing.assert_allclose(learner.scores(test), wanted, rtol=1e-5, atol=1e-6)
    assert learner.predict(test).tolist() == wanted.argmax(1).tolist()


def after(tasks: list[Task], lr: float) -> torch.Tensor:
    learner = make(lr=lr)
    for task in tasks:
        learner.learn(task)
    return learner.weights


@pytest.mark.parametrize(("lr", "clipped"), [(0.001, False), (0.05, True)])
def test_the_order_of_tasks_does_not_matter_even_where_weights_are_clipped(lr: float, clipped: bool) -> None:
    """Updates are never negative, so min(1, min(1, a) + b) = min(1, a + b)."""
    tasks = [draw({0: 30, 1: 30}), draw({0: 5, 2: 60}, seed=1), draw({1: 50, 2: 7}, seed=2)]
    combined = after([Task(torch.cat([t.embeddings for t in tasks]), torch.cat([t.labels for t in tasks]))], lr)
    assert (float(combined.max()) == 1.0) == clipped
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        torch.testing.assert_close(after([tasks[number] for number in order], lr), combined, rtol=0, atol=1e-6)


def test_more_samples_than_one_batch() -> None:
    task = draw({0: 3000, 1: 2000})
    learner = make(lr=1e-5)
    learner.learn(task)
    wanted = [1e-5 * codes(learner, task.embeddings)[task.labels.numpy() == row].sum(0) for row in (0, 1)]
    np.testing.assert_allclose(learner.weights, wanted, rtol=1e-4, atol=1e-7)


def test_more_inputs_than_values_are_refused() -> None:
    with pytest.raises(InputError, match=r"inputs_per_neuron is 32, but embeddings have only 20 values; set it to 20"):
        build({"name": "flymodel"}, DIM, Priors())
