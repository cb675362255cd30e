"""Levels: globally pooled features of several stages of a network, found in its ONNX graph.

The trunk of a network are the values through which every path from its input to its output passes. Outputs of residual
blocks are on the trunk, values inside a block are not. One level of each spatial size, or of each width, is taken from
the feature maps on the trunk; widened maps, from which inverted residual blocks stride, are left out.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ssd_edge.backbones import onnx_file

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

PREFIX = "levels/"  # of the added nodes, which stay in fp32 in every precision
Choice = Literal["last", "sizes", "auto"]
Shapes = Callable[["ModelProto"], Sequence[Sequence[int]]]

_SHAPE_OF = frozenset({"Shape", "Size"})  # what depends on the shape of a value only does not depend on the image
_PRODUCTS = frozenset(
    {
        "Conv",
        "ConvInteger",
        "ConvTranspose",
        "Einsum",
        "Gemm",
        "MatMul",
        "MatMulInteger",
        "QLinearConv",
        "QLinearMatMul",
    }
)
_WIDENED = 2  # a map this many times as wide as the narrowest of its size is inside a block


class NoLevelsError(Exception):
    """A network has no levels beside its features; the message says why, after "no levels: "."""


@dataclass(frozen=True)
class Level:
    """A feature map on the trunk.

    Attributes:
        value: Name in the graph.
        width: Number of channels.
        side: Side of the map in pixels.
        channels_last: True for ``(N, side, side, width)``, False for ``(N, width, side, side)``.
    """

    value: str
    width: int
    side: int
    channels_last: bool = False

    def __str__(self) -> str:
        return f"{self.width}@{self.side}"


def find(model: ModelProto, size: int, choice: Choice, shapes: Shapes) -> tuple[Level, ...]:
    """Find the levels of a network, the earliest first, without its features.

    Args:
        model: Parsed and valid model with one input and one output.
        size: Side of the input in pixels.
        choice: ``auto``: one level of each width. ``sizes``: one of each spatial size. ``last``: none.
        shapes: Function that runs a model with one input like that of `model` on one image, and returns its outputs:
            the shapes of the values on the trunk.

    Raises:
        NoLevelsError: No levels are wanted, or there are none.
    """
    if choice == "last":
        raise NoLevelsError("backbone.levels is last")
    values, ends = trunk(model.graph)
    found = shapes(_with_shapes(model, values)) if values else ()
    maps: list[Level] = []
    for value, shape in zip(values, found, strict=True):
        level = _as_map(value, shape)
        if level and (not maps or level.side <= maps[-1].side):  # decoders, and tokens by heads, are larger
            maps.append(level)
    if not maps:
        raise NoLevelsError("no feature map is on every path from its input to its output")
    if len({_octave(level, size) for level in maps}) < 2:  # as in a network of tokens: the projection of its patches
        raise NoLevelsError(f"its feature maps have one size, {maps[-1].side}×{maps[-1].side}")
    levels = tuple(level for level in choose(maps, size, choice) if level.value not in ends)
    if not levels:
        raise NoLevelsError("its only feature map becomes its features without a further product")
    return levels


def choose(maps: Sequence[Level], size: int, choice: Choice) -> tuple[Level, ...]:
    """Choose levels among the feature maps on a trunk.

    Args:
        maps: In the order of the network.
        size: Side of the input in pixels.
        choice: As for `find`.
    """
    octaves = [list(group) for _, group in itertools.groupby(maps, lambda level: _octave(level, size))]
    narrowest = [min(level.width for level in group) for group in octaves]
    chosen: list[Level] = []
    for index, group in enumerate(octaves):
        # Residual networks widen within a size, but never beyond the next one.
        limit = max([_WIDENED * narrowest[index], *narrowest[index + 1 : index + 2]])
        stages: list[Level] = []
        for level in group:
            if level.width <= limit:
                while stages and stages[-1].width >= level.width:
                    stages.pop()
                stages.append(level)
        chosen += stages if choice == "auto" else stages[-1:]
    return tuple(chosen)


def trunk(graph: GraphProto) -> tuple[list[str], set[str]]:
    """Return the values on the trunk from the first product on, and those of them that no product follows.

    What follows the last product (activation, normalisation, pooling) turns a map into the features, so that its mean
    would repeat them.

    Args:
        graph: Valid graph, whose nodes are therefore sorted, with one input that is no constant and one output.
    """
    constants = {tensor.name for tensor in graph.initializer}
    source = next(value.name for value in graph.input if value.name not in constants)
    nodes = [(node, _inputs(node)) for node in graph.node if node.op_type not in _SHAPE_OF]
    reached, needed = {source}, {graph.output[0].name}
    for node, inputs in nodes:
        if inputs & reached:
            reached.update(node.output)
    for node, inputs in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(inputs)
    live = reached & needed
    path = [(node, inputs & live) for node, inputs in nodes if live.intersection(node.output)]
    readers = Counter(value for _, inputs in path for value in inputs)
    values: list[str] = []
    ends: set[str] = set()
    waiting = {source}  # values that later nodes read
    products = False
    for node, inputs in path:
        if node.op_type in _PRODUCTS:
            products = True
            ends.clear()
        readers.subtract(inputs)
        waiting.difference_update([value for value in inputs if not readers[value]])
        waiting.update(live.intersection(node.output))
        if len(waiting) == 1 and products and node.op_type != "Pad":  # a border is no content
            values += waiting
            ends |= waiting
    return values, ends


def join(model: ModelProto, levels: Sequence[Level], features: str, result: str) -> None:
    """Add nodes that join the means of the levels over space and the features, in fp32.

    Args:
        model: Model to which the nodes are added.
        levels: Result of `find`.
        features: Name of the features, float32 ``(N, D)``.
        result: Name for the joined features, float32 ``(N, sum of all widths)``.
    """
    from onnx import TensorProto, helper, shape_inference

    inferred = shape_inference.infer_shapes(model).graph.value_info
    single = {value.name for value in inferred if onnx_file.element_type(value) == TensorProto.FLOAT}
    pooled = []
    for index, level in enumerate(levels):
        steps: list[tuple[str, dict[str, Any]]] = [("GlobalAveragePool", {}), ("Flatten", {"axis": 1})]
        if level.channels_last:
            steps.insert(0, ("Transpose", {"perm": [0, 3, 1, 2]}))
        if level.value not in single:
            steps.insert(0, ("Cast", {"to": TensorProto.FLOAT}))
        value = level.value
        for operator, attributes in steps:
            name = f"{PREFIX}{index}/{operator}"
            model.graph.node.append(helper.make_node(operator, [value], [name], name=name, **attributes))
            value = name
        pooled.append(value)
    model.graph.node.append(helper.make_node("Concat", [*pooled, features], [result], name=f"{PREFIX}Concat", axis=1))


def scales(widths: Sequence[int]) -> list[float]:
    """Return the factor of each level that gives all levels the same share of the squared length of an embedding.

    The mean square over all D standardised features stays 1: level l of L levels is multiplied by √(D/(L·w_l)).
    """
    return [math.sqrt(sum(widths) / (len(widths) * width)) for width in widths]


def _inputs(node: NodeProto) -> set[str]:
    """Return the values that a node reads, including those that only its subgraphs read."""
    from onnx import NodeProto

    return {value for inner in onnx_file.messages_of(node, NodeProto) for value in inner.input if value}


def _with_shapes(model: ModelProto, values: Sequence[str]) -> ModelProto:
    """Return a copy of a model whose outputs are the shapes of values: maps as outputs would take much memory."""
    from onnx import ModelProto, TensorProto, helper

    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    for index, value in enumerate(values):
        name = f"{PREFIX}shape/{index}"
        copy.graph.node.append(helper.make_node("Shape", [value], [name], name=name))
        copy.graph.output.append(helper.make_tensor_value_info(name, TensorProto.INT64, [None]))
    return copy


def _as_map(value: str, shape: Sequence[int]) -> Level | None:
    """Return a value as a feature map of one image, or None if it is none. Convolutions put channels first."""
    if len(shape) != 4 or shape[0] != 1:
        return None
    _, first, middle, last = map(int, shape)
    if middle == last > 1:
        return Level(value, first, last)
    if first == middle > 1:
        return Level(value, last, first, channels_last=True)
    return None


def _octave(level: Level, size: int) -> int:
    """Return how often a map was halved; padding does not count."""
    return round(math.log2(size / level.side))
