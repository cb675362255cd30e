"""The guard on Gaussian embeddings, whose true accuracies are known."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from device_runtime.install.installed import InstalledBundle
from device_runtime.learning.guard import Judgement, Limits, Trial, judge
from device_runtime.learning.state import DeviceState
from device_runtime.learning.teach import try_held_out
from device_runtime.results import Suspects
from ssd_edge import learners
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import GateRefusedError, InputError
from ssd_edge.learners.calibration import TEMPERATURES
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.priors import Priors
from ssd_edge.learners.retention import TrackRecord, cost
from ssd_edge.learners.unknown import Rejector

DIM, OLD, EACH = 24, 5, 80
KNOWN = ("cup", "nut", "screw", "plug", "fuse")
NEW = ("gear", "socket")
NETWORK = {"epochs": 20, "neurons": 100}
LEARNERS = ({"name": "ncm"}, {"name": "slda"}, {"name": "finetune", **NETWORK})


class World:
    """Unit Gaussians whose means have standard deviation `scale`; the last class is not learned at first."""

    def __init__(self, seed: int = 0, scale: float = 0.7, dim: int = DIM, each: int = EACH) -> None:
        self.generator, self.dim = torch.Generator().manual_seed(seed), dim
        self.means = torch.randn(OLD + 1, dim, generator=self.generator) * scale
        self.labels = torch.arange(OLD * each) % OLD
        self.vectors = self.draw(self.labels)
        self.statistics = ClassStatistics(dim)
        self.statistics.add(self.vectors, self.labels)
        self.registry = ClassRegistry()
        for name in KNOWN:
            self.registry = self.registry.add(name)

    def draw(self, labels: torch.Tensor) -> torch.Tensor:
        return self.means[labels] + torch.randn(len(labels), self.dim, generator=self.generator)

    def of(self, row: int, count: int = 20) -> torch.Tensor:
        return self.draw(torch.full((count,), row))

    def state(self, **options: Any) -> DeviceState:
        """Return a device with the old classes, whose record comes from test images."""
        learner = learners.build({"name": "slda", **options}, self.dim, Priors())
        learner.learn(learners.Task(self.vectors, self.labels))
        tests = torch.arange(300) % OLD
        images = self.means[tests] + torch.randn(len(tests), self.dim, generator=torch.Generator().manual_seed(99))
        rejector = Rejector.calibrate(self.statistics, self.vectors, self.labels, images, tests)
        record = TrackRecord.tested_on(learner, self.statistics, rejector, images, tests)
        bundle = InstalledBundle("robot", 1, "cpu", 32, self.dim, "fp32", "0" * 64, None, "0" * 16, (), {})
        counted = self.statistics if learner.class_statistics() is None else None
        return DeviceState(self.registry, learner, counted, rejector, record, bundle, b"", b"")

    def taught(
        self, before: DeviceState, images: torch.Tensor, rows: torch.Tensor, learn: bool = True
    ) -> tuple[DeviceState, Trial]:
        """Return the state after teaching images, and the answers while they were held out."""
        task = learners.Task(images, rows)
        learner, tried = (learners.restore(*learners.pack(before.learner)) for _ in range(2))
        tried.learn(task)
        if learn:
            learner.learn(task)
        statistics, rejector, record, registry = (
            before.statistics.copy(),
            before.rejector,
            before.record,
            before.registry,
        )
        statistics.add(images, rows)
        trial = try_held_out(before.learner, tried, task, 0)
        for row in torch.unique(rows).tolist():
            own = rows == row
            if row >= len(registry):
                registry = registry.add(NEW[row - OLD], "device")
            rejector = rejector.with_class(row, statistics, images[own])
            answers = trial.answers[own]
            known = images[own][before.learner.predict(images[own]) == row]
            promised = trial.promised[own].sum(0)
            record = record.measured(
                learner, statistics, row, len(answers), *[int((answers == row).sum())] * 2, known, promised
            )
        parts = {"counted": statistics, "rejector": rejector, "record": record, "registry": registry}
        return before.replace(learner=learner, **parts), trial

    def teach(self, images: torch.Tensor, row: int = OLD, limits: Limits | None = None, **options: Any) -> Judgement:
        before, rows = self.state(**options), torch.full((len(images),), row)
        after, trial = self.taught(before, images, rows)
        return judge(before, after, images, rows, trial, limits)

    def accuracies(self, state: DeviceState, count: int = 2000) -> tuple[float, list[float]]:
        """Return the true accuracy on the old classes, ``unknown`` included: the mean and by class."""
        truth = torch.arange(count) % OLD
        images = self.draw(truth)
        answers = state.learner.predict(images)
        right = (answers == truth) & state.rejector.accepts(images, answers)[0]
        return float(right.double().mean()), [float(right[truth == row].double().mean()) for row in range(OLD)]


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.parametrize("options", LEARNERS, ids=lambda options: options["name"])
@pytest.mark.parametrize("shots", [10, 60])
def test_estimates_are_close_to_the_truth(options: dict[str, Any], shots: int) -> None:
    world = World(seed=1, scale=0.45)
    before, images, rows = world.state(**options), world.of(OLD, shots), torch.full((shots,), OLD)
    after, trial = world.taught(before, images, rows)
    found = judge(before, after, images, rows, trial).retention
    old, new = (world.accuracies(state)[0] for state in (before, after))
    if options["name"] == "finetune":  # it forgets more than an accuracy is printed for
        assert found.accuracy_before is None
        assert found.kind.startswith("cannot be estimated: too much has changed")
    else:
        assert found.accuracy_before == pytest.approx(old, abs=0.08)
    assert found.drop == pytest.approx(old - new, abs=0.05 + 0.2 * (old - new))


def test_few_images_in_many_dimensions_do_not_make_the_estimate_optimistic() -> None:
    """With a covariance from 40 images in 200 dimensions, stand-ins of that covariance are all recognised."""
    generator = torch.Generator().manual_seed(0)
    means, rows = 0.2 * torch.randn(4, 200, generator=generator), torch.arange(40) % 4
    draw = lambda labels: means[labels] + torch.randn(len(labels), 200, generator=generator)  # noqa: E731
    vectors, tests, truth = draw(rows), torch.arange(80) % 4, torch.arange(4000) % 4
    learner = learners.build({"name": "slda"}, 200, Priors())
    learner.learn(learners.Task(vectors, rows))
    statistics = ClassStatistics(200)
    statistics.add(vectors, rows)
    right = torch.bincount(tests[learner.predict(draw(tests)) == tests], minlength=4)
    record = TrackRecord.of(learner, statistics, torch.full((4,), 20), right, right)
    true = float((learner.predict(draw(truth)) == truth).double().mean())
    assert true < 0.9
    assert float(cost(learner, learner, statistics, record).before.mean()) == pytest.approx(true, abs=0.08)
    trusting = dataclasses.replace(record, spread=torch.ones(4).double())
    assert float(cost(learner, learner, statistics, trusting).before.mean()) > true + 0.1


def test_accuracy_without_held_out_images_cannot_be_estimated(world: World) -> None:
    state = world.state()
    untested = TrackRecord.of(state.learner, state.statistics, *[torch.zeros(OLD)] * 3)
    before, rows = state.replace(record=untested), torch.full((20,), OLD)
    images = world.of(OLD)
    after, trial = world.taught(before, images, rows)
    found = judge(before, after, images, rows, trial).retention
    assert (found.accuracy_before, found.accuracy_after) == (None, None)
    assert (
        found.kind
        == "cannot be estimated: the bundle has 0 test images of the old classes on record, and 30 are needed"
    )


def test_junk_taught_as_a_known_class_is_refused(world: World) -> None:
    """Images of nothing would be learned well, and all images of the class become unknown."""
    black = 8 * torch.ones(100, DIM) + 0.1 * torch.randn(100, DIM, generator=world.generator)
    before, rows = world.state(name="ncm"), torch.zeros(100, dtype=torch.int64)
    after, trial = world.taught(before, black, rows)
    assert world.accuracies(after)[1][0] < 0.3
    with pytest.raises(GateRefusedError, match=r"'cup' would lose \d+% of the images recognised when taught"):
        judge(before, after, black, rows, trial).check()


def test_a_series_of_small_losses_is_refused() -> None:
    """Each learn of mislabelled images is small; the losses since the class was taught count together."""
    world = World(seed=3, scale=0.6)
    state, passed = world.state(), 0
    start = world.accuracies(state)[1]
    for _ in range(25):
        images, rows = world.of(1, 20), torch.zeros(20, dtype=torch.int64)
        after, trial = world.taught(state, images, rows)
        # the images would be recognised, so that only forgetting is left to refuse them
        found = judge(state, after, images, rows, trial, Limits(min_recognised=0.0))
        if found.refusals:
            break
        state, passed = after.replace(record=found.record), passed + 1
    else:
        pytest.fail("25 learns of mislabelled images passed")
    lost = [was - now for was, now in zip(start, world.accuracies(state)[1], strict=True)]
    assert max(lost) < 0.65
    assert sum(lost) / OLD < 0.13
    assert "by earlier changes" in found.refusals[0] or "recognised when taught" in found.refusals[0]


def test_mislabelled_images_that_stay_unrecognised_are_refused(world: World) -> None:
    found = world.teach(world.of(1, 10), row=0)
    with pytest.raises(GateRefusedError, match=r"0 of 10 held-out images of 'cup' would be recognised, and 10 taken"):
        found.check()
    forced = world.teach(world.of(1, 10), row=0, limits=Limits(force=True))
    assert forced.refusals == []
    assert any("held-out images of 'cup' would be recognised" in warning for warning in forced.warnings)


def test_unrecognised_images_of_a_new_class_are_refused(world: World) -> None:
    noise = world.draw(torch.arange(20) % OLD)
    with pytest.raises(GateRefusedError, match="held-out images of 'gear' would be recognised"):
        world.teach(noise, limits=Limits(min_recognised=0.8)).check()


def test_catastrophic_forgetting_is_refused_with_the_reason(world: World) -> None:
    found = world.teach(world.of(OLD, 60), name="finetune", epochs=100, neurons=100, lr=0.5)
    assert found.retention.drop > 0.3
    with pytest.raises(GateRefusedError) as caught:
        found.check()
    message = str(caught.value)
    assert f"would lose {found.retention.drop:.3f} of their accuracy" in message
    assert "max_forgetting allows 0.1 in all" in message
    assert f"'{found.retention.worst.label}' loses most" in message
    assert caught.value.exit_code == 4


def test_max_forgetting_decides() -> None:
    world = World(seed=1, scale=0.3)
    images = world.of(OLD, 20)
    lenient, strict = (world.teach(images, limits=Limits(limit), name="ncm") for limit in (1.0, 0.0))
    assert not lenient.refusals
    assert lenient.retention == strict.retention
    assert strict.retention.drop > 0.0
    assert "max_forgetting allows 0 in all;" in strict.refusals[0]


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_max_forgetting_outside_0_to_1_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="max_forgetting must be a share from 0 to 1"):
        Limits(max_forgetting=value)


@pytest.mark.parametrize("options", LEARNERS[:2], ids=lambda options: options["name"])
def test_clean_new_class_passes_without_warnings(world: World, options: dict[str, Any]) -> None:
    found = world.teach(world.of(OLD), **options)
    found.check()
    assert (found.warnings, found.refusals, found.suspects) == ([], [], [])
    assert found.retention.drop < 0.1
    assert found.agreement is not None
    assert found.agreement > 0.8
    assert json.loads(json.dumps(found.retention.to_dict()))["worst"]["label"] in KNOWN


def test_false_alarms_are_rare() -> None:
    alarms = [World(seed).teach(World(seed).of(OLD)) for seed in range(100, 150)]
    assert sum(bool(found.warnings or found.refusals) for found in alarms) <= 2  # of 50


def test_known_class_under_a_new_name_is_warned_about(world: World) -> None:
    found = world.teach(world.of(0))
    assert found.warnings[0].startswith("'gear' looks like 'cup': ")
    assert "of 20 images are recognised as it; more images of a known class are taught" in found.warnings[0]
    assert not any("looks like" in warning for warning in world.teach(world.of(0), row=0).warnings)


def test_known_class_under_a_new_name_is_found_in_many_dimensions() -> None:
    """The covariance of few images in many dimensions says little about the distance of two means."""
    found = 0
    for seed in range(10):
        world = World(seed, dim=200, each=10)
        found += any(warning.startswith("'gear' looks like 'cup'") for warning in world.teach(world.of(0, 43)).warnings)
        assert not any("looks like" in warning for warning in world.teach(world.of(OLD, 43)).warnings)
    assert found >= 8


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
    before, rows = world.state(), torch.full((12,), OLD)
    after, trial = world.taught(before, images, rows)
    names = [f"{number}.jpg" for number in range(12)]
    found = judge(before, after, images, rows, trial, names=names)
    assert found.suspects == [Suspects("far", "gear", None, [4])]
    assert "1 of 12 images taught as 'gear' are unlike the others ('4.jpg')" in found.warnings[0]


def test_several_classes_are_judged_separately(world: World) -> None:
    images = torch.cat([world.of(OLD), world.of(3)])
    rows = torch.tensor([OLD] * 20 + [OLD + 1] * 20)
    before = world.state()
    after, trial = world.taught(before, images, rows)
    found = judge(before, after, images, rows, trial)
    doubles = [warning for warning in found.warnings if "looks like" in warning]
    assert len(doubles) == 1
    assert doubles[0].startswith("'socket' looks like 'plug'")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_refused(world: World, value: float) -> None:
    images, before = world.of(OLD), world.state()
    rows = torch.full((20,), OLD)
    after, trial = world.taught(before, images, rows)
    after.learner.values[3, 1] = value
    found = judge(before, after, images, rows, trial)
    with pytest.raises(GateRefusedError, match=r"nothing was changed: .* holds NaN or infinity in values"):
        found.check()
    assert found.retention is None


def test_overflowing_scores_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    images, before = world.of(OLD), world.state()
    rows = torch.full((20,), OLD)
    after, trial = world.taught(before, images, rows)
    learner, original_scores = after.learner, after.learner.scores
    monkeypatch.setattr(
        learner, "scores", lambda vectors: original_scores(vectors).masked_fill(vectors[:, :1] > 50, math.nan)
    )
    images[:2, 0] = 60.0
    found = judge(before, after, images, rows, trial)
    assert "gives NaN or infinity for 2 of the 20 new images" in found.refusals[0]
    monkeypatch.setattr(learner, "scores", lambda vectors: original_scores(vectors) / (len(vectors) == 20))
    found = judge(before, after, images, rows, trial)
    assert "gives NaN or infinity for old classes" in found.refusals[0]


def test_class_that_would_be_lost_is_refused_unless_max_forgetting_is_1(world: World) -> None:
    images, before = world.of(OLD), world.state()
    rows = torch.full((20,), OLD)
    after, trial = world.taught(before, images, rows)
    after.learner.bias[2] = -1e6
    found = judge(before, after, images, rows, trial, Limits(max_forgetting=0.99))
    (message,) = found.refusals
    assert message.startswith(("'screw' would lose 9", "'screw' would lose 8"))
    assert found.retention.worst.label == "screw"
    assert judge(before, after, images, rows, trial, Limits(1.0)).refusals == []


def test_class_with_a_large_loss_is_named(world: World) -> None:
    images, before = world.of(OLD), world.state()
    rows = torch.full((20,), OLD)
    after, trial = world.taught(before, images, rows)
    after.learner.bias[2] -= 8.0
    found = judge(before, after, images, rows, trial, Limits(max_forgetting=0.5))
    assert not found.refusals
    (warning,) = found.warnings
    assert warning.startswith("'screw' may be recognised less often now")


def test_outputs_of_future_classes_are_ignored(world: World) -> None:
    learner = learners.build({"name": "finetune", **NETWORK}, DIM, Priors())
    learner.expect(OLD + 4)
    learner.learn(learners.Task(world.vectors, world.labels))
    state, rows = world.state().replace(learner=learner), torch.zeros(20, dtype=torch.int64)
    state = state.replace(counted=world.statistics)
    found = judge(state, state, world.of(0), rows, Trial(rows, torch.zeros(len(rows), len(TEMPERATURES))))
    assert (found.refusals, found.agreement, found.retention.drop) == ([], 1.0, 0.0)


def test_learner_without_old_classes_is_only_checked_for_finite_values(world: World) -> None:
    full = world.state(name="ncm")
    empty = full.replace(
        learner=learners.build({"name": "ncm"}, DIM, Priors()),
        counted=ClassStatistics(DIM),
        rejector=full.rejector.without_rows(range(OLD)),
        record=full.record.without_rows(range(OLD)),
        registry=ClassRegistry(),
    )
    images, rows = world.of(0), torch.zeros(20, dtype=torch.int64)
    learner = learners.build({"name": "ncm"}, DIM, Priors())
    learner.learn(learners.Task(images, rows))
    after = empty.replace(
        learner=learner, registry=ClassRegistry().add("cup"), record=full.record.without_rows(range(1, OLD))
    )
    found = judge(empty, after, images, rows, Trial(rows, torch.zeros(len(rows), len(TEMPERATURES))))
    assert found == Judgement(None, None, [], [], [], after.record)
