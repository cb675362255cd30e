"""Tables and the figure of docs/landmark.md, from the results of benchmarks/panel.py and benchmarks/directions.py."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ssd_edge.learners import LEARNERS
from ssd_edge.report.figures import learner_style
from ssd_edge.report.wording import percent, points
from ssd_edge.reproduction.drawings import Series, lines
from ssd_edge.system import size

STREAMS = {
    "cifar10": "CIFAR-10, 5 × 2",
    "cifar100-10x10": "CIFAR-100, 10 × 10",
    "cifar100-50x2": "CIFAR-100, 50 × 2",
    "mnist": "MNIST, 5 × 2",
    "tiny-imagenet": "Tiny-ImageNet, 10 × 10",
    "mnist-pixels": "MNIST, raw pixels, 5 × 2",
}
PROTOCOLS = {
    "cifar10": "clean",
    "cifar10-repetition": "classes come again",
    "cifar10-blurry": "blurry",
    "cifar10-online": "online, one pass",
}
# In the order of the tables: heads of adjustable size come before those of fixed size.
HEADS = {name: LEARNERS[name].display for name in ("landmark", "ranpac", "fecam", "flymodel", "slda", "ridge", "ncm")}
SHOTS = (5, 20, 100, 0)


def _rows(summary: Sequence[dict]) -> list[tuple[str, dict[int, dict]]]:
    by_stream = {name: {row["shots"]: row for row in summary if row["stream"] == name} for name in STREAMS}
    return [(STREAMS[name], row) for name, row in by_stream.items() if row]


def best_table(summary: Sequence[dict]) -> str:
    """Return accuracy of `landmark` in each regime and its lead over the best head of at most its size."""
    lines_ = ["| images per class | 5 | 20 | 100 | all |", "|---|---|---|---|---|"]
    for title, row in _rows(summary):
        cells = []
        for shots in SHOTS:
            one = row[shots]
            worse = ", *WORSE*" if one["verdict"] != "ok" else ""
            cells.append(
                f"{percent(one['heads']['landmark']['accuracy'])} {points(one['gain'], signed=True)} "
                f"({points(one['two_errors'])}) on {HEADS[one['best_rival']]}{worse}"
            )
        lines_.append(f"| {title} | {' | '.join(cells)} |")
    for name, chosen in (
        ("mean gain", list(STREAMS)),
        ("without raw pixels", [name for name in STREAMS if name != "mnist-pixels"]),
    ):
        cells = []
        for shots in SHOTS:
            gains = [row["gain"] for row in summary if row["stream"] in chosen and row["shots"] == shots]
            cells.append(points(statistics.fmean(gains), signed=True))
        lines_.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines_)


def mean_table(summary: Sequence[dict]) -> str:
    """Return the accuracy of each head, averaged over the streams with a backbone."""
    lines_ = ["| mean of the five with a backbone | 5 | 20 | 100 | all |", "|---|---|---|---|---|"]
    for head, title in HEADS.items():
        cells = []
        for shots in SHOTS:
            accuracies = [
                row["heads"][head]["accuracy"]
                for row in summary
                if row["shots"] == shots and row["stream"] != "mnist-pixels"
            ]
            cells.append(percent(statistics.fmean(accuracies)))
        lines_.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines_)


def frontier_table(results: Sequence[dict]) -> str:
    """Return the accuracy of each head at each size."""
    budgets = sorted({one["budget_mb"] for one in results if one["budget_mb"]})
    shown = " | ".join(f"{budget:g} MB" for budget in budgets)
    lines_ = [f"| | own size | {shown} |", "|---|---|" + "---|" * len(budgets)]
    for head, title in HEADS.items():
        cells = []
        for budget in (0, *budgets):
            one = next((p for p in results if p["head"] == head and p["budget_mb"] == budget and "accuracy" in p), None)
            beside = "" if budget or one is None else f" ({size(one['state_bytes'])})"
            cells.append(f"{percent(one['accuracy'])}{beside}" if one else "–")
        lines_.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines_)


def frontier_figure(results: Sequence[dict]) -> str:
    """Draw the same values as lines over the binary logarithm of the size."""
    series = []
    for head, title in HEADS.items():
        points_ = sorted(
            (math.log2(one["state_bytes"] / 1e6), 100 * one["accuracy"])
            for one in results
            if one["head"] == head and "accuracy" in one
        )
        if points_:
            series.append(Series(title, points_, learner_style(head)))
    across = "state in MB, as a power of 2 (0: 1 MB, 5: 32 MB)"
    return lines("CIFAR-10, all images: accuracy in percent", series, across)


def streams_table(results: Sequence[dict]) -> str:
    """Return the accuracy of `landmark` on streams of other protocols."""
    lines_ = ["| CIFAR-10, all images, two class orders | accuracy |", "|---|---|"]
    for name, title in PROTOCOLS.items():
        accuracies = [one["accuracy"] for one in results if one["stream"] == name]
        if accuracies:
            lines_.append(f"| {title} | {' · '.join(percent(value) for value in accuracies)} |")
    return "\n".join(lines_)


def directions_table(rows: Sequence[dict]) -> str:
    """Return the accuracy of `landmark` with parts changed or removed."""
    lines_ = ["| images per class | 5 | 20 | 100 | all | state |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = " | ".join(percent(row[str(shots)]) for shots in SHOTS)
        lines_.append(f"| {row['variant']} | {cells} | {size(row['state_bytes'])} |")
    return "\n".join(lines_)
