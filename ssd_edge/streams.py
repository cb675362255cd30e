"""Streams: in which tasks, and in what order, classes arrive."""

from __future__ import annotations

import dataclasses

import numpy as np

from ssd_edge.config import StreamConfig
from ssd_edge.errors import InputError


@dataclasses.dataclass(frozen=True)
class Stream:
    """A class-incremental stream.

    Attributes:
        tasks: for each task, the data set's labels of its classes, in the order in which they arrive. The row of
            a class in a learner is its position in the concatenation.
    """

    tasks: tuple[tuple[int, ...], ...]

    @property
    def order(self) -> list[int]:
        """The data set's labels by learner row."""
        return [label for task in self.tasks for label in task]

    def rows(self, labels: np.ndarray) -> np.ndarray:
        """Translate the data set's labels ``(N,)`` to learner rows, int64."""
        order = self.order
        row = np.full(max(order) + 1, -1, dtype=np.int64)
        row[order] = np.arange(len(order))
        return row[labels]

    def members(self, labels: np.ndarray, task: int) -> np.ndarray:
        """Indices of the samples of one task, ascending."""
        return np.flatnonzero(np.isin(labels, self.tasks[task]))


def task_sizes(classes: int, tasks: int) -> list[int]:
    """How many classes each task has: as even as possible, larger ones first.

    Args:
        classes: at least 2.
        tasks: 0: tasks of two classes up to 20 classes (an odd one joins the first task), else ten tasks.

    Raises:
        InputError: more tasks than classes.
    """
    count = tasks or (max(1, classes // 2) if classes <= 20 else 10)
    if count > classes:
        raise InputError(f"stream.tasks is {count}, but there are only {classes} classes; lower it")
    return [classes // count + (task < classes % count) for task in range(count)]


def class_order(names: tuple[str, ...], order: str, seed: int) -> list[int]:
    """Labels in the order of their arrival.

    Args:
        names: label → name.
        order: ``seeded``, ``sorted`` (by name, as labels are), or numbers such as ``3,0,1``.
        seed: for ``seeded``.

    Raises:
        InputError: not a permutation of all labels.
    """
    labels = list(range(len(names)))
    if order == "sorted":
        return labels
    if order == "seeded":
        return [int(label) for label in np.random.default_rng(seed).permutation(len(names))]
    try:
        wanted = [int(part) for part in order.replace(" ", ",").split(",") if part]
    except ValueError:
        raise InputError(f"stream.order must be seeded, sorted, or numbers such as 3,0,1, but is '{order}'") from None
    if sorted(wanted) != labels:
        raise InputError(f"stream.order must name each of the classes 0..{len(names) - 1} once, but is '{order}'")
    return wanted


def class_incremental(names: tuple[str, ...], config: StreamConfig, seed: int) -> Stream:
    """The classes in tasks of even size, each class in one task only.

    Raises:
        InputError: fewer than two classes, or a bad order or number of tasks.
    """
    if len(names) < 2:
        given = ", ".join(names) or "none"
        raise InputError(f"a stream needs at least two classes, but there are {len(names)}: {given}")
    order, tasks, start = class_order(names, config.order, seed), [], 0
    for size in task_sizes(len(names), config.tasks):
        tasks.append(tuple(order[start : start + size]))
        start += size
    return Stream(tuple(tasks))
