"""Tests of the parity gate: measured values, limits and refusals."""

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
    """Return a graph with one feature per pixel value: uint8 (N, 2, 2, 3) → (N, 12), divided by 255."""
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
    pixels = helper.make_graph(
        nodes,
        "pixels",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, [batch, 2, 2, 3])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, [batch, 12])],
        weights,
    )
    return helper.make_model(pixels, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString()


def embed(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), 12).astype(np.float32) / np.float32(255)


def problems(onnx_bytes: bytes, *args) -> list[str]:
    """Return the limits that a graph exceeds, for its own precision."""
    return failures(measure(onnx_bytes, *args), onnx_file.precision(onnx_bytes))


class Brightest:
    """Learner stub that predicts the index of the largest feature."""

    def predict(self, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings.argmax(1)


def test_identical_graph_has_no_difference():
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


def test_graph_with_batch_size_1():
    assert measure(graph(batch=1), embed, IMAGES)["max_difference"] == 0.0


def test_agreement_and_accuracy_with_learner_and_labels():
    labels = embed(IMAGES).argmax(1)
    labels[:10] = (labels[:10] + 1) % 12
    measured = measure(graph(), embed, IMAGES, Brightest(), labels)
    assert measured["agreement"] == 1.0
    assert measured["accuracy"] == {"reference": 0.75, "exported": 0.75}


def test_fp16_has_wider_limits():
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
    ids=["swapped channels", "shifted", "NaN"],
)
def test_different_embeddings_are_refused(reference, sentence):
    assert re.search(sentence, problems(graph(), reference, IMAGES)[0])


def test_dependence_on_the_batch_is_refused():
    model = onnx.load_from_string(graph())
    model.graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "axes"))
    model.graph.node[-1].output[0] = "flat"
    model.graph.node.append(helper.make_node("ReduceMean", ["flat", "axes"], ["mean"]))
    model.graph.node.append(helper.make_node("Sub", ["flat", "mean"], ["embeddings"]))
    mixed = model.SerializeToString()

    def reference(images: np.ndarray) -> np.ndarray:
        parts = [embed(images[start : start + 32]) for start in range(0, len(images), 32)]
        return np.concatenate([part - part.mean(0) for part in parts])

    assert problems(mixed, reference, IMAGES)  # equal in batches of 32, different one by one


def test_different_predictions_are_refused_despite_equal_embeddings():
    class Unstable:
        def __init__(self) -> None:
            self.calls = 0

        def predict(self, embeddings: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return torch.arange(len(embeddings)) * self.calls

    assert problems(graph(), embed, IMAGES, Unstable()) == ["2.50% of the decisions agree, but the limit is 0.99"]


class Wrong:
    """Learner stub that predicts row 0 for the reference and row 1 for the first `errors` images of the graph."""

    def __init__(self, errors: int) -> None:
        self.errors, self.called = errors, False

    def predict(self, embeddings: torch.Tensor) -> torch.Tensor:
        rows = torch.zeros(len(embeddings), dtype=torch.int64)
        rows[: self.errors if self.called else 0] = 1
        self.called = True
        return rows


def test_one_different_prediction_passes_but_two_do_not():
    labels = np.zeros(40, np.int64)
    passing = measure(graph(), embed, IMAGES, Wrong(1), labels)
    assert failures(passing, "fp32") == []
    assert (passing["agreement"], passing["accuracy"]) == (0.975, {"reference": 1.0, "exported": 0.975})
    report = measure(graph(), embed, IMAGES, Wrong(2), labels)
    assert failures(report, "fp32") == [
        "95.00% of the decisions agree, but the limit is 0.99",
        "accuracy drops from 1.0000 to 0.9500, but the limit is 0.01",
    ]
    assert failures(report, "int8") == ["accuracy drops from 1.0000 to 0.9500, but the limit is 0.01"]


def test_higher_accuracy_is_no_failure():
    labels = np.ones(40, np.int64)
    report = measure(graph(), embed, IMAGES, Wrong(2), labels)
    assert report["accuracy"] == {"reference": 0.0, "exported": 0.05}
    assert failures(report, "int8") == []


def test_drift_is_measured_per_dimension():
    def drifted(images: np.ndarray) -> np.ndarray:
        features = embed(images)
        features[:, 3] = 1.25 * (features[:, 3] - features[:, 3].mean()) + features[:, 3].mean()
        features[:, 5] += 0.2 * features.std()
        features[:, 7] = 0.5  # constant, so its spread is not compared
        return features

    drift = measure(graph(), drifted, IMAGES)["drift"]
    assert drift["spread"] == pytest.approx(1.25, abs=0.01)
    assert drift["mean_shift"] == pytest.approx(0.2, abs=0.05)


def test_report_of_infinite_values_is_valid_json():
    report = measure(graph(), lambda images: embed(images) * np.float32("inf"), IMAGES, Brightest())
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["nonfinite"] == 40
    assert len(failures(report, "int8")) >= 3


def test_limits_widen_with_lower_precision():
    for field in dataclasses.fields(precision.Limits):
        values = [getattr(each.limits, field.name) for each in precision.PRECISIONS]
        assert values == sorted(values, reverse=field.name.startswith("min_"))
    assert precision.names() == ["fp32", "fp16", "int8"]
    assert precision.FP32.limits.min_cosine == 0.9999
