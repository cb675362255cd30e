"""Streams: the order in which classes and samples arrive.

There are three kinds. *Class-incremental*: each class arrives in one task. *With repetition* (CIR, sampling-based:
Hemati et al., arXiv 2301.11396): classes occur again in later experiences. *Blurry* (i-Blurry-N-M: Koh et al., arXiv
2110.10031): some samples of a class arrive in the tasks of other classes. Every stream contains each sample once.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from ssd_edge.config import StreamConfig
from ssd_edge.errors import InputError

# Seeds of four of the five class orders of the SDMLP paper, drawn with legacy NumPy; the fifth is that of the data set.
SDMLP_SEEDS = (3, 15, 27, 97)
_OWN_KEYS = {"repetition": ("experiences", "repetition"), "blurry": ("disjoint", "leakage")}
_PLAN, _SAMPLES = 1, 2  # second part of the seeds of two independent random streams


@dataclasses.dataclass(frozen=True)
class Stream:
    """Order in which classes and samples arrive.

    Attributes:
        tasks: For each group of classes introduced together, the data set's labels in order of arrival. The row of a
            class in a learner is its position in the concatenation of the groups.
        occurrences: For each row, the experiences in which the class occurs; the first introduces it.
        leakage: Share of a class's samples spread over all its occurrences but the first; None for equal shares.
        seed: Seed of the assignment of samples to experiences.
    """

    tasks: tuple[tuple[int, ...], ...]
    occurrences: tuple[tuple[int, ...], ...]
    leakage: float | None = None
    seed: int = 0

    @property
    def order(self) -> list[int]:
        """Labels of the data set by learner row."""
        return [label for task in self.tasks for label in task]

    @property
    def introduced(self) -> tuple[int, ...]:
        """Experience that introduces each group, ascending."""
        starts = itertools.accumulate(map(len, self.tasks[:-1]), initial=0)
        return tuple(self.occurrences[row][0] for row in starts)

    def rows(self, labels: np.ndarray) -> np.ndarray:
        """Map labels of the data set ``(N,)`` to learner rows, int64."""
        order = self.order
        row = np.full(max(order) + 1, -1, dtype=np.int64)
        row[order] = np.arange(len(order))
        rows: np.ndarray = row[labels]
        return rows

    def groups(self, labels: np.ndarray) -> list[np.ndarray]:
        """Return the sample indices of each group, int64, ascending; `labels` are ``(N,)``."""
        return [np.flatnonzero(np.isin(labels, task)) for task in self.tasks]

    def experiences(self, labels: np.ndarray) -> list[np.ndarray]:
        """Return the sample indices of each experience, int64, ascending: a partition of ``range(N)``.

        Args:
            labels: Labels of the training samples ``(N,)``.

        Raises:
            InputError: If an experience has no samples because its classes have too few.
        """
        parts: list[list[np.ndarray]] = [[] for _ in range(1 + max(map(max, self.occurrences)))]
        for label, occurrences in zip(self.order, self.occurrences, strict=True):
            members = np.flatnonzero(labels == label)
            shuffled = np.random.default_rng([self.seed, _SAMPLES, label]).permutation(members)
            ends = np.cumsum(self._sizes(len(members), len(occurrences)))
            for experience, part in zip(occurrences, np.split(shuffled, ends[:-1]), strict=True):
                parts[experience].append(part)
        samples = [np.sort(np.concatenate(part)) for part in parts]
        for number, indices in enumerate(samples):
            if not len(indices):
                raise InputError(
                    f"experience {number + 1} of {len(samples)} has no training image: its classes have fewer images "
                    "than occurrences; lower stream.experiences or stream.repetition, or add images"
                )
        return samples

    def _sizes(self, samples: int, occurrences: int) -> list[int]:
        """Return the number of samples of a class in each of its occurrences; at least one in the first."""
        if self.leakage is None or occurrences == 1:
            return _even(samples, occurrences)
        leaked = min(round(self.leakage * samples), max(samples - 1, 0))
        return [samples - leaked, *_even(leaked, occurrences - 1)]


def _even(count: int, parts: int) -> list[int]:
    """Divide `count` into `parts` sizes that differ by at most one, larger ones first."""
    return [count // parts + (part < count % parts) for part in range(parts)]


def task_sizes(classes: int, tasks: int) -> list[int]:
    """Return the number of classes of each task, as even as possible, larger ones first.

    Args:
        classes: Number of classes, at least 2.
        tasks: Number of tasks. 0 gives tasks of two classes for up to 20 classes (the first one has three if the number
            is odd), and ten tasks for more.

    Raises:
        InputError: If there are more tasks than classes.
    """
    count = tasks or (max(1, classes // 2) if classes <= 20 else 10)
    if count > classes:
        raise InputError(f"stream.tasks is {count}, but there are only {classes} classes; lower it")
    return _even(classes, count)


def class_order(names: tuple[str, ...], order: str, seed: int) -> list[int]:
    """Return the labels in order of arrival.

    Args:
        names: Class names by label.
        order: ``seeded``, ``sorted`` (by name, like the labels), numbers such as ``3,0,1``, or one of the five orders
            of the SDMLP paper: ``sdmlp-0`` (that of the data set; sorted for CIFAR-10, CIFAR-100 and MNIST),
            ``sdmlp-3``, ``sdmlp-15``, ``sdmlp-27`` and ``sdmlp-97``.
        seed: Seed for ``seeded``.

    Raises:
        InputError: If `order` is unknown or not a permutation of all labels.
    """
    labels = list(range(len(names)))
    if order in ("sorted", "sdmlp-0"):
        return labels
    if order == "seeded":
        return [int(label) for label in np.random.default_rng(seed).permutation(len(names))]
    if order.startswith("sdmlp-"):
        published = {f"sdmlp-{number}": number for number in SDMLP_SEEDS}
        if order not in published:
            raise InputError(f"stream.order is '{order}', but the orders of SDMLP are sdmlp-0, {', '.join(published)}")
        draws = np.random.RandomState(published[order])
        return [int(label) for label in draws.choice(len(names), len(names), replace=False)]
    try:
        wanted = [int(part) for part in order.replace(" ", ",").split(",") if part]
    except ValueError:
        raise InputError(
            f"stream.order must be seeded, sorted, sdmlp-0 … sdmlp-97, or numbers such as 3,0,1, but is '{order}'"
        ) from None
    if sorted(wanted) != labels:
        raise InputError(f"stream.order must name each of the classes 0..{len(names) - 1} once, but is '{order}'")
    return wanted


def make_stream(names: tuple[str, ...], config: StreamConfig, seed: int) -> Stream:
    """Build the stream of a configuration.

    Args:
        names: Class names by label.
        config: Kind of the stream and its settings.
        seed: Seed of everything random.

    Raises:
        InputError: If there are fewer than two classes, if the order or the number of tasks is wrong, or if a setting
            belongs to another kind of stream.
    """
    defaults = StreamConfig()
    for kind, keys in _OWN_KEYS.items():
        for key in keys:
            value = getattr(config, key)
            if kind != config.kind and value != getattr(defaults, key):
                raise InputError(
                    f"stream.{key} is {value}, but it belongs to stream.kind={kind} and the kind is {config.kind}; "
                    f"set stream.kind={kind} or leave out stream.{key}"
                )
    stream = class_incremental(names, config, seed)
    if config.kind == "repetition":
        return _with_repetition(stream, config, seed)
    return _blurred(stream, config, seed) if config.kind == "blurry" else stream


def class_incremental(names: tuple[str, ...], config: StreamConfig, seed: int) -> Stream:
    """Build a stream of tasks of even size, with each class in one task.

    Raises:
        InputError: If there are fewer than two classes, or if the order or the number of tasks is wrong.
    """
    if len(names) < 2:
        given = ", ".join(names) or "none"
        raise InputError(f"a stream needs at least two classes, but there are {len(names)}: {given}; add images")
    order, tasks, start = class_order(names, config.order, seed), [], 0
    for size in task_sizes(len(names), config.tasks):
        tasks.append(tuple(order[start : start + size]))
        start += size
    occurrences = tuple((number,) for number, task in enumerate(tasks) for _ in task)
    return Stream(tuple(tasks), occurrences, seed=seed)


def _with_repetition(stream: Stream, config: StreamConfig, seed: int) -> Stream:
    """Introduce the groups evenly over the experiences, and let classes recur with the configured probability.

    Raises:
        InputError: If there are fewer experiences than groups.
    """
    groups = len(stream.tasks)
    count = config.experiences or 2 * groups
    if count < groups:
        raise InputError(
            f"stream.experiences is {count}, but there are {groups} tasks of new classes, and each needs its own "
            "experience; raise stream.experiences or lower stream.tasks"
        )
    rng = np.random.default_rng([seed, _PLAN])
    occurs = rng.random((len(stream.order), count)) < config.repetition  # (row, experience)
    first = np.array([group * count // groups for group, task in enumerate(stream.tasks) for _ in task])
    later = np.arange(count) > first[:, None]
    occurs = (occurs & later) | (np.arange(count) == first[:, None])
    for experience in np.flatnonzero(~occurs.any(0)):
        occurs[rng.choice(np.flatnonzero(first < experience)), experience] = True
    occurrences = tuple(tuple(np.flatnonzero(row).tolist()) for row in occurs)
    return dataclasses.replace(stream, occurrences=occurrences)


def _blurred(stream: Stream, config: StreamConfig, seed: int) -> Stream:
    """Spread a share of the samples of the classes that are not disjoint over all other tasks."""
    rng = np.random.default_rng([seed, _PLAN])
    classes = len(stream.order)
    disjoint = set(rng.permutation(classes)[: round(config.disjoint * classes)].tolist())
    occurrences = []
    for row, (own,) in enumerate(stream.occurrences):
        others = [task for task in range(len(stream.tasks)) if task != own and row not in disjoint]
        # in random order, because the remainder of the division goes to the first tasks
        occurrences.append((own, *rng.permutation(others).astype(int).tolist()))
    return dataclasses.replace(stream, occurrences=tuple(occurrences), leakage=config.leakage)
