"""What a device is asked to learn, checked before anything is computed; and what of it a copy can tell afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ssd_edge import images
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import InputError
from ssd_edge.learners import Learner, Task
from ssd_edge.learners.base import Progress

MIN_IMAGES = 3  # of a new class: the mean of one image is that image's embedding, and would be stored
HELD_OUT = 5  # one image in five measures what the others taught
ImageSource = str | Path | np.ndarray | Image.Image


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What one class is taught with; `new` where it was not known."""

    name: str
    row: int
    new: bool
    sources: Sequence[ImageSource]


def plan(registry: ClassRegistry, given: Mapping[str, Sequence[ImageSource]]) -> tuple[ClassRegistry, list[Lesson]]:
    """The registry after learning, and what is to be learned.

    Raises:
        InputError: nothing to learn, a bad name, one that is there twice, or too few images.
    """
    if not given:
        raise InputError("there is nothing to learn: no class was given")
    lessons: list[Lesson] = []
    for label, sources in given.items():
        row, count = registry.row(label), len(sources)
        new, needed = row is None, MIN_IMAGES if row is None else 1
        if count < needed:
            kind = "new class" if new else "known class"
            raise InputError(f"a {kind} needs at least {needed} images, but '{label}' has {count}")
        if any(lesson.row == row for lesson in lessons):
            raise InputError(f"the class '{label}' is given twice; give all of its images at once")
        registry = registry.add(label, "device", count) if new else registry.taught(label, count)
        row = len(registry) - 1 if row is None else row
        lessons.append(Lesson(registry.names[row], row, new, sources))
    return registry, lessons


def held_out(
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


def report(lessons: Sequence[Lesson], right: Mapping[int, torch.Tensor]) -> dict[str, Any]:
    """For people and `history`: label, images, held_out, and the same of each class in taught; JSON values."""
    return {
        "label": ", ".join(lesson.name for lesson in lessons),
        "images": sum(len(lesson.sources) for lesson in lessons),
        "held_out": _share(torch.cat([right[lesson.row] for lesson in lessons])),
        "taught": [
            {
                "label": lesson.name,
                "images": len(lesson.sources),
                "new": lesson.new,
                "held_out": _share(right[lesson.row]),
            }
            for lesson in lessons
        ],
    }


def _share(right: torch.Tensor) -> dict[str, Any]:
    accuracy = round(float(right.double().mean()), 4) if len(right) else None
    return {"images": len(right), "accuracy": accuracy}


def name_of(source: ImageSource, number: int) -> str:
    """The path of an image, or its place among those given."""
    return str(source) if isinstance(source, str | Path) else f"image {number}"


def pixels(source: ImageSource, name: str, size: int) -> np.ndarray:
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
