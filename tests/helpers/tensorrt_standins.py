"""Stand-ins for the Python API of TensorRT 10.3, 10.16 and 11.4, without its computations.

Each version has only those of the symbols used by SSD-Edge that its wheel has; slotted classes and enumerations raise
AttributeError for the others. A "graph" is JSON, and so is a "plan"; running one multiplies the mean of each image by
1, 2, …, D, from and to the given addresses.
"""

from __future__ import annotations

import ctypes
import enum
import json
from types import ModuleType
from typing import Any

import numpy as np

SERIAL = {"10.3.0": 239, "10.16.2.10": 241, "11.4.0.106": 301}  # format number in the plans of each version
GENERATIONS = tuple(SERIAL)


def graph(shape: tuple[int, ...] = (-1, 4, 4, 3), dim: int = 5, **trouble: Any) -> bytes:
    """Return a graph for the stand-ins' parser; `trouble` is ``parse=[errors]`` or ``build=[errors]``."""
    return json.dumps({"shape": shape, "dim": dim, **trouble}).encode()


def expected(images: np.ndarray, dim: int = 5) -> np.ndarray:
    """Return the output of running the graph."""
    means = images.reshape(len(images), -1).mean(1, dtype=np.float64)
    return (means[:, None] * np.arange(1, dim + 1)).astype(np.float32)


def make(version: str, gpu: bool = True) -> ModuleType:
    """Return a module like `tensorrt` of that version; ``module.executed`` lists (batch, stream) of each run."""
    trt = ModuleType("tensorrt")
    trt.__version__ = version
    serial, new, newest = SERIAL.get(version, 1), version != "10.3.0", version.startswith("11.")
    trt.executed = []

    trt.NetworkDefinitionCreationFlag = enum.IntEnum(
        "NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1} if newest else {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}
    )
    flags = ["TF32", "STRIP_PLAN", "REFIT_IDENTICAL", "VERSION_COMPATIBLE"]
    flags += ["EDITABLE_TIMING_CACHE"] if new else []
    flags += [] if newest else ["FP16", "INT8"]
    trt.BuilderFlag = enum.Enum("BuilderFlag", flags)
    trt.MemoryPoolType = enum.Enum("MemoryPoolType", ["WORKSPACE"])
    trt.ProfilingVerbosity = enum.Enum("ProfilingVerbosity", ["LAYER_NAMES_ONLY", "NONE", "DETAILED"])
    trt.LayerInformationFormat = enum.Enum("LayerInformationFormat", ["ONELINE", "JSON"])
    trt.TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
    trt.DataType = enum.Enum("DataType", ["FLOAT", "HALF", "UINT8"])
    Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])

    class ILogger:
        pass

    class IProgressMonitor:
        pass

    trt.ILogger, trt.IProgressMonitor = ILogger, IProgressMonitor

    class Tensor:
        def __init__(self, name: str, shape: list[int]) -> None:
            self.name, self.shape, self.dtype = name, tuple(shape), trt.DataType.UINT8

    class Network:
        __slots__ = ("graph",)
        num_layers, num_inputs = 3, 1

        def get_input(self, index: int) -> Tensor:
            return Tensor("images", self.graph["shape"])

    class ParserError:
        def __init__(self, text: str) -> None:
            self._text = text

        def desc(self) -> str:
            return self._text

        def node_operator(self) -> str:
            return "Foo"

        def node_name(self) -> str:
            return "body/1"

    class OnnxParser:
        def __init__(self, network: Network, logger: ILogger) -> None:
            self._network, self._errors = network, []

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> ParserError:
            return ParserError(self._errors[index])

        def parse(self, model: bytes) -> bool:
            self._network.graph = json.loads(model)
            self._errors = self._network.graph.get("parse", [])
            return not self._errors

    trt.OnnxParser = OnnxParser

    class Profile:
        shapes: tuple | None = None

        def set_shape(self, name: str, smallest: tuple, usual: tuple, largest: tuple) -> None:
            assert name == "images"
            self.shapes = (smallest, usual, largest)

    class TimingCache:
        def __init__(self, data: bytes) -> None:
            self.data = data

        def serialize(self) -> memoryview:
            return memoryview(self.data)

    class Config:
        __slots__ = ("_cache", "_flags", "_profile", "_workspace", "profiling_verbosity", "progress_monitor")

        def __init__(self) -> None:
            self._flags, self._profile, self._cache, self.progress_monitor = {trt.BuilderFlag.TF32}, None, None, None

        def clear_flag(self, flag: Any) -> None:
            self._flags.discard(flag)

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            assert pool is trt.MemoryPoolType.WORKSPACE
            self._workspace = size

        def add_optimization_profile(self, profile: Profile) -> int:
            self._profile = profile.shapes
            return 0 if profile.shapes else -1

        def create_timing_cache(self, data: bytes) -> TimingCache:
            return TimingCache(data)

        def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            if cache.data and cache.data != f"timings of {serial}".encode():
                return False
            self._cache = cache
            return True

        def get_timing_cache(self) -> TimingCache:
            return self._cache

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            if not gpu:
                logger.log(Severity.ERROR, "CUDA initialization failure with error: 35. Please check your installation")
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self._logger = logger

        def create_network(self, flags: int = 0) -> Network:
            assert newest or flags == 1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
            return Network()

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> memoryview | None:
            self._logger.log(Severity.INFO, "this only informs")
            self._logger.log(Severity.WARNING, "a tactic was\n  skipped")
            for text in network.graph.get("build", []):
                self._logger.log(Severity.ERROR, text)
            if network.graph.get("build"):
                return None
            if config.progress_monitor is not None:
                config.progress_monitor.phase_start("Building", None, 2)
                assert config.progress_monitor.step_complete("Building", 0) is True
                config.progress_monitor.phase_finish("Building")
            if config._cache is not None:
                config._cache.data = f"timings of {serial}".encode()
            plan = {
                **network.graph,
                "serial": serial,
                "profile": config._profile,
                "tf32": trt.BuilderFlag.TF32 in config._flags,
                "workspace": config._workspace,
                "verbosity": config.profiling_verbosity.name,
            }
            return memoryview(json.dumps(plan).encode())

    trt.Builder = Builder

    class Inspector:
        def __init__(self, detailed: bool) -> None:
            self._detailed = detailed

        def get_engine_information(self, form: Any) -> str:
            assert form is trt.LayerInformationFormat.JSON
            outputs = [{"Name": "y", "Format/Datatype": "Row major linear FP32"}]
            conv = {"LayerType": "CaskConvolution", "Outputs": [{"Format/Datatype": "Channel major FP16 format"}]}
            layers = [conv, conv, {"LayerType": "Reformat", "Outputs": outputs}] if self._detailed else ["a", "b", "c"]
            return json.dumps({"Layers": layers, "I/O Tensors" if newest else "Bindings": ["images", "embeddings"]})

    class Context:
        def __init__(self, plan: dict[str, Any]) -> None:
            self._plan, self._at, self._batch = plan, {}, 0

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            assert name == "images"
            self._batch = shape[0]
            allowed = self._plan["profile"] or [self._plan["shape"]]
            return allowed[0][0] <= shape[0] <= allowed[-1][0] and list(shape[1:]) == self._plan["shape"][1:]

        def set_tensor_address(self, name: str, address: int) -> bool:
            self._at[name] = address
            return True

        def execute_async_v3(self, stream: int) -> bool:
            shape = (self._batch, *self._plan["shape"][1:])
            taken = (ctypes.c_uint8 * int(np.prod(shape))).from_address(self._at["images"])
            given = (ctypes.c_float * (self._batch * self._plan["dim"])).from_address(self._at["embeddings"])
            values = expected(np.ctypeslib.as_array(taken).reshape(shape), self._plan["dim"])
            np.ctypeslib.as_array(given)[:] = np.nan if self._plan.get("nan") else values.ravel()
            trt.executed.append((self._batch, stream))
            return True

    class Engine:
        num_io_tensors, num_layers = 2, 3
        device_memory_size_v2 = 1024

        def __init__(self, plan: dict[str, Any]) -> None:
            self._plan = plan

        def get_tensor_name(self, index: int) -> str:
            return ("images", "embeddings")[index]

        def get_tensor_mode(self, name: str) -> Any:
            return trt.TensorIOMode.INPUT if name == "images" else trt.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            return trt.DataType.UINT8 if name == "images" else trt.DataType[self._plan.get("output", "FLOAT")]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            shape = self._plan["shape"]
            return tuple(shape) if name == "images" else (shape[0], self._plan["dim"])

        def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
            assert (name, profile) == ("images", 0)
            return [tuple(shape) for shape in self._plan["profile"]]

        def create_engine_inspector(self) -> Inspector:
            return Inspector(self._plan["verbosity"] == "DETAILED")

        def create_execution_context(self) -> Context:
            return Context(self._plan)

    if not newest:
        Engine.device_memory_size = 1024
    if new:
        Engine.get_engine_stat = lambda self, stat: 0

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            self._logger = logger
            if gpu:
                return
            if newest:
                logger.log(Severity.ERROR, "cudaError 35: CUDA driver version is insufficient for CUDA runtime version")
            else:
                logger.log(Severity.ERROR, "CUDA initialization failure with error: 35. Please check your installation")
                raise TypeError("pybind11::init(): factory function returned nullptr")

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            try:
                found = json.loads(plan)
            except ValueError:
                self._logger.log(Severity.ERROR, "Serialization assertion header.magicTag == kPLAN_MAGIC_TAG failed.")
                return None
            if found["serial"] != serial:
                told = f"Version tag does not match. Note: Current Version: {serial}, Serialized Engine Version: "
                self._logger.log(Severity.ERROR, f"{told}{found['serial']}")
                return None
            return Engine(found) if gpu else None

    trt.Runtime = Runtime
    return trt


def real_onnx(batch: int | str = "batch", operator: str = "Relu") -> bytes:
    """Return a real graph for TensorRT-RTX: uint8 (batch, 8, 8, 3) to float32 (batch, 6)."""
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(5).standard_normal((6, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["pixels"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["nchw", "weight"], ["conv"]),
        helper.make_node(operator, ["conv"], ["relu"], name="body/2"),
        helper.make_node("ReduceMean", ["relu", "axes"], ["embeddings"], keepdims=0),
    ]
    made = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, [batch, 8, 8, 3])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, [batch, 6])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(np.array([2, 3]), "axes")],
    )
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(made, opset_imports=opset, ir_version=8).SerializeToString()
