"""Rows of the tables: stored results of a system over class orders, with their upper bound."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence

from ssd_edge.errors import InputError, require
from ssd_edge.reproduction import cells
from ssd_edge.reproduction.cells import Result
from ssd_edge.reproduction.specs import ORDERS, Experiment, System


def _number(result: Result, name: str) -> object:
    """Return a number of a result or one of its metrics; None if it has neither."""
    return result.get(name, result.get("metrics", {}).get(name))


@dataclasses.dataclass(frozen=True)
class Row:
    """Stored results of a system on a stream with a budget.

    Attributes:
        system: System of the experiment.
        stream: Name of the stream.
        budget: Name of the budget.
        results: Results by class order.
        upper_bounds: Results of joint training by class order.
        shared: True if the reduced and the full budget give the same settings.
    """

    system: System
    stream: str
    budget: str
    results: dict[int, Result]
    upper_bounds: dict[int, Result]
    shared: bool = False

    @property
    def length(self) -> str:
        """Budget to print: ``any`` if the schedule does not depend on it, a dash if nothing is stored."""
        return ("any" if self.shared else self.budget) if self.results else "–"

    def values(self, name: str) -> list[float]:
        """Return one number per class order: a number of the result, such as ``accuracy``, or one of its metrics."""
        results = (result for _, result in sorted(self.results.items()))
        return [value for value in (_number(result, name) for result in results) if isinstance(value, float | int)]

    def value(self, name: str, order: int) -> float:
        """Return one of these numbers for one class order."""
        value = _number(self.results[order], name)
        if not isinstance(value, float | int):
            raise InputError(f"the result of {self.system.name} on {self.stream}, order {order}, has no {name}")
        return value

    @property
    def upper_bound(self) -> list[float]:
        """Accuracy of joint training for the class orders of this row."""
        return [one["accuracy"] for order, one in sorted(self.upper_bounds.items()) if order in self.results]

    @property
    def share(self) -> float | None:
        """Mean accuracy divided by that of joint training over the same class orders; None without joint training."""
        common = [order for order in self.results if order in self.upper_bounds]
        if not common:
            return None
        own = statistics.fmean(self.results[order]["accuracy"] for order in common)
        return own / statistics.fmean(self.upper_bounds[order]["accuracy"] for order in common)

    @property
    def notes(self) -> list[str]:
        """Distinct notes on this row."""
        notes = [note for _, result in sorted(self.results.items()) for note in result["notes"]]
        return list(dict.fromkeys([*([self.system.note] if self.system.note else []), *notes]))


def rows(experiment: Experiment, stream: str, budget: str, store: cells.Store) -> list[Row]:
    """Return all rows of an experiment on a stream, including those without stored results."""
    table = []
    for system in experiment.systems:
        setups = cells.setups(experiment, system, stream, budget, len(ORDERS))
        results = {setup.order: result for setup in setups if (result := store.find(setup))}
        bounds = {setup.order: result for setup in setups if (result := store.find(cells.upper_bound(setup)))}
        shared = bool(results) and _shared(experiment, system, stream, budget)
        table.append(Row(system, stream, budget, results, bounds, shared))
    return table


def _shared(experiment: Experiment, system: System, stream: str, budget: str) -> bool:
    """Return the value of `Row.shared`."""
    if budget == "smoke":
        return False
    reduced, full = (cells.setups(experiment, system, stream, name, 1)[0].key() for name in ("reduced", "full"))
    return reduced == full


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, or None for an empty sequence."""
    return statistics.fmean(values) if values else None


def spread(values: Sequence[float]) -> float | None:
    """Return the standard deviation (n − 1), or None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Paired t-test of two rows over their common class orders.

    Attributes:
        differences: Differences by class order.
        t: Student's statistic with n − 1 degrees of freedom; None if all differences are equal.
        p: Two-sided p value.
    """

    differences: list[float]
    t: float | None
    p: float | None


def compare(first: Row, second: Row, measure: str = "accuracy") -> Comparison:
    """Compare the accuracy, or one of the metrics, of two rows: the first minus the second."""
    common = sorted(first.results.keys() & second.results.keys())
    differences = [first.value(measure, order) - second.value(measure, order) for order in common]
    deviation = spread(differences)
    if not deviation:
        return Comparison(differences, None, None)
    t = statistics.fmean(differences) / (deviation / math.sqrt(len(differences)))
    distribution = require("scipy.stats", "train", "compute a p value").t
    return Comparison(differences, t, float(2 * distribution.sf(abs(t), len(differences) - 1)))


def per_task(results: Iterable[Result], name: str) -> list[float]:
    """Return one number per result: the mean over tasks of a neuron statistic."""
    averages = []
    for one in results:
        values = [value for value in one.get("neurons", {}).get(name, []) if value is not None]
        if values:
            averages.append(statistics.fmean(values))
    return averages


def overall(results: Iterable[Result], name: str) -> list[float]:
    """Return one number per result: a neuron statistic on the data of all tasks after the last one."""
    numbers = (result.get("neurons_overall", {}).get(name) for result in results)
    return [value for value in numbers if value is not None]
