"""The loop of a service: names what comes from a camera, takes over what is learned meanwhile, and keeps drift counts.

`watch` runs until it is stopped or the stream ends. `watch_state` keeps its counts and its last report.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from device_runtime.device import Device, Prediction
from device_runtime.learning.unknown import UNKNOWN
from device_runtime.service import systemd
from device_runtime.service.consensus import Consensus
from device_runtime.service.drift import Monitor, Reference
from device_runtime.service.frames import Folder, Newest, Sparingly, mjpeg
from device_runtime.store import watch_state
from ssd_edge import images
from ssd_edge.errors import InputError, SSDEdgeError

log = logging.getLogger(__name__)

LOOK = 0.5  # seconds between two looks at a folder
SHARE = 0.2  # of the time is spent on looking at a folder, at most
NAP = 0.1  # seconds; a signal does not end a sleep
REFRESH, STATUS, SAVE = 1.0, 10.0, 60.0  # seconds between two


@dataclasses.dataclass(frozen=True)
class Answer:
    """The prediction for one image.

    Attributes:
        image: Path of the image; None for a frame of a stream.
        frame: Number of the frame in the stream; None for a file.
        label: Predicted class, or ``unknown``.
        nearest: Nearest class.
        score: Probability of the nearest class.
        generation: Number of the generation that answered.
        stable: For a stream, the `Consensus` of the last frames, or None if they do not agree.
        monotonic: Time of the prediction in seconds since boot.
    """

    image: str | None
    frame: int | None
    label: str
    nearest: str
    score: float
    generation: int
    stable: str | None
    monotonic: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: ``image`` for a file, ``frame`` and ``stable`` for a frame, and the other attributes."""
        values = dataclasses.asdict(self)
        for name in ("image",) if self.image is None else ("frame", "stable"):
            del values[name]
        return values


def watch(
    device: Device,
    source: Path | BinaryIO,
    answer: Callable[[Answer], object],
    *,
    existing: bool = False,
    every: float | None = None,
    ready: Callable[[], object] = lambda: None,
    stopped: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Name images as they come, until the stream ends or `stopped`; the image at hand is finished.

    A damaged image, a full disk and a learn that cannot be taken over are logged, and it goes on. A device without
    classes waits for the first.

    Args:
        device: opened; nobody else may use it meanwhile.
        source: a folder that fills, see `frames.Folder`; or a stream of JPEGs, of which the newest is taken.
        answer: called with one JSON object an image: ``image`` (its path) or ``frame`` (its number in the stream),
            ``label``, ``nearest``, ``score``, ``generation`` (see `Prediction`), ``monotonic`` (when it was taken over,
            seconds since this boot), and for a stream ``stable``, the `Consensus` of the last frames or None.
        existing: name also the images that are in the folder at the start.
        every: seconds between two looks at the folder, or between two frames; None: `LOOK`, or each frame.
        ready: called once the backbone has run; before, an engine may be built for minutes.
        stopped: asked after every image and several times a second.
        clock: monotonic seconds.

    Returns:
        How many images were named.

    Raises:
        InputError: the source is no folder.
        SlowerProviderError, EnvironmentUnfitError, BundleRefusedError: the backbone cannot run here.
    """
    feed: _Files | _Stream
    if isinstance(source, str | Path):
        feed = _Files(Path(source), existing, every, clock)
    else:
        feed = _Stream(source, every, clock)
    loop = _Loop(device, feed, answer, clock)
    loop.start()
    ready()
    try:
        while not stopped() and not feed.ended:
            begun = clock()
            if known := loop.knows_classes():
                for name, pixels in feed.images(lambda: device.bundle.size):
                    loop.predict(name, pixels)
                    loop.upkeep()
                    if stopped():
                        break
            until = begun + (feed.pause() if known else LOOK)
            loop.upkeep()
            while clock() < until and not stopped():
                time.sleep(loop.heart.pause(min(NAP, max(until - clock(), 0))))
                loop.upkeep()
    finally:
        loop.close()
    return loop.named


class _Files:
    """A folder as a source of images."""

    ended = False

    def __init__(self, path: Path, existing: bool, every: float | None, clock: Callable[[], float]) -> None:
        self.name, self._folder = str(path), Folder(path, existing, clock)
        self._every = LOOK if every is None else every
        self._trouble = Sparingly(clock)

    def images(self, size: Callable[[], int]) -> Iterator[tuple[str, np.ndarray]]:
        try:
            yield from self._folder.images(size)
        except OSError as error:  # a card that was pulled out, a share that is gone
            self._trouble.warn(f"{self.name} cannot be read ({error}); it is tried again")

    def skip(self) -> None:
        """Without classes: what comes meanwhile is named later."""

    def pause(self) -> float:
        """Seconds from look to look; a folder of a hundred thousand images is looked at less often."""
        return max(self._every, self._folder.seconds / SHARE)

    def settle(self, prediction: Prediction, at: float) -> tuple[str | None, bool]:
        """What else to answer, and whether the image counts for drift: here each is an event of its own."""
        return None, True


class _Stream:
    """A stream as a source of images."""

    name = "a stream"

    def __init__(self, stream: BinaryIO, every: float | None, clock: Callable[[], float]) -> None:
        self._newest, self._every = Newest(mjpeg(stream)), every or 0.0
        self._consensus = Consensus(gap=max(2.0, 3 * self._every))
        self._damaged = Sparingly(clock)
        self._generation, self._stable = 0, ""

    @property
    def ended(self) -> bool:
        return self._newest.ended

    def images(self, size: Callable[[], int]) -> Iterator[tuple[int, np.ndarray]]:
        taken = self._newest.take(NAP)
        if taken is None:
            return
        try:
            pixels = images.decode(taken[1], f"frame {taken[0]}", size())
        except InputError as error:
            self._damaged.warn(str(error))
            return
        yield taken[0], pixels

    def skip(self) -> None:
        """Without classes: frames pass."""
        self._newest.take(0)

    def pause(self) -> float:
        return self._every

    def settle(self, prediction: Prediction, at: float) -> tuple[str | None, bool]:
        """The stable answer. A frame counts for drift where that changes: a still part is one image, not thirty."""
        if prediction.generation != self._generation:
            self._consensus.reset()
            self._generation = prediction.generation
        stable = self._consensus.add(prediction.label, prediction.score, at)
        event = stable is not None and stable != self._stable
        self._stable = self._stable if stable is None else stable
        return stable, event


class _Loop:
    """What `watch` does beside getting images."""

    def __init__(
        self,
        device: Device,
        feed: _Files | _Stream,
        answer: Callable[[Answer], object],
        clock: Callable[[], float],
    ) -> None:
        self._device, self._feed, self._answer, self._clock = device, feed, answer, clock
        self.heart = systemd.Heartbeat(clock)
        self.named = 0
        self._saved = 0  # of `named`
        self._monitor: Monitor | None = None
        self._current: tuple[int, ...] | None = None  # see `_mark`
        self._level = self._last = ""
        self._idle = False
        self._trouble = Sparingly(clock)
        self._due = dict.fromkeys((REFRESH, STATUS, SAVE), clock())

    def start(self) -> None:
        """Run the backbone once, which may build an engine first; go on counting where the last process ended."""
        size = self._device.bundle.size
        self._device.embed([np.zeros((size, size, 3), np.uint8)])
        found = watch_state.load(self._device.store.root)
        self._count_with(found[0] if found else None)
        self._due |= {period: self._clock() + period for period in (STATUS, SAVE)}
        systemd.notify("READY=1", f"watching {self._feed.name}")

    def knows_classes(self) -> bool:
        """Whether there is anything to name; said once when not."""
        if self._device.classes:
            self._idle = False
            return True
        if not self._idle:
            told = "this device knows no class yet and waits; teach it one: ssd-edge device learn --label NAME FOLDER"
            log.warning(told)
            systemd.notify("", told)
        self._idle = True
        self._feed.skip()
        return False

    def predict(self, name: str | int, pixels: np.ndarray) -> None:
        """Answer one image and count it."""
        at = self._clock()
        try:
            seen = self._device.observe([pixels])
        except InputError as error:
            log.warning("%s was not named: %s", name, error)
            return
        (found,) = seen.predictions
        stable, event = self._feed.settle(found, at)
        if event and self._monitor is not None:
            self._monitor.add(seen.embeddings, [found.score], [found.label != UNKNOWN])
        self.named, self._last = self.named + 1, found.label
        self._answer(
            Answer(
                image=name if isinstance(name, str) else None,
                frame=name if isinstance(name, int) else None,
                label=found.label,
                nearest=found.nearest,
                score=round(found.score, 6),
                generation=found.generation,
                stable=stable,
                monotonic=round(at, 3),
            )
        )

    def upkeep(self) -> None:
        """What is due: a heartbeat, a look for a new generation, the status, the counts."""
        self.heart.beat()
        now = self._clock()
        for period, work in ((REFRESH, self._refresh), (STATUS, self._tell), (SAVE, self._save)):
            if now >= self._due[period]:
                self._due[period] = now + period
                work()

    def close(self) -> None:
        """Say that it stops, and keep the counts."""
        systemd.notify("STOPPING=1", "stopping")
        self._save()

    def _refresh(self) -> None:
        current = self._mark()
        if current == self._current:  # `Device.refresh` would read and verify some megabytes every second
            return
        try:
            changed = self._device.refresh()
        except (SSDEdgeError, OSError) as error:
            number = self._device.generation.number
            self._trouble.warn(f"generation {number} goes on answering: the current one cannot be taken over ({error})")
            return
        self._current = current
        if changed:
            log.info("generation %d answers now: %s", self._device.generation.number, ", ".join(self._device.classes))
            self._count_with(None if self._monitor is None else self._monitor.state())

    def _mark(self) -> tuple[int, ...]:
        """What differs after every commit: CURRENT is replaced by each."""
        try:
            about = (self._device.store.root / "CURRENT").stat()
        except OSError:
            return ()
        return about.st_ino, about.st_mtime_ns, about.st_ctime_ns

    def _count_with(self, counts: Mapping[str, np.ndarray] | None) -> None:
        """A monitor for the generation that answers, with the counts so far where they fit its classes."""
        try:
            reference = Reference(self._device.statistics)
        except InputError:  # no classes yet
            self._monitor = None
            return
        self._monitor = Monitor(reference) if counts is None else Monitor.from_state(reference, counts)

    def _tell(self) -> None:
        level = "collecting" if self._monitor is None else self._monitor.report().level
        last = f", the last: {self._last}" if self._last else ""
        systemd.notify("", f"generation {self._device.generation.number}: {self.named} images{last}; drift: {level}")

    def _save(self) -> None:
        if self._monitor is None or self._saved == self.named:
            return
        report = self._monitor.report()
        if report.level != self._level and report.level in ("moderate", "drifted"):
            log.warning("what the camera shows has changed (drift: %s, index %s)", report.level, report.psi)
        self._level = report.level
        fields = {"report": report.to_dict(), "named": self.named, "generation": self._device.generation.number}
        try:
            watch_state.save(self._device.store.root, self._monitor.state(), fields, self._clock())
        except (SSDEdgeError, OSError) as error:
            log.warning("the drift counts were not kept: %s", error)
            return
        self._saved = self.named
