"""What an attacker, another program or a failing disk may leave in a tensor, by name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def _first(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that replaces the first number of an array."""

    def change(array: np.ndarray) -> np.ndarray:
        changed = array.copy()
        if changed.size:
            changed.flat[0] = value
        return changed

    return change


FLOATS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "zero": np.zeros_like,
    "ones": np.ones_like,
    "negated": lambda array: -array,
    "one negative": _first(-1.0),
    "NaN": _first(np.nan),
    "infinite": _first(np.inf),
    "one huge": _first(6e4),
    "one larger than allowed": _first(3e38),
    "scaled up": lambda array: (array * 1e4).astype(array.dtype),
    "scaled far up": lambda array: (array.astype(np.float64) * 1e28).astype(array.dtype),
    "scaled down": lambda array: (array * 1e-30).astype(array.dtype),
    "fractional": lambda array: array + np.asarray(0.5, array.dtype),
    "noise": lambda array: np.random.default_rng(0).normal(size=array.shape).astype(array.dtype),
}
WHOLE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "zero": np.zeros_like,
    "ones": np.ones_like,
    "largest": lambda array: np.full_like(array, np.iinfo(array.dtype).max),
    "smallest": lambda array: np.full_like(array, np.iinfo(array.dtype).min),
    "one million": lambda array: np.full_like(array, min(10**6, np.iinfo(array.dtype).max)),
    "2^53": lambda array: np.full_like(array, min(2**53, np.iinfo(array.dtype).max)),
    "all equal": lambda array: np.full_like(array, array.flat[0]),
    "one more": lambda array: array + np.ones(1, array.dtype),
}
SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "transposed": lambda array: np.ascontiguousarray(array.T),
    "rows rolled": lambda array: np.roll(array, 1, 0),
    "columns rolled": lambda array: np.roll(array, 1, -1),
    "a row less": lambda array: array[:-1],
    "a row more": lambda array: np.concatenate([array, array[:1]]),
    "a column less": lambda array: np.ascontiguousarray(array[..., :-1]),
    "no rows": lambda array: array[:0],
    "flat": lambda array: array.reshape(-1),
}
