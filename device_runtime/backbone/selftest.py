"""Does the backbone compute here what it computed where the bundle was packed? A few images say it.

A bundle brings synthetic images and the embeddings that they must give (`probe.safetensors`). They are put through
whatever will run the backbone on this machine, before the bundle is used for anything: a wrong driver, a miscompiled
engine or a provider with another arithmetic shows here and not in the field.
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
    """Cosine of each pair of rows ``(P, D)``, in float64; of a zero row: 0."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    dots = (one * other).sum(1)
    return np.asarray(dots / np.maximum(lengths, np.finfo(np.float64).tiny))


def compare(wanted: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Smallest cosine of two rows, and largest difference in standard deviations of `wanted`; both ``(P, D)``.

    Not finite, or another shape: (−1, ∞).
    """
    if wanted.shape != found.shape or not np.isfinite(found).all():
        return -1.0, float("inf")
    one, other = wanted.astype(np.float64), found.astype(np.float64)
    deviation = max(float(one.std()), np.finfo(np.float64).tiny)
    return float(cosines(wanted, found).min(initial=1.0)), float(np.abs(one - other).max(initial=0.0) / deviation)


def run(embed: Embed, arrays: Mapping[str, np.ndarray], limits: Mapping[str, float]) -> SelfTest:
    """Embed the probe's images and compare; all together, and the first one alone.

    Args:
        embed: what will run on this machine.
        arrays: ``images`` uint8 ``(P, size, size, 3)`` and ``embeddings`` float32 ``(P, D)``.
        limits: ``min_cosine`` and ``max_difference``, of the bundle's precision.

    Returns:
        The figures, rounded.

    Raises:
        GateRefusedError: they differ by more than the limits; in one sentence.
    """
    images, wanted = arrays["images"], arrays["embeddings"]
    together, alone = compare(wanted, embed(images)), compare(wanted[:1], embed(images[:1]))
    cosine, difference = min(together[0], alone[0]), max(together[1], alone[1])
    if not (cosine >= limits["min_cosine"] and difference <= limits["max_difference"]):
        raise GateRefusedError(
            f"the backbone computes something else here than where it was packed: cosine {cosine:.6f}, but at least "
            f"{limits['min_cosine']:g} is needed; largest difference {difference:.2g} σ, but at most "
            f"{limits['max_difference']:g}; run ssd-edge doctor, or deploy in fp32"
        )
    return SelfTest(len(images), round(cosine, 7), float(f"{difference:.1e}"))
