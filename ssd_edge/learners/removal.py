"""Taking classes out of a learner's state: blanking a trained network's outputs, and leaving out rows for good.

Both work on any learner: `Learner.schema` says along which axis of which tensor the classes lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ssd_edge.errors import InputError
from ssd_edge.learners.base import BASE_SCHEMA, CLASS_AXES, Learner
from ssd_edge.learners.priors import Priors

TINY = torch.finfo(torch.float64).tiny


def blank(learner: Learner, row: int) -> None:
    """Zero all that a trained network keeps of one class: its output, the former self's, what holds it in place.

    A penalty would otherwise pull the output back to where the class was known, and a kept teacher teach it again.
    The output then is one like those of classes that are yet to come.
    """
    state, rows = learner.state_dict(), torch.tensor([row])
    _release(learner, state, rows)
    for name, axis in _class_axes(learner):
        some = rows[rows < state[name].shape[axis]]
        state[name] = state[name].index_fill(axis, some, 0)
    learner.load_state_dict(state)


def without_rows(learner: Learner, rows: Iterable[int]) -> Learner:
    """A copy of a learner without some rows; those above move up, and it answers with their new numbers.

    Args:
        learner: stays as it is.
        rows: that have not been taught, or whose classes have been removed or joined with others.

    Raises:
        InputError: a row is taught, or there is none of that number.
    """
    state, left_out = learner.state_dict(), sorted(set(rows))
    classes = max(state[name].shape[axis] for name, axis in _class_axes(learner))
    wrong = [row for row in left_out if not 0 <= row < classes]
    if wrong:
        raise InputError(f"there are {classes} rows, so rows {wrong} cannot be left out; name some from 0 on")
    taught = [row for row in left_out if row < len(learner.seen) and learner.seen[row]]
    if taught:
        raise InputError(f"rows {taught} are taught, so they cannot be left out; remove or join their classes first")
    gone = torch.tensor(left_out, dtype=torch.int64)
    _release(learner, state, gone)
    learner._renumber(state, gone)
    stays = torch.ones(classes, dtype=torch.bool)
    stays[gone] = False
    for name, axis in _class_axes(learner):
        places = stays[: state[name].shape[axis]].nonzero().flatten()
        state[name] = state[name].index_select(axis, places).contiguous()
    fewer = type(learner)(learner.dim, learner.settings, Priors(), learner.seed, learner.device)
    fewer.load_state_dict(state)
    return fewer


def _class_axes(learner: Learner) -> Iterator[tuple[str, int]]:
    """The tensors of the state that have an axis of classes, and which it is."""
    for name, spec in {**BASE_SCHEMA, **learner.schema()}.items():
        for axis, symbol in enumerate(spec.shape):
            if symbol in CLASS_AXES:
                yield name, axis


def _release(learner: Learner, state: dict[str, Tensor], rows: Tensor) -> None:
    """Take the part of these rows out of a penalty's value.

    ΣΣΩθ*² is kept as one number. Of a single anchor the rows' part of it is (Ωθ*)²/Ω. Of several (EWC) that is the
    part that goes at their weighted mean; how far they lie apart stays in the value, which no parameter can change.
    """
    if "penalty_constant" not in state:
        return
    for name, axis in _class_axes(learner):
        if name.startswith("importance_"):
            anchored = state[f"anchored_{name.removeprefix('importance_')}"].index_select(axis, rows).double()
            importance = state[name].index_select(axis, rows).double()
            state["penalty_constant"] -= (anchored.square() / importance.clamp_min(TINY)).sum()
