"""Statistics from pretraining that learners can start from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Priors:
    """Statistics from the pretraining of a backbone. Every part is optional; a user's ONNX backbone has none.

    Attributes:
        count: number of pretraining images that the covariance was estimated from.
        within_covariance: within-class covariance of standardised embeddings, float32 ``(D, D)``.
        keys: non-negative unit rows of an SDMLP pretrained with the settings in `student`, float32 ``(r, D)``.
        counters: GABA counters of that SDMLP, float32 ``(r,)``.
        student: settings of the pretraining of the keys (neurons, k, shift, …).
    """

    count: int = 0
    within_covariance: np.ndarray | None = None
    keys: np.ndarray | None = None
    counters: np.ndarray | None = None
    student: dict[str, Any] = field(default_factory=dict)
