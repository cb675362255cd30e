"""Journal of a store: one event per line, appended and never changed. It is for people; no state is read from it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssd_edge import files
from ssd_edge.system import utc_now


class Journal:
    """``ROOT/journal.jsonl``. Events are ordered by ``seq`` (1, 2, …), independent of the clock."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def events(self) -> Sequence[dict[str, Any]]:
        """Return the events in order, without unreadable lines (cut short or damaged)."""
        return [event for _, event in self.lines() if event is not None]

    def lines(self) -> Sequence[tuple[bytes, dict[str, Any] | None]]:
        """Return every non-empty line with its event, or None if it is unreadable."""
        result = []
        for line in self._bytes().splitlines():
            event = None
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                value = json.loads(line)
                if type(value["seq"]) is int and type(value["generation"]) is int:
                    event = value
            if line:
                result.append((line, event))
        return result

    def is_complete(self) -> bool:
        """Return True if the last line ends with a newline."""
        return (self._bytes() or b"\n").endswith(b"\n")

    def append(self, event: str, number: int, **fields: Any) -> None:
        """Append an event about a generation.

        Raises:
            EnvironmentUnfitError: The disk is full or read-only.
        """
        if not self.is_complete():
            files.append_line(self.path, "")  # ends the line that a crash has left incomplete
        seq = max((earlier["seq"] for earlier in self.events()), default=0) + 1
        line = {"seq": seq, "untrusted_time": utc_now(), "event": event, "generation": number, **fields}
        files.append_line(self.path, json.dumps(line, allow_nan=False))

    def drop_unreadable(self) -> None:
        """Rewrite the journal without unreadable lines."""
        lines = self.lines()
        if not self.is_complete() or any(event is None for _, event in lines):
            files.write_bytes(self.path, b"".join(line + b"\n" for line, event in lines if event is not None))

    def shorten(self, keep: int) -> None:
        """Drop old events once there are twice as many as `keep`, so that the journal does not fill the disk.

        Args:
            keep: Number of the newest events that stay. Every installation stays as well, because the highest
                installed release is derived from them.
        """
        lines = self.lines()
        if len(lines) >= 2 * keep:
            old = [line for line, event in lines[:-keep] if event is not None and event.get("event") == "install"]
            kept = old + [line for line, _ in lines[-keep:]]
            files.write_bytes(self.path, b"".join(line + b"\n" for line in kept))

    def _bytes(self) -> bytes:
        return files.read_bytes(self.path) if self.path.exists() else b""
