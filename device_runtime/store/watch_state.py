"""``ROOT/watch.safetensors``: the drift counts of ``watch`` and its last report.

The file has a fixed size and holds no image and no embedding. It can be deleted at any time: counting then starts over.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ssd_edge import files
from ssd_edge.errors import SSDEdgeError
from ssd_edge.system import utc_now

log = logging.getLogger(__name__)

NAME = "watch.safetensors"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def save(root: Path, counts: Mapping[str, np.ndarray], fields: Mapping[str, Any], monotonic: float) -> None:
    """Write the drift counts and the report that belongs to them.

    Args:
        root: The device's root.
        counts: Drift counts, see `drift.Monitor.state`.
        fields: ``report``, ``named``, ``skipped`` and ``generation``; JSON values.
        monotonic: Seconds on the monotonic clock, for the age of the report.

    Raises:
        EnvironmentUnfitError: The disk is full or read-only.
    """
    record = {"version": 1, **fields, "untrusted_time": utc_now(), "monotonic": monotonic, "boot": _boot()}
    record["digest"] = _digest(counts, record)
    data, tree = files.tensor_bytes(counts, record), files.Tree(root)
    try:
        tree.write(root / NAME, data)
    except SSDEdgeError:  # a writer that starts removes all temporary files, this one included
        tree.write(root / NAME, data)


def load(root: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Return the drift counts and the fields saved with them; None without a file or for a damaged one (logged)."""
    path = root / NAME
    try:
        counts, record = files.parse_tensors(files.Tree(root).read(path), str(path))
        digest = record.pop("digest")
        if digest != _digest(counts, record) or record.pop("version") != 1:
            raise ValueError("it is not what was written, or of another version")
    except FileNotFoundError:
        return None
    except (SSDEdgeError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is damaged and is ignored: %s", path, error)
        return None
    return counts, record


def last_report(root: Path) -> dict[str, Any] | None:
    """Return the last report of ``watch`` as JSON values, or None if there is none or the file is damaged (logged).

    Returns:
        The fields of `drift.Monitor.report` (level, psi, reject_rate, images, …), ``named`` and ``skipped`` (images
        since the last start with and without a prediction), ``generation``, ``untrusted_time``, and ``age`` (seconds;
        None if saved before this boot).
    """
    loaded = load(root)
    if loaded is None:
        return None
    fields = dict(loaded[1])
    boot, saved = fields.pop("boot"), fields.pop("monotonic")
    fields["age"] = round(max(time.monotonic() - saved, 0.0), 1) if boot and boot == _boot() else None
    return {**fields.pop("report"), **fields}


def _digest(counts: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> str:
    return files.sha256(files.tensor_bytes(counts, record))


def _boot() -> str:
    """Return the id of this boot, or an empty string where the system does not report one."""
    with contextlib.suppress(OSError):
        return _BOOT.read_text(encoding="ascii").strip()
    return ""
