"""A state that something has changed is refused in one sentence, or everything that a learner does still works.

Each learner learns two tasks; then one tensor or one entry of its metadata is replaced by what an attacker, another
program or a failing disk may leave there. `restore` refuses it, or the learner scores, learns, forgets, joins, merges
and is packed again, at worst with an error that a user can act on.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_learners import DIM, OPTIONS, make, task

from ssd_edge.errors import BundleRefusedError, SSDEdgeError
from ssd_edge.learners import LEARNERS, Learner, pack, restore, without_rows
from ssd_edge.system import MIB, reset_peak, resident

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # overflow in a mutant
]

Arrays = dict[str, np.ndarray]
State = tuple[Arrays, dict[str, Any]]


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
NUMBERS = (0, -1, 1, 3, 0.5, -0.5, 20_000, 10**6, 10**15, 10**16, 10**400, 1e-300, 1e300, float("nan"))


def mutants(state: State) -> Iterator[tuple[str, State]]:
    """Yield changed copies of a state with their names."""
    arrays, metadata = state
    for name, array in arrays.items():
        values = FLOATS if array.dtype.kind == "f" else WHOLE
        for kind, change in {**values, **SHAPES}.items():
            with np.errstate(all="ignore"):
                yield f"{name}: {kind}", ({**arrays, name: change(array)}, metadata)
    for value in (*NUMBERS, 13, 2**31, True, "12", None):
        yield f"dim: {value!r:.20}", (arrays, {**metadata, "dim": value})
        yield f"seed: {value!r:.20}", (arrays, {**metadata, "seed": value})
    for key, present in metadata["settings"].items():
        if isinstance(present, str):
            values: tuple[Any, ...] = ("", "mask", "random", "old", "ewc", "1e9", "0.0k", None)
        else:
            values = (*NUMBERS, True, False, None)
        for value in values:
            yield f"{key}: {value!r:.20}", (arrays, {**metadata, "settings": {**metadata["settings"], key: value}})


def together(arrays: Arrays) -> Iterator[tuple[str, Arrays]]:
    """Yield states in which several tensors are changed in one way."""
    for kind, change in {**FLOATS, **SHAPES}.items():
        with np.errstate(all="ignore"):
            yield kind, {n: change(a) if a.dtype.kind == "f" and a.ndim else a for n, a in arrays.items()}
            of_classes = {n: change(a) if n in ("counts", "sums", "second") else a for n, a in arrays.items()}
        yield f"statistics {kind}", of_classes


def stop(share: float) -> bool:
    """End a task after its first epoch."""
    return True


def use(learner: Learner, original: Learner) -> None:
    """Do everything with copies of a learner; an error that a user can act on is allowed."""
    test = task((0, 1, 2), 30, seed=5)

    def again() -> Learner:
        return restore(*pack(learner))

    def learn(rows: tuple[int, ...]) -> None:
        taught = again()
        taught.learn(task(rows, 30, seed=3), stop)
        taught.predict(test.embeddings)
        restore(*pack(taught))

    def merge(subtract: bool) -> None:
        for one, other in ((again(), original), (restore(*pack(original)), learner)):
            one.merge(other)
            if subtract:
                one.subtract(other)
            one.predict(test.embeddings)

    def remove() -> None:
        fewer = again()
        fewer.remove(1, approximately=True)
        without_rows(fewer, [1]).predict(test.embeddings)

    def join() -> None:
        joined = again()
        joined.join(1, 0)
        joined.predict(test.embeddings)

    for act in (
        lambda: learner.predict(test.embeddings),
        lambda: learn((0,)),
        lambda: learn((3, 4)),
        lambda: merge(False),
        lambda: merge(True),
        remove,
        join,
    ):
        try:
            act()
        except SSDEdgeError as error:
            assert str(error).isprintable()


def survives(kind: str, state: State, original: Learner) -> bool:
    """Restore a mutant and use it; return False if it was refused."""
    try:
        learner = restore(*state)
    except BundleRefusedError as error:
        assert str(error).isprintable(), kind
        return False
    try:
        use(learner, original)
    except Exception as error:
        raise AssertionError(f"{kind}: {type(error).__name__}: {error}") from error
    return True


def trained(case: str) -> Learner:
    learner = make(case)
    for rows in ((0, 1), (2, 3)):
        learner.learn(task(rows, 40), stop)
    return learner


def attack(case: str) -> tuple[int, int]:
    """Try all mutants of a learner; return how many were refused and how many were used."""
    learner = trained(case)
    found = [survives(kind, state, learner) for kind, state in mutants(pack(learner))]
    arrays, metadata = pack(learner)
    found += [survives(kind, (changed, metadata), learner) for kind, changed in together(arrays)]
    return found.count(False), found.count(True)


@pytest.mark.parametrize("case", LEARNERS)
def test_mutants_are_refused_or_work(case: str) -> None:
    refused, used = attack(case)
    assert refused > 100
    assert used > 5


@pytest.mark.slow
@pytest.mark.parametrize("case", OPTIONS.keys() - LEARNERS.keys())
def test_mutants_of_other_settings_are_refused_or_work(case: str) -> None:
    assert attack(case)[0] > 100
