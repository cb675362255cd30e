"""Export a learner to one ONNX file that maps embeddings to scores, for hosts that only predict.

The graph is built from the learner's tensors, operator by operator, without tracing. It contains only what prediction
needs: no statistics, counters, exemplars, importances or teacher.

Each learner adds its own operators (`Learner.write_head`) to the graph that is built here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ssd_edge.backbones import onnx_file
from ssd_edge.backbones.onnx import EMBEDDINGS
from ssd_edge.errors import InputError, require
from ssd_edge.learners import Learner
from ssd_edge.learners.closed_form.linear import NEVER

if TYPE_CHECKING:
    from onnx import ModelProto

SCHEMA = "ssd-edge-head/1"  # in the metadata of the model
SCORES = "scores"
MAX_TOP_K = 3840  # largest K that TensorRT's operator supports
_SHORTEST = 1e-12  # shorter vectors are not normalised, as in `prepare` and in PyTorch


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
    graph = _Graph(learner.display, len(names))
    with torch.no_grad():
        scores = learner.write_head(graph, EMBEDDINGS)
    if scores is None:
        raise InputError(f"the scores of '{learner.name}' cannot be written as an ONNX graph; leave the head out")
    if bool((learner.seen == 0).any()):
        taught = graph.constant("taught", (learner.seen == 1)[None].numpy())
        scores = graph.add("Where", taught, scores, graph.constant("never", np.float32(NEVER)))
    graph.add("Identity", scores, output=SCORES)
    model = graph.model(learner.dim)
    properties = {"schema": SCHEMA, "learner": learner.name, "dim": str(learner.dim), "classes": json.dumps(names)}
    onnx.helper.set_model_props(model, properties)
    onnx.checker.check_model(model, full_check=True)
    exported: bytes = model.SerializeToString(deterministic=True)
    return exported


class _Graph:
    """Builder of a graph: operators and constants in the order in which they are added.

    Args:
        what: Name of the learner in messages.
        classes: C. Values and biases of further rows, which were announced but not learned, are cut off.
    """

    def __init__(self, what: str, classes: int) -> None:
        self._what, self.classes, self._bytes = what, classes, 0
        self._nodes: list[Any] = []
        self._constants: list[Any] = []

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        """Add a constant and return its name, which must be unique."""
        from onnx import numpy_helper

        array = np.asarray(value)
        self._bytes += array.nbytes
        if self._bytes > onnx_file.MAX_BYTES:
            raise InputError(
                f"the head of {self._what} exceeds {onnx_file.MAX_BYTES:,} bytes (2 GiB), more than one ONNX file "
                "can hold; leave it out, or train a smaller learner"
            )
        self._constants.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, tensor: Tensor) -> str:
        """Add a float32 constant, which must be finite."""
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"the {name} of {self._what} contain NaN or infinity, so its scores are meaningless; train it again"
            )
        return self.constant(name, tensor.detach().cpu().float().contiguous().numpy())

    def add(self, operator: str, *inputs: str, output: str = "", outputs: int = 1, **attributes: Any) -> str:
        """Add an operator and return the name of its first output; that of the second ends in ``/1``."""
        from onnx import helper

        label = f"{len(self._nodes)}/{operator}"
        names = [output or label, *(f"{label}/{index}" for index in range(1, outputs))]
        self._nodes.append(helper.make_node(operator, inputs, names, name=label, **attributes))
        return names[0]

    def scalar(self, value: float) -> str:
        """Add a float32 scalar."""
        return self.constant(f"scalar_{len(self._constants)}", np.float32(value))

    def indices(self, *values: int) -> str:
        """Add a constant int64 vector."""
        return self.constant(f"indices_{len(self._constants)}", np.array(values, np.int64))

    def reduce(self, operator: str, x: str) -> str:
        """Reduce over the last axis and keep it with size 1."""
        return self.add(operator, x, self.indices(-1), keepdims=1)

    def divide(self, x: str, by: str, least: float) -> str:
        """Divide x by ``max(by, least)``."""
        return self.add("Div", x, self.add("Max", by, self.scalar(least)))

    def unit(self, x: str) -> str:
        """Normalise rows to unit length; a zero row stays zero."""
        return self.divide(x, self.reduce("ReduceL2", x), _SHORTEST)

    def matmul(self, x: str, name: str, matrix: Tensor) -> str:
        """Multiply ``(N, n)`` by a constant ``(n, m)``."""
        return self.add("MatMul", x, self.weight(name, matrix))

    def affine(self, x: str, name: str, weight: Tensor, bias: Tensor) -> str:
        """Compute x Wᵀ + b with constant W ``(m, n)`` and b ``(m,)``."""
        return self.add("Gemm", x, self.weight(f"{name}_weight", weight.T), self.weight(f"{name}_bias", bias))

    def top(self, x: str, count: int, of: int, setting: str) -> str:
        """Return the `count` largest of the `of` values in each row, sorted; their indices are in ``…/1``."""
        if count > MAX_TOP_K:
            raise InputError(
                f"{self._what} needs the {count:,} largest of {of:,} values, but TensorRT's TopK supports at most "
                f"{MAX_TOP_K:,}; lower {setting} and train again, or leave the head out"
            )
        return self.add("TopK", x, self.indices(count), outputs=2, axis=1, largest=1, sorted=1)

    def column(self, x: str, index: int) -> str:
        """Return one column of ``(N, n)`` as ``(N, 1)``."""
        return self.add("Gather", x, self.indices(index), axis=1)

    def model(self, dim: int) -> ModelProto:
        """Return the finished model for embeddings of size `dim`."""
        from onnx import TensorProto, helper

        graph = helper.make_graph(
            self._nodes,
            "head",
            [helper.make_tensor_value_info(EMBEDDINGS, TensorProto.FLOAT, ["batch", dim])],
            [helper.make_tensor_value_info(SCORES, TensorProto.FLOAT, ["batch", self.classes])],
            self._constants,
        )
        opsets = [helper.make_opsetid("", onnx_file.OPSET)]
        # the oldest version that supports the opset, for older runtimes
        return helper.make_model(graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))
