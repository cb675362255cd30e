"""What the report concludes from answers: pairs, orders, thresholds, and advice with its evidence."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from ssd_edge.report import findings
from ssd_edge.report.results import Answers, LearningPoint, Results, image_name

NAMES = ("gear", "nut", "bolt", "washer")


def answers_of(table: list[list[int]], **changes: Any) -> Answers:
    """Return answers with this confusion matrix; of each cell the first image is the surest."""
    cells = [(row, column) for row, counts in enumerate(table) for column, n in enumerate(counts) for _ in range(n)]
    truth, given = np.array(cells, dtype=np.int64).T
    sure = np.linspace(0.9, 0.4, len(truth))
    names = tuple(f"{row}/{index}.jpg" for index, row in enumerate(truth))
    return dataclasses.replace(Answers(names, truth, given, sure, sure - 0.5, sure - 0.7), **changes)


def results_of(table: list[list[int]], **changes: Any) -> Results:
    names = NAMES[: len(table)]
    values = {"learned": (20,) * len(table), "answers": answers_of(table), **changes}
    return Results("SLDA", "parts", "all images", names, **values)


def test_interval_covers_the_share_and_stays_within_bounds() -> None:
    assert findings.interval(0, 5) == pytest.approx((0.0, 0.4345), abs=1e-4)
    assert findings.interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # Wilson, as in scipy
    assert findings.interval(5, 5)[1] == 1.0


def test_mistakes_without_probabilities_are_ordered_by_margin() -> None:
    table = [[3, 2], [1, 4]]
    assert findings.mistakes(answers_of(table)) == [3, 4, 5]
    blind = answers_of(table, sure=np.full(10, np.nan), margin=np.arange(10.0))
    assert findings.mistakes(blind) == [5, 4, 3]


def test_pairs_count_both_directions() -> None:
    pairs = findings.confused(answers_of([[5, 2, 0], [1, 5, 1], [0, 0, 8]]))
    assert [(pair.rows, len(pair.wrong), pair.images) for pair in pairs] == [((0, 1), 3, 14), ((1, 2), 1, 15)]


def test_classes_that_look_alike_stand_together() -> None:
    table = [[5, 0, 0, 4], [0, 9, 0, 0], [1, 0, 7, 1], [0, 0, 0, 9]]
    order = findings.alike(answers_of(table), 4)
    assert sorted(order) == [0, 1, 2, 3]
    assert abs(order.index(0) - order.index(3)) == 1
    assert order[-1] == 1  # taken for nothing
    assert findings.alike(answers_of([[1, 0], [0, 1]]), 2) == [0, 1]


def test_a_higher_threshold_rejects_more_of_both() -> None:
    answers = answers_of([[8, 2], [0, 10]])
    found = findings.thresholds(answers)
    assert found[0].answered == 1.0
    for looser, stricter in itertools.pairwise(found):
        assert looser.answered > stricter.answered
        assert looser.rejected <= stricter.rejected
        assert stricter.right <= stricter.answered
    own = findings.threshold(answers)
    assert own.answered == pytest.approx(float((answers.margin >= 0).mean()))
    assert own.rejected == pytest.approx(float((answers.unseen < 0).mean()))


def test_look_alikes_are_advised_to_be_merged_with_what_it_would_bring() -> None:
    (step,) = findings.steps(results_of([[30, 10, 0], [5, 35, 0], [0, 0, 40]]))
    assert step.do.startswith("gear and nut look alike")
    assert "15 of their 80 test images" in step.why
    assert "100.0 % of all test images would be named correctly instead of 87.5 %" in step.why
    assert step.command == "ssd-edge device merge-labels gear nut --into gear"
    assert step.see == "pair0"
    assert not findings.steps(results_of([[38, 2, 0], [0, 40, 0], [0, 0, 40]]))  # two images are no evidence


WEAK = [[20, 7, 7, 6], [0, 40, 0, 0], [0, 0, 40, 0], [0, 0, 0, 40]]


def test_more_photographs_only_with_evidence() -> None:
    assert not findings.steps(results_of(WEAK))  # as many images as the others, and nothing known of fewer

    few = results_of(WEAK, learned=(8, 20, 20, 20))
    (step,) = findings.steps(few)
    assert step.do == "Take 12 more photographs of gear."
    assert "20 of its 40" in step.why
    assert "Classes with at least 20 are recognised in 100.0 % of all cases, those with fewer in 50.0 %" in step.why

    every = LearningPoint(20, few.answers.accuracy, (20, 40, 40, 40))
    flat = dataclasses.replace(few, fewer=(LearningPoint(4, every.accuracy, (20, 40, 40, 40)), every))
    assert not findings.steps(flat)  # measured: fewer images are as good

    rising = dataclasses.replace(few, fewer=(LearningPoint(4, 0.7, (2, 36, 37, 37)), every))
    (step,) = findings.steps(rising)
    assert "learned from 4, 2 were right, from 8 it is 20" in step.why

    hardly = dataclasses.replace(few, fewer=(LearningPoint(4, 0.7, (19, 31, 31, 31)), every))
    (step,) = findings.steps(hardly)
    assert "It was learned from 8, half of the classes from 20 or more" in step.why  # one image more is chance

    others = dataclasses.replace(few, fewer=(LearningPoint(6, 0.7, (22, 30, 30, 30)), every))
    (step,) = findings.steps(others)
    assert "with at most 6 of each class accuracy was 70.0 %, with all it is 87.5 %" in step.why


def test_a_class_that_looks_like_one_other_does_not_need_photographs() -> None:
    table = [[10, 10, 0], [0, 20, 0], [0, 0, 20]]
    steps = findings.steps(results_of(table, learned=(5, 20, 20)))
    assert [step.do.partition(":")[0] for step in steps] == ["gear and nut look alike"]


def test_doubts() -> None:
    table = [[4, 1], [0, 5]]
    certain = answers_of(table, sure=np.full(10, 0.99))
    first, second = findings.steps(results_of(table, answers=certain))
    assert "1 test image is named wrongly with a certainty of 98 % or more" in first.why
    assert first.see == "mistakes"
    assert "ten of each class instead of 5" in second.do
    assert "59.6 % and 98.2 %" in second.why


def test_test_images_that_are_training_images_are_a_reason_to_doubt() -> None:
    record = {"accounts": {"alike": [["a", "b"], ["c", "d"]]}}
    (step,) = findings.steps(results_of([[20, 0], [0, 20]], record=record))
    assert "2 of the 40 test images" in step.why


@pytest.mark.parametrize(
    ("name", "setting"), [("tiny", "backbone=lite0"), ("package:mine", "backbone=lite0"), ("lite0", "backbone=lite2")]
)
def test_a_poor_result_names_the_lever_and_the_command(name: str, setting: str) -> None:
    argv = ["ssd-edge", "train", "data.path=my parts", f"backbone={name}", "learner.name=ncm"]
    record = {"argv": argv, "config": {"backbone": {"name": name}}}
    table = [[20, 20], [20, 20]]
    first, *_ = findings.steps(results_of(table, record=record))
    assert first.command.endswith(f"ssd-edge train 'data.path=my parts' learner.name=ncm {setting}")
    good = results_of([[40, 0], [0, 40]], record=record)
    assert not findings.steps(good)


def test_a_poor_result_advises_the_better_learner_or_to_look_for_one() -> None:
    base = {"learner": "slda", "average_accuracy": 0.5}
    record = {"argv": ["ssd-edge", "train", "--resume", "runs/1"], "config": {"data": {"path": "parts"}}}
    table = [[20, 20], [20, 20]]
    (alone,) = (s for s in findings.steps(results_of(table, metrics=base, record=record)) if "learner" in s.do)
    assert alone.command == "ssd-edge train data.path=parts learner.name=auto"
    better = base | {"panel": {"fecam": 0.56, "joint": 0.9}}
    (found,) = (s for s in findings.steps(results_of(table, metrics=better, record=record)) if "learner" in s.do)
    assert found.command == "ssd-edge train data.path=parts learner.name=fecam"
    assert "56.0 % correctly" in found.why
    worse = base | {"panel": {"fecam": 0.49}}
    assert not [s for s in findings.steps(results_of(table, metrics=worse, record=record)) if "learner" in s.do]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("/data/train/gear/1.jpg", "gear/1.jpg"),
        ("x.tar: test/gear/1.jpg", "gear/1.jpg"),
        ("digits image 3", "digits image 3"),
    ],
)
def test_image_names_are_short(name: str, short: str) -> None:
    assert image_name(name) == short
