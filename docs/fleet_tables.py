"""Tables of docs/fleet.md, for figures.py."""

from __future__ import annotations

from typing import Any


def fleet_table(found: dict[str, Any]) -> str:
    """Return how a fleet compares with one device that was taught everything."""
    lines = [
        "| | all is well | failures, repeats, garbage | bar |",
        "|---|---|---|---|",
    ]
    good, bad = found["good"], found["bad"]

    def row(label: str, cell: Any, bar: str = "") -> None:
        lines.append(f"| {label} | {cell(good)} | {cell(bad)} | {bar} |")

    row("devices asked, counted", lambda one: f"{one['devices']:,}, {one['counted']:,}")
    row(
        "failed, answered twice, garbage",
        lambda one: f"{one['failed']}, {one['repeated']}, {one['refused']}" + (" (all named)" if named(one) else ""),
    )
    row("largest difference of a score", lambda one: f"{one['largest_difference']:.1e}", "1e-3")
    row("largest score", lambda one: f"{one['largest_score']:.0f}")
    row("same answers", lambda one: f"{one['same_answers']:.2%}")
    row("accuracy; of the one device", lambda one: f"{one['accuracy_fleet']:.1%}; {one['accuracy_one']:.1%}")
    row("time: teach, answer, add, write", lambda one: f"{one['seconds'] / 60:.1f} min", "10 min")
    row("a device sends, at most", lambda one: f"{one['bytes'][2] / 1e3:,.0f} kB", "4 MB")
    row("state of the learner", lambda one: f"{one['state_bytes'] / 1e3:,.0f} kB", "4 MB")
    row("ledger", lambda one: f"{one['ledger_mb']:.0f} MB")
    row("names taken for different things", lambda one: f"{one['conflicts']}")
    return "\n".join(lines)


def named(one: dict[str, Any]) -> bool:
    """Return True if every device with a problem is named in the report, and no other one."""
    return bool(one.get("named")) and all(one["named"].values())


def names_table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Return which pairs of devices are held to mean different things by a name."""
    lines = [
        "| data | images of each device | same class | same class, another occasion | different classes |",
        "|---|---|---|---|---|",
    ]
    for data, rows in found.items():
        lines += [
            f"| {data} | {row['images']} | {row['same']:.1%} | {row['another_occasion']:.1%} | {row['different']:.1%} |"
            for row in rows
        ]
    return "\n".join(lines)
