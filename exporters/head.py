"""A learner as one ONNX file, embeddings in, scores out: for hosts that only predict.

The graph is written down from the learner's tensors, operator by operator: nothing is traced. It holds what predicting
needs and nothing that only learning needs: no statistics, counters, exemplars, importances or teacher.

Each learner writes its own operators (`Learner.write_head`) into the graph that is built here.
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

SCHEMA = "ssd-edge-head/1"  # of the model's metadata
SCORES = "scores"
MAX_TOP_K = 3840  # TensorRT's operator takes no larger K
_SHORTEST = 1e-12  # a shorter vector is not brought to unit length, here and in `sdmlp.prepare` and PyTorch


def export_head(learner: Learner, class_names: Sequence[str]) -> bytes:
    """What the learner predicts with as ONNX; the same bytes each time for the same state.

    A row that has not been taught, or has been taken out again, scores −1e30: the largest score is always what
    `Learner.predict` answers.

    Args:
        learner: any of `learners.LEARNERS`; it stays as it is.
        class_names: of its rows, in order.

    Returns:
        A model in fp32 and opset 18, of ONNX's own operators, with the input `embeddings`, float32 ``(batch, D)``
        (standardised, as the backbone of the same bundle gives them; at least one row), and the output `scores`,
        float32 ``(batch, C)``. Its metadata: ``schema``, ``learner``, ``dim``, and ``classes``, the names by row as a
        JSON list.

    Raises:
        InputError: nothing has been taught, another number of names than of rows, a Top-K that TensorRT does not take,
            NaN or infinity in the learner, over 2 GiB, or a learner whose scores are no function of the embedding.
        EnvironmentUnfitError: onnx is not installed.
    """
    onnx = require("onnx", "export", "export a head")
    names = list(class_names)
    if len(names) != len(learner.seen):
        raise InputError(
            f"the learner has {len(learner.seen)} class rows, but {len(names)} names were given; give one a row"
        )
    if not bool(learner.seen.any()):
        raise InputError("nothing has been taught yet, so there is nothing to export; learn a class first")
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
    return model.SerializeToString(deterministic=True)


class _Graph:
    """Operators and constants in the order in which they are added.

    Args:
        what: the learner's name for messages.
        classes: C; values and biases of further rows, announced but not taught, are cut off.
    """

    def __init__(self, what: str, classes: int) -> None:
        self._what, self.classes, self._bytes = what, classes, 0
        self._nodes: list[Any] = []
        self._constants: list[Any] = []

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        """A constant of its own type, under a name that occurs once."""
        from onnx import numpy_helper

        array = np.asarray(value)
        self._bytes += array.nbytes
        if self._bytes > onnx_file.MAX_BYTES:
            raise InputError(
                f"the head of {self._what} takes over {onnx_file.MAX_BYTES:,} bytes (2 GiB), more than one ONNX file "
                "can hold; leave it out, or train a smaller learner"
            )
        self._constants.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, tensor: Tensor) -> str:
        """A float32 constant of finite numbers."""
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"the {name} of {self._what} hold NaN or infinity, so its scores mean nothing; train it again"
            )
        return self.constant(name, tensor.detach().cpu().float().contiguous().numpy())

    def add(self, operator: str, *inputs: str, output: str = "", outputs: int = 1, **attributes: Any) -> str:
        """An operator; returns the name of its first output, the second one's ends in ``/1``."""
        from onnx import helper

        label = f"{len(self._nodes)}/{operator}"
        names = [output or label, *(f"{label}/{index}" for index in range(1, outputs))]
        self._nodes.append(helper.make_node(operator, inputs, names, name=label, **attributes))
        return names[0]

    def scalar(self, value: float) -> str:
        """A float32 constant without dimensions."""
        return self.constant(f"scalar_{len(self._constants)}", np.float32(value))

    def indices(self, *values: int) -> str:
        """A constant int64 ``(n,)``."""
        return self.constant(f"indices_{len(self._constants)}", np.array(values, np.int64))

    def reduce(self, operator: str, x: str) -> str:
        """Over the last axis, which stays with size 1."""
        return self.add(operator, x, self.indices(-1), keepdims=1)

    def divide(self, x: str, by: str, least: float) -> str:
        """x over something that is taken for no less than `least`."""
        return self.add("Div", x, self.add("Max", by, self.scalar(least)))

    def unit(self, x: str) -> str:
        """Rows of unit length; a zero row stays zero."""
        return self.divide(x, self.reduce("ReduceL2", x), _SHORTEST)

    def matmul(self, x: str, name: str, matrix: Tensor) -> str:
        """``(N, n)`` times a constant ``(n, m)``."""
        return self.add("MatMul", x, self.weight(name, matrix))

    def affine(self, x: str, name: str, weight: Tensor, bias: Tensor) -> str:
        """x Wᵀ + b of a constant W ``(m, n)`` and b ``(m,)``."""
        return self.add("Gemm", x, self.weight(f"{name}_weight", weight.T), self.weight(f"{name}_bias", bias))

    def top(self, x: str, count: int, of: int, setting: str) -> str:
        """The `count` largest of the `of` values of a row, falling: ``(N, count)``; their places in ``…/1``."""
        if count > MAX_TOP_K:
            raise InputError(
                f"{self._what} asks for the {count:,} largest of {of:,} values, but TensorRT's TopK gives at most "
                f"{MAX_TOP_K:,}; lower {setting} and train again, or leave the head out"
            )
        return self.add("TopK", x, self.indices(count), outputs=2, axis=1, largest=1, sorted=1)

    def column(self, x: str, index: int) -> str:
        """One column of ``(N, n)``, as ``(N, 1)``."""
        return self.add("Gather", x, self.indices(index), axis=1)

    def model(self, dim: int) -> ModelProto:
        """The whole, for embeddings of `dim` values."""
        from onnx import TensorProto, helper

        graph = helper.make_graph(
            self._nodes,
            "head",
            [helper.make_tensor_value_info(EMBEDDINGS, TensorProto.FLOAT, ["batch", dim])],
            [helper.make_tensor_value_info(SCORES, TensorProto.FLOAT, ["batch", self.classes])],
            self._constants,
        )
        opsets = [helper.make_opsetid("", onnx_file.OPSET)]
        # the oldest version that has the opset, for the sake of older runtimes
        return helper.make_model(graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))
