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
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from device_runtime import lessons
from device_runtime.board import default_root
from device_runtime.embedder import Embedder, open_embedder
from device_runtime.generations import Generation, Generations
from device_runtime.guard import Limits, judge
from device_runtime.lessons import ImageSource
from ssd_edge import files, learners
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError
from ssd_edge.statistics import ClassStatistics

log = logging.getLogger(__name__)

CARRIED = ("device.json", "probe.safetensors")  # from a generation to those that are learned from it


KEEP = 10  # generations; those in use and the last installed one stay whatever their age
NOTHING_KNOWN = {"kind": "no class was known before", "accuracy_before": None, "accuracy_after": None, "drop": 0.0}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One answer.

    Attributes:
        image: the path, or ``image 0`` … for arrays.
        label: class name.
        score: softmax of the learner's scores over the classes, 0..1. It ranks the images of one generation; it is
            no calibrated probability (a discriminant in a thousand dimensions is far too sure of itself).
        generation: that answered.
    """

    image: str
    label: str
    score: float
    generation: int


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


def prune(store: Generations) -> None:
    """Delete what is older than the newest `KEEP` generations, after a commit; with the root held for writing."""
    try:
        store.prune(KEEP)
    except EnvironmentUnfitError as error:  # the commit has happened, and the next one tries again
        log.warning("old generations were not deleted: %s", error)


@dataclasses.dataclass(frozen=True)
class State:
    """One generation, opened.

    Attributes:
        generation: as it was committed.
        registry: its classes.
        learner: restored; not to be taught.
        statistics: of the embeddings of its classes.
        facts: device.json.
    """

    generation: Generation
    registry: ClassRegistry
    learner: learners.Learner
    statistics: ClassStatistics
    facts: dict[str, Any]


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
        registry = generation.registry
        learner = learners.restore(*generation.tensors("learner.safetensors"))
        statistics = restore_statistics(*generation.tensors("statistics.safetensors"))
        check_together(learner, registry, statistics)
        facts = files.parse_json(generation.read("device.json"), "device.json")
        self.state = State(generation, registry, learner, statistics, facts)
        with self._starting:
            running = self._embedders.get(generation.backbone)
            self._embedders = {} if running is None else {generation.backbone: running}

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
        return self.state.registry

    @property
    def learner(self) -> learners.Learner:
        """Its learner; not to be taught."""
        return self.state.learner

    @property
    def statistics(self) -> ClassStatistics:
        """Of the embeddings of its classes."""
        return self.state.statistics

    @property
    def facts(self) -> dict[str, Any]:
        """What its bundle said besides tensors."""
        return self.state.facts

    @property
    def embedder(self) -> Embedder:
        """The backbone, started when it is first needed; an engine that no longer fits the machine is built anew."""
        return self._embedder_of(self.state)

    def _embedder_of(self, state: State) -> Embedder:
        backbone = state.generation.backbone
        with self._starting:
            if backbone not in self._embedders:
                probe = state.generation.tensors("probe.safetensors")
                found = open_embedder(self.store, backbone, state.facts, probe, log.warning, self.strict)
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

    def _embed(self, state: State, sources: Sequence[ImageSource]) -> torch.Tensor:
        size = state.facts["size"]
        pixels = [lessons.pixels(source, lessons.name_of(source, n), size) for n, source in enumerate(sources)]
        stacked = np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8)
        return torch.from_numpy(self._embedder_of(state).embed(stacked))

    def predict(self, sources: Sequence[ImageSource]) -> list[Prediction]:
        """The best class of each image."""
        state = self.state  # one for the whole answer: another thread may replace it at any time
        classes = state.registry.names
        if not classes:
            raise InputError("this device knows no class yet; teach it one: ssd-edge device learn --label NAME FOLDER")
        scores = state.learner.scores(self._embed(state, sources))[:, : len(classes)]
        share, row = scores.softmax(1).max(1) if len(scores) else (torch.zeros(0), torch.zeros(0))
        names = [lessons.name_of(source, number) for number, source in enumerate(sources)]
        return [
            Prediction(name, classes[int(r)], float(s), state.generation.number)
            for name, r, s in zip(names, row, share, strict=True)
        ]

    def learn(self, label: str, sources: Sequence[ImageSource]) -> dict[str, Any]:
        """`learn_all` of one class."""
        return self.learn_all({label: sources})

    def learn_all(
        self, images: Mapping[str, Sequence[ImageSource]], limits: Limits | None = None
    ) -> dict[str, Any]:
        """Teach classes, new or known, from their new images alone, and commit one generation.

        A fifth of the images is held out, a copy of the learner is taught with the rest and measured on it;
        then the learner itself is taught with all of them, so that none is wasted.

        Args:
            images: name → images; at least three of a new class.
            limits: of what it may cost the old classes; None: the defaults of `guard.Limits`.

        Returns:
            generation, classes, label (the names), images (their number), taught (name, images, whether it was new and
            accuracy on its held-out images), held_out accuracy over all, the estimate for the old classes, warnings
            (sentences for the operator), suspects (images that they speak of), seconds.

        Raises:
            InputError: a bad name, no or too few images, or one that cannot be read; nothing is changed.
            GateRefusedError: the device would forget more than `limits` allow, or answer nonsense; nothing is changed.
        """
        started = time.monotonic()
        with self.store.writer():  # from reading to committing: nobody else can commit in between
            self._load(self.store.current())
            registry, plan = lessons.plan(self.registry, images)
            sources = [source for lesson in plan for source in lesson.sources]
            embeddings = self.embed(sources)
            labels = torch.cat([torch.full((len(lesson.sources),), lesson.row) for lesson in plan])
            held_out = lessons.held_out(self._fresh_learner(), embeddings, labels, seed=self.generation.number)
            taught = self._fresh_learner()
            measured = taught.learn(learners.Task(embeddings, labels))
            statistics = restore_statistics(*self.generation.tensors("statistics.safetensors"))
            names = [lessons.name_of(source, number) for number, source in enumerate(sources)]
            judgement = judge(self.learner, taught, statistics, embeddings, labels, registry, limits, names)
            judgement.check()
            statistics.add(embeddings, labels)
            info = {
                **lessons.report(plan, held_out),
                "old_classes": judgement.retention or NOTHING_KNOWN,
                "warnings": judgement.warnings,
                "suspects": judgement.suspects,
                "seconds": round(time.monotonic() - started, 3),
                "measured": {key: float(value) for key, value in measured.items()},
            }
            return self._commit(self._contents(taught, statistics, registry), info)

    def _fresh_learner(self) -> learners.Learner:
        """A copy of the current one, to be taught."""
        return learners.restore(*self.generation.tensors("learner.safetensors"))

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
            return self._commit(contents, info)

    def _commit(self, contents: dict[str, bytes], info: dict[str, Any]) -> dict[str, Any]:
        """Make a generation of the current one, and answer with it from now on; with the root held for writing."""
        generation = self.store.commit(contents, info, parent=self.generation.number)
        prune(self.store)
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
