"""A state that something has changed is refused in one sentence, or everything that a learner does still works.

Each learner learns two tasks; then one tensor or one entry of its metadata is replaced by what an attacker, another
program or a failing disk may leave there. `restore` refuses it, or the learner scores, learns, forgets, joins, merges
and is packed again, at worst with an error that a user can act on.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from helpers.mutations import FLOATS, SHAPES, WHOLE
from helpers.small_learners import OPTIONS, make, task

from ssd_edge.errors import BundleRefusedError, InputError, SSDEdgeError
from ssd_edge.learners import LEARNERS, Learner, pack, restore, without_rows
from ssd_edge.learners.base import MOST_DRAWN
from ssd_edge.system import MIB, reset_peak, resident

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # overflow in a mutant
]

Arrays = dict[str, np.ndarray]
State = tuple[Arrays, dict[str, Any]]


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


TEST = task((0, 1, 2), 30, seed=5).embeddings
TASK = task((0, 3, 4), 30, seed=3)


def learn(learner: Learner, original: Learner) -> None:
    learner.learn(TASK, stop)
    restore(*pack(learner)).predict(TEST)


def merge(learner: Learner, original: Learner) -> None:
    for one, other in ((learner, original), (restore(*pack(original)), learner)):
        one.merge(other)
        one.predict(TEST)
        one.subtract(other)


def remove(learner: Learner, original: Learner) -> None:
    learner.remove(1, approximately=True)
    without_rows(learner, [1]).predict(TEST)


def join(learner: Learner, original: Learner) -> None:
    learner.join(1, 0)
    learner.predict(TEST)


VERBS = (learn, merge, remove, join)


def survives(kind: str, state: State, original: Learner) -> bool:
    """Restore a mutant and do everything with copies of it; return False if it was refused."""
    try:
        learner = restore(*state)
    except BundleRefusedError:
        return False
    except Exception as error:
        raise AssertionError(f"{kind}: {type(error).__name__}: {error}") from error
    for verb in VERBS:
        try:
            verb(restore(*pack(learner)), original)
        except SSDEdgeError:
            continue
        except Exception as error:
            raise AssertionError(f"{kind}, {verb.__name__}: {type(error).__name__}: {error}") from error
    return True


def trained(case: str) -> Learner:
    learner = make(case)
    for rows in ((0, 1), (2, 3)):
        learner.learn(task(rows, 40), stop)
    return learner


def attack(case: str, every: int = 1) -> tuple[int, int]:
    """Try every n-th mutant of a learner; return how many were refused and how many were used."""
    learner = trained(case)
    arrays, metadata = pack(learner)
    several = ((kind, (changed, metadata)) for kind, changed in together(arrays))
    chosen = itertools.islice(itertools.chain(mutants((arrays, metadata)), several), 0, None, every)
    found = [survives(kind, state, learner) for kind, state in chosen]
    return found.count(False), found.count(True)


@pytest.mark.parametrize("case", LEARNERS)
def test_mutants_are_refused_or_work(case: str) -> None:
    refused, used = attack(case, every=11)
    assert refused > 5
    assert used > 2


@pytest.mark.slow
@pytest.mark.parametrize("case", OPTIONS)
def test_all_mutants_are_refused_or_work(case: str) -> None:
    refused, used = attack(case)
    assert refused > 90
    assert used > 30


@pytest.mark.slow
@pytest.mark.parametrize("case", OPTIONS)
def test_random_mutants_are_refused_or_work(case: str) -> None:
    """Several numbers anywhere in a state, replaced by random ones of every size."""
    learner, rng, refused = trained(case), np.random.default_rng(7), 0
    arrays, metadata = pack(learner)
    for number in range(120):
        changed = {name: array.copy() for name, array in arrays.items()}
        for name in rng.choice(list(changed), rng.integers(1, 4)):
            array = changed[name]
            for at in rng.integers(0, max(array.size, 1), rng.integers(1, 4)) if array.size else ():
                value = rng.choice([-1, 1]) * 10.0 ** rng.uniform(-40, 38)
                with np.errstate(all="ignore"):
                    array.flat[at] = (
                        value
                        if array.dtype.kind == "f"
                        else array.dtype.type(int(value) % (int(np.iinfo(array.dtype).max) + 1))
                    )
        refused += not survives(f"{number}", (changed, metadata), learner)
    assert refused > 20


@pytest.mark.parametrize("case", LEARNERS)
@pytest.mark.parametrize("kind", ["NaN", "infinite", "one larger than allowed", "a column less", "flat"])
def test_a_damaged_tensor_is_refused(case: str, kind: str) -> None:
    learner = trained(case)
    arrays, metadata = pack(learner)
    for name, array in arrays.items():
        if name == "seen" or (array.ndim < 2 and kind == "flat") or (array.dtype.kind != "f" and kind not in SHAPES):
            continue
        with np.errstate(all="ignore"):
            changed = {**FLOATS, **SHAPES}[kind](array)
        with pytest.raises(BundleRefusedError, match="^the (tensor|state)" if kind in SHAPES else f"'{name}'"):
            restore({**arrays, name: changed}, metadata)


# What reached the later code before states were validated, by learner, tensor and value.
WRONG: list[tuple[str, str, Callable[[np.ndarray], np.ndarray], str]] = [
    *((name, "counts", np.negative, "'counts'") for name in ("ncm", "slda", "ridge", "ranpac", "fecam")),
    *((name, "counts", FLOATS["fractional"], "must be whole") for name in ("ncm", "fecam")),
    *((name, "counts", np.zeros_like, "a class without samples|has samples of") for name in ("ncm", "slda")),
    *((name, "second", np.zeros_like, "indefinite") for name in ("slda", "ridge", "ranpac", "fecam")),
    *((name, "second", np.negative, "indefinite") for name in ("slda", "ridge", "ranpac", "fecam")),
    *((name, "sums", FLOATS["scaled up"], "indefinite") for name in ("slda", "ridge", "ranpac", "fecam")),
    ("slda", "prior", np.negative, "indefinite"),
    ("slda", "prior", FLOATS["noise"], "not symmetric"),
    ("slda", "prior_weight", FLOATS["one larger than allowed"], "'prior_weight'"),
    *(
        ("slda, two views", "apart", change, "the differences of two views")
        for change in (np.negative, lambda a: 1000 * a)
    ),
    ("flymodel", "weights", np.negative, "'weights'"),
    ("flymodel", "seen", np.zeros_like, "not those of its learned rows"),
    ("sdmlp", "keys", np.negative, "'keys'"),
    ("sdmlp", "keys", FLOATS["ones"], "unit length"),
    ("sdmlp", "values", np.negative, "'values'"),
    ("sdmlp", "counters", np.negative, "'counters'"),
    ("sdmlp", "switch", np.negative, "'switch'"),
    ("sdmlp", "announced", WHOLE["one million"], "1000000 classes were announced"),
    ("finetune", "announced", WHOLE["2^53"], "classes were announced"),
    ("finetune", "seen", SHAPES["a row more"], "5 learned rows, but outputs for 4"),
    ("finetune", "tasks_learned", WHOLE["largest"], "'tasks_learned'"),
    ("finetune", "tasks_learned", np.negative, "'tasks_learned'"),
    ("ssd", "top_n_indices", WHOLE["largest"], "'top_n_indices'"),
    ("ssd", "top_n_indices", np.zeros_like, "twice"),
    ("ssd", "top_n_frequencies", np.negative, "'top_n_frequencies'"),
    ("sdmlp, ewc", "importance_keys", np.negative, "'importance_keys'"),
    ("sdmlp, ewc", "importance_values", np.zeros_like, "have an anchor, but no importance"),
    ("icarl", "exemplar_rows", WHOLE["one million"], "there are exemplars of the rows"),
    ("icarl", "exemplar_rows", np.zeros_like, "there are exemplars of the rows"),
    ("icarl", "exemplar_rows", WHOLE["smallest"], "'exemplar_rows'"),
]


@pytest.mark.parametrize(("case", "name", "change", "told"), WRONG)
def test_wrong_values_are_refused(case: str, name: str, change: Callable[[np.ndarray], np.ndarray], told: str) -> None:
    arrays, metadata = pack(trained(case))
    with np.errstate(all="ignore"), pytest.raises(BundleRefusedError, match=told):
        restore({**arrays, name: change(arrays[name])}, metadata)


@pytest.mark.parametrize("case", LEARNERS)
def test_no_number_alone_allocates_memory(case: str) -> None:
    """Each number of the metadata is raised as far as its setting allows."""
    if not reset_peak():
        pytest.skip("the system does not report the peak of memory")
    arrays, metadata = pack(trained(case))
    before, refused = resident("VmHWM"), 0
    lies = [{**metadata, "dim": dim} for dim in (13, 20_000, 2**31 - 1, 2**31, 10**400)]
    for key, value in metadata["settings"].items():
        numbers = (20_000, 10**6, 10**9, 10**15) if type(value) in (int, float) else ()
        lies += [{**metadata, "settings": {**metadata["settings"], key: number}} for number in numbers]
    for lie in lies:
        try:
            restore(arrays, lie)
        except BundleRefusedError:
            refused += 1
    assert refused >= 2
    # `MOST_DRAWN` random numbers and what drawing them takes, for a learner that stores none of them
    drawn = 3 * 4 * MOST_DRAWN / MIB if case in ("flymodel", "ranpac", "klda") else 0
    assert (resident("VmHWM") - before) / MIB < 50 + drawn


@pytest.mark.parametrize("case", OPTIONS)
def test_states_after_every_change_are_valid(case: str) -> None:
    """Rounding after many changes is not taken for damage: a device could not restart otherwise."""
    learner, original = trained(case), trained(case)
    for number in range(12):
        learner.learn(task((number % 7, 0), 6, seed=number), stop)
        learner = restore(*pack(learner))
    for change in (Learner.merge, Learner.subtract):
        with contextlib.suppress(InputError):  # not every learner can
            change(learner, original)
        learner = restore(*pack(learner))
    with contextlib.suppress(InputError):
        learner.join(5, 0)
    learner = restore(*pack(learner))
    for row in (0, 3, 6, 1):
        learner.remove(row, approximately=True)
        learner = restore(*pack(learner))
    assert int(learner.seen.sum()) <= 3
