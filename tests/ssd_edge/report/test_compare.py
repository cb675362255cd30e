"""Comparison of a run with other methods."""

from __future__ import annotations

from typing import Any

import pytest

from ssd_edge.report.compare import compared, lead_note, ranked
from ssd_edge.system import duration, size


def run(own: float, learner: str = "ridge", **others: float) -> dict[str, Any]:
    baselines = {name: {"average_accuracy": others.pop(name)} for name in ("sdmlp", "finetune") if name in others}
    return {"learner": learner, "average_accuracy": own, "baselines": baselines, "panel": others}


def test_order_roles_and_display_names() -> None:
    metrics = run(0.7, joint=0.8, ranpac=0.75, ncm=0.6, finetune=0.2)
    metrics["panel_details"] = {"ncm": {"display": "nearest mean", "seconds": 2.0, "average_accuracy": 0.1}}
    assert [(method.display, method.role) for method in compared(metrics)] == [
        ("ridge", "learner"),
        ("fine-tuning", "baseline"),
        ("nearest mean", "panel"),
        ("RanPAC", "panel"),
        ("joint", "joint"),
    ]
    names = [method.display for method in ranked(metrics)]
    assert names == ["joint", "RanPAC", "ridge", "nearest mean", "fine-tuning"]
    values = compared(metrics)[2].values
    assert (values["average_accuracy"], values["seconds"]) == (0.6, 2.0)


def test_a_learner_is_not_compared_with_itself() -> None:
    assert [method.display for method in compared(run(0.7, learner="ncm", ncm=0.7, slda=0.7))] == ["NCM", "SLDA"]


def test_an_unknown_name_is_shown_unchanged() -> None:
    assert compared(run(0.7, learner="mine"))[0].display == "mine"


@pytest.mark.parametrize(
    ("others", "note"),
    [
        ({}, ""),
        ({"ncm": 0.6, "joint": 0.9}, ""),  # joint training is an upper bound, not a rival
        ({"ncm": 0.7004}, ""),  # would read "0.0 points ahead"
        ({"slda": 0.731}, "SLDA is 3.1 points ahead of ridge on this stream."),
        (
            {"sdmlp": 0.71, "ncm": 0.702, "slda": 0.731},
            "SLDA is 3.1 points ahead of ridge on this stream (also ahead: SDMLP by 1.0, NCM by 0.2).",
        ),
    ],
)
def test_lead_note(others: dict[str, float], note: str) -> None:
    assert lead_note(run(0.7, **others)) == note


def test_durations() -> None:
    small = ["4 ms", "99 ms", "0.10 s", "0.42 s", "9.99 s", "10.0 s", "59.9 s"]
    large = ["1 min 00 s", "3 min 04 s", "1 h 00 min", "2 h 05 min", "–"]
    values = (0.004, 0.0994, 0.0996, 0.42, 9.99, 9.996, 59.9, 59.96, 184.2, 3599.7, 7512, None)
    assert [duration(value) for value in values] == small + large


def test_sizes() -> None:
    texts = ["0 B", "999 B", "1.0 kB", "4.1 kB", "100 kB", "1.0 MB", "12.3 MB", "4.0 GB", "–"]
    assert [size(value) for value in (0, 999, 1000, 4100, 99_960, 999_600, 12_345_678, 4e9, None)] == texts
