"""Selective subnetwork distillation (SSD, arXiv 2512.15267): neuron selection, Top-n table, losses, teacher.

While a new task is learned, the student is held to what its previous self answers *on the new data*: on the
activations of the Top-n neurons that were most frequently active in the last task (Eq. 2), and on the logits
(Eq. 3), weighed by Eq. 6: α·CE + (1 − α)·(λ·hidden + (1 − λ)·logits). Every loss here comes with its gradient
in closed form; all are means over the batch of sums over entries, computed with the factor T² that keeps
gradients comparable over temperatures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_edge.errors import InputError
from ssd_edge.learners.gradient.network import SDMLP

Direction = Literal["teacher_student", "student_teacher"]
HiddenLoss = Literal["kl_softmax", "mse"]
Selection = Literal["frequency", "random", "all"]

SCORES = 2**20  # held at a time in passes over a task: 4 MiB


@dataclasses.dataclass(frozen=True)
class TopNTable:
    """The neurons whose activations are distilled.

    Attributes:
        indices: int64 ``(n,)``, in the order of the selection (most frequent first).
        frequencies: float32 ``(n,)``, share of the last task's samples that activate each.
    """

    indices: Tensor
    frequencies: Tensor

    def slots(self, neurons: int) -> Tensor:
        """The column of each neuron in the table, or -1: int64 ``(r,)``."""
        slot = torch.full((neurons,), -1, dtype=torch.int64, device=self.indices.device)
        slot[self.indices] = torch.arange(len(self.indices), device=self.indices.device)
        return slot


def parse_top_n(value: str | int | float, k: int, neurons: int) -> int:
    """Read ``top_n``: a whole number; ``"1.0k"``, a multiple of k; or a fraction of r below 1.

    Raises:
        InputError: of none of these forms, or not between 1 and r.
    """
    text = str(value).strip()
    try:
        if text.endswith("k"):
            count = round(float(text[:-1]) * k)
        else:
            number = float(text)
            count = round(number * neurons) if 0 < number < 1 else int(number)
            if number >= 1 and number != count:
                raise ValueError
    except (ValueError, OverflowError):
        raise InputError(
            f"learner.top_n must be a whole number, a multiple of k ('1.0k') or a fraction of r, but is {value!r}"
        ) from None
    if not 1 <= count <= neurons:
        raise InputError(f"learner.top_n gives {count} neurons; it must be between 1 and learner.neurons = {neurons}")
    return count


def select(
    frequencies: Tensor,
    n: int,
    rule: Selection = "frequency",
    generator: torch.Generator | None = None,
) -> TopNTable:
    """Choose the neurons to distil (Algorithm 1). Ties go to the lower index.

    Args:
        frequencies: p, ``(r,)``.
        n: how many.
        rule: by frequency as in Algorithm 1; at random; or all.
        generator: needed for ``random``.
    """
    neurons = len(frequencies)
    if rule == "all":
        indices = torch.arange(neurons, device=frequencies.device)
    elif rule == "random":
        indices = torch.randperm(neurons, generator=generator)[:n].to(frequencies.device)
    else:
        indices = (-frequencies).sort(stable=True).indices[:n]
    return TopNTable(indices, frequencies[indices].float())


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over all outputs, and its gradient ``(B, C)``."""
    log_probability = logits.log_softmax(1)
    picked = log_probability.gather(1, labels[:, None])
    gradient = log_probability.exp()
    gradient.scatter_add_(1, labels[:, None], torch.full_like(picked, -1.0))
    return -picked.mean(), gradient / len(labels)


def divergence(
    student: Tensor, teacher: Tensor, temperature: float, direction: Direction = "teacher_student"
) -> tuple[Tensor, Tensor]:
    """T² · KL between softmax(teacher/T) and softmax(student/T) over the last axis (Eq. 2, 3).

    Args:
        student: ``(B, m)``.
        teacher: ``(B, m)``.
        temperature: T.
        direction: ``teacher_student`` is KL(teacher ‖ student), the usual practice; Eq. 2-3 print the other.

    Returns:
        Loss and ∂loss/∂student ``(B, m)``.
    """
    log_q = (student / temperature).log_softmax(1)
    log_p = (teacher / temperature).log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    if direction == "teacher_student":
        loss, gradient = (p * (log_p - log_q)).sum(), q - p
    else:
        each = (q * (log_q - log_p)).sum(1, keepdim=True)
        loss, gradient = each.sum(), q * (log_q - log_p - each)
    batch = max(1, len(student))
    return temperature**2 * loss / batch, temperature * gradient / batch


def hidden_loss(
    student: Tensor, teacher: Tensor, temperature: float, kind: HiddenLoss, direction: Direction
) -> tuple[Tensor, Tensor]:
    """Distance between the activations of the Top-n neurons, ``(B, n)``, and its gradient.

    ``kl_softmax`` is the paper's Eq. 2. Post-Top-K activations are so small that its softmax is almost flat
    and its gradient nearly nothing; ``mse`` shows what a stronger term would do.
    """
    if kind == "kl_softmax":
        return divergence(student, teacher, temperature, direction)
    batch = max(1, len(student))
    difference = student - teacher
    scale = 1.0 / batch
    return difference.square().sum() * scale, 2 * difference * scale


@dataclasses.dataclass(frozen=True)
class HiddenTargets:
    """The teacher's activations of one layer's table neurons on the new task's data; few are not zero.

    Attributes:
        slots: int64 ``(N, m)``, table columns of the active table neurons, padded with n.
        activations: ``(N, m)``, padded with 0; m is the most that any sample has.
        width: n.
    """

    slots: Tensor
    activations: Tensor
    width: int

    def table(self, index: Tensor) -> Tensor:
        """Activations ``(B, n)`` of some samples."""
        table = self.activations.new_zeros(len(index), self.width + 1)
        table.scatter_(1, self.slots[index], self.activations[index])
        return table[:, : self.width]


@dataclasses.dataclass(frozen=True)
class Targets:
    """What the teacher answers on the new task's data, computed once; sample i of the task is row i.

    Attributes:
        logits: ``(N, C)``.
        hidden: per hidden layer.
    """

    logits: Tensor
    hidden: list[HiddenTargets]


def teacher_targets(
    teacher: SDMLP,
    inputs: Tensor,
    tables: Sequence[TopNTable],
    batch: int | None = None,
) -> Targets:
    """One pass of the teacher over the prepared inputs ``(N, D)`` of the new task; nothing is counted.

    Args:
        teacher: a former self.
        inputs: ``(N, D)``.
        tables: per hidden layer, the neurons to note.
        batch: inputs at a time; None: as many as have `SCORES` scores.
    """
    gammas, layers = teacher.gammas, range(len(teacher.layers))
    slots = [table.slots(len(layer.keys)) for table, layer in zip(tables, teacher.layers, strict=True)]
    logits: list[Tensor] = []
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
    for part in torch.split(inputs, batch or _portion(teacher)):
        state = teacher.forward(part, gammas)
        logits.append(state.top.matmul(teacher.values))
        for number in layers:
            width = len(tables[number].indices)
            parts[number].append(_pad(state.activations[number].columns(slots[number], width), width))
    hidden = []
    for number in layers:
        width, most = len(tables[number].indices), max(slot.shape[1] for slot, _ in parts[number])
        columns = [F.pad(slot, (0, most - slot.shape[1]), value=width) for slot, _ in parts[number]]
        values = [F.pad(value, (0, most - value.shape[1])) for _, value in parts[number]]
        hidden.append(HiddenTargets(torch.cat(columns), torch.cat(values), width))
    return Targets(torch.cat(logits), hidden)


def _portion(net: SDMLP) -> int:
    """Inputs at a time in a pass over a task, so that memory does not grow with the width of the network."""
    return max(1, SCORES // max(len(layer.keys) for layer in net.layers))


def _pad(table: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Dense ``(B, n)`` → columns and values of its non-zero entries, padded to the most of any row."""
    most = max(1, int((table > 0).sum(1).max())) if len(table) else 1
    values, slots = table.topk(min(most, width), dim=1)
    return slots.masked_fill(values <= 0, width), values.clamp_min(0)


def count_activations(
    net: SDMLP, inputs: Tensor, labels: Tensor | None = None, classes: int = 0, batch: int | None = None
) -> list[Tensor]:
    """One counting pass: per layer, ``(r,)`` activations of each neuron, or by class ``(r, C)`` with labels."""
    gammas, batch = net.gammas, batch or _portion(net)
    totals = [
        torch.zeros(len(layer.keys), max(1, classes), dtype=torch.float64, device=inputs.device) for layer in net.layers
    ]
    for start in range(0, len(inputs), batch):
        state = net.forward(inputs[start : start + batch], gammas)
        for total, activations in zip(totals, state.activations, strict=True):
            if labels is None:
                total[:, 0] += activations.counts()
            else:
                active = (activations.to_dense() > 0).double()
                total += active.T @ F.one_hot(labels[start : start + batch], classes).double()
    return totals if labels is not None else [total[:, 0] for total in totals]
