"""A TensorRT engine as an embedder: uint8 images → float32 embeddings, through PyTorch's memory on the GPU."""

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
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError, require


class Cuda:
    """The GPU's memory and a stream of its own: on the default stream TensorRT would synchronise by itself as well.

    Raises:
        EnvironmentUnfitError: PyTorch is missing, or has no kernels for this board.
    """

    device = "cuda"

    def __init__(self) -> None:
        self.torch = require("torch", "device", "run a TensorRT engine")
        advice = "install the PyTorch that NVIDIA makes for this JetPack"
        with self.errors(advice):
            (self.torch.ones(8, device=self.device) + 1).sum().item()
            self.stream = self.torch.cuda.Stream()
            self.name: str = self.torch.cuda.get_device_name()

    @contextlib.contextmanager
    def errors(self, advice: str = "free some of its memory, or restart the program") -> Iterator[None]:
        """What PyTorch says of a GPU that it cannot use, in one sentence."""
        try:
            yield
        except (RuntimeError, AssertionError) as error:  # the latter: a build without CUDA
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise EnvironmentUnfitError(
                f"PyTorch {self.torch.__version__} cannot use the GPU ({reason}); {advice}, or run the backbone "
                "with ONNX Runtime"
            ) from error

    def use(self) -> contextlib.AbstractContextManager[Any]:
        """Copies in the block go through `stream`."""
        block: contextlib.AbstractContextManager[Any] = self.torch.cuda.stream(self.stream)
        return block


class TensorRTEmbedder:
    """A backbone as an engine that was built on this machine.

    Args:
        plan: the engine's file, or its bytes; from `EngineCache` only.
        size: side of its input in pixels.
        dim: D of its embeddings.
        api: the TensorRT to load it with.
        cuda: where images and embeddings lie; another one in tests.

    Attributes:
        provider: e.g. ``TensorRT 10.3.0 (Orin)``.
        engine: see `DeviceEmbedder`; set by whoever took the engine from its cache.

    Raises:
        EnvironmentUnfitError: TensorRT or PyTorch cannot use the GPU, or another TensorRT built the engine.
        BundleRefusedError: the engine takes or gives other shapes than the bundle says.
    """

    engine: EngineRecord | None = None

    def __init__(self, plan: Path | bytes, size: int, dim: int, api: TensorRT | None = None, cuda: Any = None) -> None:
        api = api or TensorRT()
        self._cuda = cuda or Cuda()
        self._turn = threading.Lock()
        self._engine: Engine | None = api.load(plan if isinstance(plan, bytes) else files.read_bytes(plan))
        engine = self._engine
        self.size, self.dim = size, dim
        taken, given = (engine.input.dtype, *engine.input.shape[1:]), (engine.output.dtype, *engine.output.shape[1:])
        if taken != ("uint8", size, size, 3) or given != ("float", dim):
            raise BundleRefusedError(
                f"the engine takes {_told(taken)} and gives {_told(given)}, but the bundle says "
                f"{_told(('uint8', size, size, 3))} and {_told(('float', dim))}; deploy it again"
            )
        self.provider = f"{api} ({self._cuda.name})"
        torch, batch = self._cuda.torch, engine.max_batch
        # Made once, and on the stream that will use them: it does not wait for what the default stream still does.
        with self._cuda.errors(), self._cuda.use():
            self._images = torch.zeros((batch, size, size, 3), dtype=torch.uint8, device=self._cuda.device)
            self._embeddings = torch.zeros((batch, dim), dtype=torch.float32, device=self._cuda.device)

    def embed(self, images: np.ndarray) -> np.ndarray:
        """uint8 RGB ``(N, size, size, 3)`` → float32 ``(N, D)``.

        Raises:
            InputError: another shape or type, or the embedder is closed.
            EnvironmentUnfitError: the GPU fails.
            BundleRefusedError: the backbone gives NaN or infinity.
        """
        engine = self._engine
        if engine is None:
            raise InputError("the TensorRT embedder is closed; open the device again")
        if images.dtype != np.uint8 or images.shape[1:] != (self.size, self.size, 3):
            raise InputError(
                f"the backbone takes uint8 images (N, {self.size}, {self.size}, 3), but {images.dtype} {images.shape} "
                "was given; decode them with ssd_edge.images"
            )
        embeddings = np.empty((len(images), self.dim), np.float32)
        with self._turn:  # one place in memory for all threads
            for start in range(0, len(images), engine.max_batch):
                part = images[start : start + engine.max_batch]
                embeddings[start : start + len(part)] = self._run(engine, part)
        return check_embeddings(embeddings, len(images), self.dim)

    def _run(self, engine: Engine, part: np.ndarray) -> np.ndarray:
        cuda, count = self._cuda, len(part)
        # an engine with a fixed batch computes all of it; what is left of an earlier one is not looked at
        batch = count if engine.input.shape[0] < 0 else engine.max_batch
        with cuda.errors(), cuda.use():
            self._images[:count].copy_(cuda.torch.from_numpy(np.array(part)))  # PyTorch wants to write to what it holds
            engine.run(batch, self._images.data_ptr(), self._embeddings.data_ptr(), cuda.stream.cuda_stream)
            cuda.stream.synchronize()
            embeddings: np.ndarray = self._embeddings[:count].cpu().numpy()
            return embeddings

    def close(self) -> None:
        """Free the engine and its memory on the GPU."""
        if self._engine is not None:
            self._engine.close()
        self._engine = self._images = self._embeddings = None


def _told(tensor: tuple[Any, ...]) -> str:
    dtype, *shape = tensor
    return f"{'float32' if dtype == 'float' else dtype} {('N', *shape)}".replace("'", "")
