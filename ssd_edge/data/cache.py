"""Cache of embeddings between runs.

One safetensors file per key in `system.cache_folder`. The cache can be deleted at any time: if it is missing, damaged
or not writable, embeddings are recomputed.
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
from ssd_edge.files import (
    TEMPORARY_PREFIX,
    is_file,
    json_bytes,
    list_folder,
    make_directory,
    read_tensors,
    sha256,
    write_tensors,
)
from ssd_edge.system import cache_folder

DEFAULT_CAP_MB = 4096
_LOG = logging.getLogger(__name__)


def folder() -> Path:
    """Return the folder of the cache, which contains nothing else, so that pruning cannot delete other files."""
    return cache_folder() / "embeddings"


def embeddings(
    key_parts: dict[str, Any], compute: Callable[[], dict[str, np.ndarray]], enabled: bool = True
) -> dict[str, np.ndarray]:
    """Return arrays from the cache, or compute and cache them.

    Args:
        key_parts: Everything that the arrays depend on, as JSON values: data fingerprint, hash of the backbone, …
        compute: Computes the arrays.
        enabled: If False, the cache is neither read nor written.

    Returns:
        The arrays, exactly as `compute` returns them.

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
        _LOG.warning("the embeddings are not cached for the next run: %s", error)
    return arrays


def clear() -> int:
    """Delete the cache.

    Returns:
        Number of bytes freed.

    Raises:
        EnvironmentUnfitError: A file cannot be deleted.
    """
    freed = 0
    for path in _files():
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            continue  # deleted by another process
        except OSError as error:
            raise EnvironmentUnfitError(f"cannot delete {path}: {error.strerror}") from error
        freed += size
    return freed


def _cap() -> int:
    """Return the largest size of the cache in bytes."""
    text = os.environ.get("SSD_EDGE_CACHE_MB") or str(DEFAULT_CAP_MB)
    try:
        megabytes = int(text)
    except ValueError:
        megabytes = -1
    if megabytes < 0:
        raise InputError(f"SSD_EDGE_CACHE_MB must be a whole number of megabytes, but is '{text}'")
    return megabytes << 20


def _files() -> list[Path]:
    """Return the files of the cache, including temporary files of killed processes."""
    return [
        path
        for path in list_folder(folder())
        if path.suffix == ".safetensors" or path.name.startswith(TEMPORARY_PREFIX)
    ]


def _read(path: Path) -> dict[str, np.ndarray] | None:
    try:
        if not is_file(path):
            return None
        arrays, _ = read_tensors(path)
    except (SSDEdgeError, OSError) as error:
        _LOG.warning("a damaged cache file is removed, its embeddings are recomputed: %s", error)
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # records the last use; access times of file systems are not reliable
    return arrays


def _prune(cap: int) -> None:
    """Delete the least recently used files until the cache is within its limit."""
    sizes = {}
    for path in _files():
        with contextlib.suppress(FileNotFoundError):  # deleted by another process
            status = path.stat()
            sizes[path] = (status.st_mtime_ns, status.st_size)
    total = sum(size for _, size in sizes.values())
    for path in sorted(sizes, key=lambda path: sizes[path]):
        if total <= cap:
            break
        path.unlink(missing_ok=True)
        total -= sizes[path][1]
