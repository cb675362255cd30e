"""The tail of a backbone as a PyTorch module, built from a description that `cut` made of an ONNX graph.

A tail maps what its trunk gives, vectors ``(N, T)``, to the raw features ``(N, D)`` of the network. It is kept as one
safetensors file, whose metadata describe the operators. Neither onnx nor pickle is needed to read and run it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssd_edge import files
from ssd_edge.adaptation.operators import (
    ACTIVATIONS,
    ELEMENTWISE,
    OPERATORS,
    PRODUCTS,
    Attribute,
    Function,
    Node,
    Operation,
    check_numbers,
)
from ssd_edge.errors import BundleRefusedError, first_line

SCHEMA = "ssd-edge-tail/1"
VECTORS = "vectors"  # output of a trunk
MAX_NODES = 4096
MAX_BYTES = 2**29  # of the file
MAX_PRODUCTS = 2**35  # of two numbers, for one image

# Gets the name and the value (N, C, …) of a hidden layer, and returns the value to go on with.
Hidden = Callable[[str, Tensor], Tensor]
# Gets the name of the weights and the input (N, C, …) of a trainable product.
Watch = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Description:
    """Operators and shapes of a tail.

    Attributes:
        parts: Name and shape, without the batch, of each value in the vectors, in their order: levels that the tail
            leaves as they are, then the value at which the network is cut.
        nodes: Operators, sorted.
        output: Name of the features ``(N, dim)``.
        dim: D, the number of features.
        trainable: Names of the tensors that training changes.
        opset: Version of ONNX's operators.
    """

    parts: tuple[tuple[str, tuple[int, ...]], ...]
    nodes: tuple[Node, ...]
    output: str
    dim: int
    trainable: tuple[str, ...]
    opset: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of each part; they add up to T."""
        return tuple(math.prod(shape) for _, shape in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the description as JSON values."""
        return {
            "parts": [[name, list(shape)] for name, shape in self.parts],
            "nodes": [node.to_dict() for node in self.nodes],
            "output": self.output,
            "dim": self.dim,
            "trainable": list(self.trainable),
            "opset": self.opset,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Description:
        """Return the description that `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: An entry is missing, unknown or of a wrong type.
        """
        if unknown := set(values) - {"parts", "nodes", "output", "dim", "trainable", "opset"}:
            raise ValueError(f"unknown entries {sorted(unknown)}")
        if len(values["nodes"]) > MAX_NODES:
            raise ValueError(f"{len(values['nodes'])} operators, but at most {MAX_NODES} are allowed")
        nodes = []
        for node in values["nodes"]:
            attributes = {_text(key): _attribute(value) for key, value in dict(node["attributes"]).items()}
            nodes.append(Node(_text(node["operator"]), _texts(node["inputs"]), _texts(node["outputs"]), attributes))
        return cls(
            parts=tuple((_text(name), tuple(map(_count, shape))) for name, shape in values["parts"]),
            nodes=tuple(nodes),
            output=_text(values["output"]),
            dim=_count(values["dim"]),
            trainable=_texts(values["trainable"]),
            opset=_count(values["opset"]),
        )


@dataclass(frozen=True)
class TailState:
    """A tail at rest: its description and its tensors by name, weights and constants."""

    description: Description
    tensors: Mapping[str, np.ndarray]

    def to_bytes(self) -> bytes:
        """Serialise as a safetensors file."""
        return files.tensor_bytes(self.tensors, {"schema": SCHEMA, "tail": self.description.to_dict()})

    @classmethod
    def from_bytes(cls, data: bytes, what: str) -> TailState:
        """Parse what `to_bytes` made, and check that it can be run.

        Args:
            data: Content of the file.
            what: Name of the file for the error message.

        Raises:
            BundleRefusedError: The file is damaged, too large, or describes something that cannot be run.
        """
        if len(data) > MAX_BYTES:
            raise BundleRefusedError(f"{what} has {len(data):,} bytes, but a tail has at most {MAX_BYTES:,}")
        tensors, metadata = files.parse_tensors(data, what)
        try:
            if metadata.get("schema") != SCHEMA:
                raise ValueError(f"its schema is {metadata.get('schema')!r:.40}, but {SCHEMA} is needed")
            state = cls(Description.from_dict(metadata["tail"]), tensors)
            Tail(state)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleRefusedError(f"{what} is no tail of a backbone: {first_line(error)}; restore it") from error
        return state


class Tail(nn.Module):
    """The tail of a backbone; trains the weights and biases of its products.

    Trainable are the tensors of convolutions and matrix products, the biases that are added behind them, and scale and
    shift of batch normalisation: most exporters fold these two into the convolution, so files with and without folding
    learn alike. Statistics stay as they are.

    Args:
        state: Description and tensors; the tensors are copied.

    Attributes:
        description: What it computes.
        hidden: Width of each hidden layer by name: an activation behind a product of channels that did not narrow,
            and the input of the next. That is the filtered expansion of an inverted residual block, the hidden layer of
            a feed-forward network, the inner map of a residual block.

    Raises:
        ValueError: The description cannot be run with these tensors.
    """

    def __init__(self, state: TailState) -> None:
        super().__init__()
        self.description = description = state.description
        self._steps = _steps(description, state.tensors)
        self.trained = nn.ParameterList(nn.Parameter(_tensor(state.tensors[name])) for name in description.trainable)
        self._frozen = {name: array for name, array in state.tensors.items() if name not in description.trainable}
        self._constants = [name for name, array in self._frozen.items() if array.dtype.kind == "f"]
        for index, name in enumerate(self._constants):
            self.register_buffer(f"constant_{index}", _tensor(self._frozen[name]), persistent=False)
        shapes = self._shapes()
        self._products, self._axes = _layers(self._steps, shapes, state.tensors)
        self.hidden = {name: shapes[name][axis] for name, axis in self._axes.items()}

    def forward(self, vectors: Tensor, hidden: Hidden | None = None, inputs: Watch | None = None) -> Tensor:
        """Return the raw features ``(N, D)`` of vectors ``(N, T)``.

        Args:
            vectors: Output of the trunk.
            hidden: Gets each hidden layer, channels on axis 1, and returns the value that is used in its place.
            inputs: Gets the input of each product with weights, channels on axis 1.
        """
        values = {**self._tensors(), **self._parts(vectors)}
        for step in self._steps:
            output = step.node.outputs[0]
            if inputs is not None and output in self._products:
                weights, name, axis = self._products[output]
                inputs(weights, values[name].movedim(axis, 1))
            step.run(values)
            if hidden is not None and output in self._axes:
                axis = self._axes[output]
                values[output] = hidden(output, values[output].movedim(axis, 1)).movedim(1, axis)
            for name in step.last:
                del values[name]
        return values[self.description.output]

    def state(self) -> TailState:
        """Return the tail as it is now."""
        trained = zip(self.description.trainable, self.trained, strict=True)
        arrays = {name: tensor.detach().float().cpu().contiguous().numpy().copy() for name, tensor in trained}
        return TailState(self.description, {**self._frozen, **arrays})

    def _tensors(self) -> dict[str, Tensor]:
        """Return weights and constants by name."""
        constants = {name: getattr(self, f"constant_{index}") for index, name in enumerate(self._constants)}
        return {**constants, **dict(zip(self.description.trainable, self.trained, strict=True))}

    def _parts(self, vectors: Tensor) -> dict[str, Tensor]:
        """Return the values in the vectors by name."""
        parts = torch.split(vectors, list(self.description.sizes), 1)
        named = zip(self.description.parts, parts, strict=True)
        # a third faster on a CPU than channels first
        layouts = {3: torch.channels_last}
        return {
            name: part.reshape(-1, *shape).contiguous(memory_format=layouts.get(len(shape), torch.contiguous_format))
            for (name, shape), part in named
        }

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Run the tail on two empty images, and return the shape of every value and tensor.

        Every step is bounded before it runs: the description may come from a stranger. (Tensors without content would
        do as well, but with them PyTorch loads its compiler: two seconds and 100 MB.)

        Raises:
            ValueError: It does not run, gives other features than described, or needs too much memory or time.
        """
        values = self._tensors()
        total, work = sum(self.description.sizes), 0
        check_numbers(total, "its input")
        values.update(self._parts(torch.zeros(2, total)))
        with torch.no_grad():
            for step in self._steps:
                label = f"{step.node.operator} '{step.node.outputs[0]}'"
                try:
                    numbers, products = _bounds(step, [tuple(values[name].shape) for name in step.operands])
                    work += products
                    check_numbers(numbers // 2, f"the output of {label}")
                    if work > 2 * MAX_PRODUCTS:
                        raise ValueError(f"more than {MAX_PRODUCTS:,} multiplications for an image")
                    step.run(values)
                except Exception as error:  # PyTorch's errors have no common class
                    raise ValueError(f"{label} does not run ({first_line(error)[:200]})") from error
        if (shape := tuple(values[self.description.output].shape)) != (2, self.description.dim):
            raise ValueError(f"its output for two images is {shape}, but should be (2, {self.description.dim})")
        return {name: tuple(value.shape) for name, value in values.items()}


@dataclass(frozen=True)
class _Step:
    """A node that runs.

    Attributes:
        node: See `Node`.
        operands: Its inputs that are tensors; omitted ones and integers are not.
        function: Computes the outputs.
        last: Values that no later node reads.
    """

    node: Node
    operands: tuple[str, ...]
    function: Function
    last: tuple[str, ...]

    def run(self, values: dict[str, Tensor]) -> None:
        """Add the outputs to the values."""
        result = self.function([values[name] for name in self.operands])
        if len(self.node.outputs) == 1:
            values[self.node.outputs[0]] = result
        else:
            values.update(zip(self.node.outputs, result, strict=True))


def _tensor(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.array(array, np.float32))
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _bounds(step: _Step, shapes: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    """Return upper bounds on the numbers that a step gives, and on the multiplications of its product."""
    operator, attributes = step.node.operator, step.node.attributes
    first, *others = shapes
    if operator in ("Add", "Div", "Mul", "Sub"):
        return math.prod(np.broadcast_shapes(*shapes)), 0
    if operator in ("MatMul", "Gemm"):
        columns = others[0][0] if attributes.get("transB") else others[0][-1]
        product = (*np.broadcast_shapes(first[:-2], others[0][:-2]), *first[-2:-1], columns)
        return math.prod(np.broadcast_shapes(product, *others[1:])), math.prod(product) * first[-1]
    if operator == "Conv":  # which bounds its numbers itself, as do the others that widen borders
        return 0, math.prod(first[:1] + first[2:]) * math.prod(others[0])
    return sum(map(math.prod, shapes)), 0


def _steps(description: Description, tensors: Mapping[str, np.ndarray]) -> tuple[_Step, ...]:
    """Make the functions of all nodes.

    Raises:
        ValueError: The nodes, names and tensors do not fit together, or an operator is unknown.
    """
    for name, array in tensors.items():
        if array.dtype not in (np.float32, np.int64):
            raise ValueError(f"the tensor '{name}' is {array.dtype}, but must be float32 or int64")
    trainable = set(description.trainable)
    if len(trainable) != len(description.trainable):
        raise ValueError("a trainable tensor is named twice")
    for name in description.trainable:
        if name not in tensors or tensors[name].dtype != np.float32:
            raise ValueError(f"the trainable tensor '{name}' is missing or not float32")
    known = {*tensors, *(name for name, _ in description.parts)}
    if not description.parts or len(known) != len(tensors) + len(description.parts):
        raise ValueError("its parts need different names, and at least one")
    remaining = Counter(name for node in description.nodes for name in node.inputs)
    if unused := set(tensors) - set(remaining):
        raise ValueError(f"no operator uses the tensor '{min(unused)}'")
    kept = {*tensors, description.output}
    steps = []
    for node in description.nodes:
        if node.operator not in OPERATORS:
            raise ValueError(f"the operator '{node.operator}' is unknown")
        if not node.outputs or (len(node.outputs) > 1 and node.operator != "Split"):
            raise ValueError(f"{node.operator} has {len(node.outputs)} outputs")
        for name in node.inputs:
            if name and name not in known:
                raise ValueError(f"{node.operator} needs '{name}', which is missing")
        for name in node.outputs:
            if not name or name in known:
                raise ValueError(f"'{name}' is computed twice, or has no name")
            known.add(name)
        operands = [name for name in node.inputs if name and (name not in tensors or tensors[name].dtype.kind == "f")]
        if not operands:
            raise ValueError(f"{node.operator} '{node.outputs[0]}' has no input")
        remaining.subtract(node.inputs)
        last = {name for name in (*node.inputs, *node.outputs) if name and not remaining[name]} - kept
        function = OPERATORS[node.operator](Operation(node, tensors, description.opset))
        steps.append(_Step(node, tuple(operands), function, tuple(last)))
    if not any(description.output in node.outputs for node in description.nodes):
        raise ValueError(f"no operator gives the output '{description.output}'")
    return tuple(steps)


def _layers(
    steps: Sequence[_Step], shapes: Mapping[str, Sequence[int]], tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, tuple[str, str, int]], dict[str, int]]:
    """Find the products with weights, and the hidden layers between them.

    Returns:
        For the output of each product the names of its weights and its input, and the axis of the input's channels;
        for each hidden layer the axis of its channels.
    """
    products: dict[str, tuple[str, str, int]] = {}
    axes: dict[str, int] = {}
    roots = {name: name for name in tensors}  # of tensors, and of those that are transposed before they are used
    # For each value that one widening product gave, operators on single numbers aside: that product, and if there was
    # an activation.
    behind: dict[str, tuple[str, bool]] = {}
    for step in steps:
        node, output = step.node, step.node.outputs[0]
        data = [name for name in step.operands if name not in roots]
        if not data:
            roots[output] = roots[step.operands[0]]
            continue
        if node.operator in PRODUCTS and len(data) == 1 and (weights := [n for n in step.operands if n in roots]):
            (value,) = data
            axis = 1 if node.operator == "Conv" else len(shapes[value]) - (1 if step.operands[0] == value else 2)
            products[output] = roots[weights[0]], value, axis
            if node.operator == "Conv" and shapes[weights[0]][1] == 1 < shapes[value][1]:  # filters each channel
                if value in behind:
                    behind[output] = behind[value]
                continue
            if behind.get(value, ("", False))[1]:
                axes[value] = axis
            if shapes[output][axis] >= shapes[value][axis]:
                behind[output] = output, False
            continue
        if node.operator == "Mul":  # a gate with one number for a channel has no say
            data = [name for name in data if shapes[name] == shapes[output]] or data
        found = [behind[name] for name in data if name in behind]
        alike = len({product for product, _ in found}) == 1
        if len(found) == len(data) and node.operator in ELEMENTWISE and (alike or node.operator == "Mul"):
            active = node.operator in ACTIVATIONS or any(active for _, active in found)
            behind.update(dict.fromkeys(node.outputs, (found[0][0], active)))
    return products, axes


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no name")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r:.40} is no list of names")
    return tuple(map(_text, values))


def _count(value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{value!r:.40} is no size")
    return value


def _attribute(value: Any) -> Attribute:
    if type(value) in (int, float, str):
        found: Attribute = value
        return found
    if not isinstance(value, list) or not all(type(item) in (int, float) for item in value):
        raise TypeError(f"{value!r:.40} is no attribute")
    return tuple(value)
