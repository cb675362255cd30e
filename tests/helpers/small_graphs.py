"""Small networks as ONNX graphs, written operator by operator as exporters write them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from ssd_edge.backbones.graph import NetworkGraph
from ssd_edge.backbones.levels import Choice
from ssd_edge.images import Pixels

SIZE = 32


class Builder:
    """Adds operators and random weights to a graph from `pixels` ``(N, 3, 32, 32)``."""

    def __init__(self, seed: int = 0, kind: type = np.float32) -> None:
        self.nodes: list[Any] = []
        self.tensors: dict[str, np.ndarray] = {}
        self._rng, self._kind = np.random.default_rng(seed), kind

    def __call__(self, operator: str, *inputs: str, outputs: int = 1, name: str = "", **attributes: Any) -> Any:
        """Add an operator and return the name of its output, or the names of several."""
        label = name or f"{operator.lower()}_{len(self.nodes)}"
        names = [label] if outputs == 1 else [f"{label}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return label if outputs == 1 else names

    def constant(self, value: Any, name: str = "") -> str:
        """Add a tensor: integers as int64, everything else in the kind of the graph."""
        array = np.asarray(value)
        name = name or f"constant_{len(self.tensors)}"
        self.tensors[name] = array.astype(np.int64 if array.dtype.kind == "i" else self._kind)
        return name

    def weight(self, name: str, *shape: int, scale: float = 0.0, shift: float = 0.0) -> str:
        """Add a random tensor."""
        fan = math.prod(shape[1:]) or 1
        return self.constant(shift + (scale or 1.4 / math.sqrt(fan)) * self._rng.standard_normal(shape), name)

    def conv(
        self, x: str, name: str, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, group: int = 1
    ) -> str:
        """Add a convolution with a bias and equal borders."""
        weight = self.weight(f"{name}.weight", outputs, inputs // group, kernel, kernel)
        bias, pad = self.weight(f"{name}.bias", outputs, scale=0.1), kernel // 2
        return self("Conv", x, weight, bias, name=name, group=group, strides=[stride] * 2, pads=[pad] * 4)

    def linear(self, x: str, name: str, inputs: int, outputs: int) -> str:
        """Add a matrix product and its bias."""
        weight = self.weight(f"{name}.weight", inputs, outputs, scale=1 / math.sqrt(inputs))
        product = self("MatMul", x, weight)
        return self("Add", product, self.weight(f"{name}.bias", outputs, scale=0.1), name=name)

    def graph(self, output: str, width: int, levels: Choice = "auto") -> NetworkGraph:
        """Return the network with one output ``(N, width)``."""
        kind = TensorProto.FLOAT16 if self._kind is np.float16 else TensorProto.FLOAT
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("pixels", kind, ["batch", 3, SIZE, SIZE])],
            [helper.make_tensor_value_info(output, kind, ["batch", width])],
            [numpy_helper.from_array(array, name) for name, array in self.tensors.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        data = model.SerializeToString(deterministic=True)
        return NetworkGraph("small", data, Pixels(SIZE), (0.5,) * 3, (0.25,) * 3, levels=levels, card={"arch": "small"})


def inverted_residuals(kind: type = np.float32) -> NetworkGraph:
    """Return a MobileNet: 8@16, 16@8, 24@4 twice, and a head of 48; the last blocks squeeze and excite."""
    b = Builder(1, kind)
    zero, six = b.constant(0.0, "zero"), b.constant(6.0, "six")

    def block(x: str, name: str, inputs: int, outputs: int, stride: int, gated: bool = False) -> str:
        wide = 6 * inputs
        y = b("Clip", b.conv(x, f"{name}.expand", inputs, wide), zero, six)
        y = b("Clip", b.conv(y, f"{name}.filter", wide, wide, 3, stride, wide), zero, six, name=f"{name}.wide")
        if gated:
            pooled = b("ReduceMean", y, b.constant([2, 3]), keepdims=1)
            narrow = b("Relu", b.conv(pooled, f"{name}.squeeze", wide, 8))
            y = b("Mul", y, b("Sigmoid", b.conv(narrow, f"{name}.excite", 8, wide)), name=f"{name}.gated")
        y = b.conv(y, f"{name}.project", wide, outputs)
        return b("Add", x, y, name=name) if stride == 1 and inputs == outputs else y

    x = b("Relu", b.conv("pixels", "stem", 3, 8, 3, 2))
    x = block(x, "block0", 8, 16, 2)
    x = block(x, "block1", 16, 24, 2, gated=True)
    x = block(x, "block2", 24, 24, 1, gated=True)
    x = b("Clip", b.conv(x, "head", 24, 48), zero, six)
    return b.graph(b("Flatten", b("GlobalAveragePool", x)), 48)


def residual() -> NetworkGraph:
    """Return a ResNet, 8@8 and 16@4 twice, with batch normalisation that is not folded."""
    b = Builder(2)

    def conv(x: str, name: str, inputs: int, outputs: int, kernel: int, stride: int) -> str:
        weight, pad = b.weight(f"{name}.weight", outputs, inputs, kernel, kernel), kernel // 2
        x = b("Conv", x, weight, strides=[stride] * 2, pads=[pad] * 4)
        parts = [b.weight(f"{name}.{part}", outputs, scale=0.1, shift=shift) for part, shift in _NORMALISATION]
        return b("BatchNormalization", x, *parts, epsilon=1e-3)

    def block(x: str, name: str, inputs: int, outputs: int, stride: int) -> str:
        y = b("Relu", conv(x, f"{name}.0", inputs, outputs, 3, stride), name=f"{name}.inner")
        y = conv(y, f"{name}.1", outputs, outputs, 3, 1)
        return b("Relu", b("Add", conv(x, f"{name}.2", inputs, outputs, 1, stride) if stride > 1 else x, y), name=name)

    x = b("Relu", conv("pixels", "stem", 3, 8, 3, 2))
    x = b("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    x = block(x, "block0", 8, 8, 1)
    x = block(x, "block1", 8, 16, 2)
    x = block(x, "block2", 16, 16, 1)
    return b.graph(b("ReduceMean", x, b.constant([2, 3]), keepdims=0), 16)


_NORMALISATION = (("scale", 1.0), ("shift", 0.0), ("mean", 0.0), ("variance", 1.0))


def transformer() -> NetworkGraph:
    """Return a ViT: 17 tokens of 16 numbers, two blocks; shapes are computed from the batch, as by the exporter."""
    b, width, heads = Builder(3), 16, 2
    one, half, root = b.constant(1.0), b.constant(0.5), b.constant(math.sqrt(2))

    def normalised(x: str, name: str, whole: bool) -> str:
        scale, shift = b.weight(f"{name}.scale", width, scale=0.1, shift=1), b.weight(f"{name}.shift", width, scale=0.1)
        if whole:
            return b("LayerNormalization", x, scale, shift, axis=-1)
        axis = b.constant([-1])
        centred = b("Sub", x, b("ReduceMean", x, axis))
        variance = b("ReduceMean", b("Pow", centred, b.constant(2.0)), axis)
        x = b("Div", centred, b("Sqrt", b("Add", variance, b.constant(1e-5))))
        return b("Add", b("Mul", x, scale), shift)

    def attention(x: str, name: str) -> str:
        batch = b("Gather", b("Shape", x), b.constant([0]))
        shape = b("Concat", batch, b.constant([17, 3, heads, width // heads]), axis=0)
        qkv = b("Transpose", b("Reshape", b.linear(x, f"{name}.qkv", width, 3 * width), shape), perm=[2, 0, 3, 1, 4])
        query, key, value = (
            b("Squeeze", part, b.constant([0])) for part in b("Split", qkv, outputs=3, axis=0, num_outputs=3)
        )
        scores = b("MatMul", query, b("Transpose", key, perm=[0, 1, 3, 2]))
        x = b("MatMul", b("Softmax", b("Mul", scores, b.constant(0.35)), axis=-1), value)
        x = b("Reshape", b("Transpose", x, perm=[0, 2, 1, 3]), b("Concat", batch, b.constant([17, width]), axis=0))
        return b.linear(x, f"{name}.project", width, width)

    def feed_forward(x: str, name: str) -> str:
        x = b.linear(x, f"{name}.wide", width, 2 * width)
        x = b("Mul", b("Mul", x, b("Add", b("Erf", b("Div", x, root)), one)), half, name=f"{name}.gelu")
        return b.linear(x, f"{name}.narrow", 2 * width, width)

    x = b("Conv", "pixels", b.weight("patches", width, 3, 8, 8), strides=[8, 8])
    x = b("Transpose", b("Reshape", x, b.constant([0, width, 16])), perm=[0, 2, 1])
    first = b("Concat", b("Gather", b("Shape", x), b.constant([0])), b.constant([1, width]), axis=0)
    x = b("Concat", b("Expand", b.weight("token", 1, 1, width), first), x, axis=1)
    for block in ("block0", "block1"):
        whole = block == "block0"
        x = b("Add", x, attention(normalised(x, f"{block}.before", whole), block), name=f"{block}.middle")
        x = b("Add", x, feed_forward(normalised(x, f"{block}.after", whole), block), name=block)
    x = normalised(x, "last", True)
    return b.graph(b("Gather", x, b.constant(0), axis=1), width)
