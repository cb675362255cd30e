"""Metrics of continual learning, one definition each.

R[t][g] is the test accuracy on group g of classes after experience t, both from 0; there are E experiences and G
groups. Entries of groups that have not been taught yet may be None. l(g) is the experience that first teaches group
g: `learned`, or g itself where `learned` is None, as in class-incremental learning with E = G = T tasks. A mean over
no group at all, such as the forgetting of a single task, is 0. ValueError: a needed entry is None, or sizes disagree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

Matrix = Sequence[Sequence["float | None"]]


def average_accuracy(matrix: Matrix) -> float:
    """Mean over groups of the final accuracy, each group counting the same: 1/G · Σ_g R[E−1][g]."""
    last = _last(matrix)
    return _mean(_entry(matrix, last, group) for group in range(len(matrix[last])))


def weighted_average_accuracy(matrix: Matrix, samples: Sequence[int]) -> float:
    """Final accuracy over all test samples, each sample counting the same: Σ_g n_g·R[E−1][g] / Σ_g n_g.

    Args:
        matrix: R.
        samples: n_g, test samples of each group.
    """
    return _weighted(matrix, _last(matrix), samples, range(len(matrix[-1])))


def accuracy_curve(matrix: Matrix, learned: Sequence[int] | None = None) -> list[float]:
    """After each experience t, the mean over the groups taught so far: A_t = mean of R[t][g] over g with l(g) ≤ t."""
    first = _learned(matrix, learned)
    return [
        _mean(_entry(matrix, t, group) for group in range(len(first)) if first[group] <= t) for t in range(len(matrix))
    ]


def sdmlp_curve(matrix: Matrix, samples: Sequence[int], learned: Sequence[int] | None = None) -> list[float]:
    """After each experience t, what the SDMLP code logs: A_t · G_t/G.

    Here A_t is the accuracy over all test samples of the G_t groups taught so far; for T tasks the factor is
    (t+1)/T. With groups of one size this is the accuracy on the whole test set, untaught classes counting as wrong.

    Args:
        matrix: R.
        samples: n_g, test samples of each group.
        learned: l.
    """
    first, curve = _learned(matrix, learned), []
    for t in range(len(matrix)):
        taught = [group for group in range(len(first)) if first[group] <= t]
        curve.append(_weighted(matrix, t, samples, taught) * len(taught) / len(first))
    return curve


def average_incremental_accuracy(matrix: Matrix, learned: Sequence[int] | None = None) -> float:
    """Mean of the accuracy curve: 1/E · Σ_t A_t. iCaRL and PyCIL call this "average accuracy"."""
    return _mean(accuracy_curve(matrix, learned))


def backward_transfer(matrix: Matrix, learned: Sequence[int] | None = None) -> float:
    """BWT (Eq. 7): mean of R[E−1][g] − R[l(g)][g] over g with l(g) < E−1; negative is forgetting."""
    last, first = _last(matrix), _learned(matrix, learned)
    return _mean(_entry(matrix, last, group) - _entry(matrix, t, group) for group, t in enumerate(first) if t < last)


def forgetting(matrix: Matrix, learned: Sequence[int] | None = None) -> float:
    """Drop from the best before: mean of max_{l(g)≤t<E−1} R[t][g] − R[E−1][g] over g with l(g) < E−1.

    RWalk's definition, which Mammoth, FACIL and PyCIL use too.
    """
    last, first = _last(matrix), _learned(matrix, learned)
    return _mean(
        max(_entry(matrix, t, group) for t in range(start, last)) - _entry(matrix, last, group)
        for group, start in enumerate(first)
        if start < last
    )


def forgetting_first_last(matrix: Matrix, learned: Sequence[int] | None = None) -> float:
    """Drop from the accuracy when just taught: mean of R[l(g)][g] − R[E−1][g] over g with l(g) < E−1.

    Avalanche's definition; it is −BWT, and never above `forgetting`.
    """
    last, first = _last(matrix), _learned(matrix, learned)
    return _mean(_entry(matrix, t, group) - _entry(matrix, last, group) for group, t in enumerate(first) if t < last)


def forward_transfer(matrix: Matrix, initial: Sequence[float], learned: Sequence[int] | None = None) -> float:
    """FWT: mean of R[l(g)−1][g] − b_g over g with l(g) > 0: what is known of a group just before it is taught.

    A single head that learns classes one after another has never been given the labels of such a group, so R is
    about 0 there and FWT about −b, whatever the method. It tells something where classes are shared between
    experiences.

    Args:
        matrix: R, with the entries before l(g) measured too.
        initial: b_g, accuracy of an untrained model on each group.
        learned: l.

    Raises:
        ValueError: an entry R[l(g)−1][g] is None.
    """
    first = _learned(matrix, learned)
    _same_length("initial", initial, len(first))
    return _mean(_entry(matrix, t - 1, group) - initial[group] for group, t in enumerate(first) if t > 0)


def learning_accuracy(matrix: Matrix, learned: Sequence[int] | None = None) -> float:
    """Accuracy of each group when just taught: 1/G · Σ_g R[l(g)][g]."""
    return _mean(_entry(matrix, t, group) for group, t in enumerate(_learned(matrix, learned)))


def intransigence(matrix: Matrix, reference: Sequence[float], learned: Sequence[int] | None = None) -> float:
    """What learning in sequence keeps from being learned: 1/G · Σ_g (R*[g] − R[l(g)][g]) (RWalk).

    Args:
        matrix: R.
        reference: R*[g], accuracy on each group of a model trained on all data up to l(g) at once.
        learned: l.
    """
    first = _learned(matrix, learned)
    _same_length("reference", reference, len(first))
    return _mean(reference[group] - _entry(matrix, t, group) for group, t in enumerate(first))


@dataclasses.dataclass(frozen=True)
class Summary:
    """All metrics that the accuracy matrix alone gives. Joint training has no stream and only an average accuracy.

    Attributes:
        average_accuracy: See the function of the same name; so for the others.
        accuracy_matrix: R.
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
    """Return all metrics that the matrix alone gives, with the matrix."""
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
    """E − 1."""
    if not matrix:
        raise ValueError("the accuracy matrix has no row; measure after at least one experience")
    return len(matrix) - 1


def _learned(matrix: Matrix, learned: Sequence[int] | None) -> Sequence[int]:
    """l(g) for every group, checked against the size of the matrix."""
    experiences, groups = _last(matrix) + 1, len(matrix[0])
    if learned is None:
        if experiences != groups:
            raise ValueError(
                f"{experiences} experiences teach {groups} groups of classes; say with `learned` which teaches which"
            )
        return range(groups)
    _same_length("learned", learned, groups)
    for group, t in enumerate(learned):
        if not 0 <= t < experiences:
            raise ValueError(f"learned[{group}] is {t}, but the matrix has the experiences 0 to {experiences - 1}")
    return learned


def _same_length(name: str, values: Sequence[Any], groups: int) -> None:
    if len(values) != groups:
        raise ValueError(f"{name} has {len(values)} entries, but the matrix has {groups} groups; give one for each")


def _entry(matrix: Matrix, t: int, group: int) -> float:
    value = matrix[t][group]
    if value is None:
        raise ValueError(f"R[{t}][{group}] is None; measure group {group} after experience {t} to use this metric")
    return value


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def _weighted(matrix: Matrix, t: int, samples: Sequence[int], groups: Iterable[int]) -> float:
    """Accuracy after experience t over all test samples of some groups; 0 without a sample."""
    _same_length("samples", samples, len(matrix[t]))
    groups = list(groups)
    right = sum(samples[group] * _entry(matrix, t, group) for group in groups)
    total = sum(samples[group] for group in groups)
    return right / total if total else 0.0
