"""Metrics by hand, on one matrix of three tasks."""

from __future__ import annotations

import pytest

from ssd_edge.metrics import (
    accuracy_curve,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    summary,
)

# R[t][i]; task 0 is best after task 1, and task 1 gains from task 2
MATRIX = [
    [0.80, None, None],
    [0.90, 0.60, None],
    [0.50, 0.70, 0.40],
]


def test_average_accuracy() -> None:
    assert average_accuracy(MATRIX) == pytest.approx((0.5 + 0.7 + 0.4) / 3)


def test_accuracy_curve() -> None:
    assert accuracy_curve(MATRIX) == pytest.approx([0.8, 0.75, 1.6 / 3])


def test_average_incremental_accuracy() -> None:
    assert average_incremental_accuracy(MATRIX) == pytest.approx((0.8 + 0.75 + 1.6 / 3) / 3)


def test_backward_transfer_is_negative_where_tasks_are_forgotten() -> None:
    assert backward_transfer(MATRIX) == pytest.approx(((0.5 - 0.8) + (0.7 - 0.6)) / 2)


def test_forgetting_compares_with_the_best_of_earlier_times() -> None:
    """Task 1 was never better than now: its gain counts against the loss of task 0."""
    assert forgetting(MATRIX) == pytest.approx(((0.9 - 0.5) + (0.6 - 0.7)) / 2)


def test_one_task() -> None:
    assert average_accuracy([[0.7]]) == average_incremental_accuracy([[0.7]]) == 0.7
    assert backward_transfer([[0.7]]) == forgetting([[0.7]]) == 0.0


def test_values_beyond_the_seen_tasks_are_not_used() -> None:
    full = [[0.80, 0.1, 0.2], [0.90, 0.60, 0.3], [0.50, 0.70, 0.40]]
    assert {**summary(full), "accuracy_matrix": 0} == {**summary(MATRIX), "accuracy_matrix": 0}


def test_summary_holds_a_copy_of_the_matrix() -> None:
    result = summary(MATRIX)
    assert result["accuracy_matrix"] == MATRIX
    assert result["accuracy_matrix"][0] is not MATRIX[0]
    assert result["forgetting"] == forgetting(MATRIX)
