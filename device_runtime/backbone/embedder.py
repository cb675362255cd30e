"""The device's embedder: uint8 images to standardised embeddings, with the fastest runtime that works.

Runtimes are tried in this order: TensorRT, ONNX Runtime with CUDA, ONNX Runtime on the CPU. A runtime on a GPU must
first pass the self-test; a failed one is reported and skipped. ONNX Runtime lists providers that do not start and
would silently replace them, so its fallback is disabled and the provider of the session is checked.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from device_runtime.backbone import remembered, selftest
from device_runtime.backbone.interface import BackboneSpec, DeviceEmbedder, EngineRecord, check_embeddings
from device_runtime.backbone.selftest import Probe
from device_runtime.backbone.tensorrt import api, engines
from device_runtime.backbone.tensorrt import embedder as tensorrt
from device_runtime.store.generations import Generations
from ssd_edge import ort, targets
from ssd_edge.errors import (
    BundleRefusedError,
    EnvironmentUnfitError,
    GateRefusedError,
    SlowerProviderError,
    first_line,
)
from ssd_edge.system import EXACT_INT8, usable_cores

BATCH = 32
CPU_PIXELS = 4 * 224 * 224  # per batch on the CPU: larger ones take as long per image, and far more memory
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
LADDER = (CUDA, CPU)  # providers of ONNX Runtime, fastest first
ENGINES = "engines"  # folder in a root

Say = Callable[[str], None]


class OnnxRuntimeEmbedder:
    """A backbone run by ONNX Runtime, with preprocessing and standardisation in the graph.

    Args:
        model: ONNX file, or its bytes.
        size: Side of the input in pixels.
        dim: Dimension D of the embeddings.
        provider: Execution provider. Operators that it does not support run on the providers after it in `LADDER`.

    Attributes:
        provider: Execution provider of the session.

    Raises:
        EnvironmentUnfitError: ONNX Runtime is missing, or cannot run the file with this provider.
    """

    engine: EngineRecord | None = None

    def __init__(self, model: Path | bytes, size: int, dim: int, provider: str = CPU) -> None:
        runtime = ort.load()
        options = runtime.SessionOptions()
        options.log_severity_level = 4  # errors are raised; its own messages would contain names from the graph
        options.intra_op_num_threads = usable_cores()
        options.add_session_config_entry(*EXACT_INT8)
        available = runtime.get_available_providers()
        others = [name for name in LADDER[LADDER.index(provider) + 1 :] if name in available]
        try:
            source = model if isinstance(model, bytes) else str(model)
            wanted = [provider, *others]
            # its own fallback prints on standard output, where a caller may be writing JSON
            self._session = runtime.InferenceSession(source, options, providers=wanted, enable_fallback=0)
            self._session.disable_fallback()  # also at run time, for versions without enable_fallback
        except Exception as error:  # ONNX Runtime raises its own types, which share no public base
            name = "the backbone" if isinstance(model, bytes) else model
            raise EnvironmentUnfitError(
                f"ONNX Runtime cannot run {name} on this machine ({first_line(error)}); deploy it again"
            ) from error
        self.provider: str = self._session.get_providers()[0]
        if self.provider != provider:
            raise EnvironmentUnfitError(
                f"ONNX Runtime lists {provider}, but would use {self.provider}; see ssd-edge doctor"
            )
        image = self._session.get_inputs()[0]
        self._input = image.name
        largest = max(1, CPU_PIXELS // size**2) if self.provider == CPU else BATCH
        self._batch = image.shape[0] if isinstance(image.shape[0], int) else min(BATCH, largest)  # it may be fixed
        self.size, self.dim = size, dim

    def embed(self, images: np.ndarray) -> np.ndarray:
        """Embed uint8 RGB images ``(N, size, size, 3)`` as float32 ``(N, D)``.

        Raises:
            BundleRefusedError: The output has another shape than the bundle states.
            EnvironmentUnfitError: The provider fails, e.g. because the GPU has too little memory.
        """
        try:
            parts: Sequence[np.ndarray] = [
                self._session.run(None, {self._input: np.ascontiguousarray(images[start : start + self._batch])})[0]
                for start in range(0, len(images), self._batch)
            ]
        except Exception as error:
            raise EnvironmentUnfitError(
                f"{self.provider} of ONNX Runtime cannot run the backbone ({first_line(error)}); see ssd-edge doctor"
            ) from error
        return check_embeddings(
            np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32), len(images), self.dim
        )


def open_embedder(
    store: Generations,
    spec: BackboneSpec,
    probe: Probe,
    say: Say | None = None,
    strict: bool = False,
    once: bool = False,
) -> DeviceEmbedder:
    """Open a root's backbone with the fastest runtime that passes the self-test on this machine.

    TensorRT engines come from the root's cache or are built, which takes minutes on a small board. If a runtime fails,
    the next one is tried and the reason is reported. What runs the backbone is recorded in the root.

    Args:
        store: Store of the root.
        spec: Facts of the backbone.
        probe: Arrays and limits of the self-test.
        say: Called with messages for the user; None if nobody reads them.
        strict: Refuse a runtime that is slower than the target's; otherwise a warning is reported.
        once: Do not report why this runtime is used if that was reported in this root before.

    Raises:
        BundleRefusedError: The backbone's file is missing or damaged.
        EnvironmentUnfitError: No runtime of this machine can run it.
        SlowerProviderError: The runtime is slower than the target's and `strict` is set.
    """
    path, tell = store.backbone_path(spec.sha256), say or _nothing
    failed: dict[str, str] = {}
    for name, start in _ladder(store.root / ENGINES, path, spec, probe, tell):
        try:
            embedder = start()
            break
        except (EnvironmentUnfitError, GateRefusedError, BundleRefusedError) as error:
            if name == CPU:  # the last one
                raise
            failed[name] = str(error)  # the traceback of the error would keep the memory of the runtime
    reason = "; ".join(f"{name}: {error}" if name in LADDER else error for name, error in failed.items())
    wanted, note, kind = _prepared_for(spec.target), "", ""
    if _speed(embedder.provider) < _speed(wanted):
        message = f"{embedder.provider} runs the backbone, slower than {wanted}, which the target {spec.target} expects"
        message += f": {reason}" if reason else ""
        if strict:
            raise SlowerProviderError(f"{message}; see ssd-edge doctor, or omit --strict")
        note, kind = message, "warning: "
    elif reason:
        verb = "is" if len(failed) == 1 else "are"
        note = f"{' and '.join(failed)} {verb} not used, {embedder.provider} is: {reason}"
    reported = remembered.remember(store.root, spec.sha256, embedder.provider, note, say is not None)
    if note and not (once and reported):
        tell(kind + note)
    return embedder


def _nothing(text: str) -> None:
    """Drop a message."""


def _prepared_for(target: str) -> str:
    """Return the runtime that a target expects; the CPU for a target that this version does not know."""
    known = targets.targets().get(target)
    return {"jetson": "TensorRT", "cuda": CUDA}.get(known.kind if known else "", CPU)


def _speed(provider: str) -> int:
    """Return the rank of a runtime; larger is faster."""
    order = (*reversed(LADDER), "TensorRT")
    return max((place for place, name in enumerate(order) if provider.startswith(name)), default=0)


def _ladder(
    folder: Path, path: Path, spec: BackboneSpec, probe: Probe, say: Say
) -> Iterator[tuple[str, Callable[[], DeviceEmbedder]]]:
    """Yield the name of each runtime that this machine may have, fastest first, and a function that opens it."""

    def open_tested(provider: str) -> DeviceEmbedder:
        embedder = OnnxRuntimeEmbedder(path, spec.size, spec.dim, provider)
        selftest.run(embedder.embed, *probe)
        return embedder

    if importlib.util.find_spec("tensorrt") is not None:
        yield "TensorRT", lambda: _tensorrt(folder, path, spec, probe, say)
    if CUDA in ort.load().get_available_providers():
        yield CUDA, lambda: open_tested(CUDA)
    yield CPU, lambda: OnnxRuntimeEmbedder(path, spec.size, spec.dim)


def _tensorrt(folder: Path, path: Path, spec: BackboneSpec, probe: Probe, say: Say) -> DeviceEmbedder:
    installed = api.TensorRT()
    gpu = engines.gpu_facts()
    if gpu is None:
        raise EnvironmentUnfitError("PyTorch finds no usable GPU; see ssd-edge doctor")
    cache = engines.EngineCache(folder)
    wanted = engines.engine_facts(spec.sha256, spec.precision, gpu, installed.version)
    plan = cache.get(wanted)
    built = plan is None
    if plan is None:
        say("building the TensorRT engine, once for this board and backbone; this may take minutes")
        plan = cache.build(path, wanted, say)
    embedder = tensorrt.TensorRTEmbedder(plan, spec.size, spec.dim, installed)
    embedder.engine = record = cache.record(wanted)
    if built:
        layers = ", ".join(f"{key} {value}" for key, value in record.layers.items())
        say(f"built the TensorRT engine in {record.seconds:.0f} s: {record.bytes / 1e6:.1f} MB; layers: {layers}")
    try:
        selftest.run(embedder.embed, *probe)
    except BaseException:
        embedder.close()  # ONNX Runtime may need the memory
        raise
    return embedder
