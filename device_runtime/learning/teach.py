"""Learning on the device: a device state, and new images → the state after them. Nothing is written here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from device_runtime.learning import budget as budgets
from device_runtime.learning.budget import Meter
from device_runtime.learning.guard import Limits, judge
from device_runtime.learning.state import DeviceState
from device_runtime.learning.unknown import Rejector
from ssd_edge import images, learners
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import InputError
from ssd_edge.learners import Learner, Task
from ssd_edge.learners.base import Progress

MIN_IMAGES = 3  # of a new class: the mean of one image is that image's embedding, and would be stored
HELD_OUT = 5  # one image in five measures what the others taught
NO_CLASSES_BEFORE = {"kind": "no class was known before", "accuracy_before": None, "accuracy_after": None, "drop": 0.0}
COPIES = 2  # of the learner's state that are held beside the one that answers: the one taught, and its tensors packed

ImageSource = str | Path | np.ndarray | Image.Image
Embed = Callable[[Sequence[ImageSource], Callable[[float], Any]], torch.Tensor]


def copy_learner(learner: learners.Learner) -> learners.Learner:
    """A learner of its own, with equal answers bit for bit."""
    return learners.restore(*learners.pack(learner))


def teach(
    state: DeviceState,
    images: Mapping[str, Sequence[ImageSource]],
    embed: Embed,
    seed: int,
    limits: Limits | None,
    meter: Meter,
) -> tuple[DeviceState, dict[str, Any]]:
    """What a device knows after a learn, and the report of it; arguments and errors as `Device.learn_all`.

    A fifth of the images is held out, a copy of the learner is taught with the rest and measured on it; then another
    copy is taught with all of them, so that none is wasted.

    Args:
        state: before; it stays as it is.
        images: name → images.
        embed: images, and what is told the share done → embeddings ``(N, D)``.
        seed: of the choice of held-out images.
        limits: of forgetting.
        meter: of time and memory.
    """
    registry, plan = plan_classes(state.registry, images)
    sources = [source for batch in plan for source in batch.sources]
    meter.check_memory(COPIES * state.learner.memory_bytes() + 2 * len(sources) * state.learner.dim * 4)
    meter.stage("embedding")
    embeddings = embed(sources, meter.check_embedding)
    labels = torch.cat([torch.full((len(batch.sources),), batch.row) for batch in plan])
    meter.stage("trying", budgets.TRIAL)
    held_out = evaluate_held_out(copy_learner(state.learner), embeddings, labels, seed, meter.tick)
    meter.stage("learning", budgets.RESERVE)
    taught = copy_learner(state.learner)
    measured = taught.learn(learners.Task(embeddings, labels), meter.tick)
    meter.stage("checking")
    names = [image_name(source, number) for number, source in enumerate(sources)]
    judgement = judge(state.learner, taught, state.statistics, embeddings, labels, registry, limits, names)
    judgement.check()
    after = _remember(state, plan, embeddings, labels).replace(registry=registry, learner=taught)
    after.check()
    meter.tick(1.0)
    report = {
        **_report(plan, held_out),
        "old_classes": judgement.retention or NO_CLASSES_BEFORE,
        "warnings": judgement.warnings + meter.warnings(),
        "suspects": judgement.suspects,
        "seconds": round(meter.seconds, 3),
        "peak_mb": meter.peak_mb,
        "measured": {key: float(value) for key, value in measured.items()},
    }
    return after, report


def _remember(
    state: DeviceState, plan: Sequence[ClassImages], embeddings: torch.Tensor, labels: torch.Tensor
) -> DeviceState:
    """With the statistics of the new images, and thresholds for the classes that they are of."""
    statistics = state.statistics.copy()
    statistics.add(embeddings, labels)
    rejector = state.rejector
    if rejector.outgrown(statistics):  # a device that began without classes knows by now how embeddings spread
        rejector = Rejector.fit(statistics, rejector.rate)
    for batch in plan:
        rejector = rejector.with_class(batch.row, statistics, embeddings[labels == batch.row])
    return state.replace(statistics=statistics, rejector=rejector)


@dataclasses.dataclass(frozen=True)
class ClassImages:
    """What one class is taught with; `new` where it was not known."""

    name: str
    row: int
    new: bool
    sources: Sequence[ImageSource]


def plan_classes(
    registry: ClassRegistry, given: Mapping[str, Sequence[ImageSource]]
) -> tuple[ClassRegistry, list[ClassImages]]:
    """The registry after learning, and what is to be learned.

    Raises:
        InputError: nothing to learn, a bad name, one that is there twice, or too few images.
    """
    if not given:
        raise InputError("there is nothing to learn: no class was given")
    batches: list[ClassImages] = []
    for label, sources in given.items():
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
    copy: Learner, embeddings: torch.Tensor, labels: torch.Tensor, seed: int, progress: Progress | None = None
) -> dict[int, torch.Tensor]:
    """Whether a fifth of each class's images is recognised by a learner that is taught with the others.

    Args:
        copy: of the learner; it is taught.
        embeddings: ``(N, D)``.
        labels: rows, int64 ``(N,)``.
        seed: of the choice.
        progress: of the teaching.

    Returns:
        Row → bool ``(n,)``, empty where a class has too few images.
    """
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for row in labels.unique():
        own = (labels == row).nonzero().flatten()
        count = len(own) // HELD_OUT or int(len(own) >= MIN_IMAGES)
        held[own[torch.randperm(len(own), generator=generator)[:count]]] = True
    if not held.any():
        return {int(row): held[:0] for row in labels.unique()}
    copy.learn(Task(embeddings[~held], labels[~held]), progress)
    right = copy.predict(embeddings[held]) == labels[held]
    return {int(row): right[labels[held] == row] for row in labels.unique()}


def _report(batches: Sequence[ClassImages], right: Mapping[int, torch.Tensor]) -> dict[str, Any]:
    """For people and `history`: label, images, held_out, and the same of each class in taught; JSON values."""
    return {
        "label": ", ".join(batch.name for batch in batches),
        "images": sum(len(batch.sources) for batch in batches),
        "held_out": _share(torch.cat([right[batch.row] for batch in batches])),
        "taught": [
            {
                "label": batch.name,
                "images": len(batch.sources),
                "new": batch.new,
                "held_out": _share(right[batch.row]),
            }
            for batch in batches
        ],
    }


def _share(right: torch.Tensor) -> dict[str, Any]:
    accuracy = round(float(right.double().mean()), 4) if len(right) else None
    return {"images": len(right), "accuracy": accuracy}


def image_name(source: ImageSource, number: int) -> str:
    """The path of an image, or its place among those given."""
    return str(source) if isinstance(source, str | Path) else f"image {number}"


def decode(source: ImageSource, name: str, size: int) -> np.ndarray:
    """An image at the backbone's size, uint8 RGB ``(size, size, 3)``; `name` is that of what has no path.

    Raises:
        InputError: it cannot be read, or is nothing that could be an image; the sentence names it.
    """
    if isinstance(source, np.ndarray):
        return images.from_array(source, size, name)
    if isinstance(source, Image.Image):
        return images.to_array(source, name, size)
    if not isinstance(source, str | Path):
        raise InputError(f"{name} is a {type(source).__name__}, but a path, a PIL image or a uint8 array is needed")
    return images.decode(images.read(source), str(source), size)
