"""FeCAM against the published equations in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ssd_edge.errors import InputError
from ssd_edge.learners import Learner, Task, build, pack, restore
from ssd_edge.learners.priors import Priors

pytestmark = pytest.mark.usefixtures("one_thread")

DIM = 9


def draw(counts: dict[int, int], seed: int = 0) -> Task:
    """Return samples of classes with different means and covariances."""
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.Generator().manual_seed(99)
    means, mixing = torch.randn(8, DIM, generator=shapes), torch.randn(8, DIM, DIM, generator=shapes)
    labels = torch.tensor([row for row, count in counts.items() for _ in range(count)])
    noise = torch.randn(len(labels), DIM, generator=generator)
    return Task(means[labels] + torch.einsum("nd,nde->ne", noise, mixing[labels]) / 2, labels)


def fitted(task: Task, **settings: Any) -> Learner:
    learner = build({"name": "fecam", **settings}, DIM, Priors())
    learner.learn(task)
    return learner


def shrunk(covariance: NDArray, diagonal: float, off_diagonal: float) -> NDArray:
    outside = [covariance[i, j] for i in range(DIM) for j in range(DIM) if i != j]
    result = covariance + diagonal * np.diag(covariance).mean() * np.eye(DIM)
    return result + off_diagonal * np.mean(outside) * (1 - np.eye(DIM))


def distances(task: Task, test: NDArray, diagonal: float, off_diagonal: float, tukey: float) -> NDArray:
    """Return squared Mahalanobis distances (N, C), per sample and class, using the pseudo-inverse."""
    x, y = task.embeddings.double().numpy(), task.labels.numpy()
    x, test = np.sign(x) * np.abs(x) ** tukey, np.sign(test) * np.abs(test) ** tukey
    found = []
    for row in np.unique(y):
        own = x[y == row]
        covariance = shrunk(shrunk(np.cov(own.T), diagonal, off_diagonal), diagonal, off_diagonal)
        deviation = np.sqrt(np.diag(covariance))
        inverse, mean = np.linalg.pinv(covariance / deviation / deviation[:, None]), own.mean(0)
        differences = [z / np.linalg.norm(z) - mean / np.linalg.norm(mean) for z in test]
        found.append([difference @ inverse @ difference for difference in differences])
    return np.array(found).T


@pytest.mark.parametrize(
    ("diagonal", "off_diagonal", "tukey"), [(1.0, 1.0, 1.0), (1.0, 0.0, 1.0), (10.0, 10.0, 0.5), (0.2, 0.1, 0.7)]
)
def test_scores_match_the_published_distances(diagonal: float, off_diagonal: float, tukey: float) -> None:
    task, test = draw({0: 30, 1: 20, 3: 5}), draw({0: 20, 1: 20, 3: 20}, seed=1).embeddings
    learner = fitted(task, shrink_diagonal=diagonal, shrink_off_diagonal=off_diagonal, tukey=tukey)
    wanted = distances(task, test.double().numpy(), diagonal, off_diagonal, tukey)
    np.testing.assert_allclose(-learner.scores(test)[:, [0, 1, 3]], wanted, rtol=1e-5, atol=1e-6)
    assert learner.predict(test).tolist() == np.array([0, 1, 3])[wanted.argmin(1)].tolist()


def test_defaults() -> None:
    settings = build({"name": "fecam"}, DIM, Priors()).settings
    assert (settings.shrink_diagonal, settings.shrink_off_diagonal, settings.tukey) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("repeats", [1, 6])
def test_a_class_without_variance_uses_the_euclidean_distance(repeats: int) -> None:
    task, test = draw({0: 1, 1: 1}), draw({0: 5, 1: 5}, seed=1).embeddings
    learner = fitted(Task(task.embeddings.repeat(repeats, 1), task.labels.repeat(repeats)))
    unit = torch.nn.functional.normalize
    wanted = torch.cdist(unit(test), unit(task.embeddings)).square()
    torch.testing.assert_close(-learner.scores(test), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"shrink_diagonal": 0.001, "shrink_off_diagonal": 0.0}], ids=str)
def test_singular_covariances(settings: dict[str, float]) -> None:
    """Two samples with mostly equal values whose mean difference is 0: even the shrunk covariance is singular."""
    difference = torch.tensor([1.0, -1.0] + [0.0] * (DIM - 2))
    embeddings = torch.stack([torch.ones(DIM) + difference, torch.ones(DIM) - difference])
    learner = fitted(Task(embeddings, torch.tensor([0, 0])), **settings)
    assert bool(torch.isfinite(learner.scores(draw({0: 50}).embeddings)).all())


def test_one_dimension_has_no_off_diagonal_elements() -> None:
    learner = build({"name": "fecam"}, 1, Priors())
    learner.learn(Task(torch.tensor([[-2.0], [-1.0], [1.0], [4.0]]), torch.tensor([0, 0, 1, 1])))
    torch.testing.assert_close(learner.scores(torch.tensor([[3.0]])), torch.tensor([[-4.0, 0.0]]))


def test_cached_inverses_follow_the_statistics() -> None:
    """Compute scores between the tasks: a stale cache would be used after the next one."""
    first, second = draw({0: 30, 1: 20, 2: 9}), draw({1: 25, 3: 12}, seed=2)
    test = draw({0: 20, 1: 20}, seed=1).embeddings
    learner, fresh = fitted(first), fitted(first)
    for _ in range(2):
        learner.scores(test)
        fresh = restore(*pack(learner))
        assert learner.scores(test).numpy().tobytes() == fresh.scores(test).numpy().tobytes()
        learner.learn(second)
    learner.scores(test)
    learner.remove(1)
    learner.merge(fitted(draw({1: 14, 2: 8}, seed=3)))
    fresh = restore(*pack(learner))
    assert learner.scores(test).numpy().tobytes() == fresh.scores(test).numpy().tobytes()


def test_off_diagonal_shrinkage_above_the_diagonal_one_is_refused() -> None:
    with pytest.raises(InputError, match=r"shrink_off_diagonal must be at most .* = 1, .* but is 2$"):
        build({"name": "fecam", "shrink_off_diagonal": 2.0}, DIM, Priors())
