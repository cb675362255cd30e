"""Learn new images on a device. Nothing is written to disk here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from device_runtime.learning import budget as budgets
from device_runtime.learning.budget import Meter
from device_runtime.learning.guard import Limits, judge
from device_runtime.learning.state import DeviceState, copy_learner
from device_runtime.results import NO_OLD_CLASSES, HeldOut, LearnResult, TaughtClass
from ssd_edge import images as image_files
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import InputError
from ssd_edge.learners import Learner, Task
from ssd_edge.learners.base import Progress
from ssd_edge.learners.unknown import Rejector

MIN_IMAGES = 3  # of a new class: the mean of one image is its embedding, and would be stored
HELD_OUT = 5  # one image in five is held out
COPIES = 2  # of the learner's state in memory besides the current one: the taught learner and its serialised tensors

ImageSource = str | Path | np.ndarray | Image.Image
Embed = Callable[[Sequence[ImageSource], Callable[[float], object]], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class ClassImages:
    """The new images of one class.

    Attributes:
        name: Name of the class.
        row: Its row.
        new: True if the device does not know the class yet.
        sources: The images.
    """

    name: str
    row: int
    new: bool
    sources: Sequence[ImageSource]


def teach(
    state: DeviceState,
    images: Mapping[str, Sequence[ImageSource]],
    embed: Embed,
    seed: int,
    limits: Limits | None,
    meter: Meter,
) -> tuple[DeviceState, LearnResult]:
    """Learn classes from their images, see `Device.learn_all`.

    A copy of the learner is taught with four fifths of the images and evaluated on the rest. Then another copy is
    taught with all images.

    Args:
        state: The state before; it is not changed.
        images: Class name → images.
        embed: Computes embeddings ``(N, D)`` of images; its second argument is called with the share done, 0..1.
        seed: Seed of the choice of held-out images.
        limits: Limits on forgetting; None for the defaults.
        meter: Measures time and memory.

    Returns:
        The state after the learn, and the result to report.

    Raises:
        InputError: As `Device.learn_all`.
        GateRefusedError: As `Device.learn_all`.
    """
    registry, batches = plan_classes(state.registry, images)
    sources = [source for batch in batches for source in batch.sources]
    meter.check_memory(COPIES * state.learner.memory_bytes() + 2 * len(sources) * state.learner.dim * 4)
    meter.stage("embedding")
    embeddings = embed(sources, meter.check_embedding)
    labels = torch.cat([torch.full((len(batch.sources),), batch.row) for batch in batches])
    meter.stage("trying", budgets.TRIAL)
    correct = evaluate_held_out(copy_learner(state.learner), embeddings, labels, seed, meter.tick)
    meter.stage("learning", budgets.RESERVE)
    learner = copy_learner(state.learner)
    measured = learner.learn(Task(embeddings, labels), meter.tick)
    meter.stage("checking")
    names = [image_name(source, number) for number, source in enumerate(sources)]
    judgement = judge(state.learner, learner, state.statistics, embeddings, labels, registry, limits, names)
    judgement.check()
    after = _update_statistics(state, batches, embeddings, labels).replace(registry=registry, learner=learner)
    after.check()
    meter.tick(1.0)
    return after, LearnResult(
        label=", ".join(batch.name for batch in batches),
        images=len(sources),
        held_out=_held_out(torch.cat([correct[batch.row] for batch in batches])),
        taught=[
            TaughtClass(batch.name, len(batch.sources), batch.new, _held_out(correct[batch.row])) for batch in batches
        ],
        old_classes=judgement.retention or NO_OLD_CLASSES,
        warnings=judgement.warnings + meter.warnings(),
        suspects=judgement.suspects,
        seconds=round(meter.seconds, 3),
        peak_mb=meter.peak_mb,
        measured={key: float(value) for key, value in measured.items()},
    )


def plan_classes(
    registry: ClassRegistry, images: Mapping[str, Sequence[ImageSource]]
) -> tuple[ClassRegistry, list[ClassImages]]:
    """Return the registry after learning, and the images by class.

    Raises:
        InputError: No class is given, a name is invalid or given twice, or a class has too few images.
    """
    if not images:
        raise InputError("there is nothing to learn: no class was given")
    batches: list[ClassImages] = []
    for label, sources in images.items():
        row, count = registry.row(label), len(sources)
        new, needed = row is None, MIN_IMAGES if row is None else 1
        if count < needed:
            kind = "new class" if new else "known class"
            raise InputError(f"a {kind} needs at least {needed} images, but '{label}' has {count}")
        if any(batch.row == row for batch in batches):
            raise InputError(f"the class '{label}' is given twice; give all of its images at once")
        registry = registry.add(label, "device", count) if new else registry.taught(label, count)
        row = len(registry) - 1 if row is None else row
        batches.append(ClassImages(registry.names[row], row, new, sources))
    return registry, batches


def evaluate_held_out(
    learner: Learner, embeddings: torch.Tensor, labels: torch.Tensor, seed: int, progress: Progress | None = None
) -> dict[int, torch.Tensor]:
    """Teach a learner four fifths of each class's images and classify the rest.

    Args:
        learner: A copy of the learner; it is changed.
        embeddings: ``(N, D)``.
        labels: Rows, int64 ``(N,)``.
        seed: Seed of the choice.
        progress: Progress callback of the learner.

    Returns:
        Row → bool ``(n,)``, True for each held-out image that is classified correctly; empty for too few images.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    rows: list[int] = torch.unique(labels).tolist()
    for row in rows:
        own = (labels == row).nonzero().flatten()
        count = len(own) // HELD_OUT or int(len(own) >= MIN_IMAGES)
        held_out[own[torch.randperm(len(own), generator=generator)[:count]]] = True
    if not held_out.any():
        return dict.fromkeys(rows, held_out[:0])
    learner.learn(Task(embeddings[~held_out], labels[~held_out]), progress)
    correct = learner.predict(embeddings[held_out]) == labels[held_out]
    return {row: correct[labels[held_out] == row] for row in rows}


def image_name(source: ImageSource, number: int) -> str:
    """Return the path of an image, or ``image NUMBER`` for one without a path."""
    return str(source) if isinstance(source, str | Path) else f"image {number}"


def decode(source: ImageSource, name: str, size: int) -> np.ndarray:
    """Return an image as uint8 RGB ``(size, size, 3)``.

    Args:
        source: The image.
        name: Name in error messages for an image without a path.
        size: Side in pixels.

    Raises:
        InputError: The image cannot be read or has an unsupported type.
    """
    if isinstance(source, np.ndarray):
        return image_files.from_array(source, size, name)
    if isinstance(source, Image.Image):
        return image_files.to_array(source, name, size)
    if not isinstance(source, str | Path):
        raise InputError(f"{name} is a {type(source).__name__}, but a path, a PIL image or a uint8 array is needed")
    return image_files.decode(image_files.read(source), str(source), size)


def _update_statistics(
    state: DeviceState, batches: Sequence[ClassImages], embeddings: torch.Tensor, labels: torch.Tensor
) -> DeviceState:
    """Add the new images to the class statistics and to the thresholds of their classes."""
    statistics = state.statistics.copy()
    statistics.add(embeddings, labels)
    rejector = state.rejector
    if rejector.outgrown(statistics):
        rejector = Rejector.fit(statistics, rejector.rate)
    for batch in batches:
        rejector = rejector.with_class(batch.row, statistics, embeddings[labels == batch.row])
    return state.replace(statistics=statistics, rejector=rejector)


def _held_out(correct: torch.Tensor) -> HeldOut:
    return HeldOut(len(correct), round(float(correct.double().mean()), 4) if len(correct) else None)
