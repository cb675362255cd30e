"""Rows of the tables: the stored results of a system, over class orders, beside their upper bound."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from ssd_edge.errors import require
from ssd_edge.reproduction import cells
from ssd_edge.reproduction.specs import ORDERS, Experiment, System

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """What is stored of a system on a stream with a budget.

    Attributes:
        system: of the experiment.
        stream: its name.
        budget: its name.
        results: by class order.
        upper_bounds: joint training, by class order.
        shared: whether the reduced and the full budget come to the same settings.
    """

    system: System
    stream: str
    budget: str
    results: dict[int, Result]
    upper_bounds: dict[int, Result]
    shared: bool = False

    @property
    def length(self) -> str:
        """How long it was trained: the budget, ``any`` where that says nothing, a dash where nothing is stored."""
        return ("any" if self.shared else self.budget) if self.results else "–"

    def values(self, name: str) -> list[float]:
        """One number an order: ``accuracy`` (over all test samples), ``last_task_share``, or a metric's name."""
        found = (one.get(name, one.get("metrics", {}).get(name)) for _, one in sorted(self.results.items()))
        return [value for value in found if value is not None]

    @property
    def upper_bound(self) -> list[float]:
        """Accuracy of joint training, over the orders that are stored of this row."""
        return [one["accuracy"] for order, one in sorted(self.upper_bounds.items()) if order in self.results]

    @property
    def share(self) -> float | None:
        """Mean accuracy divided by joint training's over the same orders; None without it."""
        common = [order for order in self.results if order in self.upper_bounds]
        if not common:
            return None
        own = statistics.fmean(self.results[order]["accuracy"] for order in common)
        return own / statistics.fmean(self.upper_bounds[order]["accuracy"] for order in common)

    @property
    def notes(self) -> list[str]:
        """Sentences on this row, each once."""
        told = [note for _, one in sorted(self.results.items()) for note in one["notes"]]
        return list(dict.fromkeys([*([self.system.note] if self.system.note else []), *told]))


def rows(experiment: Experiment, stream: str, budget: str, store: cells.Store) -> list[Row]:
    """All rows of an experiment on a stream, also those of which nothing is stored."""
    found = []
    for system in experiment.systems:
        asked = cells.setups(experiment, system, stream, budget, len(ORDERS))
        results = {one.order: result for one in asked if (result := store.find(one)) is not None}
        upper_bounds = {
            one.order: result for one in asked if (result := store.find(cells.upper_bound(one))) is not None
        }
        shared = bool(results) and _shared(experiment, system, stream, budget)
        found.append(Row(system, stream, budget, results, upper_bounds, shared))
    return found


def _shared(experiment: Experiment, system: System, stream: str, budget: str) -> bool:
    """As `Row.shared`."""
    if budget == "smoke":
        return False
    reduced, full = (cells.setups(experiment, system, stream, name, 1)[0].key() for name in ("reduced", "full"))
    return reduced == full


def mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return statistics.fmean(values) if values else None


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over orders, n − 1; None of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A paired t-test of two rows over the class orders that both have.

    Attributes:
        differences: of accuracy, by order.
        t: Student's statistic with n − 1 degrees of freedom; None where all differences are equal.
        p: two-sided.
    """

    differences: list[float]
    t: float | None
    p: float | None


def compare(first: Row, second: Row) -> Comparison:
    """Accuracy of the first minus that of the second."""
    common = sorted(first.results.keys() & second.results.keys())
    differences = [first.results[order]["accuracy"] - second.results[order]["accuracy"] for order in common]
    deviation = spread(differences)
    if not deviation:
        return Comparison(differences, None, None)
    t = statistics.fmean(differences) / (deviation / math.sqrt(len(differences)))
    distribution = require("scipy.stats", "train", "compute a p value").t
    return Comparison(differences, t, float(2 * distribution.sf(abs(t), len(differences) - 1)))


def per_task(results: Iterable[Result], name: str) -> list[float]:
    """One number an order: the mean over tasks of what neurons do on the data of each."""
    averages = []
    for one in results:
        values = [value for value in one.get("neurons", {}).get(name, []) if value is not None]
        if values:
            averages.append(statistics.fmean(values))
    return averages


def overall(results: Iterable[Result], name: str) -> list[float]:
    """One number an order: what neurons do on the data of all tasks, in the end."""
    found = (one.get("neurons_overall", {}).get(name) for one in results)
    return [value for value in found if value is not None]
