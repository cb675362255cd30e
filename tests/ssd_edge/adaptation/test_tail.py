"""Every operator of a tail against ONNX Runtime, and descriptions that are damaged."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch

from ssd_edge import files
from ssd_edge.adaptation import tail as tails
from ssd_edge.adaptation.cut import tail_onnx
from ssd_edge.adaptation.operators import OPERATORS, Node
from ssd_edge.adaptation.tail import SCHEMA, VECTORS, Description, Tail, TailState
from ssd_edge.backbones.onnx import open_session
from ssd_edge.errors import BundleRefusedError

pytestmark = pytest.mark.usefixtures("one_thread")

MAP, TOKENS = (4, 6, 6), (5, 4)


def f(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).uniform(0.5, 1.5, shape).astype(np.float32)


def i(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


# operator, shape of its first input, its further inputs, attributes
CASES: list[tuple[str, tuple[int, ...], list[np.ndarray | None], dict[str, Any]]] = [
    ("Add", MAP, [f(4, 1, 1)], {}),
    ("AveragePool", MAP, [], {"kernel_shape": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1)}),
    ("AveragePool", MAP, [], {"kernel_shape": (3, 3), "pads": (0, 0, 1, 1), "count_include_pad": 1}),
    ("AveragePool", MAP, [], {"kernel_shape": (5, 5), "strides": (5, 5), "ceil_mode": 1}),
    ("BatchNormalization", MAP, [f(4), f(4), f(4), f(4)], {"epsilon": 1e-2}),
    ("Cast", MAP, [], {"to": 1}),
    ("Clip", MAP, [np.array(-0.5, np.float32), np.array(0.5, np.float32)], {}),
    ("Clip", MAP, [None, np.array(0.5, np.float32)], {}),
    ("Concat", TOKENS, [f(2, 5, 3)], {"axis": -1}),
    ("Conv", MAP, [f(6, 2, 3, 3)], {"group": 2, "pads": (0, 1, 2, 1), "strides": (2, 1)}),
    ("Conv", MAP, [f(4, 1, 3, 3), f(4)], {"group": 4, "pads": (1, 1, 1, 1), "dilations": (1, 1)}),
    ("Conv", MAP, [f(2, 4, 2, 3)], {"auto_pad": "SAME_UPPER", "strides": (2, 2)}),
    ("Conv", MAP, [f(2, 4, 2, 3)], {"auto_pad": "SAME_LOWER"}),
    ("Conv", MAP, [f(2, 4, 2, 3)], {"auto_pad": "VALID", "dilations": (2, 2)}),
    ("Conv", (4, 9), [f(2, 4, 3)], {"pads": (1, 0)}),
    ("Div", MAP, [f(1)], {}),
    ("Dropout", MAP, [], {}),
    ("Erf", MAP, [], {}),
    ("Exp", MAP, [], {}),
    ("Flatten", MAP, [], {}),
    ("Gather", TOKENS, [np.array(-1)], {"axis": 1}),
    ("Gather", TOKENS, [i(0, -2, 0)], {"axis": -1}),
    ("Gelu", MAP, [], {}),
    ("Gelu", MAP, [], {"approximate": "tanh"}),
    ("Gemm", (4,), [f(4, 3), f(3)], {}),
    ("Gemm", (4,), [f(3, 4), f(1, 3)], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("GlobalAveragePool", MAP, [], {}),
    ("HardSigmoid", MAP, [], {}),
    ("HardSigmoid", MAP, [], {"alpha": 1 / 6, "beta": 0.4}),
    ("HardSwish", MAP, [], {}),
    ("Identity", MAP, [], {}),
    ("LayerNormalization", TOKENS, [f(4), f(4)], {"epsilon": 1e-3}),
    ("LayerNormalization", MAP, [f(6, 6)], {"axis": 2}),
    ("LeakyRelu", MAP, [], {"alpha": 0.2}),
    ("MatMul", TOKENS, [f(4, 3)], {}),
    ("MaxPool", MAP, [], {"kernel_shape": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1)}),
    ("MaxPool", MAP, [], {"kernel_shape": (3, 3), "strides": (2, 2), "pads": (0, 0, 1, 1)}),
    ("MaxPool", MAP, [], {"kernel_shape": (2, 2), "auto_pad": "SAME_UPPER"}),
    ("MaxPool", MAP, [], {"kernel_shape": (2, 2), "strides": (1, 1), "dilations": (2, 2)}),
    ("Mul", MAP, [f(4, 1, 1)], {}),
    ("Neg", MAP, [], {}),
    ("Pad", MAP, [i(0, 0, 1, 2, 0, 0, 0, 1), np.array(0.5, np.float32)], {}),
    ("Pad", MAP, [i(2, 1), None, i(3)], {"mode": "reflect"}),
    ("Pad", MAP, [i(0, 0, 1, 2, 0, 0, 0, 1)], {"mode": "edge"}),
    ("Pow", MAP, [np.array(2.0, np.float32)], {}),
    ("Reciprocal", (3,), [], {}),
    ("ReduceMean", MAP, [i(-1, 2)], {"keepdims": 0}),
    ("ReduceMean", MAP, [i(1)], {}),
    ("ReduceMean", MAP, [], {"noop_with_empty_axes": 1}),
    ("ReduceSum", MAP, [i(2)], {"keepdims": 0}),
    ("Relu", MAP, [], {}),
    ("Reshape", MAP, [i(-1, 2, 72)], {}),
    ("Sigmoid", MAP, [], {}),
    ("Slice", MAP, [i(1, -4), i(9999, -1), i(1, -1), i(2, 1)], {}),
    ("Slice", MAP, [i(0, 1), i(9, 3)], {}),
    ("Softmax", TOKENS, [], {}),
    ("Softmax", TOKENS, [], {"axis": 1}),
    ("Softplus", MAP, [], {}),
    ("Split", TOKENS, [i(1, 3)], {"axis": -1}),
    ("Split", TOKENS, [], {"axis": 1, "num_outputs": 2}),
    ("Sqrt", MAP, [], {}),
    ("Squeeze", (1, 4, 1), [i(1, -1)], {}),
    ("Sub", MAP, [f(6)], {}),
    ("Tanh", MAP, [], {}),
    ("Transpose", MAP, [], {"perm": (0, 2, 3, 1)}),
    ("Unsqueeze", TOKENS, [i(-1, 1)], {}),
]


def _state(
    operator: str, shape: tuple[int, ...], further: list[np.ndarray | None], attributes: dict[str, Any]
) -> TailState:
    """Return a tail of one operator, flattened, for vectors of two images."""
    tensors = {f"tensor {index}": array for index, array in enumerate(further) if array is not None}
    inputs = ("map", *("" if array is None else f"tensor {index}" for index, array in enumerate(further)))
    outputs = ("first", "second") if operator == "Split" else ("first",)
    nodes = [Node(operator, inputs, outputs, attributes), Node("Flatten", outputs[-1:], ("features",), {})]
    opset = 20 if operator == "Gelu" else 18
    found = Description((("map", shape),), tuple(nodes), "features", 1, (), opset)
    with pytest.raises(ValueError, match="its output for two images is") as caught:  # the width is what it says
        Tail(TailState(dataclasses.replace(found, dim=9_999), tensors))
    width = re.search(r"is \(2, (\d+)\)", str(caught.value))
    assert width
    return TailState(dataclasses.replace(found, dim=int(width[1])), tensors)


@pytest.mark.parametrize(("operator", "shape", "further", "attributes"), CASES)
def test_operators_equal_onnx_runtime(
    operator: str, shape: tuple[int, ...], further: list[np.ndarray | None], attributes: dict[str, Any]
) -> None:
    state = _state(operator, shape, further, attributes)
    low = 0.1 if operator == "Sqrt" else -2
    vectors = np.random.default_rng(0).uniform(low, 2, (2, int(np.prod(shape)))).astype(np.float32)
    expected = open_session(tail_onnx(state)).run(None, {VECTORS: vectors})[0]
    found = Tail(state)(torch.from_numpy(vectors)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_every_operator_is_tested() -> None:
    assert {case[0] for case in CASES} == set(OPERATORS)


@pytest.fixture
def state() -> TailState:
    """A tail of a level and a map: convolve, mean, join."""
    nodes = (
        Node("Conv", ("map", "weight", "bias"), ("wide",), {"strides": (2, 2)}),
        Node("Relu", ("wide",), ("active",), {}),
        Node("Reshape", ("active", "shape"), ("flat",), {}),
        Node("Concat", ("level", "flat"), ("features",), {"axis": 1}),
    )
    tensors = {"weight": f(4, 3, 1, 1), "bias": f(4), "shape": i(-1, 16)}
    return TailState(
        Description((("level", (2,)), ("map", (3, 4, 4))), nodes, "features", 18, ("weight", "bias"), 18), tensors
    )


def _read(state: TailState, description: dict[str, Any], schema: str = SCHEMA) -> TailState:
    return TailState.from_bytes(files.tensor_bytes(state.tensors, {"schema": schema, "tail": description}), "tail")


def test_a_file_gives_the_tail_back(state: TailState) -> None:
    found = TailState.from_bytes(state.to_bytes(), "tail.safetensors")
    assert found.description == state.description
    assert found.to_bytes() == state.to_bytes()
    assert {name: array.tolist() for name, array in Tail(found).state().tensors.items()} == {
        name: array.tolist() for name, array in state.tensors.items()
    }


def test_a_copy_is_independent(state: TailState) -> None:
    student = Tail(state)
    teacher, vectors = copy.deepcopy(student), torch.ones(2, 50)
    before = teacher(vectors)
    with torch.no_grad():
        student.trained[0].add_(1)
    assert torch.equal(teacher(vectors), before)
    assert not torch.equal(student(vectors), before)
    assert state.tensors["weight"].max() < 1.5


DAMAGES: list[tuple[str, Any, str]] = [
    ("nodes.0.operator", "Loop", "the operator 'Loop' is unknown"),
    ("nodes.0.operator", 3, "3 is no name"),
    ("nodes.0.inputs.1", "other", "no operator uses the tensor 'weight'"),
    ("nodes.0.inputs", ["map"], "no operator uses the tensor 'bias'"),
    ("nodes.0.inputs", "map", "'map' is no list of names"),
    ("nodes.0.inputs.0", "flat", "Conv needs 'flat', which is missing"),
    ("nodes.0.inputs.0", "level", "Conv 'wide' does not run"),
    ("nodes.0.outputs.0", "level", "'level' is computed twice"),
    ("nodes.0.outputs", [], "Conv has 0 outputs"),
    ("nodes.1.outputs", ["active", "more"], "Relu has 2 outputs"),
    ("nodes.0.attributes.group", 2, "Conv 'wide' does not run"),
    ("nodes.0.attributes.group", "two", "Conv needs an integer as group"),
    ("nodes.0.attributes.strides", [2.5, 2], "Conv needs integers as strides"),
    ("nodes.0.attributes.strides", [0, 0], "Conv 'wide' does not run"),
    ("nodes.0.attributes.strides", [True, 1], "is no attribute"),
    ("nodes.0.attributes.strides", {"a": 1}, "is no attribute"),
    ("nodes.0.attributes.pads", [9000, 9000, 9000, 9000], "numbers for an image, but at most"),
    ("nodes.0.attributes.pads", [2**62, 0, 2**62, 0], "Conv 'wide' does not run"),
    ("nodes.0.attributes.auto_pad", "SAME", "auto_pad SAME"),
    ("nodes.2.inputs", ["active", "bias", "shape"], "Reshape 'flat' needs constant integers"),
    ("nodes.3.attributes.axis", 7, "Concat 'features' does not run"),
    ("nodes", [], "no operator uses the tensor"),
    ("nodes", 5, "is no tail"),
    ("nodes", [{}] * 5000, "5000 operators, but at most 4096"),
    ("output", "nowhere", "no operator gives the output 'nowhere'"),
    ("dim", 17, r"its output for two images is \(2, 18\), but should be \(2, 17\)"),
    ("dim", -1, "-1 is no size"),
    ("parts.0.1", [2, 10**9], "its input has"),
    ("parts.0.1", [0], "0 is no size"),
    ("parts.0.0", "map", "its parts need different names"),
    ("parts", [], "its parts need different names, and at least one"),
    ("trainable.0", "shape", "the trainable tensor 'shape' is missing or not float32"),
    ("trainable.0", "bias", "a trainable tensor is named twice"),
    ("trainable.0", "none", "the trainable tensor 'none' is missing"),
    ("opset", None, "None is no size"),
    ("more", 1, r"unknown entries \['more'\]"),
]


@pytest.mark.parametrize(("path", "value", "message"), DAMAGES)
def test_damaged_descriptions_are_refused(state: TailState, path: str, value: Any, message: str) -> None:
    description: Any = state.description.to_dict()
    *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    target = description
    for step in steps:
        target = target[step]
    target[last] = value
    with pytest.raises(BundleRefusedError, match=message) as refused:
        _read(state, description)
    assert len(str(refused.value)) < 500


def test_damaged_tensors_are_refused(state: TailState, monkeypatch: pytest.MonkeyPatch) -> None:
    description = state.description.to_dict()
    for name, array, message in (
        ("weight", f(4, 3, 1, 1).astype(np.float64), "'weight' is float64"),
        ("weight", f(4, 2, 1, 1), "Conv 'wide' does not run"),
        ("bias", f(5), "Conv 'wide' does not run"),
        ("shape", i(-1, 15), "Reshape 'flat' does not run"),
        ("shape", i(-7, 16), "Reshape 'flat' does not run"),
        ("extra", f(1), "no operator uses the tensor 'extra'"),
        ("map", f(1), "its parts need different names"),
    ):
        with pytest.raises(BundleRefusedError, match=message):
            _read(TailState(state.description, {**state.tensors, name: array}), description)
    fewer = {name: array for name, array in state.tensors.items() if name != "weight"}
    with pytest.raises(BundleRefusedError, match="'weight' is missing"):
        _read(TailState(state.description, fewer), description)
    with pytest.raises(BundleRefusedError, match="its schema is 'other/1'"):
        _read(state, description, "other/1")
    data = state.to_bytes()
    with pytest.raises(BundleRefusedError, match="not a valid safetensors file"):
        TailState.from_bytes(data[:-1], "tail")
    monkeypatch.setattr(tails, "MAX_BYTES", len(data) - 1)
    with pytest.raises(BundleRefusedError, match=f"tail has {len(data):,} bytes, but a tail has at most"):
        TailState.from_bytes(data, "tail")
