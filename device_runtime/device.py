"""`Device`: predict, learn new classes, and undo it.

Example:
    >>> from device_runtime import Device
    >>> with Device.open("/data/ssd-edge") as device:
    ...     device.learn("gear", ["photos/1.jpg", "photos/2.jpg", "photos/3.jpg"])
    ...     print(device.predict(["frame.jpg"])[0].label)
    ...     device.rollback()

Every change commits a new generation as its last step; until then nothing changes. Images are file paths, PIL images,
or uint8 arrays ``(H, W)`` or ``(H, W, 3)`` in RGB order (OpenCV returns BGR: reverse the last axis).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from device_runtime.backbone.embedder import open_embedder
from device_runtime.backbone.interface import DeviceEmbedder
from device_runtime.install.trust import check_signature
from device_runtime.learning import edit, exchange, teach
from device_runtime.learning.budget import Budget, Meter, Watcher
from device_runtime.learning.guard import Limits
from device_runtime.learning.state import DeviceState, InstalledBundle
from device_runtime.learning.teach import ImageSource
from device_runtime.machine.board import default_root
from device_runtime.machine.vitals import vitals
from device_runtime.results import (
    Change,
    ExportResult,
    ForgetResult,
    History,
    HistoryEntry,
    LearnResult,
    MergeLabelsResult,
    MergeResult,
    RenameResult,
    RollbackResult,
    Status,
)
from device_runtime.store import watch_state
from device_runtime.store.generations import Generations
from device_runtime.store.record import Generation
from ssd_edge import bundle as bundles
from ssd_edge import files, learners
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import InputError
from ssd_edge.images import check_embedded
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.unknown import UNKNOWN

C = TypeVar("C", bound=Change)

log = logging.getLogger(__name__)

DECODE_BATCH = 64  # images that are decoded before they are embedded: 10 MB at 224 × 224 pixels


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Prediction for one image.

    Attributes:
        image: Path of the image, or ``image 0``, … for arrays.
        label: Class name, or ``unknown``.
        score: Probability that `nearest` is right, if the image shows a known class: calibrated on held-out images of
            all classes, again after every learn. None while none are on record that could tell.
        generation: Number of the generation that predicted.
        nearest: The best-scored class, even if the image is ``unknown``.
        margin: Cosine above the threshold of that class; negative for ``unknown``.
    """

    image: str
    label: str
    score: float | None
    generation: int
    nearest: str
    margin: float


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A generation in memory."""

    generation: Generation
    state: DeviceState

    @classmethod
    def read(cls, generation: Generation) -> Snapshot:
        """Load a generation; raises as `DeviceState.read`."""
        return cls(generation, DeviceState.read(generation.read))


@dataclasses.dataclass(frozen=True)
class Observation:
    """Result of `Device.observe`.

    Attributes:
        predictions: One per image.
        embeddings: float32 ``(N, D)``.
        snapshot: The generation that predicted.
    """

    predictions: list[Prediction]
    embeddings: torch.Tensor
    snapshot: Snapshot


class Device:
    """A device opened from its root folder. Create one with `Device.open`.

    Any number of threads may predict while one learns: each call uses one generation, either the one before or the one
    after the commit. Only one thread or process may change the device at a time; a second one gets an error.

    Attributes:
        store: The generations below the root.
        strict: See `open`.
        snapshot: The generation that predicts; replaced as a whole.
    """

    def __init__(self, store: Generations, strict: bool = False) -> None:
        self.store, self.strict = store, strict
        self._starting = threading.Lock()
        # Held from reading or replacing CURRENT until `snapshot` is set. Without it, a thread that has read CURRENT
        # before a commit could set the older generation after it.
        self._following = threading.Lock()
        self._embedders: dict[str, DeviceEmbedder] = {}  # by backbone; only that of `snapshot`
        self._use(store.read_current(Snapshot.read))

    @classmethod
    def open(cls, root: str | Path | None = None, strict: bool = False) -> Device:
        """Open a root in which a bundle is installed.

        Args:
            root: The device's root folder; None for `default_root`.
            strict: Raise `SlowerProviderError` when the backbone is first used and can only run on a slower provider
                than its target is prepared for. Otherwise a warning is logged.

        Raises:
            InputError: No bundle is installed.
            BundleRefusedError: Every generation is damaged.
        """
        return cls(Generations(default_root() if root is None else root), strict)

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *exception: object) -> None:
        self._embedders = {}

    def refresh(self) -> bool:
        """Load the current generation if another process has committed one; return True if it has.

        Raises:
            BundleRefusedError: Every generation is damaged.
        """
        with self._following:
            snapshot = self.store.read_current(
                lambda generation: None if generation == self.generation else Snapshot.read(generation)
            )
            if snapshot is not None:
                self._use(snapshot)
            return snapshot is not None

    @property
    def generation(self) -> Generation:
        """The current generation."""
        return self.snapshot.generation

    @property
    def state(self) -> DeviceState:
        """Classes, learner and thresholds of the current generation."""
        return self.snapshot.state

    @property
    def registry(self) -> ClassRegistry:
        """The classes."""
        return self.state.registry

    @property
    def learner(self) -> learners.Learner:
        """The learner. Do not teach it; use `learn`."""
        return self.state.learner

    @property
    def statistics(self) -> ClassStatistics:
        """Statistics of the embeddings of each class."""
        return self.state.statistics

    @property
    def bundle(self) -> InstalledBundle:
        """The installed bundle."""
        return self.state.bundle

    @property
    def embedder(self) -> DeviceEmbedder:
        """The backbone, started on first use; an engine that does not fit this machine is built again."""
        return self._embedder_of(self.snapshot)

    @property
    def classes(self) -> list[str]:
        """Class names by row."""
        return self.registry.names

    def embed(self, sources: Sequence[ImageSource]) -> torch.Tensor:
        """Return standardised embeddings of images, float32 ``(N, D)``.

        Raises:
            InputError: An image cannot be read, or the backbone gives NaN for it; the message names it.
        """
        return self._embed(self.snapshot, sources)

    def observe(
        self, sources: Sequence[ImageSource], reject: bool = True, names: Sequence[str] | None = None
    ) -> Observation:
        """Predict the class of each image and return the embeddings as well, all by one generation.

        Args:
            sources: The images.
            reject: Predict `UNKNOWN` for images that are too far from every class.
            names: Names of the images for results and messages; None for their paths, or ``image 0``, … for arrays.

        Raises:
            InputError: An image cannot be read, the backbone gives NaN for it, or the device knows no class yet.
        """
        snapshot = self.snapshot  # read once: another thread may replace it
        state = snapshot.state
        classes = state.registry.names
        if not classes:
            raise InputError("this device knows no class yet; teach it one: ssd-edge device learn --label NAME FOLDER")
        names = _names(sources) if names is None else names
        embeddings = self._embed(snapshot, sources, names=names)
        scores = state.learner.scores(embeddings)[:, : len(classes)]
        rows = scores.argmax(1)
        shares = state.record.confidence(scores)
        best = [None] * len(rows) if shares is None else shares.tolist()
        accepted, margins = state.rejector.accepts(embeddings, rows)
        columns = zip(names, rows.tolist(), best, accepted.tolist(), margins.tolist(), strict=True)
        predictions = [
            Prediction(
                name,
                classes[row] if accept or not reject else UNKNOWN,
                score,
                snapshot.generation.number,
                classes[row],
                margin,
            )
            for name, row, score, accept, margin in columns
        ]
        return Observation(predictions, embeddings, snapshot)

    def predict(self, sources: Sequence[ImageSource], reject: bool = True) -> list[Prediction]:
        """Predict the class of each image, or `UNKNOWN`; see `observe`."""
        return self.observe(sources, reject).predictions

    def learn(
        self,
        label: str,
        sources: Sequence[ImageSource],
        limits: Limits | None = None,
        budget: Budget | None = None,
        watcher: Watcher | None = None,
    ) -> LearnResult:
        """Learn one class; see `learn_all`."""
        return self.learn_all({label: sources}, limits, budget, watcher)

    def learn_all(
        self,
        images: Mapping[str, Sequence[ImageSource]],
        limits: Limits | None = None,
        budget: Budget | None = None,
        watcher: Watcher | None = None,
    ) -> LearnResult:
        """Learn classes, new or known, from new images alone, and commit one generation.

        Args:
            images: Class name → images; at least three different ones for each class.
            limits: Limits on forgetting; None for the defaults of `guard.Limits`.
            budget: Limits on time and memory; None for no limits.
            watcher: Called with the progress.

        Raises:
            InputError: A name is invalid, there are too few images, or one cannot be read; nothing is changed.
            GateRefusedError: The device would forget more than `limits` allow, would not recognise the new images, the
                learner would give NaN, or the budget is too small; nothing is changed.
        """
        meter = Meter(budget, watcher)
        with self.store.writer():  # from reading to committing, so that no other process commits in between
            snapshot = self._latest()
            embed = functools.partial(self._embed, snapshot)
            taught = exchange.taught_sets(self.store, snapshot.generation)
            number = snapshot.generation.number
            after, result = teach.teach(snapshot.state, images, embed, number, limits, meter, taught)
            return self._commit(after, result)

    def rename(self, label: str, new: str) -> RenameResult:
        """Rename a class and commit a generation; the learner does not change.

        Raises:
            InputError: There is no such class, or the new name is invalid or taken.
        """
        with self.store.writer():
            state = self._latest().state
            row = state.registry.row_of(label)
            registry = state.registry.rename(label, new)
            renamed = (state.registry.names[row], registry.names[row])
            return self._commit(state.replace(registry=registry), RenameResult(renamed=renamed))

    def forget(self, label: str, exactly: bool = False, limits: Limits | None = None) -> ForgetResult:
        """Remove a class and commit a generation. Older generations contain it until they are pruned
        (``ssd-edge device prune --all-but-current``).

        Args:
            label: Name of the class.
            exactly: Refuse unless the learner can become as if it had never been taught the class.
            limits: Limits on forgetting the other classes; None for the defaults of `guard.Limits`.

        Raises:
            InputError: There is no such class, or it cannot be removed exactly.
            GateRefusedError: The other classes would be recognised less often than `limits` allow.
        """
        with self.store.writer():
            return self._commit(*edit.forget(self._latest().state, label, exactly, limits))

    def merge_labels(self, labels: Sequence[str], into: str, limits: Limits | None = None) -> MergeLabelsResult:
        """Merge several classes into one, as if they had been taught under one name, and commit a generation.

        Args:
            labels: Names of the classes, at least two including `into`.
            into: Name of the merged class: one of `labels`, another known class, or a new name.
            limits: As for `forget`.

        Raises:
            InputError: There is no such class, or the learner does not support it.
            GateRefusedError: The classes would be recognised less often than `limits` allow.
        """
        with self.store.writer():
            return self._commit(*edit.merge_labels(self._latest().state, labels, into, limits))

    def export(self, path: str | Path, key: str | Path | None = None, history: bool = True) -> ExportResult:
        """Write the current generation as a bundle, for another device or as a backup.

        Args:
            path: Path of the bundle; its stem becomes the bundle's name.
            key: File of a private key to sign it with; None for an unsigned bundle.
            history: List the changes since the bundle was deployed in the model card, and number the generation.

        Raises:
            InputError: The path is a folder, or there is no such key.
        """
        return exchange.export(self.store, self.generation, self.state, Path(path), key, history)

    def merge(self, path: str | Path, limits: Limits | None = None) -> MergeResult:
        """Add what another device has learned since both installed one bundle, and commit a generation.

        The result is the state of one device that had been taught everything; classes with the same name become one.
        To continue from the merged state on both devices, export it and install it on both.

        Args:
            path: Path of the bundle that the other device has exported.
            limits: Limits on forgetting the classes of this device; None for the defaults of `guard.Limits`.

        Raises:
            InputError: There is no such file, the devices did not install one bundle, something would count twice, or
                the learner does not support it; nothing is changed.
            BundleRefusedError: The bundle is damaged, or not signed by a trusted key where there is one.
            GateRefusedError: The device would forget more than `limits` allow.
        """
        opened = bundles.read(Path(path), allow_control_flow=True)  # its backbone is not run
        check_signature(self.store.root, opened)
        with self.store.writer():
            state = self._latest().state
            return self._commit(*exchange.merge(state, exchange.installed_state(self.store, state), opened, limits))

    def rollback(self, number: int | None = None) -> RollbackResult:
        """Return to an earlier generation: the parent of the current one, or any by its number.

        Predictions are then bit-identical to those of that generation, on the same machine with the same number of
        threads (docs/device.md). Later generations stay until they are pruned, and can be returned to as well.

        Raises:
            InputError: The current generation has no parent, or the number does not exist.
        """
        with self.store.writer():
            current = self.store.current()
            if number is None:
                number = current.parent
            if number is None:
                others = [str(g.number) for g in self.store.list() if g.number != current.number]
                hint = f"name one of: {', '.join(others)}" if others else "it is the only one"
                raise InputError(f"generation {current.number} was installed, not learned, so it has no parent; {hint}")
            result = RollbackResult(previous=current.number)
            with self._following:
                generation = self.store.set_current(number, "rollback", result.info())
                self._use(Snapshot.read(generation))
            return self._completed(result)

    def status(self) -> Status:
        """Return classes, learner, bundle and machine, and the last report of ``watch``."""
        bundle, entries = self.bundle, self.registry.entries
        return Status(
            generation=self.generation.number,
            classes=self.classes,
            images={entry.name: entry.images for entry in entries},
            learned_here=[entry.name for entry in entries if entry.origin == "device"],
            learner=self.learner.name,
            replay=self.learner.replay,
            state_bytes=self.learner.memory_bytes(),
            provider=self.embedder.provider,
            bundle=bundle.name,
            release=bundle.release,
            signed_by=bundle.signed_by,
            precision=bundle.precision,
            installation=bundle.installation,
            root=str(self.store.root),
            machine=vitals(self.store.root),
            watched=watch_state.last_report(self.store.root),
            warning=self.generation.fallback,
        )

    def history(self) -> History:
        """Return all generations with the change that created each, and all events of the journal."""
        generations = [HistoryEntry(**vars(entry), what=edit.describe(entry.info or {})) for entry in self.store.list()]
        return History(
            generation=self.generation.number,
            classes=self.classes,
            generations=generations,
            events=list(self.store.journal()),
        )

    def _embed(
        self,
        snapshot: Snapshot,
        sources: Sequence[ImageSource],
        progress: Callable[[float], object] = lambda share: None,
        names: Sequence[str] | None = None,
    ) -> torch.Tensor:
        bundle, embedder = snapshot.state.bundle, self._embedder_of(snapshot)
        names = _names(sources) if names is None else names
        parts = []
        for start in range(0, len(sources), DECODE_BATCH):
            batch = zip(sources[start : start + DECODE_BATCH], names[start : start + DECODE_BATCH], strict=True)
            pixels = [teach.decode(source, name, bundle.pixels) for source, name in batch]
            parts.append(embedder.embed(np.stack(pixels)))
            progress((start + len(pixels)) / len(sources))
        embeddings = np.concatenate(parts) if parts else np.zeros((0, bundle.dim), np.float32)
        check_embedded(embeddings, names)
        return torch.from_numpy(embeddings)

    def _embedder_of(self, snapshot: Snapshot) -> DeviceEmbedder:
        backbone = snapshot.generation.backbone
        with self._starting:
            if backbone not in self._embedders:
                state = snapshot.state
                probe = files.parse_tensors(state.probe, "probe.safetensors")
                spec = state.bundle.backbone_spec(backbone)
                embedder = open_embedder(self.store, spec, probe, log.warning, self.strict)
                self._embedders = {backbone: embedder}
            return self._embedders[backbone]

    def _use(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        with self._starting:
            running = self._embedders.get(snapshot.generation.backbone)
            self._embedders = {} if running is None else {snapshot.generation.backbone: running}

    def _latest(self) -> Snapshot:
        """Return the snapshot to change; call it inside `Generations.writer`."""
        self.refresh()
        return self.snapshot

    def _commit(self, state: DeviceState, change: C) -> C:
        """Commit a generation and predict with it from now on; call it inside `Generations.writer`."""
        contents, restored = state.verified_contents()
        with self._following:
            generation = self.store.commit(contents, change.info(), parent=self.generation.number)
            self.store.tidy()
            self._use(Snapshot(generation, restored))
        return self._completed(change)

    def _completed(self, change: C) -> C:
        return dataclasses.replace(change, generation=self.generation.number, classes=self.classes)


def _names(sources: Sequence[ImageSource]) -> list[str]:
    return [teach.image_name(source, number) for number, source in enumerate(sources)]
