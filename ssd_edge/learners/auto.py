"""``learner.name=auto``: which closed-form learner suits these embeddings, by a held-out part of the training images.

The choice sees every class at once, before the stream begins: closed-form learners end at the same state whatever the
order. Test images are never looked at.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssd_edge.errors import InputError
from ssd_edge.learners.base import Task
from ssd_edge.learners.priors import Priors
from ssd_edge.learners.registry import AUTO, CANDIDATES, build
from ssd_edge.system import size

DEFAULT = "landmark"
ONE_IN = 5  # of each class, how many samples there are to one held out
MOST_HELD_OUT, MOST_LEARNED = 200, 1000  # a class: enough to tell learners apart, in seconds
ROUNDING = 1e-9  # one sample of difference is exactly one standard error, which rounding must not decide


@dataclasses.dataclass(frozen=True)
class Candidate:
    """How one learner, with its defaults, did on the held-out part.

    Attributes:
        name: key of `learners.LEARNERS`.
        accuracy: share of the held-out samples; None where nothing could be held out.
        behind: accuracy of the best minus this one's; None as above.
        standard_error: of `behind`, paired over the held-out samples; None as above.
        state_bytes: of its state after learning.
    """

    name: str
    accuracy: float | None
    behind: float | None
    standard_error: float | None
    state_bytes: int

    @property
    def tied(self) -> bool:
        """Within one standard error of the best."""
        return self.behind is None or self.behind <= self.standard_error * (1 + ROUNDING)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which learner, and why.

    Attributes:
        name: of the learner chosen.
        sentence: the reason, with the figures that decided.
        rows: every candidate, the most accurate first.
        learned: samples that the candidates learned from.
        held_out: samples that they were compared on.
    """

    name: str
    sentence: str
    rows: tuple[Candidate, ...]
    learned: int
    held_out: int

    def to_json(self) -> dict[str, Any]:
        """Plain values, as metrics.json keeps them."""
        return {**dataclasses.asdict(self), "rows": [dataclasses.asdict(row) for row in self.rows]}


def wanted(options: Mapping[str, Any]) -> bool:
    """Whether a run's ``learner`` section leaves the choice to `choose`.

    Raises:
        InputError: it does, and sets something else too.
    """
    if options.get("name") != AUTO:
        return False
    others = [f"learner.{key}" for key in options if key != "name"]
    if others:
        raise InputError(
            f"learner.name={AUTO} compares learners with their defaults, but {', '.join(others)} "
            f"{'is' if len(others) == 1 else 'are'} given too; leave that out, or name the learner that it is meant for"
        )
    return True


def choose(
    embeddings: Tensor,
    labels: Tensor,
    priors: Priors,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[float, str], object] | None = None,
) -> Choice:
    """Learn a part of the training samples with every candidate, and compare them on the rest.

    All within one standard error of the best are a tie; of these the default learner is taken if it is among them,
    else the smallest state.

    Args:
        embeddings: training samples only, standardised, float32 ``(N, D)``.
        labels: rows, int64 ``(N,)``.
        priors: from the backbone package.
        seed: of the split, and of what is random in a learner.
        device: where learners compute.
        progress: told the share done and the candidate at work.

    Raises:
        InputError: as `learners.Task`.
    """
    Task(embeddings, labels)  # its checks, before anything is split
    learned, held_out = (torch.from_numpy(index) for index in split(labels.numpy(), seed))
    task, right, sizes = Task(embeddings[learned], labels[learned]), {}, {}
    for number, name in enumerate(CANDIDATES):
        if progress:
            progress(number / len(CANDIDATES), name)
        learner = build({"name": name}, embeddings.shape[1], priors, seed, device)
        learner.learn(task)
        sizes[name] = learner.memory_bytes()
        if len(held_out):
            right[name] = (learner.predict(embeddings[held_out]) == labels[held_out]).numpy()
    return decide(right, sizes, len(learned))


def split(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to learn and to hold out, each ascending: of each class a fifth is held out, but at least one sample
    and never the last one, and no more of either than costs seconds.
    """
    rng, learned, held_out = np.random.default_rng(seed), [], []
    for row in np.unique(labels):
        index = rng.permutation(np.flatnonzero(labels == row))
        count = min(max(len(index) // ONE_IN, 1), MOST_HELD_OUT, len(index) - 1)
        held_out.append(index[:count])
        learned.append(index[count : count + MOST_LEARNED])
    return np.sort(np.concatenate(learned)), np.sort(np.concatenate(held_out))


def decide(right: Mapping[str, np.ndarray], sizes: Mapping[str, int], learned: int) -> Choice:
    """The rule of `choose`.

    Args:
        right: by candidate, whether each held-out sample was right, bool ``(M,)``; empty where none was held out.
        sizes: bytes of each candidate's state.
        learned: samples that the candidates learned from.
    """
    if not right:
        rows = tuple(Candidate(name, None, None, None, count) for name, count in sizes.items())
        sentence = f"{DEFAULT}: the default, for no class has a second training image that could be held out"
        return Choice(DEFAULT, sentence, rows, learned, 0)

    def order(name: str) -> tuple[float, bool, int]:
        return -float(right[name].mean()), name != DEFAULT, sizes[name]

    names = sorted(right, key=order)
    best = names[0]
    rows = tuple(_compared(name, right[name], right[best], sizes[name]) for name in names)
    tied = [row for row in rows if row.tied]
    taken = min(tied, key=lambda row: (row.name != DEFAULT, row.state_bytes))
    count = len(right[best])
    return Choice(taken.name, _sentence(taken, rows, count), rows, learned, count)


def _compared(name: str, right: np.ndarray, best: np.ndarray, state_bytes: int) -> Candidate:
    difference = best.astype(np.float64) - right
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return Candidate(name, float(right.mean()), float(difference.mean()), error, state_bytes)


def _sentence(taken: Candidate, rows: tuple[Candidate, ...], count: int) -> str:
    """Why `taken`: against the best where that is another, against the default where it lost, else the next best."""
    best, default = rows[0], next(row for row in rows if row.name == DEFAULT)
    images = "image" if count == 1 else "images"
    parts = [f"{taken.name}: {taken.accuracy:.3f} on {count:,} held-out training {images}"]
    against = f"({size(best.state_bytes)} against {size(taken.state_bytes)})"
    if taken is not best:
        parts.append(
            f"{best.name} {best.accuracy:.3f} is {_points(taken.behind)} ahead, no more than the "
            f"standard error of {_number(taken.standard_error)} {against}"
        )
    if not default.tied:
        whom = "" if taken is best else f" {best.name}"
        parts.append(
            f"{DEFAULT} {default.accuracy:.3f} is {_points(default.behind)} behind{whom}, more than the standard error "
            f"of {_number(default.standard_error)}"
        )
    elif taken is best:
        other = rows[1]
        against = f"({size(other.state_bytes)} against {size(taken.state_bytes)})"
        parts.append(f"next {other.name} {other.accuracy:.3f} {against}")
    return "; ".join(parts)


def _points(share: float) -> str:
    number = _number(share)
    return f"{number} {'point' if number == '1.0' else 'points'}"


def _number(share: float) -> str:
    """Percentage points with one digit after the point; of less than a tenth with two."""
    return f"{100 * share:.2f}" if 0 < share < 0.00095 else f"{100 * share:.1f}"
