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
import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from device_runtime.backbone.embedder import open_embedder
from device_runtime.backbone.interface import BackboneSpec, DeviceEmbedder
from device_runtime.install.trust import check_signature
from device_runtime.learning import edit, exchange, teach
from device_runtime.learning.budget import Budget, Meter, Watcher
from device_runtime.learning.guard import Limits
from device_runtime.learning.state import DeviceState
from device_runtime.learning.teach import ImageSource
from device_runtime.learning.unknown import UNKNOWN
from device_runtime.machine.board import default_root
from device_runtime.machine.vitals import vitals
from device_runtime.store import watch_state
from device_runtime.store.generations import Generations
from device_runtime.store.record import Generation
from ssd_edge import bundle as bundles
from ssd_edge import files, learners
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import InputError
from ssd_edge.learners.closed_form.sums import ClassStatistics

log = logging.getLogger(__name__)

DECODE_BATCH = 64  # images that are decoded before they are embedded: 10 MB of 224 × 224 pixels


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
class Snapshot:
    """One generation, opened."""

    generation: Generation
    state: DeviceState

    @classmethod
    def read(cls, generation: Generation) -> Snapshot:
        """Raises like `DeviceState.read`."""
        return cls(generation, DeviceState.read(generation.read))


@dataclasses.dataclass(frozen=True)
class Observation:
    """What `Device.observe` found.

    Attributes:
        predictions: one an image.
        embeddings: float32 ``(N, D)``.
        snapshot: that answered.
    """

    predictions: list[Prediction]
    embeddings: torch.Tensor
    snapshot: Snapshot


class Device:
    """The state of a root, opened. Make one with `Device.open`.

    Any number of threads may predict while one learns: an answer is wholly that of the generation before or wholly that
    of the one after. Learning, renaming and rolling back take turns, also among processes; who comes second is refused.

    Attributes:
        snapshot: the generation that answers; replaced as a whole.
    """

    def __init__(self, store: Generations, strict: bool = False) -> None:
        self.store, self.strict = store, strict
        self._starting = threading.Lock()
        # From reading or moving CURRENT to answering by it; else one that has read it before a commit would go back.
        self._following = threading.Lock()
        self._embedders: dict[str, DeviceEmbedder] = {}  # by backbone; the one of `state`
        self._use(store.read_current(Snapshot.read))

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

    def _use(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        with self._starting:
            running = self._embedders.get(snapshot.generation.backbone)
            self._embedders = {} if running is None else {snapshot.generation.backbone: running}

    def refresh(self) -> bool:
        """Take over what another process has committed; whether there was something new.

        Raises:
            BundleRefusedError: every generation is damaged.
        """
        with self._following:
            snapshot = self.store.read_current(lambda found: None if found == self.generation else Snapshot.read(found))
            if snapshot is not None:
                self._use(snapshot)
            return snapshot is not None

    @property
    def generation(self) -> Generation:
        """The one that answers."""
        return self.snapshot.generation

    @property
    def state(self) -> DeviceState:
        """What it knows."""
        return self.snapshot.state

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
    def embedder(self) -> DeviceEmbedder:
        """The backbone, started when it is first needed; an engine that no longer fits the machine is built anew."""
        return self._embedder_of(self.snapshot)

    def _embedder_of(self, snapshot: Snapshot) -> DeviceEmbedder:
        backbone = snapshot.generation.backbone
        with self._starting:
            if backbone not in self._embedders:
                state = snapshot.state
                probe = files.parse_tensors(state.probe, "probe.safetensors")
                spec = BackboneSpec.from_facts(backbone, state.facts)
                found = open_embedder(self.store, spec, probe, log.warning, self.strict)
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
        return self._embed(self.snapshot, sources)

    def _embed(
        self, snapshot: Snapshot, sources: Sequence[ImageSource], progress: Callable[[float], Any] = lambda share: None
    ) -> torch.Tensor:
        size, embedder = snapshot.state.facts["size"], self._embedder_of(snapshot)
        parts = []
        for start in range(0, len(sources), DECODE_BATCH):
            some = sources[start : start + DECODE_BATCH]
            pixels = [teach.decode(one, teach.image_name(one, start + n), size) for n, one in enumerate(some)]
            parts.append(torch.from_numpy(embedder.embed(np.stack(pixels))))
            progress((start + len(some)) / len(sources))
        return torch.cat(parts) if parts else torch.zeros(0, snapshot.state.facts["dim"])

    def observe(self, sources: Sequence[ImageSource], reject: bool = True) -> Observation:
        """What each image shows, with its embedding, all by one generation.

        Args:
            sources: images.
            reject: answer `UNKNOWN` for what is not near enough to any class; else every image is of some class.

        Raises:
            InputError: an image cannot be read, or this device knows no class yet.
        """
        snapshot = self.snapshot  # one for the whole answer: another thread may replace it at any time
        state = snapshot.state
        classes = state.registry.names
        if not classes:
            raise InputError("this device knows no class yet; teach it one: ssd-edge device learn --label NAME FOLDER")
        embeddings = self._embed(snapshot, sources)
        scores = state.learner.scores(embeddings)[:, : len(classes)]
        share, rows = scores.softmax(1).max(1) if len(scores) else (torch.zeros(0), torch.zeros(0, dtype=torch.int64))
        near, margins = state.rejector.known(embeddings, rows)
        answers = zip(sources, rows.tolist(), share.tolist(), near.tolist(), margins.tolist(), strict=True)
        found = [
            Prediction(
                teach.image_name(source, number),
                classes[row] if passes or not reject else UNKNOWN,
                score,
                snapshot.generation.number,
                classes[row],
                margin,
            )
            for number, (source, row, score, passes, margin) in enumerate(answers)
        ]
        return Observation(found, embeddings, snapshot)

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
            snapshot = self._latest()
            embed = functools.partial(self._embed, snapshot)
            return self._commit(*teach.teach(snapshot.state, images, embed, self.generation.number, limits, meter))

    def _latest(self) -> Snapshot:
        """The state to make the next one of; with the root held for writing."""
        self.refresh()
        return self.snapshot

    def rename(self, label: str, new: str) -> dict[str, Any]:
        """Give a class another name, and commit a generation; what was learned stays as it is.

        Raises:
            InputError: no such class, or the new name is bad or taken.
        """
        with self.store.writer():
            state = self._latest().state
            registry = state.registry.rename(label, new)
            row = state.registry.row(label)
            return self._commit(state.replace(registry=registry), {"renamed": [self.classes[row], registry.names[row]]})

    def forget(self, label: str, exactly: bool = False, limits: Limits | None = None) -> dict[str, Any]:
        """Take a class out, and commit a generation. Older generations still know it, until they are pruned.

        Args:
            label: of the class.
            exactly: refuse where the learner cannot be as if it had never been taught the class.
            limits: of what it may cost the other classes; None: the defaults of `guard.Limits`.

        Returns:
            generation, classes, forgot (the label), images (that it was taught with), exact, left (what of it stays, a
            sentence; empty if exact), the estimate for the other classes, warnings.

        Raises:
            InputError: no such class; or not exactly, where that is asked for.
            GateRefusedError: the others would be recognised less often than `limits` allow.
        """
        with self.store.writer():
            return self._commit(*edit.forget(self._latest().state, label, exactly, limits))

    def merge_labels(self, labels: Sequence[str], into: str, limits: Limits | None = None) -> dict[str, Any]:
        """Make one class of several, as if they had been taught under one name, and commit a generation.

        Args:
            labels: of the classes, at least two with `into`.
            into: name of the one class: one of theirs, another known one, or a new name.
            limits: as for `forget`.

        Returns:
            generation, classes, merged_labels, into, the estimate for all classes, warnings.

        Raises:
            InputError: no such class, or the learner cannot do that; names those who can.
            GateRefusedError: they would be recognised less often than `limits` allow.
        """
        with self.store.writer():
            return self._commit(*edit.merge_labels(self._latest().state, labels, into, limits))

    def export(self, path: str | Path, key: str | Path | None = None) -> dict[str, Any]:
        """Write what this device knows as a bundle, for another device or as a backup.

        Args:
            path: of the bundle; its name becomes that of the bundle.
            key: file of a private key to sign it with; None: unsigned.

        Returns:
            bundle, bytes, sha256, generation, classes, signed_by.

        Raises:
            InputError: the path is a folder, or there is no such key.
        """
        return exchange.export(self.store, self.generation, self.state, Path(path), key)

    def merge(self, path: str | Path, limits: Limits | None = None) -> dict[str, Any]:
        """Learn what another device has learned since both installed one bundle, from what that one has exported.

        The state is then what one device would know that had been taught both; classes are one where their names are.
        Both keep going from what they know: to go on together, export the merged state and install it on both.

        Args:
            path: of the bundle that the other device has exported.
            limits: of what it may cost the classes that this device knows; None: the defaults of `guard.Limits`.

        Returns:
            generation, classes, merged (id of the other's installation), taught (label, images, whether it was new),
            the estimate for the old classes, warnings.

        Raises:
            InputError: no such file; the two have not started from one bundle; something would count twice; or the
                learner cannot be merged. Nothing is changed.
            BundleRefusedError: the bundle is damaged, or not signed by a trusted key where there is one.
            GateRefusedError: the device would forget more than `limits` allow.
        """
        opened = bundles.read(Path(path))
        check_signature(self.store.root, opened)
        with self.store.writer():
            state = self._latest().state
            return self._commit(*exchange.merge(state, exchange.base_of(self.store, state), opened, limits))

    def _commit(self, state: DeviceState, info: dict[str, Any]) -> dict[str, Any]:
        """Make a generation of the current one, and answer with it from now on; with the root held for writing."""
        contents, again = state.verified_contents()
        with self._following:
            generation = self.store.commit(contents, info, parent=self.generation.number)
            self.store.tidy()
            self._use(Snapshot(generation, again))
        return {"generation": generation.number, "classes": self.classes, **info}

    def rollback(self, number: int | None = None) -> dict[str, Any]:
        """Return to an earlier generation: the one that this was learned from, or any by its number.

        Predictions are then those of that generation, bit for bit. The later generation stays, and can be returned to
        as well, until `generations.KEEP` newer ones have been committed.

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
            with self._following:
                generation = self.store.set_current(number, "rollback", {"from": current.number})
                self._use(Snapshot.read(generation))
        return {"generation": generation.number, "classes": self.classes, "from": current.number}

    def status(self) -> dict[str, Any]:
        """What this device is and knows, how the machine is, and what `watch` last saw; JSON values."""
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
            "installation": self.facts["installation"],
            "root": str(self.store.root),
            "machine": vitals(self.store.root).to_dict(),
            "watched": watch_state.last_report(self.store.root),
            "warning": self.generation.fallback,
        }

    def history(self) -> dict[str, Any]:
        """Every generation, with what made it in words, and every event, oldest first; JSON values."""
        generations = [{**entry, "what": edit.describe(entry["info"] or {})} for entry in self.store.list()]
        return {
            "generation": self.generation.number,
            "classes": self.classes,
            "generations": generations,
            "events": list(self.store.journal()),
        }
