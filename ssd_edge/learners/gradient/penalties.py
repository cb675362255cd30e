"""Quadratic penalties against forgetting: EWC, online EWC, SI, MAS and L2.

After a task every parameter θ has an importance Ω and an anchor θ*. The penalty w·Σ_t Σ Ω_t (θ − θ*_t)² is added to the
loss of later tasks (without a factor ½, as in SDMLP's code). A sum of quadratics is a quadratic, so ΣΩ_t, ΣΩ_t θ*_t and
the number ΣΣ Ω_t θ*_t² represent it for any number of tasks. The methods differ in Ω:

- ``ewc`` (Kirkpatrick et al. 2017): diagonal of the Fisher information, one anchor per task.
- ``online_ewc`` (Schwarz et al. 2018): Ω ← decay·Ω + F, anchored at the last task only.
- ``si`` (Zenke et al. 2017, Eq. 4, 5): contribution of each parameter to the decrease of the loss, over its squared
  change. The sum is clamped at 0 as in that paper's code; a negative importance would repel a parameter.
- ``mas`` (Aljundi et al. 2018): E_x |∂‖f(x)‖²/∂θ|, without labels.
- ``l2``: Ω = 1.

The last three are anchored at the last task as well. SDMLP's code passes the gradient of the loss *summed* over a batch
to SI; here it is the gradient of the mean, so the published coefficient of 1350 corresponds to 1350 · batch size. That
code does not clamp negative sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from ssd_edge.config import setting
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.learners.base import TensorSpec

# best of a coarse grid for SDMLP with its default schedule, on held-out training images of CIFAR-10 (docs/method.md)
DEFAULT_WEIGHT = {"ewc": 10.0, "online_ewc": 10.0, "si": 0.1, "mas": 0.3, "l2": 1e-3}
DISPLAY = {"ewc": "EWC", "online_ewc": "online EWC", "si": "SI", "mas": "MAS", "l2": "L2"}
# SDMLP's code is configured for 5 batches but processes 6, and divides by 5
FISHER_BATCHES, FISHER_DIVISOR = 6, 5


@dataclasses.dataclass(frozen=True)
class PenaltySettings:
    """Settings of the penalty, shared by all learners that are trained by gradients."""

    penalty: Literal["none", "ewc", "online_ewc", "si", "mas", "l2"] = setting(
        "none", "pulls parameters that matter for earlier tasks back to their values after those tasks"
    )
    penalty_weight: float = setting(
        -1.0, "coefficient of the penalty; -1: default of the method (docs/method.md)", minimum=-1.0
    )
    penalty_beta: float = setting(
        1.0, "inverse temperature of the softmax for importances (SDMLP's code: 0.08, 0.02, 0.005)", above=0.0
    )
    penalty_decay: float = setting(1.0, "decay of old importances in online_ewc, per task", minimum=0, maximum=1)
    fisher: Literal["exact", "batch"] = setting(
        "exact", "Fisher information of ewc; batch: squared gradients of batches, as in SDMLP's code"
    )
    si_damping: float = setting(0.1, "added to the squared change in SI, as published", above=0)


@dataclasses.dataclass(frozen=True)
class Slot:
    """Per-sample gradients of one parameter: that of sample i is the outer product delta[i] ⊗ source[i].

    Attributes:
        delta: ``(B, out)``, linear in the cotangent.
        source: ``(B, in)``, independent of the cotangent; None for a bias, whose gradient is delta[i].
        transposed: True if the parameter is stored as ``(in, out)``.
    """

    delta: Tensor
    source: Tensor | None
    transposed: bool = False


# inputs (B, D) -> logits (B, C), and the map from a cotangent (B, C) of the logits to one Slot per parameter
Linearise = Callable[[Tensor], tuple[Tensor, Callable[[Tensor], dict[str, Slot]]]]


def _summed(left: Tensor, slot: Slot, source: Tensor | None) -> Tensor:
    """Return Σ_i left[i] ⊗ source[i] in the shape of the slot's parameter."""
    if source is None:
        return left.sum(0)
    return source.T @ left if slot.transposed else left.T @ source


def exact_fisher(inputs: Tensor, linearise: Linearise, beta: float, batch: int) -> dict[str, Tensor]:
    """Compute the diagonal of the Fisher information: E_x Σ_y p(y|x) (∂ log p(y|x)/∂θ)², p = softmax(β·logits).

    The square of an outer product is the outer product of squares, so per-sample gradients are never built: one
    backward pass per class gives Σ_y p_y δ_y², and one product with the squared sources gives the sum.

    Args:
        inputs: inputs of the task, ``(N, D)``.
        linearise: network.
        beta: inverse temperature.
        batch: samples at a time; affects memory, not the result.

    Returns:
        One tensor per parameter, of its shape.
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
    """Compute the Fisher information as SDMLP's code does, for use with its published coefficients.

    The loss −log softmax(β·logits)[ŷ], with ŷ the prediction of the network, is *summed* over a batch; its gradient is
    squared, summed over at most 6 shuffled batches, and divided by 5 · batch. Gradients of different samples cancel
    before they are squared.

    Args:
        inputs: inputs of the task, ``(N, D)``.
        linearise: network.
        beta: inverse temperature.
        batch: samples per batch; affects the result (512 in SDMLP's code).
        generator: random numbers for the shuffling.
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
    """Compute the importances of MAS: E_x |∂‖f(x)‖²/∂θ| with f the logits, per sample (|δ ⊗ s| = |δ| ⊗ |s|).

    Args:
        inputs: inputs of the task, ``(N, D)``.
        linearise: network.
        batch: samples at a time; affects memory, not the result.
    """
    totals: dict[str, Tensor] = {}
    for part in torch.split(inputs, batch):
        logits, pullback = linearise(part)
        for name, slot in pullback(2 * logits).items():
            source = None if slot.source is None else slot.source.abs()
            totals[name] = totals.get(name, 0.0) + _summed(slot.delta.abs(), slot, source)
    return {name: total / len(inputs) for name, total in totals.items()}


def _padded(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Return the tensor padded with zeros to a shape; the tensor itself if it has that shape."""
    if tensor.shape == shape:
        return tensor
    wider = tensor.new_zeros(shape)
    wider[tuple(slice(size) for size in tensor.shape)] = tensor
    return wider


class Penalty:
    """Importances and anchors of all tasks so far.

    A learner calls `begin` before the first step of a task, adds `gradient` to the gradient of every step, calls
    `track` after each step if `tracks`, and `consolidate` at the end of the task.

    Args:
        settings: the penalty; a learner's settings may inherit from `PenaltySettings`.
        device: device of the parameters.
        dtype: dtype of importances and anchors.

    Raises:
        InputError: the weight is negative and not -1.
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
        self.path: dict[str, Tensor] = {}  # SI: decrease of the loss along the path of each parameter in this task
        self._has_importance = False

    @property
    def active(self) -> bool:
        """True if the penalty has a gradient: an anchor with nonzero importance, and a weight above 0."""
        return self._has_importance and self.weight > 0

    @property
    def tracks(self) -> bool:
        """True if the learner must call `track` after each step."""
        return self.settings.penalty == "si"

    def gradient(self, name: str, parameter: Tensor, rows: Tensor | None = None) -> Tensor:
        """Compute ∂penalty/∂parameter = 2·w·(ΣΩ θ − ΣΩθ*).

        Args:
            name: name of the parameter.
            parameter: the whole parameter, at least as large as in the last call of `begin` or `consolidate`.
            rows: int64 ``(R,)``, rows (first axis) to return; None: all.

        Returns:
            The gradient in the shape of the parameter or of its rows; zeros if the penalty is not active.
        """
        theta = parameter.detach() if rows is None else parameter.detach()[rows]
        if not self.active:
            return torch.zeros_like(theta)
        importance, anchored = (_padded(part[name], parameter.shape) for part in (self.importance, self.anchored))
        if rows is not None:
            importance, anchored = importance[rows], anchored[rows]
        return 2 * self.weight * (importance * theta - anchored)

    def value(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute w·Σ_t Σ Ω_t (θ − θ*_t)² in float64, because its three parts nearly cancel near an anchor."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        if not self.active:
            return total
        for name, parameter in parameters.items():
            theta = parameter.detach().double()
            importance, anchored = (
                _padded(part[name], parameter.shape).double() for part in (self.importance, self.anchored)
            )
            total += (theta * (importance * theta - 2 * anchored)).sum()
        return self.weight * (total + self.constant).clamp_min(0)  # rounding may make it negative

    def begin(self, parameters: Mapping[str, Tensor]) -> None:
        """Start a task; new rows and columns of parameters that have grown get zero importance."""
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
        """Add −gradient·change of one step to the path integral of SI; do nothing for other penalties.

        Args:
            name: name of the parameter.
            gradient: gradient of the batch's mean cross-entropy with softmax(β·logits), without the penalty.
            change: the parameter after the step minus before.
            rows: int64 ``(R,)``, rows that `gradient` and `change` consist of; the others did not move. None: all.
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
        """End a task: add its importances and anchor the parameters.

        Args:
            parameters: their current values.
            inputs: prepared inputs of the task, ``(N, D)``.
            linearise: network.
            batch: samples at a time.
            generator: random numbers for the batches of ``fisher=batch``.
        """
        kind = self.settings.penalty
        if kind == "none":
            return
        fresh = self._task_importance(parameters, inputs, linearise, batch, generator)
        decay = self.settings.penalty_decay if kind == "online_ewc" else 1.0
        only_last = kind != "ewc"
        if only_last:
            self.constant = 0.0
        for name, parameter in parameters.items():
            new = fresh[name].to(self.dtype)
            old = self.importance.get(name, torch.zeros_like(new))
            total = new if kind == "l2" else decay * _padded(old, new.shape) + new
            if kind == "si":
                total = total.clamp_min(0)
            self.importance[name] = total
            weight = total if only_last else new
            anchored = weight * parameter
            if not only_last:
                anchored += _padded(self.anchored.get(name, torch.zeros_like(new)), new.shape)
            self.anchored[name] = anchored
            self.constant += float((weight.double() * parameter.double().square()).sum())
        self.start, self.path = {}, {}
        self._update_active()

    def _task_importance(
        self,
        parameters: Mapping[str, Tensor],
        inputs: Tensor,
        linearise: Linearise,
        batch: int,
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        """Return Ω of the task that ends, in the shapes of the parameters."""
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

    def _update_active(self) -> None:
        """Set whether any importance is nonzero, so that a restored penalty is as active as the saved one."""
        self._has_importance = any(bool(part.any()) for part in self.importance.values())

    def schema(self, shapes: Mapping[str, tuple[str | int, ...]], dtype: str) -> dict[str, TensorSpec]:
        """Return the specification of every tensor of the state; nothing without a penalty.

        Args:
            shapes: shapes of the parameters, by name.
            dtype: name of the dtype of importances and anchors.
        """
        if self.settings.penalty == "none":
            return {}
        described: dict[str, TensorSpec] = {}
        for name, shape in shapes.items():
            described[f"importance_{name}"] = TensorSpec(
                shape, dtype, f"importance of {name} for earlier tasks, summed over tasks", least=0
            )
            described[f"anchored_{name}"] = TensorSpec(
                shape, dtype, f"importance times {name} after each task, summed over tasks"
            )
        constant = TensorSpec((1,), "float64", "value of the penalty at zero, to report the penalty")
        return {**described, "penalty_constant": constant}

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Check that only parameters with importance have an anchor.

        Args:
            state: tensors that match `schema`, among others.

        Raises:
            BundleRefusedError: another one has.
        """
        for name, importance in state.items():
            if name.startswith("importance_"):
                parameter = name.removeprefix("importance_")
                if bool(state[f"anchored_{parameter}"][importance == 0].any()):
                    raise BundleRefusedError(
                        f"values of '{parameter}' have an anchor, but no importance; restore the file"
                    )

    def tensors(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of `schema`, in the shapes of the parameters; zeros without an anchor."""
        if self.settings.penalty == "none":
            return {}
        tensors = {}
        for name, parameter in parameters.items():
            empty = torch.zeros(parameter.shape, dtype=self.dtype, device=self.device)
            tensors[f"importance_{name}"] = _padded(self.importance.get(name, empty), parameter.shape)
            tensors[f"anchored_{name}"] = _padded(self.anchored.get(name, empty), parameter.shape)
        return {**tensors, "penalty_constant": torch.tensor([self.constant], dtype=torch.float64)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state that `tensors` returned; other tensors are ignored."""
        if self.settings.penalty == "none":
            return
        for prefix, parts in (("importance_", self.importance), ("anchored_", self.anchored)):
            parts.clear()
            for name, tensor in tensors.items():
                if name.startswith(prefix):
                    parts[name.removeprefix(prefix)] = tensor.to(self.device, self.dtype)
        self.constant = float(tensors["penalty_constant"][0])
        self._update_active()
