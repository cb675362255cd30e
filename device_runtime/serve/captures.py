"""Images of one class that are being collected, from a camera or by upload, before they are learned.

Images count as *different views* by the rule of a learn (`teach.different_views`), so that what is shown while
collecting is what the learn will count. Nothing is written to disk, and everything is bounded.
"""

from __future__ import annotations

import collections
import importlib.util
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from device_runtime.device import Device, Snapshot, require_torch
from device_runtime.serve.asked import BusyError, UnknownError
from device_runtime.serve.events import Events
from ssd_edge.classes import normalise_name
from ssd_edge.errors import InputError, SSDEdgeError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

NEEDED = 3  # different images that a learn needs: `teach.MIN_IMAGES`, which PyTorch would have to be loaded for
MOST_IMAGES, MOST_BYTES = 200, 64 * 2**20  # of one capture
LEAST_IMAGES = 12  # that a capture may have whatever their size
MOST_CAPTURES = 4
IDLE = 600.0  # seconds without a request after which a capture is dropped
ENDING = 25.0  # seconds that the end waits for PyTorch
EVERY = 0.2  # seconds between two frames of a camera that are taken
LATEST, SAME = 8, 6  # of the last frames, those that show nothing new, from which on a hint is given
COLLECTING, HELD, LEARNING, DONE = "collecting", "held", "learning", "done"


class Views:
    """The rule for different views, by the current generation. Loading it loads PyTorch, in a thread.

    Args:
        device: An open device.
        loaded: Called once another rule is there.
    """

    def __init__(self, device: Device, loaded: Callable[[], object]) -> None:
        self._device, self._loaded = device, loaded
        self._lock = threading.Lock()
        self._rule: tuple[Snapshot, Any, float] | None = None  # snapshot, whitening, expected distance
        self._thread: threading.Thread | None = None

    def rule(self) -> tuple[Snapshot, Any, float] | None:
        """Return the rule, or None while it is being loaded."""
        snapshot, found = self._device.snapshot, self._rule
        if found is not None and found[0] is snapshot:
            return found
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._load, name="views", daemon=True)
                self._thread.start()
        return None

    def close(self) -> None:
        """Wait until nothing is loaded: a process that ends in the middle of PyTorch crashes."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(ENDING)

    def _load(self) -> None:
        try:
            from device_runtime.learning.teach import expected_distance

            snapshot = self._device.snapshot
            state = snapshot.state
            whitening = state.rejector.whitening
            self._rule = snapshot, whitening, expected_distance(whitening, state.statistics)
        except (SSDEdgeError, OSError) as error:
            log.warning("different views cannot be counted: %s", error, extra={"code": "no_views"})
            return
        self._loaded()


class Capture:
    """Images of one class; create one with `Captures.open`.

    Args:
        number: Its number.
        label: Name of the class.
        new: True if the device does not know the class.
        camera: Id of the camera that it collects from; None for uploads.
        views: The rule.
        tell: Called after every change.

    Attributes:
        id: Its number as a text.
        label, new, camera: See above.
        state: ``collecting``, ``held``, ``learning`` or ``done``.
        job: Id of the job that learns or has learned it; None before.
        tray: Ids of the frames of the tray that are in it.
    """

    def __init__(
        self,
        number: int,
        label: str,
        new: bool,
        camera: str | None,
        views: Views,
        tell: Callable[[Capture], object],
    ) -> None:
        self.id, self.label, self.new, self.camera = str(number), label, new, camera
        self.state = COLLECTING if camera is not None else HELD
        self.job: str | None = None
        self.tray: list[str] = []
        self.used = time.monotonic()
        self.stop: Callable[[], object] = lambda: None
        self._views, self._tell = views, tell
        self._lock = threading.RLock()
        self._pixels: list[np.ndarray] = []
        self._embeddings: list[np.ndarray] = []
        self._kept: list[int] = []
        self._white: tuple[Any, torch.Tensor] | None = None  # the rule, and the embeddings whitened by it
        self._latest: collections.deque[bool] = collections.deque(maxlen=LATEST)  # True for what showed nothing new
        self._taken = -EVERY
        self._ready = False
        self._full = False
        self._backbone = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the capture as JSON values."""
        with self._lock:
            return {
                "id": self.id,
                "label": self.label,
                "new": self.new,
                "camera": self.camera,
                "state": self.state,
                "images": len(self._pixels),
                "different": len(self._kept),
                "needed": NEEDED,
                "most": self._most(),
                "hint": self._hint(),
                "job": self.job,
                "expires_in": round(max(0.0, self.used + IDLE - time.monotonic()), 1),
            }

    def _hint(self) -> str:
        if not self._ready and self._pixels:
            return "preparing"
        if self._full:
            return "full"
        return "turn" if self.camera is not None and sum(self._latest) >= SAME else ""

    def _most(self, pixels: Sequence[np.ndarray] = ()) -> int:
        each = next((one.nbytes for one in (*self._pixels[:1], *pixels[:1])), 1)
        return max(LEAST_IMAGES, min(MOST_IMAGES, MOST_BYTES // each))

    def images(self) -> list[np.ndarray]:
        """Return the images, uint8 RGB ``(size, size, 3)`` each."""
        with self._lock:
            return list(self._pixels)

    def on_frame(self, at: float, pixels: np.ndarray, embedding: np.ndarray, backbone: str) -> None:
        """Take a frame of the camera, while it collects.

        Args:
            at: Monotonic time of the frame.
            pixels: uint8 RGB ``(size, size, 3)``.
            embedding: float32 ``(D,)``.
            backbone: Digest of the backbone that gave it.
        """
        with self._lock:
            if self.state != COLLECTING or at - self._taken < EVERY:
                return
            if len(self._pixels) >= self._most():
                self._drop_repeated()
                if len(self._pixels) > 0.9 * self._most():
                    self._full, self.state = True, HELD
                    self._tell(self)
                    return
            self._taken = at
            self.add([pixels], embedding[None], backbone)

    def add(self, pixels: Sequence[np.ndarray], embeddings: np.ndarray, backbone: str) -> None:
        """Add images.

        Args:
            pixels: uint8 RGB ``(size, size, 3)`` each.
            embeddings: float32 ``(N, D)``.
            backbone: Digest of the backbone that gave them.

        Raises:
            InputError: There is no room for them, or they are being learned.
        """
        with self._lock:
            if self.state in (LEARNING, DONE):
                raise InputError(f"'{self.label}' is {self.state}; open another capture")
            if backbone != self._backbone:  # another bundle was installed: the embeddings do not compare
                self._forget()
                self._backbone = backbone
            most = self._most(pixels)
            if len(self._pixels) + len(pixels) > most:
                raise InputError(
                    f"a capture has at most {most} images, but has {len(self._pixels)} and would get {len(pixels)} "
                    "more; learn those first"
                )
            self._pixels += pixels
            self._embeddings += list(embeddings)
            before = len(self._kept)
            self._count()
            if self._ready:
                new = max(0, len(self._kept) - before)
                self._latest.extend([False] * new + [True] * max(0, len(pixels) - new))
            self._tell(self)

    def begin(self) -> None:
        """Let no further images in, because it is learned now.

        Raises:
            InputError: It holds no images, or is being learned.
        """
        with self._lock:
            if self.state not in (COLLECTING, HELD):
                raise InputError(f"'{self.label}' is {self.state} already")
            if not self._pixels:
                raise InputError(f"there are no images of '{self.label}' yet; add at least {NEEDED} different ones")
            self.job = None
            self.change(LEARNING)

    def recount(self) -> None:
        """Count the different views again, by another rule."""
        with self._lock:
            if self._pixels and self.state != DONE:
                self._count()
                self._tell(self)

    def change(self, state: str) -> None:
        """Set the state, and forget the images once they are learned."""
        with self._lock:
            self.state = state
            self._full = self._full and state == HELD
            self._latest.clear()
            if state == DONE:
                self._forget()
            self._tell(self)

    def _forget(self) -> None:
        self._pixels, self._embeddings, self._kept, self._white = [], [], [], None

    def _count(self) -> None:
        rule = self._views.rule()
        self._ready = rule is not None
        if rule is None:
            self._kept = []
            return
        import torch

        from device_runtime.learning.teach import different_views

        _, whitening, expected = rule
        known = self._white[1] if self._white is not None and self._white[0] is whitening else None
        start = 0 if known is None else len(known)
        if start < len(self._embeddings):
            added = whitening.of(torch.from_numpy(np.stack(self._embeddings[start:])))
            known = added if known is None else torch.cat([known, added])
        assert known is not None
        self._white = whitening, known
        self._kept = different_views(known, expected)

    def _drop_repeated(self) -> None:
        """Drop what shows nothing new, to make room."""
        if not self._ready:
            return
        self._pixels = [self._pixels[index] for index in self._kept]
        self._embeddings = [self._embeddings[index] for index in self._kept]
        self._white = None
        self._count()


class Captures:
    """The open captures.

    Args:
        device: An open device.
        events: Where every change of a capture is published.
    """

    def __init__(self, device: Device, events: Events) -> None:
        self._device, self._events = device, events
        self._lock = threading.Lock()
        self._captures: dict[str, Capture] = {}
        self._number = 0
        self._views = Views(device, self._recount)

    def open(self, label: str, camera: str | None) -> Capture:
        """Begin to collect images of a class.

        Args:
            label: Name of the class, new or known.
            camera: Id of the camera they come from; None for uploads.

        Raises:
            InputError: The name is not valid.
            EnvironmentUnfitError: PyTorch is not installed, so that nothing can be learned.
            BusyError: Too many are open.
        """
        label = normalise_name(label)
        new = self._device.registry.row(label) is None
        if importlib.util.find_spec("torch") is None:
            require_torch()
        self._views.rule()  # PyTorch is loaded while the first images are collected
        with self._lock:
            if len(self._captures) >= MOST_CAPTURES:
                idle = min(self._captures.values(), key=lambda capture: (capture.state != DONE, capture.used))
                if idle.state != DONE:
                    raise BusyError(f"{MOST_CAPTURES} captures are open already; learn or drop one of them first")
                del self._captures[idle.id]
            self._number += 1
            capture = Capture(self._number, label, new, camera, self._views, self._tell)
            self._captures[capture.id] = capture
        self._tell(capture)
        return capture

    def get(self, name: str) -> Capture:
        """Return a capture, which then is in use.

        Raises:
            UnknownError: There is none of this id, or it was dropped.
        """
        with self._lock:
            if (capture := self._captures.get(name)) is None:
                raise UnknownError(f"there is no capture '{name[:40]}'; it was dropped, or idle for ten minutes")
        capture.used = time.monotonic()
        return capture

    def list(self) -> list[Capture]:
        """Return the captures, oldest first."""
        with self._lock:
            return list(self._captures.values())

    def close(self, name: str) -> None:
        """Drop a capture and its images.

        Raises:
            UnknownError: See `get`.
        """
        capture = self.get(name)
        with self._lock:
            self._captures.pop(capture.id, None)
        capture.stop()
        capture.change(DONE)

    def end(self) -> None:
        """Take no more frames, because the service ends."""
        for capture in self.list():
            capture.stop()
        self._views.close()

    def drop_idle(self) -> None:
        """Drop the captures that nobody has used for `IDLE` seconds, unless they are being learned."""
        now = time.monotonic()
        for capture in self.list():
            if now - capture.used > IDLE and capture.state != LEARNING:
                self.close(capture.id)

    def _recount(self) -> None:
        for capture in self.list():
            capture.recount()

    def _tell(self, capture: Capture) -> None:
        self._events.publish("capture", **capture.to_dict())
