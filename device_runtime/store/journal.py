"""The journal of a store: one event a line, appended and never changed. It is for people; no state is read from it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssd_edge import files
from ssd_edge.system import utc_now


class Journal:
    """``ROOT/journal.jsonl``. Events are ordered by ``seq`` alone: 1, 2, …, whatever the clock says."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def events(self) -> Sequence[dict[str, Any]]:
        """The events, in order; a line that cannot be read (cut short, damaged) is left out."""
        return [event for _, event in self.lines() if event is not None]

    def lines(self) -> Sequence[tuple[bytes, dict[str, Any] | None]]:
        """Every line that is not empty, with its event; None for one that cannot be read."""
        found = []
        for line in self._bytes().splitlines():
            event = None
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                value = json.loads(line)
                if type(value["seq"]) is int and type(value["generation"]) is int:
                    event = value
            if line:
                found.append((line, event))
        return found

    def is_whole(self) -> bool:
        """Whether the last line ends as it should."""
        return (self._bytes() or b"\n").endswith(b"\n")

    def append(self, event: str, number: int, **fields: Any) -> None:
        """Add an event about a generation.

        Raises:
            EnvironmentUnfitError: the disk is full, read-only or forbidden.
        """
        if not self.is_whole():
            files.append_line(self.path, "")  # ends the line that a cut left incomplete
        seq = max((earlier["seq"] for earlier in self.events()), default=0) + 1
        line = {"seq": seq, "untrusted_time": utc_now(), "event": event, "generation": number, **fields}
        files.append_line(self.path, json.dumps(line, allow_nan=False))

    def drop_unreadable(self) -> None:
        """Write the journal anew without the lines that cannot be read."""
        lines = self.lines()
        if not self.is_whole() or any(event is None for _, event in lines):
            files.write_bytes(self.path, b"".join(line + b"\n" for line, event in lines if event is not None))

    def shorten(self, keep: int) -> None:
        """Drop older events once there are twice as many as are to be kept: a journal must not fill a disk in years.

        Args:
            keep: so many of the newest stay, and every installation: the highest release that was installed is known
                from them.
        """
        lines = self.lines()
        if len(lines) >= 2 * keep:
            old = [line for line, event in lines[:-keep] if event is not None and event.get("event") == "install"]
            kept = old + [line for line, _ in lines[-keep:]]
            files.write_bytes(self.path, b"".join(line + b"\n" for line in kept))

    def _bytes(self) -> bytes:
        return files.read_bytes(self.path) if self.path.exists() else b""
