"""Operators of ONNX as functions of PyTorch, as the nodes of a tail use them.

The description of a tail may come from a stranger, so that every operator bounds what it gives before it computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MAX_NUMBERS = 2**26  # in one value of one image

Attribute: TypeAlias = int | float | str | tuple[int | float, ...]
# From the inputs that are tensors to the output, or all outputs.
Function: TypeAlias = Callable[[Sequence[Tensor]], Any]


@dataclass(frozen=True)
class Node:
    """An operator of ONNX; an empty input is an omitted one."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]

    def to_dict(self) -> dict[str, Any]:
        """Return the node as JSON values."""
        return {
            "operator": self.operator,
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "attributes": {key: list(v) if isinstance(v, tuple) else v for key, v in self.attributes.items()},
        }


def check_numbers(count: int, what: str) -> None:
    if count > MAX_NUMBERS:
        raise ValueError(f"{what} has {count:,} numbers for an image, but at most {MAX_NUMBERS:,} are allowed")


class Operation:
    """A node with its constants, as the makers of functions read it."""

    def __init__(self, node: Node, tensors: Mapping[str, np.ndarray], opset: int) -> None:
        self.node, self.opset, self._tensors = node, opset, tensors

    def constant(self, index: int) -> np.ndarray | None:
        """Return the constant at an input, or None without one."""
        inputs = self.node.inputs
        return self._tensors.get(inputs[index]) if index < len(inputs) else None

    def given(self, index: int) -> bool:
        """Return True if an input is not omitted."""
        return index < len(self.node.inputs) and bool(self.node.inputs[index])

    def ints(self, index: int, name: str = "") -> tuple[int, ...] | None:
        """Return the integers at an input or, as in older opsets, in an attribute."""
        if self.given(index):
            found = self.constant(index)
            if found is None or found.dtype.kind != "i":
                raise ValueError(f"{self.node.operator} '{self.node.outputs[0]}' needs constant integers")
            return tuple(map(int, found.reshape(-1)))
        return self.sequence(name) if name in self.node.attributes else None

    def number(self, index: int, default: float) -> float:
        """Return the constant number at an input."""
        if not self.given(index):
            return default
        found = self.constant(index)
        if found is None or found.size != 1:
            raise ValueError(f"{self.node.operator} '{self.node.outputs[0]}' needs a constant number")
        return float(found.reshape(-1)[0])

    def sequence(self, name: str) -> tuple[int, ...]:
        """Return an attribute of several integers, empty by default."""
        value = self.node.attributes.get(name, ())
        if not isinstance(value, tuple) or not all(isinstance(item, int) for item in value):
            raise ValueError(f"{self.node.operator} needs integers as {name}")
        return tuple(map(int, value))

    def integer(self, name: str, default: int) -> int:
        """Return an integer attribute."""
        value = self.node.attributes.get(name, default)
        if not isinstance(value, int):
            raise ValueError(f"{self.node.operator} needs an integer as {name}")
        return value

    def real(self, name: str, default: float) -> float:
        """Return a number as attribute."""
        value = self.node.attributes.get(name, default)
        if not isinstance(value, (int, float)):
            raise ValueError(f"{self.node.operator} needs a number as {name}")
        return float(value)

    def word(self, name: str, default: str) -> str:
        """Return a text attribute."""
        return str(self.node.attributes.get(name, default))


def _each(function: Callable[[Tensor], Tensor]) -> Callable[[Operation], Function]:
    return lambda op: lambda x: function(x[0])


def _pair(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Operation], Function]:
    return lambda op: lambda x: function(x[0], x[1])


def _clip(op: Operation) -> Function:
    low, high = op.number(1, -math.inf), op.number(2, math.inf)
    return lambda x: F.hardtanh(x[0], low, high)


def _same(x: Tensor) -> Tensor:
    return x


def _leaky_relu(op: Operation) -> Function:
    slope = op.real("alpha", 0.01)
    return lambda x: F.leaky_relu(x[0], slope)


def _hard_sigmoid(op: Operation) -> Function:
    alpha, beta = op.real("alpha", 0.2), op.real("beta", 0.5)
    return lambda x: (x[0] * alpha + beta).clamp(0, 1)


def _gelu(op: Operation) -> Function:
    approximate = op.word("approximate", "none")
    return lambda x: F.gelu(x[0], approximate=approximate)


def _pow(op: Operation) -> Function:
    exponent = op.number(1, 1.0)
    return lambda x: x[0] ** exponent


def _softmax(op: Operation) -> Function:
    axis = op.integer("axis", -1)
    return lambda x: x[0].softmax(axis)


def _pads(op: Operation, sides: int, dilations: Sequence[int]) -> Callable[[Tensor, Sequence[int]], list[int]]:
    """Return a function from a map and the kernel to its border, in the order of `F.pad`: the last axis first."""
    pads = op.sequence("pads") or (0,) * (2 * sides)
    kind = op.word("auto_pad", "NOTSET")
    strides = op.sequence("strides") or (1,) * sides
    if len(pads) != 2 * sides or len(strides) != sides or kind not in _AUTO_PADS:
        raise ValueError(f"{op.node.operator} with pads {pads}, strides {strides} and auto_pad {kind}")

    def border(x: Tensor, kernel: Sequence[int]) -> list[int]:
        found: list[int] = []
        for axis in reversed(range(sides)):
            begin, end = pads[axis], pads[sides + axis]
            if kind.startswith("SAME"):
                size, stride = x.shape[2 + axis], strides[axis]
                total = max(0, (-(-size // stride) - 1) * stride + (kernel[axis] - 1) * dilations[axis] + 1 - size)
                begin, end = total // 2, total - total // 2
                if kind == "SAME_LOWER":
                    begin, end = end, begin
            found += [begin, end]
        return found

    return border


def _check_padded(x: Tensor, border: Sequence[int], channels: int) -> None:
    """Refuse a map with negative borders, or with borders that make it too large."""
    if min(border, default=0) < 0:
        raise ValueError(f"negative borders {list(border)}")
    added = [before + after for before, after in zip(border[0::2], border[1::2], strict=True)]
    sides = x.shape[x.ndim - len(added) :]
    check_numbers(channels * math.prod(side + more for side, more in zip(sides, added[::-1], strict=True)), "a map")


def _conv(op: Operation) -> Function:
    group = op.integer("group", 1)

    def run(x: Sequence[Tensor]) -> Tensor:
        value, weights, *bias = x
        sides = weights.ndim - 2
        if bias and bias[0].shape != weights.shape[:1]:  # not checked without content
            raise ValueError(f"a bias of shape {tuple(bias[0].shape)} for {weights.shape[0]} channels")
        strides, dilations = (op.sequence(name) or (1,) * sides for name in ("strides", "dilations"))
        border = _pads(op, sides, dilations)(value, weights.shape[2:])
        pads = border[-2::-2]
        _check_padded(value, border, max(weights.shape[0], value.shape[1]))
        if border[0::2] != border[1::2]:
            value, pads = F.pad(value, border), [0] * sides
        return _CONVOLUTIONS[sides](value, weights, bias[0] if bias else None, strides, pads, dilations, group)

    return run


def _pool(op: Operation) -> Function:
    kernel = op.sequence("kernel_shape")
    sides, greatest = len(kernel), op.node.operator == "MaxPool"
    strides, dilations = (op.sequence(name) or (1,) * sides for name in ("strides", "dilations"))
    ceil, counted = bool(op.integer("ceil_mode", 0)), bool(op.integer("count_include_pad", 0))
    border = _pads(op, sides, dilations)
    if sides != 2 or not (greatest or set(dilations) == {1}):
        raise ValueError(f"{op.node.operator} with a kernel of {sides} sides and dilations {dilations}")

    def run(x: Sequence[Tensor]) -> Tensor:
        value, pads = x[0], border(x[0], kernel)
        _check_padded(value, pads, value.shape[1])
        inside = pads[-2::-2]
        if pads[0::2] != pads[1::2] or any(2 * pad > side for pad, side in zip(inside, kernel, strict=True)):
            if not greatest and not counted:
                raise ValueError("a mean over a map with a border on one side")
            value, inside = F.pad(value, pads, value=-math.inf if greatest else 0.0), [0, 0]
        if greatest:
            return F.max_pool2d(value, kernel, strides, inside, dilations, ceil)
        return F.avg_pool2d(value, kernel, strides, inside, ceil, counted)

    return run


def _gemm(op: Operation) -> Function:
    alpha, beta, turned = op.real("alpha", 1.0), op.real("beta", 1.0), op.integer("transB", 0)
    if op.integer("transA", 0):
        raise ValueError("Gemm with transA")

    def run(x: Sequence[Tensor]) -> Tensor:
        value, weights, *bias = x
        weights = weights if turned else weights.t()
        if alpha == 1 and (not bias or (beta == 1 and bias[0].ndim == 1)):
            return F.linear(value, weights, bias[0] if bias else None)
        product = alpha * F.linear(value, weights)
        return product + beta * bias[0] if bias else product

    return run


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[[Operation], Function]:
    def make(op: Operation) -> Function:
        axes, keep = op.ints(1, "axes"), bool(op.integer("keepdims", 1))
        if not axes and op.integer("noop_with_empty_axes", 0):
            return lambda x: x[0]
        return lambda x: function(x[0], list(axes or range(x[0].ndim)), keep)

    return make


def _layer_normalisation(op: Operation) -> Function:
    axis, epsilon = op.integer("axis", -1), op.real("epsilon", 1e-5)
    return lambda x: F.layer_norm(x[0], x[0].shape[axis:], x[1], x[2] if len(x) > 2 else None, epsilon)


def _batch_normalisation(op: Operation) -> Function:
    epsilon = op.real("epsilon", 1e-5)
    if op.integer("training_mode", 0):
        raise ValueError("BatchNormalization in training mode")

    def run(x: Sequence[Tensor]) -> Tensor:
        value, scale, shift, mean, variance = x
        if any(part.shape != value.shape[1:2] for part in x[1:]):  # not checked without content
            raise ValueError(f"statistics that are not for {value.shape[1]} channels")
        return F.batch_norm(value, mean, variance, scale, shift, False, 0.0, epsilon)

    return run


def _flatten(op: Operation) -> Function:
    axis = op.integer("axis", 1)
    return lambda x: x[0].reshape(math.prod(x[0].shape[:axis]), -1)


def _reshape(op: Operation) -> Function:
    shape = op.ints(1)
    assert shape is not None
    return lambda x: x[0].reshape(shape)


def _transpose(op: Operation) -> Function:
    axes = op.sequence("perm")
    return lambda x: x[0].permute(axes or tuple(reversed(range(x[0].ndim))))


def _squeeze(op: Operation) -> Function:
    axes = op.ints(1, "axes")
    return lambda x: x[0].squeeze() if axes is None else x[0].squeeze(axes)


def _unsqueeze(op: Operation) -> Function:
    axes = op.ints(1, "axes") or ()

    def run(x: Sequence[Tensor]) -> Tensor:
        value = x[0]
        for axis in sorted(axis % (x[0].ndim + len(axes)) for axis in axes):
            value = value.unsqueeze(axis)
        return value

    return run


def _concat(op: Operation) -> Function:
    axis = op.integer("axis", 1)
    return lambda x: torch.cat(list(x), axis)


def _split(op: Operation) -> Function:
    axis, sizes, count = op.integer("axis", 0), op.ints(1, "split"), len(op.node.outputs)

    def run(x: Sequence[Tensor]) -> Any:
        parts = torch.split(x[0], list(sizes) if sizes else -(-x[0].shape[axis] // count), axis)
        return parts if count > 1 else parts[0]

    return run


def _slice(op: Operation) -> Function:
    starts, ends = op.ints(1) or (), op.ints(2) or ()
    axes, steps = op.ints(3) or tuple(range(len(starts))), op.ints(4) or (1,) * len(starts)
    if min(steps, default=1) < 1:
        raise ValueError("Slice with a negative step")

    def run(x: Sequence[Tensor]) -> Tensor:
        index = [slice(None)] * x[0].ndim
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            index[axis] = slice(start, end, step)
        return x[0][tuple(index)]

    return run


def _gather(op: Operation) -> Function:
    axis, at = op.integer("axis", 0), op.constant(1)
    if at is None or at.dtype.kind != "i":
        raise ValueError("Gather needs constant positions")
    if at.ndim == 0:
        return lambda x: x[0].select(axis, int(at))
    if at.ndim > 1:
        raise ValueError("Gather with a table of positions")

    def run(x: Sequence[Tensor]) -> Tensor:
        side = x[0].shape[axis]
        check_numbers(x[0][:1].numel() // side * at.size, "a selection")
        return x[0].index_select(axis, torch.from_numpy(at % side).to(x[0].device))

    return run


def _pad(op: Operation) -> Function:
    pads, axes, kind = op.ints(1) or (), op.ints(3), op.word("mode", "constant")
    value = op.number(2, 0.0)
    if kind not in _PAD_MODES:
        raise ValueError(f"Pad with the mode {kind}")

    def run(x: Sequence[Tensor]) -> Tensor:
        used = axes if axes is not None else tuple(range(x[0].ndim))
        border = [0] * (2 * x[0].ndim)
        for index, axis in enumerate(used):
            at = 2 * (x[0].ndim - 1 - axis % x[0].ndim)
            border[at], border[at + 1] = pads[index], pads[len(used) + index]
        _check_padded(x[0][:1], border, 1)
        if kind != "constant":  # PyTorch takes exactly the axes behind the channels
            if any(border[2 * (x[0].ndim - 2) :]):
                raise ValueError(f"{kind} over images or channels")
            border = border[: 2 * (x[0].ndim - 2)]
        return F.pad(x[0], border, _PAD_MODES[kind], value if kind == "constant" else None)

    return run


_AUTO_PADS = frozenset({"NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"})
_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}
_CONVOLUTIONS: Mapping[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})
ACTIVATIONS: Mapping[str, Callable[[Operation], Function]] = {
    "Clip": _clip,
    "Erf": _each(torch.erf),
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _each(F.hardswish),
    "LeakyRelu": _leaky_relu,
    "Relu": _each(F.relu),
    "Sigmoid": _each(torch.sigmoid),
    "Softplus": _each(F.softplus),
    "Tanh": _each(torch.tanh),
}
_KEEPING: Mapping[str, Callable[[Operation], Function]] = {  # a hidden layer stays one behind them
    "Add": _pair(torch.add),
    "AveragePool": _pool,
    "BatchNormalization": _batch_normalisation,
    "Cast": _each(_same),  # between kinds of float: everything is float32
    "Div": _pair(torch.div),
    "Dropout": _each(_same),
    "Identity": _each(_same),
    "LayerNormalization": _layer_normalisation,
    "MaxPool": _pool,
    "Mul": _pair(torch.mul),
    "Neg": _each(torch.neg),
    "Pad": _pad,
    "Pow": _pow,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": _pair(torch.sub),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
ELEMENTWISE = frozenset({*ACTIVATIONS, *_KEEPING})
OPERATORS: Mapping[str, Callable[[Operation], Function]] = {
    **ACTIVATIONS,
    **_KEEPING,
    "Concat": _concat,
    "Conv": _conv,
    "Exp": _each(torch.exp),
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": _each(lambda x: x.mean(tuple(range(2, x.ndim)), keepdim=True)),
    "MatMul": _pair(torch.matmul),
    "Reciprocal": _each(torch.reciprocal),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Softmax": _softmax,
    "Sqrt": _each(torch.sqrt),
}
