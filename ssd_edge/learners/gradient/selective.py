"""Selective distillation for any PyTorch module with Top-K layers: the losses of SSD as an ordinary autograd loss.

`TopK` is an activation function for a convolution, the hidden layer of a transformer block, or a linear layer.
`SelectiveDistillation` trains the module task after task (Eq. 1 to 6 of arXiv 2512.15267; docs/plug-in.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssd_edge.errors import InputError
from ssd_edge.learners.gradient.distillation import (
    Direction,
    HiddenLoss,
    Selection,
    TopNTable,
    cross_entropy,
    divergence,
    hidden_loss,
    parse_top_n,
    select,
)


class TopK(nn.Module):
    """Activation that lets the k strongest neurons of each position respond, by SDMLP's subtraction.

    ReLU(u − I) with u = ReLU(x) and I the (k+1)-th largest u of the position, a constant for the gradient.

    Args:
        neurons: number of neurons: size of the axis they compete along.
        k: largest number of active neurons at each position.
        dim: that axis: −1 for features, 1 for the channels of a convolution.

    Raises:
        InputError: k is not between 1 and the number of neurons.
    """

    def __init__(self, neurons: int, k: int, dim: int = -1) -> None:
        super().__init__()
        if not 1 <= k <= neurons:
            raise InputError(f"k must be between 1 and the number of neurons, but is {k} of {neurons}")
        self.neurons, self.k, self.dim = neurons, k, dim

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations, of the shape of `x`."""
        u = x.relu()
        inhibition = u.detach().topk(min(self.k + 1, self.neurons), dim=self.dim).values
        return (u - inhibition.amin(self.dim, keepdim=True)).relu()

    def rows(self, activations: Tensor) -> Tensor:
        """Return activations with one row per position, ``(positions, neurons)``."""
        return activations.movedim(self.dim, -1).reshape(-1, self.neurons)


class _ClosedForm(torch.autograd.Function):
    """A loss that is computed with its gradient."""

    @staticmethod
    def forward(ctx: Any, at: Tensor, loss: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        value, gradient = loss(at)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return slopes[0] * ctx.saved_tensors[0], None


def _loss(at: Tensor, loss: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    value: Tensor = _ClosedForm.apply(at, loss)  # type: ignore[no-untyped-call]  # PyTorch does not annotate it
    return value


class SelectiveDistillation:
    """Trains a module on one task after another with distillation from its previous self.

    Call `loss` in each step, and `end_task` after a task, before its data is gone.

    Args:
        module: maps inputs to logits ``(B, C)`` and contains `TopK` layers. Its outputs may grow between tasks.
        top_n: neurons of each layer to distil: a number, a multiple of its k (``"1.0k"``), or a fraction.
        ce_weight: α, weight of the cross-entropy against distillation.
        hidden_weight: λ, weight of the hidden against the logit distillation.
        temperature: T.
        hidden: loss on the activations; with ``mse`` the hidden term is much stronger.
        direction: direction of the divergence.
        selection: how neurons are chosen.
        generator: for random selection.

    Attributes:
        tables: neurons that are distilled, by name of the layer; empty before the first `end_task`.
        teacher: the module after the last task, or None before.

    Raises:
        InputError: the module has no `TopK` layer, or top_n gives no such number of neurons.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        top_n: str | int | float = "1.0k",
        ce_weight: float = 0.7,
        hidden_weight: float = 0.1,
        temperature: float = 8.0,
        hidden: HiddenLoss = "kl_softmax",
        direction: Direction = "teacher_student",
        selection: Selection = "frequency",
        generator: torch.Generator | None = None,
    ) -> None:
        layers = _layers(module)
        if not layers:
            raise InputError("the module has no TopK layer; use ssd_edge.learners.gradient.selective.TopK in it")
        self.module = module
        self.numbers = {name: parse_top_n(top_n, layer.k, layer.neurons) for name, layer in layers.items()}
        self.ce_weight, self.hidden_weight, self.temperature = ce_weight, hidden_weight, temperature
        self.hidden, self.direction, self.selection, self.generator = hidden, direction, selection, generator
        self.tables: dict[str, TopNTable] = {}
        self.teacher: nn.Module | None = None

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return α·cross-entropy + (1 − α)(λ·hidden + (1 − λ)·logits); in the first task, the cross-entropy.

        Args:
            inputs: inputs of the module.
            labels: int64 ``(B,)``.
        """
        with _recorded(self.module) as student:
            logits = self.module(inputs)
        entropy = _loss(logits, lambda z: cross_entropy(z, labels))
        if self.teacher is None:
            return entropy
        with torch.no_grad(), _recorded(self.teacher) as teacher:
            wanted = self.teacher(inputs)
        return (
            self.ce_weight * entropy
            + (1 - self.ce_weight)
            * (
                self.hidden_weight * self._hidden(student, teacher)
                + (1 - self.hidden_weight)
                # outputs that the teacher lacks have arrived since
                * _loss(logits[:, : wanted.shape[1]], lambda z: divergence(z, wanted, self.temperature, self.direction))
            )
        )

    def _hidden(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
        """Return the mean over layers of the loss on the activations of table neurons."""

        def one(name: str, index: Tensor) -> Tensor:
            wanted = teacher[name][:, index]
            return _loss(
                student[name][:, index],
                lambda a: hidden_loss(a, wanted, self.temperature, self.hidden, self.direction),
            )

        return torch.stack([one(name, table.indices) for name, table in self.tables.items()]).mean()

    def end_task(self, batches: Iterable[Tensor]) -> None:
        """Choose the Top-n neurons of every layer and keep a copy of the module as the next task's teacher.

        Args:
            batches: inputs of the task just learned.

        Raises:
            InputError: there are none.
        """
        teacher = copy.deepcopy(self.module).eval().requires_grad_(False)
        frequencies = activation_frequencies(teacher, batches)
        self.tables = {
            name: select(frequency, self.numbers[name], self.selection, self.generator)
            for name, frequency in frequencies.items()
        }
        self.teacher = teacher


@torch.no_grad()
def activation_frequencies(module: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return for each `TopK` layer the share of positions that activate each neuron (p of Eq. 1), ``(neurons,)``.

    Args:
        module: evaluated in its current mode.
        batches: inputs.

    Raises:
        InputError: there are none.
    """
    parts: dict[str, list[tuple[Tensor, int]]] = {}
    for batch in batches:
        with _recorded(module) as activations:
            module(batch)
        for name, rows in activations.items():
            parts.setdefault(name, []).append(((rows > 0).sum(0), len(rows)))
    if not parts:
        raise InputError("there are no inputs to count activations on; pass batches of the task just learned")
    return {
        name: torch.stack([count for count, _ in each]).sum(0) / sum(positions for _, positions in each)
        for name, each in parts.items()
    }


def _layers(module: nn.Module) -> dict[str, TopK]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, TopK)}


@contextmanager
def _recorded(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the activations of the `TopK` layers in a forward pass, by name, one row per position."""
    found: dict[str, Tensor] = {}

    def record(name: str, layer: TopK) -> Callable[[nn.Module, Sequence[Any], Tensor], None]:
        def hook(_: nn.Module, __: Sequence[Any], output: Tensor) -> None:
            found[name] = layer.rows(output)

        return hook

    handles = [layer.register_forward_hook(record(name, layer)) for name, layer in _layers(module).items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
