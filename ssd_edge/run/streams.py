"""Streams: in which experiences, and in what order, classes arrive.

Three kinds. *Class-incremental*: each class comes once, in its task. *With repetition* (CIR, sampling-based:
Hemati et al., arXiv 2301.11396): classes come again later. *Blurry* (i-Blurry-N-M: Koh et al., arXiv 2110.10031):
some samples of a class arrive in the tasks of others. In each of them every sample is given exactly once.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from ssd_edge.config import StreamConfig
from ssd_edge.errors import InputError

# The orders of the SDMLP paper's five runs: the data set's own, and four that legacy NumPy draws from these seeds.
SDMLP_SEEDS = (3, 15, 27, 97)
_OWN_KEYS = {"repetition": ("experiences", "repetition"), "blurry": ("disjoint", "leakage")}
_PLAN, _SAMPLES = 1, 2  # what is drawn from the seed; the order of the classes is drawn from the seed alone


@dataclasses.dataclass(frozen=True)
class Stream:
    """Which samples arrive when.

    Attributes:
        tasks: for each group of classes that are introduced together, the data set's labels, in the order in which
            they arrive. The row of a class in a learner is its position in the concatenation.
        occurrences: by row, the experiences in which a class comes; the first introduces it.
        leakage: share of a class's samples for all its occurrences but the first; None: each has an even share.
        seed: decides which samples of a class come in which experience.
    """

    tasks: tuple[tuple[int, ...], ...]
    occurrences: tuple[tuple[int, ...], ...]
    leakage: float | None = None
    seed: int = 0

    @property
    def order(self) -> list[int]:
        """The data set's labels by learner row."""
        return [label for task in self.tasks for label in task]

    @property
    def introduced(self) -> tuple[int, ...]:
        """For each group the experience that introduces it, ascending."""
        starts = itertools.accumulate(map(len, self.tasks[:-1]), initial=0)
        return tuple(self.occurrences[row][0] for row in starts)

    def rows(self, labels: np.ndarray) -> np.ndarray:
        """Translate the data set's labels ``(N,)`` to learner rows, int64."""
        order = self.order
        row = np.full(max(order) + 1, -1, dtype=np.int64)
        row[order] = np.arange(len(order))
        return row[labels]

    def groups(self, labels: np.ndarray) -> list[np.ndarray]:
        """For each group the indices of all samples of its classes, int64, ascending; labels are ``(N,)``."""
        return [np.flatnonzero(np.isin(labels, task)) for task in self.tasks]

    def experiences(self, labels: np.ndarray) -> list[np.ndarray]:
        """For each experience the indices of its samples, int64, ascending: a partition of ``range(N)``.

        Args:
            labels: of the training samples, ``(N,)``.

        Raises:
            InputError: an experience has no sample, because its classes have too few.
        """
        parts: list[list[np.ndarray]] = [[] for _ in range(1 + max(map(max, self.occurrences)))]
        for label, occurrences in zip(self.order, self.occurrences, strict=True):
            members = np.flatnonzero(labels == label)
            shuffled = np.random.default_rng([self.seed, _SAMPLES, label]).permutation(members)
            ends = np.cumsum(self._sizes(len(members), len(occurrences)))
            for experience, part in zip(occurrences, np.split(shuffled, ends[:-1]), strict=True):
                parts[experience].append(part)
        found = [np.sort(np.concatenate(part)) for part in parts]
        for number, indices in enumerate(found):
            if not len(indices):
                raise InputError(
                    f"experience {number + 1} of {len(found)} has no training image: its classes have fewer images "
                    "than experiences in which they come; lower stream.experiences or stream.repetition, or add images"
                )
        return found

    def _sizes(self, samples: int, occurrences: int) -> list[int]:
        """How many of a class's samples each of its occurrences has; the first has at least one."""
        if self.leakage is None or occurrences == 1:
            return _even(samples, occurrences)
        leaked = min(round(self.leakage * samples), max(samples - 1, 0))
        return [samples - leaked, *_even(leaked, occurrences - 1)]


def _even(count: int, parts: int) -> list[int]:
    """`count` things in `parts` parts whose sizes differ by one at most, larger ones first."""
    return [count // parts + (part < count % parts) for part in range(parts)]


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
    return _even(classes, count)


def class_order(names: tuple[str, ...], order: str, seed: int) -> list[int]:
    """Labels in the order of their arrival.

    Args:
        names: label → name.
        order: ``seeded``, ``sorted`` (by name, as labels are), numbers such as ``3,0,1``, or one of the five orders
            in which SDMLP was published: ``sdmlp-0`` (the data set's own, which for CIFAR-10, CIFAR-100 and MNIST
            is the sorted one) and ``sdmlp-3``, ``-15``, ``-27``, ``-97``.
        seed: for ``seeded``.

    Raises:
        InputError: not a permutation of all labels, or no such order.
    """
    labels = list(range(len(names)))
    if order in ("sorted", "sdmlp-0"):
        return labels
    if order == "seeded":
        return [int(label) for label in np.random.default_rng(seed).permutation(len(names))]
    if order.startswith("sdmlp-"):
        published = {f"sdmlp-{number}": number for number in SDMLP_SEEDS}
        if order not in published:
            raise InputError(f"stream.order is '{order}', but SDMLP's orders are sdmlp-0, {', '.join(published)}")
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
    """The stream that a configuration describes.

    Args:
        names: label → name.
        config: its kind, and the settings of that kind.
        seed: of all that is drawn.

    Raises:
        InputError: fewer than two classes, a bad order or number of tasks, or a setting of another kind.
    """
    defaults = StreamConfig()
    for kind, keys in _OWN_KEYS.items():
        for key in keys:
            value = getattr(config, key)
            if kind != config.kind and value != getattr(defaults, key):
                raise InputError(
                    f"stream.{key} is {value}, but belongs to stream.kind={kind}, and the kind is {config.kind}; "
                    "set the kind or leave it out"
                )
    stream = class_incremental(names, config, seed)
    if config.kind == "repetition":
        return _with_repetition(stream, config, seed)
    return _blurred(stream, config, seed) if config.kind == "blurry" else stream


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
    occurrences = tuple((number,) for number, task in enumerate(tasks) for _ in task)
    return Stream(tuple(tasks), occurrences, seed=seed)


def _with_repetition(stream: Stream, config: StreamConfig, seed: int) -> Stream:
    """Groups are introduced evenly over more experiences; classes come again with the chance that is set.

    Raises:
        InputError: fewer experiences than groups.
    """
    groups = len(stream.tasks)
    count = config.experiences or 2 * groups
    if count < groups:
        raise InputError(
            f"stream.experiences is {count}, but there are {groups} tasks of new classes, each introduced in an "
            "experience of its own; raise it or lower stream.tasks"
        )
    rng = np.random.default_rng([seed, _PLAN])
    comes = rng.random((len(stream.order), count)) < config.repetition  # (row, experience)
    first = np.array([group * count // groups for group, task in enumerate(stream.tasks) for _ in task])
    later = np.arange(count) > first[:, None]
    comes = (comes & later) | (np.arange(count) == first[:, None])
    for experience in np.flatnonzero(~comes.any(0)):
        comes[rng.choice(np.flatnonzero(first < experience)), experience] = True
    occurrences = tuple(tuple(np.flatnonzero(row).tolist()) for row in comes)
    return dataclasses.replace(stream, occurrences=occurrences)


def _blurred(stream: Stream, config: StreamConfig, seed: int) -> Stream:
    """Some classes keep to their task; of the others a share of the samples arrives in all other tasks."""
    rng = np.random.default_rng([seed, _PLAN])
    classes = len(stream.order)
    kept = set(rng.permutation(classes)[: round(config.disjoint * classes)].tolist())
    occurrences = []
    for row, (own,) in enumerate(stream.occurrences):
        others = [task for task in range(len(stream.tasks)) if task != own and row not in kept]
        # in a drawn order, because what cannot be divided evenly goes to the first of them
        occurrences.append((own, *rng.permutation(others).astype(int).tolist()))
    return dataclasses.replace(stream, occurrences=tuple(occurrences), leakage=config.leakage)
