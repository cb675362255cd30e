"""Cut the ONNX graph of a backbone into a frozen trunk and a trainable tail, and write a trained tail back into it.

    images uint8 (N, size, size, 3) → trunk → vectors (N, T) → tail → raw features (N, D)

A graph is cut at a value through which every path passes. The vectors are the pooled levels before it and the value
itself, flattened.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ssd_edge.adaptation.operators import OPERATORS, PRODUCTS, Attribute, Node
from ssd_edge.adaptation.tail import SCHEMA, VECTORS, Description, Tail, TailState
from ssd_edge.backbones import onnx_file
from ssd_edge.backbones.levels import PREFIX, trunk
from ssd_edge.backbones.onnx import INPUT, LEVELS, compose_apart, finish, open_session
from ssd_edge.errors import InputError, first_line, require

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

    from ssd_edge.backbones.graph import NetworkGraph

CUT = "cut"  # in the metadata of a trunk: value, width and side
LARGEST = 3_000_000  # weights in a tail, unless a place is given: 12 MB in float32
_BACKBONE = "backbone/"  # before the names of the network's own values in a composed graph
_BATCHES = (2, 3)
_VIEWS = frozenset({"Cast", "Identity", "Transpose"})  # of weights
_WIDENED = 2  # see `levels`
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 2e-2  # of the largest feature; with float16 in the graph
_ADVICE = "this network can be used without adaptation"


@dataclasses.dataclass(frozen=True)
class Place:
    """A value at which a network can be cut.

    Attributes:
        value: Its name in the composed graph.
        shape: Its shape without the batch: a map ``(C, side, side)`` or ``(side, side, C)``, or tokens ``(L, C)``.
        weights: Number of weights and biases behind it.
    """

    value: str
    shape: tuple[int, ...]
    weights: int

    @property
    def width(self) -> int:
        """Number of channels."""
        return self.shape[0] if len(self.shape) == 3 and self.shape[1] == self.shape[2] else self.shape[-1]

    @property
    def positions(self) -> int:
        """Number of pixels of the map, or of tokens."""
        return int(np.prod(self.shape)) // self.width

    @property
    def level(self) -> str:
        """Width and side of a map, as ``192@7``, or width and number of tokens."""
        return f"{self.width}@{self.shape[1] if len(self.shape) == 3 else self.shape[0]}"

    def __str__(self) -> str:
        return f"{self.value.removeprefix(_BACKBONE)} ({self.level}, {self.weights / 1e6:.2f} M weights behind it)"


@dataclasses.dataclass(frozen=True)
class Cut:
    """A network in two parts.

    Attributes:
        place: Where it was cut.
        trunk: ONNX model from images, uint8 ``(N, size, size, 3)``, to vectors, float32 ``(N, T)``.
        tail: From vectors to the raw features ``(N, D)`` of the network.
    """

    place: Place
    trunk: bytes
    tail: TailState


def places(graph: NetworkGraph) -> tuple[Place, ...]:
    """Return the places at which a network can be cut, the earliest first: the outputs of its blocks.

    Of the values between two products on the trunk it is the last, unless it is widened.

    Raises:
        InputError: The network cannot be used, or cannot be cut.
        EnvironmentUnfitError: onnx or onnxruntime is not installed.
    """
    return _places(_Composed(graph))


def cut(graph: NetworkGraph, at: str | None = None) -> Cut:
    """Cut a network.

    Args:
        graph: The network.
        at: A value of the graph, or a level as ``192@7``, of which the earliest value is taken. Without it, the
            earliest place of the smallest maps with at most `LARGEST` weights behind it; without one, the last place.

    Raises:
        InputError: The network cannot be used or not be cut there, or has an operator that a tail cannot have.
        EnvironmentUnfitError: onnx or onnxruntime is not installed.
    """
    network = _Composed(graph)
    found = _places(network)
    place = _default(found) if at is None else _named(found, at)
    parts = _parts(network, place)
    state = _tail(network, place, parts)
    vectors = _trunk(network, place, list(parts))
    _compare(network, vectors, state)
    return Cut(place, vectors, state)


def with_weights(graph: NetworkGraph, tail: Tail | TailState) -> NetworkGraph:
    """Return a network with the weights of its trained tail; everything else stays as it is.

    Args:
        graph: The network that was cut.
        tail: Its tail.

    Raises:
        InputError: The tail is not one of this network.
    """
    onnx = require("onnx", "export", "write a tail into its network")
    state = tail.state() if isinstance(tail, Tail) else tail
    model = onnx.ModelProto.FromString(graph.model)
    stored = _stored(model)
    for name in state.description.trainable:
        tensor, values = stored.get(name.removeprefix(_BACKBONE)), state.tensors[name]
        if tensor is None or tuple(tensor.dims) != values.shape:
            has = "no such tensor" if tensor is None else f"one of shape {tuple(tensor.dims)}"
            raise InputError(
                f"the tail has a tensor '{name.removeprefix(_BACKBONE)}' of shape {values.shape}, but the network "
                f"{graph.name} has {has}; take the network that was cut"
            )
        kind = onnx.numpy_helper.to_array(tensor).dtype
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(kind), tensor.name))
    card = {**graph.card, "adapted": {"from": graph.identity, "tensors": len(state.description.trainable)}}
    return dataclasses.replace(graph, model=model.SerializeToString(deterministic=True), card=card)


def tail_onnx(state: TailState, changeable: bool = False) -> bytes:
    """Return a tail as an ONNX model from `vectors`, float32 ``(N, T)``, to its output ``(N, D)``.

    Args:
        state: The tail.
        changeable: Make the trainable tensors inputs as well, which a session may be given by name in place of those in
            the model: so a device runs tails that it trained without the package onnx.
    """
    onnx = require("onnx", "export", "write a tail as an ONNX file")
    helper, types, description = onnx.helper, onnx.TensorProto, state.description
    tensors = {**state.tensors, "parts/axis": np.array([1])}
    nodes, start = [], 0
    for index, ((name, shape), size) in enumerate(zip(description.parts, description.sizes, strict=True)):
        label = f"parts/{index}"
        constants = {"start": [start], "end": [start + size], "shape": [-1, *shape]}
        tensors |= {f"{label}/{key}": np.array(value) for key, value in constants.items()}
        nodes += [
            helper.make_node("Slice", [VECTORS, f"{label}/start", f"{label}/end", "parts/axis"], [label]),
            helper.make_node("Reshape", [label, f"{label}/shape"], [name]),
        ]
        start += size
    for node in description.nodes:
        nodes.append(helper.make_node(node.operator, node.inputs, node.outputs, **node.attributes))
    graph = helper.make_graph(
        nodes,
        "tail",
        [
            helper.make_tensor_value_info(VECTORS, types.FLOAT, ["batch", start]),
            *(
                helper.make_tensor_value_info(name, types.FLOAT, tensors[name].shape)
                for name in (description.trainable if changeable else ())
            ),
        ],
        [helper.make_tensor_value_info(description.output, types.FLOAT, ["batch", description.dim])],
        [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    opsets = [helper.make_opsetid("", description.opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))
    helper.set_model_props(model, {"schema": SCHEMA})
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


class _Composed:
    """The composed graph of a network, from images to raw features.

    Attributes:
        source: The network.
        model: Its composed graph.
        nodes: The nodes that lead to the features.
        makers: The node that gives each value.
        stored: Tensors with content, by name.
        seen: Values that depend on the content of the images.

    Raises:
        InputError: The network cannot be used, or takes only one image at a time.
    """

    def __init__(self, source: NetworkGraph) -> None:
        settings = (source.pixels, source.mean, source.std, source.layout, source.allow_control_flow, source.levels)
        try:
            composed = compose_apart(source.model, *settings)
        except InputError as error:
            raise InputError(f"backbone.name={source.name}: {error}") from error
        from onnx import ModelProto

        self.source, self.model = source, ModelProto.FromString(composed)
        graph = self.model.graph
        if graph.input[0].type.tensor_type.shape.dim[0].dim_value:
            raise InputError(f"{source.name} takes only one image at a time and cannot be cut; {_ADVICE}")
        self.output: str = graph.output[0].name
        needed, nodes = {self.output}, []
        for node in reversed(graph.node):
            if needed.intersection(node.output):
                needed.update(node.input)
                nodes.append(node)
        self.nodes: list[NodeProto] = nodes[::-1]
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.stored = _stored(self.model)
        self.seen = self.reached(INPUT)

    def reached(self, value: str) -> set[str]:
        """Return the values that depend on the content of a value."""
        found = {value}
        for node in self.nodes:
            if node.op_type not in ("Shape", "Size") and found.intersection(node.input):
                found.update(name for name in node.output if name)
        return found - {value}

    def root(self, name: str) -> str:
        """Return the stored tensor of which a value is a view, or the value itself."""
        while name in self.makers and self.makers[name].op_type in _VIEWS and name not in self.seen:
            name = self.makers[name].input[0]
        return name

    def measure(
        self, shapes: Sequence[str], values: Sequence[str], batch: int
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, np.ndarray]]:
        """Run the graph on black images, and return the shapes of some values and the content of others."""
        from onnx import ModelProto, TensorProto, ValueInfoProto, helper

        copy = ModelProto()
        copy.CopyFrom(self.model)
        graph, size = copy.graph, self.source.pixels.size
        del graph.output[:]
        for index, name in enumerate(shapes):
            graph.node.append(helper.make_node("Shape", [name], [f"{PREFIX}shape/{index}"]))
            graph.output.append(helper.make_tensor_value_info(f"{PREFIX}shape/{index}", TensorProto.INT64, [None]))
        graph.output.extend(ValueInfoProto(name=name) for name in values)
        if not graph.output:
            return {}, {}
        session = open_session(copy.SerializeToString())
        found = session.run(None, {INPUT: np.zeros((batch, size, size, 3), np.uint8)})
        measured = [tuple(map(int, shape)) for shape in found[: len(shapes)]]
        return dict(zip(shapes, measured, strict=True)), dict(zip(values, found[len(shapes) :], strict=True))


def _stored(model: ModelProto) -> dict[str, TensorProto]:
    """Return the tensors in a model by name: initializers, and those of Constant nodes."""
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    found[node.output[0]] = attribute.t
    return found


def _places(network: _Composed) -> tuple[Place, ...]:
    from onnx import GraphProto

    graph = GraphProto()
    graph.CopyFrom(network.model.graph)
    if network.output != (features := f"{PREFIX}features") and features in network.makers:
        graph.output[0].name = features  # without the joined levels, which every path but one bypasses
    names, ends = trunk(graph)
    last: dict[int, str] = {}  # of the values between two products
    products = 0
    on_trunk = set(names) - ends
    for node in network.nodes:
        products += node.op_type in PRODUCTS
        for name in on_trunk.intersection(node.output):
            last[products] = name
    shapes, _ = network.measure(list(last.values()), (), 2)
    found = []
    for name, (batch, *shape) in shapes.items():
        tokens, map_ = len(shape) == 2, len(shape) == 3 and shape[1] in (shape[0], shape[2])
        if batch == 2 and (tokens or map_) and np.prod(shape) > max(shape):
            found.append(Place(name, tuple(shape), _weights_behind(network, name)))
    places = [place for place in _narrow(found) if place.weights]
    if not places:
        raise InputError(f"{network.source.name} has no map or tokens through which every path passes; {_ADVICE}")
    return tuple(places)


def _narrow(found: Sequence[Place]) -> list[Place]:
    """Leave out places inside blocks, which are wider than their size and the next one explain; see `levels`."""
    sizes = [list(group) for _, group in itertools.groupby(found, lambda place: place.positions)]
    narrowest = [min(place.width for place in group) for group in sizes]
    kept: list[Place] = []
    for index, group in enumerate(sizes):
        limit = max([_WIDENED * narrowest[index], *narrowest[index + 1 : index + 2]])
        kept += [place for place in group if place.width <= limit]
    return kept


def _weights_behind(network: _Composed, value: str) -> int:
    behind = network.reached(value) | {value}
    names = {
        network.root(name)
        for node in network.nodes
        if node.op_type in PRODUCTS and behind.intersection(node.input)
        for name in node.input
    }
    return sum(math.prod(network.stored[name].dims) for name in names & set(network.stored))


def _default(found: Sequence[Place]) -> Place:
    smallest = min(place.positions for place in found)
    return next((p for p in found if p.positions == smallest and p.weights <= LARGEST), found[-1])


def _named(found: Sequence[Place], at: str) -> Place:
    for place in found:
        if at in (place.value, place.value.removeprefix(_BACKBONE), place.level):
            return place
    raise InputError(f"the network cannot be cut at '{at}'; its places are {', '.join(map(str, found))}")


def _parts(network: _Composed, place: Place) -> dict[str, tuple[int, ...]]:
    """Return the values that a tail takes, levels first, with their shapes without the batch."""
    behind = network.reached(place.value)
    crossing = [
        name
        for node in network.nodes
        if behind.intersection(node.output)
        for name in node.input
        if name in network.seen and name not in behind and name != place.value
    ]
    shapes, _ = network.measure(list(dict.fromkeys(crossing)), (), 2)
    if any(len(shape) != 2 for shape in shapes.values()):
        raise InputError(f"the network cannot be cut at {place}: maps bypass it; {_ADVICE}")
    return {**{name: shape[1:] for name, shape in shapes.items()}, place.value: place.shape}


def _tail(network: _Composed, place: Place, parts: Mapping[str, tuple[int, ...]]) -> TailState:
    """Describe the nodes behind a place.

    Raises:
        InputError: An operator, or what it is used with, is not supported.
    """
    behind = network.reached(place.value)
    nodes = [node for node in network.nodes if behind.intersection(node.output)]
    for node in nodes:
        if node.op_type not in OPERATORS:
            raise InputError(
                f"{network.source.name} cannot be cut at {place}: the operator {node.op_type} behind it cannot be "
                f"trained here; cut it later, or leave it: {_ADVICE}"
            )
    trainable = _trainable(network, nodes, behind)
    views = _views(network, nodes, set(trainable))
    inner = behind | set(parts) | {name for node in views for name in node.output}
    constants = _constants(network, [*views, *nodes], inner)
    described = []
    read = {name for node in network.nodes for name in node.input} | {network.output}
    for node in (*views, *nodes):
        inputs = list(node.input)
        if node.op_type == "Reshape":
            inputs[1] = _shape_of(node)
        outputs = [name for name in node.output if name in read]
        if node.op_type == "Split":
            outputs = [name or f"{node.output[0]}/unused/{index}" for index, name in enumerate(node.output)]
        described.append(Node(node.op_type, tuple(inputs), tuple(outputs), _attributes(node)))
    description = Description(
        parts=tuple(parts.items()),
        nodes=tuple(described),
        output=network.output,
        dim=network.model.graph.output[0].type.tensor_type.shape.dim[1].dim_value,
        trainable=trainable,
        opset=next(int(entry.version) for entry in network.model.opset_import if entry.domain in ("", "ai.onnx")),
    )
    used = {name for node in described for name in node.inputs}
    return TailState(description, {name: array for name, array in constants.items() if name in used})


def _trainable(network: _Composed, nodes: Sequence[NodeProto], behind: set[str]) -> tuple[str, ...]:
    """Return the stored tensors that training may change: those of products and batch normalisation behind the cut.

    Tensors that the trunk uses as well are left out.
    """
    inside = {id(node) for node in nodes}
    found: list[str] = []
    outputs: set[str] = set()  # of products
    for node in nodes:
        given = [network.root(name) for name in node.input]
        if node.op_type in PRODUCTS:
            found += given
            outputs.update(node.output)
        elif node.op_type == "BatchNormalization":
            found += given[1:3]
        elif node.op_type == "Add" and outputs.intersection(node.input):
            found += [name for name in given if name in network.stored and math.prod(network.stored[name].dims) > 1]
    elsewhere = {
        network.root(name)
        for node in network.nodes
        if id(node) not in inside and not (node.op_type in _VIEWS and node.output[0] not in network.seen)
        for name in node.input
    }
    return tuple(dict.fromkeys(name for name in found if name in network.stored and name not in elsewhere))


def _views(network: _Composed, nodes: Sequence[NodeProto], trainable: set[str]) -> list[NodeProto]:
    """Return the nodes that transpose or convert trainable tensors before they are used."""
    names = [name for node in nodes for name in node.input if name not in trainable and network.root(name) in trainable]
    needed = set()
    while names:
        name = names.pop()
        if name not in trainable:
            needed.add(name)
            names.append(network.makers[name].input[0])
    return [node for node in network.nodes if needed.intersection(node.output)]


def _shape_of(node: NodeProto) -> str:
    return f"{node.output[0]}/shape"


def _constants(network: _Composed, nodes: Sequence[NodeProto], inner: set[str]) -> dict[str, np.ndarray]:
    """Return the content of all inputs of nodes that do not depend on the images, and the shapes that Reshape gives.

    Raises:
        InputError: Something else depends on the number of images, or has an unusual type.
    """
    from onnx import numpy_helper

    reshapes = {node.output[0]: _shape_of(node) for node in nodes if node.op_type == "Reshape"}
    names: set[str] = set()
    for node in nodes:
        names.update(node.input[:1] if node.op_type == "Reshape" else node.input)
    names -= inner | {""}
    found = {name: numpy_helper.to_array(tensor) for name, tensor in network.stored.items()}
    computed = sorted(names - set(found))
    (shapes, few), (others, more) = (network.measure(list(reshapes), computed, batch) for batch in _BATCHES)
    for name in computed:
        if not np.array_equal(few[name], more[name]):
            raise InputError(f"'{name}' behind the cut depends on the number of images; {_ADVICE}")
    for name, shape in shapes.items():
        pairs = zip(shape, others[name], strict=True)
        found[reshapes[name]] = np.array([side if side == other else -1 for side, other in pairs], np.int64)
    found.update(few)
    constants: dict[str, np.ndarray] = {}
    for name in sorted(names | set(reshapes.values())):
        kind = found[name].dtype.kind
        if kind == "f":
            constants[name] = found[name].astype(np.float32)
        elif kind == "i":
            constants[name] = found[name].astype(np.int64)
        else:
            raise InputError(f"'{name}' behind the cut is {found[name].dtype}, not a number; {_ADVICE}")
    return constants


def _attributes(node: NodeProto) -> dict[str, Attribute]:
    from onnx import helper

    found: dict[str, Attribute] = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            found[attribute.name] = value.decode(errors="replace")
        elif isinstance(value, (int, float)):
            found[attribute.name] = value
        else:
            found[attribute.name] = tuple(value)
    return found


def _trunk(network: _Composed, place: Place, parts: Sequence[str]) -> bytes:
    """Return the model from images to the joined parts."""
    from onnx import ModelProto, TensorProto, helper

    model = ModelProto()
    model.CopyFrom(network.model)
    graph, label = model.graph, f"{PREFIX}{CUT}"
    value = parts[-1]
    added = []
    if onnx_file.model_precision(model) == "fp16":
        added.append(helper.make_node("Cast", [value], [f"{label}/Cast"], name=f"{label}/Cast", to=TensorProto.FLOAT))
        value = f"{label}/Cast"
    flat = f"{label}/Flatten" if parts[:-1] else VECTORS
    added.append(helper.make_node("Flatten", [value], [flat], name=f"{label}/Flatten", axis=1))
    if parts[:-1]:
        added.append(helper.make_node("Concat", [*parts[:-1], flat], [VECTORS], name=f"{label}/Concat", axis=1))
    needed, kept = set(parts), []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    nodes = [*kept[::-1], *added]
    tensors = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:], graph.initializer[:], graph.output[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)
    numbers = math.prod(place.shape)
    labels = {entry.key: entry.value for entry in network.model.metadata_props}
    before = labels[LEVELS].split()[: len(parts) - 1] if LEVELS in labels else []
    size = sum(int(level.partition("@")[0]) for level in before) + numbers
    graph.output.append(helper.make_tensor_value_info(VECTORS, TensorProto.FLOAT, ["batch", size]))
    found = {CUT: f"{place.value} {place.level}", LEVELS: " ".join([*before, str(numbers)])}
    return finish(model, network.source.identity, network.source.pixels, size, found)


def _compare(network: _Composed, vectors: bytes, state: TailState) -> None:
    """Check on random images that trunk and tail give the features of the network.

    Raises:
        InputError: They do not, or the tail does not run.
    """
    size, name = network.source.pixels.size, network.source.name
    images = {INPUT: np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)}
    expected = open_session(network.model.SerializeToString()).run(None, images)[0]
    given = open_session(vectors).run(None, images)[0]
    try:
        with torch.inference_mode():
            found = Tail(state)(torch.from_numpy(given)).numpy()
    except (ValueError, RuntimeError) as error:
        raise InputError(f"the tail of {name} does not run ({first_line(error)}); {_ADVICE}") from error
    narrow = onnx_file.model_precision(network.model) == "fp16"
    limit = (_HALF_TOLERANCE if narrow else _TOLERANCE) * float(np.abs(expected).max())
    if not (difference := float(np.abs(found - expected).max())) <= limit:
        raise InputError(
            f"the features of the tail of {name} differ by {difference:.2g} from those of ONNX Runtime, but at most "
            f"{limit:.2g} is allowed; cut it later, or leave it: {_ADVICE}"
        )
