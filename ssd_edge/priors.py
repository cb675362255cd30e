"""What pretraining knows about embeddings, for the learners that can use it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Priors:
    """Every part may be missing (a user's ONNX backbone has none).

    Attributes:
        count: number of pretraining images behind the covariance.
        within_covariance: ``(D, D)`` float32, of standardised embeddings around their class means.
        keys: ``(r, D)`` float32, non-negative unit rows of an SDMLP pretrained with the settings in `student`.
        counters: ``(r,)`` float32, its GABA counters.
        code_keys: ``(r, D)`` float32, signed unit rows pretrained for reading out a code of k = r/2 active
            neurons; the default learner's keys.
        student: how the keys were pretrained (neurons, k, shift, …).
    """

    count: int = 0
    within_covariance: np.ndarray | None = None
    keys: np.ndarray | None = None
    counters: np.ndarray | None = None
    code_keys: np.ndarray | None = None
    student: dict[str, Any] = field(default_factory=dict)
