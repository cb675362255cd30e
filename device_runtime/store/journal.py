"""Journal of a store: one event per line, appended and never changed. It is for people; no state is read from it.

Anyone who can write the file can write any line. A line whose values are out of range counts as unreadable, and no line
can make the store unusable.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from device_runtime.store.record import check_damage
from ssd_edge import files
from ssd_edge.errors import system_problem
from ssd_edge.system import utc_now

# Larger numbers are not continued, so that a line can never use up the numbers; READABLE ones can be shown.
MAX_NUMBER, MAX_SEQ = 999_999, 10**9
READABLE = 10**12


class Journal:
    """``ROOT/journal.jsonl``. Events are ordered by ``seq`` (1, 2, …), independent of the clock."""

    def __init__(self, root: Path) -> None:
        self.path = root / "journal.jsonl"
        self._tree = files.Tree(root)

    def events(self) -> Sequence[dict[str, Any]]:
        """Return the events in order, without unreadable lines (cut short or damaged)."""
        return [event for _, event in self.lines() if event is not None]

    def lines(self) -> Sequence[tuple[bytes, dict[str, Any] | None]]:
        """Return every non-empty line with its event, or None if it is unreadable."""
        result = []
        for line in self._bytes().splitlines():
            if line:
                result.append((line, _event(line)))
        return result

    def problem(self) -> str:
        """Return why the file cannot be read at all, or an empty string."""
        return self._read()[1]

    def is_complete(self) -> bool:
        """Return True if the last line ends with a newline."""
        return (self._bytes() or b"\n").endswith(b"\n")

    def append(self, event: str, number: int, **fields: Any) -> None:
        """Append an event about a generation.

        Raises:
            EnvironmentUnfitError: The disk is full or read-only.
        """
        if not self.is_complete():
            self._tree.append(self.path, "")  # ends the line that a crash has left incomplete
        self._tree.append(self.path, self._line(event, number, fields))

    def drop_unreadable(self) -> None:
        """Rewrite the journal without unreadable lines."""
        lines = self.lines()
        if not self.is_complete() or any(event is None for _, event in lines):
            self._tree.write(self.path, b"".join(line + b"\n" for line, event in lines if event is not None))

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
            self._tree.write(self.path, b"".join(line + b"\n" for line in kept))

    def replace(self, kept: str, event: str, number: int, **fields: Any) -> None:
        """Drop all events but those of the kind `kept`, and append one as `append` does, in one step."""
        lines = [line for line, earlier in self.lines() if earlier is not None and earlier.get("event") == kept]
        lines.append(self._line(event, number, fields).encode())
        self._tree.write(self.path, b"".join(line + b"\n" for line in lines))

    def _line(self, event: str, number: int, fields: Mapping[str, Any]) -> str:
        seq = max((earlier["seq"] for earlier in self.events() if earlier["seq"] < MAX_SEQ), default=0) + 1
        line = {"seq": seq, "untrusted_time": utc_now(), "event": event, "generation": number, **fields}
        return json.dumps(line, allow_nan=False)

    def _bytes(self) -> bytes:
        return self._read()[0]

    def _read(self) -> tuple[bytes, str]:
        """Return the content and why it cannot be read; a damaged journal must not make the store unusable."""
        try:
            return self._tree.read(self.path), ""
        except FileNotFoundError:
            return b"", ""
        except OSError as error:
            check_damage(self.path, error)
            return b"", system_problem(error)


def _event(line: bytes) -> dict[str, Any] | None:
    """Return the event in a line, or None if it is unreadable or its values are out of range."""
    try:
        value = json.loads(line)
        json.dumps(value, allow_nan=False)  # as `history` will print it
        seq, number = value["seq"], value["generation"]
        known = type(seq) is type(number) is int and 0 < seq < READABLE and 0 < number < READABLE
        event: dict[str, Any] | None = value if known else None
        return event
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
