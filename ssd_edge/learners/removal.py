"""Removal of classes from a learner's state: zeroing the outputs of a network, and deleting rows.

Both find the class axes of all tensors in `Learner.schema`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ssd_edge.errors import InputError
from ssd_edge.learners.base import BASE_SCHEMA, CLASS_AXES, Learner

TINY = torch.finfo(torch.float64).tiny


def blank(learner: Learner, row: int) -> None:
    """Zero the output of a class in a trained network and in its penalty, which would otherwise pull it back.

    The result is like the output of a class that has not been learned.
    """
    state, rows = learner.state_dict(), torch.tensor([row])
    _release_penalty(learner, state, rows)
    for name, axis in _class_axes(learner):
        some = rows[rows < state[name].shape[axis]]
        state[name] = state[name].index_fill(axis, some, 0)
    learner.load_state_dict(state)


def without_rows(learner: Learner, rows: Iterable[int]) -> Learner:
    """Return a copy of a learner without some rows; later rows move up.

    Args:
        learner: learner to copy; it is not changed.
        rows: rows without a learned class.

    Raises:
        InputError: a row has a learned class or does not exist.
    """
    state, deleted = learner.state_dict(), sorted(set(rows))
    classes = max(state[name].shape[axis] for name, axis in _class_axes(learner))
    missing = [row for row in deleted if not 0 <= row < classes]
    if missing:
        raise InputError(f"rows {missing} cannot be deleted: the rows are 0 to {classes - 1}")
    learned = [row for row in deleted if row < len(learner.seen) and learner.seen[row]]
    if learned:
        raise InputError(f"rows {learned} cannot be deleted: they have learned classes; remove or join them first")
    index = torch.tensor(deleted, dtype=torch.int64)
    _release_penalty(learner, state, index)
    learner.renumber(state, index)
    stays = torch.ones(classes, dtype=torch.bool)
    stays[index] = False
    for name, axis in _class_axes(learner):
        remaining = stays[: state[name].shape[axis]].nonzero().flatten()
        state[name] = state[name].index_select(axis, remaining).contiguous()
    fewer = type(learner)(learner.dim, learner.settings, None, learner.seed, learner.device)
    fewer.load_state_dict(state)
    return fewer


def _class_axes(learner: Learner) -> Iterator[tuple[str, int]]:
    """Yield the name and axis of every class axis in the state."""
    for name, spec in {**BASE_SCHEMA, **learner.schema()}.items():
        for axis, symbol in enumerate(spec.shape):
            if symbol in CLASS_AXES:
                yield name, axis


def _release_penalty(learner: Learner, state: dict[str, Tensor], rows: Tensor) -> None:
    """Subtract the contribution of some rows from the constant ΣΣΩθ*² of a penalty.

    With a single anchor the contribution is (Ωθ*)²/Ω. With several (EWC) this is the contribution at their weighted
    mean; their variance stays in the constant, which does not affect gradients.
    """
    if "penalty_constant" not in state:
        return
    for name, axis in _class_axes(learner):
        if name.startswith("importance_"):
            anchored = state[f"anchored_{name.removeprefix('importance_')}"].index_select(axis, rows).double()
            importance = state[name].index_select(axis, rows).double()
            state["penalty_constant"] -= (anchored.square() / importance.clamp_min(TINY)).sum()
