"""What pretraining knows about embeddings, for the learners that can use it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


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
