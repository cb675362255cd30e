"""Images of a camera, from a stream of JPEGs (MJPEG) or from files that arrive in a folder."""

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
from typing import BinaryIO, Generic, NamedTuple, TypeVar

import numpy as np

from ssd_edge import files, images
from ssd_edge.errors import InputError
from ssd_edge.images import Pixels

T = TypeVar("T")

log = logging.getLogger(__name__)

FRAME_LIMIT = 16 * 2**20  # bytes
BLOCK = 2**16  # bytes per read
PATIENCE = 5.0  # seconds after which an unchanged file that is not an image is given up
UNFINISHED = 1000  # maximum number of unfinished files
SCAN = 0.5  # seconds between two scans of a folder
SHARE = 0.2  # largest share of the time that is spent on scanning it
AT_ONCE = 10_000  # maximum number of files per scan, and of remembered names
WINDOW = 10 * 10**9  # ns for which names are remembered; timestamps of file systems have steps of up to 2 s
WARNING_PERIOD = 60.0  # seconds; a broken camera can cause thirty warnings per second
SOI, EOI, SOS = 0xD8, 0xD9, 0xDA
_START = bytes((0xFF, SOI, 0xFF))
_FILL = re.compile(rb"\xff+")
# End of entropy-coded data: a marker other than a stuffed zero, a restart marker and a fill byte.
_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# Markers with a length that Pillow supports: frame headers, tables, scans, application data, comments.
_SEGMENTS = frozenset({*range(0xC0, 0xD0), *range(SOS, 0xE0), *range(0xE0, 0xF0), 0xFE} - {0xC8})
_MORE, _COMPLETE, _BROKEN = "more", "complete", "broken"


class RateLimitedWarning:
    """A repeated warning that is logged at most once per minute, with the number of suppressed ones.

    Args:
        clock: Monotonic clock in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._next, self._suppressed = clock, -float("inf"), 0

    def warn(self, text: str, code: str, error: BaseException | None = None) -> None:
        """Log a warning with its code, or count it if the last one is less than a minute old.

        Args:
            text: A sentence.
            code: See docs/service.md.
            error: An unexpected exception, whose traceback is logged.
        """
        if self._clock() < self._next:
            self._suppressed += 1
            return
        more = f" ({self._suppressed} more since the last time)" if self._suppressed else ""
        log.warning("%s%s", text, more, extra={"code": code}, exc_info=error)
        self._next, self._suppressed = self._clock() + WARNING_PERIOD, 0


class _Frame:
    """Parser that finds the end of the JPEG at the start of a growing buffer; `at` is its position."""

    def __init__(self) -> None:
        self.at, self._coded, self._picture = 2, False, False

    def parse(self, data: bytearray) -> str:
        """Continue parsing.

        Returns:
            `_COMPLETE` if the JPEG ends at `at`, `_BROKEN` if it is not valid and another one may start at `at`, or
            `_MORE` if more data is needed.
        """
        while True:
            if self._coded:
                found = _END.search(data, self.at)
                if found is None:  # a final FF is parsed again with the next byte
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
                return _COMPLETE if self._picture else _BROKEN
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
    """Split a stream of JPEGs into frames, with the memory of one frame.

    Segments are skipped by their lengths, so that a preview inside a segment is not mistaken for a frame. Bytes between
    frames, such as multipart headers, are skipped. A truncated frame or one over the limit is dropped with a warning,
    and the search continues after the parsed bytes. No byte is parsed twice, so a wrong length may cost the next frame.

    Args:
        stream: Binary blocking stream, preferably unbuffered; it is read until it ends or fails.
        limit: Maximum size of a frame in bytes.

    Yields:
        The bytes of each frame from its start to its end marker, which may still fail to decode.
    """
    read = getattr(stream, "read1", stream.read)  # returns available data without waiting for a full block
    data, dropped = bytearray(), RateLimitedWarning()

    def more() -> bool:
        try:
            block = read(BLOCK)
        except OSError as error:
            log.warning("the stream of frames cannot be read (%s)", error, extra={"code": "stream_lost"})
            return False
        data.extend(block or b"")
        return bool(block)

    while True:
        start = data.find(_START)
        if start < 0:
            del data[: max(len(data) - 2, 0)]  # they may be the first two bytes of a start marker
            if not more():
                return
            continue
        del data[:start]
        frame = _Frame()
        while (verdict := frame.parse(data)) is _MORE and max(frame.at, len(data)) <= limit:
            if not more():
                text = "the stream ended within a frame; its first %d bytes were dropped"
                log.warning(text, len(data), extra={"code": "bad_frame"})
                return
        if verdict is _COMPLETE and frame.at <= limit:
            yield bytes(data[: frame.at])
        elif verdict is _BROKEN:
            dropped.warn(f"a frame of the stream is broken after {frame.at} bytes and was dropped", "bad_frame")
        else:
            text = f"a frame of the stream is larger than {limit} bytes and was dropped; lower the resolution"
            dropped.warn(text, "bad_frame")
        del data[: frame.at]


def take(
    stream: BinaryIO, count: int, every: float, form: Pixels, clock: Callable[[], float] = time.monotonic
) -> list[np.ndarray]:
    """Take frames of a live stream at fixed intervals, e.g. to learn from them.

    Example:
        >>> device.learn("gear", take(stream, 20, 0.5, device.bundle.pixels))

    Args:
        stream: Stream of JPEGs, see `mjpeg`.
        count: Number of frames, at least 1.
        every: Seconds between two frames; 0 for every frame.
        form: How frames become the results. They are resized immediately to save memory.
        clock: Monotonic clock in seconds.

    Returns:
        `count` arrays, uint8 RGB ``(size, size, 3)``.

    Raises:
        InputError: The stream ended too early.
    """
    taken: list[np.ndarray] = []
    due = clock()
    for number, frame in enumerate(mjpeg(stream), 1):
        if clock() < due:
            continue
        try:
            taken.append(images.decode(frame, f"frame {number}", form))
        except InputError as error:
            log.warning("%s; taking the next frame instead", error, extra={"code": "bad_frame"})
            continue
        if len(taken) == count:
            return taken
        due = clock() + every
    raise InputError(f"the stream ended after {len(taken)} of {count} frames; let it run longer, or take fewer")


class Newest(Generic[T]):
    """The newest frame of a stream, which a thread reads; frames that are not taken in time are dropped.

    Args:
        frames: Frames, e.g. of `mjpeg`.
        changed: Notified when there is a new frame, and at the end; several streams may share it.
        every: Drop none: the next one is read once this one has been taken.
    """

    def __init__(self, frames: Iterable[T], changed: threading.Condition | None = None, every: bool = False) -> None:
        self._changed = threading.Condition() if changed is None else changed
        self._every = every
        self._waiting: tuple[int, T] | None = None
        self._over = False
        threading.Thread(target=self._read, args=(frames,), name="frames", daemon=True).start()

    def _read(self, frames: Iterable[T]) -> None:
        try:
            for numbered in enumerate(frames, 1):
                with self._changed:
                    self._waiting = numbered
                    self._changed.notify_all()
                    if self._every:
                        self._changed.wait_for(lambda: self._waiting is None)
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()

    @property
    def ended(self) -> bool:
        """True if the stream has ended and its last frame was taken."""
        with self._changed:
            return self._over and self._waiting is None

    @property
    def waits(self) -> bool:
        """True if there is a new frame."""
        with self._changed:
            return self._waiting is not None

    def take(self, timeout: float) -> tuple[int, T] | None:
        """Wait up to `timeout` seconds for a new frame.

        Returns:
            The number of the newest frame in the stream, from 1, and the frame; None if there is no new frame.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._over, timeout)
            taken, self._waiting = self._waiting, None
            self._changed.notify_all()
            return taken


_Identity = tuple[int, int, int]  # inode, mtime in ns, bytes


class _Unfinished(NamedTuple):
    """A file that was not a valid image when it was last read."""

    state: tuple[int, _Identity] | None  # result of `_file_state`; None if it could not be read
    since: float  # monotonic seconds
    problem: str


class Folder:
    """New images of a folder, oldest first and each once. The folder is only read.

    Seen files are remembered in fixed memory. Files whose last change (ctime, which a rename into the folder also sets)
    is more than `WINDOW` before the folder's own are remembered by that time, later ones by name. Times of the file
    system are only compared with each other, never with the clock of this process.

    Args:
        path: The folder.
        existing: Include the images that exist at the first scan.
        recursive: Include its subfolders, also those that are created later; links to folders are not followed.
        clock: Monotonic clock in seconds.

    Raises:
        InputError: The path is not a folder.
    """

    def __init__(
        self,
        path: str | Path,
        existing: bool = False,
        clock: Callable[[], float] = time.monotonic,
        recursive: bool = False,
    ) -> None:
        self.path, self._clock, self._recursive = Path(path), clock, recursive
        if not files.is_folder(self.path):
            raise InputError(f"{self.path} is not a folder; create it, or use the folder that the camera writes to")
        self._skip = not existing
        self._folder: int | None = None  # ctime of the folder at the last scan
        self._low: tuple[int, str] = (-1, "")  # all files up to this (ctime, name) are done
        self._recent: dict[str, tuple[int, _Identity]] = {}  # files after `_low` that are done
        self._unfinished: dict[str, _Unfinished] = {}
        self._seconds = 0.0  # duration of the last scan
        if self._skip:
            self._scan()

    def pause(self, every: float = SCAN) -> float:
        """Return the seconds until the next scan: `every`, or more if scanning takes long."""
        return max(every, self._seconds / SHARE)

    def images(self, form: Callable[[], Pixels]) -> Iterator[tuple[str, np.ndarray]]:
        """Scan the folder once and yield its new images as uint8 RGB ``(size, size, 3)``; see `read`.

        Args:
            form: Returns how the next image becomes its result.
        """
        return self.read(lambda data, name: images.decode(data, name, form()))

    def read(self, decode: Callable[[bytes, str], T]) -> Iterator[tuple[str, T]]:
        """Scan the folder once and yield its new images, which are read one by one.

        A file that is not a valid image is read again at later scans if it has changed, and given up with a warning if
        it has not changed for `PATIENCE` seconds.

        Args:
            decode: Gets the content of a file and its path; raises an `InputError` if it is not a valid image.

        Yields:
            Path and decoded image.

        Raises:
            OSError: The folder cannot be read.
        """
        begun = self._clock()
        waiting, arrived = list(self._unfinished), self._scan()
        self._seconds = self._clock() - begun
        for name in waiting + arrived:
            image = self._read(name, decode)
            if image is not None:
                yield str(self.path / name), image

    def _scan(self) -> list[str]:
        """Return the names of up to `AT_ONCE` new files, which then count as done."""
        # read before the names: files that arrive later have a later time
        folders = list(self._folders())
        folder = max(when for _, when in folders)
        back = self._folder is not None and folder < self._folder
        if back:
            log.warning(
                "the clock was set back, or %s was replaced by another folder; old images may appear again",
                self.path,
                extra={"code": "clock"},
            )
        if back or self._skip:
            self._low = (folder - WINDOW, "")
        present: dict[str, tuple[int, _Identity]] = {}

        def arrived() -> Iterator[tuple[int, str, _Identity]]:
            for name, when, identity in self._files(name for name, _ in folders):
                if (when, name) <= self._low or name in self._unfinished:
                    continue
                if self._skip or (back and when > folder) or self._recent.get(name, (0, None))[1] == identity:
                    present[name] = (when, identity)
                    if len(present) > 3 * AT_ONCE:
                        self._drop_old(present)
                else:
                    yield when, name, identity

        found = heapq.nsmallest(AT_ONCE, arrived())
        present.update((name, (when, identity)) for when, name, identity in found)
        if len(found) < AT_ONCE:  # otherwise more files of any time may follow
            self._low = max(self._low, (folder - WINDOW, ""))
        self._recent = present
        self._drop_old(present)
        self._folder, self._skip = folder, False
        return [name for _, name, _ in found]

    def _drop_old(self, names: dict[str, tuple[int, _Identity]]) -> None:
        """Drop all but the newest `AT_ONCE` names; older files are remembered by their time."""
        order = sorted((when, name) for name, (when, _) in names.items())
        if len(order) > AT_ONCE:
            self._low = max(self._low, order[-AT_ONCE - 1])
        for key in order:
            if key <= self._low:
                del names[key[1]]

    def _folders(self) -> Iterator[tuple[str, int]]:
        """Yield the name of each folder, relative to `path`, and its ctime in ns; the first one is `path` itself."""
        yield "", os.stat(self.path).st_ctime_ns
        waiting = [""] if self._recursive else []
        while waiting:
            above = waiting.pop()
            with contextlib.suppress(OSError), os.scandir(self.path / above) as listing:  # removed meanwhile
                for entry in listing:
                    if entry.is_dir(follow_symlinks=False):
                        name = os.path.join(above, entry.name)
                        yield name, entry.stat(follow_symlinks=False).st_ctime_ns
                        waiting.append(name)

    def _files(self, folders: Iterable[str]) -> Iterator[tuple[str, int, _Identity]]:
        """Yield the name, relative to `path`, and `_file_state` of every image file in some folders."""
        for number, folder in enumerate(folders):
            # a subfolder may be removed meanwhile; the loss of the folder itself is an error
            lenient = contextlib.suppress(OSError) if number else contextlib.nullcontext()
            with lenient, os.scandir(self.path / folder) as listing:
                for entry in listing:
                    if images.kind_of(entry.name) in ("image", "video", "picture"):  # the last two are named once
                        with contextlib.suppress(OSError):  # removed meanwhile
                            if entry.is_file():
                                yield os.path.join(folder, entry.name), *_file_state(entry)

    def _read(self, name: str, decode: Callable[[bytes, str], T]) -> T | None:
        """Read an image; return None if the file is gone, unfinished or given up."""
        path, now = self.path / name, self._clock()
        before = self._unfinished.pop(name, None)
        state = None
        try:
            state = _file_state(path)
            if (refused := images.refusal(str(path), images.kind_of(name))) is not None:
                log.warning("%s", refused, extra={"code": "bad_image"})
                self._recent[name] = state
                return None
            if before is not None and before.state == state:
                problem = before.problem
            else:
                image = decode(images.read(path), str(path))
                self._recent[name] = state
                return image
        except FileNotFoundError:
            log.info("%s was removed before it was read", path, extra={"code": "removed"})
            return None
        except (InputError, OSError) as error:
            problem = str(error)
        since = before.since if before is not None and before.state == state else now
        if now - since <= PATIENCE and len(self._unfinished) < UNFINISHED:
            self._unfinished[name] = _Unfinished(state, since, problem)
        else:
            log.warning("%s is skipped: %s", path, problem, extra={"code": "bad_image"})
            if state is not None:
                self._recent[name] = state
        return None


def _file_state(entry: os.DirEntry[str] | Path) -> tuple[int, _Identity]:
    """Return the ctime of a file in ns, and values that change with its contents."""
    own = entry.stat(follow_symlinks=False)
    about = entry.stat() if entry.is_symlink() else own
    changed = max(about.st_ctime_ns, own.st_ctime_ns)  # a new link to an old file is new
    return changed, (about.st_ino, about.st_mtime_ns, about.st_size)
