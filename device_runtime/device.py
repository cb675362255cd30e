"""`Device`: predict, learn new classes, and undo it.

Example:
    >>> from device_runtime import Device
    >>> with Device.open("/data/ssd-edge") as device:
    ...     device.learn("gear", ["photos/1.jpg", "photos/2.jpg", "photos/3.jpg"])
    ...     print(device.predict(["frame.jpg"])[0].label)
    ...     device.rollback()

Every change commits a new generation as its last step; until then nothing changes. Images are file paths, PIL images,
or uint8 arrays ``(H, W)`` or ``(H, W, 3)`` in RGB order (OpenCV returns BGR: reverse the last axis). Only learning and
what needs a learner import PyTorch.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from device_runtime.backbone import remembered
from device_runtime.backbone.interface import DeviceEmbedder
from device_runtime.backbone.sources import ImageSource, decode, image_name, refuse_bad
from device_runtime.install.answering import Answering
from device_runtime.install.installed import InstalledBundle
from device_runtime.learning.budget import Budget, Meter, Watcher
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
    describe,
)
from device_runtime.store import watch_state
from device_runtime.store.generations import Generations
from device_runtime.store.record import Generation
from ssd_edge import files
from ssd_edge.answers.head import NAME as HEAD
from ssd_edge.answers.head import confidence
from ssd_edge.classes import UNKNOWN, ClassRegistry
from ssd_edge.errors import BadFilesError, BundleRefusedError, InputError, require
from ssd_edge.images import check_embedded, listed
from ssd_edge.images.second import second_view

if TYPE_CHECKING:
    import torch

    from device_runtime.learning.guard import Limits
    from device_runtime.learning.state import DeviceState
    from ssd_edge.bundle import Bundle
    from ssd_edge.learners import Learner
    from ssd_edge.learners.closed_form.sums import ClassStatistics

C = TypeVar("C", bound=Change)

log = logging.getLogger(__name__)

NAMED = 5  # classes that `history` names of one learn
# Images that are decoded before they are embedded: 5 MB at 224 × 224 pixels. A learn is cancelled between two batches.
DECODE_BATCH = 32


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


class Snapshot:
    """A generation in memory: what answers, and, once it is needed, what learns.

    Args:
        generation: The generation.
        state: Its state, if it is in memory already.

    Attributes:
        generation: The generation.
        answering: What answers; the following are its parts.
        registry: The classes.
        bundle: The installed bundle.
        probe: Bytes of the bundle's probe, see `selftest`.
        head: What gives the scores.
        unknown: Thresholds for ``unknown``.
    """

    def __init__(self, generation: Generation, state: DeviceState | None = None) -> None:
        self.generation = generation
        self._state, self._loading = state, threading.Lock()
        # a generation from before heads were kept has none
        self.answering = Answering.read(generation.read, None if HEAD in generation.files else self.state.head())
        self.registry, self.bundle, self.probe = self.answering.registry, self.answering.bundle, self.answering.probe
        self.head, self.unknown = self.answering.head, self.answering.unknown

    @property
    def state(self) -> DeviceState:
        """Learner, statistics and all else, read on first use.

        Raises:
            BundleRefusedError: It is damaged, or was pruned in the meantime.
            EnvironmentUnfitError: PyTorch is not installed.
        """
        with self._loading:
            if self._state is None:
                require_torch()
                from device_runtime.learning.state import DeviceState

                self._state = DeviceState.read(self.generation.read)
            return self._state

    @property
    def whole(self) -> bool:
        """True once `state` is in memory."""
        return self._state is not None

    def scores(self, embeddings: np.ndarray) -> np.ndarray:
        """Return the scores of embeddings ``(N, D)``, float32 ``(N, C)``."""
        if not self.head.without:
            return self.head.score(embeddings)
        return self.state.scores(embeddings)


@dataclasses.dataclass(frozen=True)
class Observation:
    """Result of `Device.observe`.

    Attributes:
        predictions: One per image; none while the device knows no class.
        embeddings: float32 ``(N, D)``.
        snapshot: The generation that predicted.
    """

    predictions: list[Prediction]
    embeddings: np.ndarray
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
        self._use(store.read_current(Snapshot))

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
            snapshot = self.store.read_current(self._newer)
            if snapshot is not None:
                self._use(snapshot)
            return snapshot is not None

    def _newer(self, generation: Generation) -> Snapshot | None:
        """Return a generation in memory, like the current one with its state; None for the current one itself."""
        if generation == self.generation:
            return None
        snapshot = Snapshot(generation)
        if self.snapshot.whole:
            _ = snapshot.state  # now, while `Generations.read_current` starts again if it is pruned
        return snapshot

    def at(self, number: int) -> Snapshot:
        """Return a generation in memory, which `observe` can predict with; the current one is not replaced.

        Raises:
            InputError: It does not exist, was pruned or is damaged, or its backbone is not that of the current one.
        """
        current = self.snapshot
        if number == current.generation.number:
            return current
        generation = self.store.get(number)
        if generation.backbone != current.generation.backbone:
            raise InputError(
                f"generation {number} has another backbone than the current one, {current.generation.number}; to "
                f"predict with it, return to it: ssd-edge device rollback {number}"
            )
        return Snapshot(generation)

    @property
    def generation(self) -> Generation:
        """The current generation."""
        return self.snapshot.generation

    @property
    def state(self) -> DeviceState:
        """Classes, learner and thresholds of the current generation; needs PyTorch."""
        try:
            return self.snapshot.state
        except BundleRefusedError:
            if not self.refresh():  # it was not pruned, but is damaged
                raise
            return self.snapshot.state

    @property
    def registry(self) -> ClassRegistry:
        """The classes."""
        return self.snapshot.registry

    @property
    def learner(self) -> Learner:
        """The learner. Do not teach it; use `learn`."""
        return self.state.learner

    @property
    def statistics(self) -> ClassStatistics:
        """Statistics of the embeddings of each class."""
        return self.state.statistics

    @property
    def bundle(self) -> InstalledBundle:
        """The installed bundle."""
        return self.snapshot.bundle

    @property
    def embedder(self) -> DeviceEmbedder:
        """The backbone, started on first use; an engine that does not fit this machine is built again."""
        return self._embedder_of(self.snapshot)

    @property
    def classes(self) -> list[str]:
        """Class names by row."""
        return self.registry.names

    def embed(self, sources: ImageSource | Sequence[ImageSource]) -> torch.Tensor:
        """Return standardised embeddings of images, float32 ``(N, D)``; needs PyTorch.

        Raises:
            InputError: An image cannot be read, or the backbone gives NaN for it; the message names it.
        """
        import torch

        return torch.from_numpy(self._embed(self.snapshot, listed(sources)))

    def observe(
        self,
        sources: ImageSource | Sequence[ImageSource],
        reject: bool = True,
        names: Sequence[str] | None = None,
        snapshot: Snapshot | None = None,
    ) -> Observation:
        """Predict the class of each image and return the embeddings as well, all by one generation.

        Args:
            sources: The images, or one.
            reject: Predict `UNKNOWN` for images that are too far from every class.
            names: Names of the images for results and messages; None for their paths, or ``image 0``, … for arrays.
            snapshot: The generation that predicts, see `at`; None for the current one.

        Raises:
            InputError: Images cannot be read (the message names all), or the backbone gives NaN for one.
        """
        sources = listed(sources)
        snapshot = self.snapshot if snapshot is None else snapshot  # read once: another thread may replace it
        classes = snapshot.registry.names
        names = _names(sources) if names is None else names
        embeddings = self._embed(snapshot, sources, names=names)
        if not classes:
            return Observation([], embeddings, snapshot)
        scores, found = snapshot.scores(embeddings), snapshot.head.temperatures
        rows = scores.argmax(1)
        shares = [None] * len(rows) if found is None else confidence(scores, found).tolist()
        margins = snapshot.unknown.margins(embeddings, rows).tolist()
        number = snapshot.generation.number
        predictions = [
            Prediction(name, classes[row] if margin >= 0 or not reject else UNKNOWN, best, number, classes[row], margin)
            for name, row, best, margin in zip(names, rows.tolist(), shares, margins, strict=True)
        ]
        return Observation(predictions, embeddings, snapshot)

    def predict(self, sources: ImageSource | Sequence[ImageSource], reject: bool = True) -> list[Prediction]:
        """Predict the class of each image, or of one, or `UNKNOWN`; see `observe`.

        Raises:
            InputError: As `observe`, or the device knows no class yet.
        """
        sources, snapshot = listed(sources), self.snapshot
        if not snapshot.registry.names:
            raise InputError("this device knows no class yet; teach it one: ssd-edge device learn --label NAME FOLDER")
        return self.observe(sources, reject, snapshot=snapshot).predictions

    def learn(
        self,
        label: str,
        sources: ImageSource | Sequence[ImageSource],
        limits: Limits | None = None,
        budget: Budget | None = None,
        watcher: Watcher | None = None,
    ) -> LearnResult:
        """Learn one class; see `learn_all`."""
        return self.learn_all({label: sources}, limits, budget, watcher)

    def learn_all(
        self,
        images: Mapping[str, ImageSource | Sequence[ImageSource]],
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
            InputError: A name is invalid, there are too few images, or some cannot be read (the message names all);
                nothing is changed.
            GateRefusedError: The device would forget more than `limits` allow, would not recognise the new images, the
                learner would give NaN, or the budget is too small; nothing is changed.
        """
        meter = Meter(budget, watcher)
        with self.store.writer():  # from reading to committing, so that no other process commits in between
            snapshot = self._latest()
            state = snapshot.state
            import torch

            from device_runtime.learning import exchange, teach

            def embed(
                sources: Sequence[ImageSource], progress: Callable[[float], object], second: bool
            ) -> torch.Tensor:
                return torch.from_numpy(self._embed(snapshot, sources, progress, second=second))

            taught = exchange.taught_sets(self.store, snapshot.generation)
            number = snapshot.generation.number
            given = {label: listed(sources) for label, sources in images.items()}
            try:
                change = teach.teach(state, given, embed, number, limits, meter, taught)
            except BadFilesError:
                raise
            except InputError:
                every = [source for sources in given.values() for source in sources]
                refuse_bad(every, _names(every), snapshot.bundle.pixels)
                raise
            return self._commit(*change)

    def rename(self, label: str, new: str) -> RenameResult:
        """Rename a class and commit a generation; the learner does not change.

        Raises:
            InputError: There is no such class, or the new name is invalid or taken.
        """
        with self.store.writer():
            snapshot = self._latest()
            row = snapshot.registry.row_of(label)
            registry = snapshot.registry.rename(label, new)
            contents = {name: snapshot.generation.read(name) for name in snapshot.generation.files}
            contents["classes.json"] = files.json_bytes(registry.to_json())
            state = snapshot.state.replace(registry=registry) if snapshot.whole else None
            return self._commit_contents(
                contents, state, RenameResult(renamed=(snapshot.registry.names[row], registry.names[row]))
            )

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
            state = self._latest().state
            from device_runtime.learning import edit

            return self._commit(*edit.forget(state, label, exactly, limits))

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
            state = self._latest().state
            from device_runtime.learning import edit

            return self._commit(*edit.merge_labels(state, labels, into, limits))

    def export(self, path: str | Path, key: str | Path | None = None, history: bool = True) -> ExportResult:
        """Write the current generation as a bundle, for another device or as a backup.

        Args:
            path: Path of the bundle; its stem becomes the bundle's name.
            key: File of a private key to sign it with; None for an unsigned bundle.
            history: List the changes since the bundle was deployed in the model card, and number the generation.

        Raises:
            InputError: The path is a folder, or there is no such key.
        """
        from ssd_edge import bundle as bundles

        packed, opened, generation = self._packed(Path(path).stem, key, history)
        bundles.write(Path(path), packed)
        return ExportResult(
            bundle=str(path),
            bytes=len(packed),
            sha256=opened.sha256,
            generation=generation.number,
            classes=opened.registry.names,
            signed_by=opened.signature.key if opened.signature else None,
        )

    def exported(self, name: str, history: bool = True) -> bytes:
        """Return the current generation as the bytes of an unsigned bundle; see `export`.

        Args:
            name: Name of the bundle.
            history: As for `export`.
        """
        return self._packed(name, None, history)[0]

    def _packed(self, name: str, key: str | Path | None, history: bool) -> tuple[bytes, Bundle, Generation]:
        from device_runtime.learning.export import export

        snapshot = self.snapshot
        try:
            packed = export(self.store, snapshot.generation, snapshot.answering, snapshot.scores, name, key, history)
        except BundleRefusedError:
            if not self.refresh():  # it was not pruned, but is damaged
                raise
            return self._packed(name, key, history)
        return *packed, snapshot.generation

    def merge(self, bundle: str | Path | bytes, limits: Limits | None = None) -> MergeResult:
        """Add what another device has learned since both installed one bundle, and commit a generation.

        The result is the state of one device that had been taught everything; classes with the same name become one.
        To continue from the merged state on both devices, export it and install it on both.

        Args:
            bundle: Path of the bundle that the other device has exported, or its bytes.
            limits: Limits on forgetting the classes of this device; None for the defaults of `guard.Limits`.

        Raises:
            InputError: There is no such file, the devices did not install one bundle, something would count twice, or
                the learner does not support it; nothing is changed.
            BundleRefusedError: The bundle is damaged, or not signed by a trusted key where there is one.
            GateRefusedError: The device would forget more than `limits` allow.
        """
        from device_runtime.install.trust import check_signature
        from ssd_edge import bundle as bundles

        # its backbone is not run
        if isinstance(bundle, bytes):
            opened = bundles.parse(bundle, allow_control_flow=True)
        else:
            opened = bundles.read(bundle, allow_control_flow=True)
        check_signature(self.store.root, opened)
        with self.store.writer():
            state = self._latest().state
            from device_runtime.learning import exchange

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
                self._use(Snapshot(generation))
            return self._completed(result)

    def status(self) -> Status:
        """Return classes, learner, bundle and machine, and the last report of ``watch``."""
        snapshot, head = self.snapshot, self.snapshot.head
        bundle, entries = snapshot.bundle, snapshot.registry.entries
        started = remembered.last(self.store.root, snapshot.generation.backbone)
        return Status(
            generation=snapshot.generation.number,
            classes=snapshot.registry.names,
            images={entry.name: entry.images for entry in entries},
            learned_here=[entry.name for entry in entries if entry.origin == "device"],
            learner=head.learner,
            replay=head.replay,
            state_bytes=head.state_bytes,
            provider=started.provider if started else None,
            bundle=bundle.name,
            release=bundle.release,
            signed_by=bundle.signed_by,
            precision=bundle.precision,
            installation=bundle.installation,
            root=str(self.store.root),
            machine=vitals(self.store.root),
            watched=watch_state.last_report(self.store.root),
            warning=snapshot.generation.fallback,
            note=started.note if started else "",
            answers_with="NumPy" if not head.without else f"PyTorch: {head.without}",
        )

    def history(self) -> History:
        """Return all generations with the change that created each, and all events of the journal."""
        generations = [
            HistoryEntry(**vars(entry), what=describe(entry.info or {}, NAMED)) for entry in self.store.list()
        ]
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
        second: bool = False,
    ) -> np.ndarray:
        bundle, embedder = snapshot.bundle, self._embedder_of(snapshot)
        names = _names(sources) if names is None else names
        parts = []
        progress(0.0)
        for start in range(0, len(sources), DECODE_BATCH):
            batch = zip(sources[start : start + DECODE_BATCH], names[start : start + DECODE_BATCH], strict=True)
            try:
                pixels = [decode(source, name, bundle.pixels) for source, name in batch]
            except InputError:
                refuse_bad(sources, names, bundle.pixels)
                raise
            stacked = np.stack(pixels)
            parts.append(embedder.embed(second_view(stacked) if second else stacked))
            progress((start + len(pixels)) / len(sources))
        embeddings = np.concatenate(parts) if parts else np.zeros((0, bundle.dim), np.float32)
        check_embedded(embeddings, names)
        return embeddings

    def _embedder_of(self, snapshot: Snapshot) -> DeviceEmbedder:
        backbone = snapshot.generation.backbone
        with self._starting:
            if backbone not in self._embedders:
                from device_runtime.backbone.embedder import open_embedder  # takes a tenth of a second

                probe = files.parse_tensors(snapshot.probe, "probe.safetensors")
                spec = snapshot.bundle.backbone_spec(backbone)
                embedder = open_embedder(self.store, spec, probe, log.warning, self.strict, once=True)
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
        return self._commit_contents(*state.verified_contents(), change)

    def _commit_contents(self, contents: Mapping[str, bytes], state: DeviceState | None, change: C) -> C:
        """Commit the files of a generation; `state` is what they hold, if it is in memory."""
        with self._following:
            generation = self.store.commit(contents, change.info(), parent=self.generation.number)
            self.store.tidy()
            self._use(Snapshot(generation, state))
        return self._completed(change)

    def _completed(self, change: C) -> C:
        return dataclasses.replace(change, generation=self.generation.number, classes=self.classes)


def require_torch() -> None:
    """Load PyTorch, which learning and what needs a learner use.

    Raises:
        EnvironmentUnfitError: It is not installed.
    """
    require("torch", "device", "learn", "'ssd-edge[device]', on a Jetson use that of JetPack")


def _names(sources: Sequence[ImageSource]) -> list[str]:
    return [image_name(source, number) for number, source in enumerate(sources)]
