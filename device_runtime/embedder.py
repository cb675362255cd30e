"""The backbone on the device: uint8 images → standardised embeddings; TensorRT where it can be, else ONNX Runtime."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from device_runtime.board import usable_cpus
from ssd_edge import targets
from ssd_edge.errors import (
    BundleRefusedError,
    EnvironmentUnfitError,
    GateRefusedError,
    SlowerProviderError,
    require,
)

if TYPE_CHECKING:
    from device_runtime.generations import Generations

BATCH = 32
PREFERRED = ("CUDAExecutionProvider", "CPUExecutionProvider")
ENGINES = "engines"  # folder of a root

Say = Callable[[str], None]
Probe = tuple[Mapping[str, np.ndarray], Mapping[str, float]]  # see selftest


class Embedder(Protocol):
    """A backbone that runs.

    Attributes:
        provider: what really runs it.
        size: side of its input in pixels.
        dim: D of its embeddings.
        engine: what was noted when its TensorRT engine was built (`EngineCache.record`); None without one.
    """

    provider: str
    size: int
    dim: int
    engine: Mapping[str, Any] | None

    def embed(self, images: np.ndarray) -> np.ndarray:
        """uint8 RGB ``(N, size, size, 3)`` → float32 ``(N, D)``."""
        ...


class OnnxEmbedder:
    """A backbone with preprocessing and standardisation in its graph.

    Args:
        model: the ONNX file, or its bytes.
        size: side of its input in pixels.
        dim: D of its embeddings.

    Attributes:
        provider: the execution provider that really runs, checked after creation.

    Raises:
        EnvironmentUnfitError: ONNX Runtime is missing or cannot run the file here.
    """

    engine: Mapping[str, Any] | None = None

    def __init__(self, model: Path | bytes, size: int, dim: int) -> None:
        runtime = require("onnxruntime", "device", "run the backbone")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = usable_cpus()
        # a CUDA build without a usable GPU falls back by itself; what runs is read back below
        wanted = [name for name in PREFERRED if name in runtime.get_available_providers()]
        try:
            source = model if isinstance(model, bytes) else str(model)
            self._session = runtime.InferenceSession(source, options, providers=wanted)
        except Exception as error:  # ONNX Runtime raises its own types, which share no public base
            name = "the backbone" if isinstance(model, bytes) else model
            raise EnvironmentUnfitError(f"ONNX Runtime cannot run {name} here ({error}); deploy it again") from error
        self.provider: str = self._session.get_providers()[0]
        taken = self._session.get_inputs()[0]
        self._input = taken.name
        self._batch = taken.shape[0] if isinstance(taken.shape[0], int) else BATCH  # some graphs take one at a time
        self.size, self.dim = size, dim

    def embed(self, images: np.ndarray) -> np.ndarray:
        """uint8 RGB ``(N, size, size, 3)`` → float32 ``(N, D)``.

        Raises:
            BundleRefusedError: the graph gives another shape than the bundle says, or NaN.
        """
        parts: Sequence[np.ndarray] = [
            self._session.run(None, {self._input: np.ascontiguousarray(images[start : start + self._batch])})[0]
            for start in range(0, len(images), self._batch)
        ]
        return checked(np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32), len(images), self.dim)


def checked(embeddings: np.ndarray, count: int, dim: int) -> np.ndarray:
    """What a backbone gave, if it is float32 ``(count, dim)`` and finite.

    Raises:
        BundleRefusedError: it is not.
    """
    if embeddings.shape != (count, dim) or embeddings.dtype != np.float32:
        raise BundleRefusedError(
            f"the backbone gives {embeddings.dtype} {embeddings.shape}, but the bundle says float32 "
            f"{(count, dim)}; deploy it again"
        )
    if not np.isfinite(embeddings).all():
        raise BundleRefusedError("the backbone gives NaN or infinity for an image; deploy it again")
    return embeddings


def open_embedder(
    store: Generations,
    backbone: str,
    facts: Mapping[str, Any],
    probe: Probe,
    say: Say = lambda text: None,
    strict: bool = False,
) -> Embedder:
    """What runs a root's backbone fastest here: TensorRT with a usable GPU, else ONNX Runtime.

    The engine is taken from the root's cache, or built, which takes minutes on a small board. It is used only when it
    gives the embeddings of the bundle's probe. That it is not used is said, with the reason.

    Args:
        store: of the root.
        backbone: sha256 of the backbone's file.
        facts: ``size``, ``dim``, ``precision`` and ``target``.
        probe: arrays and limits of the bundle's probe.
        say: told what happens.
        strict: refuse what is slower than what the target is prepared for; else that is said.

    Raises:
        BundleRefusedError: the backbone's file is missing or damaged.
        EnvironmentUnfitError: nothing here can run it.
        SlowerProviderError: under `strict`.
    """
    path, reason = store.backbone_path(backbone), ""
    found: Embedder | None = None
    if importlib.util.find_spec("tensorrt") is not None:
        try:
            found = _tensorrt(store.root / ENGINES, path, backbone, facts, probe, say)
        except (EnvironmentUnfitError, GateRefusedError, BundleRefusedError) as error:
            reason = f": {error}"
    found = found or OnnxEmbedder(path, facts["size"], facts["dim"])
    wanted = _prepared_for(facts["target"])
    if _speed(found.provider) < _speed(wanted):
        told = f"{found.provider} runs the backbone, slower than {wanted}, for which {facts['target']} stands{reason}"
        if strict:
            raise SlowerProviderError(f"{told}; see ssd-edge doctor, or leave --strict out")
        say(f"warning: {told}")
    elif reason:
        say(f"TensorRT is not used, ONNX Runtime is{reason}")
    return found


def _prepared_for(target: str) -> str:
    """What should run on a target; on one of a newer version, anything."""
    known = targets.targets().get(target)
    return {"jetson": "TensorRT", "cuda": "CUDAExecutionProvider"}.get(known.kind if known else "", PREFERRED[-1])


def _speed(provider: str) -> int:
    """The larger, the faster."""
    order = (PREFERRED[-1], *PREFERRED[-2::-1], "TensorRT")
    return max((place for place, name in enumerate(order) if provider.startswith(name)), default=0)


def _tensorrt(folder: Path, path: Path, backbone: str, facts: Mapping[str, Any], probe: Probe, say: Say) -> Embedder:
    from device_runtime import engine, selftest
    from device_runtime.tensorrt_api import TensorRT
    from device_runtime.tensorrt_embedder import TensorRTEmbedder

    api = TensorRT()
    gpu = engine.gpu_facts()
    if gpu is None:
        raise EnvironmentUnfitError("PyTorch finds no GPU that it can use; see ssd-edge doctor")
    cache = engine.EngineCache(folder)
    wanted = engine.engine_facts(backbone, facts["precision"], gpu, api.version)
    plan = cache.get(wanted)
    built = plan is None
    if plan is None:
        say("building the TensorRT engine, once for this board and backbone; it may take minutes")
        plan = cache.build(path, wanted, say)
    embedder = TensorRTEmbedder(plan, facts["size"], facts["dim"], api)
    embedder.engine = record = cache.record(wanted)
    if built:
        told = ", ".join(f"{key} {value}" for key, value in record["layers"].items())
        say(f"built the TensorRT engine in {record['seconds']:.0f} s: {record['bytes'] / 1e6:.1f} MB; layers: {told}")
    try:
        selftest.run(embedder.embed, *probe)
    except BaseException:
        embedder.close()  # ONNX Runtime may need that memory
        raise
    return embedder
