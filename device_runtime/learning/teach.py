"""Learn new images on a device. Nothing is written to disk here."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from device_runtime.backbone.sources import ImageSource, decode, image_name
from device_runtime.install.installed import InstalledBundle
from device_runtime.learning import budget as budgets
from device_runtime.learning.budget import Meter
from device_runtime.learning.guard import Limits, Trial, judge
from device_runtime.learning.state import DeviceState, copy_learner
from device_runtime.results import NO_OLD_CLASSES, HeldOut, LearnResult, TaughtClass
from ssd_edge import images as image_files
from ssd_edge.classes import ClassRegistry, normalise_name
from ssd_edge.errors import InputError
from ssd_edge.learners import Learner, Task
from ssd_edge.learners.base import Progress
from ssd_edge.learners.calibration import TEMPERATURES, promises
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.retention import promises_of
from ssd_edge.learners.whitening import Whitening

MIN_IMAGES = 3  # different ones, of any class: the sum of one image is its embedding, see docs/privacy.md
PARTS = 10  # in which all images of a class are held out from a learner that can tell what it would answer without them
FOLDS = 3  # in which they are held out from another closed-form learner
HELD_OUT = 5  # one image in five is held out from a learner trained by gradient descent
# Squared distance below which two images count once, as a share of that of two images of a class. With
# EfficientNet-Lite0 an image saved again as JPEG of quality 90 is at 0.01, the nearest of 1,883 photographs at 0.05.
SAME_IMAGE = 0.02
EQUAL = 1e-6  # rounding of such a distance between equal images
COPIES = 2  # of the learner's state in memory besides the current one: the taught learner and its serialised tensors

# Gets images, a progress callback, and True for their second views.
Embed = Callable[[Sequence[ImageSource], Callable[[float], object], bool], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class ClassImages:
    """The new images of one class.

    Attributes:
        name: Name of the class.
        row: Its row.
        new: True if the device does not know the class yet.
        sources: The images.
        count: How many of them are different.
        digest: See `digest_of`.
    """

    name: str
    row: int
    new: bool
    sources: Sequence[ImageSource]
    count: int
    digest: str

    def of(self, count: int, limits: Limits) -> ClassImages:
        """Return the same with `count` different images.

        Raises:
            InputError: These are too few. From the sums before and after, a single image of a known class could be
                recovered; of a new class its sum alone would be the image.
        """
        needed = MIN_IMAGES if self.new or not limits.force else 1
        if count < needed:
            kind = "new" if self.new else "known"
            hint = "" if self.new or not limits.hints else "; --force allows it"
            images = f"{len(self.sources)}" if count == len(self.sources) else f"only {count} among {len(self.sources)}"
            raise InputError(
                f"a {kind} class needs at least {needed} different images, but '{self.name}' has {images}{hint}"
            )
        return dataclasses.replace(self, count=count)


def teach(
    state: DeviceState,
    images: Mapping[str, Sequence[ImageSource]],
    embed: Embed,
    seed: int,
    limits: Limits | None,
    meter: Meter,
    taught: Mapping[str, str],
) -> tuple[DeviceState, LearnResult]:
    """Learn classes from their images, see `Device.learn_all`.

    Copies of the learner are taught with parts of the images and evaluated on the rest. Then another copy is taught
    with all images.

    Args:
        state: The state before; it is not changed.
        images: Class name → images.
        embed: Computes embeddings ``(N, D)`` of images, or of their second views.
        seed: Seed of the choice of held-out images.
        limits: Limits on forgetting; None for the defaults.
        meter: Measures time and memory.
        taught: Digest → label of every set of images that led to this state; they count once.

    Returns:
        The state after the learn, and the result to report.

    Raises:
        InputError: As `Device.learn_all`.
        GateRefusedError: As `Device.learn_all`.
    """
    limits = limits or Limits()
    batches, repeated = plan_classes(state.registry, images, taught, state.bundle, limits)
    sources = [source for batch in batches for source in batch.sources]
    meter.check_memory(COPIES * state.learner.memory_bytes() + 2 * len(sources) * state.learner.dim * 4)
    meter.stage("embedding")
    embeddings = embed(sources, meter.check_embedding, False)
    labels = torch.cat([torch.full((len(batch.sources),), batch.row) for batch in batches])
    names = [image_name(source, number) for number, source in enumerate(sources)]
    different = find_different(embeddings, labels, state.rejector.whitening, state.statistics)
    batches = [batch.of(int((different & (labels == batch.row)).sum()), limits) for batch in batches]
    registry = state.registry
    for batch in batches:
        registry = (
            registry.add(batch.name, "device", batch.count) if batch.new else registry.taught(batch.name, batch.count)
        )
    kept = different.nonzero().flatten()
    embeddings, labels, names = embeddings[kept], labels[kept], [names[i] for i in kept.tolist()]
    second = None
    if state.learner.wants_second_view:
        second = embed([sources[i] for i in kept.tolist()], meter.check_embedding, True)
    task = Task(embeddings, labels, second)
    meter.stage("learning", budgets.LEARNING)
    learner = copy_learner(state.learner)
    measured = learner.learn(task, meter.tick)
    meter.stage("trying", budgets.TRIAL)
    trial = try_held_out(state.learner, learner, task, seed, meter.tick)
    meter.stage("checking")
    after = state.with_learner(learner, lambda statistics: statistics.add(embeddings, labels))
    after = _with_answers(state, after.replace(registry=registry), batches, embeddings, labels, trial)
    judgement = judge(state, after, embeddings, labels, trial, limits, names)
    judgement.check()
    after = after.replace(record=judgement.record)
    after.check()
    meter.tick(1.0)
    return after, LearnResult(
        label=", ".join(batch.name for batch in batches),
        images=len(names),
        held_out=_held_out((trial.answers == labels)[trial.answers >= 0]),
        taught=[
            TaughtClass(
                batch.name,
                batch.count,
                batch.new,
                _held_out(trial.of(labels == batch.row) == batch.row),
                _confused(trial.of(labels == batch.row), batch.row, registry.names),
                batch.digest,
            )
            for batch in batches
        ],
        old_classes=judgement.retention or NO_OLD_CLASSES,
        warnings=repeated + _copies(batches) + judgement.warnings + meter.warnings(),
        suspects=[dataclasses.replace(one, indices=kept[one.indices].tolist()) for one in judgement.suspects],
        seconds=round(meter.seconds, 3),
        peak_mb=meter.peak_mb,
        measured={key: float(value) for key, value in measured.items()},
    )


def plan_classes(
    registry: ClassRegistry,
    images: Mapping[str, Sequence[ImageSource]],
    taught: Mapping[str, str],
    bundle: InstalledBundle,
    limits: Limits,
) -> tuple[list[ClassImages], list[str]]:
    """Return the images by class, and a warning for each folder that was taught before and is left out.

    Args:
        registry: The classes known.
        images: Class name → images.
        taught: Digest → label of every set of images that led to the current state.
        bundle: The installed bundle; its installation is part of the digests.
        limits: With `force`, few images of a known class are accepted, and sets that were taught before.

    Raises:
        InputError: No class is given, a name is invalid or given twice, a class has too few images, or all of the
            images were taught before.
    """
    if not images:
        raise InputError("there is nothing to learn: no class was given")
    batches: list[ClassImages] = []
    repeated: list[str] = []
    rows = len(registry)
    for label, sources in images.items():
        row = registry.row(label)
        new = row is None
        batch = ClassImages(
            normalise_name(label), rows if row is None else row, new, sources,
            len(sources), digest_of(sources, bundle),
        )  # fmt: skip
        batch.of(len(sources), limits)
        if any(batch.name == other.name for other in batches):
            raise InputError(f"the class '{label}' is given twice; give all of its images at once")
        if batch.digest in taught and not limits.force:
            again = " (--force counts them again)" if limits.hints else ""
            repeated.append(
                f"the {len(sources)} images of '{batch.name}' were taught before, as '{taught[batch.digest]}'; they "
                f"count once and are left out{again}"
            )
            continue
        rows += int(new)
        batches.append(batch)
    if not batches:
        raise InputError("nothing was changed: " + "; ".join(repeated))
    return batches, repeated


def digest_of(sources: Sequence[ImageSource], bundle: InstalledBundle) -> str:
    """Return a digest of a set of images, the same in any order; it says nothing about a single image.

    Raises:
        InputError: An image cannot be read or has an unsupported type.
    """
    found = set()
    for number, source in enumerate(sources):
        if isinstance(source, str | Path):
            data = image_files.read(source)
        elif isinstance(source, np.ndarray):
            data = source.tobytes()
        else:
            data = decode(source, image_name(source, number), bundle.pixels).tobytes()
        found.add(hashlib.sha256(data).digest())
    return hashlib.sha256(bundle.installation.encode() + b"".join(sorted(found))).hexdigest()[:32]


def find_different(
    embeddings: torch.Tensor, labels: torch.Tensor, whitening: Whitening, statistics: ClassStatistics
) -> torch.Tensor:
    """Return which images are neither the same as an earlier one of their class nor nearly so, bool ``(N,)``.

    Args:
        embeddings: ``(N, D)``.
        labels: Rows, int64 ``(N,)``.
        whitening: What whitens the within-class covariance.
        statistics: Class statistics, which say how far apart two images of a class are.
    """
    white, expected = whitening.of(embeddings), expected_distance(whitening, statistics)
    different = torch.zeros(len(labels), dtype=torch.bool)
    for row in torch.unique(labels).tolist():
        own = (labels == row).nonzero().flatten()
        different[own[different_views(white[own], expected)]] = True
    return different


def expected_distance(whitening: Whitening, statistics: ClassStatistics) -> float:
    """Return the expected squared distance of two whitened images of a class; 0 while nothing is known about it."""
    return 2 * whitening.variance(statistics.within_covariance())


def different_views(white: torch.Tensor, expected: float) -> list[int]:
    """Return the indices of the images of a class that are neither the same as an earlier one nor nearly so.

    Args:
        white: Whitened embeddings of the class, ``(N, D)``.
        expected: See `expected_distance`.
    """
    squared = torch.cdist(white, white).square()
    first, second = torch.triu_indices(len(white), len(white), 1)
    pairs = squared[first, second]
    typical = float(pairs.median()) if len(pairs) else 0.0
    nearest = SAME_IMAGE * (min(expected, typical) if expected else typical) + EQUAL
    near = (squared <= nearest).numpy()
    kept: list[int] = []
    for number in range(len(white)):
        if not near[number, kept].any():
            kept.append(number)
    return kept


def try_held_out(before: Learner, after: Learner, task: Task, seed: int, progress: Progress | None = None) -> Trial:
    """Hold out parts of the new images, and return what a learner that has learned the others answers to each.

    In `PARTS`, if the taught learner can tell; otherwise copies are taught the others. For a closed-form learner every
    image is then held out once, in `FOLDS` parts; a learner trained by gradient descent, for which that takes long, is
    tried on one part of `HELD_OUT` only.

    Args:
        before: The learner before; it is not changed.
        after: The learner that has learned the task.
        task: The new images.
        seed: Seed of the choice.
        progress: Progress callback of the learner.
    """
    labels, learned = task.labels, after.seen.nonzero().flatten()
    answers = torch.full_like(labels, -1)
    promised = torch.zeros(len(labels), len(TEMPERATURES), dtype=torch.float64)
    part = _parts(labels, PARTS, seed)
    scores = after.held_out_scores(task, part)
    if scores is not None:
        tested = part >= 0
        answers[tested] = scores[tested].argmax(1)
        promised[tested] = promises(scores[tested][:, learned])
        return Trial(answers, promised)
    folds, tries = (FOLDS, FOLDS) if before.family == "closed form" else (HELD_OUT, 1)
    part = _parts(labels, folds, seed)
    for number in range(tries):
        held_out = part == number
        if bool(held_out.any()):
            copy = copy_learner(before)
            copy.learn(task.of(~held_out), progress)
            answers[held_out] = copy.predict(task.embeddings[held_out])
            promised[held_out] = promises_of(copy, task.embeddings[held_out])
    return Trial(answers, promised)


def _parts(labels: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Return the number of the part in which each image is held out, int64 ``(N,)``; −1 if it never is.

    Args:
        labels: Rows of the images, int64 ``(N,)``.
        count: Number of parts; fewer for a class with fewer images.
        seed: Seed of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    part = torch.full_like(labels, -1)
    for row in torch.unique(labels).tolist():
        own = (labels == row).nonzero().flatten()
        if len(own) >= MIN_IMAGES:
            order = own[torch.randperm(len(own), generator=generator)]
            part[order] = torch.arange(len(own)) % min(count, len(own))
    return part


def _with_answers(
    before: DeviceState,
    state: DeviceState,
    batches: Sequence[ClassImages],
    embeddings: torch.Tensor,
    labels: torch.Tensor,
    trial: Trial,
) -> DeviceState:
    """Add the new images to the thresholds and to the held-out results of their classes.

    Args:
        before: The state before the learn.
        state: The same with the new registry, learner and class statistics.
        batches: The classes.
        embeddings: Embeddings of the different images, ``(N, D)``.
        labels: Their rows, int64 ``(N,)``.
        trial: Answers to them while they were held out.
    """
    rejector, record, statistics = state.rejector, state.record, state.statistics
    for batch in sorted(batches, key=lambda batch: batch.row):
        own = labels == batch.row
        rejector = rejector.with_class(batch.row, statistics, embeddings[own])
        answers, accepted = trial.answers[own], rejector.accepts(embeddings[own], labels[own])[0]
        nearest = answers == batch.row
        tested, near, right = (int(part.sum()) for part in (answers >= 0, nearest, nearest & accepted))
        recognised = embeddings[own][:0]
        if not batch.new:
            recognised = embeddings[own][before.learner.predict(embeddings[own]) == batch.row]
        promised = trial.promised[own].sum(0)
        record = record.measured(state.learner, statistics, batch.row, tested, near, right, recognised, promised)
    return state.replace(rejector=rejector, record=record)


def _copies(batches: Sequence[ClassImages]) -> list[str]:
    """Return a warning for each class with images that count once only."""
    return [
        f"{len(batch.sources) - batch.count} of {len(batch.sources)} images of '{batch.name}' are the same as others "
        "or nearly so, and count once; vary view, distance and light"
        for batch in batches
        if batch.count < len(batch.sources)
    ]


def _confused(answers: torch.Tensor, row: int, names: Sequence[str]) -> dict[str, int] | None:
    """Return how many answers to held-out images of a class are which other class, most frequent first."""
    if not len(answers):
        return None
    rows, counts = torch.unique(answers[answers != row], return_counts=True)
    found = sorted(zip(counts.tolist(), rows.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1]))
    return {names[other]: count for count, other in found}


def _held_out(correct: torch.Tensor) -> HeldOut:
    return HeldOut(len(correct), round(float(correct.double().mean()), 4) if len(correct) else None)
