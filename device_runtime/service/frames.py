"""Where a camera's images come from: a stream of JPEGs, one after the other (MJPEG), or files arriving in a folder."""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ssd_edge import images
from ssd_edge.errors import InputError

log = logging.getLogger(__name__)

FRAME_LIMIT = 16 * 2**20  # bytes
BLOCK = 2**16  # bytes that are read at once
PATIENCE = 5.0  # seconds that a file may stay as it is without being an image
UNFINISHED = 1000  # files that are waited for at once
AT_ONCE = 10_000  # files that one look takes; also how many are remembered
WINDOW = 10 * 10**9  # ns that names are remembered: file systems' clocks tick in up to 2 s
SAY_AGAIN = 60.0  # seconds; a camera can break thirty frames a second, and log lines wear the flash
SOI, EOI, SOS = 0xD8, 0xD9, 0xDA
_START = bytes((0xFF, SOI, 0xFF))
_FILL = re.compile(rb"\xff+")
# Ends entropy-coded data: a marker that is no stuffed zero, no restart and no fill byte.
_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# Markers that have a length and occur in what Pillow decodes: frame headers, tables, scans, applications, comments.
_SEGMENTS = frozenset({*range(0xC0, 0xD0), *range(SOS, 0xE0), *range(0xE0, 0xF0), 0xFE} - {0xC8})
_MORE, _WHOLE, _BROKEN = "more", "whole", "broken"


class Sparingly:
    """A warning that comes again and again: the first is logged at once, then one a minute, with how many there were.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._next, self._silent = clock, -float("inf"), 0

    def warn(self, text: str) -> None:
        """Log the sentence, or count it."""
        if self._clock() < self._next:
            self._silent += 1
            return
        more = f" ({self._silent} more since the last time)" if self._silent else ""
        log.warning("%s%s", text, more)
        self._next, self._silent = self._clock() + SAY_AGAIN, 0


class _Frame:
    """Looks for the end of the JPEG that begins a buffer, as the buffer grows; `at` is how far it has looked."""

    def __init__(self) -> None:
        self.at, self._coded, self._picture = 2, False, False

    def look(self, data: bytearray) -> str:
        """`_WHOLE`: it ends at `at`. `_BROKEN`: it is none, and the next may begin at `at`. `_MORE`: not yet known."""
        while True:
            if self._coded:
                found = _END.search(data, self.at)
                if found is None:  # a last FF is looked at again with what follows it
                    self.at = max(self.at, len(data) - data.endswith(b"\xff"))
                    return _MORE
                self.at, self._coded = found.start(), False
            if len(data) < self.at + 2:
                return _MORE
            if fill := _FILL.match(data, self.at):
                self.at = fill.end() - 1
            if len(data) < self.at + 2:
                return _MORE
            code = data[self.at + 1]
            if data[self.at] != 0xFF or code == SOI:
                return _BROKEN
            if code == EOI:
                self.at += 2
                return _WHOLE if self._picture else _BROKEN
            if code not in _SEGMENTS:
                self.at += 2
                return _BROKEN
            if len(data) < self.at + 4:
                return _MORE
            length = int.from_bytes(data[self.at + 2 : self.at + 4], "big")
            self.at += 2 + length
            if length < 2:
                return _BROKEN
            self._coded = code == SOS
            self._picture |= self._coded


def mjpeg(stream: BinaryIO, limit: int = FRAME_LIMIT) -> Iterator[bytes]:
    """Cut a stream of JPEGs into its frames, in the memory of one.

    Segments are passed over by their lengths, so that a preview within one is not taken for a frame. What stands
    between frames (multipart headers) is skipped. A frame that breaks off or is over the limit is dropped with a
    warning, and the search goes on behind the bytes that were looked at by then: no byte is looked at twice, but a
    frame within reach of a wrong length is lost too.

    Args:
        stream: binary and blocking, best unbuffered; it is read until it ends or fails.
        limit: of a frame, bytes.

    Yields:
        The bytes of each frame, from its start to its end marker; whether they decode is not known yet.
    """
    read = getattr(stream, "read1", stream.read)  # what is there, rather than a full block
    data, dropped = bytearray(), Sparingly()

    def more() -> bool:
        try:
            block = read(BLOCK)
        except OSError as error:
            log.warning("the stream of frames cannot be read any more (%s)", error)
            return False
        data.extend(block or b"")
        return bool(block)

    while True:
        start = data.find(_START)
        if start < 0:
            del data[: max(len(data) - 2, 0)]  # the first two bytes of a start may have come
            if not more():
                return
            continue
        del data[:start]
        frame = _Frame()
        while (verdict := frame.look(data)) is _MORE and max(frame.at, len(data)) <= limit:
            if not more():
                log.warning("the stream ended within a frame; its first %d bytes are dropped", len(data))
                return
        if verdict is _WHOLE and frame.at <= limit:
            yield bytes(data[: frame.at])
        elif verdict is _BROKEN:
            dropped.warn(f"a frame of the stream is broken after {frame.at} bytes and was dropped")
        else:
            dropped.warn(f"a frame of the stream is larger than {limit} bytes and was dropped; lower the resolution")
        del data[: frame.at]


def take(
    stream: BinaryIO, count: int, every: float, size: int, clock: Callable[[], float] = time.monotonic
) -> list[np.ndarray]:
    """Frames of a live stream to learn from, one every so many seconds; those between are dropped.

    Example:
        >>> device.learn("gear", take(stream, 20, 0.5, device.bundle.size))

    Args:
        stream: see `mjpeg`.
        count: how many; at least 1.
        every: seconds between two; 0: each frame.
        size: side of the results in pixels; a frame is decoded at once, so that 20 of them are 3 MB and not 100.
        clock: monotonic seconds.

    Returns:
        `count` arrays, uint8 RGB ``(size, size, 3)``: image sources like any other.

    Raises:
        InputError: the stream ended before.
    """
    taken: list[np.ndarray] = []
    due = clock()
    for number, frame in enumerate(mjpeg(stream), 1):
        if clock() < due:
            continue
        try:
            taken.append(images.decode(frame, f"frame {number}", size))
        except InputError as error:
            log.warning("%s; the next one is taken", error)
            continue
        if len(taken) == count:
            return taken
        due = clock() + every
    raise InputError(f"the stream ended after {len(taken)} of {count} frames; let it run longer, or take fewer")


class Newest:
    """Reads frames in a thread and keeps the newest: whoever is slower than the camera gets no old ones.

    Args:
        frames: see `mjpeg`.
    """

    def __init__(self, frames: Iterable[bytes]) -> None:
        self._changed = threading.Condition()
        self._waiting: tuple[int, bytes] | None = None
        self._over = False
        threading.Thread(target=self._read, args=(frames,), name="frames", daemon=True).start()

    def _read(self, frames: Iterable[bytes]) -> None:
        try:
            for numbered in enumerate(frames, 1):
                with self._changed:
                    self._waiting = numbered
                    self._changed.notify()
        finally:
            with self._changed:
                self._over = True
                self._changed.notify()

    @property
    def ended(self) -> bool:
        """Whether there is no frame and none will come."""
        with self._changed:
            return self._over and self._waiting is None

    def take(self, timeout: float) -> tuple[int, bytes] | None:
        """The newest frame that was not taken yet, and its number in the stream from 1; waits up to `timeout` seconds.

        Returns:
            None: none has come, or the stream has ended.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._over, timeout)
            taken, self._waiting = self._waiting, None
            return taken


_Identity = tuple[int, int, int]  # inode, mtime in ns, bytes


class _Unfinished(NamedTuple):
    """A file that was no image when it was last read."""

    state: tuple[int, _Identity] | None  # of `_about`; None: not even that could be read
    since: float  # monotonic seconds
    problem: str


class Folder:
    """New images of a folder, oldest first, each once. Nothing in it is changed.

    What was seen is remembered in fixed memory: by the latest change of a file (its ctime, which is also set when it is
    renamed into the folder) up to `WINDOW` before the folder's own, and by names after that. Only times of the file
    system are compared with each other, never with the clock of this process.

    Args:
        path: the folder; what lies in folders below it is not looked at.
        existing: take also what is there at the first look.
        clock: monotonic seconds.

    Raises:
        InputError: it is no folder.
    """

    def __init__(self, path: str | Path, existing: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self._clock = Path(path), clock
        if not self.path.is_dir():
            raise InputError(f"{self.path} is not a folder; create it, or name the one that the camera writes to")
        self._skip = not existing
        self._folder: int | None = None  # its ctime at the last look
        self._low: tuple[int, str] = (-1, "")  # everything up to this (ctime, name) is done
        self._recent: dict[str, tuple[int, _Identity]] = {}  # done, but after `_low`
        self._unfinished: dict[str, _Unfinished] = {}
        self.seconds = 0.0  # that the last look took
        if self._skip:
            self._look()

    def images(self, size: Callable[[], int]) -> Iterator[tuple[str, np.ndarray]]:
        """One look at the folder; files are read when they are asked for.

        Args:
            size: gives the side of the next result in pixels.

        Yields:
            Path, and uint8 RGB ``(size, size, 3)``. A file that is no image yet is tried again at later looks, when it
            has changed; given up when it has not for `PATIENCE` seconds, with a warning.

        Raises:
            OSError: the folder cannot be read.
        """
        begun = self._clock()
        waiting, arrived = list(self._unfinished), self._look()
        self.seconds = self._clock() - begun
        for name in waiting + arrived:
            pixels = self._read(name, size())
            if pixels is not None:
                yield str(self.path / name), pixels

    def _look(self) -> list[str]:
        """Names of what is new, `AT_ONCE` at most; they count as done."""
        folder = os.stat(self.path).st_ctime_ns  # before the names: what comes after it has a later time
        back = self._folder is not None and folder < self._folder
        if back:
            log.warning(
                "the clock was set back, or another folder has come to %s; old images may come again", self.path
            )
        if back or self._skip:
            self._low = (folder - WINDOW, "")
        present: dict[str, tuple[int, _Identity]] = {}

        def arrived() -> Iterator[tuple[int, str, _Identity]]:
            for name, when, identity in self._files():
                if (when, name) <= self._low or name in self._unfinished:
                    continue
                if self._skip or (back and when > folder) or self._recent.get(name, (0, None))[1] == identity:
                    present[name] = (when, identity)
                    if len(present) > 3 * AT_ONCE:
                        self._forget(present)
                else:
                    yield when, name, identity

        found = heapq.nsmallest(AT_ONCE, arrived())
        present.update((name, (when, identity)) for when, name, identity in found)
        if len(found) < AT_ONCE:  # else there may be more of any time
            self._low = max(self._low, (folder - WINDOW, ""))
        self._recent = present
        self._forget(present)
        self._folder, self._skip = folder, False
        return [name for _, name, _ in found]

    def _forget(self, names: dict[str, tuple[int, _Identity]]) -> None:
        """All but the newest `AT_ONCE`: the older are then known by their time."""
        order = sorted((when, name) for name, (when, _) in names.items())
        if len(order) > AT_ONCE:
            self._low = max(self._low, order[-AT_ONCE - 1])
        for key in order:
            if key <= self._low:
                del names[key[1]]

    def _files(self) -> Iterator[tuple[str, int, _Identity]]:
        """Name and `_about` of every image file."""
        with os.scandir(self.path) as listing:
            for entry in listing:
                if images.is_image_name(entry.name):
                    with contextlib.suppress(OSError):  # gone since
                        if entry.is_file():
                            yield entry.name, *_about(entry)

    def _read(self, name: str, size: int) -> np.ndarray | None:
        """The image in a file; None: gone, not whole yet, or given up."""
        path, now = self.path / name, self._clock()
        before = self._unfinished.pop(name, None)
        state = None
        try:
            state = _about(path)
            if before is not None and before.state == state:
                problem = before.problem
            else:
                pixels = images.decode(images.read(path), str(path), size)
                self._recent[name] = state
                return pixels
        except FileNotFoundError:
            log.info("%s was gone before it was read", path)
            return None
        except (InputError, OSError) as error:
            problem = str(error)
        since = before.since if before is not None and before.state == state else now
        if now - since <= PATIENCE and len(self._unfinished) < UNFINISHED:
            self._unfinished[name] = _Unfinished(state, since, problem)
        else:
            log.warning("%s is left out: %s", path, problem)
            if state is not None:
                self._recent[name] = state
        return None


def _about(entry: os.DirEntry[str] | Path) -> tuple[int, _Identity]:
    """When a file last changed (its ctime in ns), and what tells one content of it from another."""
    own = entry.stat(follow_symlinks=False)
    about = entry.stat() if entry.is_symlink() else own
    changed = max(about.st_ctime_ns, own.st_ctime_ns)  # a new link to an old file is new
    return changed, (about.st_ino, about.st_mtime_ns, about.st_size)
