"""The choice of the runtime, and the report of every runtime that is skipped.

TensorRT and ONNX Runtime's providers for a GPU are stand-ins; the wrapper and the engine cache have tests of their own.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_runtime.backbone import embedder
from device_runtime.backbone.embedder import CPU, CUDA, OnnxRuntimeEmbedder, open_embedder
from device_runtime.backbone.interface import BackboneSpec, EngineRecord
from device_runtime.backbone.tensorrt import api as tensorrt_api
from device_runtime.backbone.tensorrt import embedder as tensorrt_embedder
from device_runtime.backbone.tensorrt import engines
from device_runtime.store.generations import Generations
from ssd_edge import bundle, ort
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, SlowerProviderError

onnxruntime = ort.load()
TENSORRT_PROVIDER = "TensorrtExecutionProvider"


@pytest.fixture
def opened(tiny_bundle, tmp_path):
    """Return ``opened(report)``, which opens the embedder of a root with a tiny backbone."""
    read = bundle.parse(tiny_bundle())
    store = Generations(tmp_path / "root")
    with store.writer():
        backbone = store.add_backbone(read.read("backbone"))
    arrays, limits = read.tensors("probe")

    def run(report=lambda text: None, target="cpu", strict=False, **changes):
        facts = {**read.manifest["backbone"], "target": target, **changes}
        return open_embedder(store, BackboneSpec.from_facts(backbone, facts), (arrays, limits), report, strict)

    run.arrays, run.store = arrays, store
    return run


class StandInRuntime(types.ModuleType):
    """ONNX Runtime with GPU providers, for which the CPU computes.

    Attributes:
        absent: Providers that are listed, but do not start.
        raises: Error of creating a session, by provider.
        fails: Error of running a session, by provider.
        wrong: Offset of the embeddings, by provider.
        requested: Providers of each session.
    """

    def __init__(self) -> None:
        super().__init__("onnxruntime")
        self.__version__, self.SessionOptions = "1.23.2", onnxruntime.SessionOptions
        self.absent: set[str] = set()
        self.raises: dict[str, Exception] = {}
        self.fails: dict[str, Exception] = {}
        self.wrong: dict[str, float] = {}
        self.requested: list[list[str]] = []

    def get_available_providers(self) -> list[str]:
        return [TENSORRT_PROVIDER, CUDA, "AzureExecutionProvider", CPU]

    def InferenceSession(self, model: str, options: Any, providers: list[str], enable_fallback: int = 1) -> Any:
        assert enable_fallback == 0
        self.requested.append(providers)
        started = [name for name in providers if name not in self.absent]
        if providers[0] in self.raises:
            raise self.raises[providers[0]]
        real = onnxruntime.InferenceSession(model, options, providers=[CPU])

        def run(names: None, given: dict[str, np.ndarray]) -> list[np.ndarray]:
            if started[0] in self.fails:
                raise self.fails[started[0]]
            return [real.run(names, given)[0] + np.float32(self.wrong.get(started[0], 0.0))]

        return types.SimpleNamespace(
            get_providers=lambda: started, get_inputs=real.get_inputs, run=run, disable_fallback=lambda: None
        )


@pytest.fixture
def runtime(monkeypatch):
    """Install an ONNX Runtime that lists a CUDA and a TensorRT provider."""
    put = StandInRuntime()
    monkeypatch.setitem(sys.modules, "onnxruntime", put)
    return put


class StandIn:
    """A stand-in for `TensorRTEmbedder`: the embeddings of ONNX Runtime, shifted by `wrong`."""

    provider, engine, wrong, closed = "TensorRT 10.3.0 (stand-in)", None, 0.0, 0

    def __init__(self, plan: Path, size: int, dim: int, api: object) -> None:
        self.size, self.dim = size, dim
        self._runs = OnnxRuntimeEmbedder(plan, size, dim)

    def embed(self, images: np.ndarray) -> np.ndarray:
        return self._runs.embed(images) + np.float32(self.wrong)

    def close(self) -> None:
        type(self).closed += 1


@pytest.fixture
def tensorrt(monkeypatch):
    """Install stand-ins for TensorRT and a GPU; return a class whose attributes record and control them."""

    class Machine:
        gpu, built, failure = engines.GpuFacts("Orin", "8.7", 8, "12.6", "12.6"), [], None

    class Cache:
        def __init__(self, folder: Path) -> None:
            self.folder = folder

        def get(self, facts):
            return Machine.built[-1] if Machine.built else None

        def build(self, onnx, facts, report):
            if Machine.failure is not None:
                raise Machine.failure
            assert facts.tensorrt == "10.3.0"
            assert facts.precision == "fp32"
            Machine.built.append(onnx)
            return onnx

        def record(self, facts):
            return EngineRecord(61.0, 4_000_000, "", {"parsed": 12}, {}, 1)

    class Api:
        version = "10.3.0"

    Machine.built = []
    StandIn.wrong, StandIn.closed = 0.0, 0
    found = importlib.util.find_spec
    spec = lambda name: object() if name == "tensorrt" else found(name)  # noqa: E731
    monkeypatch.setattr(embedder.importlib.util, "find_spec", spec)
    monkeypatch.setattr(engines, "gpu_facts", lambda: Machine.gpu)
    monkeypatch.setattr(engines, "EngineCache", Cache)
    monkeypatch.setattr(tensorrt_api, "TensorRT", Api)
    monkeypatch.setattr(tensorrt_embedder, "TensorRTEmbedder", StandIn)
    return Machine


def test_without_tensorrt_onnx_runtime_is_used(opened):
    messages = []
    found = opened(messages.append)
    assert found.provider == "CPUExecutionProvider"
    assert found.engine is None
    assert messages == []
    np.testing.assert_allclose(found.embed(opened.arrays["images"]), opened.arrays["embeddings"], atol=1e-5)


def test_tensorrt_engine_is_built_once_and_its_layers_are_reported(opened, tensorrt):
    messages = []
    found = opened(messages.append)
    assert found.provider == "TensorRT 10.3.0 (stand-in)"
    assert found.engine.layers == {"parsed": 12}
    assert "this may take minutes" in messages[0]
    assert messages[1] == "built the TensorRT engine in 61 s: 4.0 MB; layers: parsed 12"
    opened(messages.append)
    assert len(tensorrt.built) == 1
    assert len(messages) == 2


@pytest.mark.parametrize(
    "failure", [EnvironmentUnfitError("no memory"), BundleRefusedError("another file")], ids=["environment", "bundle"]
)
def test_failed_engine_build_falls_back_to_onnx_runtime(opened, tensorrt, failure):
    tensorrt.failure = failure
    messages = []
    assert opened(messages.append).provider == "CPUExecutionProvider"
    assert messages[-1] == f"TensorRT is not used, CPUExecutionProvider is: {failure}"


def test_engine_that_fails_the_self_test_is_closed_and_not_used(opened, tensorrt):
    StandIn.wrong = 1.0
    messages = []
    assert opened(messages.append).provider == "CPUExecutionProvider"
    assert "the backbone gives other embeddings on this machine" in messages[-1]
    assert StandIn.closed == 1


def test_tensorrt_without_a_gpu_is_reported(opened, tensorrt):
    tensorrt.gpu = None
    messages = []
    assert opened(messages.append).provider == "CPUExecutionProvider"
    assert "PyTorch finds no usable GPU" in messages[-1]


@pytest.mark.parametrize(("target", "wanted"), [("jetson", "TensorRT"), ("generic-cuda", "CUDAExecutionProvider")])
def test_runtime_slower_than_the_target_expects_is_reported_or_refused(opened, target, wanted):
    messages = []
    assert opened(messages.append, target).provider == "CPUExecutionProvider"
    message = f"CPUExecutionProvider runs the backbone, slower than {wanted}, which the target {target} expects"
    assert messages == [f"warning: {message}"]
    with pytest.raises(SlowerProviderError, match=message):
        opened(target=target, strict=True)


def test_strict_accepts_an_equally_fast_runtime(opened, tensorrt):
    for target in ("jetson", "generic-cuda", "cpu", "a target of a newer version"):
        assert opened(target=target, strict=True).provider.startswith("TensorRT")


def test_refusal_has_the_reason(opened, tensorrt):
    tensorrt.failure = EnvironmentUnfitError("no memory")
    with pytest.raises(SlowerProviderError, match="expects: no memory; see ssd-edge doctor"):
        opened(target="jetson", strict=True)


def test_damaged_backbone_is_refused(opened, tmp_path):
    (path,) = (tmp_path / "root" / "backbones").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleRefusedError, match="missing or damaged"):
        opened()


def test_onnx_runtime_uses_the_fastest_provider(opened, runtime):
    messages = []
    found = opened(messages.append)
    assert found.provider == CUDA
    np.testing.assert_allclose(found.embed(opened.arrays["images"]), opened.arrays["embeddings"], atol=1e-5)
    assert runtime.requested[0] == [CUDA, CPU]  # the CPU runs operators that CUDA does not support
    assert messages == []


def test_onnx_runtimes_tensorrt_provider_is_never_used(opened, runtime):
    """That provider sets the precision by builder flags, but the precision is in the graph."""
    opened(precision="fp16")
    assert all(TENSORRT_PROVIDER not in names for names in runtime.requested)


def test_provider_that_does_not_start_is_skipped_and_reported(opened, runtime):
    runtime.absent = {CUDA}
    messages = []
    assert opened(messages.append).provider == CPU
    assert messages[-1] == (
        f"{CUDA} is not used, {CPU} is: {CUDA}: ONNX Runtime lists {CUDA}, but would use {CPU}; see ssd-edge doctor"
    )


def test_provider_that_fails_the_self_test_is_skipped_and_reported(opened, runtime):
    runtime.wrong = {CUDA: 1.0}
    messages = []
    found = opened(messages.append)
    assert found.provider == CPU
    assert f"{CUDA} is not used, {CPU} is: {CUDA}: the backbone gives other embeddings on this machine" in messages[-1]
    np.testing.assert_allclose(found.embed(opened.arrays["images"]), opened.arrays["embeddings"], atol=1e-5)
    runtime.wrong = {CUDA: float("nan")}
    assert opened(messages.append).provider == CPU
    assert f"{CUDA}: the backbone gives other embeddings on this machine" in messages[-1]


def test_provider_after_a_failed_engine_is_tested_too(opened, tensorrt, runtime):
    StandIn.wrong = 1.0
    runtime.wrong = {CUDA: 1.0}
    messages = []
    assert opened(messages.append).provider == CPU
    assert messages[-1].startswith(f"TensorRT and {CUDA} are not used, {CPU} is: the backbone gives other embeddings")
    assert messages[-1].count("gives other embeddings") == 2


@pytest.mark.parametrize("when", ["raises", "fails"])
def test_provider_that_raises_is_skipped(opened, runtime, when):
    setattr(runtime, when, {CUDA: RuntimeError("out of memory\nand a stack")})
    messages = []
    assert opened(messages.append).provider == CPU
    assert "(out of memory); " in messages[-1]
    assert "stack" not in messages[-1]


def test_failure_on_the_cpu_is_raised(opened, runtime):
    runtime.raises = {name: RuntimeError("unknown operator") for name in (CUDA, CPU)}
    with pytest.raises(
        EnvironmentUnfitError, match=r"cannot run .* on this machine \(unknown operator\); deploy it again"
    ):
        opened()


def test_onnx_runtime_is_slower_than_a_tensorrt_engine(opened, runtime):
    """A Jetson target expects a TensorRT engine; a CUDA target accepts ONNX Runtime's CUDA provider."""
    with pytest.raises(
        SlowerProviderError, match=f"{CUDA} runs the backbone, slower than TensorRT, which the target jetson expects"
    ):
        opened(target="jetson", strict=True)
    assert opened(target="generic-cuda", strict=True).provider == CUDA
    runtime.absent = {CUDA}
    with pytest.raises(SlowerProviderError, match=f"{CUDA}: ONNX Runtime lists"):
        opened(target="generic-cuda", strict=True)


def test_failed_run_has_a_one_line_reason(opened, runtime):
    found = opened()
    runtime.fails = {CUDA: RuntimeError("CUDA failure 2: out of memory\nmore")}
    with pytest.raises(EnvironmentUnfitError, match=r"cannot run the backbone \(CUDA failure 2: out of memory\); see"):
        found.embed(opened.arrays["images"])
