"""The TensorRT embedder, with stand-ins for TensorRT that read and write the memory of this process."""

from __future__ import annotations

import contextlib
import json
import sys

import numpy as np
import pytest
import torch
from helpers import tensorrt_standins

from device_runtime.backbone.tensorrt import embedder as tensorrt_embedder
from device_runtime.backbone.tensorrt.api import TensorRT
from device_runtime.backbone.tensorrt.embedder import Cuda, TensorRTEmbedder
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError

STANDINS = vars(tensorrt_standins)
graph, expected, GENERATIONS = STANDINS["graph"], STANDINS["expected"], STANDINS["GENERATIONS"]


class Stream:
    cuda_stream = 7
    synchronised = 0

    def synchronize(self) -> None:
        self.synchronised += 1


class NoCuda(Cuda):
    """CPU memory as a stand-in for GPU memory."""

    device, name = "cpu", "stand-in"

    def __init__(self) -> None:
        self.torch, self.stream = torch, Stream()

    def use(self):
        return contextlib.nullcontext()


@pytest.fixture
def opened(monkeypatch):
    """Return ``opened("10.3.0", graph(), size=4, dim=5, **changes)``, which returns (embedder, module, NoCuda)."""

    def make(version: str = "10.3.0", onnx: bytes = graph(), size: int = 4, dim: int = 5, **changes):
        module = STANDINS["make"](version)
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        api, cuda = TensorRT(), NoCuda()
        plan = json.dumps({**json.loads(api.build(onnx).plan), **changes}).encode()
        return TensorRTEmbedder(plan, size, dim, api, cuda), module, cuda

    return make


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize("version", GENERATIONS)
def test_more_images_than_a_batch_on_each_version(opened, version):
    embedder, module, cuda = opened(version)
    images = pixels(70)
    found = embedder.embed(images)
    np.testing.assert_array_equal(found, expected(images))
    assert found.dtype == np.float32
    assert module.executed == [(32, 7), (32, 7), (6, 7)]
    assert cuda.stream.synchronised == 3
    assert (embedder.provider, embedder.size, embedder.dim) == (f"TensorRT {version} (stand-in)", 4, 5)


def test_fixed_batch_of_one(opened):
    embedder, module, _ = opened(onnx=graph((1, 4, 4, 3)))
    images = pixels(3)
    np.testing.assert_array_equal(embedder.embed(images), expected(images))
    assert module.executed == [(1, 7)] * 3


def test_fixed_batch_is_padded(opened):
    embedder, module, _ = opened(onnx=graph((4, 4, 4, 3)))
    images = pixels(6)
    np.testing.assert_array_equal(embedder.embed(images), expected(images))
    assert module.executed == [(4, 7)] * 2


def test_next_batch_does_not_overwrite_earlier_embeddings(opened):
    embedder, _, _ = opened()
    first = embedder.embed(pixels(2))
    kept = first.copy()
    embedder.embed(pixels(5))
    np.testing.assert_array_equal(first, kept)


def test_read_only_and_strided_images(opened):
    embedder, _, _ = opened()
    images = pixels(4)
    images.flags.writeable = False
    np.testing.assert_array_equal(embedder.embed(images[::2, :, ::-1]), expected(images[::2]))
    assert embedder.embed(images[:0]).shape == (0, 5)


@pytest.mark.parametrize("images", [np.zeros((2, 5, 5, 3), np.uint8), np.zeros((2, 4, 4, 3), np.float32)])
def test_images_of_another_shape_or_type_are_refused(opened, images):
    with pytest.raises(InputError, match=r"needs uint8 images \(N, 4, 4, 3\), but got"):
        opened()[0].embed(images)


@pytest.mark.parametrize("case", [{"size": 8}, {"dim": 6}, {"output": "HALF"}])
def test_engine_of_another_shape_is_refused(opened, case):
    message = r"maps uint8 \(N, 4, 4, 3\) to \w+ \(N, 5\), but the bundle states uint8 .* to float32"
    with pytest.raises(BundleRefusedError, match=message):
        opened(**case)


def test_engine_from_a_file(opened, tmp_path):
    embedder, module, _ = opened()
    path = tmp_path / "x.plan"
    path.write_bytes(TensorRT().build(graph()).plan)
    again = TensorRTEmbedder(path, 4, 5, cuda=NoCuda())
    np.testing.assert_array_equal(again.embed(pixels(2)), embedder.embed(pixels(2)))
    assert len(module.executed) == 2
    with pytest.raises(InputError, match="does not exist"):
        TensorRTEmbedder(tmp_path / "none.plan", 4, 5, cuda=NoCuda())


def test_closed_embedder_is_refused(opened):
    embedder, _, _ = opened()
    embedder.close()
    embedder.close()
    with pytest.raises(InputError, match="is closed"):
        embedder.embed(pixels(1))


def test_pytorch_without_kernels_for_the_gpu_is_refused(opened, monkeypatch):
    def no_kernels(*args, **kwargs):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore of it")

    monkeypatch.setattr(torch, "ones", no_kernels)
    with pytest.raises(EnvironmentUnfitError) as raised:
        Cuda()
    message = str(raised.value)
    assert message.startswith(
        f"PyTorch {torch.__version__} cannot use the GPU (CUDA error: no kernel image is available"
    )
    assert "more of it" not in message
    assert "install NVIDIA's PyTorch for this JetPack" in message


def test_gpu_failure_at_run_time(opened, monkeypatch):
    embedder, _, cuda = opened()

    def fails() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(cuda.stream, "synchronize", fails)
    with pytest.raises(EnvironmentUnfitError, match="illegal memory access"):
        embedder.embed(pixels(1))


def test_without_a_gpu(opened):
    _, _, _ = opened()
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(EnvironmentUnfitError, match="cannot use the GPU"):
        tensorrt_embedder.TensorRTEmbedder(b"", 4, 5)
