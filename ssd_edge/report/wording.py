"""Text for numbers and streams, the same in the HTML report, on the terminal and in the documentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STREAM_KINDS = {
    "class_incremental": "class-incremental",
    "repetition": "class-incremental with repetition",
    "blurry": "blurry",
}


def percent(value: float | None) -> str:
    """Format a share as ``73.1 %``; None becomes a dash."""
    return "–" if value is None else f"{100 * value:.1f} %"


def points(value: float | None, signed: bool = False) -> str:
    """Format a difference of shares in percentage points: ``4.2``, or ``−4.2`` if signed; None becomes a dash."""
    if value is None:
        return "–"
    rounded = round(100 * value, 1) + 0.0  # turns -0.0 into 0.0
    return (f"{rounded:+.1f}" if signed and rounded else f"{rounded:.1f}").replace("-", "−")


def stream_name(kind: str, online: bool) -> str:
    """Return the name of a kind of stream, e.g. ``blurry, online``."""
    return STREAM_KINDS[kind] + (", online" if online else "")


def step_name(tasks: int, experiences: int) -> str:
    """Return ``task`` if every step of the stream introduces classes, else ``experience``."""
    return "task" if experiences == tasks else "experience"


def extent(classes: int, tasks: int, experiences: int) -> str:
    """Return ``10 classes in 5 tasks``, with the number of experiences where it differs from that of the tasks."""
    text = f"{classes} classes in {tasks} {'task' if tasks == 1 else 'tasks'}"
    return text if experiences == tasks else f"{text} over {experiences} experiences"


def describe_stream(metrics: Mapping[str, Any]) -> str:
    """Return the extent and the kind of the stream of a metrics.json; older files do not name the kind."""
    text = extent(len(metrics["classes"]), len(metrics["tasks"]), len(metrics["accuracy_matrix"]))
    stream = metrics.get("stream")
    return f"{text}, {stream_name(stream['kind'], stream['online'])}" if stream else text
