"""The backbone on the device: uint8 images → standardised embeddings through ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, require

BATCH = 32
PREFERRED = ("CUDAExecutionProvider", "CPUExecutionProvider")


class OnnxEmbedder:
    """A backbone with preprocessing and standardisation in its graph.

    Args:
        path: the ONNX file.
        size: side of its input in pixels.
        dim: D of its embeddings.

    Attributes:
        provider: the execution provider that really runs, checked after creation.

    Raises:
        EnvironmentUnfitError: ONNX Runtime is missing or cannot run the file here.
    """

    def __init__(self, path: Path, size: int, dim: int) -> None:
        runtime = require("onnxruntime", "device", "run the backbone")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        # a CUDA build without a usable GPU falls back by itself; what runs is read back below
        wanted = [name for name in PREFERRED if name in runtime.get_available_providers()]
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=wanted)
        except Exception as error:  # ONNX Runtime raises its own types, which share no public base
            raise EnvironmentUnfitError(f"ONNX Runtime cannot run {path} here ({error}); deploy it again") from error
        self.provider: str = self._session.get_providers()[0]
        taken = self._session.get_inputs()[0]
        self._input = taken.name
        self._batch = taken.shape[0] if isinstance(taken.shape[0], int) else BATCH  # some graphs take one at a time
        self.size, self.dim = size, dim

    def embed(self, images: np.ndarray) -> np.ndarray:
        """uint8 RGB ``(N, size, size, 3)`` → float32 ``(N, D)``.

        Raises:
            BundleRefusedError: the graph gives another shape than the bundle says, or NaN.
        """
        parts: Sequence[np.ndarray] = [
            self._session.run(None, {self._input: np.ascontiguousarray(images[start : start + self._batch])})[0]
            for start in range(0, len(images), self._batch)
        ]
        embeddings = np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)
        if embeddings.shape != (len(images), self.dim) or embeddings.dtype != np.float32:
            raise BundleRefusedError(
                f"the backbone gives {embeddings.dtype} {embeddings.shape}, but the bundle says float32 "
                f"{(len(images), self.dim)}; deploy it again"
            )
        if not np.isfinite(embeddings).all():
            raise BundleRefusedError("the backbone gives NaN or infinity for an image; deploy it again")
        return embeddings
