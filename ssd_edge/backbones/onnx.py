"""A backbone as an ONNX file, combined with preprocessing and standardisation into one graph.

`compose` makes the graph that workstation and device run:

    uint8 RGB (N, size, size, 3) → normalised pixels → the network → (f − μ)/σ → float32 (N, D)

The features f may join several levels, see `levels`. Preprocessing, the means of levels and standardisation are in
fp32, whatever the precision of the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ssd_edge import ort
from ssd_edge.backbones import onnx_file
from ssd_edge.backbones.levels import PREFIX, Choice, NoLevelsError, find, join
from ssd_edge.errors import InputError, require
from ssd_edge.images import Pixels
from ssd_edge.ort import apart
from ssd_edge.system import EXACT_INT8

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto
    from onnxruntime import InferenceSession

    from ssd_edge.backbones.graph import NetworkGraph

SCHEMA = "ssd-edge-backbone/1"  # in the metadata of the model
# Metadata about levels, as "16@112 24@56 1280": widths and sides, the features last; or why there are none.
LEVELS, NO_LEVELS = "levels", "no_levels"
INPUT, EMBEDDINGS, FEATURES = "images", "embeddings", "features"
MAX_BATCH = 32
_BATCH_PIXELS = 2**21  # 32 images of 256×256: some backbones use 100 times the memory of their input
_PURPOSE = "use a backbone as an ONNX file"

# (operator, constants after its first input, attributes)
Step = tuple[str, tuple[np.ndarray, ...], dict[str, Any]]


class OnnxEmbedder:
    """An `Embedder` that runs a network's graph with ONNX Runtime on the CPU and returns raw features.

    Args:
        graph: The network and its preprocessing.
        threads: Threads of ONNX Runtime; 0: one per core.

    Raises:
        InputError: The graph cannot be used; see `compose`.
        EnvironmentUnfitError: onnx or onnxruntime is not installed.
    """

    def __init__(self, graph: NetworkGraph, threads: int = 0) -> None:
        from ssd_edge.learners.priors import Priors  # imports PyTorch, which the child of `compose_apart` does not need

        self.graph: NetworkGraph | None = graph
        self.pixels, self.identity = graph.pixels, graph.identity
        try:
            self._session = open_session(
                compose_apart(
                    graph.model,
                    self.pixels,
                    graph.mean,
                    graph.std,
                    graph.layout,
                    graph.allow_control_flow,
                    graph.levels,
                ),
                threads,
            )
        except InputError as error:
            raise InputError(f"backbone.name={graph.name}: {error}") from error
        self.dim = int(self._session.get_outputs()[0].shape[1])
        self.widths = widths(self._session)
        labels = self._session.get_modelmeta().custom_metadata_map
        self.standardised = False
        self.priors = Priors()
        self.provenance: dict[str, Any] = {
            **graph.card,
            "mean": list(graph.mean),
            "std": list(graph.std),
            "layout": graph.layout,
            "levels": labels.get(LEVELS) or f"features alone: {labels.get(NO_LEVELS, 'backbone.levels is last')}",
            "batch": "one image" if batch_size(self._session) == 1 else "dynamic",
        }

    def embed(self, images: np.ndarray) -> np.ndarray:
        """Return the raw features, float32 ``(N, D)``, of uint8 RGB images ``(N, size, size, 3)``."""
        return run(self._session, images)


def open_session(model: bytes, threads: int = 0) -> InferenceSession:
    """Open a model in ONNX Runtime on the CPU.

    Args:
        model: The file.
        threads: Threads of an operator; 0: one per core.

    Raises:
        EnvironmentUnfitError: onnxruntime is not installed.
    """
    runtime = ort.load("export", _PURPOSE)
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors are raised anyway
    options.intra_op_num_threads = threads
    options.add_session_config_entry(*EXACT_INT8)
    session: InferenceSession = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session


def batch_size(session: InferenceSession) -> int:
    """Return the batch size: 1 if the graph accepts only one image, otherwise more, depending on the image size."""
    batch, size, *_ = session.get_inputs()[0].shape
    return 1 if isinstance(batch, int) else min(MAX_BATCH, max(2, _BATCH_PIXELS // size**2))


def run(session: InferenceSession, images: np.ndarray, batch: int | None = None) -> np.ndarray:
    """Run uint8 images ``(N, size, size, 3)`` in batches of `batch` or `batch_size`, and return ``(N, D)``."""
    step = batch or batch_size(session)
    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: images[start : start + step]})[0] for start in range(0, len(images), step)]
    return np.concatenate(parts) if parts else np.zeros((0, session.get_outputs()[0].shape[1]), np.float32)


def widths(session: InferenceSession) -> tuple[int, ...]:
    """Return the widths of the levels that a composed model joins, its features last; they add up to D."""
    labels = session.get_modelmeta().custom_metadata_map
    if LEVELS not in labels:
        return (int(session.get_outputs()[0].shape[1]),)
    return tuple(int(level.partition("@")[0]) for level in labels[LEVELS].split())


def stated_size(model_bytes: bytes, layout: str, allow_control_flow: bool) -> int:
    """Return the side of the input that a model states, read in a child process as in `compose_apart`.

    Raises:
        InputError: The model cannot be used, or its input may have any size.
    """
    require("onnx", "export", _PURPOSE)
    options = {"layout": layout, "allow_control_flow": allow_control_flow}
    model = {"model": np.frombuffer(model_bytes, np.uint8)}
    try:
        found = apart.call(f"{__name__}:_stated_size", model, options, len(model_bytes), apart.memory_limit())
    except apart.Stopped as error:
        raise InputError(f"it {error} when it was read; use a smaller network or more memory") from error
    return int(found["size"])


def _stated_size(arrays: apart.Arrays, options: Mapping[str, Any]) -> apart.Arrays:
    """Do the work of `stated_size` in the child."""
    model = onnx_file.parse(arrays["model"].tobytes(), options["allow_control_flow"])
    image, _ = onnx_file.interface(model.graph)
    return {"size": np.array(onnx_file.side(image, options["layout"]), np.int64)}


def compose_apart(
    model_bytes: bytes,
    pixels: Pixels,
    mean: Sequence[float],
    std: Sequence[float],
    layout: str,
    allow_control_flow: bool,
    levels: Choice = "last",
) -> bytes:
    """Do what `compose` does in a child process with limits on time and memory; use it for files of others.

    Args:
        model_bytes, pixels, mean, std, layout, allow_control_flow, levels: As for `compose`.

    Raises:
        InputError: As for `compose`, or the model takes too long or needs too much memory.
        EnvironmentUnfitError: As for `compose`.
    """
    require("onnx", "export", _PURPOSE)
    ort.load("export", _PURPOSE)
    options = {
        "pixels": pixels.to_dict(),
        "mean": list(mean),
        "std": list(std),
        "layout": layout,
        "allow_control_flow": allow_control_flow,
        "levels": levels,
    }
    model = {"model": np.frombuffer(model_bytes, np.uint8)}
    try:
        composed = apart.call(f"{__name__}:_compose", model, options, len(model_bytes), apart.memory_limit())
    except apart.Stopped as error:
        raise InputError(f"it {error} when it was tried on two images; use a smaller network or more memory") from error
    return composed["model"].tobytes()


def _compose(arrays: apart.Arrays, options: Mapping[str, Any]) -> apart.Arrays:
    """Call `compose` in the child."""
    pixels = Pixels.from_dict(options["pixels"])
    return {"model": np.frombuffer(compose(arrays["model"].tobytes(), **{**options, "pixels": pixels}), np.uint8)}


def compose(
    model_bytes: bytes,
    pixels: Pixels,
    mean: Sequence[float],
    std: Sequence[float],
    layout: str,
    mu: np.ndarray | None = None,
    sigma: np.ndarray | None = None,
    name: str = "",
    allow_control_flow: bool = False,
    levels: Choice = "last",
) -> bytes:
    """Combine preprocessing, the user's network and standardisation into one self-contained ONNX model.

    The batch dimension becomes dynamic, even if the file declares a fixed one, provided that two images in a batch give
    the same features as each alone. Otherwise the result accepts exactly one image.

    Args:
        model_bytes: Model with one float32 or float16 input of rank 4 and one output ``(N, D)``, ``(N, D, 1, 1)`` or
            ``(N, 1, 1, D)``.
        pixels: How images become its input.
        mean: Mean per channel, for pixels in 0..1.
        std: Standard deviation per channel.
        layout: Layout of the input, ``nchw`` or ``nhwc``.
        mu: Mean of the features, ``(D,)``. Without mu and sigma the model returns raw features.
        sigma: Standard deviation of the features, ``(D,)``.
        name: Identity of the backbone for the metadata.
        allow_control_flow: See `onnx_file.parse`.
        levels: Levels that are joined with the features, see `levels.find`. If the network has none, or does not run
            with them, the model gives the features alone and says why in its metadata.

    Returns:
        A model with the input `images`, uint8 ``(batch, size, size, 3)``, and the output `embeddings` (`features`
        without standardisation), float32 ``(batch, D)``. See `widths` for the levels in it.

    Raises:
        InputError: The file cannot be used as a backbone.
        EnvironmentUnfitError: onnx or onnxruntime is not installed.
    """
    onnx = require("onnx", "export", _PURPOSE)
    if (mu is None) != (sigma is None):
        raise ValueError("mu and sigma go together")
    ort.load("export", _PURPOSE)  # here, because `_probe` attributes every later error to the file
    helper, types = onnx.helper, onnx.TensorProto
    model = onnx_file.parse(model_bytes, allow_control_flow)
    graph = model.graph
    image, output = onnx_file.interface(graph)
    size = pixels.size
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
    source, labels = output.name, {}
    if levels != "last":
        try:
            source, dim, labels[LEVELS] = _join_levels(model, image, after, dim, levels, batch == "batch")
            after = []
        except NoLevelsError as error:
            labels[NO_LEVELS] = str(error)
    if mu is not None and sigma is not None:
        if mu.shape != (dim,) or sigma.shape != (dim,):
            raise InputError(f"it gives {dim} features, but mu and sigma have the shapes {mu.shape} and {sigma.shape}")
        after += [("Sub", (mu.astype(np.float32),), {}), ("Div", (sigma.astype(np.float32),), {})]
    result = FEATURES if mu is None else EMBEDDINGS
    graph.node.extend(_chain(graph, source, result, after or [("Identity", (), {})], "after"))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(result, types.FLOAT, [batch, dim]))
    try:
        return finish(model, name, pixels, dim, labels)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InputError(f"its shapes or types contradict each other ({onnx_file.short(error)})") from error


def _join_levels(
    model: ModelProto, image: ValueInfoProto, vector: Sequence[Step], dim: int, choice: Choice, together: bool
) -> tuple[str, int, str]:
    """Join levels with the features of a composed model; without a result the model is left as it was.

    Args:
        model: Model with one output, the features as the network gives them.
        image: Declared input of the network.
        vector: Steps that make the features float32 ``(N, dim)``.
        dim: Number of the features.
        choice: Which levels.
        together: True if the model takes several images.

    Returns:
        Name and width of the joined features, and the levels for the metadata.

    Raises:
        NoLevelsError: There are none, or the model does not run with them.
    """
    from onnx import TensorProto, helper

    graph, size = model.graph, model.graph.input[0].type.tensor_type.shape.dim[1].dim_value

    def shapes(probe: ModelProto) -> Sequence[Sequence[int]]:
        try:
            found = open_session(probe.SerializeToString()).run(None, {INPUT: np.zeros((1, size, size, 3), np.uint8)})
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise NoLevelsError(f"the sizes of its maps cannot be read ({onnx_file.short(error)})") from error
        return [shape.tolist() for shape in found]

    levels = find(model, size, choice, shapes)
    (output,), nodes = graph.output, len(graph.node)
    joined, total = f"{PREFIX}joined", dim + sum(level.width for level in levels)
    graph.node.extend(
        _chain(graph, output.name, f"{PREFIX}features", vector or [("Identity", (), {})], f"{PREFIX}last")
    )
    join(model, levels, f"{PREFIX}features", joined)
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(joined, TensorProto.FLOAT, None))
    try:
        _probe(model, image, together)
    except InputError as error:
        del graph.node[nodes:], graph.output[:]
        graph.output.append(output)
        raise NoLevelsError(f"with levels {error}") from error
    return joined, total, " ".join([*map(str, levels), str(dim)])


def finish(model: ModelProto, name: str, pixels: Pixels, dim: int, labels: Mapping[str, str] | None = None) -> bytes:
    """Add metadata to a backbone's graph, check it and serialise it deterministically.

    Args:
        model: Model with one input and one output; changed in place.
        name: Identity of the backbone.
        pixels: How images become its input.
        dim: Size D of the output.
        labels: More metadata: `LEVELS` or `NO_LEVELS`.

    Raises:
        onnx.checker.ValidationError: The model is not valid.
        onnx.shape_inference.InferenceError: A shape or type is wrong.
    """
    import onnx

    onnx_file.strip(model)
    (output,) = model.graph.output
    properties = {
        "schema": SCHEMA,
        "identity": name,
        **{key: str(value) for key, value in pixels.to_dict().items()},
        "dim": str(dim),
        "layout": "NHWC",
        "colour_order": "RGB",
        "output": output.name,
        "precision": onnx_file.model_precision(model),
        **(labels or {}),
    }
    onnx.helper.set_model_props(model, properties)
    # the oldest version that supports the opset, for older runtimes on devices
    model.ir_version = onnx.helper.find_min_ir_version_for(list(model.opset_import))
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _check_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise InputError(f"backbone.{key} needs 3 values, one per channel, but has {len(values)}: {list(values)}")
    if not all(value > 0 for value in std):
        raise InputError(f"backbone.std must be above 0 in every channel, but is {list(std)}")


def _chain(graph: GraphProto, source: str, target: str, steps: Sequence[Step], name: str) -> list[NodeProto]:
    """Return nodes from the value `source` to the value `target`, and add their constants to the graph."""
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
    """Run two random images one by one and, if `together`, as a batch; return the output shape for one image.

    Raises:
        InputError: The model does not run, gives NaN, or is not deterministic, or an image changes with its batch.
    """
    size = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    try:
        session = open_session(model.SerializeToString())
        first, second, again = (session.run(None, {INPUT: images[[index]]})[0] for index in (0, 1, 0))
        pair = session.run(None, {INPUT: images})[0] if together else None
    except Exception as error:  # ONNX Runtime's errors have no common base class
        raise InputError(
            f"it does not run on one image of {size}×{size} (its input is {onnx_file.describe(image)}; "
            f"{onnx_file.short(error)})"
        ) from error
    if not np.isfinite(first).all() or not np.isfinite(second).all():
        raise InputError("it gives NaN or infinity for an image of random pixels; check its weights and precision")
    if not np.array_equal(first, again):
        raise InputError("it gives different outputs for the same image; export it in evaluation mode, without dropout")
    if pair is not None:
        # Loose, because float16 rounding depends on the batch; a model that mixes images differs much more.
        tolerance = 0.01 * max(np.abs(first).max(initial=0), np.abs(second).max(initial=0))
        alike = pair.shape == (2, *first.shape[1:]) and first.shape == second.shape
        if not alike or np.abs(pair - np.concatenate([first, second])).max(initial=0) > tolerance:
            raise InputError("it gives different outputs for an image alone and in a batch")
    shape: tuple[int, ...] = first.shape
    return shape


def _check_features(shape: tuple[int, ...]) -> int:
    """Return the embedding size D for the output shape of one image."""
    vector = len(shape) == 2 or (len(shape) == 4 and (shape[2:] == (1, 1) or shape[1:3] == (1, 1)))
    if not vector or shape[0] != 1 or 0 in shape:
        raise InputError(
            f"its output must be one vector per image, (1, D), but is {shape}; cut it after its global average pooling"
        )
    return int(np.prod(shape[1:]))
