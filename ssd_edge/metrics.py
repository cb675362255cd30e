"""Metrics of continual learning. R[t][i] is the test accuracy on task i after training task t (from 0);
T is the number of tasks. One definition each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Matrix = Sequence[Sequence[float | None]]


def average_accuracy(matrix: Matrix) -> float:
    """Mean over tasks of the final accuracy: 1/T · Σ_i R[T−1][i]."""
    return sum(matrix[-1]) / len(matrix)


def accuracy_curve(matrix: Matrix) -> list[float]:
    """After each task t, the mean over the tasks seen: A_t = 1/(t+1) · Σ_{i≤t} R[t][i]."""
    return [sum(row[: t + 1]) / (t + 1) for t, row in enumerate(matrix)]


def average_incremental_accuracy(matrix: Matrix) -> float:
    """Mean of the accuracy curve: 1/T · Σ_t A_t."""
    curve = accuracy_curve(matrix)
    return sum(curve) / len(curve)


def backward_transfer(matrix: Matrix) -> float:
    """BWT (Eq. 7): 1/(T−1) · Σ_{i<T−1} (R[T−1][i] − R[i][i]); negative is forgetting. 0 for one task."""
    last = len(matrix) - 1
    if not last:
        return 0.0
    return sum(matrix[last][i] - matrix[i][i] for i in range(last)) / last


def forgetting(matrix: Matrix) -> float:
    """Mean drop from the best before: 1/(T−1) · Σ_{i<T−1} (max_{i≤t<T−1} R[t][i] − R[T−1][i]). 0 for one task."""
    last = len(matrix) - 1
    if not last:
        return 0.0
    drops = (max(matrix[t][i] for t in range(i, last)) - matrix[last][i] for i in range(last))
    return sum(drops) / last


def summary(matrix: Matrix) -> dict[str, Any]:
    """All of the above, with the matrix."""
    return {
        "average_accuracy": average_accuracy(matrix),
        "average_incremental_accuracy": average_incremental_accuracy(matrix),
        "backward_transfer": backward_transfer(matrix),
        "forgetting": forgetting(matrix),
        "accuracy_curve": accuracy_curve(matrix),
        "accuracy_matrix": [list(row) for row in matrix],
    }
