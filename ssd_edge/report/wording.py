"""Text for numbers and streams, the same in the HTML report, on the terminal and in the documentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssd_edge.learners.registry import CLOSED_FORM
from ssd_edge.system import size

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


def forgets_nothing(learner: str) -> bool:
    """Return True for a learner that keeps exact sums of all it has learned, so that order does not matter."""
    return learner in CLOSED_FORM


def development(metrics: Mapping[str, Any]) -> str:
    """Say in plain words how the accuracy developed over the tasks of a metrics.json; empty for a single step."""
    matrix, drop, transfer = metrics["accuracy_matrix"], metrics.get("forgetting"), metrics.get("backward_transfer")
    if len(matrix) < 2 or drop is None or transfer is None:
        return ""
    curve, classes = metrics["accuracy_curve"], len(metrics["classes"])
    introduced = metrics.get("introduced", range(len(metrics["tasks"])))
    first = sum(
        len(task["classes"]) for task, when in zip(metrics["tasks"], introduced, strict=True) if when == introduced[0]
    )
    sentences = [f"{percent(curve[0])} with the first {first} classes, {percent(curve[-1])} with all {classes}."]
    if drop < 0.0005:
        return f"{sentences[0]} No task lost accuracy when later ones were learned."
    lost = f"{points(drop)} points"
    if forgets_nothing(metrics["learner"]):
        sentences.append(
            f"Later classes made this harder: earlier ones lost {lost}, because there is more to tell apart. "
            "Nothing was forgotten: this learner keeps exact sums of all it has learned."
        )
    else:
        sentences.append(f"Earlier classes lost {lost} when later ones were learned: this learner forgets.")
    return " ".join(sentences)


def describe_choice(choice: Mapping[str, Any]) -> str:
    """Describe the choice of ``learner.name=auto`` and its candidates, as metrics.json has it."""

    def one(row: Mapping[str, Any]) -> str:
        accuracy = "" if row["accuracy"] is None else f" {percent(row['accuracy'])}"
        return f"{row['name']}{accuracy} ({size(row['state_bytes'])})"

    return f"Chosen by learner.name=auto: {choice['sentence']}. Candidates: {', '.join(map(one, choice['rows']))}."
