"""Export a learner to one ONNX file that maps embeddings to scores, for hosts that only predict.

The graph is built from the learner's tensors, operator by operator, without tracing (`Learner.write_head`). It contains
only what prediction needs: no statistics, counters, exemplars, importances or teacher.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ssd_edge.answers.graph import EMBEDDINGS, HeadGraph
from ssd_edge.backbones import onnx_file
from ssd_edge.errors import InputError, require
from ssd_edge.learners import Learner
from ssd_edge.learners.closed_form.linear import NEVER

if TYPE_CHECKING:
    from onnx import ModelProto

SCHEMA = "ssd-edge-head/1"  # in the metadata of the model
SCORES = "scores"
MAX_TOP_K = 3840  # largest K that TensorRT's operator supports


def export_head(learner: Learner, class_names: Sequence[str]) -> bytes:
    """Export the prediction of a learner to ONNX; the same state gives the same bytes.

    Rows that were never learned, or were removed, score −1e30, so that the largest score is always the answer of
    `Learner.predict`.

    Args:
        learner: Any of `learners.LEARNERS`; it is not changed.
        class_names: Class names by row.

    Returns:
        A model in fp32 and opset 18, with only standard ONNX operators, with the input `embeddings`, float32
        ``(batch, D)`` (standardised, as the backbone of the same bundle gives them), and the output `scores`, float32
        ``(batch, C)``. Its metadata has ``schema``, ``learner``, ``dim``, and ``classes``, a JSON list of the names.

    Raises:
        InputError: Nothing has been learned, the number of names is wrong, K is larger than TensorRT supports, the
            learner contains NaN or infinity, the model exceeds 2 GiB, or the scores of the learner cannot be exported.
        EnvironmentUnfitError: onnx is not installed.
    """
    onnx = require("onnx", "export", "export a head")
    names = list(class_names)
    if len(names) != len(learner.seen):
        raise InputError(
            f"the learner has {len(learner.seen)} class rows, but {len(names)} names were given; give one per row"
        )
    if not bool(learner.seen.any()):
        raise InputError("no class has been learned yet, so there is nothing to export; learn a class first")
    graph = HeadGraph(learner.display, len(names), onnx_file.MAX_BYTES, MAX_TOP_K)
    with torch.no_grad():
        scores = learner.write_head(graph, EMBEDDINGS)
    if scores is None:
        raise InputError(f"the scores of '{learner.name}' cannot be written as an ONNX graph; leave the head out")
    if bool((learner.seen == 0).any()):
        taught = graph.constant("taught", (learner.seen == 1)[None].numpy())
        scores = graph.add("Where", taught, scores, graph.constant("never", np.float32(NEVER)))
    graph.add("Identity", scores, output=SCORES)
    model = _model(graph, learner.dim)
    properties = {"schema": SCHEMA, "learner": learner.name, "dim": str(learner.dim), "classes": json.dumps(names)}
    onnx.helper.set_model_props(model, properties)
    onnx.checker.check_model(model, full_check=True)
    exported: bytes = model.SerializeToString(deterministic=True)
    return exported


def _model(graph: HeadGraph, dim: int) -> ModelProto:
    """Return a graph as a model for embeddings of size `dim`."""
    from onnx import TensorProto, helper, numpy_helper

    described = helper.make_graph(
        [
            helper.make_node(one.kind, one.inputs, one.outputs, one.outputs[0], **one.attributes)
            for one in graph.operators
        ],
        "head",
        [helper.make_tensor_value_info(EMBEDDINGS, TensorProto.FLOAT, ["batch", dim])],
        [helper.make_tensor_value_info(SCORES, TensorProto.FLOAT, ["batch", graph.classes])],
        [numpy_helper.from_array(value, name) for name, value in graph.constants.items()],
    )
    opsets = [helper.make_opsetid("", onnx_file.OPSET)]
    # the oldest version that supports the opset, for older runtimes
    return helper.make_model(described, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))
