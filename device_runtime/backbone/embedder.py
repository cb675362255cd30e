"""The backbone on the device: uint8 images → standardised embeddings, by what is fastest of what gives the right ones.

The ladder: TensorRT with an engine of our own; ONNX Runtime with CUDA; ONNX Runtime on the processor.
Everything on a GPU must first give the embeddings of the bundle's probe (`selftest`); what does not is not used, and
that is said. ONNX Runtime lists providers that do not start, and would go on with another one in silence: which one
runs is read back, and its own falling back is switched off.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from device_runtime.backbone import selftest
from device_runtime.backbone.interface import BackboneSpec, DeviceEmbedder, EngineRecord, check_embeddings
from device_runtime.backbone.selftest import Probe
from device_runtime.backbone.tensorrt import api, engines
from device_runtime.backbone.tensorrt import embedder as tensorrt
from device_runtime.store.generations import Generations
from ssd_edge import targets
from ssd_edge.errors import (
    BundleRefusedError,
    EnvironmentUnfitError,
    GateRefusedError,
    SlowerProviderError,
    require,
)
from ssd_edge.system import EXACT_INT8, usable_cores

BATCH = 32
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
LADDER = (CUDA, CPU)  # of ONNX Runtime, fastest first
ENGINES = "engines"  # folder of a root

Say = Callable[[str], None]


class OnnxRuntimeEmbedder:
    """A backbone with preprocessing and standardisation in its graph.

    Args:
        model: the ONNX file, or its bytes.
        size: side of its input in pixels.
        dim: D of its embeddings.
        provider: of ONNX Runtime; what of the graph it does not take, those after it in `LADDER` run.

    Attributes:
        provider: the execution provider that really runs, checked after creation.

    Raises:
        EnvironmentUnfitError: ONNX Runtime is missing or cannot run the file here, or not with this provider.
    """

    engine: EngineRecord | None = None

    def __init__(self, model: Path | bytes, size: int, dim: int, provider: str = CPU) -> None:
        runtime = require("onnxruntime", "device", "run the backbone")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = usable_cores()
        options.add_session_config_entry(*EXACT_INT8)
        available = runtime.get_available_providers()
        others = [name for name in LADDER[LADDER.index(provider) + 1 :] if name in available]
        try:
            source = model if isinstance(model, bytes) else str(model)
            wanted = [provider, *others]
            # falling back by itself it prints on standard output, where a caller may be writing JSON
            self._session = runtime.InferenceSession(source, options, providers=wanted, enable_fallback=0)
            self._session.disable_fallback()  # also while it runs, in versions that do not know the word above
        except Exception as error:  # ONNX Runtime raises its own types, which share no public base
            name = "the backbone" if isinstance(model, bytes) else model
            raise EnvironmentUnfitError(
                f"ONNX Runtime cannot run {name} here ({_line(error)}); deploy it again"
            ) from error
        self.provider: str = self._session.get_providers()[0]
        if self.provider != provider:
            raise EnvironmentUnfitError(
                f"ONNX Runtime lists {provider}, but {self.provider} would run; see ssd-edge doctor"
            )
        taken = self._session.get_inputs()[0]
        self._input = taken.name
        self._batch = taken.shape[0] if isinstance(taken.shape[0], int) else BATCH  # some graphs take one at a time
        self.size, self.dim = size, dim

    def embed(self, images: np.ndarray) -> np.ndarray:
        """uint8 RGB ``(N, size, size, 3)`` → float32 ``(N, D)``.

        Raises:
            BundleRefusedError: the graph gives another shape than the bundle says, or NaN.
            EnvironmentUnfitError: the provider fails, e.g. for lack of memory on the GPU.
        """
        try:
            parts: Sequence[np.ndarray] = [
                self._session.run(None, {self._input: np.ascontiguousarray(images[start : start + self._batch])})[0]
                for start in range(0, len(images), self._batch)
            ]
        except Exception as error:
            told = f"{self.provider} of ONNX Runtime cannot run the backbone ({_line(error)}); see ssd-edge doctor"
            raise EnvironmentUnfitError(told) from error
        return check_embeddings(
            np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32), len(images), self.dim
        )


def open_embedder(
    store: Generations,
    spec: BackboneSpec,
    probe: Probe,
    say: Say = lambda text: None,
    strict: bool = False,
) -> DeviceEmbedder:
    """What runs a root's backbone fastest here: TensorRT with a usable GPU, else ONNX Runtime.

    Engines are taken from the root's cache, or built, which takes minutes on a small board. What runs on a GPU is used
    only when it gives the embeddings of the bundle's probe; else the next is tried, and that is said, with the reason.

    Args:
        store: of the root.
        spec: of the backbone.
        probe: arrays and limits of the bundle's probe.
        say: told what happens.
        strict: refuse what is slower than what the target is prepared for; else that is said.

    Raises:
        BundleRefusedError: the backbone's file is missing or damaged.
        EnvironmentUnfitError: nothing here can run it.
        SlowerProviderError: under `strict`.
    """
    path = store.backbone_path(spec.sha256)
    failed: dict[str, str] = {}
    for name, start in _ladder(store.root / ENGINES, path, spec, probe, say):
        try:
            found = start()
            break
        except (EnvironmentUnfitError, GateRefusedError, BundleRefusedError) as error:
            if name == CPU:  # the last
                raise
            failed[name] = str(error)  # the error itself would hold what was started, and its memory
    reason = "; ".join(f"{name}: {error}" if name in LADDER else error for name, error in failed.items())
    wanted = _prepared_for(spec.target)
    if _speed(found.provider) < _speed(wanted):
        told = f"{found.provider} runs the backbone, slower than {wanted}, for which {spec.target} stands"
        told += f": {reason}" if reason else ""
        if strict:
            raise SlowerProviderError(f"{told}; see ssd-edge doctor, or leave --strict out")
        say(f"warning: {told}")
    elif reason:
        verb = "is" if len(failed) == 1 else "are"
        say(f"{' and '.join(failed)} {verb} not used, {found.provider} is: {reason}")
    return found


def _prepared_for(target: str) -> str:
    """What should run on a target; on one of a newer version, anything."""
    known = targets.targets().get(target)
    return {"jetson": "TensorRT", "cuda": CUDA}.get(known.kind if known else "", CPU)


def _speed(provider: str) -> int:
    """The larger, the faster."""
    order = (*reversed(LADDER), "TensorRT")
    return max((place for place, name in enumerate(order) if provider.startswith(name)), default=0)


def _ladder(
    folder: Path, path: Path, spec: BackboneSpec, probe: Probe, say: Say
) -> Iterator[tuple[str, Callable[[], DeviceEmbedder]]]:
    """What may run the backbone here, fastest first: its name, and what starts it."""

    def tested(provider: str) -> DeviceEmbedder:
        embedder = OnnxRuntimeEmbedder(path, spec.size, spec.dim, provider)
        selftest.run(embedder.embed, *probe)
        return embedder

    if importlib.util.find_spec("tensorrt") is not None:
        yield "TensorRT", lambda: _tensorrt(folder, path, spec, probe, say)
    if CUDA in require("onnxruntime", "device", "run the backbone").get_available_providers():
        yield CUDA, lambda: tested(CUDA)
    yield CPU, lambda: OnnxRuntimeEmbedder(path, spec.size, spec.dim)


def _line(error: Exception) -> str:
    """The first line of a message; drivers write paragraphs."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _tensorrt(folder: Path, path: Path, spec: BackboneSpec, probe: Probe, say: Say) -> DeviceEmbedder:
    installed = api.TensorRT()
    gpu = engines.gpu_facts()
    if gpu is None:
        raise EnvironmentUnfitError("PyTorch finds no GPU that it can use; see ssd-edge doctor")
    cache = engines.EngineCache(folder)
    wanted = engines.engine_facts(spec.sha256, spec.precision, gpu, installed.version)
    plan = cache.get(wanted)
    built = plan is None
    if plan is None:
        say("building the TensorRT engine, once for this board and backbone; it may take minutes")
        plan = cache.build(path, wanted, say)
    embedder = tensorrt.TensorRTEmbedder(plan, spec.size, spec.dim, installed)
    embedder.engine = record = cache.record(wanted)
    if built:
        told = ", ".join(f"{key} {value}" for key, value in record.layers.items())
        say(f"built the TensorRT engine in {record.seconds:.0f} s: {record.bytes / 1e6:.1f} MB; layers: {told}")
    try:
        selftest.run(embedder.embed, *probe)
    except BaseException:
        embedder.close()  # ONNX Runtime may need that memory
        raise
    return embedder
