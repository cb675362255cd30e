"""Quadratic penalties against forgetting: EWC, online EWC, SI, MAS and L2, for any learner trained by gradients.

After a task each weight gets an importance Ω and an anchor θ*; later tasks pay w · Σ_t Σ_i Ω_t,i (θ_i − θ*_t,i)².
The sum over tasks collapses exactly into three things, ΣΩ, ΣΩθ* and the number ΣΩθ*², so fifty tasks cost what
one does. Importances are exact, per sample and in closed form: a linear layer's gradient for one sample is an
outer product, so sums of its squares (EWC) or sizes (MAS) over samples are one matrix product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from ssd_edge.config import setting

# Chosen on held-out training images of CIFAR-10, for exact importances and the default schedule (docs/method.md).
DEFAULT_WEIGHT = {"ewc": 100.0, "online_ewc": 100.0, "si": 1350.0, "mas": 10.0, "l2": 30.0}
DISPLAY = {"ewc": "EWC", "online_ewc": "online EWC", "si": "SI", "mas": "MAS", "l2": "L2"}
CODE_BATCHES, CODE_BATCH, CODE_DIVISOR = 6, 512, 5 * 512  # SDMLP's code asks for 5 batches, sums 6, divides by 5


@dataclasses.dataclass(frozen=True)
class PenaltySettings:
    """Settings of the penalty; part of the settings of every learner that is trained by gradients."""

    penalty: Literal["none", "ewc", "online_ewc", "si", "mas", "l2"] = setting(
        "none", "what holds weights near their values after earlier tasks"
    )
    penalty_weight: float = setting(-1.0, "its coefficient; -1: the method's own default (docs/method.md)", minimum=-1)
    penalty_beta: float = setting(1.0, "of softmax(beta x logits) behind EWC and SI; SDMLP's code: 0.005-0.08", above=0)
    penalty_decay: float = setting(1.0, "of older importances in online EWC, per task", minimum=0.0, maximum=1.0)
    fisher: Literal["exact", "batch"] = setting(
        "exact", "exact: per sample, all classes; batch: SDMLP's code, squares of batch-summed gradients"
    )
    si_damping: float = setting(0.1, "added to squared displacements in SI", above=0.0)
    si_grad_accumulation_quirk: bool = setting(False, "SDMLP's code leaves SI's own gradient in the update")


@dataclasses.dataclass(frozen=True)
class Slot:
    """One parameter's share of a backward pass: sample i's gradient is the outer product delta[i] ⊗ source[i].

    Attributes:
        delta: ``(B, out)``, linear in the cotangent.
        source: ``(B, in)``, independent of it; None for a bias, whose gradient is delta[i].
        transposed: whether the parameter is stored as ``(in, out)``.
    """

    delta: Tensor
    source: Tensor | None
    transposed: bool = False

    def product(self, delta: Tensor, source: Tensor | None) -> Tensor:
        """Sum over samples of (delta ⊗ source), laid out as the parameter is."""
        if source is None:
            return delta.sum(0)
        return source.T @ delta if self.transposed else delta.T @ source


# inputs (B, D) -> logits (B, C), and the map from a cotangent of the logits (B, C) to a Slot per parameter
Linearise = Callable[[Tensor], tuple[Tensor, Callable[[Tensor], dict[str, Slot]]]]


class Penalty:
    """The penalty of one learner, over its named parameters.

    Args:
        settings: which, and how strong.
        device: where the parameters live.
        dtype: of the parameters.
    """

    def __init__(self, settings: PenaltySettings, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.settings, self.device, self.dtype = settings, device, dtype
        kind = settings.penalty
        self.weight = settings.penalty_weight if settings.penalty_weight >= 0 else DEFAULT_WEIGHT.get(kind, 0.0)
        self.importance: dict[str, Tensor] = {}  # ΣΩ
        self.anchored: dict[str, Tensor] = {}  # ΣΩθ*
        self.constant = torch.zeros((), dtype=torch.float64)  # ΣΩθ*²
        self.start: dict[str, Tensor] = {}  # SI: where the task began
        self.path: dict[str, Tensor] = {}  # SI: −Σ g·Δθ

    @property
    def active(self) -> bool:
        """Whether it pulls at anything: there is an anchor and a weight."""
        return bool(self.importance) and self.weight > 0

    @property
    def tracks(self) -> bool:
        """Whether `track` must be told of every step (SI)."""
        return self.settings.penalty == "si"

    def gradient(self, name: str, parameter: Tensor, rows: Tensor | None = None) -> Tensor:
        """2w(ΣΩ θ − ΣΩθ*) of a parameter, or of some of its rows.

        Args:
            name: which parameter.
            parameter: its present value, whole.
            rows: int64 ``(R,)`` on the first axis; None: all.
        """
        if not self.active:
            return torch.zeros_like(parameter if rows is None else parameter[rows])
        importance, anchored = self.importance[name], self.anchored[name]
        if rows is not None:
            importance, anchored, parameter = importance[rows], anchored[rows], parameter[rows]
        return 2 * self.weight * (importance * parameter - anchored)

    def value(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """w · Σ_t Σ Ω_t (θ − θ*_t)², summed in float64, where the collapsed terms cancel."""
        total = self.constant.clone()
        for name, importance in self.importance.items():
            theta = parameters[name].double().cpu()
            total += (theta * (importance.double().cpu() * theta - 2 * self.anchored[name].double().cpu())).sum()
        return self.weight * total

    def begin(self, parameters: Mapping[str, Tensor]) -> None:
        """Start of a task: outputs that have been added since count for nothing yet."""
        for kept in (self.importance, self.anchored):
            for name, tensor in kept.items():
                kept[name] = _grown(tensor, parameters[name])
        if self.tracks:
            self.start = {name: tensor.clone() for name, tensor in parameters.items()}
            self.path = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}

    def track(self, name: str, gradient: Tensor, change: Tensor, rows: Tensor | None = None) -> None:
        """One step of SI's path.

        Args:
            name: which parameter.
            gradient: of the batch's mean cross-entropy with softmax(β·logits), no other term.
            change: what the real update did.
            rows: which rows both are of; None: all.
        """
        if self.tracks:
            if rows is None:
                self.path[name] -= gradient * change
            else:
                self.path[name][rows] -= gradient * change

    def consolidate(
        self,
        parameters: Mapping[str, Tensor],
        inputs: Tensor,
        linearise: Linearise,
        batch: int = 512,
        generator: torch.Generator | None = None,
    ) -> None:
        """End of a task: importances from its data, and the anchor.

        Args:
            parameters: as the task left them.
            inputs: the task's, ``(N, D)``, as `linearise` takes them.
            linearise: of the learner.
            batch: inputs at a time.
            generator: draws the batches of ``fisher=batch``.
        """
        kind = self.settings.penalty
        if kind == "none":
            return
        if kind == "si":
            new = {
                name: path / ((parameters[name] - self.start[name]).square() + self.settings.si_damping)
                for name, path in self.path.items()
            }
            self.start, self.path = {}, {}
        elif kind == "l2":
            new = {name: torch.ones_like(tensor) for name, tensor in parameters.items()}
        elif kind == "mas":
            new = _mean_over(inputs, linearise, batch, _sensitivity)
        elif self.settings.fisher == "batch":
            new = self._batch_fisher(inputs, linearise, generator)
        else:
            new = _mean_over(inputs, linearise, batch, self._fisher)
        if kind == "ewc":  # one slot a task
            for name, omega in new.items():
                pulled = omega * parameters[name]
                self.importance[name] = self.importance.get(name, 0) + omega
                self.anchored[name] = self.anchored.get(name, 0) + pulled
                self.constant += (pulled.double() * parameters[name].double()).sum().cpu()
            return
        keep = {"online_ewc": self.settings.penalty_decay, "l2": 0.0}.get(kind, 1.0)
        self.constant = torch.zeros((), dtype=torch.float64)
        for name, omega in new.items():  # one slot behind the newest anchor
            omega = keep * self.importance.get(name, 0) + omega
            self.importance[name], self.anchored[name] = omega, omega * parameters[name]
            self.constant += (self.anchored[name].double() * parameters[name].double()).sum().cpu()

    def _fisher(self, logits: Tensor, pullback: Callable[[Tensor], dict[str, Slot]]) -> dict[str, Tensor]:
        """Σ over a batch of Σ_y p(y|x) (∂ log p(y|x)/∂θ)², p = softmax(β·logits)."""
        beta = self.settings.penalty_beta
        probability = (beta * logits).softmax(1)
        squares: dict[str, Tensor] = {}
        slots: dict[str, Slot] = {}
        for label in range(logits.shape[1]):
            cotangent = -beta * probability
            cotangent[:, label] += beta
            slots = pullback(cotangent)
            share = probability[:, label, None]
            for name, slot in slots.items():
                squares[name] = squares.get(name, 0) + share * slot.delta.square()
        return {
            name: slot.product(squares[name], None if slot.source is None else slot.source.square())
            for name, slot in slots.items()
        }

    def _batch_fisher(
        self, inputs: Tensor, linearise: Linearise, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """As SDMLP's code: squares of gradients that were summed over a batch, for the model's own argmax."""
        beta, total = self.settings.penalty_beta, {}
        order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
        for index in order.split(CODE_BATCH)[:CODE_BATCHES]:
            logits, pullback = linearise(inputs[index])
            cotangent = (beta * logits).softmax(1)
            cotangent[torch.arange(len(index), device=logits.device), logits.argmax(1)] -= 1
            for name, slot in pullback(beta * cotangent).items():
                total[name] = total.get(name, 0) + slot.product(slot.delta, slot.source).square() / CODE_DIVISOR
        return total

    # ── the state ────────────────────────────────────────────────────────────────────────────────────
    def schema(
        self, shapes: Mapping[str, tuple[str | int, ...]], dtype: str
    ) -> dict[str, tuple[tuple[str | int, ...], str, str]]:
        """(shape, dtype, reason) of each tensor of the state, for parameters of these shapes."""
        if self.settings.penalty == "none":
            return {}
        described = {}
        for name, shape in shapes.items():
            described[f"importance_{name}"] = (shape, dtype, "how much earlier tasks need each weight, summed")
            described[f"anchored_{name}"] = (shape, dtype, "the same times the weight's value then, summed")
        described["penalty_constant"] = ((1,), "float64", "what the two leave out of the penalty's value")
        return described

    def tensors(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `schema` lists them; zeros before the first anchor."""
        if self.settings.penalty == "none":
            return {}
        tensors = {"penalty_constant": self.constant.reshape(1)}
        for name, parameter in parameters.items():
            for prefix, kept in (("importance", self.importance), ("anchored", self.anchored)):
                known = kept.get(name)
                tensors[f"{prefix}_{name}"] = torch.zeros_like(parameter) if known is None else _grown(known, parameter)
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        self.importance, self.anchored = {}, {}
        if self.settings.penalty == "none":
            return
        self.constant = tensors["penalty_constant"][0].clone()
        for key, tensor in tensors.items():
            prefix, _, name = key.partition("_")
            if prefix in ("importance", "anchored"):
                getattr(self, prefix)[name] = tensor.to(self.device)
        if not any(bool((tensor != 0).any()) for tensor in self.importance.values()):
            self.importance, self.anchored = {}, {}  # saved before the first anchor


def _sensitivity(logits: Tensor, pullback: Callable[[Tensor], dict[str, Slot]]) -> dict[str, Tensor]:
    """Σ over a batch of |∂‖f(x)‖²/∂θ|: no label is needed."""
    return {
        name: slot.product(slot.delta.abs(), None if slot.source is None else slot.source.abs())
        for name, slot in pullback(2 * logits).items()
    }


def _mean_over(
    inputs: Tensor,
    linearise: Linearise,
    batch: int,
    summed: Callable[[Tensor, Callable[[Tensor], dict[str, Slot]]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Mean over samples of what `summed` adds up over a batch."""
    total: dict[str, Tensor] = {}
    for part in inputs.split(batch):
        for name, amount in summed(*linearise(part)).items():
            total[name] = total.get(name, 0) + amount / len(inputs)
    return total


def _grown(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the shape of another, zeros where it has nothing."""
    if tensor.shape == like.shape:
        return tensor
    grown = torch.zeros_like(like)
    grown[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return grown
