"""Embeddings that were computed before, kept between runs.

One safetensors file for each key, in ``$SSD_EDGE_CACHE`` or ``~/.cache/ssd-edge`` (``$XDG_CACHE_HOME`` is
honoured). It can be deleted at any time: a cache that is lost, damaged or not writable costs time only.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ssd_edge.errors import EnvironmentUnfitError, InputError, SSDEdgeError
from ssd_edge.files import TEMPORARY_PREFIX, json_bytes, make_directory, read_tensors, sha256, write_tensors

DEFAULT_CAP_MB = 4096
_LOG = logging.getLogger(__name__)


def folder() -> Path:
    """Where the embeddings are: a folder of their own, so that nothing else in there is ever deleted."""
    if named := os.environ.get("SSD_EDGE_CACHE"):
        return Path(named).expanduser() / "embeddings"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "ssd-edge" / "embeddings"


def embeddings(
    key_parts: dict[str, Any], compute: Callable[[], dict[str, np.ndarray]], enabled: bool = True
) -> dict[str, np.ndarray]:
    """Take arrays from the cache, or compute and keep them.

    Args:
        key_parts: all that the arrays depend on, as JSON values: fingerprint of the data, hash of the
            backbone, …
        compute: makes the arrays when they are not in the cache.
        enabled: False: neither read nor write.

    Returns:
        The arrays, exactly as `compute` makes them.

    Raises:
        InputError: ``$SSD_EDGE_CACHE_MB`` is not a number.
    """
    if not enabled:
        return compute()
    cap = _cap()
    path = folder() / f"{sha256(json_bytes(key_parts))}.safetensors"
    if (kept := _read(path)) is not None:
        return kept
    arrays = compute()
    try:
        make_directory(path.parent)
        write_tensors(path, arrays, {"key": key_parts})
        _prune(cap)
    except (SSDEdgeError, OSError) as error:
        _LOG.warning("the embeddings are not kept for the next run: %s", error)
    return arrays


def clear() -> int:
    """Delete all of the cache.

    Returns:
        How many bytes that frees.

    Raises:
        EnvironmentUnfitError: a file cannot be deleted.
    """
    freed = 0
    for path in _files():
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            continue  # another process was quicker
        except OSError as error:
            raise EnvironmentUnfitError(f"cannot delete {path}: {error.strerror}") from error
        freed += size
    return freed


def _cap() -> int:
    """The most that the cache may hold, in bytes."""
    text = os.environ.get("SSD_EDGE_CACHE_MB") or str(DEFAULT_CAP_MB)
    try:
        megabytes = int(text)
    except ValueError:
        megabytes = -1
    if megabytes < 0:
        raise InputError(f"SSD_EDGE_CACHE_MB must be a whole number of megabytes, but is '{text}'")
    return megabytes << 20


def _files() -> list[Path]:
    """Cache files, and what a killed process has left of one."""
    return [*folder().glob("*.safetensors"), *folder().glob(f"{TEMPORARY_PREFIX}*")]


def _read(path: Path) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    try:
        arrays, _ = read_tensors(path)
    except (SSDEdgeError, OSError) as error:
        _LOG.warning("a damaged cache file is removed and computed anew: %s", error)
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # the time of its last use; file systems keep no reliable one of their own
    return arrays


def _prune(cap: int) -> None:
    """Delete the least recently used files until the cache fits."""
    sizes = {}
    for path in _files():
        with contextlib.suppress(FileNotFoundError):  # another process prunes as well
            status = path.stat()
            sizes[path] = (status.st_mtime_ns, status.st_size)
    total = sum(size for _, size in sizes.values())
    for path in sorted(sizes, key=lambda path: sizes[path]):
        if total <= cap:
            break
        path.unlink(missing_ok=True)
        total -= sizes[path][1]
