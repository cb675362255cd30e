"""Text for numbers and streams."""

from __future__ import annotations

from ssd_edge.report.wording import describe_stream, percent, points, step_name, stream_name


def test_shares_and_differences() -> None:
    assert [percent(value) for value in (0.7314, 1, 0.0, None)] == ["73.1 %", "100.0 %", "0.0 %", "–"]
    assert [points(value) for value in (0.0421, None)] == ["4.2", "–"]
    signed = [points(value, signed=True) for value in (-0.0421, 0.01, -0.0001, 0.0)]
    assert signed == ["−4.2", "+1.0", "0.0", "0.0"]


def test_stream_names() -> None:
    assert stream_name("class_incremental", False) == "class-incremental"
    assert stream_name("blurry", True) == "blurry, online"
    metrics = {"classes": list("abcd"), "tasks": [{}, {}], "accuracy_matrix": [[1, None]] * 5}
    assert describe_stream(metrics) == "4 classes in 2 tasks over 5 experiences"
    metrics["stream"] = {"kind": "repetition", "online": False}
    assert describe_stream(metrics) == "4 classes in 2 tasks over 5 experiences, class-incremental with repetition"
    assert describe_stream(metrics | {"tasks": [{}], "accuracy_matrix": [[1]]}).startswith("4 classes in 1 task, ")
    assert (step_name(2, 2), step_name(2, 5)) == ("task", "experience")
