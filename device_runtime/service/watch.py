"""The loop of the camera service, which predicts until it is stopped or the stream ends."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from device_runtime.device import Device, Prediction
from device_runtime.service import systemd
from device_runtime.service.camera import Camera
from device_runtime.service.consensus import StableAnswer
from device_runtime.service.counts import SAVE, Counts
from device_runtime.service.follower import REFRESH, Follower
from device_runtime.service.frames import SCAN, Folder, Newest, RateLimitedWarning, mjpeg
from ssd_edge import images
from ssd_edge.errors import InputError
from ssd_edge.images import Pixels

log = logging.getLogger(__name__)

STATUS = 10.0  # seconds between two status lines for systemd
NAP = 0.1  # seconds; a signal does not end a sleep


@dataclasses.dataclass(frozen=True)
class Answer:
    """The prediction for one image.

    Attributes:
        image: Path of the image; None for a frame of a stream.
        frame: Number of the frame in the stream; None for a file.
        label: Predicted class, or ``unknown``.
        nearest: Nearest class.
        score: Probability of the nearest class, see `Prediction`; None while none can be given.
        generation: Number of the generation that answered.
        stable: For a stream, the `Consensus` of the last frames, or None if they do not agree.
        monotonic: Time of the prediction in seconds since boot.
    """

    image: str | None
    frame: int | None
    label: str
    nearest: str
    score: float | None
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
    source: Path | Camera | BinaryIO,
    answer: Callable[[Answer], object],
    *,
    existing: bool = False,
    recursive: bool = False,
    every: float | None = None,
    ready: Callable[[], object] = lambda: None,
    stopped: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Predict the class of each new image, until the stream ends or `stopped` returns True.

    A damaged image, one for which the backbone gives NaN, a full disk and a generation that cannot be read are logged
    and do not stop the loop. A device without classes waits for its first class.

    Args:
        device: An open device, used by no other thread meanwhile.
        source: A folder of images, see `frames.Folder`, a camera, or a stream of JPEGs, see `frames.mjpeg`. Frames that
            arrive during a prediction are skipped except for the newest.
        answer: Called with the answer for each image.
        existing: Include the images that are in the folder at the start.
        recursive: Include the subfolders of the folder.
        every: Seconds between two scans of the folder, or between two frames; None for `SCAN`, or for every frame.
        ready: Called when the backbone has run for the first time. Before that, an engine may be built for minutes.
        stopped: Called after every image and several times per second.
        clock: Monotonic clock in seconds.

    Returns:
        Number of predicted images.

    Raises:
        InputError: The source is not a folder.
        SlowerProviderError, EnvironmentUnfitError, BundleRefusedError: The backbone cannot run on this machine.
    """
    feed: _Files | _Stream
    if isinstance(source, str | Path):
        feed = _Files(Path(source), existing, recursive, every, clock)
    elif isinstance(source, Camera):
        feed = _Stream(source.name, source.frames(), every, clock, source.close)
    else:
        feed = _Stream("a stream", mjpeg(source), every, clock)
    loop = _Loop(device, feed, answer, clock)
    loop.start()
    ready()
    try:
        while not stopped() and not feed.ended:
            begun = clock()
            if known := loop.knows_classes():
                for name, pixels in feed.images(lambda: device.bundle.pixels):
                    loop.predict(name, pixels)
                    loop.upkeep()
                    if stopped():
                        break
            until = begun + (feed.pause() if known else SCAN)
            loop.upkeep()
            while clock() < until and not stopped():
                time.sleep(loop.heart.pause(min(NAP, max(until - clock(), 0))))
                loop.upkeep()
    finally:
        feed.close()
        loop.close()
    return loop.counts.named


class _Files:
    """A folder as a source of images."""

    ended = False

    def __init__(
        self, path: Path, existing: bool, recursive: bool, every: float | None, clock: Callable[[], float]
    ) -> None:
        self.name, self._folder = str(path), Folder(path, existing, clock, recursive)
        self._every = SCAN if every is None else every
        self._warning = RateLimitedWarning(clock)

    def images(self, form: Callable[[], Pixels]) -> Iterator[tuple[str, np.ndarray]]:
        try:
            yield from self._folder.images(form)
        except OSError as error:  # e.g. a removed card or a lost network share
            self._warning.warn(f"{self.name} cannot be read ({error}); retrying", "folder_lost")

    def close(self) -> None:
        """Do nothing: there is nothing to end."""

    def skip(self) -> None:
        """Do nothing: images that arrive before the first class are predicted later."""

    def pause(self) -> float:
        """Return the seconds between two scans, which are more for a folder that takes long to scan."""
        return self._folder.pause(self._every)

    def settle(self, prediction: Prediction, at: float) -> tuple[str | None, bool]:
        """Return the stable answer (None for files) and whether the image counts for drift (always)."""
        return None, True


class _Stream:
    """A stream as a source of images."""

    def __init__(
        self,
        name: str,
        frames: Iterable[bytes],
        every: float | None,
        clock: Callable[[], float],
        close: Callable[[], object] = lambda: None,
    ) -> None:
        self.name, self.close, self._newest, self._every = name, close, Newest(frames), every or 0.0
        self._stable = StableAnswer(self._every)
        self._warning = RateLimitedWarning(clock)

    @property
    def ended(self) -> bool:
        return self._newest.ended

    def images(self, form: Callable[[], Pixels]) -> Iterator[tuple[int, np.ndarray]]:
        taken = self._newest.take(NAP)
        if taken is None:
            return
        try:
            pixels = images.decode(taken[1], f"frame {taken[0]}", form())
        except InputError as error:
            self._warning.warn(str(error), "bad_frame")
            return
        yield taken[0], pixels

    def skip(self) -> None:
        """Drop the frames that arrive before the first class."""
        self._newest.take(0)

    def pause(self) -> float:
        return self._every

    def settle(self, prediction: Prediction, at: float) -> tuple[str | None, bool]:
        """Return the stable answer and whether the frame counts for drift, which is when that answer changes."""
        return self._stable.add(prediction.label, prediction.score, prediction.generation, at)


class _Loop:
    """Predictions and periodic work of `watch`."""

    def __init__(
        self,
        device: Device,
        feed: _Files | _Stream,
        answer: Callable[[Answer], object],
        clock: Callable[[], float],
    ) -> None:
        self._device, self._feed, self._answer, self._clock = device, feed, answer, clock
        self.heart = systemd.Heartbeat(clock)
        self.counts = Counts(device, clock=clock)
        self._follower = Follower(device, self.counts.follow, clock)
        self._due = dict.fromkeys((REFRESH, STATUS, SAVE), clock())
        self._idle = False

    def start(self) -> None:
        """Run the backbone once, which may build an engine, and continue with the stored drift counts."""
        size = self._device.bundle.size
        self._device.embedder.embed(np.zeros((1, size, size, 3), np.uint8))  # whatever it gives for a black image
        self.counts.start()
        self._due |= {period: self._clock() + period for period in (STATUS, SAVE)}
        systemd.notify("READY=1", f"watching {self._feed.name}")
        device = self._device
        text = "ready: watching %s with generation %d, %d classes, on %s"
        known = device.generation.number, len(device.classes), device.embedder.provider
        log.info(text, self._feed.name, *known, extra={"code": "ready"})

    def knows_classes(self) -> bool:
        """Return True if the device has classes; otherwise log it once."""
        if self._device.classes:
            self._idle = False
            return True
        if not self._idle:
            text = "this device has no classes yet and waits; teach it one: ssd-edge device learn --label NAME FOLDER"
            log.warning(text, extra={"code": "no_classes"})
            systemd.notify("", text)
        self._idle = True
        self._feed.skip()
        return False

    def predict(self, name: str | int, pixels: np.ndarray) -> None:
        """Predict one image, pass on the answer and count the image; skip one that the backbone cannot embed."""
        at = self._clock()
        try:
            seen = self._device.observe([pixels], names=[name if isinstance(name, str) else f"frame {name}"])
        except InputError as error:
            self.counts.skip(error)
            return
        (found,) = seen.predictions
        stable, event = self._feed.settle(found, at)
        self.counts.add(found, seen.embeddings, event)
        self._answer(
            Answer(
                image=name if isinstance(name, str) else None,
                frame=name if isinstance(name, int) else None,
                label=found.label,
                nearest=found.nearest,
                score=None if found.score is None else round(found.score, 6),
                generation=found.generation,
                stable=stable,
                monotonic=round(at, 3),
            )
        )

    def upkeep(self) -> None:
        """Do the work that is due: send a heartbeat, check for a new generation, send the status, save the counts."""
        self.heart.beat()
        now = self._clock()
        for period, work in ((REFRESH, self._follower.look), (STATUS, self._send_status), (SAVE, self.counts.save)):
            if now >= self._due[period]:
                self._due[period] = now + period
                work()

    def close(self) -> None:
        """Notify systemd that the service stops, and save the counts."""
        systemd.notify("STOPPING=1", "stopping")
        self.counts.close()

    def _send_status(self) -> None:
        systemd.notify("", self.counts.look())
