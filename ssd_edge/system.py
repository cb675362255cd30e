"""Package version, the process and its machine (cores, memory, disk, clock, locks), and units for people."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from ssd_edge.errors import EnvironmentUnfitError, InputError, system_problem

VERSION = "0.1.0"  # the only place: pyproject.toml and ssd_edge.__version__ read it
MIB = 2**20
PROCESS = Path("/proc/self")
# On x86-64 without VNNI, ONNX Runtime multiplies int8 with instructions that add two products in 16 bits and saturate,
# so an int8 backbone gives other results than on every other machine. This session option selects kernels that do not.
EXACT_INT8 = ("session.x64quantprecision", "1")
# Switches of packages that send usage data unless told otherwise: ONNX Runtime, Hugging Face, Ray, Flower, and the
# convention that others follow.
NO_TELEMETRY = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "DO_NOT_TRACK": "1",
}


def disable_telemetry() -> None:
    """Set `NO_TELEMETRY` for this process and its children; a variable that is set already keeps its value.

    Importing `ssd_edge`, `exporters` or `device_runtime` does this, because the packages read it as they are loaded.
    """
    for name, value in NO_TELEMETRY.items():
        os.environ.setdefault(name, value)


def cache_folder() -> Path:
    """Return the folder of all caches: ``$SSD_EDGE_CACHE``, ``$XDG_CACHE_HOME/ssd-edge`` or ``~/.cache/ssd-edge``."""
    if named := os.environ.get("SSD_EDGE_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ssd-edge"


def usable_cores() -> int:
    """Return the number of processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ranks() -> tuple[int, int]:
    """Return the rank of this process and the number of processes that torchrun has started: 0 and 1 without it.

    Raises:
        InputError: The environment variables are not those of torchrun.
    """
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    count, rank = os.environ["WORLD_SIZE"], os.environ.get("RANK", "")
    if not (count.isdecimal() and rank.isdecimal() and int(rank) < int(count)):
        raise InputError(
            f"WORLD_SIZE is '{count}' and RANK is '{rank}', which torchrun does not set; unset WORLD_SIZE, or start "
            "with torchrun"
        )
    return int(rank), int(count)


def resident(field: str = "VmRSS", process: Path = PROCESS) -> int:
    """Return the resident memory of a process in bytes, as reported by Linux (proc(5)).

    Args:
        field: ``VmRSS`` for the current value, ``VmHWM`` for the peak.
        process: Folder of the process in ``/proc``.

    Returns:
        Bytes, or 0 where the system does not report the field.
    """
    try:
        for line in (process / "status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def return_memory() -> None:
    """Give freed memory back to the system: glibc keeps most of what threads have freed. Elsewhere, do nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def available_memory() -> int:
    """Return the bytes that programs can still use, or half of the memory where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def reset_peak(process: Path = PROCESS) -> bool:
    """Reset the peak memory (``VmHWM``) to the current value.

    Returns:
        True if the system allows it.
    """
    try:
        (process / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def nearest_folder(path: Path) -> Path:
    """Return `path` as an absolute path, or its nearest parent that exists.

    Raises:
        OSError: It cannot be determined, e.g. for lack of permission.
    """
    path = Path(path).absolute()
    while path != path.parent:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
            break
        path = path.parent
    return path


def disk_free(path: Path) -> int:
    """Return the bytes that this user can still write at `path`, which need not exist yet.

    Raises:
        OSError: The file system does not respond.
    """
    return shutil.disk_usage(nearest_folder(path)).free


def utc_now() -> str:
    """Return the wall-clock time in UTC as ISO 8601 with whole seconds.

    A device without a clock battery starts in 1970, and a clock can be set back: do not order events by it.
    """
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@contextlib.contextmanager
def file_lock(path: Path, folder: int | None = None) -> Iterator[bool]:
    """Hold an exclusive lock on a file between processes, without waiting for it.

    The file is created if it does not exist, contains the process id of the holder, and is never removed. It is not
    written before the lock is held, nor if it has another name as well.

    Args:
        path: The file; a symbolic link or another special file is refused.
        folder: Descriptor of its folder, so that no link on the way to it is followed.

    Yields:
        True while the lock is held, False if another process holds it (see `lock_holder`).

    Raises:
        EnvironmentUnfitError: The file cannot be created, or its file system does not support locks.
    """
    # The file is opened in place: an atomic rename (files.py) would replace it by another file with another lock.
    try:
        name = path if folder is None else path.name
        handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644, dir_fd=folder)
    except OSError as error:
        raise _cannot_lock(path, error) from error
    try:
        try:
            about = os.fstat(handle)
            if not stat.S_ISREG(about.st_mode):
                raise OSError(errno.ENXIO, "not a regular file")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise _cannot_lock(path, error) from error
        try:
            if about.st_nlink == 1:
                with contextlib.suppress(OSError):  # on a full disk: the process id is only for messages
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
            yield True
        finally:
            # Closing does not release the lock while a child process, forked in the meantime, has the file open.
            fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


def lock_holder(path: Path) -> str:
    """Return the id of the process that last locked `path` with `file_lock`, or ``unknown``."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as stream:
            text = stream.read(20).decode("ascii", "replace").strip()
    except OSError:
        return "unknown"
    return text if text.isdecimal() else "unknown"


def _cannot_lock(path: Path, error: OSError) -> EnvironmentUnfitError:
    return EnvironmentUnfitError(f"cannot lock {path}: {system_problem(error)}")


def duration(seconds: float | None) -> str:
    """Format seconds as ``4 ms``, ``0.42 s``, ``12.3 s``, ``3 min 04 s`` or ``2 h 05 min``; None as a dash."""
    if seconds is None:
        return "–"
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float | None) -> str:
    """Format bytes as ``812 B``, ``4.1 kB`` or ``12.3 MB`` (powers of 1,000); None as a dash."""
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
