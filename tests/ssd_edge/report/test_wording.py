"""Text for numbers and streams."""

from __future__ import annotations

from ssd_edge.report.wording import describe_stream, development, percent, points, step_name, stream_name


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


def test_development_says_forgotten_only_of_a_learner_that_forgets() -> None:
    base = {
        "accuracy_matrix": [[0.9, None], [0.7, 0.8]],
        "accuracy_curve": [0.9, 0.75],
        "forgetting": 0.2,
        "backward_transfer": -0.2,
        "classes": ["a", "b", "c"],
        "tasks": [{"classes": ["a", "b"]}, {"classes": ["c"]}],
    }
    sums = development(base | {"learner": "slda"})
    assert sums.startswith("90.0 % with the first 2 classes, 75.0 % with all 3. Later classes made this harder")
    assert "lost 20.0 points" in sums
    assert "Nothing was forgotten" in sums
    network = development(base | {"learner": "finetune"})
    assert "lost 20.0 points when later ones were learned: this learner forgets" in network
    assert "No task lost accuracy" in development(base | {"learner": "finetune", "forgetting": 0.0})
    assert development(base | {"learner": "slda", "accuracy_matrix": [[0.9]]}) == ""
