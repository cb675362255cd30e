"""Parse and check a user's ONNX file, and remove everything that a backbone does not need.

Error messages are written to follow "backbone.name=onnx:FILE: ".
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssd_edge import files
from ssd_edge.errors import InputError

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from onnx import GraphProto, ModelProto, ValueInfoProto

MAX_BYTES = 2**31 - 2**20  # protobuf's limit of 2 GiB, less preprocessing and standardisation
OPSETS = range(13, 21)  # TensorRT 10.3 (JetPack 6) supports up to 20; below 13, axes are attributes
OPSET = 18  # written by our own export; models with unsupported opsets are converted to it
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml"})
CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})  # and any other operator with a graph inside
_PREFIX = "backbone/"
_SHOWN = 300  # characters of another library's error message


def read(path: str | Path) -> bytes:
    """Read an ONNX file.

    Raises:
        InputError: The file is missing, a folder, or over 2 GiB.
    """
    path = Path(path)
    if files.is_file(path):
        _check_bytes(path.stat().st_size)  # before reading it
    return files.read_bytes(path)


def parse(data: bytes, allow_control_flow: bool = False) -> ModelProto:
    """Parse a model, convert it to a supported opset, inline functions, drop metadata and prefix names by `backbone/`.

    Args:
        data: The file.
        allow_control_flow: Accept loops and branches, whose cost nothing bounds.

    Raises:
        InputError: The model is invalid, or has external data, custom operators or control flow.
    """
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import inliner

    _check_bytes(len(data))
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise InputError("it is not an ONNX file, or was cut short") from error
    if not model.graph.node:  # most short files parse as an empty message
        raise InputError("it is not an ONNX file, or an empty one: it has no operators")
    for tensor in messages_of(model, onnx.TensorProto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise InputError(
                f"its weights ('{tensor.name}') are in another file, but a backbone must be one file; "
                "export it again with external_data=False"
            )
    try:
        if model.functions:
            model = inliner.inline_local_functions(model)
        _check_domains(model)
        if not allow_control_flow:
            _check_control_flow(model)
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, RuntimeError) as error:  # RuntimeError: from the inliner
        raise InputError(f"it is not a valid ONNX model ({short(error)})") from error
    model = _with_supported_opset(model)
    model.ClearField("training_info")
    model.graph.ClearField("quantization_annotation")  # refers to values by name; no runtime uses it
    strip(model)
    _prefix_names(model.graph)
    return model


def strip(model: ModelProto) -> None:
    """Remove documentation, metadata and inferred shapes, which contain source paths and a fixed batch size."""
    for message in _messages(model):
        for field in ("doc_string", "metadata_props", "value_info"):
            if field in message.DESCRIPTOR.fields_by_name:
                message.ClearField(field)


def precision(data: bytes) -> str:
    """Return the narrowest precision in which a valid model computes: ``int8``, ``fp16`` or ``fp32``."""
    import onnx

    return model_precision(onnx.ModelProto.FromString(data))


def model_precision(model: ModelProto) -> str:
    """Return the `precision` of a parsed model."""
    import onnx

    if any(node.op_type == "DequantizeLinear" for node in messages_of(model, onnx.NodeProto)):
        return "int8"
    narrow = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in messages_of(model, onnx.TensorProto))
    return "fp16" if narrow else "fp32"


def opset(data: bytes) -> int:
    """Return the version of the standard operators in a valid model."""
    import onnx

    versions = onnx.ModelProto.FromString(data).opset_import
    return next(int(entry.version) for entry in versions if entry.domain in ("", "ai.onnx"))


def interface(graph: GraphProto) -> tuple[ValueInfoProto, ValueInfoProto]:
    """Return copies of the only input and the only output of a parsed graph.

    Raises:
        InputError: There is more than one, or the type is neither float32 nor float16.
    """
    import onnx

    weights = {tensor.name for tensor in graph.initializer}  # before IR version 4 also listed as inputs
    inputs = [value for value in graph.input if value.name not in weights]
    for kind, values in (("input", inputs), ("output", graph.output)):
        if len(values) != 1:
            listed = ", ".join(map(describe, values)) or "none"
            raise InputError(f"it has {len(values)} {kind}s, but a backbone has one: {listed}")
        if element_type(values[0]) not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
            raise InputError(f"its {kind} must be float32 or float16, but is {describe(values[0])}")
    return copy.deepcopy(inputs[0]), copy.deepcopy(graph.output[0])


def check_input(image: ValueInfoProto, size: int, layout: str) -> None:
    """Check the declared input against the configuration.

    Raises:
        InputError: The input does not have rank 4, three channels and the configured size.
    """
    height, width = _sides(image, layout)
    if height not in (None, size) or width not in (None, size):
        raise InputError(f"its input is {describe(image)}, but backbone.size is {size} (images are square)")


def side(image: ValueInfoProto, layout: str) -> int:
    """Return the side of the declared input.

    Raises:
        InputError: The input does not have rank 4 and three channels, or states no size.
    """
    height, _ = _sides(image, layout)
    if height is None:
        raise InputError("backbone.size is missing; set it to the side of its input in pixels")
    return height


def _sides(image: ValueInfoProto, layout: str) -> tuple[int | None, int | None]:
    """Return the declared height and width of the input, None if unknown."""
    dims = _dims(image)
    if len(dims) != 4:
        raise InputError(f"its input must be images, of rank 4, but is {describe(image)}")
    channels = {"nchw": 1, "nhwc": 3}
    if dims[channels[layout]] not in (None, 3):
        other = "nhwc" if layout == "nchw" else "nchw"
        advice = f"; set backbone.layout={other}" if dims[channels[other]] == 3 else ""
        raise InputError(
            f"its input must have 3 channels, but is {describe(image)} with backbone.layout={layout}{advice}"
        )
    height, width = dims[2:] if layout == "nchw" else dims[1:3]
    return height, width


def element_type(value: ValueInfoProto) -> int:
    """Return the `onnx.TensorProto.DataType` of a value."""
    return value.type.tensor_type.elem_type


def _dims(value: ValueInfoProto) -> list[int | None]:
    """Return the dimensions, None if unknown."""
    return [dim.dim_value or None for dim in value.type.tensor_type.shape.dim]


def describe(value: ValueInfoProto) -> str:
    """Describe a value, e.g. ``'x' float32 (?, 3, 224, 224)``."""
    import onnx

    kind = onnx.TensorProto.DataType.Name(element_type(value)).lower()
    shape = ", ".join("?" if dim is None else str(dim) for dim in _dims(value))
    return f"'{value.name.removeprefix(_PREFIX)}' {'float32' if kind == 'float' else kind} ({shape})"


def short(error: BaseException) -> str:
    """Return the error message of another library on one line, cut to a length."""
    return " ".join(str(error).split())[:_SHOWN]


def _messages(message: Message) -> Iterator[Message]:
    """Yield a protobuf message and all messages in it, including subgraphs in attributes."""
    from google.protobuf.message import Message

    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if isinstance(value, Message) else value:
                yield from _messages(inner)


def messages_of(model: Message, kind: type) -> Iterator[Any]:
    """Yield all messages of a class (node, graph or tensor) in a model, graph or node, including those in subgraphs."""
    return (message for message in _messages(model) if isinstance(message, kind))


def _check_bytes(size: int) -> None:
    if size > MAX_BYTES:
        raise InputError(f"it has {size:,} bytes, but at most {MAX_BYTES:,} (2 GiB) are supported")


def _check_domains(model: ModelProto) -> None:
    """Check that the model has only standard ONNX operators, because TensorRT supports no others."""
    import onnx

    nodes = list(messages_of(model, onnx.NodeProto))
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in nodes if node.domain not in DOMAINS})
    if foreign:
        some = ", ".join(foreign[:5])
        raise InputError(f"it uses custom operators ({some}); export it with standard ONNX operators only")
    used = {node.domain for node in nodes} | {"", "ai.onnx"}
    kept = [
        entry for entry in model.opset_import if entry.domain in used
    ]  # exporters import more domains than they use
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _check_control_flow(model: ModelProto) -> None:
    import onnx

    nodes = messages_of(model, onnx.NodeProto)
    graphs = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    found = {
        node.op_type
        for node in nodes
        if node.op_type in CONTROL_FLOW or any(attribute.type in graphs for attribute in node.attribute)
    }
    if found:
        raise InputError(
            f"it has control flow ({', '.join(sorted(found))}), which may never end; export it without, or set "
            "backbone.allow_control_flow=true if you trust it"
        )


def _with_supported_opset(model: ModelProto) -> ModelProto:
    from onnx import version_converter

    version = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if version in OPSETS:
        return model
    try:
        return version_converter.convert_version(model, OPSET)
    except Exception as error:  # the C++ code has no common error class
        raise InputError(
            f"its opset {version} is not one of {OPSETS[0]} to {OPSETS[-1]}, and it cannot be converted to {OPSET} "
            f"({short(error)}); export it with opset {OPSET}"
        ) from error


def _prefix_names(graph: GraphProto) -> None:
    """Prefix every name in a graph and its subgraphs, so that none collides with the nodes that `compose` adds."""
    import onnx

    named = (onnx.NodeProto, onnx.GraphProto, onnx.TensorProto, onnx.ValueInfoProto)
    for message in _messages(graph):
        if isinstance(message, onnx.NodeProto):
            for names in (message.input, message.output):
                names[:] = [name and _PREFIX + name for name in names]  # an empty name is an omitted optional input
        if isinstance(message, named) and message.name:
            message.name = _PREFIX + message.name
