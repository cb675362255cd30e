"""The closed-form learners against NumPy, and their accuracy with few images beside many."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import helmert
from sklearn.covariance import OAS
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from torch import Tensor

from ssd_edge.errors import InputError
from ssd_edge.learners import Learner, Task, build
from ssd_edge.learners.closed_form import ranpac as ranpac_module
from ssd_edge.learners.closed_form.sums import shrink
from ssd_edge.learners.priors import Priors

pytestmark = pytest.mark.usefixtures("one_thread")

DIM = 16
CLOSED_FORM: list[dict[str, Any]] = [
    {"name": "ncm"},
    {"name": "slda"},
    {"name": "ridge"},
    {"name": "ranpac", "features": 60},
    {"name": "fecam"},
]


def names(options: dict[str, Any]) -> str:
    return options["name"]


def gaussians(counts: dict[int, int], spread: float = 1.0, seed: int = 0) -> Task:
    """Return `counts[row]` samples around the mean of each row."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(10, DIM, generator=torch.Generator().manual_seed(99))
    labels = torch.tensor([row for row, count in counts.items() for _ in range(count)])
    return Task(means[labels] + spread * torch.randn(len(labels), DIM, generator=generator), labels)


def covariance_prior(scale: float = 1.0) -> Priors:
    mixing = np.random.default_rng(0).normal(size=(DIM, DIM))
    return Priors(count=5000, within_covariance=(scale * mixing @ mixing.T / DIM).astype(np.float32))


@pytest.mark.parametrize("options", CLOSED_FORM, ids=names)
def test_the_order_of_tasks_and_samples_does_not_matter(options: dict[str, Any]) -> None:
    combined = gaussians({0: 90, 1: 70, 2: 110, 3: 60})
    test = gaussians(dict.fromkeys(range(4), 30), seed=5).embeddings
    learners = []
    for seed in range(3):
        learner = build(options, DIM, covariance_prior())
        order = torch.randperm(330, generator=torch.Generator().manual_seed(seed))
        for index in order.split([100, 130, 100][seed]):  # including a class that is spread over tasks
            learner.learn(Task(combined.embeddings[index], combined.labels[index]))
        learners.append(learner)
    for learner in learners[1:]:
        scores = learners[0].scores(test)
        rounding = 1e-5 if options["name"] == "slda" else 1e-6  # its statistics are in float32
        torch.testing.assert_close(learner.scores(test), scores, rtol=0, atol=rounding * float(scores.abs().max()))
        if hasattr(learner, "values"):
            scale = float(learners[0].values.abs().max())
            torch.testing.assert_close(learner.values, learners[0].values, rtol=1e-6, atol=10 * rounding * scale)


def test_ncm_scores_are_cosines_to_the_class_means() -> None:
    task, test = gaussians({0: 20, 1: 7, 3: 30}), gaussians({0: 10, 1: 10, 3: 10}, seed=1).embeddings
    learner = build({"name": "ncm"}, DIM, Priors())
    learner.learn(task)
    x, y, z = task.embeddings.double().numpy(), task.labels.numpy(), test.double().numpy()
    means = np.stack([x[y == row].mean(0) for row in (0, 1, 3)])
    cosine = (z @ means.T) / np.linalg.norm(z, axis=1)[:, None] / np.linalg.norm(means, axis=1)
    np.testing.assert_allclose(learner.scores(test)[:, [0, 1, 3]], cosine, atol=1e-6)
    assert learner.predict(test).tolist() == np.array([0, 1, 3])[cosine.argmax(1)].tolist()


@pytest.mark.parametrize("weight", [0.0, 50.0, 1000.0])
def test_slda_is_a_discriminant_with_a_prior_covariance(weight: float) -> None:
    task, test = gaussians({0: 40, 1: 40, 2: 40}), gaussians({0: 9, 1: 9, 2: 9}, seed=1).embeddings
    given = covariance_prior()
    learner = build({"name": "slda", "prior_weight": weight}, DIM, given)
    learner.learn(task)
    x, y = task.embeddings.double().numpy(), task.labels.numpy()
    means = np.stack([x[y == row].mean(0) for row in range(3)])
    residuals = x - means[y]
    freedom = len(x) - 3 + weight
    covariance = (residuals.T @ residuals + weight * given.within_covariance.astype(float)) / freedom
    inverse = np.linalg.inv(shrink(torch.from_numpy(covariance), freedom).numpy())
    wanted = test.double().numpy() @ inverse @ means.T - 0.5 * np.einsum("cd,de,ce->c", means, inverse, means)
    found = learner.scores(test).double().numpy()
    found, wanted = (scores - scores.mean(1, keepdims=True) for scores in (found, wanted))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_slda_matches_the_scikit_learn_discriminant_with_oas_covariance() -> None:
    """OAS is applied to the N − C independent within-class contrasts, whose mean square is the pooled covariance.

    Classes of equal size, whose scores are corrected by the same number.
    """
    task, test = gaussians({0: 17, 1: 17, 2: 17}), gaussians({0: 9, 1: 9, 2: 9}, seed=1).embeddings
    learner = build({"name": "slda"}, DIM, Priors())
    learner.learn(task)
    x, y = task.embeddings.double().numpy(), task.labels.numpy()
    contrasts = np.concatenate([helmert((y == row).sum()) @ x[y == row] for row in range(3)])
    assert contrasts.shape == (51 - 3, DIM)

    class Pooled:
        covariance_ = OAS(assume_centered=True).fit(contrasts).covariance_

        def fit(self, _: Any) -> None: ...

    reference = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=Pooled(), priors=[1 / 3] * 3).fit(x, y)
    wanted = reference.decision_function(test.double().numpy()) - np.log(1 / 3)
    found = learner.scores(test).double().numpy()
    found, wanted = (scores - scores.mean(1, keepdims=True) for scores in (found, wanted))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_slda_without_a_prior_ignores_its_weight() -> None:
    task, test = gaussians({0: 40, 1: 25}), gaussians({0: 9, 1: 9}, seed=1).embeddings
    scores = []
    for weight in (0.0, 1000.0):
        learner = build({"name": "slda", "prior_weight": weight}, DIM, Priors())
        learner.learn(task)
        scores.append(learner.scores(test))
    assert torch.equal(*scores)


def test_slda_prior_improves_accuracy_with_few_images() -> None:
    """Five images per class do not determine an anisotropic covariance, but the pretraining data does."""
    generator = torch.Generator().manual_seed(0)
    widths = torch.logspace(-1, 1, DIM)
    means = 0.4 * torch.randn(4, DIM, generator=generator) * widths.sqrt()

    def draw(count: int) -> Task:
        labels = torch.arange(4).repeat(count)
        return Task(means[labels] + torch.randn(4 * count, DIM, generator=generator) * widths, labels)

    few, test = draw(5), draw(300)
    known, accuracy = Priors(count=9999, within_covariance=torch.diag(widths.square()).numpy()), {}
    for weight in (0.0, 1000.0, -1.0):
        learner = build({"name": "slda", "prior_weight": weight}, DIM, known)
        learner.learn(few)
        accuracy[weight] = float((learner.predict(test.embeddings) == test.labels).double().mean())
    assert accuracy[1000.0] > accuracy[0.0] + 0.1
    assert accuracy[-1.0] > accuracy[0.0] + 0.05  # with 16 degrees of freedom the most likely weight stays low


@pytest.mark.parametrize("strength", [0.3, 40.0])
def test_ridge_learners_at_a_given_strength(strength: float) -> None:
    task, test = gaussians({0: 40, 1: 25, 2: 60}), gaussians({0: 9, 1: 9, 2: 9}, seed=1).embeddings
    for options in ({"name": "ridge"}, {"name": "ranpac", "features": 60}):
        learner = build({**options, "strength": strength}, DIM, Priors())
        assert learner.learn(task) == {"strength": strength}
        x, z = (learner.features(each).double().numpy() for each in (task.embeddings, test))
        wanted = Ridge(alpha=strength).fit(x, np.eye(3)[task.labels.numpy()]).predict(z)
        np.testing.assert_allclose(learner.scores(test), wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("megabytes", [0.0013, 0.05, 0.4])
def test_the_number_of_random_features_fits_the_memory_budget(megabytes: float, per_class: bool) -> None:
    settings = {"budget_mb": megabytes, "budget_classes": 6, "per_class": per_class}
    learner = build({"name": "ranpac", "features": 7, **settings}, DIM, Priors())
    more = {"features": learner.feature_count() + 1, "per_class": per_class}
    one_more = build({"name": "ranpac", **more}, DIM, Priors())
    for each in (learner, one_more):
        each.learn(gaussians(dict.fromkeys(range(6), 4)))
    assert learner.features(torch.zeros(1, DIM)).shape == (1, learner.feature_count())
    assert learner.memory_bytes() <= megabytes * 1e6 < one_more.memory_bytes()


def test_a_large_memory_budget_is_capped_at_the_maximum_number_of_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranpac_module, "MOST_FEATURES", 30)
    assert build({"name": "ranpac", "budget_mb": 1e7}, DIM, Priors()).feature_count() == 30


def test_a_memory_budget_that_is_too_small_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"learner.budget_mb=0.001 is too small .* 100 classes, which need 0.003732 MB"
    ):
        build({"name": "ranpac", "budget_mb": 0.001}, DIM, Priors())


def test_random_features_are_reproduced_from_the_seed() -> None:
    one, same, other = (build({"name": "ranpac", "features": 50}, DIM, Priors(), seed) for seed in (4, 4, 5))
    assert torch.equal(one.projection, same.projection)
    assert not torch.equal(one.projection, other.projection)
    assert "projection" not in one.state_dict()
    features = one.features(gaussians({0: 500}).embeddings)
    assert float(features.min()) == 0.0
    assert 0.3 < float((features == 0).double().mean()) < 0.7


def test_random_features_separate_classes_that_are_not_linearly_separable() -> None:
    """One class surrounds the other: ridge fails on the embedding and succeeds on random features."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1000) % 2
    radius = torch.where(labels == 0, 1.0, 3.0)[:, None]
    task = Task(torch.nn.functional.normalize(torch.randn(1000, 4, generator=generator)) * radius, labels)
    accuracy = {}
    for options in ({"name": "ridge"}, {"name": "ranpac", "features": 100}):
        learner = build(options, 4, Priors())
        learner.learn(task)
        accuracy[options["name"]] = float((learner.predict(task.embeddings) == labels).double().mean())
    assert accuracy["ridge"] < 0.65
    assert accuracy["ranpac"] > 0.95


def few_beside_many(few: int, spread: float) -> tuple[Learner, Tensor, Tensor]:
    """Learn four classes of 2000 images, then one of `few`; return the learner and unseen images of all five."""
    learner = build({"name": "slda"}, DIM, Priors())
    learner.learn(gaussians(dict.fromkeys(range(4), 2000), spread, seed=1))
    learner.learn(gaussians({4: few}, spread, seed=2))
    test = gaussians(dict.fromkeys(range(5), 200), spread, seed=3)
    return learner, test.embeddings, test.labels


def recall(learner: Learner, embeddings: Tensor, labels: Tensor, row: int) -> float:
    return float((learner.predict(embeddings)[labels == row] == row).double().mean())


def test_a_class_of_twenty_images_is_predicted_beside_classes_of_thousands() -> None:
    learner, embeddings, labels = few_beside_many(20, spread=1.0)
    assert recall(learner, embeddings, labels, 4) > 0.5
    assert min(recall(learner, embeddings, labels, row) for row in range(4)) > 0.7


@pytest.mark.parametrize("count", [1, 3])
def test_slda_with_very_few_images(count: int) -> None:
    learner = build({"name": "slda"}, DIM, Priors())
    learner.learn(gaussians({0: count, 1: count}, spread=0.1))
    test = gaussians({0: 50, 1: 50}, spread=0.1, seed=1)
    assert bool(torch.isfinite(learner.scores(test.embeddings)).all())
    assert torch.equal(learner.predict(test.embeddings), test.labels)


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3])
def test_slda_with_nearly_identical_images(spread: float) -> None:
    """Rounding to float32 makes the scatter indefinite."""
    learner = build({"name": "slda"}, DIM, Priors())
    for rows in ((0, 1), (2, 3)):
        learner.learn(gaussians(dict.fromkeys(rows, 30), spread))
    test = gaussians(dict.fromkeys(range(4), 20), spread, seed=1)
    assert bool(torch.isfinite(learner.scores(test.embeddings)).all())
    assert torch.equal(learner.predict(test.embeddings), test.labels)


def test_klda_approximates_a_gaussian_kernel_and_separates_what_no_line_can() -> None:
    learner = build({"name": "klda", "features": 4001, "bandwidth": 1.0}, DIM, Priors())
    assert learner.feature_count() == 4000  # pairs of cosine and sine
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(40, DIM, generator=generator)
    kernel = (-torch.cdist(vectors, vectors).square() / (2 * DIM)).exp()
    waves = learner.features(vectors)
    assert torch.allclose(waves @ waves.T, kernel, atol=0.1)
    vectors = 3 * torch.randn(3000, DIM, generator=generator) * torch.tensor([1.0, 1.0] + [0.01] * (DIM - 2))
    labels = (vectors[:, 0] * vectors[:, 1] > 0).long()  # exclusive or
    accuracy = {}
    for options in ({"name": "slda"}, {"name": "klda", "features": 400, "bandwidth": 2.0}):
        learner = build(options, DIM, Priors())
        learner.learn(Task(vectors[:2000], labels[:2000]))
        accuracy[options["name"]] = float((learner.predict(vectors[2000:]) == labels[2000:]).double().mean())
    assert accuracy["slda"] < 0.6
    assert accuracy["klda"] > 0.9


def test_slda_projects_an_embedding_that_exceeds_its_budget() -> None:
    options = {"name": "slda", "budget_mb": 0.001, "budget_classes": 10}
    learner = build(options, DIM, covariance_prior())
    size = learner.feature_count()
    assert 2 < size < DIM
    learner.learn(gaussians(dict.fromkeys(range(10), 40)))
    assert learner.memory_bytes() <= 1000
    assert build({**options, "budget_mb": 9}, DIM, Priors()).feature_count() == DIM
    torch.testing.assert_close(learner.projection.T @ learner.projection, torch.eye(size))
    test = gaussians(dict.fromkeys(range(10), 40), seed=1)
    assert float((learner.predict(test.embeddings) == test.labels).double().mean()) > 0.5
    with pytest.raises(InputError, match=r"learner.budget_mb=0.0001 is too small for two features and 10 classes"):
        build({**options, "budget_mb": 0.0001}, DIM, Priors())


def test_slda_with_and_without_a_prior_cannot_be_merged() -> None:
    one, bare = build({"name": "slda"}, DIM, covariance_prior()), build({"name": "slda"}, DIM, Priors())
    for first, second in ((one, bare), (bare, one)):
        with pytest.raises(InputError, match=r"the presence of a prior covariance \((True|False) and (True|False)\)"):
            first.merge(second)


def test_slda_tells_classes_of_few_and_many_images_apart_by_two_views_of_them() -> None:
    generator, dim = torch.Generator().manual_seed(0), 200
    spread = 1 / (1 + torch.arange(dim) / 4)  # so uneven that hardly anything is shrunk
    means = 1.5 * torch.randn(4, dim, generator=generator) * spread

    def noise(count: int) -> torch.Tensor:
        return torch.randn(count, dim, generator=generator) * spread

    labels, tested = torch.repeat_interleave(torch.arange(4), torch.tensor([5, 10, 30, 60])), torch.arange(400) % 4
    first = means[labels] + noise(len(labels))
    task = Task(first, labels, first + 0.7 * noise(len(labels)))
    learner = build({"name": "slda", "second_view": True}, dim, Priors())
    learner.learn(task)
    assert float((learner.predict(means[tested] + noise(400)) == tested).double().mean()) > 0.9
    scores = learner.held_out_scores(task, torch.arange(len(labels)) % 10)
    assert scores is not None
    assert float((scores.argmax(1) == labels).double().mean()) > 0.9
