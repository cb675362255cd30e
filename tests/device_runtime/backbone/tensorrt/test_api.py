"""The TensorRT wrapper, with stand-ins for three versions and with TensorRT-RTX if it is installed."""

from __future__ import annotations

import ctypes
import json
import sys

import numpy as np
import pytest
from helpers import tensorrt_standins

from device_runtime.backbone.tensorrt.api import TensorRT
from ssd_edge.errors import EnvironmentUnfitError, GateRefusedError

STANDINS = vars(tensorrt_standins)
graph, GENERATIONS = STANDINS["graph"], STANDINS["GENERATIONS"]


@pytest.fixture
def standin(monkeypatch):
    """Return ``standin("10.3.0", gpu=True)``, which installs a stand-in module as `tensorrt` and returns it."""

    def install(version: str, gpu: bool = True):
        module = STANDINS["make"](version, gpu)
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        return module

    return install


@pytest.mark.parametrize("version", GENERATIONS)
def test_build_load_and_run_on_each_version(standin, version):
    module = standin(version)
    api = TensorRT()
    seen = []
    built = api.build(graph(), workspace=1 << 20, progress=lambda *step: seen.append(step))
    assert (built.layers, built.input, built.timing_cache) == (3, "uint8", None)
    assert built.warnings == ["a tactic was skipped"]
    assert seen == [("Building", 1, 2)]
    plan = json.loads(built.plan)
    assert (plan["tf32"], plan["workspace"], plan["verbosity"]) == (False, 1 << 20, "DETAILED")
    assert [shape[0] for shape in plan["profile"]] == [1, 8, 32]
    engine = api.load(built.plan)
    assert (engine.max_batch, engine.memory) == (32, 1024)
    assert (engine.input.dtype, engine.output.dtype, engine.output.shape) == ("uint8", "float", (-1, 5))
    kinds = {"CaskConvolution": 2, "Reformat": 1}
    assert engine.summary == {"memory": 1024, "layers": 3, "kinds": kinds, "types": {"fp16": 2, "fp32": 1}}
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    given = np.zeros((3, 5), np.float32)
    engine.run(3, images.ctypes.data_as(ctypes.c_void_p).value, given.ctypes.data_as(ctypes.c_void_p).value, 7)
    np.testing.assert_array_equal(given, STANDINS["expected"](images))
    assert module.executed == [(3, 7)]
    with pytest.raises(EnvironmentUnfitError, match="cannot run a batch of 33"):
        engine.run(33, 0, 0, 7)
    engine.close()


def test_standins_differ_like_the_versions():
    """Without these differences of the real wheels the test above would prove nothing."""
    old, middle, new = (STANDINS["make"](version) for version in GENERATIONS)
    flags = [m.NetworkDefinitionCreationFlag for m in (old, middle, new)]
    assert [hasattr(flag, "EXPLICIT_BATCH") for flag in flags] == [True, True, False]
    assert [hasattr(m.BuilderFlag, "FP16") for m in (old, middle, new)] == [True, True, False]
    assert [hasattr(m.BuilderFlag, "EDITABLE_TIMING_CACHE") for m in (old, middle, new)] == [False, True, True]
    engines = [m.Runtime(m.ILogger()).deserialize_cuda_engine(b'{"serial": %d}' % s) for m, s in
               zip((old, middle, new), STANDINS["SERIAL"].values(), strict=True)]  # fmt: skip
    assert [hasattr(engine, "device_memory_size") for engine in engines] == [True, True, False]
    assert [hasattr(engine, "get_engine_stat") for engine in engines] == [False, True, True]
    assert not any(hasattr(engine, "num_bindings") for engine in engines)


@pytest.mark.parametrize("version", GENERATIONS)
def test_timing_cache_is_reused_by_the_same_version_only(standin, version):
    standin(version)
    api = TensorRT()
    first = api.build(graph(), timing_cache=b"").timing_cache
    assert first.startswith(b"timings of ")
    assert api.build(graph(), timing_cache=first).timing_cache == first
    assert api.build(graph(), timing_cache=b"timings of another board").timing_cache == first


def test_fixed_batch_needs_no_profile(standin):
    standin("10.3.0")
    api = TensorRT()
    built = api.build(graph((1, 4, 4, 3)))
    assert json.loads(built.plan)["profile"] is None
    assert api.load(built.plan).max_batch == 1


def test_only_the_batch_may_be_dynamic(standin):
    standin("10.3.0")
    with pytest.raises(GateRefusedError, match=r"'images' has the shape \(-1, -1, 4, 3\), but only the batch may"):
        TensorRT().build(graph((-1, -1, 4, 3)))


@pytest.mark.parametrize("version", GENERATIONS)
def test_message_has_all_parser_errors(standin, version):
    standin(version)
    message = rf"TensorRT {version} cannot parse the graph \(no Foo here; Foo 'body/1': nor Bar"
    with pytest.raises(GateRefusedError, match=message):
        TensorRT().build(graph(parse=["no Foo\n here", "nor Bar"]))


@pytest.mark.parametrize(
    ("logged", "kind"),
    [
        ("TopK: K exceeds the maximum value allowed (3840)", GateRefusedError),
        ("[virtualMemoryBuffer.cpp] Requested size was 5368709120 bytes: OutOfMemory", EnvironmentUnfitError),
        ("Cuda Runtime (out of memory)", EnvironmentUnfitError),
        ("cudaError 100: no CUDA-capable device is detected", EnvironmentUnfitError),
    ],
)
def test_failed_build_has_the_logged_reason(standin, logged, kind):
    standin("11.4.0.106")
    with pytest.raises(kind) as raised:
        TensorRT().build(graph(build=[logged]))
    assert logged in str(raised.value)
    assert type(raised.value) is kind


def test_message_omits_the_log_of_an_earlier_failure(standin):
    standin("10.3.0")
    api = TensorRT()
    with pytest.raises(GateRefusedError, match="first trouble"):
        api.build(graph(build=["first trouble"]))
    with pytest.raises(GateRefusedError, match=r"\(second trouble\)"):
        api.build(graph(build=["second trouble"]))


@pytest.mark.parametrize("version", GENERATIONS)
def test_without_a_gpu(standin, version):
    standin(version)
    plan = TensorRT().build(graph()).plan
    standin(version, gpu=False)
    api = TensorRT()
    for action in (lambda: api.build(graph()), lambda: api.load(plan)):
        with pytest.raises(EnvironmentUnfitError, match=r"finds no usable GPU \(.*35.*\); check the NVIDIA"):
            action()


def test_engine_of_another_version_is_refused_with_both_formats(standin):
    standin("10.16.2.10")
    plan = TensorRT().build(graph()).plan
    standin("10.3.0")
    with pytest.raises(
        EnvironmentUnfitError,
        match="reads engines of format 239, but this one, built by another version, has format 241",
    ):
        TensorRT().load(plan)


def test_bytes_that_are_no_engine_are_refused(standin):
    standin("10.3.0")
    with pytest.raises(EnvironmentUnfitError, match=r"cannot load the engine .*magicTag"):
        TensorRT().load(b"\x00nonsense")


def test_version_that_is_too_old_is_refused(standin):
    standin("8.6.1")
    with pytest.raises(
        EnvironmentUnfitError, match=r"TensorRT 8\.6\.1 is installed, but at least 10\.3 \(JetPack 6\.1\) is required"
    ):
        TensorRT()


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_bindings_without_their_library_are_refused(tmp_path, monkeypatch, error):
    (tmp_path / "half_tensorrt.py").write_text(f"raise {error}('libnvonnxparser.so.11: cannot open')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EnvironmentUnfitError, match=r"cannot be imported \(libnvonnxparser.so.11: cannot open\)"):
        TensorRT("half_tensorrt")


@pytest.fixture
def rtx() -> TensorRT:
    pytest.importorskip("tensorrt_rtx", reason="NVIDIA's parser is not here: pip install tensorrt-rtx (x86-64 Linux)")
    return TensorRT("tensorrt_rtx")


@pytest.fixture(scope="module")
def real_graph() -> bytes:
    return STANDINS["real_onnx"]()


def test_tensorrt_rtx_accepts_uint8_input(rtx, real_graph):
    seen = []
    built = rtx.build(real_graph, timing_cache=b"", progress=lambda *step: seen.append(step))
    assert built.input == "uint8"
    assert built.layers >= 4
    assert len(built.plan) > 10_000
    assert built.timing_cache is None  # it needs a GPU
    assert seen


def test_tensorrt_rtx_accepts_a_batch_of_one(rtx):
    assert rtx.build(STANDINS["real_onnx"](batch=1)).plan


def test_tensorrt_rtx_names_unknown_operators(rtx):
    with pytest.raises(GateRefusedError, match=r"RTX .* cannot parse the graph \(NoSuchOperator 'body/2': "):
        rtx.build(STANDINS["real_onnx"](operator="NoSuchOperator"))
    with pytest.raises(GateRefusedError, match="Failed to parse the ONNX model"):
        rtx.build(b"nonsense")


def test_tensorrt_rtx_cannot_load_without_a_gpu(rtx, real_graph):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(EnvironmentUnfitError, match=r"TensorRT-RTX .* finds no usable GPU \(cudaError 35"):
        rtx.load(rtx.build(real_graph).plan)
