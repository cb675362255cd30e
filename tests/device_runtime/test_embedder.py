"""Which runtime is taken, and that the other one is never taken silently.

TensorRT itself is a stand-in here: its adapter and engine cache have their own tests, and neither was run on a GPU.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from device_runtime import embedder, engine, tensorrt_api, tensorrt_embedder
from device_runtime.embedder import OnnxEmbedder, open_embedder
from device_runtime.generations import Generations
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

    def run(say=lambda text: None, target="cpu", strict=False):
        facts = {**read.manifest["backbone"], "target": target}
        return open_embedder(store, backbone, facts, (arrays, limits), say, strict)

    run.arrays = arrays
    return run


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
    monkeypatch.setattr(engine, "gpu_facts", lambda: Machine.gpu)
    monkeypatch.setattr(engine, "EngineCache", Cache)
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
    assert said[-1] == f"TensorRT is not used, ONNX Runtime is: {failure}"


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
