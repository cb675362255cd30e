"""Wrapper of TensorRT 10.3 to 11.4 and of TensorRT-RTX, which builds engines without a GPU.

It uses the interface that all versions share: tensors by name, memory pools, strong typing. Attributes that only some
versions have are looked up first. Precision is in the graph: no builder flag reduces it, and TF32, which TensorRT
enables by default, is disabled.

TensorRT returns None on an error and logs the reason; the wrapper collects the log and raises an error with its text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from ssd_edge.errors import EnvironmentUnfitError, GateRefusedError

BATCHES = (1, 8, 32)  # smallest, the one to optimize for, largest
WORKSPACE = 512 << 20  # bytes; a 4 GB board shares its memory between CPU and GPU
OLDEST = (10, 3)
_KEPT = 200  # log lines
_NO_GPU = re.compile(
    r"cudaError (?:35|100)\b[^)]*|CUDA initialization failure with error: \d+|no CUDA-capable device[^.;)]*",
    re.IGNORECASE,
)
_OTHER_VERSION = re.compile(r"Current Version: *(\d+), *Serialized Engine Version: *(\d+)", re.IGNORECASE)
_MEMORY = re.compile(r"out ?of ?memory|insufficient memory|bad_alloc|memory allocation", re.IGNORECASE)
_TYPE = re.compile(r"\b(BF16|FP16|FP32|FP8|Half|Float|U?Int8|Int32|Int64|Bool)\b", re.IGNORECASE)

Progress = Callable[[str, int, int], None]  # phase, completed steps, number of steps


@dataclasses.dataclass(frozen=True)
class Built:
    """Result of a build.

    Attributes:
        plan: Serialized engine.
        layers: Number of layers of the parsed network.
        input: Type of the input, e.g. ``uint8``.
        seconds: Duration of parsing and building.
        timing_cache: Cache that makes the next build on this machine faster; None if not used.
        warnings: Warnings of the builder.
    """

    plan: bytes
    layers: int
    input: str
    seconds: float
    timing_cache: bytes | None
    warnings: list[str]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An input or output of an engine, with TensorRT's name of its type in lower case; −1 in a shape is the batch."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class TensorRT:
    """The installed TensorRT.

    Args:
        module: Import name, ``tensorrt`` or ``tensorrt_rtx``.

    Attributes:
        module: Import name.
        version: Version, e.g. ``10.3.0``.

    Raises:
        EnvironmentUnfitError: The package cannot be imported, or is older than 10.3.
    """

    def __init__(self, module: str = "tensorrt") -> None:
        self.module = module
        self._trt = _import(module)
        self.version: str = self._trt.__version__
        self._rtx = module.endswith("_rtx")  # its versions start at 1, and it times kernels at run time
        found = tuple(int(part) for part in re.findall(r"\d+", self.version)[:2])
        if not self._rtx and found < OLDEST:
            raise EnvironmentUnfitError(
                f"TensorRT {self.version} is installed, but at least {OLDEST[0]}.{OLDEST[1]} (JetPack 6.1) is "
                "required; update JetPack, or run the backbone with ONNX Runtime"
            )
        self._logger, self._log = _collector(self._trt)

    def __str__(self) -> str:
        return f"{'TensorRT-RTX' if self._rtx else 'TensorRT'} {self.version}"

    def build(
        self,
        onnx: bytes,
        batches: Sequence[int] = BATCHES,
        workspace: int = WORKSPACE,
        timing_cache: bytes | None = None,
        progress: Progress | None = None,
    ) -> Built:
        """Build an engine for this machine's GPU (TensorRT-RTX needs none).

        Args:
            onnx: Contents of the ONNX file.
            batches: Smallest, usual and largest batch; ignored for a graph with a fixed batch.
            workspace: Scratch memory in bytes that a layer may use.
            timing_cache: Timing cache of an earlier build on this machine, or empty to start one; None to use none.
            progress: Called from the builder's threads, if this TensorRT reports progress.

        Raises:
            GateRefusedError: TensorRT rejects the graph; the message has its reason.
            EnvironmentUnfitError: There is no usable GPU, or too little memory.
        """
        trt, started = self._trt, time.perf_counter()
        self._log.clear()
        builder = self._create(trt.Builder)
        network = builder.create_network(self._creation_flags())
        parser = trt.OnnxParser(network, self._logger)  # owns the weights, so it must outlive the build
        if not parser.parse(onnx):
            reasons = "; ".join(_parser_error(parser.get_error(index)) for index in range(parser.num_errors))
            raise GateRefusedError(f"{self} cannot parse the graph ({reasons or self._reason()}); export it again")
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if hasattr(trt.BuilderFlag, "TF32"):
            config.clear_flag(trt.BuilderFlag.TF32)
        self._add_profile(builder, network, config, batches)
        cached = self._set_timing_cache(config, timing_cache)
        monitor = None if progress is None else _monitor(trt, progress)  # must outlive the build
        if monitor is not None:
            config.progress_monitor = monitor
        host = builder.build_serialized_network(network, config)
        if host is None:
            self._build_failed()
        return Built(
            plan=bytes(host),
            layers=network.num_layers,
            input=_type_name(network.get_input(0).dtype),
            seconds=round(time.perf_counter() - started, 3),
            timing_cache=bytes(config.get_timing_cache().serialize()) if cached else None,
            warnings=self._log.texts("WARNING"),
        )

    def load(self, plan: bytes) -> Engine:
        """Deserialize an engine that was built on this machine. An engine from elsewhere is untrusted code.

        Raises:
            EnvironmentUnfitError: There is no usable GPU, or another TensorRT built the engine.
        """
        self._log.clear()
        runtime = self._create(self._trt.Runtime)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is not None:
            return Engine(self._trt, runtime, engine, self._reason)
        reason = self._reason()
        if versions := _OTHER_VERSION.search(reason):
            raise EnvironmentUnfitError(
                f"{self} reads engines of format {versions[1]}, but this one, built by another version, has format "
                f"{versions[2]}; delete the engine to build it again"
            )
        if _NO_GPU.search(reason):
            raise self._no_gpu(reason)
        raise EnvironmentUnfitError(f"{self} cannot load the engine ({reason}); delete it to build it again")

    def _create(self, kind: Any) -> Any:
        try:
            made = kind(self._logger)
        except TypeError as error:  # "factory function returned nullptr": there is no GPU
            raise self._no_gpu(self._reason(_one_line(str(error)))) from error
        if made is None:
            raise self._no_gpu(self._reason())
        return made

    def _creation_flags(self) -> int:
        known = self._trt.NetworkDefinitionCreationFlag
        return 1 << int(known.STRONGLY_TYPED) if hasattr(known, "STRONGLY_TYPED") else 0

    def _add_profile(self, builder: Any, network: Any, config: Any, batches: Sequence[int]) -> None:
        profile = builder.create_optimization_profile()
        dynamic = False
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            shape = tuple(tensor.shape)
            if -1 in shape[1:]:
                raise GateRefusedError(
                    f"the graph's input '{tensor.name}' has the shape {shape}, but only the batch may be dynamic; "
                    "export it with a fixed image size"
                )
            if shape and shape[0] == -1:
                profile.set_shape(tensor.name, *[(batch, *shape[1:]) for batch in batches])
                dynamic = True
        if dynamic and config.add_optimization_profile(profile) < 0:
            raise GateRefusedError(f"{self} rejects the batches {tuple(batches)} ({self._reason()})")

    def _set_timing_cache(self, config: Any, known: bytes | None) -> bool:
        if known is None or self._rtx:  # TensorRT-RTX needs a GPU for it
            return False
        cache = config.create_timing_cache(known)
        if cache is None or not config.set_timing_cache(cache, False):
            cache = config.create_timing_cache(b"")  # from another version or board: start a new one
            return cache is not None and bool(config.set_timing_cache(cache, False))
        return True

    def _build_failed(self) -> None:
        reason = self._reason()
        if _NO_GPU.search(reason):
            raise self._no_gpu(reason)
        if _MEMORY.search(reason):
            raise EnvironmentUnfitError(
                f"{self} ran out of memory while building the engine ({reason}); stop other programs or add swap"
            )
        raise GateRefusedError(f"{self} cannot build an engine from the graph ({reason}); export it again")

    def _no_gpu(self, reason: str) -> EnvironmentUnfitError:
        match = _NO_GPU.search(reason)
        return EnvironmentUnfitError(
            f"{self} finds no usable GPU ({match[0] if match else reason}); check the NVIDIA driver, or run the "
            "backbone with ONNX Runtime"
        )

    def _reason(self, default: str = "no reason was given") -> str:
        return "; ".join(self._log.texts("ERROR", "INTERNAL_ERROR")[:3]) or default


class Engine:
    """A deserialized engine with one input and one output; `close` frees it.

    Attributes:
        input, output: Tensors of the engine.
        max_batch: Largest batch of the optimization profile, or the fixed batch.
        memory: GPU memory in bytes that a run needs besides the weights.
        summary: Memory, and the number, kinds and output types of the layers as far as the inspector reports them.
    """

    def __init__(self, trt: ModuleType, runtime: Any, engine: Any, errors: Callable[[], str]) -> None:
        self._runtime, self._engine, self._errors, self._context = runtime, engine, errors, None
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        tensors = {
            mode: [
                Tensor(name, _type_name(engine.get_tensor_dtype(name)), tuple(engine.get_tensor_shape(name)))
                for name in names
                if engine.get_tensor_mode(name) == mode
            ]
            for mode in (trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT)
        }
        counts = [len(found) for found in tensors.values()]
        if counts != [1, 1]:
            raise EnvironmentUnfitError(
                f"the engine has {counts[0]} inputs and {counts[1]} outputs, but one of each is required; export the "
                "backbone again"
            )
        (self.input,), (self.output,) = tensors.values()
        batch = self.input.shape[0]
        self.max_batch = batch if batch > 0 else int(engine.get_tensor_profile_shape(self.input.name, 0)[2][0])
        # TensorRT 11 removed the first version of the attribute
        size = getattr(engine, "device_memory_size_v2", None)
        self.memory = int(engine.device_memory_size if size is None else size)
        self.summary = {"memory": self.memory, **_summary(trt, engine)}

    def run(self, batch: int, source: int, target: int, stream: int) -> None:
        """Enqueue the computation of a batch on a CUDA stream.

        Args:
            batch: Number of images, at most `max_batch`.
            source: GPU address of the input.
            target: GPU address of the output.
            stream: Handle of the CUDA stream.

        Raises:
            EnvironmentUnfitError: TensorRT cannot start the computation.
        """
        context = self._context
        if context is None:
            context = self._context = self._engine.create_execution_context()
            if context is None:
                raise EnvironmentUnfitError(
                    f"TensorRT cannot run the engine ({self._errors()}); free some GPU memory ({self.memory} bytes "
                    "are required besides the weights)"
                )
        started = (
            context.set_input_shape(self.input.name, (batch, *self.input.shape[1:]))
            and context.set_tensor_address(self.input.name, source)
            and context.set_tensor_address(self.output.name, target)
            and context.execute_async_v3(stream)
        )
        if not started:
            raise EnvironmentUnfitError(
                f"TensorRT cannot run a batch of {batch} ({self._errors()}); free some GPU memory, or run the backbone "
                "with ONNX Runtime"
            )

    def close(self) -> None:
        """Free the engine, in reverse order of creation. It cannot run afterwards."""
        self._context = None
        self._engine = None
        self._runtime = None


class _Log:
    """The first warnings and errors of TensorRT's log."""

    def __init__(self) -> None:
        self._lines: list[tuple[str, str]] = []

    def add(self, severity: str, text: str) -> None:
        if severity in ("WARNING", "ERROR", "INTERNAL_ERROR") and len(self._lines) < _KEPT:
            self._lines.append((severity, _one_line(text)))

    def texts(self, *severities: str) -> list[str]:
        return list(dict.fromkeys(text for severity, text in self._lines if severity in severities))

    def clear(self) -> None:
        self._lines.clear()


@functools.cache
def _collector(trt: ModuleType) -> tuple[Any, _Log]:
    """Return the logger of a module and its log. TensorRT keeps the first logger that it gets, so there is only one."""
    log = _Log()

    class Collector(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.add(severity.name, message)

    return Collector(), log


def _monitor(trt: ModuleType, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}  # shared by threads; single operations on a dict are atomic

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._steps[name] = steps

        def step_complete(self, name: str, step: int) -> bool:
            of = self._steps.get(name, 0)
            with contextlib.suppress(OSError, ValueError):  # a closed pipe; C++ must not see an exception
                progress(name, step + 1, of)
            return True

        def phase_finish(self, name: str) -> None:
            self._steps.pop(name, None)

    return Monitor()


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: bindings without their library
        where = "pip install tensorrt-rtx" if module.endswith("_rtx") else "on a Jetson it comes with JetPack"
        raise EnvironmentUnfitError(f"the package '{module}' cannot be imported ({error}); {where}") from error


def _summary(trt: ModuleType, engine: Any) -> dict[str, Any]:
    """Count the layers by kind and by the type of their first output."""
    inspector = engine.create_engine_inspector()
    try:
        layers = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))["Layers"]
    except (ValueError, KeyError, TypeError):
        return {"layers": engine.num_layers}
    kinds: Counter[str] = Counter()
    types: Counter[str] = Counter()
    for layer in layers:
        if isinstance(layer, dict):  # otherwise only the name is known
            kinds[str(layer.get("LayerType", "unknown"))] += 1
            found = _TYPE.search(json.dumps((layer.get("Outputs") or [{}])[0].get("Format/Datatype", "")))
            types[found[1].lower() if found else "unknown"] += 1
    return {"layers": len(layers), "kinds": dict(sorted(kinds.items())), "types": dict(sorted(types.items()))}


def _parser_error(error: Any) -> str:
    """Return the message of a parser error, with its operator if the message does not name it."""
    message = _one_line(error.desc())
    operator = error.node_operator() if hasattr(error, "node_operator") else ""
    return message if not operator or operator in message else f"{operator} '{error.node_name()}': {message}"


def _type_name(dtype: Any) -> str:
    """Return the name of a type in lower case, e.g. ``uint8``, ``float`` or ``half``."""
    return str(dtype.name).lower()


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]
