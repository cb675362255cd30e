"""``learner.name=auto``: choose a closed-form learner by its accuracy on held-out training images.

The candidates learn all classes at once, before the stream begins: the final state of a closed-form learner does not
depend on the order. Test images are not used.
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

DEFAULT = "slda"
ONE_IN = 5  # one of five samples per class is held out
MAX_HELD_OUT, MAX_LEARNED = 200, 1000  # samples per class: enough to compare learners within seconds
ROUNDING = 1e-9  # a difference of one sample is exactly one standard error, which rounding must not decide


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Result of one learner with default settings on the held-out samples.

    Attributes:
        name: key of `learners.LEARNERS`.
        accuracy: accuracy on the held-out samples; None if there are none.
        behind: accuracy of the best candidate minus `accuracy`; None if there are no held-out samples.
        standard_error: paired standard error of `behind`; None if there are no held-out samples.
        state_bytes: size of the state after learning.
    """

    name: str
    accuracy: float | None
    behind: float | None
    standard_error: float | None
    state_bytes: int

    @property
    def tied(self) -> bool:
        """True if within one standard error of the best candidate, or if there are no held-out samples."""
        if self.behind is None or self.standard_error is None:
            return True
        return self.behind <= self.standard_error * (1 + ROUNDING)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Choice of a learner.

    Attributes:
        name: name of the chosen learner.
        sentence: reason, with the deciding figures.
        rows: results of all candidates, the most accurate first.
        learned: number of samples that the candidates learned.
        held_out: number of samples that they were compared on.
    """

    name: str
    sentence: str
    rows: tuple[Candidate, ...]
    learned: int
    held_out: int

    def to_json(self) -> dict[str, Any]:
        """Return the choice as stored in metrics.json."""
        return {**dataclasses.asdict(self), "rows": [dataclasses.asdict(row) for row in self.rows]}


def wanted(options: Mapping[str, Any]) -> bool:
    """Return True if the ``learner`` section of a run asks for an automatic choice.

    Raises:
        InputError: it also contains other settings.
    """
    if options.get("name") != AUTO:
        return False
    others = [f"learner.{key}" for key in options if key != "name"]
    if others:
        raise InputError(
            f"learner.name={AUTO} compares learners with default settings, but {', '.join(others)} "
            f"{'is' if len(others) == 1 else 'are'} also set; remove the setting, or choose a learner by name"
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
    """Compare all candidates on held-out training samples and choose one.

    Candidates within one standard error of the best are tied. Of these, the default learner is chosen if it is among
    them, otherwise the one with the smallest state.

    Args:
        embeddings: standardised embeddings of training samples, float32 ``(N, D)``.
        labels: class rows, int64 ``(N,)``.
        priors: priors of the backbone package.
        seed: seed of the split and of the learners.
        device: device to compute on.
        progress: callback with the fraction done and the name of the current candidate.

    Raises:
        InputError: see `learners.Task`.
    """
    Task(embeddings, labels)  # check before splitting
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
    """Split the samples of each class into those to learn and those to hold out.

    A fifth of each class is held out, at least one sample, unless it is the only one of its class. Both parts are
    limited to `MAX_LEARNED` and `MAX_HELD_OUT` samples per class.

    Returns:
        Indices to learn and to hold out, each ascending.
    """
    rng, learned, held_out = np.random.default_rng(seed), [], []
    for row in np.unique(labels):
        index = rng.permutation(np.flatnonzero(labels == row))
        count = min(max(len(index) // ONE_IN, 1), MAX_HELD_OUT, len(index) - 1)
        held_out.append(index[:count])
        learned.append(index[count : count + MAX_LEARNED])
    return np.sort(np.concatenate(learned)), np.sort(np.concatenate(held_out))


def decide(right: Mapping[str, np.ndarray], sizes: Mapping[str, int], learned: int) -> Choice:
    """Apply the rule of `choose` to the results of the candidates.

    Args:
        right: candidate → correctness of each held-out sample, bool ``(M,)``; empty if there are no held-out samples.
        sizes: candidate → size of the state in bytes.
        learned: number of samples that the candidates learned.
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
    chosen = min(tied, key=lambda row: (row.name != DEFAULT, row.state_bytes))
    count = len(right[best])
    return Choice(chosen.name, _sentence(chosen, rows, count), rows, learned, count)


def _compared(name: str, right: np.ndarray, best: np.ndarray, state_bytes: int) -> Candidate:
    difference = best.astype(np.float64) - right
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return Candidate(name, float(right.mean()), float(difference.mean()), error, state_bytes)


def _sentence(chosen: Candidate, rows: tuple[Candidate, ...], count: int) -> str:
    """Explain the choice: against the best candidate, the default, or the runner-up."""
    best, default = rows[0], next(row for row in rows if row.name == DEFAULT)
    images = "image" if count == 1 else "images"
    parts = [f"{chosen.name}: {chosen.accuracy:.3f} on {count:,} held-out training {images}"]
    if chosen is not best:
        parts.append(
            f"{best.name} {best.accuracy:.3f} is {_points(chosen.behind)} ahead, no more than the standard error of "
            f"{_percentage(chosen.standard_error)} ({size(best.state_bytes)} against {size(chosen.state_bytes)})"
        )
    if not default.tied:
        ahead = "" if chosen is best else f" {best.name}"
        parts.append(
            f"{DEFAULT} {default.accuracy:.3f} is {_points(default.behind)} behind{ahead}, more than the standard "
            f"error of {_percentage(default.standard_error)}"
        )
    elif chosen is best:
        other = rows[1]
        sizes = f"({size(other.state_bytes)} against {size(chosen.state_bytes)})"
        parts.append(f"next {other.name} {other.accuracy:.3f} {sizes}")
    return "; ".join(parts)


def _points(share: float | None) -> str:
    number = _percentage(share)
    return f"{number} {'point' if number == '1.0' else 'points'}"


def _percentage(share: float | None) -> str:
    """Format as percentage points with one decimal, or two below a tenth of a point."""
    share = share or 0.0
    return f"{100 * share:.2f}" if 0 < share < 0.00095 else f"{100 * share:.1f}"
