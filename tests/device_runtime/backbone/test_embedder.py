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
from device_runtime.backbone.embedder import CPU, CUDA, TENSORRT, OnnxEmbedder, open_embedder
from device_runtime.backbone.tensorrt import api as tensorrt_api
from device_runtime.backbone.tensorrt import embedder as tensorrt_embedder
from device_runtime.backbone.tensorrt import engines
from device_runtime.store.generations import Generations
from ssd_edge import bundle
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, SlowerProviderError


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
        return open_embedder(store, backbone, facts, (arrays, limits), say, strict)

    run.arrays, run.store = arrays, store
    return run


class StandInRuntime(types.ModuleType):
    """ONNX Runtime with providers for a GPU; the processor computes for them.

    Attributes:
        absent: providers that are listed, but do not start.
        raises: provider → what making a session with it raises.
        fails: provider → what running it raises.
        wrong: provider → what its embeddings are shifted by.
        asked: providers and their settings, of each session.
    """

    def __init__(self) -> None:
        super().__init__("onnxruntime")
        self.__version__, self.SessionOptions = "1.23.2", onnxruntime.SessionOptions
        self.absent: set[str] = set()
        self.raises: dict[str, Exception] = {}
        self.fails: dict[str, Exception] = {}
        self.wrong: dict[str, float] = {}
        self.asked: list[list[tuple[str, dict[str, Any]]]] = []

    def get_available_providers(self) -> list[str]:
        return [TENSORRT, CUDA, "AzureExecutionProvider", CPU]

    def InferenceSession(self, model: str, options: Any, providers: list[Any], enable_fallback: int = 1) -> Any:
        assert enable_fallback == 0
        named = [entry if isinstance(entry, tuple) else (entry, {}) for entry in providers]
        self.asked.append(named)
        started = [name for name, _ in named if name not in self.absent]
        if named[0][0] in self.raises:
            raise self.raises[named[0][0]]
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
    """A machine with a GPU, TensorRT's library, and an ONNX Runtime that has all three providers."""
    put = StandInRuntime()
    monkeypatch.setitem(sys.modules, "onnxruntime", put)
    monkeypatch.setattr(embedder, "_nvinfer", lambda: "100300")
    monkeypatch.setattr(engines, "gpu_facts", lambda: {"name": "Orin", "capability": "8.7"})
    return put


class StandIn:
    """In the place of `TensorRTEmbedder`: what ONNX Runtime gives, shifted by `wrong`."""

    provider, engine, wrong, closed = "TensorRT 10.3.0 (stand-in)", None, 0.0, 0

    def __init__(self, plan: Path, size: int, dim: int, api: object) -> None:
        self.size, self.dim = size, dim
        self._runs = OnnxEmbedder(plan, size, dim)

    def embed(self, images: np.ndarray) -> np.ndarray:
        return self._runs.embed(images) + np.float32(self.wrong)

    def close(self) -> None:
        type(self).closed += 1


@pytest.fixture
def tensorrt(monkeypatch):
    """A machine with TensorRT and a GPU; the attributes say what was done, and may be changed."""

    class Machine:
        gpu, built, failure = {"name": "Orin", "capability": "8.7"}, [], None

    class Cache:
        def __init__(self, folder: Path) -> None:
            self.folder = folder

        def make_folder(self):
            pass

        def get(self, facts):
            return Machine.built[-1] if Machine.built else None

        def build(self, onnx, facts, say):
            if Machine.failure is not None:
                raise Machine.failure
            assert facts["tensorrt"] == "10.3.0"
            assert facts["precision"] == "fp32"
            Machine.built.append(onnx)
            return onnx

        def record(self, facts):
            return {"seconds": 61.0, "bytes": 4_000_000, "layers": {"parsed": 12}}

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
    assert found.engine["layers"] == {"parsed": 12}
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


def first_asked(runtime) -> list[str]:
    return [named[0][0] for named in runtime.asked]


def test_of_onnx_runtime_the_fastest_is_taken(opened, runtime):
    said = []
    found = opened(said.append)
    assert found.provider == TENSORRT
    np.testing.assert_allclose(found.embed(opened.arrays["images"]), opened.arrays["embeddings"], atol=1e-5)
    assert [name for name, _ in runtime.asked[0]] == [TENSORRT, CUDA, CPU]  # what it does not take, the others run
    assert said == ["ONNX Runtime builds a TensorRT engine, once for this board and backbone; it may take minutes"]


def test_its_engines_are_kept_apart_for_each_machine_and_precision(opened, runtime, monkeypatch):
    folder = opened.store.root / "engines"
    opened()
    settings = dict(runtime.asked[0])[TENSORRT]
    own = Path(settings["trt_engine_cache_path"])
    assert own.parent == folder / "onnxruntime"
    assert settings["trt_timing_cache_path"] == str(own)
    assert (settings["trt_engine_cache_enable"], settings["trt_timing_cache_enable"]) == (True, True)
    assert (settings["trt_fp16_enable"], settings["trt_int8_enable"]) == (False, False)
    # one engine for all batches that are ever given, instead of a new one for each larger batch
    assert [settings[f"trt_profile_{bound}_shapes"] for bound in ("min", "opt", "max")] == [
        "images:1x8x8x3",
        "images:8x8x8x3",
        "images:32x8x8x3",
    ]
    assert folder.stat().st_mode & 0o777 == 0o700
    (own / "TensorrtExecutionProvider_1.engine").write_bytes(b"made")
    said = []
    opened(said.append)
    assert said == []  # nothing is built
    runtime.__version__ = "1.24.0"
    opened(said.append)
    assert not own.exists()
    assert len(list(own.parent.iterdir())) == 1
    assert "it may take minutes" in said[0]


@pytest.mark.parametrize(("precision", "enabled"), [("fp16", (True, False)), ("int8", (False, True))])
def test_only_the_precision_of_the_graph_is_allowed(opened, runtime, precision, enabled):
    opened(precision=precision)
    settings = dict(runtime.asked[0])[TENSORRT]
    assert (settings["trt_fp16_enable"], settings["trt_int8_enable"]) == enabled


def test_engines_are_not_taken_from_a_folder_that_others_may_write_to(opened, runtime):
    folder = opened.store.root / "engines"
    folder.mkdir()
    folder.chmod(0o777)
    said = []
    assert opened(said.append).provider == CUDA
    assert "may be written by others" in said[-1]
    assert first_asked(runtime) == [CUDA]


@pytest.mark.parametrize("missing", ["library", "gpu"])
def test_its_tensorrt_is_not_tried_where_it_cannot_work(opened, runtime, monkeypatch, missing):
    if missing == "library":
        monkeypatch.setattr(embedder, "_nvinfer", lambda: "")
    else:
        monkeypatch.setattr(engines, "gpu_facts", lambda: None)
    said = []
    assert opened(said.append).provider == CUDA
    assert first_asked(runtime) == [CUDA]
    assert said == []


def test_the_library_is_asked_for_its_version(monkeypatch):
    def load(name: str) -> Any:
        if name != "libnvinfer.so.11":
            raise OSError(f"{name}: cannot open shared object file")
        return types.SimpleNamespace(getInferLibVersion=lambda: 110400)

    monkeypatch.setattr(embedder.ctypes, "CDLL", load)
    assert embedder._nvinfer() == "110400"
    monkeypatch.setattr(embedder, "NVINFER", ("libnvinfer.so.10",))
    assert embedder._nvinfer() == ""


def test_what_is_listed_but_does_not_start_is_passed_over_and_told(opened, runtime):
    runtime.absent = {TENSORRT, CUDA}
    said = []
    assert opened(said.append).provider == CPU
    assert said[-1] == (
        f"{TENSORRT} and {CUDA} are not used, {CPU} is: "
        f"{TENSORRT}: ONNX Runtime lists {TENSORRT}, but {CPU} would run; see ssd-edge doctor; "
        f"{CUDA}: ONNX Runtime lists {CUDA}, but {CPU} would run; see ssd-edge doctor"
    )


def test_what_computes_something_else_is_passed_over_and_told(opened, runtime):
    runtime.wrong = {TENSORRT: 1.0}
    said = []
    found = opened(said.append)
    assert found.provider == CUDA
    assert f"{TENSORRT} is not used, {CUDA} is: {TENSORRT}: the backbone computes something else here" in said[-1]
    np.testing.assert_allclose(found.embed(opened.arrays["images"]), opened.arrays["embeddings"], atol=1e-5)
    runtime.wrong = {TENSORRT: 1.0, CUDA: float("nan")}
    assert opened(said.append).provider == CPU
    assert f"{CUDA}: the backbone gives NaN or infinity" in said[-1]


def test_an_engine_that_failed_is_not_replaced_by_an_untested_one(opened, tensorrt, runtime):
    """Where TensorRT computes something else, ONNX Runtime's TensorRT may do the same."""
    StandIn.wrong = 1.0
    runtime.wrong = {TENSORRT: 1.0}
    said = []
    assert opened(said.append).provider == CUDA
    assert said[-1].startswith(f"TensorRT and {TENSORRT} are not used, {CUDA} is: the backbone computes something else")
    assert said[-1].count("computes something else") == 2


@pytest.mark.parametrize("when", ["raises", "fails"])
def test_a_provider_that_raises_is_passed_over(opened, runtime, when):
    setattr(runtime, when, {TENSORRT: RuntimeError("out of memory\nand a stack"), CUDA: RuntimeError("no kernel")})
    said = []
    assert opened(said.append).provider == CPU
    assert "(out of memory); " in said[-1]
    assert "(no kernel); " in said[-1]
    assert "stack" not in said[-1]


def test_that_even_the_processor_cannot_run_it_is_raised(opened, runtime):
    runtime.raises = {name: RuntimeError("unknown operator") for name in (TENSORRT, CUDA, CPU)}
    with pytest.raises(EnvironmentUnfitError, match=r"cannot run .* \(unknown operator\); deploy it again"):
        opened()


def test_onnx_runtimes_tensorrt_is_slower_than_our_own(opened, runtime):
    """A target for a Jetson stands for an engine of our own; for a GPU either will do."""
    with pytest.raises(
        SlowerProviderError, match=f"{TENSORRT} runs the backbone, slower than TensorRT, for which jetson"
    ):
        opened(target="jetson", strict=True)
    assert opened(target="generic-cuda", strict=True).provider == TENSORRT
    runtime.absent = {TENSORRT}
    assert opened(target="generic-cuda", strict=True).provider == CUDA
    runtime.absent = {TENSORRT, CUDA}
    with pytest.raises(SlowerProviderError, match=f"{CUDA}: ONNX Runtime lists"):
        opened(target="generic-cuda", strict=True)


def test_a_run_that_fails_is_one_sentence(opened, runtime):
    found = opened()
    runtime.fails = {TENSORRT: RuntimeError("CUDA failure 2: out of memory\nmore")}
    with pytest.raises(EnvironmentUnfitError, match=r"cannot run the backbone \(CUDA failure 2: out of memory\); see"):
        found.embed(opened.arrays["images"])
