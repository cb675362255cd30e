"""Statistics from pretraining that learners can start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LANDMARKS = {"keys": np.float16, "mean": np.float32, "projection": np.float16, "signal": np.float32}  # dtypes in a file
MOST_GAIN = 40.0  # responses are at most exp(gain); their squares are finite in float32


@dataclass(frozen=True)
class Landmarks:
    """Neurons of the default learner and the directions of their responses.

    Attributes:
        keys: unit embeddings of pretraining images, float32 ``(r, D)``, exact in float16.
        mean: mean responses to pretraining classes, float32 ``(r,)``.
        projection: directions as columns, float32 ``(r, n)``, exact in float16; sorted by signal, and scaled to a
            variance within pretraining classes of about 1.
        signal: expected variance of class means along each direction, float32 ``(n,)``.
        gain: γ of the responses exp(γ cos).
    """

    keys: np.ndarray
    mean: np.ndarray
    projection: np.ndarray
    signal: np.ndarray
    gain: float

    def store(self, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
        """Add the landmarks to the contents of a file of priors; `pop` is the inverse."""
        for name, kind in LANDMARKS.items():
            arrays[f"landmark_{name}"] = getattr(self, name).astype(kind)
        metadata["landmark_gain"] = self.gain

    @classmethod
    def pop(cls, arrays: dict[str, np.ndarray], metadata: Mapping[str, Any]) -> Landmarks | None:
        """Remove the landmarks from the contents of a file of priors and return them; None if it has none."""
        if "landmark_gain" not in metadata:
            return None
        parts = {name: arrays.pop(f"landmark_{name}").astype(np.float32) for name in LANDMARKS}
        gain = float(metadata["landmark_gain"])
        if not 0 < gain <= MOST_GAIN:
            raise ValueError(f"landmark_gain is {gain:g}, but must be above 0 and at most {MOST_GAIN:g}")
        return cls(**parts, gain=gain)


@dataclass(frozen=True)
class Priors:
    """Statistics from the pretraining of a backbone. Every part is optional; a user's ONNX backbone has none.

    Attributes:
        count: number of pretraining images that the covariance was estimated from.
        within_covariance: within-class covariance of standardised embeddings, float32 ``(D, D)``.
        keys: non-negative unit rows of an SDMLP pretrained with the settings in `student`, float32 ``(r, D)``.
        counters: GABA counters of that SDMLP, float32 ``(r,)``.
        landmarks: landmarks of the default learner.
        student: settings of the pretraining of the keys (neurons, k, shift, …).
    """

    count: int = 0
    within_covariance: np.ndarray | None = None
    keys: np.ndarray | None = None
    counters: np.ndarray | None = None
    landmarks: Landmarks | None = None
    student: dict[str, Any] = field(default_factory=dict)
