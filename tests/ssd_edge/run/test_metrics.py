"""Metrics against values computed by hand, and properties of arbitrary matrices."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_edge.run.metrics import (
    accuracy_curve,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forgetting_first_last,
    forward_transfer,
    intransigence,
    learning_accuracy,
    sdmlp_curve,
    summary,
    weighted_average_accuracy,
)

# R[t][g]; task 0 is best after task 1, and task 1 gains from task 2
MATRIX = [
    [0.80, None, None],
    [0.90, 0.60, None],
    [0.50, 0.70, 0.40],
]

# experience 2 introduces no new group
REPEATED = [
    [0.80, None, None],
    [0.50, 0.60, None],
    [0.90, 0.20, None],
    [0.70, 0.10, 0.30],
]
LEARNED = (0, 1, 3)


def test_average_accuracy() -> None:
    assert average_accuracy(MATRIX) == pytest.approx(1.6 / 3)  # 0.5 + 0.7 + 0.4
    assert average_accuracy(REPEATED) == pytest.approx(1.1 / 3)  # 0.7 + 0.1 + 0.3
    assert average_accuracy([[0.2, 0.6]]) == pytest.approx(0.4)  # joint training: one experience, two groups


def test_accuracy_curve() -> None:
    assert accuracy_curve(MATRIX) == pytest.approx([0.8, 0.75, 1.6 / 3])
    # 0.8; (0.5 + 0.6)/2; (0.9 + 0.2)/2, group 2 comes later; 1.1/3
    assert accuracy_curve(REPEATED, LEARNED) == pytest.approx([0.8, 0.55, 0.55, 1.1 / 3])


def test_average_incremental_accuracy() -> None:
    assert average_incremental_accuracy(MATRIX) == pytest.approx((0.8 + 0.75 + 1.6 / 3) / 3)
    # (0.8 + 0.55 + 0.55 + 1.1/3)/4 = (1.9 + 1.1/3)/4
    assert average_incremental_accuracy(REPEATED, LEARNED) == pytest.approx((1.9 + 1.1 / 3) / 4)


def test_backward_transfer_is_negative_if_tasks_are_forgotten() -> None:
    assert backward_transfer(MATRIX) == pytest.approx(-0.1)  # ((0.5 − 0.8) + (0.7 − 0.6))/2
    assert backward_transfer(REPEATED, LEARNED) == pytest.approx(-0.3)  # ((0.7 − 0.8) + (0.1 − 0.6))/2


def test_forgetting_compares_with_the_best_earlier_accuracy() -> None:
    """Task 1 was never better than at the end, so its gain offsets the loss of task 0."""
    assert forgetting(MATRIX) == pytest.approx(0.15)  # ((0.9 − 0.5) + (0.6 − 0.7))/2
    assert forgetting(REPEATED, LEARNED) == pytest.approx(0.35)  # ((0.9 − 0.7) + (0.6 − 0.1))/2


def test_forgetting_first_last_compares_with_the_first_accuracy() -> None:
    assert forgetting_first_last(MATRIX) == pytest.approx(0.1)  # ((0.8 − 0.5) + (0.6 − 0.7))/2
    assert forgetting_first_last(REPEATED, LEARNED) == pytest.approx(0.3)  # ((0.8 − 0.7) + (0.6 − 0.1))/2


def test_forward_transfer_uses_the_experience_before() -> None:
    full = [[0.80, 0.25, 0.0], [0.90, 0.60, 0.30], [0.50, 0.70, 0.40]]
    initial = [0.5, 0.1, 0.2]
    assert forward_transfer(full, initial) == pytest.approx(0.125)  # ((0.25 − 0.1) + (0.3 − 0.2))/2
    repeated = [[0.80, 0.0, 0.0], [0.50, 0.60, 0.0], [0.90, 0.20, 0.5], [0.70, 0.10, 0.30]]
    assert forward_transfer(repeated, initial, LEARNED) == pytest.approx(0.1)  # ((0.0 − 0.1) + (0.5 − 0.2))/2
    assert forward_transfer([[0.7]], [0.1]) == 0.0  # nothing came later


def test_forward_transfer_of_a_single_head_is_minus_chance() -> None:
    blind = [[0.8, 0.0, 0.0], [0.8, 0.6, 0.0], [0.8, 0.6, 0.4]]
    assert forward_transfer(blind, [0.3, 0.1, 0.2]) == pytest.approx(-0.15)  # −(0.1 + 0.2)/2


def test_forward_transfer_names_the_missing_entry() -> None:
    with pytest.raises(ValueError, match=r"R\[0\]\[1\] is None"):
        forward_transfer(MATRIX, [0.1, 0.1, 0.1])
    with pytest.raises(ValueError, match="initial has 2 entries, but the matrix has 3 groups"):
        forward_transfer(MATRIX, [0.1, 0.1])


def test_learning_accuracy_and_intransigence() -> None:
    assert learning_accuracy(MATRIX) == pytest.approx(0.6)  # (0.8 + 0.6 + 0.4)/3
    assert learning_accuracy(REPEATED, LEARNED) == pytest.approx(1.7 / 3)  # 0.8 + 0.6 + 0.3
    assert intransigence(MATRIX, [0.9, 0.9, 0.9]) == pytest.approx(0.3)  # (0.1 + 0.3 + 0.5)/3
    assert intransigence(REPEATED, [0.7, 0.9, 0.9], LEARNED) == pytest.approx(0.8 / 3)  # −0.1 + 0.3 + 0.6
    with pytest.raises(ValueError, match="reference has 1 entries, but the matrix has 3 groups"):
        intransigence(MATRIX, [0.9])


def test_weighted_average_accuracy_counts_samples() -> None:
    # (100·0.5 + 300·0.7 + 100·0.4)/500 = 300/500
    assert weighted_average_accuracy(MATRIX, [100, 300, 100]) == pytest.approx(0.6)
    assert weighted_average_accuracy([[0.5, 1.0]], [3, 1]) == pytest.approx(0.625)  # one experience, two groups
    with pytest.raises(ValueError, match="samples has 2 entries, but the matrix has 3 groups"):
        weighted_average_accuracy(MATRIX, [1, 2])


def test_sdmlp_curve() -> None:
    # 80/100 · 1/3; (90 + 180)/400 · 2/3; 300/500 · 3/3
    assert sdmlp_curve(MATRIX, [100, 300, 100]) == pytest.approx([0.8 / 3, 0.675 * 2 / 3, 0.6])
    # 80/100 · 1/3; (50 + 180)/400 · 2/3; (90 + 60)/400 · 2/3; (70 + 30 + 30)/500 · 3/3
    wanted = [0.8 / 3, 0.575 * 2 / 3, 0.375 * 2 / 3, 0.26]
    assert sdmlp_curve(REPEATED, [100, 300, 100], LEARNED) == pytest.approx(wanted)


def test_one_task() -> None:
    assert average_accuracy([[0.7]]) == average_incremental_accuracy([[0.7]]) == learning_accuracy([[0.7]]) == 0.7
    assert backward_transfer([[0.7]]) == forgetting([[0.7]]) == forgetting_first_last([[0.7]]) == 0.0
    assert sdmlp_curve([[0.7]], [10]) == [weighted_average_accuracy([[0.7]], [10])] == pytest.approx([0.7])


def test_values_of_later_tasks_are_not_used() -> None:
    full = [[0.80, 0.1, 0.2], [0.90, 0.60, 0.3], [0.50, 0.70, 0.40]]
    wanted = {**summary(MATRIX).to_dict(), "accuracy_matrix": 0}
    assert {**summary(full).to_dict(), "accuracy_matrix": 0} == wanted


def test_summary_has_the_metrics_and_a_copy_of_the_matrix() -> None:
    result = summary(REPEATED, LEARNED).to_dict()
    matrix = result.pop("accuracy_matrix")
    assert matrix == REPEATED
    assert matrix[0] is not REPEATED[0]
    assert result == {
        "average_accuracy": pytest.approx(1.1 / 3),
        "average_incremental_accuracy": pytest.approx((1.9 + 1.1 / 3) / 4),
        "backward_transfer": pytest.approx(-0.3),
        "forgetting": pytest.approx(0.35),
        "forgetting_first_last": pytest.approx(0.3),
        "learning_accuracy": pytest.approx(1.7 / 3),
        "accuracy_curve": pytest.approx([0.8, 0.55, 0.55, 1.1 / 3]),
    }


@pytest.mark.parametrize(
    ("matrix", "learned", "sentence"),
    [
        ([], None, "has no rows"),
        (REPEATED, None, "4 experiences introduce 3 groups"),
        (REPEATED, (0, 1), "learned has 2 entries, but the matrix has 3 groups"),
        (REPEATED, (0, 1, 4), r"learned\[2\] is 4, but the experiences are 0 to 3"),
        (REPEATED, (0, -1, 3), r"learned\[1\] is -1"),
        (REPEATED, (0, 1, 2), r"R\[2\]\[2\] is None"),
        ([[0.5, None], [None, 0.5]], None, r"R\[1\]\[0\] is None"),
    ],
)
def test_inconsistent_input_is_refused(matrix: list, learned: tuple[int, ...] | None, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        summary(matrix, learned)


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[list[float]], list[int]]:
    """Draw a full matrix and the experience in which each group is learned."""
    experiences, groups = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    accuracy = st.integers(0, 64).map(lambda part: part / 64)  # sums of these are exact
    row = st.lists(accuracy, min_size=groups, max_size=groups)
    matrix = draw(st.lists(row, min_size=experiences, max_size=experiences))
    return matrix, draw(st.lists(st.integers(0, experiences - 1), min_size=groups, max_size=groups))


@settings(max_examples=150)
@given(histories())
def test_properties_of_any_matrix(history: tuple[list[list[float]], list[int]]) -> None:
    matrix, learned = history
    last = len(matrix) - 1
    assert backward_transfer(matrix, learned) == -forgetting_first_last(matrix, learned)
    assert forgetting(matrix, learned) >= forgetting_first_last(matrix, learned)
    best_first = all(
        matrix[start][group] >= max([matrix[t][group] for t in range(start, last)], default=0.0)
        for group, start in enumerate(learned)
    )
    assert best_first == (forgetting(matrix, learned) == forgetting_first_last(matrix, learned))
    assert -1 <= forgetting(matrix, learned) <= 1
    assert all(0 <= value <= 1 for value in accuracy_curve(matrix, learned))
    assert accuracy_curve(matrix, learned)[-1] == pytest.approx(average_accuracy(matrix))
    old = sum(start < last for start in learned)
    drop = forgetting_first_last(matrix, learned) * old / len(learned)  # groups of the last experience cannot drop
    assert learning_accuracy(matrix, learned) - average_accuracy(matrix) == pytest.approx(drop)


@settings(max_examples=50)
@given(histories(), st.integers(1, 50))
def test_groups_of_equal_size_have_equal_weight(history: tuple[list[list[float]], list[int]], size: int) -> None:
    matrix, learned = history
    samples = [size] * len(learned)
    assert weighted_average_accuracy(matrix, samples) == pytest.approx(average_accuracy(matrix))
    for t, (value, mean) in enumerate(
        zip(sdmlp_curve(matrix, samples, learned), accuracy_curve(matrix, learned), strict=True)
    ):
        assert value == pytest.approx(mean * sum(start <= t for start in learned) / len(learned))
