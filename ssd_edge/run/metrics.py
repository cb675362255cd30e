"""Metrics of continual learning.

R[t][g] is the test accuracy on group g of classes after experience t, both counted from 0; there are E experiences and
G groups. Entries of groups that are learned later may be None. l(g) is the experience that introduces group g:
`learned[g]`, or g if `learned` is None, as in class-incremental learning with E = G = T tasks. A mean over an empty set
of groups, such as the forgetting of a single task, is 0. All functions raise ValueError if an entry that they need is
None or if sizes disagree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

Matrix = Sequence[Sequence["float | None"]]


def average_accuracy(matrix: Matrix) -> float:
    """Return the mean final accuracy over groups: 1/G · Σ_g R[E−1][g]."""
    last = _last(matrix)
    return _mean(_entry(matrix, last, group) for group in range(len(matrix[last])))


def weighted_average_accuracy(matrix: Matrix, samples: Sequence[int]) -> float:
    """Return the final accuracy over all test samples: Σ_g n_g·R[E−1][g] / Σ_g n_g.

    Args:
        matrix: R.
        samples: n_g, the number of test samples of each group.
    """
    return _weighted(matrix, _last(matrix), samples, range(len(matrix[-1])))


def accuracy_curve(matrix: Matrix, learned: Sequence[int] | None = None) -> list[float]:
    """Return A_t after each experience t: the mean of R[t][g] over the groups learned so far, l(g) ≤ t."""
    first = _learned(matrix, learned)
    return [
        _mean(_entry(matrix, t, group) for group in range(len(first)) if first[group] <= t) for t in range(len(matrix))
    ]


def sdmlp_curve(matrix: Matrix, samples: Sequence[int], learned: Sequence[int] | None = None) -> list[float]:
    """Return the curve that the SDMLP code logs: A_t · G_t/G after each experience t.

    Here A_t is the accuracy over all test samples of the G_t groups learned so far; for T tasks the factor is (t+1)/T.
    With groups of equal size this is the accuracy on the whole test set, counting classes not yet learned as wrong.

    Args:
        matrix: R.
        samples: n_g, the number of test samples of each group.
        learned: l.
    """
    first, curve = _learned(matrix, learned), []
    for t in range(len(matrix)):
        groups = [group for group in range(len(first)) if first[group] <= t]
        curve.append(_weighted(matrix, t, samples, groups) * len(groups) / len(first))
    return curve


def average_incremental_accuracy(matrix: Matrix, learned: Sequence[int] | None = None) -> float:
    """Return the mean of the accuracy curve, 1/E · Σ_t A_t. iCaRL and PyCIL call it "average accuracy"."""
    return _mean(accuracy_curve(matrix, learned))


def backward_transfer(matrix: Matrix, learned: Sequence[int] | None = None) -> float:
    """Return BWT (Eq. 7): mean of R[E−1][g] − R[l(g)][g] over g with l(g) < E−1. Negative values mean forgetting."""
    last, first = _last(matrix), _learned(matrix, learned)
    return _mean(_entry(matrix, last, group) - _entry(matrix, t, group) for group, t in enumerate(first) if t < last)


def forgetting(matrix: Matrix, learned: Sequence[int] | None = None) -> float:
    """Return the drop from the best accuracy: mean of max_{l(g)≤t<E−1} R[t][g] − R[E−1][g] over g with l(g) < E−1.

    This is the definition of RWalk, also used by Mammoth, FACIL and PyCIL.
    """
    last, first = _last(matrix), _learned(matrix, learned)
    return _mean(
        max(_entry(matrix, t, group) for t in range(start, last)) - _entry(matrix, last, group)
        for group, start in enumerate(first)
        if start < last
    )


def forgetting_first_last(matrix: Matrix, learned: Sequence[int] | None = None) -> float:
    """Return the drop from the first accuracy: mean of R[l(g)][g] − R[E−1][g] over g with l(g) < E−1.

    This is the definition of Avalanche. It equals −BWT and never exceeds `forgetting`.
    """
    last, first = _last(matrix), _learned(matrix, learned)
    return _mean(_entry(matrix, t, group) - _entry(matrix, last, group) for group, t in enumerate(first) if t < last)


def forward_transfer(matrix: Matrix, initial: Sequence[float], learned: Sequence[int] | None = None) -> float:
    """Return FWT: mean of R[l(g)−1][g] − b_g over g with l(g) > 0, the accuracy just before a group is learned.

    A single head that learns classes one after another has not seen labels of such a group. R is then about 0 and FWT
    about −b for every method. FWT is informative if experiences share classes.

    Args:
        matrix: R, including the entries before l(g).
        initial: b_g, the accuracy of an untrained model on each group.
        learned: l.

    Raises:
        ValueError: If an entry R[l(g)−1][g] is None.
    """
    first = _learned(matrix, learned)
    _same_length("initial", initial, len(first))
    return _mean(_entry(matrix, t - 1, group) - initial[group] for group, t in enumerate(first) if t > 0)


def learning_accuracy(matrix: Matrix, learned: Sequence[int] | None = None) -> float:
    """Return the mean accuracy of the groups right after they are learned: 1/G · Σ_g R[l(g)][g]."""
    return _mean(_entry(matrix, t, group) for group, t in enumerate(_learned(matrix, learned)))


def intransigence(matrix: Matrix, reference: Sequence[float], learned: Sequence[int] | None = None) -> float:
    """Return intransigence, the accuracy lost by learning in sequence: 1/G · Σ_g (R*[g] − R[l(g)][g]) (RWalk).

    Args:
        matrix: R.
        reference: R*[g], the accuracy on each group of a model trained on all data up to l(g) at once.
        learned: l.
    """
    first = _learned(matrix, learned)
    _same_length("reference", reference, len(first))
    return _mean(reference[group] - _entry(matrix, t, group) for group, t in enumerate(first))


@dataclasses.dataclass(frozen=True)
class Summary:
    """Metrics computed from the accuracy matrix alone. Joint training has no stream and only an average accuracy.

    Attributes:
        accuracy_matrix: R. The other attributes are named after the functions that compute them.
    """

    average_accuracy: float
    average_incremental_accuracy: float | None = None
    backward_transfer: float | None = None
    forgetting: float | None = None
    forgetting_first_last: float | None = None
    learning_accuracy: float | None = None
    accuracy_curve: list[float] | None = None
    accuracy_matrix: list[list[float | None]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


def summary(matrix: Matrix, learned: Sequence[int] | None = None) -> Summary:
    """Return all metrics that need only the matrix."""
    return Summary(
        average_accuracy=average_accuracy(matrix),
        average_incremental_accuracy=average_incremental_accuracy(matrix, learned),
        backward_transfer=backward_transfer(matrix, learned),
        forgetting=forgetting(matrix, learned),
        forgetting_first_last=forgetting_first_last(matrix, learned),
        learning_accuracy=learning_accuracy(matrix, learned),
        accuracy_curve=accuracy_curve(matrix, learned),
        accuracy_matrix=[list(row) for row in matrix],
    )


def _last(matrix: Matrix) -> int:
    """Return E − 1, after checking that there is a row."""
    if not matrix:
        raise ValueError("the accuracy matrix has no rows; measure after at least one experience")
    return len(matrix) - 1


def _learned(matrix: Matrix, learned: Sequence[int] | None) -> Sequence[int]:
    """Return l(g) for every group, after checking it against the size of the matrix."""
    experiences, groups = _last(matrix) + 1, len(matrix[0])
    if learned is None:
        if experiences != groups:
            raise ValueError(
                f"{experiences} experiences introduce {groups} groups of classes; pass `learned`, one per group"
            )
        return range(groups)
    _same_length("learned", learned, groups)
    for group, t in enumerate(learned):
        if not 0 <= t < experiences:
            raise ValueError(f"learned[{group}] is {t}, but the experiences are 0 to {experiences - 1}")
    return learned


def _same_length(name: str, values: Sequence[Any], groups: int) -> None:
    if len(values) != groups:
        raise ValueError(f"{name} has {len(values)} entries, but the matrix has {groups} groups; pass one per group")


def _entry(matrix: Matrix, t: int, group: int) -> float:
    value = matrix[t][group]
    if value is None:
        raise ValueError(f"R[{t}][{group}] is None; measure group {group} after experience {t} to use this metric")
    return value


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def _weighted(matrix: Matrix, t: int, samples: Sequence[int], groups: Iterable[int]) -> float:
    """Return the accuracy after experience t over all test samples of some groups; 0 if there are none."""
    _same_length("samples", samples, len(matrix[t]))
    groups = list(groups)
    correct = sum(samples[group] * _entry(matrix, t, group) for group in groups)
    total = sum(samples[group] for group in groups)
    return correct / total if total else 0.0
