"""Small synthetic landmarks, in the form in which a backbone package stores them."""

from __future__ import annotations

import numpy as np

from ssd_edge.learners.priors import Landmarks


def landmarks(dim: int, neurons: int = 40, directions: int = 20, seed: int = 0) -> Landmarks:
    """Return landmarks with random unit keys, random directions and a decreasing signal."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(neurons, dim))
    keys = (keys / np.linalg.norm(keys, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    projection = rng.normal(size=(neurons, directions)).astype(np.float16).astype(np.float32)
    signal = (2.0 / np.arange(1, directions + 1)).astype(np.float32)
    return Landmarks(keys, np.ones(neurons, np.float32), projection, signal, 0.5)
