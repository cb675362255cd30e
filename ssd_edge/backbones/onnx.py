"""A user's own backbone: one ONNX file, composed with preprocessing and standardisation into one graph.

`compose` makes what the workstation and the device run:

    uint8 RGB (N, size, size, 3) → pixels normalised → the user's network → (f − μ)/σ → float32 (N, D)

Preprocessing and standardisation are in fp32, whatever the network's precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssd_edge import files
from ssd_edge.backbones import onnx_file
from ssd_edge.config import BackboneConfig
from ssd_edge.errors import InputError, require
from ssd_edge.learners.priors import Priors
from ssd_edge.system import EXACT_INT8

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto
    from onnxruntime import InferenceSession

SCHEMA = "ssd-edge-backbone/1"  # of the model's metadata
INPUT, EMBEDDINGS, FEATURES = "images", "embeddings", "features"
MAX_BATCH = 32
_BATCH_PIXELS = 2**21  # 32 images of 256×256: some backbones take 100 times the memory of their input
_PURPOSE = "use a backbone as an ONNX file"

# (operator, constants after its first input, attributes)
Step = tuple[str, tuple[np.ndarray, ...], dict[str, Any]]


class OnnxEmbedder:
    """An `Embedder`: raw features of the user's network, by ONNX Runtime on the CPU.

    Args:
        config: its `onnx`, `size`, `mean`, `std` and `layout`.

    Raises:
        InputError: the file cannot be read or used; see `compose`.
        EnvironmentUnfitError: onnx or onnxruntime is not installed.
    """

    def __init__(self, config: BackboneConfig) -> None:
        preprocessing = (config.size, config.mean, config.std, config.layout)
        try:
            data = onnx_file.read(config.onnx)
            self._session = open_session(compose(data, *preprocessing))
        except InputError as error:
            raise InputError(f"backbone.onnx={config.onnx}: {error}") from error
        self.identity = identity(data, *preprocessing)
        self.size = config.size
        self.dim = int(self._session.get_outputs()[0].shape[1])
        self.standardised = False
        self.priors = Priors()
        self.provenance: dict[str, Any] = {
            "kind": "onnx",
            "file": Path(config.onnx).name,
            "sha256": files.sha256(data),
            "mean": list(config.mean),
            "std": list(config.std),
            "layout": config.layout,
            "batch": "one image" if batch_size(self._session) == 1 else "dynamic",
            "terms": "those of its author; SSD-Edge does not know them",
        }

    def embed(self, images: np.ndarray) -> np.ndarray:
        """uint8 RGB ``(N, size, size, 3)`` → raw features, float32 ``(N, D)``."""
        return run(self._session, images)


def identity(model_bytes: bytes, size: int, mean: Sequence[float], std: Sequence[float], layout: str) -> str:
    """A short digest of everything that decides the features."""
    preprocessing = {"size": size, "mean": list(mean), "std": list(std), "layout": layout}
    return files.sha256(files.json_bytes({"model": files.sha256(model_bytes), **preprocessing}))[:16]


def open_session(model: bytes) -> InferenceSession:
    """A model in ONNX Runtime, on the CPU.

    Raises:
        EnvironmentUnfitError: onnxruntime is not installed.
    """
    runtime = require("onnxruntime", "export", _PURPOSE)
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, and need not be printed as well
    options.add_session_config_entry(*EXACT_INT8)
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def batch_size(session: InferenceSession) -> int:
    """How many images to give at a time: 1 if the graph takes exactly one, else some, fewer of large ones."""
    batch, size, *_ = session.get_inputs()[0].shape
    return 1 if isinstance(batch, int) else min(MAX_BATCH, max(2, _BATCH_PIXELS // size**2))


def run(session: InferenceSession, images: np.ndarray, batch: int | None = None) -> np.ndarray:
    """Run uint8 images ``(N, size, size, 3)``, `batch` (else `batch_size`) at a time; returns ``(N, D)``."""
    step = batch or batch_size(session)
    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: images[start : start + step]})[0] for start in range(0, len(images), step)]
    return np.concatenate(parts) if parts else np.zeros((0, session.get_outputs()[0].shape[1]), np.float32)


def compose(
    model_bytes: bytes,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    layout: str,
    mu: np.ndarray | None = None,
    sigma: np.ndarray | None = None,
    name: str = "",
) -> bytes:
    """Preprocessing, the user's network and standardisation as one self-contained ONNX model.

    The batch becomes dynamic, also where the file declares a fixed one, if two images together give the
    features that each gives alone. Else the result takes exactly one image.

    Args:
        model_bytes: one float32 or float16 input of rank 4; one output ``(N, D)``, ``(N, D, 1, 1)`` or
            ``(N, 1, 1, D)``.
        size: side of its input in pixels.
        mean: a channel, of pixels in 0..1.
        std: a channel.
        layout: ``nchw`` or ``nhwc``, of its input.
        mu: ``(D,)``, mean of the features; without mu and sigma raw features are given.
        sigma: ``(D,)``, their standard deviation.
        name: identity of the backbone for the metadata; else the one of `identity`.

    Returns:
        A model with the input `images`, uint8 ``(batch, size, size, 3)``, and the output `embeddings`, or
        `features` without standardisation, float32 ``(batch, D)``.

    Raises:
        InputError: in one sentence, why this file cannot be a backbone.
        EnvironmentUnfitError: onnx or onnxruntime is not installed.
    """
    onnx = require("onnx", "export", _PURPOSE)
    if (mu is None) != (sigma is None):
        raise ValueError("mu and sigma go together")
    require("onnxruntime", "export", _PURPOSE)  # here, because `_probe` takes every later error for the file's
    helper, types = onnx.helper, onnx.TensorProto
    model = onnx_file.parse(model_bytes)
    graph = model.graph
    image, output = onnx_file.interface(graph)
    onnx_file.check_input(image, size, layout)
    _check_normalisation(mean, std)

    body = list(graph.node)
    del graph.node[:], graph.input[:], graph.output[:]
    graph.input.append(helper.make_tensor_value_info(INPUT, types.UINT8, ["batch", size, size, 3]))
    graph.output.append(helper.make_tensor_value_info(output.name, onnx_file.element_type(output), None))
    before: list[Step] = [
        ("Cast", (), {"to": types.FLOAT}),
        ("Div", (np.array(255, np.float32),), {}),
        ("Sub", (np.array(mean, np.float32),), {}),
        ("Div", (np.array(std, np.float32),), {}),
    ]
    if layout == "nchw":
        before.append(("Transpose", (), {"perm": [0, 3, 1, 2]}))
    if onnx_file.element_type(image) == types.FLOAT16:
        before.append(("Cast", (), {"to": types.FLOAT16}))
    graph.node.extend([*_chain(graph, INPUT, image.name, before, "before"), *body])
    batch: str | int = "batch"
    try:
        shape = _probe(model, image, together=True)
    except InputError:
        batch = graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        shape = _probe(model, image, together=False)

    dim = _check_features(shape)
    after: list[Step] = []
    if onnx_file.element_type(output) == types.FLOAT16:
        after.append(("Cast", (), {"to": types.FLOAT}))
    if len(shape) == 4:
        after.append(("Flatten", (), {"axis": 1}))
    if mu is not None and sigma is not None:
        if mu.shape != (dim,) or sigma.shape != (dim,):
            raise InputError(f"it gives {dim} features, but mu and sigma have the shapes {mu.shape} and {sigma.shape}")
        after += [("Sub", (mu.astype(np.float32),), {}), ("Div", (sigma.astype(np.float32),), {})]
    result = FEATURES if mu is None else EMBEDDINGS
    graph.node.extend(_chain(graph, output.name, result, after or [("Identity", (), {})], "after"))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(result, types.FLOAT, [batch, dim]))
    try:
        return finish(model, name or identity(model_bytes, size, mean, std, layout), size, dim)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InputError(f"its shapes or types contradict each other ({onnx_file.short(error)})") from error


def finish(model: ModelProto, name: str, size: int, dim: int) -> bytes:
    """Label a backbone's graph, check it and serialise it: the same bytes for the same graph.

    Args:
        model: with one input and one output; changed in place.
        name: identity of the backbone.
        size: side of its input in pixels.
        dim: D of its output.

    Raises:
        onnx.checker.ValidationError: it is not valid.
        onnx.shape_inference.InferenceError: a shape or type in it is wrong.
    """
    import onnx

    onnx_file.strip(model)
    (output,) = model.graph.output
    properties = {
        "schema": SCHEMA,
        "identity": name,
        "size": str(size),
        "dim": str(dim),
        "layout": "NHWC",
        "colour_order": "RGB",
        "output": output.name,
        "precision": onnx_file.model_precision(model),
    }
    onnx.helper.set_model_props(model, properties)
    # the oldest version that has the opset, for the sake of older runtimes on devices
    model.ir_version = onnx.helper.find_min_ir_version_for(list(model.opset_import))
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def _check_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise InputError(f"backbone.{key} needs 3 values, one a channel, but has {len(values)}: {list(values)}")
    if not all(value > 0 for value in std):
        raise InputError(f"backbone.std must be above 0 in every channel, but is {list(std)}")


def _chain(graph: GraphProto, source: str, target: str, steps: Sequence[Step], name: str) -> list[NodeProto]:
    """Nodes from the value `source` to the value `target`, one a step; their constants go into the graph."""
    from onnx import helper, numpy_helper

    nodes = []
    for index, (operator, constants, attributes) in enumerate(steps):
        label = f"{name}/{index}/{operator}"
        output = target if index + 1 == len(steps) else label
        inputs = [source]
        for constant in constants:
            inputs.append(f"{label}/constant")
            graph.initializer.append(numpy_helper.from_array(constant, inputs[-1]))
        nodes.append(helper.make_node(operator, inputs, [output], name=label, **attributes))
        source = output
    return nodes


def _probe(model: ModelProto, image: ValueInfoProto, together: bool) -> tuple[int, ...]:
    """Run two random images, each alone and also `together`; returns the shape of one image's output.

    Raises:
        InputError: it does not run, or gives NaN, or something else a second time or in company.
    """
    size = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    try:
        session = open_session(model.SerializeToString())
        first, second, again = (session.run(None, {INPUT: images[[index]]})[0] for index in (0, 1, 0))
        pair = session.run(None, {INPUT: images})[0] if together else None
    except Exception as error:  # ONNX Runtime's errors have no common base
        raise InputError(
            f"it does not run on one image of {size}×{size} (its input is {onnx_file.describe(image)}; "
            f"{onnx_file.short(error)})"
        ) from error
    if not np.isfinite(first).all() or not np.isfinite(second).all():
        raise InputError("it gives NaN or infinity for an image of random pixels; check its weights and precision")
    if not np.array_equal(first, again):
        raise InputError("it gives different outputs for the same image; export it in evaluation mode, without dropout")
    if pair is not None:
        # Loose: in float16 rounding differs with the batch. What mixes images up differs entirely.
        tolerance = 0.01 * max(np.abs(first).max(initial=0), np.abs(second).max(initial=0))
        alike = pair.shape == (2, *first.shape[1:]) and first.shape == second.shape
        if not alike or np.abs(pair - np.concatenate([first, second])).max(initial=0) > tolerance:
            raise InputError("it gives different outputs for an image when another one is beside it")
    return first.shape


def _check_features(shape: tuple[int, ...]) -> int:
    """D of one image's output."""
    vector = len(shape) == 2 or (len(shape) == 4 and (shape[2:] == (1, 1) or shape[1:3] == (1, 1)))
    if not vector or shape[0] != 1 or 0 in shape:
        raise InputError(
            f"its output must be one vector an image, (1, D), but is {shape}; cut it after its global average pooling"
        )
    return int(np.prod(shape[1:]))
