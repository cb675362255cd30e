"""What pretraining knows about embeddings, for the learners that can use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LANDMARKS = {"keys": np.float16, "mean": np.float32, "projection": np.float16, "signal": np.float32}  # in a file


@dataclass(frozen=True)
class Landmarks:
    """The default learner's neurons, and the directions of their activity along which it keeps statistics.

    Attributes:
        keys: ``(r, D)`` float32, unit embeddings of pretraining images; fp16 holds them exactly.
        mean: ``(r,)`` float32, the mean response to pretraining classes.
        projection: ``(r, n)`` float32 that fp16 holds exactly; the columns with most signal come first, and along each
            the spread within pretraining classes is about 1.
        signal: ``(n,)`` float32, the expected variance of class means along each direction.
        gain: γ of the response exp(γ cos).
    """

    keys: np.ndarray
    mean: np.ndarray
    projection: np.ndarray
    signal: np.ndarray
    gain: float

    def store(self, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
        """Add them to what a file of priors will hold; `taken` is the inverse."""
        for name, kind in LANDMARKS.items():
            arrays[f"landmark_{name}"] = getattr(self, name).astype(kind)
        metadata["landmark_gain"] = self.gain

    @classmethod
    def taken(cls, arrays: dict[str, np.ndarray], metadata: Mapping[str, Any]) -> Landmarks | None:
        """Take them out of what a file of priors holds; None where it holds none."""
        if "landmark_gain" not in metadata:
            return None
        named = {name: arrays.pop(f"landmark_{name}").astype(np.float32) for name in LANDMARKS}
        return cls(**named, gain=float(metadata["landmark_gain"]))


@dataclass(frozen=True)
class Priors:
    """Every part may be missing (a user's ONNX backbone has none).

    Attributes:
        count: number of pretraining images behind the covariance.
        within_covariance: ``(D, D)`` float32, of standardised embeddings around their class means.
        keys: ``(r, D)`` float32, non-negative unit rows of an SDMLP pretrained with the settings in `student`.
        counters: ``(r,)`` float32, its GABA counters.
        landmarks: of the default learner.
        student: how the keys were pretrained (neurons, k, shift, …).
    """

    count: int = 0
    within_covariance: np.ndarray | None = None
    keys: np.ndarray | None = None
    counters: np.ndarray | None = None
    landmarks: Landmarks | None = None
    student: dict[str, Any] = field(default_factory=dict)
