"""`Device`: a box that predicts, learns new classes, and can undo it.

Example:
    >>> from device_runtime import Device
    >>> with Device.open("/data/ssd-edge") as device:
    ...     device.learn("gear", ["photos/1.jpg", "photos/2.jpg", "photos/3.jpg"])
    ...     print(device.predict(["frame.jpg"])[0].label)
    ...     device.rollback()

Every learn makes a generation; nothing is changed until its last step, the commit. Images are file paths, PIL
images, or uint8 arrays ``(H, W)`` or ``(H, W, 3)`` in RGB order (OpenCV gives BGR: reverse its last axis).
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from device_runtime.board import default_root
from device_runtime.embedder import Embedder, open_embedder
from device_runtime.generations import Generation, Generations
from device_runtime.retention import estimate
from ssd_edge import files, images, learners
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.statistics import ClassStatistics

log = logging.getLogger(__name__)

MIN_IMAGES = 3  # the mean of one image is that image's embedding: it would be stored
HELD_OUT = 5  # one image in five measures what the others taught
CARRIED = ("device.json", "probe.safetensors")  # from a generation to those that are learned from it
ImageSource = str | Path | np.ndarray | Image.Image


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One answer.

    Attributes:
        image: the path, or ``image 0`` … for arrays.
        label: class name.
        score: softmax of the learner's scores over the classes, 0..1. It ranks the images of one generation; it is
            no calibrated probability (a discriminant in a thousand dimensions is far too sure of itself).
    """

    image: str
    label: str
    score: float


def restore_statistics(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> ClassStatistics:
    """The statistics of a bundle or generation; `metadata` is not used, so that what `tensors` gives can be passed.

    Raises:
        BundleRefusedError: they are damaged.
    """
    try:
        return ClassStatistics.from_state({name: torch.from_numpy(np.array(a)) for name, a in arrays.items()})
    except (KeyError, RuntimeError, IndexError) as error:
        raise BundleRefusedError(f"the class statistics are damaged ({error}); deploy the bundle again") from error


def check_together(learner: learners.Learner, registry: ClassRegistry, statistics: ClassStatistics) -> None:
    """Parts of one state must speak of the same classes.

    Raises:
        BundleRefusedError: they do not.
    """
    rows = len(registry)
    if len(learner.seen) != rows or len(statistics.counts) != rows:
        raise BundleRefusedError(
            f"the registry names {rows} classes, but the learner knows {len(learner.seen)} and the statistics "
            f"{len(statistics.counts)}; deploy the bundle again"
        )


class Device:
    """The state of a root, opened. Make one with `Device.open`.

    Attributes:
        generation: the current one.
    """

    def __init__(self, store: Generations, strict: bool = False) -> None:
        self.store, self.strict = store, strict
        self._embedder: Embedder | None = None
        self._load(store.current())

    @classmethod
    def open(cls, root: str | Path | None = None, strict: bool = False) -> Device:
        """Open a root that a bundle was installed in.

        Args:
            root: the device's state; None: `default_root`.
            strict: refuse to run the backbone on something slower than what its target is prepared for
                (`SlowerProviderError`, when it is first needed); else that is logged as a warning.

        Raises:
            InputError: nothing is installed there.
            BundleRefusedError: every generation is damaged.
        """
        return cls(Generations(default_root() if root is None else root), strict)

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *exception: object) -> None:
        self._embedder = None

    def _load(self, generation: Generation) -> None:
        registry = generation.registry
        learner = learners.restore(*generation.tensors("learner.safetensors"))
        statistics = restore_statistics(*generation.tensors("statistics.safetensors"))
        check_together(learner, registry, statistics)
        facts = files.parse_json(generation.read("device.json"), "device.json")
        self.generation, self.registry, self.learner = generation, registry, learner
        self.statistics, self.facts = statistics, facts

    @property
    def embedder(self) -> Embedder:
        """The backbone, started when it is first needed; an engine that no longer fits the machine is built anew."""
        if self._embedder is None:
            probe = self.generation.tensors("probe.safetensors")
            self._embedder = open_embedder(
                self.store, self.generation.backbone, self.facts, probe, log.warning, self.strict
            )
        return self._embedder

    @property
    def classes(self) -> list[str]:
        """Names of the classes that this device knows."""
        return self.registry.names

    def embed(self, sources: Sequence[ImageSource]) -> torch.Tensor:
        """Standardised embeddings, float32 ``(N, D)``.

        Raises:
            InputError: an image cannot be read; the sentence names it.
        """
        size = self.facts["size"]
        pixels = [_pixels(source, f"image {number}", size) for number, source in enumerate(sources)]
        stacked = np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8)
        return torch.from_numpy(self.embedder.embed(stacked))

    def predict(self, sources: Sequence[ImageSource]) -> list[Prediction]:
        """The best class of each image."""
        scores = self.learner.scores(self.embed(sources))[:, : len(self.registry)]
        share, row = scores.softmax(1).max(1) if len(scores) else (torch.zeros(0), torch.zeros(0))
        names = [str(s) if isinstance(s, str | Path) else f"image {n}" for n, s in enumerate(sources)]
        return [
            Prediction(name, self.classes[int(r)], float(s))
            for name, r, s in zip(names, row, share, strict=True)
        ]

    def learn(self, label: str, sources: Sequence[ImageSource]) -> dict[str, Any]:
        """`learn_all` of one class."""
        return self.learn_all({label: sources})

    def learn_all(self, images: Mapping[str, Sequence[ImageSource]]) -> dict[str, Any]:
        """Teach classes, new or known, from their new images alone, and commit one generation.

        A fifth of the images is held out, a copy of the learner is taught with the rest and measured on it;
        then the learner itself is taught with all of them, so that none is wasted.

        Args:
            images: name → images; at least three of a new class.

        Returns:
            generation, classes, label (the names), images (their number), taught (name, images, whether it was new and
            accuracy on its held-out images), held_out accuracy over all, the estimate for the old classes, seconds.

        Raises:
            InputError: a bad name, no or too few images, or one that cannot be read; nothing is changed.
        """
        started = time.monotonic()
        with self.store.writer():  # from reading to committing: nobody else can commit in between
            self._load(self.store.current())
            registry, lessons = _lessons(self.registry, images)
            embeddings = self.embed([source for lesson in lessons for source in lesson.sources])
            labels = torch.cat([torch.full((len(lesson.sources),), lesson.row) for lesson in lessons])
            held_out = self._held_out(embeddings, labels)
            taught = learners.restore(*self.generation.tensors("learner.safetensors"))
            measured = taught.learn(learners.Task(embeddings, labels))
            statistics = restore_statistics(*self.generation.tensors("statistics.safetensors"))
            retention = estimate(self.learner, taught, statistics)
            statistics.add(embeddings, labels)
            right = torch.cat(list(held_out.values())).double()
            info = {
                "label": ", ".join(lesson.name for lesson in lessons),
                "images": len(embeddings),
                "held_out": {"images": len(right), "accuracy": _share(right)},
                "taught": [
                    {
                        "label": lesson.name,
                        "images": len(lesson.sources),
                        "new": lesson.new,
                        "held_out": {"images": len(held_out[lesson.row]), "accuracy": _share(held_out[lesson.row])},
                    }
                    for lesson in lessons
                ],
                "old_classes": retention,
                "seconds": round(time.monotonic() - started, 3),
                "measured": {key: float(value) for key, value in measured.items()},
            }
            generation = self.store.commit(
                self._contents(taught, statistics, registry), info, parent=self.generation.number
            )
            self._load(generation)
        return {"generation": generation.number, "classes": self.classes, **info}

    def _held_out(self, embeddings: torch.Tensor, labels: torch.Tensor) -> dict[int, torch.Tensor]:
        """Row → whether each of a fifth of its images is recognised by a copy taught with the others, bool ``(n,)``."""
        generator = torch.Generator().manual_seed(self.generation.number)
        held = torch.zeros(len(labels), dtype=torch.bool)
        for row in labels.unique():
            own = (labels == row).nonzero().flatten()
            count = len(own) // HELD_OUT or int(len(own) >= MIN_IMAGES)
            held[own[torch.randperm(len(own), generator=generator)[:count]]] = True
        if not held.any():
            return {int(row): held[:0] for row in labels.unique()}
        copy = learners.restore(*self.generation.tensors("learner.safetensors"))
        copy.learn(learners.Task(embeddings[~held], labels[~held]))
        right = copy.predict(embeddings[held]) == labels[held]
        return {int(row): right[labels[held] == row] for row in labels.unique()}

    def rename(self, label: str, new: str) -> dict[str, Any]:
        """Give a class another name, and commit a generation; what was learned stays as it is.

        Raises:
            InputError: no such class, or the new name is bad or taken.
        """
        with self.store.writer():
            self._load(self.store.current())
            registry = self.registry.rename(label, new)
            contents = {name: self.generation.read(name) for name in self.generation.files}
            contents["classes.json"] = files.json_bytes(registry.to_json())
            row = self.registry.row(label)
            info = {"renamed": [self.classes[row], registry.names[row]]}
            generation = self.store.commit(contents, info, parent=self.generation.number)
            self._load(generation)
        return {"generation": generation.number, "classes": self.classes, **info}

    def _contents(
        self, learner: learners.Learner, statistics: ClassStatistics, registry: ClassRegistry
    ) -> dict[str, bytes]:
        arrays = {name: tensor.numpy() for name, tensor in statistics.state().items()}
        contents = {
            "learner.safetensors": files.tensor_bytes(*learners.pack(learner)),
            "statistics.safetensors": files.tensor_bytes(arrays),
            "classes.json": files.json_bytes(registry.to_json()),
            **{name: self.generation.read(name) for name in CARRIED},
        }
        table = learners.top_n_table(learner)
        if table is not None:
            contents["top_n.safetensors"] = files.tensor_bytes(table, {"learner": learner.name})
        return contents

    def rollback(self, number: int | None = None) -> dict[str, Any]:
        """Return to an earlier generation: the one that this was learned from, or any by its number.

        Predictions are then those of that generation, bit for bit. Nothing is deleted: the later generation
        can be returned to as well.

        Raises:
            InputError: there is none to return to, or the number does not exist.
        """
        with self.store.writer():
            current = self.store.current()
            if number is None:
                number = current.parent
            if number is None:
                others = [str(g["number"]) for g in self.store.list() if g["number"] != current.number]
                hint = f"name one of: {', '.join(others)}" if others else "it is the only one"
                raise InputError(f"generation {current.number} was installed, not learned, so it has no parent; {hint}")
            generation = self.store.set_current(number, "rollback", {"from": current.number})
            if generation.backbone != self.generation.backbone:
                self._embedder = None
            self._load(generation)
        return {"generation": generation.number, "classes": self.classes, "from": current.number}

    def status(self) -> dict[str, Any]:
        """What this device is and knows; JSON values."""
        return {
            "generation": self.generation.number,
            "classes": self.classes,
            "images": {entry.name: entry.images for entry in self.registry.entries},
            "learned_here": [entry.name for entry in self.registry.entries if entry.origin == "device"],
            "learner": self.learner.name,
            "replay": self.learner.replay,
            "state_bytes": self.learner.memory_bytes(),
            "provider": self.embedder.provider,
            "bundle": self.facts["name"],
            "release": self.facts["release"],
            "signed_by": self.facts["signed_by"],
            "precision": self.facts["precision"],
            "root": str(self.store.root),
            "warning": self.generation.fallback,
        }

    def history(self) -> dict[str, Any]:
        """Every generation and every event, oldest first; JSON values."""
        return {
            "generation": self.generation.number,
            "classes": self.classes,
            "generations": list(self.store.list()),
            "events": list(self.store.journal()),
        }


@dataclasses.dataclass(frozen=True)
class _Lesson:
    """What one class is taught with."""

    name: str
    row: int
    new: bool
    sources: Sequence[ImageSource]


def _lessons(
    registry: ClassRegistry, images: Mapping[str, Sequence[ImageSource]]
) -> tuple[ClassRegistry, list[_Lesson]]:
    """The registry after learning, and what is to be learned.

    Raises:
        InputError: nothing to learn, a bad name, one that is there twice, or too few images.
    """
    if not images:
        raise InputError("there is nothing to learn: no class was given")
    lessons: list[_Lesson] = []
    for label, sources in images.items():
        row, count = registry.row(label), len(sources)
        new, needed = row is None, MIN_IMAGES if row is None else 1
        if count < needed:
            kind = "new class" if new else "known class"
            raise InputError(f"a {kind} needs at least {needed} images, but '{label}' has {count}")
        if any(lesson.row == row for lesson in lessons):
            raise InputError(f"the class '{label}' is given twice; give all of its images at once")
        registry = registry.add(label, "device", count) if new else registry.taught(label, count)
        row = len(registry) - 1 if new else row
        lessons.append(_Lesson(registry.names[row], row, new, sources))
    return registry, lessons


def _share(right: torch.Tensor) -> float | None:
    """Share of what is true; None of nothing."""
    return round(float(right.double().mean()), 4) if len(right) else None


def _pixels(source: ImageSource, name: str, size: int) -> np.ndarray:
    if isinstance(source, np.ndarray):
        return images.from_array(source, size)
    if isinstance(source, Image.Image):
        return images.to_array(source, name, size)
    return images.decode(files.read_bytes(Path(source)), str(source), size)
