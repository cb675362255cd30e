"""An embedder that runs a TensorRT engine, with PyTorch tensors as its GPU memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from device_runtime.backbone.interface import EngineRecord, check_embeddings
from device_runtime.backbone.tensorrt.api import Engine, TensorRT
from ssd_edge import files
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError, first_line, require


class Cuda:
    """Memory and a stream of the GPU, through PyTorch.

    The stream is not the default one, on which TensorRT would add synchronisations.

    Raises:
        EnvironmentUnfitError: PyTorch is missing, or has no kernels for this GPU.
    """

    device = "cuda"

    def __init__(self) -> None:
        self.torch = require("torch", "device", "run a TensorRT engine")
        advice = "install NVIDIA's PyTorch for this JetPack"
        with self.errors(advice):
            (self.torch.ones(8, device=self.device) + 1).sum().item()
            self.stream = self.torch.cuda.Stream()
            self.name: str = self.torch.cuda.get_device_name()

    @contextlib.contextmanager
    def errors(self, advice: str = "free some of its memory, or restart the program") -> Iterator[None]:
        """Convert PyTorch's errors in the block to `EnvironmentUnfitError` with the given advice."""
        try:
            yield
        except (RuntimeError, AssertionError) as error:  # AssertionError: a build without CUDA
            raise EnvironmentUnfitError(
                f"PyTorch {self.torch.__version__} cannot use the GPU ({first_line(error)}); {advice}, or run the "
                "backbone with ONNX Runtime"
            ) from error

    def use(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context manager in which copies use `stream`."""
        block: contextlib.AbstractContextManager[Any] = self.torch.cuda.stream(self.stream)
        return block


class TensorRTEmbedder:
    """A backbone as a TensorRT engine that was built on this machine.

    Args:
        plan: File of the serialized engine, or its bytes; only from `EngineCache`.
        size: Side of the input in pixels.
        dim: Dimension D of the embeddings.
        api: TensorRT that loads the engine.
        cuda: Memory of images and embeddings; a stand-in in tests.

    Attributes:
        provider: TensorRT and the GPU, e.g. ``TensorRT 10.3.0 (Orin)``.
        engine: See `DeviceEmbedder`; set by the caller that took the engine from its cache.

    Raises:
        EnvironmentUnfitError: TensorRT or PyTorch cannot use the GPU, or another TensorRT built the engine.
        BundleRefusedError: The engine's input or output has another shape than the bundle states.
    """

    engine: EngineRecord | None = None

    def __init__(self, plan: Path | bytes, size: int, dim: int, api: TensorRT | None = None, cuda: Any = None) -> None:
        api = api or TensorRT()
        self._cuda = cuda or Cuda()
        self._lock = threading.Lock()
        self._engine: Engine | None = api.load(plan if isinstance(plan, bytes) else files.read_bytes(plan))
        engine = self._engine
        self.size, self.dim = size, dim
        taken, given = (engine.input.dtype, *engine.input.shape[1:]), (engine.output.dtype, *engine.output.shape[1:])
        if taken != ("uint8", size, size, 3) or given != ("float", dim):
            raise BundleRefusedError(
                f"the engine maps {_described(taken)} to {_described(given)}, but the bundle states "
                f"{_described(('uint8', size, size, 3))} to {_described(('float', dim))}; deploy it again"
            )
        self.provider = f"{api} ({self._cuda.name})"
        torch, batch = self._cuda.torch, engine.max_batch
        # Allocated on the stream that uses them, which does not wait for work on the default stream.
        with self._cuda.errors(), self._cuda.use():
            self._images = torch.zeros((batch, size, size, 3), dtype=torch.uint8, device=self._cuda.device)
            self._embeddings = torch.zeros((batch, dim), dtype=torch.float32, device=self._cuda.device)

    def embed(self, images: np.ndarray) -> np.ndarray:
        """Embed uint8 RGB images ``(N, size, size, 3)`` as float32 ``(N, D)``.

        Raises:
            InputError: The images have another shape or type, or the embedder is closed.
            EnvironmentUnfitError: The GPU fails.
        """
        engine = self._engine
        if engine is None:
            raise InputError("the TensorRT embedder is closed; open the device again")
        if images.dtype != np.uint8 or images.shape[1:] != (self.size, self.size, 3):
            raise InputError(
                f"the backbone needs uint8 images (N, {self.size}, {self.size}, 3), but got {images.dtype} "
                f"{images.shape}; decode them with ssd_edge.images"
            )
        embeddings = np.empty((len(images), self.dim), np.float32)
        with self._lock:  # all threads share the buffers
            for start in range(0, len(images), engine.max_batch):
                part = images[start : start + engine.max_batch]
                embeddings[start : start + len(part)] = self._run(engine, part)
        return check_embeddings(embeddings, len(images), self.dim)

    def _run(self, engine: Engine, part: np.ndarray) -> np.ndarray:
        cuda, count = self._cuda, len(part)
        # an engine with a fixed batch also computes the unused rows, which are ignored
        batch = count if engine.input.shape[0] < 0 else engine.max_batch
        with cuda.errors(), cuda.use():
            self._images[:count].copy_(cuda.torch.from_numpy(np.array(part)))  # PyTorch needs a writable array
            engine.run(batch, self._images.data_ptr(), self._embeddings.data_ptr(), cuda.stream.cuda_stream)
            cuda.stream.synchronize()
            embeddings: np.ndarray = self._embeddings[:count].cpu().numpy()
            return embeddings

    def close(self) -> None:
        """Free the engine and its GPU memory."""
        if self._engine is not None:
            self._engine.close()
        self._engine = self._images = self._embeddings = None


def _described(tensor: tuple[Any, ...]) -> str:
    dtype, *shape = tensor
    return f"{'float32' if dtype == 'float' else dtype} {('N', *shape)}".replace("'", "")
