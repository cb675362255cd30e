"""Selective subnetwork distillation (SSD, arXiv 2512.15267): neuron selection, Top-n table, losses, teacher targets.

While a new task is learned, the student is trained to match the outputs of its previous self *on the new data*: the
activations of the Top-n neurons, those most frequently active in the last task (Eq. 2), and the logits (Eq. 3). Eq. 6
weighs them: α·CE + (1 − α)·(λ·hidden + (1 − λ)·logits). Every loss comes with its gradient in closed form. All are
means over the batch of sums over entries; the divergences have the factor T² that makes gradients comparable across
temperatures.
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

SCORES = 2**20  # scores in memory at a time in passes over a task: 4 MiB


@dataclasses.dataclass(frozen=True)
class TopNTable:
    """The neurons whose activations are distilled.

    Attributes:
        indices: int64 ``(n,)``, in order of selection (most frequent first).
        frequencies: float32 ``(n,)``, share of the last task's samples that activate each neuron.
    """

    indices: Tensor
    frequencies: Tensor

    def slots(self, neurons: int) -> Tensor:
        """Return the table column of each neuron, or -1, int64 ``(r,)``."""
        slot = torch.full((neurons,), -1, dtype=torch.int64, device=self.indices.device)
        slot[self.indices] = torch.arange(len(self.indices), device=self.indices.device)
        return slot


def parse_top_n(value: str | int | float, k: int, neurons: int) -> int:
    """Parse ``top_n``: a whole number, a multiple of k such as ``"1.0k"``, or a fraction of r below 1.

    Raises:
        InputError: the value has none of these forms, or the number is not between 1 and r.
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
        n: number of neurons to choose.
        rule: by frequency as in Algorithm 1, at random, or all.
        generator: required for ``random``.
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
    """Compute the mean cross-entropy over all outputs.

    Returns:
        Loss and ∂loss/∂logits ``(B, C)``.
    """
    log_probability = logits.log_softmax(1)
    picked = log_probability.gather(1, labels[:, None])
    gradient = log_probability.exp()
    gradient.scatter_add_(1, labels[:, None], torch.full_like(picked, -1.0))
    return -picked.mean(), gradient / len(labels)


def divergence(
    student: Tensor, teacher: Tensor, temperature: float, direction: Direction = "teacher_student"
) -> tuple[Tensor, Tensor]:
    """Compute T² · KL between softmax(teacher/T) and softmax(student/T) over the last axis (Eq. 2, 3).

    Args:
        student: ``(B, m)``.
        teacher: ``(B, m)``.
        temperature: T.
        direction: ``teacher_student`` is KL(teacher ‖ student), the common practice; Eq. 2-3 print the other.

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
    """Compute the loss on the activations of the Top-n neurons.

    ``kl_softmax`` is Eq. 2. Activations after Top-K are so small that its softmax is almost flat and its gradient close
    to zero; ``mse`` is a stronger term.

    Args:
        student: ``(B, n)``.
        teacher: ``(B, n)``.
        temperature: T.
        kind: kind of the loss.
        direction: direction of the divergence; not used by ``mse``.

    Returns:
        Loss and ∂loss/∂student ``(B, n)``.
    """
    if kind == "kl_softmax":
        return divergence(student, teacher, temperature, direction)
    batch = max(1, len(student))
    difference = student - teacher
    scale = 1.0 / batch
    return difference.square().sum() * scale, 2 * difference * scale


@dataclasses.dataclass(frozen=True)
class HiddenTargets:
    """The teacher's activations of one layer's table neurons on the new task's data, stored sparse.

    Attributes:
        slots: int64 ``(N, m)``, table columns of the active table neurons, padded with n.
        activations: ``(N, m)``, padded with 0; m is the largest number of any sample.
        width: n.
    """

    slots: Tensor
    activations: Tensor
    width: int

    def table(self, index: Tensor) -> Tensor:
        """Return the activations ``(B, n)`` of some samples."""
        table = self.activations.new_zeros(len(index), self.width + 1)
        table.scatter_(1, self.slots[index], self.activations[index])
        return table[:, : self.width]


@dataclasses.dataclass(frozen=True)
class Targets:
    """Outputs of the teacher on the new task's data, computed once per task; row i is sample i of the task.

    Attributes:
        logits: ``(N, C)``.
        hidden: activations of table neurons, per hidden layer.
    """

    logits: Tensor
    hidden: list[HiddenTargets]


def teacher_targets(
    teacher: SDMLP,
    inputs: Tensor,
    tables: Sequence[TopNTable],
    batch: int | None = None,
) -> Targets:
    """Run the teacher once over the inputs of the new task; its counters do not change.

    Args:
        teacher: the previous self of the student.
        inputs: prepared, ``(N, D)``.
        tables: per hidden layer, the neurons to record.
        batch: inputs at a time; None: as many as have `SCORES` scores.
    """
    gammas, layers = teacher.gammas, range(len(teacher.layers))
    slots = [table.slots(len(layer.keys)) for table, layer in zip(tables, teacher.layers, strict=True)]
    logits: list[Tensor] = []
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
    for part in torch.split(inputs, batch or _batch_size(teacher)):
        state = teacher.forward(part, gammas)
        logits.append(state.top.matmul(teacher.values))
        for number in layers:
            width = len(tables[number].indices)
            parts[number].append(_compressed(state.activations[number].columns(slots[number], width), width))
    hidden = []
    for number in layers:
        width, most = len(tables[number].indices), max(slot.shape[1] for slot, _ in parts[number])
        columns = [F.pad(slot, (0, most - slot.shape[1]), value=width) for slot, _ in parts[number]]
        values = [F.pad(value, (0, most - value.shape[1])) for _, value in parts[number]]
        hidden.append(HiddenTargets(torch.cat(columns), torch.cat(values), width))
    return Targets(torch.cat(logits), hidden)


def _batch_size(net: SDMLP) -> int:
    """Return a batch size with which memory does not grow with the width of the network."""
    return max(1, SCORES // max(len(layer.keys) for layer in net.layers))


def _compressed(table: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return columns and values of the positive entries of ``(B, n)``, padded to the largest number of any row."""
    most = max(1, int((table > 0).sum(1).max())) if len(table) else 1
    values, slots = table.topk(min(most, width), dim=1)
    return slots.masked_fill(values <= 0, width), values.clamp_min(0)


def count_activations(
    net: SDMLP, inputs: Tensor, labels: Tensor | None = None, classes: int = 0, batch: int | None = None
) -> list[Tensor]:
    """Count the activations of each neuron in one pass over some inputs.

    Args:
        net: network; its counters do not change.
        inputs: prepared, ``(N, D)``.
        labels: int64 ``(N,)``; None: do not count by class.
        classes: C, with labels.
        batch: inputs at a time; None: as many as have `SCORES` scores.

    Returns:
        Per layer, float64 ``(r,)``, or ``(r, C)`` by class with labels.
    """
    gammas, batch = net.gammas, batch or _batch_size(net)
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
