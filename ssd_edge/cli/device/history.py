"""``ssd-edge device history``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ssd_edge.cli.options import JSON, ROOT, echo, open_device, print_json

if TYPE_CHECKING:
    from device_runtime.results import HistoryEntry

ROLLBACKS = 10  # newest ones that are shown


@click.command()
@ROOT
@JSON
def history(root: Path | None, as_json: bool) -> None:
    """Show all generations as a tree, with what made them, and the last rollbacks.

    A generation stands below the one that it was made from.
    """
    result = open_device(root).history()
    if as_json:
        print_json(result.to_dict())
        return
    lines = list(tree(result.generations))
    width = max((len(branch) for branch, _ in lines), default=0)
    known = {entry.number for entry in result.generations}
    for branch, entry in lines:
        mark = "*" if entry.current else " "
        gone = "" if entry.parent is None or entry.parent in known else f" (from {entry.parent}, which was pruned)"
        note = "" if entry.intact else f"DAMAGED: {entry.problem}"
        echo(f"{mark} {branch:{width}}  {entry.created_utc or '':20}  {entry.what}{gone}{note}")
    for event in [event for event in result.events if event.get("event") == "rollback"][-ROLLBACKS:]:
        before, when = (event.get("info") or {}).get("from", "?"), event.get("untrusted_time", "")
        echo(f"rolled back from {before} to {event['generation']}  {when}")


def tree(entries: Sequence[HistoryEntry]) -> Iterator[tuple[str, HistoryEntry]]:
    """Yield each generation with its branch: its number, indented if a later one was made from the same generation."""
    known = {entry.number: entry for entry in entries}
    children: dict[int | None, list[int]] = {}
    for entry in entries:
        children.setdefault(entry.parent if entry.parent in known else None, []).append(entry.number)
    left = [(number, "", "") for number in reversed(children.get(None, ()))]  # a stack
    while left:
        number, before, below = left.pop()
        yield f"{before}{number}", known[number]
        *branches, last = children.get(number, [0])
        if last:
            left.append((last, below, below))
        left += [(branch, f"{below}├─ ", f"{below}│  ") for branch in reversed(branches)]
