"""The guard on Gaussian embeddings, whose true accuracies are known."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from device_runtime.learning.guard import Judgement, Limits, judge
from device_runtime.learning.retention import estimate, predict_pseudo
from device_runtime.results import Suspects
from ssd_edge import learners
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import GateRefusedError, InputError
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.priors import Priors

DIM, OLD, EACH = 24, 5, 80
KNOWN = ("cup", "nut", "screw", "plug", "fuse")
NETWORK = {"epochs": 20, "neurons": 100}
SMALL = {"directions": 60}
LEARNERS = ({"name": "ncm"}, {"name": "slda"}, {"name": "landmark", **SMALL}, {"name": "finetune", **NETWORK})


class World:
    """Unit Gaussians whose means have standard deviation `scale`; the last class is not learned at first."""

    def __init__(self, seed: int = 0, scale: float = 0.7) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.means = torch.randn(OLD + 1, DIM, generator=self.generator) * scale
        self.labels = torch.arange(OLD * EACH) % OLD
        self.vectors = self.draw(self.labels)
        self.statistics = ClassStatistics(DIM)
        self.statistics.add(self.vectors, self.labels)
        self.registry = ClassRegistry()
        for name in (*KNOWN, "gear"):
            self.registry = self.registry.add(name)

    def draw(self, labels: torch.Tensor) -> torch.Tensor:
        return self.means[labels] + torch.randn(len(labels), DIM, generator=self.generator)

    def of(self, row: int, count: int = 20) -> torch.Tensor:
        return self.draw(torch.full((count,), row))

    def learner(self, **options: Any) -> learners.Learner:
        learner = learners.build({"name": "slda", **options}, DIM, Priors())
        learner.learn(learners.Task(self.vectors, self.labels))
        return learner

    def teach(self, images: torch.Tensor, row: int = OLD, limits: Limits | None = None, **options: Any) -> Judgement:
        before = self.learner(**options)
        rows = torch.full((len(images),), row)
        after = learners.restore(*learners.pack(before))
        after.learn(learners.Task(images, rows))
        return judge(before, after, self.statistics, images, rows, self.registry, limits)


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.parametrize("options", LEARNERS, ids=lambda options: options["name"])
@pytest.mark.parametrize("shots", [10, 60])
def test_estimated_drop_is_close_to_the_true_drop(options: dict[str, Any], shots: int) -> None:
    world = World(seed=1, scale=0.45)
    before = world.learner(**options)
    after = learners.restore(*learners.pack(before))
    after.learn(learners.Task(world.of(OLD, shots), torch.full((shots,), OLD)))
    truth = torch.arange(2000) % OLD
    held_out = world.draw(truth)
    old, new = (float((learner.predict(held_out) == truth).double().mean()) for learner in (before, after))
    found = estimate(before, after, world.statistics)
    assert found.drop == pytest.approx(old - new, abs=0.06 + 0.2 * (old - new))
    assert 0.0 <= found.drop_error < 0.03
    # a spread of 1 is exact for Gaussians
    plain = predict_pseudo(before, after, world.statistics, spread=1.0).summary()
    assert plain.accuracy_before == pytest.approx(old, abs=0.06)


def test_catastrophic_forgetting_is_refused_with_the_reason(world: World) -> None:
    found = world.teach(world.of(OLD, 60), name="finetune", epochs=100, neurons=100, lr=0.5)
    assert found.retention.drop > 0.3
    with pytest.raises(GateRefusedError) as caught:
        found.check()
    message = str(caught.value)
    assert f"{found.retention.drop:.3f} less where max_forgetting allows 0.1" in message
    assert f"'{found.retention.worst.label}' loses most" in message
    assert caught.value.exit_code == 4


def test_max_forgetting_decides() -> None:
    world = World(seed=1, scale=0.3)
    images = world.of(OLD, 20)
    lenient, strict = (world.teach(images, limits=Limits(limit), name="ncm") for limit in (1.0, 0.0))
    assert not lenient.refusals
    assert lenient.retention == strict.retention
    assert strict.retention.drop > 0.0
    assert "max_forgetting allows 0;" in strict.refusals[0]


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_max_forgetting_outside_0_to_1_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="max_forgetting must be a share from 0 to 1"):
        Limits(max_forgetting=value)


@pytest.mark.parametrize("options", LEARNERS[:3], ids=lambda options: options["name"])
def test_clean_new_class_passes_without_warnings(world: World, options: dict[str, Any]) -> None:
    found = world.teach(world.of(OLD), **options)
    found.check()
    assert (found.warnings, found.refusals, found.suspects) == ([], [], [])
    assert found.retention.drop < 0.1
    assert found.agreement is not None
    assert found.agreement > 0.8
    assert json.loads(json.dumps(found.to_dict()))["retention"]["worst"]["label"] in KNOWN


def test_false_alarms_are_rare() -> None:
    alarms = [World(seed).teach(World(seed).of(OLD)) for seed in range(100, 150)]
    assert sum(bool(found.warnings or found.refusals) for found in alarms) <= 2  # of 50


def test_known_class_under_a_new_name_is_warned_about(world: World) -> None:
    found = world.teach(world.of(0))
    assert found.warnings[0].startswith("'gear' looks like 'cup': ")
    assert "of 20 images are recognised as it; more images of a known class are taught" in found.warnings[0]
    assert not any("looks like" in warning for warning in world.teach(world.of(0), row=0).warnings)


def test_images_of_another_known_class_are_warned_about(world: World) -> None:
    found = world.teach(world.of(1), row=0)
    assert found.warnings[0].startswith("'cup' looks like 'nut'")
    assert "check the label: they are taught as 'cup'" in found.warnings[0]


@pytest.mark.parametrize("row", [OLD, 0], ids=("new", "known"))
def test_mixed_folder_is_warned_about(row: int) -> None:
    exact = 0
    for seed in range(10):
        world = World(seed, scale=1.2)
        found = world.teach(torch.cat([world.of(row, 8), world.of(2, 5), world.of(row, 7)]), row=row)
        exact += any(suspect.indices == [8, 9, 10, 11, 12] for suspect in found.suspects)
        assert all(suspect.like in ("screw", None) for suspect in found.suspects)
    assert exact >= 6
    assert "5 of 20 images" in found.warnings[0]
    assert "'image 8'" in found.warnings[0]


def test_outlier_image_is_named(world: World) -> None:
    images = world.of(OLD, 12)
    images[4] += 6 * torch.randn(DIM, generator=world.generator)
    before = world.learner()
    rows = torch.full((12,), OLD)
    after = learners.restore(*learners.pack(before))
    after.learn(learners.Task(images, rows))
    names = [f"{number}.jpg" for number in range(12)]
    found = judge(before, after, world.statistics, images, rows, world.registry, names=names)
    assert found.suspects == [Suspects("far", "gear", None, [4])]
    assert "1 of 12 images taught as 'gear' are unlike the others ('4.jpg')" in found.warnings[0]


def test_several_classes_are_judged_separately(world: World) -> None:
    images = torch.cat([world.of(OLD), world.of(3)])
    rows = torch.tensor([OLD] * 20 + [OLD + 1] * 20)
    before = world.learner()
    after = learners.restore(*learners.pack(before))
    after.learn(learners.Task(images, rows))
    found = judge(before, after, world.statistics, images, rows, world.registry.add("socket"))
    doubles = [warning for warning in found.warnings if "looks like" in warning]
    assert len(doubles) == 1
    assert doubles[0].startswith("'socket' looks like 'plug'")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_refused(world: World, value: float) -> None:
    images, before = world.of(OLD), world.learner()
    rows = torch.full((20,), OLD)
    after = learners.restore(*learners.pack(before))
    after.learn(learners.Task(images, rows))
    after.values[3, 1] = value
    found = judge(before, after, world.statistics, images, rows, world.registry)
    with pytest.raises(GateRefusedError, match=r"nothing was changed: .* holds NaN or infinity in values"):
        found.check()
    assert found.retention is None


def test_overflowing_scores_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    images, before = world.of(OLD), world.learner()
    rows = torch.full((20,), OLD)
    after = learners.restore(*learners.pack(before))
    after.learn(learners.Task(images, rows))
    original_scores = after.scores
    monkeypatch.setattr(
        after, "scores", lambda vectors: original_scores(vectors).masked_fill(vectors[:, :1] > 50, math.nan)
    )
    images[:2, 0] = 60.0
    found = judge(before, after, world.statistics, images, rows, world.registry)
    assert "gives NaN or infinity for 2 of the 20 new images" in found.refusals[0]
    monkeypatch.setattr(after, "scores", lambda vectors: original_scores(vectors) / (len(vectors) == 20))
    found = judge(before, after, world.statistics, images, rows, world.registry)
    assert "gives NaN or infinity for old classes" in found.refusals[0]


def test_class_never_predicted_again_is_refused_unless_max_forgetting_is_1(world: World) -> None:
    images, before = world.of(OLD), world.learner()
    rows = torch.full((20,), OLD)
    after = learners.restore(*learners.pack(before))
    after.learn(learners.Task(images, rows))
    after.bias[2] = -1e6
    found = judge(before, after, world.statistics, images, rows, world.registry, Limits(max_forgetting=0.99))
    (message,) = found.refusals
    assert message.startswith("'screw' would never be predicted again")
    assert found.retention.worst.label == "screw"
    assert judge(before, after, world.statistics, images, rows, world.registry, Limits(1.0)).refusals == []


def test_class_with_a_large_loss_is_named(world: World) -> None:
    images, before = world.of(OLD), world.learner()
    rows = torch.full((20,), OLD)
    after = learners.restore(*learners.pack(before))
    after.learn(learners.Task(images, rows))
    after.bias[2] -= 14.0
    found = judge(before, after, world.statistics, images, rows, world.registry, Limits(max_forgetting=0.5))
    assert not found.refusals
    (warning,) = found.warnings
    assert warning.startswith("'screw' may be recognised less often now")


def test_outputs_of_future_classes_are_ignored() -> None:
    world = World()
    before = learners.build({"name": "finetune", **NETWORK}, DIM, Priors())
    before.expect(OLD + 4)
    before.learn(learners.Task(world.vectors, world.labels))
    found = judge(before, before, world.statistics, world.of(0), torch.zeros(20, dtype=torch.int64), world.registry)
    assert (found.refusals, found.agreement, found.retention.drop) == ([], 1.0, 0.0)


def test_learner_without_old_classes_is_only_checked_for_finite_values() -> None:
    world = World()
    before = learners.build({"name": "ncm"}, DIM, Priors())
    after = learners.build({"name": "ncm"}, DIM, Priors())
    images, rows = world.of(0), torch.zeros(20, dtype=torch.int64)
    after.learn(learners.Task(images, rows))
    found = judge(before, after, ClassStatistics(DIM), images, rows, world.registry)
    assert found == Judgement(None, None, [], [], [])
