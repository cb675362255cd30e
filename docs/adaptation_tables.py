"""Tables of docs/adaptation.md; `figures.py` fills them in."""

from __future__ import annotations

import json
import statistics

from ssd_edge.report.wording import percent


def adapt_table(rows: list[dict]) -> str:
    """Return what adapting a network to one half of the classes is worth, by data set; of several orders, the mean."""
    lines = [
        "| images | network | orders | adapted to | all classes | the half | later classes |",
        "|---|---|---|---|---|---|---|",
    ]
    cases: dict[str, list[dict]] = {}
    for row in rows:
        cases.setdefault(json.dumps(row["case"], sort_keys=True), []).append(row)
    for found in cases.values():
        case, cells = found[0]["case"], []
        for part in ("all", "half", "later"):
            frozen, adapted = (statistics.fmean(row[kind][part] for row in found) for kind in ("frozen", "adapted"))
            each = [100 * (row["adapted"][part] - row["frozen"][part]) for row in found]
            spread = f" ({min(each):+.1f} to {max(each):+.1f})" if len(each) > 1 else ""
            cells.append(f"{percent(frozen)} → {percent(adapted)}{spread}")
        name = case["data"].split(".")[0].removesuffix("-jpg") + (", grey negatives" if case["negative"] else "")
        images = f"{round(statistics.fmean(row['images'] for row in found)):,} images"
        network = case["backbone"]
        if "package" in found[0]:
            alone = statistics.fmean(row["package"]["all"] for row in found)
            network += f" (as shipped, without levels: {percent(alone)})"
        lines.append(f"| {name} | {network} | {len(found)} | {images} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tail_table(rows: list[dict], order: int = 0) -> str:
    """Return the accuracy on all classes so far after each task of one order, carried and exact, by way."""
    of_order = [row for row in rows if row["order"] == order]
    tasks = len(of_order[0]["exact"])
    numbers = " | ".join(str(task + 1) for task in range(tasks))
    lines = [
        f"| tail | statistics | {numbers} | first task's classes, at the end |",
        "|---|---" + "|---" * (tasks + 1) + "|",
    ]
    for row in of_order:
        moving = row["way"] not in ("frozen", "first")
        for kind in ("carried", "exact") if moving else ("exact",):
            cells = " | ".join(f"{100 * each[0]:.1f}" for each in row[kind])
            lines.append(f"| {row['way']} | {kind} | {cells} | {100 * row[kind][-1][1]:.1f} |")
    return "\n".join(lines)


def tail_ends_table(rows: list[dict]) -> str:
    """Return the accuracy on all classes after the last task, by way and order."""
    orders = sorted({row["order"] for row in rows})
    lines = [
        f"| tail | {' | '.join(f'order {order}: carried, exact' for order in orders)} |",
        "|---" * (len(orders) + 1) + "|",
    ]
    for way in dict.fromkeys(row["way"] for row in rows):
        found = {row["order"]: row for row in rows if row["way"] == way}
        ends = [
            f"{100 * found[order]['carried'][-1][0]:.1f}, {100 * found[order]['exact'][-1][0]:.1f}"
            if order in found
            else "–"
            for order in orders
        ]
        lines.append(f"| {way} | {' | '.join(ends)} |")
    return "\n".join(lines)
