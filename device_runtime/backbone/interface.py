"""What every embedder of the device has in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from ssd_edge.errors import BundleRefusedError


class DeviceEmbedder(Protocol):
    """A backbone that runs.

    Attributes:
        provider: what really runs it.
        size: side of its input in pixels.
        dim: D of its embeddings.
        engine: what was noted when its TensorRT engine was built (`EngineCache.record`); None without one.
    """

    provider: str
    size: int
    dim: int
    engine: Mapping[str, Any] | None

    def embed(self, images: np.ndarray) -> np.ndarray:
        """uint8 RGB ``(N, size, size, 3)`` → float32 ``(N, D)``."""
        ...


def check_embeddings(embeddings: np.ndarray, count: int, dim: int) -> np.ndarray:
    """What a backbone gave, if it is float32 ``(count, dim)`` and finite.

    Raises:
        BundleRefusedError: it is not.
    """
    if embeddings.shape != (count, dim) or embeddings.dtype != np.float32:
        raise BundleRefusedError(
            f"the backbone gives {embeddings.dtype} {embeddings.shape}, but the bundle says float32 "
            f"{(count, dim)}; deploy it again"
        )
    if not np.isfinite(embeddings).all():
        raise BundleRefusedError("the backbone gives NaN or infinity for an image; deploy it again")
    return embeddings
