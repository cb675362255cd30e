"""One way to TensorRT 10.3 … 11.4, and to TensorRT-RTX, which builds without a GPU.

Only what all of them have is used: tensors by name, memory pools, strong typing. Where a generation lacks something,
or another took it away, it is asked for first. Precision is in the graph: no flag here narrows anything, and TF32,
which TensorRT allows by default, is switched off, so that fp32 is fp32.

TensorRT returns None where others raise, and puts the reason into a log: here the log is kept, and its words go into
the error.
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

BATCHES = (1, 8, 32)  # smallest, the one to optimise for, largest
WORKSPACE = 512 << 20  # bytes; a 4 GB board shares its memory with everything else
OLDEST = (10, 3)
_KEPT = 200  # lines of the log
_NO_GPU = re.compile(
    r"cudaError (?:35|100)\b[^)]*|CUDA initialization failure with error: \d+|no CUDA-capable device[^.;)]*",
    re.IGNORECASE,
)
_OTHER_VERSION = re.compile(r"Current Version: *(\d+), *Serialized Engine Version: *(\d+)", re.IGNORECASE)
_MEMORY = re.compile(r"out ?of ?memory|insufficient memory|bad_alloc|memory allocation", re.IGNORECASE)
_TYPE = re.compile(r"\b(BF16|FP16|FP32|FP8|Half|Float|U?Int8|Int32|Int64|Bool)\b", re.IGNORECASE)

Progress = Callable[[str, int, int], None]  # phase, steps done, steps in all


@dataclasses.dataclass(frozen=True)
class Built:
    """An engine, and what was seen while it was built.

    Attributes:
        plan: the serialised engine.
        layers: of the network as it was parsed.
        input: type of the input, e.g. ``uint8``.
        seconds: parsing and building.
        timing_cache: to make the next build on the same machine faster; None where there is none.
        warnings: of the builder.
    """

    plan: bytes
    layers: int
    input: str
    seconds: float
    timing_cache: bytes | None
    warnings: list[str]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An input or output of an engine: its type in lower case as TensorRT names it; −1 in a shape is the batch."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class TensorRT:
    """The installed TensorRT.

    Args:
        module: its import name; ``tensorrt`` or ``tensorrt_rtx``.

    Attributes:
        module: as given.
        version: what it says of itself, e.g. ``10.3.0``.

    Raises:
        EnvironmentUnfitError: it cannot be imported, or is older than 10.3.
    """

    def __init__(self, module: str = "tensorrt") -> None:
        self.module = module
        self._trt = _import(module)
        self.version: str = self._trt.__version__
        self._rtx = module.endswith("_rtx")  # counts its versions from 1, and makes timings on the GPU at run time
        found = tuple(int(part) for part in re.findall(r"\d+", self.version)[:2])
        if not self._rtx and found < OLDEST:
            raise EnvironmentUnfitError(
                f"TensorRT {self.version} is installed, but at least {OLDEST[0]}.{OLDEST[1]} is needed (JetPack 6.1); "
                "update JetPack, or run the backbone with ONNX Runtime"
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
        """Build an engine for this machine's GPU (TensorRT-RTX: for its kinds of GPU, without one).

        Args:
            onnx: the graph; a single file.
            batches: smallest, usual and largest batch; not used for a graph with a fixed batch.
            workspace: bytes of scratch memory that a layer may take.
            timing_cache: of an earlier build on the same machine, or empty to begin one; None: none is kept.
            progress: told from threads of the builder, where TensorRT has that.

        Raises:
            GateRefusedError: TensorRT does not take the graph; in its own words.
            EnvironmentUnfitError: no usable GPU, or not enough memory.
        """
        trt, started = self._trt, time.perf_counter()
        self._log.clear()
        builder = self._create(trt.Builder)
        network = builder.create_network(self._creation_flags())
        parser = trt.OnnxParser(network, self._logger)  # owns the weights: must outlive the build
        if not parser.parse(onnx):
            told = "; ".join(_parser_error(parser.get_error(index)) for index in range(parser.num_errors))
            raise GateRefusedError(f"{self} cannot parse the graph ({told or self._told()}); export it again")
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if hasattr(trt.BuilderFlag, "TF32"):
            config.clear_flag(trt.BuilderFlag.TF32)
        self._add_profile(builder, network, config, batches)
        cached = self._set_timing_cache(config, timing_cache)
        monitor = None if progress is None else _monitor(trt, progress)  # must outlive the build, too
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
            warnings=self._log.words("WARNING"),
        )

    def load(self, plan: bytes) -> Engine:
        """Deserialise an engine that was built on this machine; never one that came from elsewhere.

        Raises:
            EnvironmentUnfitError: no usable GPU, or another TensorRT built it.
        """
        self._log.clear()
        runtime = self._create(self._trt.Runtime)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is not None:
            return Engine(self._trt, runtime, engine, self._told)
        told = self._told()
        if versions := _OTHER_VERSION.search(told):
            raise EnvironmentUnfitError(
                f"{self} reads engines of format {versions[1]}, but this one has format {versions[2]}: another version "
                "built it; delete the engine, and it is built again"
            )
        if _NO_GPU.search(told):
            raise self._no_gpu(told)
        raise EnvironmentUnfitError(f"{self} cannot load the engine ({told}); delete it, and it is built again")

    def _create(self, kind: Any) -> Any:
        try:
            made = kind(self._logger)
        except TypeError as error:  # "factory function returned nullptr": how the bindings say that there is no GPU
            raise self._no_gpu(self._told(_one_line(str(error)))) from error
        if made is None:
            raise self._no_gpu(self._told())
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
                    f"the graph's input '{tensor.name}' has the shape {shape}, but only its batch may vary; "
                    "export it with a fixed image size"
                )
            if shape and shape[0] == -1:
                profile.set_shape(tensor.name, *[(batch, *shape[1:]) for batch in batches])
                dynamic = True
        if dynamic and config.add_optimization_profile(profile) < 0:
            raise GateRefusedError(f"{self} refuses the batches {tuple(batches)} ({self._told()})")

    def _set_timing_cache(self, config: Any, known: bytes | None) -> bool:
        if known is None or self._rtx:  # TensorRT-RTX would need a GPU for it
            return False
        cache = config.create_timing_cache(known)
        if cache is None or not config.set_timing_cache(cache, False):
            cache = config.create_timing_cache(b"")  # of another version or board: start anew
            return cache is not None and bool(config.set_timing_cache(cache, False))
        return True

    def _build_failed(self) -> None:
        told = self._told()
        if _NO_GPU.search(told):
            raise self._no_gpu(told)
        if _MEMORY.search(told):
            raise EnvironmentUnfitError(
                f"{self} ran out of memory while it built the engine ({told}); stop other programs or add swap"
            )
        raise GateRefusedError(f"{self} cannot build an engine of the graph ({told}); export it again")

    def _no_gpu(self, told: str) -> EnvironmentUnfitError:
        found = _NO_GPU.search(told)
        return EnvironmentUnfitError(
            f"{self} finds no GPU that it can use ({found[0] if found else told}); check the NVIDIA driver, or run the "
            "backbone with ONNX Runtime"
        )

    def _told(self, otherwise: str = "it gave no reason") -> str:
        return "; ".join(self._log.words("ERROR", "INTERNAL_ERROR")[:3]) or otherwise


class Engine:
    """A deserialised engine with one input and one output; `close` frees it.

    Attributes:
        input, output: its tensors.
        max_batch: of its optimisation profile, or its fixed batch.
        memory: bytes that it takes on the GPU to run, without its weights.
        summary: number and kinds of its layers, and the types that they give; as far as the inspector tells.
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
                f"the engine has {counts[0]} inputs and {counts[1]} outputs, but one of each is needed; export the "
                "backbone again"
            )
        (self.input,), (self.output,) = tensors.values()
        batch = self.input.shape[0]
        self.max_batch = batch if batch > 0 else int(engine.get_tensor_profile_shape(self.input.name, 0)[2][0])
        # version 1 went away in TensorRT 11
        size = getattr(engine, "device_memory_size_v2", None)
        self.memory = int(engine.device_memory_size if size is None else size)
        self.summary = {"memory": self.memory, **_summary(trt, engine)}

    def run(self, batch: int, source: int, target: int, stream: int) -> None:
        """Start the computation of a batch on a CUDA stream.

        Args:
            batch: images, at most `max_batch`.
            source: address of the input on the GPU.
            target: address of the output on the GPU.
            stream: handle of the CUDA stream.

        Raises:
            EnvironmentUnfitError: TensorRT could not start it.
        """
        context = self._context
        if context is None:
            context = self._context = self._engine.create_execution_context()
            if context is None:
                raise EnvironmentUnfitError(
                    f"TensorRT cannot run the engine ({self._errors()}); free some GPU memory ({self.memory} bytes "
                    "are needed besides the weights)"
                )
        taken = (
            context.set_input_shape(self.input.name, (batch, *self.input.shape[1:]))
            and context.set_tensor_address(self.input.name, source)
            and context.set_tensor_address(self.output.name, target)
            and context.execute_async_v3(stream)
        )
        if not taken:
            raise EnvironmentUnfitError(
                f"TensorRT cannot run a batch of {batch} ({self._errors()}); free some GPU memory, or run the backbone "
                "with ONNX Runtime"
            )

    def close(self) -> None:
        """Free it; it cannot be run any more. What was made last goes first."""
        self._context = None
        self._engine = None
        self._runtime = None


class _Log:
    """The last lines of TensorRT's log, without those that only inform."""

    def __init__(self) -> None:
        self._lines: list[tuple[str, str]] = []

    def add(self, severity: str, text: str) -> None:
        if severity in ("WARNING", "ERROR", "INTERNAL_ERROR") and len(self._lines) < _KEPT:
            self._lines.append((severity, _one_line(text)))

    def words(self, *severities: str) -> list[str]:
        return list(dict.fromkeys(text for severity, text in self._lines if severity in severities))

    def clear(self) -> None:
        self._lines.clear()


@functools.cache
def _collector(trt: ModuleType) -> tuple[Any, _Log]:
    """The logger of a module: TensorRT keeps to the first one that it is given, so that one is used and stays."""
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
            self._steps: dict[str, int] = {}  # called from several threads: one operation at a time on it is safe

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._steps[name] = steps

        def step_complete(self, name: str, step: int) -> bool:
            of = self._steps.get(name, 0)
            with contextlib.suppress(OSError, ValueError):  # whoever listened has gone; C++ must not see an exception
                progress(name, step + 1, of)
            return True

        def phase_finish(self, name: str) -> None:
            self._steps.pop(name, None)

    return Monitor()


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # bindings without their library
        where = "pip install tensorrt-rtx" if module.endswith("_rtx") else "on a Jetson it comes with JetPack"
        raise EnvironmentUnfitError(f"the package '{module}' cannot be imported ({error}); {where}") from error


def _summary(trt: ModuleType, engine: Any) -> dict[str, Any]:
    """Layers by kind, and by the type of their first output."""
    inspector = engine.create_engine_inspector()
    try:
        layers = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))["Layers"]
    except (ValueError, KeyError, TypeError):
        return {"layers": engine.num_layers}
    kinds: Counter[str] = Counter()
    types: Counter[str] = Counter()
    for layer in layers:
        if isinstance(layer, dict):  # else only its name is known
            kinds[str(layer.get("LayerType", "unknown"))] += 1
            found = _TYPE.search(json.dumps((layer.get("Outputs") or [{}])[0].get("Format/Datatype", "")))
            types[found[1].lower() if found else "unknown"] += 1
    return {"layers": len(layers), "kinds": dict(sorted(kinds.items())), "types": dict(sorted(types.items()))}


def _parser_error(error: Any) -> str:
    """What it says, and of which operator: that is not always in its words."""
    told = _one_line(error.desc())
    operator = error.node_operator() if hasattr(error, "node_operator") else ""
    return told if not operator or operator in told else f"{operator} '{error.node_name()}': {told}"


def _type_name(dtype: Any) -> str:
    """``uint8``, ``float``, ``half``, …"""
    return str(dtype.name).lower()


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]
