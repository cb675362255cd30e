"""Quadratic penalties against forgetting: EWC, online EWC, SI, MAS and L2.

After a task every parameter θ has an importance Ω and an anchor θ*; while later tasks are learned, their loss
is raised by w·Σ_t Σ Ω_t (θ − θ*_t)² (no factor ½, as in SDMLP's code). A sum of quadratics is one quadratic:
ΣΩ_t, ΣΩ_t θ*_t and the number ΣΣ Ω_t θ*_t² say everything, whatever the number of tasks. The methods differ in Ω:

- ``ewc`` (Kirkpatrick et al. 2017): diagonal of the Fisher information, one anchor per task.
- ``online_ewc`` (Schwarz et al. 2018): Ω ← decay·Ω + F, anchored at the last task alone.
- ``si`` (Zenke et al. 2017, eq. 4, 5): share of each parameter in the fall of the loss, over its squared way; the
  sum is kept at 0 or above, as in that paper's code: a negative one would push a parameter away without end.
- ``mas`` (Aljundi et al. 2018): E_x |∂‖f(x)‖²/∂θ|, without labels.
- ``l2``: Ω = 1.

The last three are anchored at the last task too. SDMLP's code feeds SI the gradient of the loss *summed* over a
batch; here it is that of the mean, so its published coefficient, 1350, is a weight of 1350 · batch size here. It also
leaves negative sums as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from ssd_edge.config import setting
from ssd_edge.errors import InputError

# Best of a coarse grid for SDMLP with its default schedule, on held-out training images of CIFAR-10 (docs/method.md)
DEFAULT_WEIGHT = {"ewc": 10.0, "online_ewc": 10.0, "si": 0.1, "mas": 0.3, "l2": 1e-3}
DISPLAY = {"ewc": "EWC", "online_ewc": "online EWC", "si": "SI", "mas": "MAS", "l2": "L2"}
# SDMLP's code is told to use 5 batches; its test for the end lets a sixth through, its mean is over 5
FISHER_BATCHES, FISHER_DIVISOR = 6, 5


@dataclasses.dataclass(frozen=True)
class PenaltySettings:
    """Settings of the penalty, for every learner that is trained by gradients."""

    penalty: Literal["none", "ewc", "online_ewc", "si", "mas", "l2"] = setting(
        "none", "pulls parameters that earlier tasks need back to where those left them"
    )
    penalty_weight: float = setting(
        -1.0, "coefficient of the penalty; -1: the default of the method (docs/method.md)", minimum=-1.0
    )
    penalty_beta: float = setting(
        1.0, "inverse temperature of the softmax behind an importance (SDMLP's code: 0.08, 0.02, 0.005)", above=0.0
    )
    penalty_decay: float = setting(1.0, "of old importance in online_ewc, per task", minimum=0, maximum=1)
    fisher: Literal["exact", "batch"] = setting(
        "exact", "of ewc; batch as SDMLP's code: the squared gradient of a batch, not of a sample"
    )
    si_damping: float = setting(0.1, "added to SI's squared way; as published", above=0)


@dataclasses.dataclass(frozen=True)
class Slot:
    """One parameter's share of a backward pass: the gradient of sample i is the outer product delta[i] ⊗ source[i].

    Attributes:
        delta: ``(B, out)``, linear in the cotangent.
        source: ``(B, in)``, independent of it; None for a bias, whose gradient is delta[i].
        transposed: the parameter is stored as ``(in, out)``.
    """

    delta: Tensor
    source: Tensor | None
    transposed: bool = False


# inputs (B, D) -> logits (B, C), and the map from a cotangent (B, C) of the logits to one Slot per parameter
Linearise = Callable[[Tensor], tuple[Tensor, Callable[[Tensor], dict[str, Slot]]]]


def _summed(left: Tensor, slot: Slot, source: Tensor | None) -> Tensor:
    """Σ_i left[i] ⊗ source[i] in the shape of the slot's parameter."""
    if source is None:
        return left.sum(0)
    return source.T @ left if slot.transposed else left.T @ source


def exact_fisher(inputs: Tensor, linearise: Linearise, beta: float, batch: int) -> dict[str, Tensor]:
    """Diagonal of the Fisher information: E_x Σ_y p(y|x) (∂ log p(y|x)/∂θ)², p = softmax(β·logits).

    The square of an outer product is the outer product of squares, so no gradient of a sample is ever built:
    one backward pass per class gives Σ_y p_y δ_y², and one product with the squared sources gives the sum.

    Args:
        inputs: of the task, ``(N, D)``.
        linearise: the network.
        beta: inverse temperature.
        batch: samples at a time; changes memory, not the result.

    Returns:
        By parameter, in its shape.
    """
    totals: dict[str, Tensor] = {}
    for part in torch.split(inputs, batch):
        logits, pullback = linearise(part)
        probability = (beta * logits).softmax(1)
        slots: dict[str, Slot] = {}
        squares: dict[str, Tensor] = {}
        for label in range(logits.shape[1]):
            cotangent = -beta * probability  # ∂ log p(label|x)/∂logits
            cotangent[:, label] += beta
            # δ is linear in the cotangent, so √p in it is p in the square
            slots = pullback(probability[:, label, None].sqrt() * cotangent)
            for name, slot in slots.items():
                if name not in squares:
                    squares[name] = torch.zeros_like(slot.delta)
                squares[name].addcmul_(slot.delta, slot.delta)
        for name, slot in slots.items():
            source = None if slot.source is None else slot.source.square()
            totals[name] = totals.get(name, 0.0) + _summed(squares[name], slot, source)
    return {name: total / len(inputs) for name, total in totals.items()}


def batch_fisher(
    inputs: Tensor, linearise: Linearise, beta: float, batch: int, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """What SDMLP's code takes for the Fisher information; kept for its published coefficients.

    −log softmax(β·logits)[ŷ] with ŷ the network's own answer, *summed* over a batch; its gradient squared; summed
    over up to 6 shuffled batches; divided by 5 · batch. Gradients of different samples cancel before the square.

    Args:
        inputs: of the task, ``(N, D)``.
        linearise: the network.
        beta: inverse temperature.
        batch: samples of a batch; part of the definition here (512).
        generator: of the shuffling.
    """
    totals: dict[str, Tensor] = {}
    order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
    for index in torch.split(order, batch)[:FISHER_BATCHES]:
        logits, pullback = linearise(inputs[index])
        cotangent = beta * (beta * logits).softmax(1)
        cotangent[torch.arange(len(index), device=logits.device), logits.argmax(1)] -= beta
        for name, slot in pullback(cotangent).items():
            gradient = _summed(slot.delta, slot, slot.source)
            totals[name] = totals.get(name, 0.0) + gradient.square() / (FISHER_DIVISOR * batch)
    return totals


def sensitivity(inputs: Tensor, linearise: Linearise, batch: int) -> dict[str, Tensor]:
    """MAS: E_x |∂‖f(x)‖²/∂θ| with f the logits, per sample (|δ ⊗ s| = |δ| ⊗ |s|).

    Args:
        inputs: of the task, ``(N, D)``.
        linearise: the network.
        batch: samples at a time; changes memory, not the result.
    """
    totals: dict[str, Tensor] = {}
    for part in torch.split(inputs, batch):
        logits, pullback = linearise(part)
        for name, slot in pullback(2 * logits).items():
            source = None if slot.source is None else slot.source.abs()
            totals[name] = totals.get(name, 0.0) + _summed(slot.delta.abs(), slot, source)
    return {name: total / len(inputs) for name, total in totals.items()}


def _padded(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Zeros of this shape with the tensor in the corner; the tensor itself where nothing is missing."""
    if tensor.shape == shape:
        return tensor
    wider = tensor.new_zeros(shape)
    wider[tuple(slice(size) for size in tensor.shape)] = tensor
    return wider


class Penalty:
    """Importances and anchors of all tasks so far.

    A learner calls `begin` before a task's first step, adds `gradient` to the gradient of every step, calls
    `track` after each step if `tracks`, and `consolidate` when the task is learned.

    Args:
        settings: which penalty; also a learner's settings that inherit from `PenaltySettings`.
        device: where the parameters live.
        dtype: of importances and anchors.

    Raises:
        InputError: a negative weight other than -1.
    """

    def __init__(
        self, settings: PenaltySettings, device: str | torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        if -1 < settings.penalty_weight < 0:
            raise InputError(
                "learner.penalty_weight must be at least 0, or -1 for the method's default, "
                f"but is {settings.penalty_weight:g}"
            )
        self.settings, self.device, self.dtype = settings, torch.device(device), dtype
        given = settings.penalty_weight >= 0
        self.weight = settings.penalty_weight if given else DEFAULT_WEIGHT.get(settings.penalty, 0.0)
        self.importance: dict[str, Tensor] = {}  # ΣΩ
        self.anchored: dict[str, Tensor] = {}  # ΣΩθ*
        self.constant = 0.0  # ΣΣΩθ*²
        self.start: dict[str, Tensor] = {}  # SI: parameters at the start of the task
        self.path: dict[str, Tensor] = {}  # SI: fall of the loss along each parameter's way in this task
        self._pulls = False

    @property
    def active(self) -> bool:
        """Whether something is held: an anchor with some importance, and a weight above 0."""
        return self._pulls and self.weight > 0

    @property
    def tracks(self) -> bool:
        """Whether the learner must call `track` after each step."""
        return self.settings.penalty == "si"

    def gradient(self, name: str, parameter: Tensor, rows: Tensor | None = None) -> Tensor:
        """∂penalty/∂parameter = 2·w·(ΣΩ θ − ΣΩθ*).

        Args:
            name: of the parameter.
            parameter: whole, at least as large as when `begin` or `consolidate` last saw it.
            rows: int64 ``(R,)``; only these (first axis).

        Returns:
            In the shape of the parameter, or of its rows; zeros if nothing is held.
        """
        theta = parameter.detach() if rows is None else parameter.detach()[rows]
        if not self.active:
            return torch.zeros_like(theta)
        importance, anchored = (_padded(part[name], parameter.shape) for part in (self.importance, self.anchored))
        if rows is not None:
            importance, anchored = importance[rows], anchored[rows]
        return 2 * self.weight * (importance * theta - anchored)

    def value(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """w·Σ_t Σ Ω_t (θ − θ*_t)², a float64 number; its three parts nearly cancel near an anchor."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        if not self.active:
            return total
        for name, parameter in parameters.items():
            theta = parameter.detach().double()
            importance, anchored = (
                _padded(part[name], parameter.shape).double() for part in (self.importance, self.anchored)
            )
            total += (theta * (importance * theta - 2 * anchored)).sum()
        return self.weight * (total + self.constant).clamp_min(0)  # rounding may leave less than nothing

    def begin(self, parameters: Mapping[str, Tensor]) -> None:
        """Start of a task: parameters that have grown since get no importance where they are new."""
        if self.settings.penalty == "none":
            return
        for name, parameter in parameters.items():
            empty = torch.zeros(parameter.shape, dtype=self.dtype, device=self.device)
            self.importance[name] = _padded(self.importance.get(name, empty), parameter.shape)
            self.anchored[name] = _padded(self.anchored.get(name, empty), parameter.shape)
            if self.tracks:
                self.start[name] = parameter.detach().clone()
                self.path[name] = empty.clone()

    def track(self, name: str, gradient: Tensor, change: Tensor, rows: Tensor | None = None) -> None:
        """After a step: SI's path integral, −gradient·change; nothing for other penalties.

        Args:
            name: of the parameter.
            gradient: of the mean cross-entropy of the batch with softmax(β·logits), without any penalty.
            change: the parameter after the step minus before.
            rows: int64 ``(R,)``: both are of these rows alone, the others did not move.
        """
        if not self.tracks:
            return
        if rows is None:
            self.path[name] -= gradient * change
        else:
            self.path[name][rows] -= gradient * change

    @torch.no_grad()
    def consolidate(
        self,
        parameters: Mapping[str, Tensor],
        inputs: Tensor,
        linearise: Linearise,
        batch: int = 512,
        generator: torch.Generator | None = None,
    ) -> None:
        """End of a task: add its importances, and anchor.

        Args:
            parameters: as they are now.
            inputs: the task's, as the network takes them, ``(N, D)``.
            linearise: the network.
            batch: samples at a time.
            generator: shuffles the batches of ``fisher=batch``.
        """
        kind = self.settings.penalty
        if kind == "none":
            return
        fresh = self._task_importance(parameters, inputs, linearise, batch, generator)
        decay = self.settings.penalty_decay if kind == "online_ewc" else 1.0
        last_alone = kind != "ewc"
        if last_alone:
            self.constant = 0.0
        for name, parameter in parameters.items():
            new = fresh[name].to(self.dtype)
            old = self.importance.get(name, torch.zeros_like(new))
            total = new if kind == "l2" else decay * _padded(old, new.shape) + new
            if kind == "si":
                total = total.clamp_min(0)
            self.importance[name] = total
            held = total if last_alone else new
            anchored = held * parameter
            if not last_alone:
                anchored += _padded(self.anchored.get(name, torch.zeros_like(new)), new.shape)
            self.anchored[name] = anchored
            self.constant += float((held.double() * parameter.double().square()).sum())
        self.start, self.path = {}, {}
        self._look()

    def _task_importance(
        self,
        parameters: Mapping[str, Tensor],
        inputs: Tensor,
        linearise: Linearise,
        batch: int,
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        """Ω of the task that ends, in the shapes of the parameters."""
        settings = self.settings
        if settings.penalty == "l2":
            return {name: torch.ones_like(parameter) for name, parameter in parameters.items()}
        if settings.penalty == "si":
            return {
                name: self.path[name] / ((parameter - self.start[name]).square() + settings.si_damping)
                for name, parameter in parameters.items()
            }
        if settings.penalty == "mas":
            return sensitivity(inputs, linearise, batch)
        if settings.fisher == "exact":
            return exact_fisher(inputs, linearise, settings.penalty_beta, batch)
        return batch_fisher(inputs, linearise, settings.penalty_beta, batch, generator)

    def _look(self) -> None:
        """Note whether anything has importance, so that a restored penalty is as active as the one saved."""
        self._pulls = any(bool(part.any()) for part in self.importance.values())

    def schema(
        self, shapes: Mapping[str, tuple[str | int, ...]], dtype: str
    ) -> dict[str, tuple[tuple[str | int, ...], str, str]]:
        """(shape, dtype, reason) of every tensor that must persist; none without a penalty.

        Args:
            shapes: of the parameters, by name.
            dtype: name of the number type of importances and anchors.
        """
        if self.settings.penalty == "none":
            return {}
        described: dict[str, tuple[tuple[str | int, ...], str, str]] = {}
        for name, shape in shapes.items():
            described[f"importance_{name}"] = (shape, dtype, f"what earlier tasks need of {name}, summed over tasks")
            described[f"anchored_{name}"] = (shape, dtype, f"importance times where each task left {name}, summed")
        return {**described, "penalty_constant": ((1,), "float64", "the penalty's value at zero, for its report")}

    def tensors(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of `schema`, in the shapes of the parameters; zeros where there is no anchor."""
        if self.settings.penalty == "none":
            return {}
        tensors = {}
        for name, parameter in parameters.items():
            empty = torch.zeros(parameter.shape, dtype=self.dtype, device=self.device)
            tensors[f"importance_{name}"] = _padded(self.importance.get(name, empty), parameter.shape)
            tensors[f"anchored_{name}"] = _padded(self.anchored.get(name, empty), parameter.shape)
        return {**tensors, "penalty_constant": torch.tensor([self.constant], dtype=torch.float64)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave."""
        if self.settings.penalty == "none":
            return
        for prefix, parts in (("importance_", self.importance), ("anchored_", self.anchored)):
            parts.clear()
            for name, tensor in tensors.items():
                if name.startswith(prefix):
                    parts[name.removeprefix(prefix)] = tensor.to(self.device, self.dtype)
        self.constant = float(tensors["penalty_constant"][0])
        self._look()
