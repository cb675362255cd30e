"""The parity gate: what passes, what is refused, and with which figures."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from exporters import precision
from exporters.parity import failures, measure
from ssd_edge.backbones import onnx_file

IMAGES = np.random.default_rng(2).integers(0, 256, (40, 2, 2, 3), dtype=np.uint8)


def graph(batch: int | str = "batch", half: bool = False) -> bytes:
    """One pixel a feature: uint8 (N, 2, 2, 3) → (N, 12), divided by 255; the weight may be float16."""
    weights = [
        numpy_helper.from_array(np.array(255, np.float16 if half else np.float32), "scale"),
        numpy_helper.from_array(np.array([-1, 12], np.int64), "shape"),
    ]
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    nodes = [
        helper.make_node("Cast", ["images"], ["wide"], to=kind),
        helper.make_node("Div", ["wide", "scale"], ["pixels"]),
        helper.make_node("Cast", ["pixels"], ["single"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["single", "shape"], ["embeddings"]),
    ]
    made = helper.make_graph(
        nodes,
        "pixels",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, [batch, 2, 2, 3])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, [batch, 12])],
        weights,
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString()


def embed(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), 12).astype(np.float32) / np.float32(255)


def problems(onnx_bytes: bytes, *arguments) -> list[str]:
    """What is over the limits of the graph's own precision."""
    return failures(measure(onnx_bytes, *arguments), onnx_file.precision(onnx_bytes))


class Brightest:
    """A learner that names the feature that is largest."""

    def predict(self, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings.argmax(1)


def test_equal_graphs_differ_by_nothing():
    report = measure(graph(), embed, IMAGES)
    assert failures(report, "fp32") == []
    assert report == {
        "images": 40,
        "batch_sizes": [1, 32],
        "nonfinite": 0,
        "max_difference": 0.0,
        "p99_difference": 0.0,
        "min_cosine": 1.0,
        "mean_cosine": 1.0,
        "drift": {"mean_shift": 0.0, "spread": 1.0},
    }


def test_a_graph_of_one_image_is_run_image_by_image():
    assert measure(graph(batch=1), embed, IMAGES)["max_difference"] == 0.0


def test_decisions_and_accuracy_are_measured_with_a_learner_and_labels():
    labels = embed(IMAGES).argmax(1)
    labels[:10] = (labels[:10] + 1) % 12
    measured = measure(graph(), embed, IMAGES, Brightest(), labels)
    assert measured["agreement"] == 1.0
    assert measured["accuracy"] == {"reference": 0.75, "exported": 0.75}


def test_float16_is_held_to_the_limits_of_float16():
    def rounded(images: np.ndarray) -> np.ndarray:
        return embed(images) + np.float32(0.003)

    assert 0.005 < measure(graph(half=True), rounded, IMAGES)["max_difference"] < 0.05
    assert problems(graph(half=True), rounded, IMAGES) == []
    assert "the limit is 0.0005" in problems(graph(), rounded, IMAGES)[0]
    assert "the limit is 0.05" in problems(graph(half=True), lambda images: embed(images[..., ::-1]), IMAGES)[0]


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        (lambda images: embed(images[..., ::-1]), r"differs by [0-9.]+ standard deviations, but the limit is 0.0005"),
        (lambda images: embed(images) + np.float32(0.001), r"differs by 0.00[0-9]+ standard deviations"),
        (lambda images: embed(images) * np.float32("nan"), "40 of 40 images give NaN or infinity"),
    ],
    ids=["colours swapped", "shifted", "NaN"],
)
def test_a_graph_that_computes_something_else_is_refused(reference, sentence):
    assert re.search(sentence, problems(graph(), reference, IMAGES)[0])


def test_a_batch_that_is_mixed_up_is_refused():
    model = onnx.load_from_string(graph())
    model.graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "axes"))
    model.graph.node[-1].output[0] = "flat"
    model.graph.node.append(helper.make_node("ReduceMean", ["flat", "axes"], ["mean"]))
    model.graph.node.append(helper.make_node("Sub", ["flat", "mean"], ["embeddings"]))
    mixed = model.SerializeToString()

    def reference(images: np.ndarray) -> np.ndarray:
        parts = [embed(images[start : start + 32]) for start in range(0, len(images), 32)]
        return np.concatenate([part - part.mean(0) for part in parts])

    assert problems(mixed, reference, IMAGES)  # right in batches of 32, wrong one by one


def test_decisions_that_differ_are_refused_even_if_the_embeddings_hardly_do():
    class Fickle:
        def __init__(self) -> None:
            self.calls = 0

        def predict(self, embeddings: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return torch.arange(len(embeddings)) * self.calls

    assert problems(graph(), embed, IMAGES, Fickle()) == ["2.50% of the decisions agree, but the limit is 0.99"]


class Wrong:
    """A learner that is right about the reference and errs on the first `errors` images of the graph."""

    def __init__(self, errors: int) -> None:
        self.errors, self.asked = errors, False

    def predict(self, embeddings: torch.Tensor) -> torch.Tensor:
        rows = torch.zeros(len(embeddings), dtype=torch.int64)
        rows[: self.errors if self.asked else 0] = 1
        self.asked = True
        return rows


def test_a_single_near_tie_may_fall_either_way_but_not_two():
    labels = np.zeros(40, np.int64)
    passed = measure(graph(), embed, IMAGES, Wrong(1), labels)
    assert failures(passed, "fp32") == []
    assert (passed["agreement"], passed["accuracy"]) == (0.975, {"reference": 1.0, "exported": 0.975})
    report = measure(graph(), embed, IMAGES, Wrong(2), labels)
    assert failures(report, "fp32") == [
        "95.00% of the decisions agree, but the limit is 0.99",
        "accuracy drops from 1.0000 to 0.9500, but the limit is 0.01",
    ]
    assert failures(report, "int8") == ["accuracy drops from 1.0000 to 0.9500, but the limit is 0.01"]


def test_accuracy_that_rises_is_no_failure():
    labels = np.ones(40, np.int64)
    report = measure(graph(), embed, IMAGES, Wrong(2), labels)
    assert report["accuracy"] == {"reference": 0.0, "exported": 0.05}
    assert failures(report, "int8") == []


def test_drift_of_each_dimension_is_measured():
    def drifted(images: np.ndarray) -> np.ndarray:
        found = embed(images)
        found[:, 3] = 1.25 * (found[:, 3] - found[:, 3].mean()) + found[:, 3].mean()
        found[:, 5] += 0.2 * found.std()
        found[:, 7] = 0.5  # dead: has no spread to compare
        return found

    one = measure(graph(), drifted, IMAGES)["drift"]
    assert one["spread"] == pytest.approx(1.25, abs=0.01)
    assert one["mean_shift"] == pytest.approx(0.2, abs=0.05)


def test_measuring_does_not_refuse_and_a_report_is_json():
    report = measure(graph(), lambda images: embed(images) * np.float32("inf"), IMAGES, Brightest())
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["nonfinite"] == 40
    assert len(failures(report, "int8")) >= 3


def test_limits_widen_down_the_ladder():
    for field in dataclasses.fields(precision.Limits):
        values = [getattr(each.limits, field.name) for each in precision.PRECISIONS]
        assert values == sorted(values, reverse=field.name.startswith("min_"))
    assert precision.names() == ["fp32", "fp16", "int8"]
    assert precision.FP32.limits.min_cosine == 0.9999
