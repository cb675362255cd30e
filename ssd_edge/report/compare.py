"""The methods that a run is compared with, in the order and under the names used by all reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ssd_edge.learners import LEARNERS

DISPLAY = {**{name: kind.display for name, kind in LEARNERS.items()}, "joint": "joint"}
ROLES = {"learner": "this run", "baseline": "baseline", "panel": "panel head", "joint": "all data at once"}


@dataclasses.dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Attributes:
        name: name of the learner, or ``joint``.
        display: name to show.
        role: a key of `ROLES`.
        values: as in metrics.json.
    """

    name: str
    display: str
    role: str
    values: Mapping[str, Any]


def compared(metrics: Mapping[str, Any]) -> list[Method]:
    """Return the learner, the baselines, the heads of the panel and joint training, in this order.

    Methods of the same role are in the order of `DISPLAY`. A baseline or head equal to the learner is left out.
    """
    known = list(DISPLAY)

    def place(item: tuple[str, Any]) -> int:
        return known.index(item[0]) if item[0] in known else len(known)

    learner = metrics["learner"]
    methods = [Method(learner, metrics.get("display") or DISPLAY.get(learner, learner), "learner", metrics)]
    for key, values in sorted(metrics.get("baselines", {}).items(), key=place):
        if key != learner:
            methods.append(Method(key, values.get("display") or DISPLAY.get(key, key), "baseline", values))
    for key, accuracy in sorted(metrics.get("panel", {}).items(), key=place):
        if key != learner:
            values = {**metrics.get("panel_details", {}).get(key, {}), "average_accuracy": accuracy}
            role = "joint" if key == "joint" else "panel"
            methods.append(Method(key, values.get("display") or DISPLAY.get(key, key), role, values))
    return sorted(methods, key=lambda method: list(ROLES).index(method.role))


def ranked(metrics: Mapping[str, Any]) -> list[Method]:
    """Return the methods of `compared`, most accurate first."""
    return sorted(compared(metrics), key=lambda method: -method.values["average_accuracy"])


def lead_note(metrics: Mapping[str, Any]) -> str:
    """Return a sentence on the methods ahead of the learner, or an empty string if there are none.

    Joint training does not count, because it sees all classes at once, nor does a lead that rounds to 0.0 points.
    """
    own = metrics["average_accuracy"]
    rivals = [method for method in ranked(metrics) if method.role in ("baseline", "panel")]
    leads = [(rival.display, round(100 * (rival.values["average_accuracy"] - own), 1)) for rival in rivals]
    leads = [(name, lead) for name, lead in leads if lead > 0]
    if not leads:
        return ""
    (first, most), *others = leads
    also = ", ".join(f"{name} by {lead:.1f}" for name, lead in others)
    sentence = f"{first} is {most:.1f} points ahead of {compared(metrics)[0].display} on this stream"
    return f"{sentence} (also ahead: {also})." if also else f"{sentence}."
