"""Self-test: compare the embeddings of a few images with the values that the bundle expects.

A bundle contains synthetic images and their embeddings (``probe.safetensors``). The embedder of this machine must
reproduce them before the bundle is used. This detects a wrong driver, a miscompiled engine and a provider with
different arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from ssd_edge.errors import GateRefusedError

Probe = tuple[Mapping[str, np.ndarray], Mapping[str, float]]  # arrays and limits, see `run`
Embed = Callable[[np.ndarray], np.ndarray]  # uint8 (P, size, size, 3) → float32 (P, D)


@dataclasses.dataclass(frozen=True)
class SelfTest:
    """Result of a passed self-test.

    Attributes:
        images: Number of probe images.
        min_cosine: Smallest cosine between an embedding and its expected value.
        max_difference: Largest absolute difference in standard deviations of the expected values.
    """

    images: int
    min_cosine: float
    max_difference: float

    def to_dict(self) -> dict[str, int | float]:
        """Return the result as JSON values."""
        return dataclasses.asdict(self)


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of rows of two arrays ``(P, D)``, computed in float64; 0 for a zero row."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    dots = (one * other).sum(1)
    return np.asarray(dots / np.maximum(lengths, np.finfo(np.float64).tiny))


def compare(wanted: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Return the smallest cosine of corresponding rows and the largest absolute difference, for arrays ``(P, D)``.

    The difference is in standard deviations of `wanted`. If the shapes differ or `found` is not finite, the result is
    (−1, ∞).
    """
    if wanted.shape != found.shape or not np.isfinite(found).all():
        return -1.0, float("inf")
    one, other = wanted.astype(np.float64), found.astype(np.float64)
    deviation = max(float(one.std()), np.finfo(np.float64).tiny)
    return float(cosines(wanted, found).min(initial=1.0)), float(np.abs(one - other).max(initial=0.0) / deviation)


def run(embed: Embed, arrays: Mapping[str, np.ndarray], limits: Mapping[str, float]) -> SelfTest:
    """Embed the probe images, as one batch and the first one alone, and compare the result with the expected values.

    Args:
        embed: The embedder of this machine.
        arrays: ``images`` uint8 ``(P, size, size, 3)`` and ``embeddings`` float32 ``(P, D)``.
        limits: ``min_cosine`` and ``max_difference`` for the bundle's precision.

    Raises:
        GateRefusedError: The embeddings differ by more than the limits.
    """
    images, wanted = arrays["images"], arrays["embeddings"]
    together, alone = compare(wanted, embed(images)), compare(wanted[:1], embed(images[:1]))
    cosine, difference = min(together[0], alone[0]), max(together[1], alone[1])
    if not (cosine >= limits["min_cosine"] and difference <= limits["max_difference"]):
        raise GateRefusedError(
            f"the backbone gives other embeddings on this machine than in the bundle: cosine {cosine:.6f} (at least "
            f"{limits['min_cosine']:g} is required), largest difference {difference:.2g} σ (at most "
            f"{limits['max_difference']:g} is allowed); run ssd-edge doctor, or deploy in fp32"
        )
    return SelfTest(len(images), round(cosine, 7), float(f"{difference:.1e}"))
