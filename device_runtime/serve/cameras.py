"""Cameras of the service: one thread answers the newest frame of each in turn."""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from device_runtime.device import Device, Prediction
from device_runtime.serve.events import Events
from device_runtime.serve.frame import Frame, as_jpeg
from device_runtime.serve.tray import Tray
from device_runtime.service.camera import Camera, is_camera
from device_runtime.service.consensus import StableAnswer
from device_runtime.service.counts import SAVE, Counts
from device_runtime.service.frames import Folder, Newest, RateLimitedWarning
from ssd_edge import files, images
from ssd_edge.classes import UNKNOWN
from ssd_edge.errors import InputError

if TYPE_CHECKING:
    from device_runtime.service.drift import DriftReport  # imports PyTorch

log = logging.getLogger(__name__)

State = Literal["starting", "running", "lost", "ended"]
Listener = Callable[[Frame, np.ndarray, np.ndarray], object]

MOST_FRAMES, MOST_BYTES = 64, 32 * 2**20  # of the recent frames of a camera
EVERY = 0.1  # seconds between two answers of a camera: the device also answers others, and learns
NAP = 0.2  # seconds; the longest wait for a frame
LOOK = 1.0  # seconds between two looks at the generation
ENDING = 25.0  # seconds that the threads get to end; a process must not end in the middle of PyTorch
DRIFT = 10.0  # seconds between two looks at the drift
RATE = 20  # answers of which the rate is the mean
QUIET = 3.0  # seconds without an answer after which the rate is 0
DOUBT = 0.5  # probability below which an answer is in doubt: it is more likely wrong than right
UNSETTLED = 8  # answers in a row without a stable one that are in doubt; a change takes three to five
IN_A_ROW = 2  # frames in doubt before one is kept: a single one shows what moves
_NAMED = re.compile(r"([A-Za-z0-9_-]{1,32})=(.+)", re.DOTALL)


class _FolderSource:
    """New images of a folder as frames.

    Args:
        path: The folder.
        lost: Called with the reason when it cannot be read.
        closed: Set at the end.
    """

    def __init__(self, path: Path, lost: Callable[[str], object], closed: threading.Event) -> None:
        self.name, self._folder, self._lost, self._closed = str(path), Folder(path), lost, closed

    def frames(self) -> Iterator[bytes]:
        """Yield the images as JPEGs until the end."""
        warning = RateLimitedWarning()
        while not self._closed.is_set():
            try:
                for _, jpeg in self._folder.read(as_jpeg):
                    yield jpeg
                    if self._closed.is_set():
                        return
            except OSError as error:  # e.g. a removed card or a lost network share
                warning.warn(f"{self.name} cannot be read ({error}); retrying", "folder_lost")
                self._lost(str(error.strerror or error))
            self._closed.wait(self._folder.pause())

    def close(self) -> None:
        """Do nothing: it ends with the event."""


class CameraFeed:
    """A camera, what it has shown lately, and what was answered; create one with `Cameras`.

    Args:
        name: Id of the camera.
        source: See `Cameras`.
        changed: Notified when there is a new frame.
        tell: Called with the feed when its state has changed.
        every: Seconds between two answers at least.

    Attributes:
        id: Id of the camera.
        name: The source, without a password.
        state: ``starting`` until the first frame, ``running``, ``lost`` while it is opened again, or ``ended``.
        problem: Why it is lost; empty while it runs.

    Raises:
        InputError: There is no such folder or file.
        EnvironmentUnfitError: What reads it is not installed.
    """

    def __init__(
        self,
        name: str,
        source: str,
        changed: threading.Condition,
        tell: Callable[[CameraFeed], object],
        every: float,
    ) -> None:
        self.id, self._changed, self._tell, self._every = name, changed, tell, every
        self.state: State = "starting"
        self.problem = ""
        self._closed = threading.Event()
        self._source: Camera | _FolderSource
        path = Path(source)
        if is_camera(source):
            self._source = Camera(source, self._closed.wait, lost=self._lose)
        elif files.is_folder(path):
            self._source = _FolderSource(path, self._lose, self._closed)
        elif not files.exists(path):
            raise InputError(f"the camera '{source}' is no URL, folder or video; check the path")
        elif images.kind_of(path.name) in ("image", "picture"):
            raise InputError(f"{source} is one image, but a camera needs a video or a folder; name its folder")
        else:
            self._source = Camera(source, self._closed.wait, looped=True, lost=self._lose)
        self.name = self._source.name
        self.every_image = isinstance(self._source, _FolderSource)  # each is an event of its own
        self._stable = StableAnswer(every)
        self._unsettled = self._doubts = 0  # answers in a row without a stable one, and in doubt
        self.due = 0.0  # when the next answer may be given, monotonic seconds
        self._newest: Frame | None = None
        self._recent: collections.deque[Frame] = collections.deque(maxlen=MOST_FRAMES)
        self._recent_bytes = 0
        self._answer: dict[str, Any] | None = None
        self._times: collections.deque[float] = collections.deque(maxlen=RATE)
        self._listeners: list[Listener] = []
        self._lock = threading.Lock()
        self._stream: Newest[Frame] | None = None
        self._skips = RateLimitedWarning()

    def start(self) -> None:
        """Read frames from now on."""
        self._stream = Newest(self._frames(), self._changed, self.every_image)

    def close(self) -> None:
        """End the camera."""
        self._closed.set()
        self._source.close()
        if self._stream is not None:
            self._stream.take(0)  # a folder waits until its image is taken

    def newest(self) -> Frame | None:
        """Return the last frame that has arrived; None before the first."""
        return self._newest

    def recent(self, count: int) -> list[Frame]:
        """Return the last frames that were answered, at most `MOST_FRAMES` and `MOST_BYTES`; the newest is the last."""
        with self._lock:
            return list(self._recent)[-count:] if count > 0 else []

    def listen(self, callback: Listener) -> Callable[[], None]:
        """Have every frame that is answered passed on, in the thread that answers.

        Args:
            callback: Gets the frame, its pixels uint8 ``(size, size, 3)`` and its embedding float32 ``(D,)``.

        Returns:
            What ends it.
        """
        with self._lock:
            self._listeners.append(callback)

        def stop() -> None:
            with self._lock, contextlib.suppress(ValueError):
                self._listeners.remove(callback)

        return stop

    def to_dict(self) -> dict[str, Any]:
        """Return the camera and its last answer as JSON values."""
        with self._lock:
            return {
                "id": self.id,
                "source": self.name,
                "state": self.state,
                "problem": self.problem,
                "frames": 0 if self._newest is None else self._newest.number,
                "fps": self._rate(),
                "latency_ms": None if self._answer is None else self._answer["latency_ms"],
                "answer": self._answer,
            }

    def waits(self) -> bool:
        """Return True if a frame waits for its answer."""
        return self._stream is not None and self._stream.waits

    def take(self) -> Frame | None:
        """Return the frame that waits for its answer; the next one may be given after `every` seconds."""
        taken = None if self._stream is None else self._stream.take(0)
        if taken is None:
            return None
        self.due = 0.0 if self.every_image else time.monotonic() + self._every
        return taken[1]

    def settle(self, prediction: Prediction, at: float) -> tuple[str | None, bool, bool]:
        """Count an answer.

        Args:
            prediction: The prediction for a frame.
            at: When the frame arrived, monotonic seconds.

        Returns:
            The stable answer or None, whether this is an event, which counts for drift, and whether it is in doubt.
        """
        unsure = prediction.label == UNKNOWN or (prediction.score is not None and prediction.score < DOUBT)
        if self.every_image:
            return prediction.label, True, unsure
        stable, event = self._stable.add(prediction.label, prediction.score, prediction.generation, at)
        self._unsettled = 0 if stable is not None else self._unsettled + 1
        self._doubts = self._doubts + 1 if unsure or self._unsettled >= UNSETTLED else 0
        return stable, event, self._doubts >= IN_A_ROW

    def answered(self, frame: Frame, answer: dict[str, Any]) -> None:
        """Keep a frame and its answer."""
        with self._lock:
            self._answer = answer
            self._times.append(time.monotonic())
            if len(self._recent) == self._recent.maxlen:
                self._recent_bytes -= len(self._recent[0].jpeg)
            self._recent.append(frame)
            self._recent_bytes += len(frame.jpeg)
            while self._recent_bytes > MOST_BYTES:
                self._recent_bytes -= len(self._recent.popleft().jpeg)

    def hear(self, frame: Frame, pixels: np.ndarray, embedding: np.ndarray) -> None:
        """Pass a frame on to those who listen; what one of them raises is logged."""
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            try:
                listener(frame, pixels, embedding)
            except Exception:
                log.exception("a listener to camera %s failed", self.id)

    def skip(self, error: InputError) -> None:
        """Log that a frame cannot be used."""
        self._skips.warn(str(error), "bad_frame")

    def _frames(self) -> Iterator[Frame]:
        """Yield the frames of the source, and follow its state."""
        if self.every_image:
            self._set("running")
        for number, jpeg in enumerate(self._source.frames(), 1):
            frame = self._newest = Frame(self.id, number, time.monotonic(), jpeg)
            self._set("running")
            yield frame
        self._set("ended")

    def _lose(self, problem: str) -> None:
        self._set("lost", problem)

    def _set(self, state: State, problem: str = "") -> None:
        if (state, problem) != (self.state, self.problem) and not (self._closed.is_set() and state == "lost"):
            self.state, self.problem = state, problem
            self._tell(self)

    def _rate(self) -> float:
        if len(self._times) < 2 or time.monotonic() - self._times[-1] > max(QUIET, 3 * self._every):
            return 0.0
        return round((len(self._times) - 1) / max(self._times[-1] - self._times[0], 1e-3), 1)


class Cameras:
    """All cameras of a device. One thread takes their newest frames in turn, so that none waits for another for long.

    It also counts drift, also without a camera; the counts are those that `device watch` continues.

    Args:
        device: An open device.
        sources: ``/dev/video0``, ``rtsp://…``, ``http://…``, ``gst:PIPELINE``, a video, which is looped, or a folder,
            whose new images are all answered; each may begin with ``NAME=``.
        events: Where answers and states are published.
        tray: Gets frames in doubt.
        every: Seconds between two answers of a camera at least.

    Raises:
        InputError: Two cameras have one name, or there is no such folder or file.
        EnvironmentUnfitError: What reads a camera is not installed.
    """

    def __init__(
        self, device: Device, sources: Sequence[str], events: Events, tray: Tray, every: float = EVERY
    ) -> None:
        self._device, self._events, self._tray = device, events, tray
        self._changed = threading.Condition()
        self._counts = Counts(device, self._tell_drift)
        self._feeds: dict[str, CameraFeed] = {}
        for number, given in enumerate(sources, 1):
            named = _NAMED.fullmatch(given)
            name, source = (named[1], named[2]) if named else (str(number), given)
            if name in self._feeds:
                raise InputError(f"two cameras have the name '{name}'; name them --camera NAME=SOURCE")
            self._feeds[name] = CameraFeed(name, source, self._changed, self._tell_state, every)
        self._closed, self._answered = threading.Event(), threading.Event()
        self._busy_since: float | None = None
        self._failures = RateLimitedWarning()
        self._threads = [
            threading.Thread(target=self._run, name="cameras", daemon=True),
            threading.Thread(target=self._keep_counts, name="drift", daemon=True),
        ]

    def start(self) -> None:
        """Open the cameras, and answer from now on."""
        for feed in self._feeds.values():
            feed.start()
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End all cameras, and save the drift counts."""
        self._closed.set()
        for feed in self._feeds.values():
            feed.close()
        with self._changed:
            self._changed.notify_all()
        end = time.monotonic() + ENDING
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(end - time.monotonic(), 0.0))

    def list(self) -> list[CameraFeed]:
        """Return all cameras."""
        return list(self._feeds.values())

    def get(self, name: str) -> CameraFeed | None:
        """Return a camera by its id; None if there is none."""
        return self._feeds.get(name)

    def drift(self) -> DriftReport | None:
        """Return the drift of what the cameras show; None if it is not measured."""
        return self._counts.report()

    def hangs(self, seconds: float) -> bool:
        """Return True if one frame has taken longer than this, e.g. because a driver hangs."""
        since = self._busy_since
        return since is not None and time.monotonic() - since > seconds

    def _run(self) -> None:
        """Answer the newest frames of all cameras in turn."""
        while not self._closed.is_set():
            if not sum(self._answer_next(feed) for feed in self._feeds.values() if feed.due <= time.monotonic()):
                self._wait()

    def _keep_counts(self) -> None:
        """Follow the generations and save the counts, beside the answers: a reference for drift takes seconds."""
        self._answered.wait(LOOK)  # loads PyTorch, for which the first answer does not wait
        self._try(self._counts.start)
        rounds = itertools.count(1)
        while not self._closed.wait(LOOK):
            self._try(self._counts.follow)
            number = next(rounds)
            for every, act in ((DRIFT, self._counts.look), (SAVE, self._counts.save)):
                if number % round(every / LOOK) == 0:
                    self._try(act)
        self._threads[0].join()
        self._try(self._counts.close)

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # e.g. damage or too little memory; answers go on
            self._failures.warn(f"drift is not counted: {type(error).__name__}: {error}", "no_drift", error)

    def _wait(self) -> None:
        """Wait for a frame, or until one that waits may be answered."""
        with self._changed:
            waiting = [feed.due for feed in self._feeds.values() if feed.waits()]
            pause = min([NAP, *(due - time.monotonic() for due in waiting)])
            if pause > 0 and not self._closed.is_set():
                self._changed.wait(pause)

    def _answer_next(self, feed: CameraFeed) -> bool:
        """Answer the newest frame of a camera; return True if there was one."""
        frame = feed.take()
        if frame is None or self._closed.is_set():
            return False
        self._busy_since = time.monotonic()
        try:
            self._answer(feed, frame)
        except Exception as error:  # one frame must not end all cameras
            text = f"frame {frame.number} of camera {feed.id} has no answer: {type(error).__name__}: {error}"
            self._failures.warn(text, "no_prediction", error)
        finally:
            self._busy_since = None
        return True

    def _answer(self, feed: CameraFeed, frame: Frame) -> None:
        """Answer a frame, and pass it on."""
        name = f"frame {frame.number} of camera {feed.id}"
        try:
            pixels = images.decode(frame.jpeg, name, self._device.bundle.pixels)
        except InputError as error:
            feed.skip(error)
            return
        try:
            seen = self._device.observe([pixels], names=[name])
        except InputError as error:  # the backbone gives NaN
            self._counts.skip(error)
            return
        now = time.monotonic()
        found = seen.predictions[0] if seen.predictions else None  # no class is known yet
        stable, event, doubt = (None, False, False) if found is None else feed.settle(found, frame.at)
        answer = {
            "camera": feed.id,
            "frame": frame.number,
            "label": None if found is None else found.label,
            "nearest": None if found is None else found.nearest,
            "score": None if found is None or found.score is None else round(found.score, 6),
            "stable": stable,
            "generation": seen.snapshot.generation.number,
            "latency_ms": round(1000 * (now - frame.at), 1),
        }
        feed.answered(frame, answer)
        self._answered.set()
        self._events.publish("answer", **answer)
        feed.hear(frame, pixels, seen.embeddings[0])
        if found is not None:
            self._counts.add(found, seen.embeddings, event)
            if doubt:
                (view,) = seen.snapshot.unknown.whiten(seen.embeddings)
                self._tray.offer(frame, found, view / max(float(np.linalg.norm(view)), 1e-30))

    def _tell_state(self, feed: CameraFeed) -> None:
        self._events.publish("camera", id=feed.id, state=feed.state, problem=feed.problem)

    def _tell_drift(self, report: DriftReport) -> None:
        self._events.publish("drift", level=report.level, index=report.psi)
