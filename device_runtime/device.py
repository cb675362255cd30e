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
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from device_runtime import lessons, teaching
from device_runtime.board import default_root
from device_runtime.budget import Budget, Meter, Watcher
from device_runtime.embedder import Embedder, open_embedder
from device_runtime.generations import Generation, Generations
from device_runtime.guard import Limits
from device_runtime.knowledge import Knowledge
from device_runtime.lessons import ImageSource
from device_runtime.unknown import UNKNOWN
from ssd_edge import files, learners
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import EnvironmentUnfitError, InputError
from ssd_edge.statistics import ClassStatistics

log = logging.getLogger(__name__)

KEEP = 10  # generations; those in use and the last installed one stay whatever their age
AT_ONCE = 64  # images that are decoded before they are embedded: 10 MB of 224 × 224 pixels


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One answer.

    Attributes:
        image: the path, or ``image 0`` … for arrays.
        label: class name, or ``unknown``.
        score: softmax of the learner's scores over the classes, 0..1, of `nearest`. It ranks the images of one
            generation; it is no calibrated probability (a discriminant in a thousand dimensions is far too sure).
        generation: that answered.
        nearest: the class that it was taken for, also where it is not near enough to be called that.
        margin: by how much it is nearer than that class asks for, a difference of cosines; below 0 it is ``unknown``.
    """

    image: str
    label: str
    score: float
    generation: int
    nearest: str
    margin: float


@dataclasses.dataclass(frozen=True)
class State:
    """One generation, opened."""

    generation: Generation
    known: Knowledge


@dataclasses.dataclass(frozen=True)
class Observation:
    """What `Device.observe` found.

    Attributes:
        predictions: one an image.
        embeddings: float32 ``(N, D)``.
        state: that answered.
    """

    predictions: list[Prediction]
    embeddings: torch.Tensor
    state: State


def prune(store: Generations) -> None:
    """Delete what is older than the newest `KEEP` generations, after a commit; with the root held for writing."""
    try:
        store.prune(KEEP)
    except EnvironmentUnfitError as error:  # the commit has happened, and the next one tries again
        log.warning("old generations were not deleted: %s", error)


class Device:
    """The state of a root, opened. Make one with `Device.open`.

    Any number of threads may predict while one learns: an answer is wholly that of the generation before or wholly that
    of the one after. Learning, renaming and rolling back take turns, also among processes; who comes second is refused.

    Attributes:
        state: the generation that answers; replaced as a whole.
    """

    def __init__(self, store: Generations, strict: bool = False) -> None:
        self.store, self.strict = store, strict
        self._starting = threading.Lock()
        self._embedders: dict[str, Embedder] = {}  # by backbone; the one of `state`
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
        self._embedders = {}

    def _load(self, generation: Generation) -> None:
        self._use(State(generation, Knowledge.read(generation.read)))

    def _use(self, state: State) -> None:
        self.state = state
        with self._starting:
            running = self._embedders.get(state.generation.backbone)
            self._embedders = {} if running is None else {state.generation.backbone: running}

    def refresh(self) -> bool:
        """Take over what another process has committed; whether there was something new.

        Raises:
            BundleRefusedError: every generation is damaged.
        """
        generation = self.store.current()
        if generation == self.generation:
            return False
        self._load(generation)
        return True

    @property
    def generation(self) -> Generation:
        """The one that answers."""
        return self.state.generation

    @property
    def registry(self) -> ClassRegistry:
        """Its classes."""
        return self.state.known.registry

    @property
    def learner(self) -> learners.Learner:
        """Its learner; not to be taught."""
        return self.state.known.learner

    @property
    def statistics(self) -> ClassStatistics:
        """Of the embeddings of its classes."""
        return self.state.known.statistics

    @property
    def facts(self) -> dict[str, Any]:
        """What its bundle said besides tensors."""
        return self.state.known.facts

    @property
    def embedder(self) -> Embedder:
        """The backbone, started when it is first needed; an engine that no longer fits the machine is built anew."""
        return self._embedder_of(self.state)

    def _embedder_of(self, state: State) -> Embedder:
        backbone = state.generation.backbone
        with self._starting:
            if backbone not in self._embedders:
                known = state.known
                probe = files.parse_tensors(known.probe, "probe.safetensors")
                found = open_embedder(self.store, backbone, known.facts, probe, log.warning, self.strict)
                self._embedders = {backbone: found}
            return self._embedders[backbone]

    @property
    def classes(self) -> list[str]:
        """Names of the classes that this device knows."""
        return self.registry.names

    def embed(self, sources: Sequence[ImageSource]) -> torch.Tensor:
        """Standardised embeddings, float32 ``(N, D)``.

        Raises:
            InputError: an image cannot be read; the sentence names it.
        """
        return self._embed(self.state, sources)

    def _embed(
        self, state: State, sources: Sequence[ImageSource], progress: Callable[[float], Any] = lambda share: None
    ) -> torch.Tensor:
        size, embedder = state.known.facts["size"], self._embedder_of(state)
        parts = []
        for start in range(0, len(sources), AT_ONCE):
            some = sources[start : start + AT_ONCE]
            pixels = [lessons.pixels(one, lessons.name_of(one, start + n), size) for n, one in enumerate(some)]
            parts.append(torch.from_numpy(embedder.embed(np.stack(pixels))))
            progress((start + len(some)) / len(sources))
        return torch.cat(parts) if parts else torch.zeros(0, state.known.facts["dim"])

    def observe(self, sources: Sequence[ImageSource], reject: bool = True) -> Observation:
        """What each image shows, with its embedding, all by one generation.

        Args:
            sources: images.
            reject: answer `UNKNOWN` for what is not near enough to any class; else every image is of some class.

        Raises:
            InputError: an image cannot be read, or this device knows no class yet.
        """
        state = self.state  # one for the whole answer: another thread may replace it at any time
        classes = state.known.registry.names
        if not classes:
            raise InputError("this device knows no class yet; teach it one: ssd-edge device learn --label NAME FOLDER")
        embeddings = self._embed(state, sources)
        scores = state.known.learner.scores(embeddings)[:, : len(classes)]
        share, rows = scores.softmax(1).max(1) if len(scores) else (torch.zeros(0), torch.zeros(0, dtype=torch.int64))
        near, margins = state.known.rejector.known(embeddings, rows)
        answers = zip(sources, rows.tolist(), share.tolist(), near.tolist(), margins.tolist(), strict=True)
        found = [
            Prediction(
                lessons.name_of(source, number),
                classes[row] if passes or not reject else UNKNOWN,
                score,
                state.generation.number,
                classes[row],
                margin,
            )
            for number, (source, row, score, passes, margin) in enumerate(answers)
        ]
        return Observation(found, embeddings, state)

    def predict(self, sources: Sequence[ImageSource], reject: bool = True) -> list[Prediction]:
        """The best class of each image, or `UNKNOWN`; arguments and errors as `observe`."""
        return self.observe(sources, reject).predictions

    def learn(self, label: str, sources: Sequence[ImageSource], **options: Any) -> dict[str, Any]:
        """`learn_all` of one class."""
        return self.learn_all({label: sources}, **options)

    def learn_all(
        self,
        images: Mapping[str, Sequence[ImageSource]],
        limits: Limits | None = None,
        budget: Budget | None = None,
        watcher: Watcher | None = None,
    ) -> dict[str, Any]:
        """Teach classes, new or known, from their new images alone, and commit one generation.

        Args:
            images: name → images; at least three of a new class.
            limits: of what it may cost the old classes; None: the defaults of `guard.Limits`.
            budget: of time and memory; None: no limits.
            watcher: told how far it is.

        Returns:
            generation, classes, label (the names), images (their number), taught (name, images, whether it was new and
            accuracy on its held-out images), held_out accuracy over all, the estimate for the old classes, warnings
            (sentences for the operator), suspects (images that they speak of), seconds, peak_mb (of the process while
            it learned, MiB; None: not known), measured (by the learner).

        Raises:
            InputError: a bad name, no or too few images, or one that cannot be read; nothing is changed.
            GateRefusedError: the device would forget more than `limits` allow, answer nonsense, or need more than the
                budget; nothing is changed.
        """
        meter = Meter(budget, watcher)
        with self.store.writer():  # from reading to committing: nobody else can commit in between
            state = self._latest()

            def embed(sources: Sequence[ImageSource], progress: Callable[[float], Any]) -> torch.Tensor:
                return self._embed(state, sources, progress)

            known, report = teaching.teach(state.known, images, embed, state.generation.number, limits, meter)
            return self._commit(known, report)

    def _latest(self) -> State:
        """The state to make the next one of; with the root held for writing."""
        generation = self.store.current()
        if generation != self.state.generation:
            self._load(generation)
        return self.state

    def rename(self, label: str, new: str) -> dict[str, Any]:
        """Give a class another name, and commit a generation; what was learned stays as it is.

        Raises:
            InputError: no such class, or the new name is bad or taken.
        """
        with self.store.writer():
            known = self._latest().known
            registry = known.registry.rename(label, new)
            row = known.registry.row(label)
            return self._commit(known.replace(registry=registry), {"renamed": [self.classes[row], registry.names[row]]})

    def _commit(self, known: Knowledge, info: dict[str, Any]) -> dict[str, Any]:
        """Make a generation of the current one, and answer with it from now on; with the root held for writing."""
        contents, again = known.reread()
        generation = self.store.commit(contents, info, parent=self.generation.number)
        prune(self.store)
        self._use(State(generation, again))
        return {"generation": generation.number, "classes": self.classes, **info}

    def rollback(self, number: int | None = None) -> dict[str, Any]:
        """Return to an earlier generation: the one that this was learned from, or any by its number.

        Predictions are then those of that generation, bit for bit. The later generation stays, and can be returned to
        as well, until `KEEP` newer ones have been committed.

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
