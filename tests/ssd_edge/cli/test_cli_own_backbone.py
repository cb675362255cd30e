"""A custom ONNX backbone end to end: train, deploy, install, learn, predict."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ssd_edge import files

onnx = pytest.importorskip("onnx")


def own_backbone(path: Path) -> None:
    """Write an edge-feature backbone, (N, 3, 40, 40) → (N, 8·25): conv 3→8, ReLU, 5×5 average pool, conv 8→8.

    Its first map is a level of 8 features.
    """
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(0).normal(size=(8, 3, 5, 5)).astype(np.float32)
    weights -= weights.mean(axis=(2, 3), keepdims=True)
    nodes = [
        helper.make_node("Conv", ["image", "weights"], ["edges"], pads=[2, 2, 2, 2]),
        helper.make_node("Relu", ["edges"], ["positive"]),
        helper.make_node("AveragePool", ["positive"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Conv", ["pooled", "same"], ["kept"]),
        helper.make_node("Flatten", ["kept"], ["features"]),
    ]
    graph = helper.make_graph(
        nodes,
        "own",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 40, 40])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 200])],
        [
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(np.eye(8, dtype=np.float32)[:, :, None, None], "same"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    path.write_bytes(model.SerializeToString())


def test_custom_backbone_end_to_end(shapes: Path, cli, tmp_path: Path) -> None:
    own_backbone(tmp_path / "own.onnx")
    backbone = ["backbone=onnx:own.onnx"]  # relative path: the run must be deployable from another folder
    quick = ["run.panel=false", "run.baselines=false", "data.exclude=triangle"]
    printed = cli("train", f"data.path={shapes}", *backbone, *quick, cwd=tmp_path).stdout
    run = tmp_path / "runs" / "1"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["average_accuracy"] > 0.5
    assert "own.onnx, levels 8@40 200, " in printed
    assert json.loads((run / "backbone.json").read_text())["provenance"]["levels"] == "8@40 200"
    moments, _ = files.read_tensors(run / "standardisation.safetensors")
    assert moments["sigma"].shape == (208,)
    (tmp_path / "own.onnx").unlink()  # the run has its own copy
    printed = json.loads(cli("deploy", "--target", "cpu", run, "-o", tmp_path / "own.ssdedge", "--json").stdout)
    assert len(printed["classes"]) == 4
    cli("device", "install", tmp_path / "own.ssdedge", "--root", tmp_path / "root")
    learned = ["device", "learn", "--label", "triangle", shapes / "train" / "triangle", "--root", tmp_path / "root"]
    assert "triangle: 40 images, new" in cli(*learned).stdout
    answer = cli("device", "predict", shapes / "test", "--root", tmp_path / "root", "--json").stdout
    predictions = json.loads(answer)["predictions"]
    right = [Path(p["image"]).parent.name == p["label"] for p in predictions]
    assert sum(right) / len(right) > 0.5
    assert "all 60 images" in cli("evaluate", run).stdout
