"""A learner as one ONNX file, embeddings in, scores out: for hosts that only predict.

The graph is written down from the learner's tensors, operator by operator: nothing is traced. It holds what predicting
needs and nothing that only learning needs: no statistics, counters, exemplars, importances or teacher.

The Top-K of SDMLP subtracts the (k+1)-th largest value, and only that value is asked for: a tie with it becomes 0 in
the graph as it does in `topk.inhibit`. Only the inhibition `mask` needs the winners' places.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ssd_edge.backbones import onnx_file
from ssd_edge.backbones.onnx import EMBEDDINGS
from ssd_edge.errors import InputError, require
from ssd_edge.learners import Learner
from ssd_edge.learners.closed_form.fecam import FeCAM
from ssd_edge.learners.closed_form.flymodel import FlyModel
from ssd_edge.learners.closed_form.landmark import Landmark
from ssd_edge.learners.closed_form.linear import NEVER, LinearLearner
from ssd_edge.learners.closed_form.ncm import NCM
from ssd_edge.learners.closed_form.ridge import RandomProjectionRidge
from ssd_edge.learners.gradient.finetune import FineTune, name_of
from ssd_edge.learners.gradient.icarl import ICaRL
from ssd_edge.learners.gradient.sdmlp import SDMLPLearner

if TYPE_CHECKING:
    from onnx import ModelProto

SCHEMA = "ssd-edge-head/1"  # of the model's metadata
SCORES = "scores"
MAX_TOP_K = 3840  # TensorRT's operator takes no larger K
_TINY = float(np.finfo(np.float32).tiny)
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
    write = _WRITERS.get(learner.name)
    if write is None:
        raise InputError(
            f"no graph is known for the scores of '{learner.name}', only for {', '.join(_WRITERS)}; leave the head out"
        )
    graph = _Graph(learner.display, len(names))
    with torch.no_grad():
        scores = write(graph, learner, EMBEDDINGS)
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


def _inhibit(
    graph: _Graph, scores: str, k: int, neurons: int, gamma: Tensor | None, label: str, setting: str = "learner.k"
) -> str:
    """ReLU(u − γ I): u = ReLU(scores), I its (k+1)-th largest; without γ every switch is closed."""
    u, rank = graph.add("Relu", scores), min(k + 1, neurons)
    inhibition = graph.column(graph.top(u, rank, neurons, setting), rank - 1)
    if gamma is not None:
        inhibition = graph.add("Mul", graph.weight(f"gamma{label}", gamma), inhibition)
    return graph.add("Relu", graph.add("Sub", u, inhibition))


def _mask(graph: _Graph, scores: str, k: int, neurons: int, setting: str) -> str:
    """The k largest positive scores, zeros elsewhere; which of equal ones pass is the runtime's choice."""
    count = min(k, neurons)
    top = graph.top(scores, count, neurons, setting)
    zeros = graph.add("ConstantOfShape", graph.add("Shape", scores))
    return graph.add("ScatterElements", zeros, f"{top}/1", graph.add("Relu", top), axis=1)


def _linear(graph: _Graph, learner: LinearLearner, x: str) -> str:
    values, bias = learner.values[:, : graph.classes], learner.bias[: graph.classes]
    return graph.affine(x, "output", values.T, bias)


def _landmark(graph: _Graph, learner: Landmark, x: str) -> str:
    response = graph.add("Exp", graph.matmul(graph.unit(x), "keys", learner.gain * learner.keys.T))
    if learner.shipped:
        centred = graph.add("Sub", response, graph.weight("mean", learner.mean))
        response = graph.matmul(centred, "projection", learner.projection)
    return _linear(graph, learner, response)


def _ranpac(graph: _Graph, learner: RandomProjectionRidge, x: str) -> str:
    return _linear(graph, learner, graph.add("Relu", graph.matmul(x, "projection", learner.projection)))


def _sdmlp(graph: _Graph, learner: SDMLPLearner, x: str) -> str:
    net, settings = learner.net, learner.settings
    if settings.shift:
        x = graph.add("Sub", x, graph.scalar(settings.shift))
    below = graph.unit(graph.add("Relu", x))
    for number, (layer, gamma) in enumerate(zip(net.layers, net.gammas, strict=True)):
        neurons, label = len(layer.keys), f"_{number}" if number else ""
        if number:
            below = graph.unit(below)
        scores = graph.matmul(below, f"keys{label}", layer.keys.T)
        if net.inhibition == "mask":
            below = _mask(graph, scores, net.k, neurons, "learner.k")
        else:
            below = _inhibit(graph, scores, net.k, neurons, gamma, label, "learner.k")
    return graph.matmul(below, "values", net.values[:, : graph.classes])


def _hidden(graph: _Graph, learner: FineTune, x: str) -> str:
    """The last hidden layer of a ReLU MLP."""
    for layer in range(learner.settings.layers):
        weight, bias = (learner.parameters[name_of(what, layer)] for what in ("weight", "bias"))
        x = graph.add("Relu", graph.affine(x, f"hidden_{layer}", weight, bias))
    return x


def _finetune(graph: _Graph, learner: FineTune, x: str) -> str:
    weight, bias = learner.output_weight[: graph.classes], learner.output_bias[: graph.classes]
    return graph.affine(_hidden(graph, learner, x), "output", weight, bias)


def _icarl(graph: _Graph, learner: ICaRL, x: str) -> str:
    means = learner.means.new_zeros(graph.classes, learner.means.shape[1])
    means[learner.mean_rows] = learner.means  # all taught classes have one
    return graph.matmul(graph.unit(_hidden(graph, learner, x)), "means", means.T)


def _ncm(graph: _Graph, learner: NCM, x: str) -> str:
    means = torch.nn.functional.normalize((learner.sums / learner.counts.clamp_min(1)[:, None]).float())
    return graph.matmul(graph.unit(x), "means", means.T)


def _fecam(graph: _Graph, learner: FeCAM, x: str) -> str:
    """Squared distances of all classes at once: (x − m_c) L_c⁻ᵀ is one product of ``(C, N, D)`` and ``(C, D, D)``."""
    if learner.settings.tukey != 1.0:
        power = graph.add("Pow", graph.add("Abs", x), graph.scalar(learner.settings.tukey))
        x = graph.add("Mul", graph.add("Sign", x), power)
    means = torch.zeros(graph.classes, 1, learner.dim)
    factors = torch.zeros(graph.classes, learner.dim, learner.dim)
    for row in learner.statistics.counts.nonzero().flatten().tolist():
        means[row, 0], factors[row] = learner.solve(row)
    away = graph.add("Sub", graph.unit(x), graph.weight("means", means))
    squares = graph.add("ReduceSumSquare", graph.matmul(away, "factors", factors), graph.indices(-1), keepdims=0)
    return graph.add("Neg", graph.add("Transpose", squares, perm=[1, 0]))


def _flymodel(graph: _Graph, learner: FlyModel, x: str) -> str:
    least = graph.reduce("ReduceMin", x)
    span = graph.add("Sub", graph.reduce("ReduceMax", x), least)
    scaled = graph.divide(graph.add("Sub", x, least), span, _TINY)
    sums = graph.add("Relu", graph.matmul(scaled, "projection", learner.projection))
    strongest = graph.top(sums, learner.kept, learner.settings.neurons, "learner.active")
    weaker = graph.add("Less", sums, graph.column(strongest, learner.kept - 1))  # ties with the last stay
    kept = graph.add("Where", weaker, graph.scalar(0.0), sums)
    code = graph.divide(kept, graph.column(strongest, 0), _TINY)
    return graph.matmul(code, "weights", learner.weights[: graph.classes].T)


_WRITERS: dict[str, Callable[[_Graph, Any, str], str]] = {
    "landmark": _landmark,
    "ssd": _sdmlp,
    "sdmlp": _sdmlp,
    "finetune": _finetune,
    "lwf": _finetune,
    "icarl": _icarl,
    "ncm": _ncm,
    "slda": _linear,
    "ridge": _linear,
    "ranpac": _ranpac,
    "fecam": _fecam,
    "flymodel": _flymodel,
}
