"""`Station`: everything that the service can do, without a word of HTTP or MQTT."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from device_runtime.device import NAMED, Device, Observation, Snapshot
from device_runtime.results import (
    Change,
    ForgetResult,
    History,
    MergeLabelsResult,
    MergeResult,
    RenameResult,
    RollbackResult,
    describe,
)
from device_runtime.serve.asked import BusyError, UnknownError
from device_runtime.serve.cameras import CameraFeed, Cameras
from device_runtime.serve.captures import COLLECTING, DONE, HELD, LEARNING, LEAST_IMAGES, Capture, Captures
from device_runtime.serve.events import Events
from device_runtime.serve.frame import Frame
from device_runtime.serve.jobs import MOST_BYTES, Job, Jobs, default_limits
from device_runtime.serve.recognition import Recognition
from device_runtime.serve.tray import Tray
from device_runtime.service.follower import Follower
from ssd_edge import files, images
from ssd_edge.classes import normalise_name
from ssd_edge.errors import InputError

if TYPE_CHECKING:
    from device_runtime.learning.guard import Limits

T = TypeVar("T")
C = TypeVar("C", bound=Change)

WORKERS = 2  # threads that decode and predict: while one embeds, another decodes
MOST_WAITING = 64  # requests that wait for one of them
MOST_UPLOADS = 16  # requests with images to be learned that are decoded or wait for it
OLDER = 2  # generations besides the current one that are held in memory to predict
PATIENCE = 15.0  # seconds that a learn waits for a frame of a camera


class Station:
    """A device with all that runs beside it. Every method may be called from any thread.

    Args:
        device: An open device.
        events: Where changes are published.
        cameras: Its cameras; None without any.
        tray: The tray of its cameras; None for an empty one.

    Attributes:
        device, events, cameras, tray: See above.
        jobs: Its jobs.
        captures: Images that are being collected.
        learned: Called with the last state of every job, and the seconds that it took.
        began: Time of the start, monotonic seconds.
    """

    def __init__(
        self,
        device: Device,
        events: Events | None = None,
        cameras: Cameras | None = None,
        tray: Tray | None = None,
    ) -> None:
        self.device, self.events = device, events or Events()
        self.cameras, self.tray = cameras, Tray() if tray is None else tray
        self.began = time.monotonic()
        self.learned: Callable[[str, float], object] = lambda state, seconds: None
        self._changing = threading.Lock()
        self._follower = Follower(device, self._publish_generation)
        self._recognition = Recognition(device)
        self.jobs = Jobs(device, self.events, self._changing, self._job_ended)
        self.captures = Captures(device, self.events)
        self._pool = ThreadPoolExecutor(WORKERS, "predict")
        self._uploader = ThreadPoolExecutor(1, "upload")
        self._closing = threading.Event()
        self._counting = threading.Lock()
        self._waiting = self._finished = self._uploads = 0
        self._older: collections.OrderedDict[int, Snapshot] = collections.OrderedDict()

    def warm(self) -> None:
        """Run the backbone once, which may build an engine."""
        size = self.device.bundle.size
        self.device.embedder.embed(np.zeros((1, size, size, 3), np.uint8))  # whatever it gives for a black image

    def close(self) -> None:
        """End everything; a commit that has begun is finished."""
        self._closing.set()
        self.jobs.close()
        self.captures.end()
        for pool in (self._uploader, self._pool):
            pool.shutdown(cancel_futures=True)
        self.events.close()

    def refresh(self) -> None:
        """Follow what this and other processes have committed, and drop what nobody uses; call it once per second."""
        self._follower.look()
        self.captures.drop_idle()

    # predict

    @property
    def waiting(self) -> int:
        """Number of requests that are predicted or wait for it."""
        return self._waiting

    @property
    def finished(self) -> int:
        """Number of requests that were predicted, or failed to be."""
        return self._finished

    def work(self, task: Callable[[], T]) -> Future[T]:
        """Run something in one of the threads that predict.

        Raises:
            BusyError: Too many requests wait already.
        """
        with self._counting:
            if self._waiting >= WORKERS + MOST_WAITING:
                raise BusyError(f"{self._waiting} requests wait for an answer already; try again in a moment")
            self._waiting += 1
        future = self._pool.submit(task)
        future.add_done_callback(self._done)
        return future

    def _done(self, future: Future[Any]) -> None:
        with self._counting:
            self._waiting -= 1
            self._finished += 1

    def take_in(self, task: Callable[[], T]) -> Future[T]:
        """Run something that decodes images to be learned, one at a time: each image may take 320 MB meanwhile.

        Raises:
            BusyError: Too much waits already.
        """
        with self._counting:
            if self._uploads >= MOST_UPLOADS:
                raise BusyError(f"{self._uploads} uploads wait already; try again in a moment")
            self._uploads += 1
        future = self._uploader.submit(task)
        future.add_done_callback(self._taken_in)
        return future

    def _taken_in(self, future: Future[Any]) -> None:
        with self._counting:
            self._uploads -= 1

    def decode(self, data: bytes, name: str) -> np.ndarray:
        """Decode an image as the backbone wants it, uint8 RGB ``(size, size, 3)``.

        Raises:
            InputError: It is not a valid image.
            BusyError: The service ends.
        """
        if self._closing.is_set():
            raise BusyError("the service ends; try again in a moment")
        return images.decode(data, name, self.device.bundle.pixels)

    def decode_all(self, files: Sequence[tuple[str, bytes]]) -> list[np.ndarray]:
        """Decode images to be learned, given by name and content; see `decode`.

        Raises:
            InputError: One of them is not a valid image, or they are too many to be held.
        """
        most = max(LEAST_IMAGES, MOST_BYTES // (3 * self.device.bundle.size**2))
        if len(files) > most:
            raise InputError(f"at most {most} images can be taught at once, but there are {len(files)}; send fewer")
        return [self.decode(data, name) for name, data in files]

    def predict(
        self, pixels: Sequence[np.ndarray], names: Sequence[str], reject: bool = True, generation: int | None = None
    ) -> Observation:
        """Predict images in the calling thread; see `Device.observe`.

        Args:
            pixels: uint8 arrays.
            names: Their names in answers and messages.
            reject: Answer ``unknown`` for images that are too far from every class.
            generation: Number of the generation that predicts; None for the current one.

        Raises:
            InputError: The generation knows no class, or an image cannot be predicted.
            UnknownError: There is no such generation, or it was pruned.
        """
        snapshot = self.device.snapshot if generation is None else self.at(generation)
        if not snapshot.registry.names:
            raise InputError("this device knows no class yet; teach it one")
        return self.device.observe(list(pixels), reject, names, snapshot)

    def at(self, number: int) -> Snapshot:
        """Return a generation in memory.

        Raises:
            UnknownError: It does not exist, was pruned, is damaged, or has another backbone.
        """
        with self._counting:
            found = self._older.get(number)
            if found is not None and files.exists(found.generation.path) and number != self.device.generation.number:
                self._older.move_to_end(number)
                return found
            self._older.pop(number, None)
        try:
            found = self.device.at(number)
        except InputError as error:
            raise UnknownError(str(error)) from error
        if found is not self.device.snapshot:
            with self._counting:
                self._older[number] = found
                while len(self._older) > OLDER:
                    self._older.popitem(last=False)
        return found

    # tell

    def status(self) -> dict[str, Any]:
        """Return the device's status and that of the service, as JSON values."""
        job = self.jobs.current
        return {
            **self.device.status().to_dict(),
            "uptime": round(time.monotonic() - self.began, 1),
            "cameras": [feed.to_dict() for feed in self.feeds()],
            "job": None if job is None else job.to_dict(),
            "drift": self.drift(),
            "waiting": self._waiting,
        }

    def drift(self) -> dict[str, Any] | None:
        """Return the drift of what the cameras show, as JSON values; None if it is not measured."""
        report = None if self.cameras is None else self.cameras.drift()
        return None if report is None else report.to_dict()

    def classes(self) -> dict[str, Any]:
        """Return the classes with what is known about how well each is recognised, as JSON values."""
        return self._recognition.classes()

    def history(self) -> History:
        """Return all generations."""
        return self.device.history()

    def _publish_generation(self) -> None:
        snapshot = self.device.snapshot
        generation = snapshot.generation
        what = describe(generation.info, NAMED)
        self.events.publish("generation", generation=generation.number, classes=len(snapshot.registry.names), what=what)

    # change

    def rename(self, label: str, new: str) -> RenameResult:
        """Rename a class; see `Device.rename`."""
        return self._changed(lambda: self.device.rename(label, new))

    def forget(self, label: str, exactly: bool = False, max_forgetting: float | None = None) -> ForgetResult:
        """Remove a class; see `Device.forget`."""
        return self._changed(lambda: self.device.forget(label, exactly, limits_of(max_forgetting) or default_limits()))

    def merge_labels(self, labels: Sequence[str], into: str, max_forgetting: float | None = None) -> MergeLabelsResult:
        """Merge classes into one; see `Device.merge_labels`."""
        return self._changed(
            lambda: self.device.merge_labels(labels, into, limits_of(max_forgetting) or default_limits())
        )

    def merge(self, bundle: bytes, max_forgetting: float | None = None) -> MergeResult:
        """Add what another device has learned; see `Device.merge`."""
        return self._changed(lambda: self.device.merge(bundle, limits_of(max_forgetting) or default_limits()))

    def rollback(self, number: int | None = None) -> RollbackResult:
        """Return to an earlier generation; see `Device.rollback`."""
        return self._changed(lambda: self.device.rollback(number))

    def _changed(self, change: Callable[[], C]) -> C:
        if not self._changing.acquire(blocking=False):
            raise BusyError("the device is learning or being changed; try again when that is done, or cancel it")
        try:
            return change()
        finally:
            self._changing.release()
            self._follower.look()

    def _job_ended(self, state: str, seconds: float) -> None:
        self.learned(state, seconds)
        self._follower.look()

    # learn

    def learn(self, given: Mapping[str, Sequence[np.ndarray]], max_forgetting: float | None = None) -> Job:
        """Learn classes from images as a job.

        Args:
            given: Class name → uint8 arrays.
            max_forgetting: Limit on forgetting, below the default; None for the default.

        Raises:
            InputError: A name is not valid, or there are no images.
            BusyError: Too many jobs wait.
        """
        labels = list(map(normalise_name, given))
        if not labels or not all(len(own) for own in given.values()):
            raise InputError("there is nothing to learn: send at least three images of a class")
        held = sum(one.nbytes for own in given.values() for one in own)
        return self.jobs.start(labels, lambda check: given, limits_of(max_forgetting), held=held)

    def learn_from_camera(
        self, label: str, camera: str | None, frames: int, every: float, max_forgetting: float | None = None
    ) -> Job:
        """Learn a class from the next frames of a camera as a job.

        Args:
            label: Name of the class.
            camera: Id of the camera; None if there is only one.
            frames: Number of frames.
            every: Seconds between two of them.
            max_forgetting: As for `learn`.

        Raises:
            InputError: The name is not valid.
            UnknownError: There is no such camera.
            BusyError: Too many jobs wait.
        """
        label, feed = normalise_name(label), self.camera(camera)

        def gather(check: Callable[[float], object]) -> dict[str, list[np.ndarray]]:
            return {label: _frames(feed, frames, every, check)}

        return self.jobs.start([label], gather, limits_of(max_forgetting))

    def camera(self, name: str | None) -> CameraFeed:
        """Return a camera.

        Args:
            name: Its id; None if there is only one.

        Raises:
            UnknownError: There is none.
        """
        feeds = self.feeds()
        found = [feed for feed in feeds if name is None or feed.id == name]
        if len(found) != 1:
            known = ", ".join(feed.id for feed in feeds) or "none; start the service with --camera"
            raise UnknownError(f"there is no camera '{name or ''}'; cameras: {known}")
        return found[0]

    def feeds(self) -> Sequence[CameraFeed]:
        """Return the cameras."""
        return [] if self.cameras is None else self.cameras.list()

    # collect

    def collect(self, label: str, camera: str | None = None) -> Capture:
        """Begin to collect images of a class; see `Captures.open`.

        Raises:
            UnknownError: There is no such camera.
        """
        feed = None if camera is None else self.camera(camera)
        capture = self.captures.open(label, camera)
        if feed is not None:

            def take(frame: Frame, pixels: np.ndarray, embedding: np.ndarray) -> None:
                capture.on_frame(frame.at, pixels, embedding, self.device.generation.backbone)

            capture.stop = feed.listen(take)
        return capture

    def hold(self, name: str, collecting: bool) -> Capture:
        """Stop to take frames of the camera, or go on."""
        capture = self.captures.get(name)
        if capture.state not in (COLLECTING, HELD):
            raise InputError(f"'{capture.label}' is {capture.state}; open another capture")
        capture.change(COLLECTING if collecting and capture.camera is not None else HELD)
        return capture

    def add_images(self, name: str, files: Sequence[tuple[str, bytes]]) -> Capture:
        """Add image files to a capture, in the calling thread.

        Args:
            name: Id of the capture.
            files: Name and content of each.

        Raises:
            InputError: One of them is not an image; none is added.
        """
        capture = self.captures.get(name)
        pixels = self.decode_all(files)
        seen = self.device.observe(pixels, names=[file for file, _ in files])
        capture.add(pixels, seen.embeddings, seen.snapshot.generation.backbone)
        return capture

    def add_tray(self, name: str, entries: Sequence[str]) -> Capture:
        """Add the frames of entries of the tray to a capture, in the calling thread.

        Raises:
            UnknownError: An entry is gone.
        """
        capture = self.captures.get(name)
        files = []
        for entry in entries:
            frames = self.tray.frames(entry)
            if not frames:
                raise UnknownError(f"the frame '{entry[:40]}' is no longer in the tray")
            files += [(f"frame {frame.number}", frame.jpeg) for frame in frames]
        self.add_images(name, files)
        capture.tray += entries
        return capture

    def drop_capture(self, name: str) -> None:
        """Drop a capture and its images; if it waits to be learned, it is not.

        Raises:
            UnknownError: There is none of this id.
        """
        capture = self.captures.get(name)
        if capture.state == LEARNING and capture.job is not None:
            self.jobs.cancel(capture.job)
        self.captures.close(name)

    def learn_capture(self, name: str, max_forgetting: float | None = None) -> Job:
        """Learn what a capture holds as a job. If it is not learned, the capture is held and can be added to.

        Raises:
            InputError: It holds no images, or is being learned.
            BusyError: Too many jobs wait.
        """
        capture = self.captures.get(name)
        limits = limits_of(max_forgetting)
        capture.begin()

        def ended(state: str) -> None:
            if capture.state == LEARNING:  # else it was dropped
                capture.change(DONE if state == "done" else HELD)
            if state == "done":
                capture.stop()
                for entry in capture.tray:
                    self.tray.remove(entry)

        try:
            job = self.jobs.start([capture.label], lambda check: {capture.label: capture.images()}, limits, ended)
        except Exception:
            capture.change(HELD)
            raise
        capture.job = job.id
        return job


def limits_of(max_forgetting: float | None) -> Limits | None:
    """Return limits that forbid at least what the default ones do; None for the default ones.

    Raises:
        InputError: More forgetting is to be allowed, or it is no share.
    """
    if max_forgetting is None:
        return None
    usual = default_limits()
    most = usual.max_forgetting
    if max_forgetting > most:
        raise InputError(
            f"max_forgetting may be at most {most} here, but is {max_forgetting}; only a command on the device itself "
            "may allow more"
        )
    return dataclasses.replace(usual, max_forgetting=max_forgetting)


@contextlib.contextmanager
def _listening(feed: CameraFeed, most: int) -> Iterator[queue.Queue[tuple[float, np.ndarray]]]:
    frames: queue.Queue[tuple[float, np.ndarray]] = queue.Queue(most)

    def take(frame: Frame, pixels: np.ndarray, embedding: np.ndarray) -> None:
        with contextlib.suppress(queue.Full):
            frames.put_nowait((frame.at, pixels))

    stop = feed.listen(take)
    try:
        yield frames
    finally:
        stop()


def _frames(feed: CameraFeed, count: int, every: float, check: Callable[[float], object]) -> list[np.ndarray]:
    """Take frames of a camera at intervals; `check` is called with the share that is there."""
    taken: list[np.ndarray] = []
    with _listening(feed, 4) as frames:
        due, last = -1.0, time.monotonic()
        while len(taken) < count:
            check(len(taken) / count)
            try:
                at, pixels = frames.get(timeout=0.2)
            except queue.Empty:
                if time.monotonic() - last > PATIENCE:
                    raise InputError(
                        f"the camera '{feed.id}' gave {len(taken)} of {count} frames, and none for {PATIENCE:.0f} s; "
                        "check it, or take fewer"
                    ) from None
                continue
            last = time.monotonic()
            if at >= due:
                taken.append(pixels)
                due = at + every
    return taken
