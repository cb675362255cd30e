"""Which runtime is taken, and that another one is never taken silently.

TensorRT and ONNX Runtime's providers for a GPU are stand-ins here: the adapter and the engine cache have their own
tests. None of this was run on a GPU.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from device_runtime.backbone import embedder
from device_runtime.backbone.embedder import CPU, CUDA, OnnxRuntimeEmbedder, open_embedder
from device_runtime.backbone.interface import BackboneSpec, EngineRecord
from device_runtime.backbone.tensorrt import api as tensorrt_api
from device_runtime.backbone.tensorrt import embedder as tensorrt_embedder
from device_runtime.backbone.tensorrt import engines
from device_runtime.store.generations import Generations
from ssd_edge import bundle
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, SlowerProviderError

TENSORRT_PROVIDER = "TensorrtExecutionProvider"


@pytest.fixture
def opened(tiny_bundle, tmp_path):
    """opened(say) → the embedder of a root that holds a tiny backbone."""
    read = bundle.parse(tiny_bundle())
    store = Generations(tmp_path / "root")
    with store.writer():
        backbone = store.add_backbone(read.read("backbone"))
    arrays, limits = read.tensors("probe")

    def run(say=lambda text: None, target="cpu", strict=False, **changes):
        facts = {**read.manifest["backbone"], "target": target, **changes}
        return open_embedder(store, BackboneSpec.from_facts(backbone, facts), (arrays, limits), say, strict)

    run.arrays, run.store = arrays, store
    return run


class StandInRuntime(types.ModuleType):
    """ONNX Runtime with providers for a GPU; the processor computes for them.

    Attributes:
        absent: providers that are listed, but do not start.
        raises: provider → what making a session with it raises.
        fails: provider → what running it raises.
        wrong: provider → what its embeddings are shifted by.
        asked: providers of each session.
    """

    def __init__(self) -> None:
        super().__init__("onnxruntime")
        self.__version__, self.SessionOptions = "1.23.2", onnxruntime.SessionOptions
        self.absent: set[str] = set()
        self.raises: dict[str, Exception] = {}
        self.fails: dict[str, Exception] = {}
        self.wrong: dict[str, float] = {}
        self.asked: list[list[str]] = []

    def get_available_providers(self) -> list[str]:
        return [TENSORRT_PROVIDER, CUDA, "AzureExecutionProvider", CPU]

    def InferenceSession(self, model: str, options: Any, providers: list[str], enable_fallback: int = 1) -> Any:
        assert enable_fallback == 0
        self.asked.append(providers)
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
    """A machine with a GPU, and an ONNX Runtime that has a provider for TensorRT, too."""
    put = StandInRuntime()
    monkeypatch.setitem(sys.modules, "onnxruntime", put)
    return put


class StandIn:
    """In the place of `TensorRTEmbedder`: what ONNX Runtime gives, shifted by `wrong`."""

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
    """A machine with TensorRT and a GPU; the attributes say what was done, and may be changed."""

    class Machine:
        gpu, built, failure = engines.GpuFacts("Orin", "8.7", 8, "12.6", "12.6"), [], None

    class Cache:
        def __init__(self, folder: Path) -> None:
            self.folder = folder

        def get(self, facts):
            return Machine.built[-1] if Machine.built else None

        def build(self, onnx, facts, say):
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


def test_without_tensorrt_onnx_runtime_runs_it(opened):
    said = []
    found = opened(said.append)
    assert found.provider == "CPUExecutionProvider"
    assert found.engine is None
    assert said == []
    np.testing.assert_allclose(found.embed(opened.arrays["images"]), opened.arrays["embeddings"], atol=1e-5)


def test_with_tensorrt_an_engine_is_built_once_and_its_layers_are_told(opened, tensorrt):
    said = []
    found = opened(said.append)
    assert found.provider == "TensorRT 10.3.0 (stand-in)"
    assert found.engine.layers == {"parsed": 12}
    assert "it may take minutes" in said[0]
    assert said[1] == "built the TensorRT engine in 61 s: 4.0 MB; layers: parsed 12"
    opened(said.append)
    assert len(tensorrt.built) == 1
    assert len(said) == 2


@pytest.mark.parametrize(
    "failure", [EnvironmentUnfitError("no memory"), BundleRefusedError("another file")], ids=["environment", "bundle"]
)
def test_an_engine_that_cannot_be_built_is_told_and_onnx_runtime_runs_it(opened, tensorrt, failure):
    tensorrt.failure = failure
    said = []
    assert opened(said.append).provider == "CPUExecutionProvider"
    assert said[-1] == f"TensorRT is not used, CPUExecutionProvider is: {failure}"


def test_an_engine_that_computes_something_else_is_closed_and_not_used(opened, tensorrt):
    StandIn.wrong = 1.0
    said = []
    assert opened(said.append).provider == "CPUExecutionProvider"
    assert "the backbone computes something else here" in said[-1]
    assert StandIn.closed == 1


def test_tensorrt_without_a_gpu_is_told(opened, tensorrt):
    tensorrt.gpu = None
    said = []
    assert opened(said.append).provider == "CPUExecutionProvider"
    assert "PyTorch finds no GPU that it can use" in said[-1]


@pytest.mark.parametrize(("target", "wanted"), [("jetson", "TensorRT"), ("generic-cuda", "CUDAExecutionProvider")])
def test_what_is_slower_than_the_target_stands_for_is_told_or_refused(opened, target, wanted):
    said = []
    assert opened(said.append, target).provider == "CPUExecutionProvider"
    told = f"CPUExecutionProvider runs the backbone, slower than {wanted}, for which {target} stands"
    assert said == [f"warning: {told}"]
    with pytest.raises(SlowerProviderError, match=told):
        opened(target=target, strict=True)


def test_what_is_as_fast_passes_under_strict(opened, tensorrt):
    for target in ("jetson", "generic-cuda", "cpu", "a target of a newer version"):
        assert opened(target=target, strict=True).provider.startswith("TensorRT")


def test_the_reason_is_told_with_the_refusal(opened, tensorrt):
    tensorrt.failure = EnvironmentUnfitError("no memory")
    with pytest.raises(SlowerProviderError, match="stands: no memory; see ssd-edge doctor"):
        opened(target="jetson", strict=True)


def test_a_damaged_backbone_is_not_run_by_anything(opened, tmp_path):
    (path,) = (tmp_path / "root" / "backbones").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleRefusedError, match="missing or damaged"):
        opened()


def test_of_onnx_runtime_the_fastest_is_taken(opened, runtime):
    said = []
    found = opened(said.append)
    assert found.provider == CUDA
    np.testing.assert_allclose(found.embed(opened.arrays["images"]), opened.arrays["embeddings"], atol=1e-5)
    assert runtime.asked[0] == [CUDA, CPU]  # what it does not take, the other runs
    assert said == []


def test_the_tensorrt_provider_of_onnx_runtime_is_never_used(opened, runtime):
    """It would set the precision by flags of the builder; the precision is in the graph."""
    opened(precision="fp16")
    assert all(TENSORRT_PROVIDER not in names for names in runtime.asked)


def test_what_is_listed_but_does_not_start_is_passed_over_and_told(opened, runtime):
    runtime.absent = {CUDA}
    said = []
    assert opened(said.append).provider == CPU
    assert said[-1] == (
        f"{CUDA} is not used, {CPU} is: {CUDA}: ONNX Runtime lists {CUDA}, but {CPU} would run; see ssd-edge doctor"
    )


def test_what_computes_something_else_is_passed_over_and_told(opened, runtime):
    runtime.wrong = {CUDA: 1.0}
    said = []
    found = opened(said.append)
    assert found.provider == CPU
    assert f"{CUDA} is not used, {CPU} is: {CUDA}: the backbone computes something else here" in said[-1]
    np.testing.assert_allclose(found.embed(opened.arrays["images"]), opened.arrays["embeddings"], atol=1e-5)
    runtime.wrong = {CUDA: float("nan")}
    assert opened(said.append).provider == CPU
    assert f"{CUDA}: the backbone gives NaN or infinity" in said[-1]


def test_an_engine_that_failed_is_not_replaced_by_an_untested_provider(opened, tensorrt, runtime):
    StandIn.wrong = 1.0
    runtime.wrong = {CUDA: 1.0}
    said = []
    assert opened(said.append).provider == CPU
    assert said[-1].startswith(f"TensorRT and {CUDA} are not used, {CPU} is: the backbone computes something else")
    assert said[-1].count("computes something else") == 2


@pytest.mark.parametrize("when", ["raises", "fails"])
def test_a_provider_that_raises_is_passed_over(opened, runtime, when):
    setattr(runtime, when, {CUDA: RuntimeError("out of memory\nand a stack")})
    said = []
    assert opened(said.append).provider == CPU
    assert "(out of memory); " in said[-1]
    assert "stack" not in said[-1]


def test_that_even_the_processor_cannot_run_it_is_raised(opened, runtime):
    runtime.raises = {name: RuntimeError("unknown operator") for name in (CUDA, CPU)}
    with pytest.raises(EnvironmentUnfitError, match=r"cannot run .* \(unknown operator\); deploy it again"):
        opened()


def test_onnx_runtime_is_slower_than_a_tensorrt_engine(opened, runtime):
    """A target for a Jetson stands for an engine; for a GPU ONNX Runtime's CUDA provider will do."""
    with pytest.raises(SlowerProviderError, match=f"{CUDA} runs the backbone, slower than TensorRT, for which jetson"):
        opened(target="jetson", strict=True)
    assert opened(target="generic-cuda", strict=True).provider == CUDA
    runtime.absent = {CUDA}
    with pytest.raises(SlowerProviderError, match=f"{CUDA}: ONNX Runtime lists"):
        opened(target="generic-cuda", strict=True)


def test_a_run_that_fails_is_one_sentence(opened, runtime):
    found = opened()
    runtime.fails = {CUDA: RuntimeError("CUDA failure 2: out of memory\nmore")}
    with pytest.raises(EnvironmentUnfitError, match=r"cannot run the backbone \(CUDA failure 2: out of memory\); see"):
        found.embed(opened.arrays["images"])
