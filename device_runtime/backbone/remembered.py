"""``ROOT/provider.json``: what ran the backbone when it was last started, so that a warning is given once per device.

It can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from ssd_edge import files
from ssd_edge.errors import SSDEdgeError

NAME = "provider.json"


@dataclasses.dataclass(frozen=True)
class Started:
    """Start of a backbone: its provider, and why it is that one.

    Attributes:
        backbone: SHA-256 of the backbone.
        provider: What runs it.
        note: Why that is not what its target is prepared for, or not the fastest; empty if it is.
        reported: True if a user was told.
    """

    backbone: str
    provider: str
    note: str
    reported: bool


def last(root: Path, backbone: str) -> Started | None:
    """Return how a backbone was last started in a root; None if it never was, or if that is not known."""
    path = root / NAME
    try:
        values: Any = files.parse_json(files.Tree(root).read(path), str(path))
        started = Started(**values)
    except (SSDEdgeError, OSError, TypeError):
        return None
    known = started.backbone == backbone and isinstance(started.provider, str) and isinstance(started.note, str)
    return started if known else None


def remember(root: Path, backbone: str, provider: str, note: str, reported: bool) -> bool:
    """Record how a backbone was started.

    Args:
        root: The device's root.
        backbone: SHA-256 of the backbone.
        provider: What runs it.
        note: See `Started`.
        reported: True if a user is told now.

    Returns:
        True if a user was told the same before.
    """
    before = last(root, backbone)
    told = before is not None and before.reported and before.note == note
    started = Started(backbone, provider, note, bool(note) and (reported or told))
    if started != before:
        with contextlib.suppress(SSDEdgeError):  # a full or read-only disk; or a writer that starts, and tidies up
            files.Tree(root).write(root / NAME, files.json_bytes(dataclasses.asdict(started)))
    return told
