"""Precisions of a backbone's graph: their limits, and the conversion from fp32.

The precision is part of the graph and not an engine flag: TensorRT 11 has no such flags, and ONNX Runtime can then run
the same computation as TensorRT. Preprocessing (nodes `before/…`), means of levels (`levels/…`) and standardisation
(`after/…`) stay in fp32; pixels are uint8 and embeddings float32.

fp16 does not use `onnxruntime.transformers.float16`, which rounds every value to float16, even between two operators
kept in fp32: standardised features would be rounded and the variance in a decomposed LayerNorm would overflow. It also
leaves the nodes unsorted.

int8 uses `onnxruntime.quantization` with MinMax calibration. On the shipped ResNet-9 (250 calibration images of
CIFAR-10, 1,024 others for testing) the smallest cosine is .994 with MinMax, .996 with the 99.999th percentile, .987
with entropy and .974 with the 99.99th percentile; MinMax is robust, and its memory does not grow with the number of
images. Outputs are quantised as well as inputs, because a CPU otherwise has no integer kernel for the pair (one image
on one EPYC thread: 0.96 ms; 2.2 ms with inputs only; 1.6 ms in fp32). The last matrix product is not quantised: with
it, the smallest cosine of a network with squeeze and excitation was .944, without it .998.

What all images have in common of the error that is left is measured on the calibration images and goes into μ. On
EfficientNet-Lite0 (64 photographs of groceries, 120 others for testing) the smallest cosine rises from .968 to .970,
and with levels, where the means of an early map move by several deviations, from .741 to .982.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssd_edge import files, ort
from ssd_edge.backbones import onnx_file
from ssd_edge.backbones.onnx import INPUT, LEVELS, NO_LEVELS, batch_size, finish, open_session, run
from ssd_edge.errors import InputError, require
from ssd_edge.images import Pixels, decode, image_files

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto
    from onnxruntime.quantization import CalibrationDataReader

MIN_CALIBRATION_IMAGES = 16
_PURPOSE = "convert a backbone"
_OURS = ("before/", "levels/", "after/")

# The expensive operators: always in float16; GPU kernels accumulate in fp32.
_HEAVY = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# In float16 after an operator in float16, otherwise in fp32: the sums, squares, roots and exponentials of a
# normalisation or softmax overflow or underflow in float16, and values between them must not be rounded either. fmt:
# off
_LIGHT = frozenset(
    {
        "Abs",
        "Add",
        "BatchNormalization",
        "Clip",
        "Concat",
        "DepthToSpace",
        "Div",
        "Dropout",
        "Elu",
        "Erf",
        "Expand",
        "Flatten",
        "Gather",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "LeakyRelu",
        "Max",
        "MaxPool",
        "Min",
        "Mish",
        "Mul",
        "Neg",
        "PRelu",
        "Pad",
        "Relu",
        "Reshape",
        "Selu",
        "Sigmoid",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Sub",
        "Sum",
        "Tanh",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Where",
    }
)
# fmt: on
_LOST = 1e-3  # allowed relative error of a constant in float16: twice that of rounding
# Softmax, normalisations, global pooling, additions and products of two activations (attention) stay in fp32.
_QUANTISED = ("Conv", "Gemm", "MatMul", "Relu", "Clip", "MaxPool")
_WEIGHTED = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Limits:
    """Allowed differences between an exported graph and its reference.

    Differences and shifts are in standard deviations of the reference, over all its dimensions.

    Attributes:
        min_cosine: Smallest cosine of the two embeddings of an image.
        max_difference: Largest difference of a single value.
        p99_difference: 99th percentile of the differences of single values.
        min_agreement: Share of equal decisions.
        max_accuracy_drop: Drop of the accuracy.
        max_mean_shift: Largest shift of the mean of a dimension.
        max_spread: Largest ratio of the two standard deviations of a dimension.
    """

    min_cosine: float
    max_difference: float
    p99_difference: float
    min_agreement: float
    max_accuracy_drop: float
    max_mean_shift: float
    max_spread: float


@dataclass(frozen=True)
class Precision:
    """A precision of a backbone's graph.

    Attributes:
        name: Name on the command line, in manifests and in the files of targets.
        limits: Allowed differences from the embeddings of the run.
        convert: Function from an fp32 graph and calibration images to a graph in this precision.
        calibrated: True if `convert` needs calibration images.
        overflow: Advice for a graph that gives NaN or infinity, as a parenthesis.
    """

    name: str
    limits: Limits
    convert: Callable[[bytes, np.ndarray | None], bytes]
    calibrated: bool = False
    overflow: str = ""


def get(name: str) -> Precision:
    """Return the precision with this name.

    Raises:
        InputError: The name is unknown.
    """
    for precision in PRECISIONS:
        if precision.name == name:
            return precision
    raise InputError(f"unknown precision '{name}'; known: {', '.join(names())}")


def names() -> list[str]:
    """Return the names of all precisions, the widest first."""
    return [precision.name for precision in PRECISIONS]


def convert(onnx_bytes: bytes, precision: str, calibration: np.ndarray | None = None) -> bytes:
    """Convert the graph of a backbone to another precision.

    Args:
        onnx_bytes: Result of `export_package` or `compose`.
        precision: One of `names`.
        calibration: Typical images, uint8 RGB ``(N, size, size, 3)``, for a precision that is calibrated.

    Raises:
        InputError: The graph is narrower than fp32 already or cannot be converted, or calibration images are missing.
        EnvironmentUnfitError: onnx or onnxruntime is missing.
    """
    wanted = get(precision)
    found = onnx_file.precision(onnx_bytes)
    if found == precision:
        return onnx_bytes
    if found != FP32.name:
        raise InputError(
            f"the backbone is {found} itself and cannot be made {precision}: rounding cannot be undone; "
            "export it again in fp32, or leave it as it is"
        )
    if wanted.calibrated and calibration is None:
        raise InputError(
            f"{precision} needs images to calibrate with; name a folder of at least {MIN_CALIBRATION_IMAGES} typical "
            "images"
        )
    return wanted.convert(onnx_bytes, calibration)


def calibration_images(folder: Path, pixels: Pixels, limit: int) -> np.ndarray:
    """Load at most `limit` images of a folder and its subfolders, evenly spaced in the order of their paths.

    Images that cannot be decoded are replaced by others.

    Returns:
        uint8 RGB ``(N, size, size, 3)``.

    Raises:
        InputError: The folder does not exist, or has fewer than 16 images that can be decoded.
    """
    paths = image_files([folder])
    first = np.unique(np.linspace(0, len(paths) - 1, min(limit, len(paths))).astype(np.int64))
    others = np.setdiff1d(np.arange(len(paths)), first)
    images: dict[int, np.ndarray] = {}
    for index in [*first, *others]:
        if len(images) == limit:
            break
        with contextlib.suppress(InputError):
            images[index] = decode(files.read_bytes(paths[index]), str(paths[index]), pixels)
    _check_count(len(images), f"{folder} ({len(paths)} files)")
    return np.stack([images[index] for index in sorted(images)])


def _check_count(count: int, where: str) -> None:
    if count < MIN_CALIBRATION_IMAGES:
        raise InputError(
            f"int8 needs at least {MIN_CALIBRATION_IMAGES} images to calibrate with, but {where} gives {count}; "
            "add typical images"
        )


def to_fp16(onnx_bytes: bytes) -> bytes:
    """Convert the network in a graph to float16.

    Matrix products, convolutions and the operators between them are in float16. Normalisations, softmax and sums over
    positions stay in fp32, and so does every operator with a constant that float16 cannot represent.

    Raises:
        InputError: The graph has control flow, values of unknown type, or no convolution or matrix product.
        EnvironmentUnfitError: onnx is missing.
    """
    onnx = require("onnx", "export", _PURPOSE)
    single, half = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    model = _parse(onnx_bytes)
    graph = model.graph
    types = element_types(model)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    narrow: set[str] = set()  # values that are float16
    converted: set[str] = set()  # values that have a cast or a second constant
    nodes: list[NodeProto] = []

    def in_type(value: str, kind: int) -> str:
        """Return a value in a type, adding a cast or a rounded constant on first use."""
        if types.get(value) != single or (value in narrow) == (kind == half):
            return value
        name = f"{value}/{'half' if kind == half else 'single'}"
        if name not in converted:
            converted.add(name)
            if value in constants:
                graph.initializer.append(onnx.numpy_helper.from_array(constants[value].astype(np.float16), name))
            else:
                nodes.append(onnx.helper.make_node("Cast", [value], [name], name=name, to=kind))
        return name

    with np.errstate(over="ignore"):  # `_holds` rejects constants that overflow
        for node in graph.node:
            wanted = half if _may_be_half(node, types, narrow, constants) else single
            for index, value in enumerate(node.input):
                node.input[index] = in_type(value, wanted)
            if wanted == half:
                narrow.update(value for value in node.output if types.get(value) == single)
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(graph)
    result = _finish(model)
    if onnx_file.precision(result) != "fp16":
        raise InputError("the backbone cannot be made fp16: it has no weights that float16 can represent; use fp32")
    return result


def _may_be_half(node: NodeProto, types: dict[str, int], narrow: set[str], constants: dict[str, np.ndarray]) -> bool:
    """Return True if the float32 inputs and outputs of a node may be float16."""
    floats = [value for value in node.input if types.get(value) == 1]  # TensorProto.FLOAT
    activations = [value for value in floats if value not in constants]
    if not activations or node.name.startswith(_OURS):
        return False
    square = node.op_type == "Mul" and len(set(node.input)) == 1
    light = node.op_type in _LIGHT and not square and all(value in narrow for value in activations)
    return (light or node.op_type in _HEAVY) and all(_holds(constants[v]) for v in floats if v in constants)


def _holds(constant: np.ndarray) -> bool:
    """Return True if float16 can represent a constant: no value overflows, and no small scale becomes zero."""
    rounded = constant.astype(np.float16).astype(np.float32)
    finite = np.isfinite(constant)
    if not np.array_equal(finite, np.isfinite(rounded)):
        return False
    error = np.linalg.norm((rounded - constant)[finite])
    return bool(error <= _LOST * np.linalg.norm(constant[finite]))


def to_int8(onnx_bytes: bytes, images: np.ndarray | None) -> bytes:
    """Quantise the network in a graph, in the form that TensorRT's parser supports.

    Weights are int8 with one scale per channel, activations int8 with one scale, all symmetric, between QuantizeLinear
    and DequantizeLinear. Biases stay float32. The mean of the embeddings stays that of the fp32 graph. The same images
    give the same bytes.

    Args:
        onnx_bytes: A graph in fp32.
        images: uint8 RGB ``(N, size, size, 3)``, which determine the ranges of all activations.

    Raises:
        InputError: There are too few images or they have the wrong shape, or nothing in the graph can be quantised.
        EnvironmentUnfitError: onnx or onnxruntime is missing.
    """
    quantization = ort.load("export", _PURPOSE, "onnxruntime.quantization")

    model = _parse(onnx_bytes)
    images = np.empty(0, np.uint8) if images is None else images
    _check_count(len(images), "the calibration set")
    session = open_session(onnx_bytes)
    taken = tuple(session.get_inputs()[0].shape[1:])
    if images.dtype != np.uint8 or images.shape[1:] != taken:
        raise InputError(
            f"calibration images must be uint8 of shape {taken}, but are {images.dtype} {images.shape[1:]}; "
            "decode them at the backbone's size"
        )
    chosen = _to_quantise(model)
    # prevents advice on stderr to preprocess the model
    model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "int8.onnx")
        try:
            quantization.quantize_static(
                model,
                path,
                _reader(images, batch_size(session)),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=list(_QUANTISED),
                nodes_to_quantize=chosen,
                per_channel=True,
                activation_type=quantization.QuantType.QInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=quantization.CalibrationMethod.MinMax,
                # TensorRT supports neither int32 biases nor zero points
                extra_options={"QuantizeBias": False, "ActivationSymmetric": True, "WeightSymmetric": True},
            )
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise InputError(
                f"the backbone cannot be made int8 ({onnx_file.short(error)}); use fp16 or fp32"
            ) from error
        quantised = _parse(files.read_bytes(path))
    if (mean := _standardisation(quantised)) is not None:
        before, after = (run(open_session(data), images) for data in (onnx_bytes, quantised.SerializeToString()))
        _shift(*mean, after.mean(0, dtype=np.float64) - before.mean(0, dtype=np.float64))
    return _finish(quantised)


def _standardisation(model: ModelProto) -> tuple[TensorProto, TensorProto] | None:
    """Return the constants μ and σ of a graph, None if it gives raw features."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = {node.op_type: node for node in model.graph.node if node.name.startswith("after/")}
    if not {"Sub", "Div"} <= nodes.keys():
        return None
    return constants[nodes["Sub"].input[1]], constants[nodes["Div"].input[1]]


def _shift(mu: TensorProto, sigma: TensorProto, error: np.ndarray) -> None:
    """Change μ so that embeddings lose an error that all of them have."""
    import onnx

    moved = onnx.numpy_helper.to_array(mu) + error * onnx.numpy_helper.to_array(sigma)
    if np.isfinite(moved).all():  # else the comparison of the graphs says what is wrong
        mu.CopyFrom(onnx.numpy_helper.from_array(moved.astype(np.float32), mu.name))


def _to_quantise(model: ModelProto) -> list[str]:
    """Return the nodes to quantise: products with constant weights, and operators that pass int8 values on."""
    weights = {tensor.name for tensor in model.graph.initializer}
    kept = _last_products(model, weights)
    chosen = []
    weighted = False
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"backbone/{index}/{node.op_type}"
        if node.name.startswith(_OURS) or node.op_type not in _QUANTISED or node.output[0] in kept:
            continue
        if node.op_type in _WEIGHTED:
            if node.input[1] not in weights:
                continue
            weighted = True
        chosen.append(node.name)
    if not weighted:
        raise InputError(
            "the backbone cannot be made int8: it has no convolution, and no matrix product except the last; use fp32"
        )
    return chosen


def _last_products(model: ModelProto, weights: set[str]) -> set[str]:
    """Return the outputs of matrix products that give one vector per image with no other product before the embedding.

    They are cheap, but their rounding errors would go into the embedding directly.
    """
    import onnx

    values = onnx.shape_inference.infer_shapes(model).graph.value_info
    vectors = {value.name for value in values if len(value.type.tensor_type.shape.dim) == 2}
    makers = {value: node for node in model.graph.node for value in node.output}
    found, seen, waiting = set(), set(), [model.graph.output[0].name]
    while waiting:
        value = waiting.pop()
        if value in seen or value not in makers:
            continue
        seen.add(value)
        node = makers[value]
        if node.op_type not in _WEIGHTED or node.input[1] not in weights:
            waiting.extend(node.input)
        elif value in vectors:
            found.add(value)
    return found


def _reader(images: np.ndarray, batch: int) -> CalibrationDataReader:
    """Return calibration data in the form that ONNX Runtime expects."""
    base: Any = ort.load("export", _PURPOSE, "onnxruntime.quantization").CalibrationDataReader

    class Reader(base):  # type: ignore[misc]  # the package has no types
        def __init__(self) -> None:
            self.parts: Iterator[np.ndarray] = (images[i : i + batch] for i in range(0, len(images), batch))

        def get_next(self) -> dict[str, np.ndarray] | None:
            part = next(self.parts, None)
            return None if part is None else {INPUT: part}

    return Reader()


def _parse(onnx_bytes: bytes) -> ModelProto:
    """Parse a model and turn all its constants into initializers.

    Raises:
        InputError: The model has control flow.
    """
    onnx = require("onnx", "export", _PURPOSE)
    model: ModelProto = onnx.ModelProto.FromString(onnx_bytes)
    kept = []
    for node in model.graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise InputError(
                f"the backbone has control flow ({node.op_type}) and cannot be converted; use fp32, or export it "
                "without control flow"
            )
        value = next((entry for entry in node.attribute if entry.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(value.t)
            tensor.name = node.output[0]
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


def element_types(model: ModelProto) -> dict[str, int]:
    """Return the element type of every value in a model.

    Raises:
        InputError: The type of a value cannot be inferred.
    """
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model)
    types: dict[str, int] = {}
    for graph in onnx_file.messages_of(inferred, onnx.GraphProto):
        for value in [*graph.input, *graph.output, *graph.value_info]:
            types[value.name] = onnx_file.element_type(value)
        types.update((tensor.name, tensor.data_type) for tensor in graph.initializer)
    nodes = list(onnx_file.messages_of(model, onnx.NodeProto))
    unknown = [value for node in nodes for value in node.output if value and not types.get(value)]
    if unknown:
        raise InputError(f"the type of '{unknown[0]}' in the backbone cannot be inferred; use fp32, or export it again")
    return types


def _drop_unused(graph: GraphProto) -> None:
    used = {value for node in graph.node for value in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _finish(model: ModelProto) -> bytes:
    """Copy the labels of the original graph and serialise the model."""
    labels = {entry.key: entry.value for entry in model.metadata_props}
    used = {node.domain or "ai.onnx" for node in model.graph.node}
    kept = [entry for entry in model.opset_import if (entry.domain or "ai.onnx") in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    del model.metadata_props[:]
    levels = {key: labels[key] for key in (LEVELS, NO_LEVELS) if key in labels}
    return finish(model, labels["identity"], Pixels.from_dict(labels), int(labels["dim"]), levels)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the quantiser's advice, and the handler that its first message would add to the root logger."""
    root, handler = logging.getLogger(), logging.NullHandler()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)


FP32 = Precision(
    "fp32",
    Limits(
        min_cosine=0.9999,
        max_difference=5e-4,
        p99_difference=1e-4,
        min_agreement=0.99,
        max_accuracy_drop=0.01,
        max_mean_shift=1e-4,
        max_spread=1.0005,
    ),
    convert=lambda graph, calibration: graph,
)
FP16 = Precision(
    "fp16",
    Limits(
        min_cosine=0.9995,
        max_difference=0.05,
        p99_difference=0.015,
        min_agreement=0.99,
        max_accuracy_drop=0.01,
        max_mean_shift=0.01,
        max_spread=1.01,
    ),
    convert=lambda graph, calibration: to_fp16(graph),
    overflow="float16 ends at 65,504: use fp32",
)
INT8 = Precision(
    "int8",
    Limits(
        min_cosine=0.975,
        max_difference=1.5,
        p99_difference=0.3,
        min_agreement=0.95,
        max_accuracy_drop=0.01,
        max_mean_shift=0.12,
        max_spread=1.2,
    ),
    convert=to_int8,
    calibrated=True,
)
PRECISIONS = (FP32, FP16, INT8)  # the widest first
