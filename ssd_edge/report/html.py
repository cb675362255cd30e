"""The report of a model: one HTML page that needs no network and shows everything without a script.

`page.html` is its template; `page.css` and `page.js` become part of it. The script only adds to it: looking up cells of
the confusion matrix, sorting and searching.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ssd_edge.report import findings
from ssd_edge.report.compare import ROLES, compared, lead_note, ranked
from ssd_edge.report.findings import Pair, Threshold
from ssd_edge.report.photographs import EXAMPLES, Album, album
from ssd_edge.report.results import LearningPoint, Results
from ssd_edge.report.template import fill
from ssd_edge.report.wording import (
    describe_choice,
    describe_stream,
    development,
    extent,
    forgets_nothing,
    percent,
    points,
    step_name,
)

SHOWN_PAIRS = 12
SHOWN_MISTAKES = 24
LISTED_PAIRS = 200  # in the table of the matrix
TERMS = (  # of the field, with what they mean; keys of metrics.json
    ("Average accuracy", "average_accuracy", percent, "mean over the tasks of the accuracy at the end"),
    (
        "Average incremental accuracy",
        "average_incremental_accuracy",
        percent,
        "mean of the accuracies after each step, on all that was learned so far",
    ),
    (
        "Backward transfer",
        "backward_transfer",
        lambda value: f"{points(value, signed=True)} points",
        "how the accuracy of earlier tasks changed since they were learned, on average; negative if it fell",
    ),
    (
        "Forgetting",
        "forgetting",
        lambda value: f"{points(value)} points",
        "how far earlier tasks are below the best accuracy that they ever had, on average, whatever the reason",
    ),
    (
        "Learning accuracy",
        "learning_accuracy",
        percent,
        "mean accuracy of the tasks right after they were learned",
    ),
)


def render(results: Results) -> str:
    """Return the page as a complete HTML document.

    Raises:
        EnvironmentUnfitError: Jinja2 is not installed; PyTorch brings it.
    """
    return fill("page.html", _content(results))


def _content(results: Results) -> dict[str, Any]:
    """Return the variables of the template."""
    answers, metrics = results.answers, results.metrics
    pairs, wrong, shown = findings.confused(answers), findings.mistakes(answers), album(results)
    right, images = int(answers.right.sum()), len(answers.truth)
    heading = f"{results.model} on {results.data}"
    return {
        "title": heading,
        "results": results,
        "answers": answers,
        "headline": _headline(answers.accuracy),
        "right": right,
        "images": images,
        "interval": findings.interval(right, images),
        "chance": 1 / len(results.classes),
        "facts": _facts(results),
        "steps": findings.steps(results),
        "album": shown,
        "mistakes": wrong[:SHOWN_MISTAKES] if shown.pictures else [],
        "wrong": len(wrong),
        "pairs": _pairs(results, pairs, shown),
        "listed": pairs[:LISTED_PAIRS],
        "unlisted": max(0, len(pairs) - LISTED_PAIRS),
        "cells": _cells(results),
        "order": findings.alike(answers, len(results.classes)),
        "classes": _classes(results, shown),
        "data": _data(results, shown),
        "images_chart": _images_chart(results),
        "doubling": findings.last_doubling(results.fewer),
        "threshold": findings.threshold(answers),
        "strict": _thresholds(findings.thresholds(answers)),
        "unknown_chart": _unknown_chart(findings.thresholds(answers), findings.threshold(answers)),
        "setup": {key: _tree(value) for key, value in _setup(results.record).items() if value},
        "command": shlex.join(map(str, results.record.get("argv", ()))),
        "accounts": {"warnings": (), "ignored": "", "skipped": (), **(results.record.get("accounts") or {})},
        "stream": _stream(metrics) if metrics is not None else None,
    }


def _headline(accuracy: float) -> str:
    """Return the answer that the page gives first."""
    return f"{percent(accuracy)} of the test images are named correctly"


def _facts(results: Results) -> list[str]:
    metrics = results.metrics
    stream = []
    if metrics is not None:
        stream = [extent(len(metrics["classes"]), len(metrics["tasks"]), len(metrics["accuracy_matrix"]))]
    learned = f"{sum(results.learned):,} training and {len(results.answers.truth):,} test images ({results.which})"
    seed = results.record.get("seed")
    return [f"{results.model} on {results.data}", *stream, learned, *([] if seed is None else [f"seed {seed}"])]


def _pairs(results: Results, pairs: Sequence[Pair], shown: Album) -> list[dict[str, Any]]:
    """Return the most confused pairs with their photographs."""
    found = []
    for number, pair in enumerate(pairs[:SHOWN_PAIRS]):
        if len(pair.wrong) < 2 and number >= 3:
            break
        found.append(
            {
                "pair": pair,
                "names": [results.classes[row] for row in pair.rows],
                "examples": [[i for i in shown.examples[row] if i in shown.pictures][:3] for row in pair.rows],
                "wrong": [index for index in pair.wrong if index in shown.pictures][:EXAMPLES],
            }
        )
    return found


def _cells(results: Results) -> list[tuple[int, int, float]]:
    """Return the cells of the confusion matrix that are not empty: row, answer, and opacity by share of the row."""
    answers, classes = results.answers, len(results.classes)
    codes, counts = np.unique(answers.truth * classes + answers.given, return_counts=True)
    tested = np.bincount(answers.truth, minlength=classes)
    rows, columns = codes // classes, codes % classes
    shares, wrong = counts / tested[rows], rows != columns
    shares[wrong] /= shares[wrong].max(initial=0.2)  # mistakes are rare: compared with each other
    shades = 0.15 + 0.85 * np.where(wrong, shares**0.7, shares**1.5)
    return list(zip(rows.tolist(), columns.tolist(), shades.tolist(), strict=True))


def _classes(results: Results, shown: Album) -> list[dict[str, Any]]:
    """Return what the list of classes shows, the worst first."""
    answers, found = results.answers, []
    wrong = findings.mistakes(answers)
    missed: dict[int, list[int]] = {}
    taken: dict[int, dict[int, int]] = {}
    for index in wrong:
        truth, given = int(answers.truth[index]), int(answers.given[index])
        missed.setdefault(truth, []).append(index)
        counts = taken.setdefault(truth, {})
        counts[given] = counts.get(given, 0) + 1
    tested = np.bincount(answers.truth, minlength=len(results.classes))
    for row, name in enumerate(results.classes):
        images, misses = int(tested[row]), missed.get(row, [])
        others = sorted(taken.get(row, {}).items(), key=lambda item: -item[1])
        found.append(
            {
                "row": row,
                "name": name,
                "images": images,
                "right": images - len(misses),
                "accuracy": (images - len(misses)) / images if images else None,
                "learned": results.learned[row],
                "examples": [index for index in shown.examples[row] if index in shown.pictures],
                "wrong": [index for index in misses if index in shown.pictures],
                "taken": [(results.classes[other], count) for other, count in others],
            }
        )
    return sorted(found, key=lambda one: (one["accuracy"] is None, one["accuracy"], one["name"]))


def _data(results: Results, shown: Album) -> dict[str, Any]:
    """Return what the script needs to look up a cell of the matrix."""
    cells: dict[str, tuple[int, list[int]]] = {}
    answers = results.answers
    for index in findings.mistakes(answers):
        key = f"{answers.truth[index]},{answers.given[index]}"
        count, pictured = cells.get(key, (0, []))
        cells[key] = count + 1, [*pictured, *([index] if index in shown.pictures else [])]
    tested = np.bincount(answers.truth, minlength=len(results.classes))
    by_name = sorted(range(len(results.classes)), key=lambda row: results.classes[row].casefold())
    return {
        "classes": results.classes,
        "tested": tested.tolist(),
        "examples": [[index for index in some if index in shown.pictures] for some in shown.examples],
        "cells": cells,
        "orders": {
            "alike": findings.alike(answers, len(results.classes)),
            "learned": list(range(len(results.classes))),
            "name": by_name,
        },
    }


def _images_chart(results: Results) -> dict[str, Any] | None:
    """Return accuracy by number of training images: a point per class, and the curve of learning from fewer."""
    found = results.answers.by_class(results.classes)
    spots = [
        (count, found[name], f"{name}: {percent(found[name])}, {count} training images")
        for name, count in zip(results.classes, results.learned, strict=True)
        if name in found and count
    ]
    if not spots:
        return None
    numbers = [count for count, *_ in spots] + [point.images for point in results.fewer]
    low, high = min(numbers), max(numbers)
    base, span = math.log(low) - 0.15, math.log(high / low) + 0.3

    def across(count: int) -> float:
        return (math.log(count) - base) / span

    steps = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000]
    ticks = [count for count in steps if 0 <= across(count) <= 1] or sorted({low, high})
    return {
        "ticks": [(across(count), f"{count:,}") for count in ticks],
        "line": [(across(p.images), p.accuracy, _fewer_title(p)) for p in results.fewer],
        "spots": [(across(count), accuracy, title) for count, accuracy, title in spots],
    }


def _fewer_title(point: LearningPoint) -> str:
    return f"at most {point.images:,} training images per class: {percent(point.accuracy)}"


def _unknown_chart(found: Sequence[Threshold], own: Threshold) -> dict[str, Any]:
    """Return the share of unseen images that is rejected by the share of known ones that is answered."""

    def spot(one: Threshold) -> tuple[float, float, str]:
        return one.answered, one.rejected, _threshold_title(one)

    return {
        "ticks": [(tenth / 4, f"{25 * tenth} %") for tenth in range(5)],
        "line": [spot(one) for one in found],
        "spots": [spot(own)],
    }


def _threshold_title(one: Threshold) -> str:
    return (
        f"{percent(one.answered)} of known classes answered, {percent(one.right)} correctly; "
        f"{percent(one.rejected)} of unseen ones called unknown"
    )


def _thresholds(found: Sequence[Threshold]) -> list[Threshold]:
    """Return thresholds at about 99, 95, 90, 80 and 70 % of answers."""
    wanted = (0.99, 0.95, 0.9, 0.8, 0.7)
    return [min(found, key=lambda one: abs(one.answered - share)) for share in wanted] if len(found) > 10 else []


def _stream(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a run developed over its tasks, and the comparison with other learners."""
    from ssd_edge.report.figures import curves, heat_map

    steps, tasks = len(metrics["accuracy_matrix"]), metrics["tasks"]
    own, *others = compared(metrics)
    limit = next((m.values["average_accuracy"] for m in others if m.role == "joint"), None)
    return {
        "step": step_name(len(tasks), steps),
        "described": describe_stream(metrics),
        "development": development(metrics),
        "curves": [curves(metrics, wide=True), curves(metrics, wide=False)] if steps > 1 else [],
        "heat_map": heat_map(metrics),
        "rows": _task_rows(metrics),
        "metrics": metrics,
        "forgets": not forgets_nothing(metrics["learner"]),
        "methods": ranked(metrics) if others else [],
        "own": own,
        "limit": limit,
        "roles": ROLES,
        "lead": lead_note(metrics),
        "choice": describe_choice(metrics["choice"]) if "choice" in metrics else "",
        "terms": [(term, form(metrics.get(key)), meaning) for term, key, form, meaning in TERMS],
    }


def _task_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row per step: the classes that came, and how many were named correctly then and are now."""
    matrix, curve, tasks = metrics["accuracy_matrix"], metrics["accuracy_curve"], metrics["tasks"]
    introduced, rows, known = metrics.get("introduced", range(len(tasks))), [], 0
    for step, accuracy in enumerate(curve):
        new = [number for number, when in enumerate(introduced) if when == step]
        names = [str(name) for number in new for name in tasks[number]["classes"]]
        known += len(names)
        now = [matrix[-1][number] for number in new]
        then = [matrix[step][number] for number in new]
        rows.append(
            {
                "number": step + 1,
                "names": names,
                "known": known,
                "accuracy": accuracy,
                "then": sum(then) / len(then) if then else None,
                "now": sum(now) / len(now) if now else None,
            }
        )
    return rows


def _setup(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known about how the model was made, by heading."""
    if "argv" not in record:
        return {"Model": record}
    keys = ("machine", "threads", "seed", "git_sha", "started", "finished")
    return {
        "Run": {key.replace("_", " "): record.get(key) for key in keys},
        "Versions": record.get("versions"),
        "Backbone": record.get("backbone"),
        "Configuration": record.get("config"),
    }


def _tree(value: Any) -> Any:
    """Return nested values as pairs of keys and values, and lists as text."""
    if isinstance(value, Mapping):
        return [(str(key), _tree(inner)) for key, inner in value.items()]
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(map(str, value)) or "–"
    return "–" if value is None or value == "" else str(value)
