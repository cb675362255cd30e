"""Moments that a camera was in doubt about, to be looked at and taught; in memory only, bounded, gone at a restart."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from device_runtime.device import Prediction
from device_runtime.serve.frame import Frame

MOST, MOST_BYTES = 48, 24 * 2**20
FRAMES = 5  # of a moment: a class needs three views
# Cosines of whitened embeddings. With EfficientNet-Lite0 on groceries that it was not taught, a photograph has 0.9 with
# itself if it has noise of σ 3 or is moved by a few pixels; two of a class have 0.6 in the median, two of others 0.3.
ALIKE = 0.75  # the same thing in the same place
SAME_VIEW = 0.9  # not worth another frame
GAP = 2.0  # seconds without doubt that end a moment
LONGEST = 10.0  # seconds of a moment in which what is seen changes, e.g. something that is turned by hand
PAUSE = 5.0  # seconds from the start of a moment to that of the next one of a camera, unless there was no doubt between


@dataclasses.dataclass
class _Moment:
    """Frames of one moment.

    Attributes:
        number: Its id.
        prediction: Of its first frame.
        first, last: When its first and its last frame arrived, also if that one was not kept.
        frames: The frames that were kept, the oldest first.
        views: Whitened embedding of each, of unit length.
    """

    number: int
    prediction: Prediction
    first: float
    last: float
    frames: list[Frame]
    views: list[np.ndarray]

    @property
    def camera(self) -> str:
        return self.frames[0].camera

    def likeness(self, view: np.ndarray) -> float:
        """Return the largest cosine with one of its frames; −1 with an embedding of another backbone."""
        return max((float(own @ view) for own in self.views if own.shape == view.shape), default=-1.0)


class Tray:
    """The moments in doubt; thread-safe.

    When it is full, the older one of the two moments that look most alike goes: one boring unknown scene pushes nothing
    else out.

    Args:
        changed: Called with the number of moments when it has changed.
        most: Most moments.
        most_bytes: Most bytes of all frames.
    """

    def __init__(
        self,
        changed: Callable[[int], object] = lambda count: None,
        most: int = MOST,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._changed, self._most, self._most_bytes = changed, most, most_bytes
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._moments: dict[int, _Moment] = {}  # in the order of their start

    def offer(self, frame: Frame, prediction: Prediction, view: np.ndarray) -> None:
        """Keep a frame in doubt, unless it shows nothing new.

        Args:
            frame: The frame.
            prediction: Its prediction.
            view: Its whitened embedding of unit length, float32 ``(D,)``.
        """
        room, added = self._most_bytes // 4 - len(frame.jpeg), False  # a moment has at most a quarter of all
        with self._lock:
            moment, likeness = self._moment_of(frame, view)
            if moment is not None:
                moment.last = frame.at
                held = sum(len(kept.jpeg) for kept in moment.frames)
                if len(moment.frames) < FRAMES and likeness < SAME_VIEW and held <= room:
                    moment.frames.append(frame)
                    moment.views.append(view)
            elif room >= 0 and not self._too_soon(frame):
                number, added = next(self._numbers), True
                self._moments[number] = _Moment(number, prediction, frame.at, frame.at, [frame], [view])
            count = len(self._moments)
            while len(self._moments) > self._most or self._bytes() > self._most_bytes:
                del self._moments[self._least_worth()]
            added |= len(self._moments) != count
            count = len(self._moments)
        if added:
            self._changed(count)

    def frames(self, name: str) -> list[Frame]:
        """Return the frames of a moment by its id, the oldest first; none if it is gone."""
        with self._lock:
            moment = self._moments.get(_number(name))
            return [] if moment is None else list(moment.frames)

    def remove(self, name: str) -> bool:
        """Remove a moment by its id; return True if it was there."""
        with self._lock:
            removed = self._moments.pop(_number(name), None)
            count = len(self._moments)
        if removed is not None:
            self._changed(count)
        return removed is not None

    def list(self) -> list[dict[str, Any]]:
        """Return the moments as JSON values, the newest first; `at` and `age` are in seconds."""
        now = time.monotonic()
        with self._lock:
            moments = sorted(self._moments.values(), key=lambda moment: moment.last, reverse=True)
            return [
                {
                    "id": str(moment.number),
                    "camera": moment.camera,
                    "at": round(moment.last, 3),
                    "age": round(max(now - moment.last, 0.0), 1),
                    "label": moment.prediction.label,
                    "nearest": moment.prediction.nearest,
                    "score": None if moment.prediction.score is None else round(moment.prediction.score, 6),
                    "frames": len(moment.frames),
                }
                for moment in moments
            ]

    def _moment_of(self, frame: Frame, view: np.ndarray) -> tuple[_Moment | None, float]:
        """Return the moment that a frame belongs to and how alike they are; None for a new moment."""
        own = [moment for moment in self._moments.values() if moment.camera == frame.camera]
        if not own:
            return None, -1.0
        latest = max(own, key=lambda moment: moment.last)
        if frame.at - latest.last <= GAP and frame.at - latest.first <= LONGEST:
            return latest, latest.likeness(view)
        likeness, number = max((moment.likeness(view), moment.number) for moment in own)
        return (self._moments[number], likeness) if likeness >= ALIKE else (None, -1.0)

    def _too_soon(self, frame: Frame) -> bool:
        return any(
            moment.camera == frame.camera and frame.at - moment.first < PAUSE and frame.at - moment.last <= GAP
            for moment in self._moments.values()
        )

    def _bytes(self) -> int:
        return sum(
            len(frame.jpeg) + view.nbytes
            for moment in self._moments.values()
            for frame, view in zip(moment.frames, moment.views, strict=True)
        )

    def _least_worth(self) -> int:
        """Return the older one of the two moments that look most alike; first those of another backbone."""
        moments = list(self._moments.values())
        dim = len(moments[-1].views[0])
        for moment in moments:
            if len(moment.views[0]) != dim:
                return moment.number
        views = np.stack([view for moment in moments for view in moment.views])
        starts = np.cumsum([0, *(len(moment.views) for moment in moments[:-1])])
        cosines = np.maximum.reduceat(np.maximum.reduceat(views @ views.T, starts, 0), starts, 1)
        cosines[np.tril_indices(len(moments))] = -2.0  # of a pair, only with the older one first
        return moments[int(cosines.max(1).argmax())].number


def _number(name: str) -> int:
    """Return the number in an id, or -1 if it is none: Python reads at most 4,300 digits."""
    return int(name) if name.isdecimal() and len(name) < 20 else -1
