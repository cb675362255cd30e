"""SDMLP: a network of hidden layers whose keys compete (Bricken et al., "Sparse Distributed Memory is a
Continual Learner", 2023; facts and quirks of the reference code are in docs/method.md).

x = ReLU(z − s)/‖·‖ → scores W1 x → Top-K inhibition → logits W2ᵀ a. No biases; all weights are
non-negative, keys have unit length. With more than one hidden layer (SDMLP and SSD are published with one)
each further layer treats the activations below it, brought to unit length, as its x.

The gradient of a cross-entropy-like loss reaches only the rows of neurons that were active in the batch, so a
step computes, clips, updates and constrains only those: for plain SGD this is exact, because every other row
has a zero gradient and already obeys the constraints.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ssd_edge.learners.gradient.topk import Activations, gaba, inhibit

Inhibition = Literal["gaba", "subtract", "mask"]


def prepare(embeddings: Tensor, shift: float | None) -> Tensor:
    """The network's input step: ReLU(z − s), then L2 per row. A zero row stays zero.

    Args:
        embeddings: standardised, ``(N, D)``.
        shift: s; None: the embedding stays signed and is only brought to unit length.
    """
    if shift is None:
        return unit_rows(embeddings)
    x = (embeddings - shift).clamp_min_(0)  # a task may be large: one copy of it is enough
    return x.div_(x.norm(dim=1, keepdim=True).clamp_min(1e-12))


def respond(cosines: Tensor, gain: float) -> Tensor:
    """exp(γ cos): how strongly each neuron answers, ``(N, r)``; nothing inhibits.

    The exponential of the cosine is what addressing in a sparse distributed memory comes to when many hard
    locations lie around each key (Bricken & Pehlevan 2021), and smooth, as its read-out here needs.

    Args:
        cosines: of inputs and keys, ``(N, r)``.
        gain: γ.
    """
    return (gain * cosines).exp()


def initial_rows(rows: int, columns: int, fan_in: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Uniform in ±1/√fan_in (the default of a linear layer), clamped at zero: about half the weights are 0."""
    bound = 1.0 / math.sqrt(fan_in)
    drawn = torch.rand(rows, columns, generator=generator, dtype=torch.float64) * 2 - 1
    return (drawn * bound).clamp_min(0).to(dtype)


def unit_rows(matrix: Tensor) -> Tensor:
    """Rows divided by their L2 norm; a zero row stays zero (a dead key)."""
    return matrix / matrix.norm(dim=1, keepdim=True).clamp_min(1e-12)


@dataclasses.dataclass
class Layer:
    """One hidden layer.

    Attributes:
        keys: ``(r, inputs)``, non-negative unit rows.
        counters: ``(r,)``, times that each neuron was active in training.
    """

    keys: Tensor
    counters: Tensor


@dataclasses.dataclass(frozen=True)
class Pass:
    """What a forward pass leaves behind for the backward pass; one entry per hidden layer, bottom first.

    Attributes:
        inputs: ``(B, inputs)`` of each layer, rows of unit length.
        norms: ``(B, 1)``, length of each layer's input before it was brought to 1; None for the first.
        activations: of each layer.
    """

    inputs: list[Tensor]
    norms: list[Tensor | None]
    activations: list[Activations]

    @property
    def top(self) -> Activations:
        """Activations that the logits are read from."""
        return self.activations[-1]


@dataclasses.dataclass
class Gradients:
    """Gradients of the rows that a batch reaches.

    Attributes:
        rows: per layer, int64 ``(R,)``, which neurons.
        keys: per layer, ``(R, inputs)``.
        values: ``(R, C)`` for the rows of the top layer.
    """

    rows: list[Tensor]
    keys: list[Tensor]
    values: Tensor

    def norm(self) -> float:
        """Global L2 norm."""
        return math.sqrt(sum(float(part.square().sum()) for part in (*self.keys, self.values)))

    def widened(self, wider: Sequence[Tensor]) -> Gradients:
        """The same with zeros for further rows.

        Args:
            wider: per layer, bool ``(r,)``: further rows to have.
        """
        rows, keys, values = [], [], self.values
        for layer, (mine, more) in enumerate(zip(self.rows, wider, strict=True)):
            mask = more.clone()
            mask[mine] = True
            all_rows = mask.nonzero().flatten()
            place = torch.searchsorted(all_rows, mine)
            rows.append(all_rows)
            keys.append(_placed(self.keys[layer], place, len(all_rows)))
            if layer == len(self.rows) - 1:
                values = _placed(self.values, place, len(all_rows))
        return Gradients(rows, keys, values)


def _placed(part: Tensor, place: Tensor, rows: int) -> Tensor:
    whole = part.new_zeros(rows, part.shape[1])
    whole[place] = part
    return whole


class SDMLP:
    """The network and its touched-row update. Plain tensors: gradients are closed-form.

    Attributes:
        layers: hidden layers, bottom first.
        values: W2, ``(r, C)``, non-negative.
        k: neurons that stay active in each layer.
        switch: C of the GABA switch.
        inhibition: ``gaba`` (subtraction behind a switch), ``subtract`` (switch closed from the start), ``mask``.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        values: Tensor,
        k: int,
        switch: float,
        inhibition: Inhibition = "gaba",
    ) -> None:
        # counters are counted on in place; keys and values are new tensors already
        self.layers = [Layer(unit_rows(layer.keys.clamp_min(0)), layer.counters.clone()) for layer in layers]
        self.values = values.clamp_min(0)
        self.k = k
        self.switch = switch
        self.inhibition = inhibition

    @property
    def keys(self) -> Tensor:
        """W1 of the top layer, ``(r, inputs)``."""
        return self.layers[-1].keys

    @property
    def counters(self) -> Tensor:
        """Counters of the top layer, ``(r,)``."""
        return self.layers[-1].counters

    @property
    def gammas(self) -> list[Tensor | None]:
        """γ per neuron of each layer, or None where every switch is closed."""
        if self.inhibition != "gaba":
            return [None] * len(self.layers)
        closed = [bool((layer.counters >= self.switch).all()) for layer in self.layers]
        return [
            None if shut else gaba(layer.counters, self.switch) for shut, layer in zip(closed, self.layers, strict=True)
        ]

    @property
    def gamma(self) -> Tensor | None:
        """γ of the top layer."""
        return self.gammas[-1]

    def copy(self) -> SDMLP:
        """An independent copy."""
        twin = SDMLP(self.layers, self.values, self.k, self.switch, self.inhibition)
        # as they are: normalising unit rows once more would change their last bits
        twin.layers = [Layer(layer.keys.clone(), layer.counters.clone()) for layer in self.layers]
        twin.values = self.values.clone()
        return twin

    def grow(self, classes: int, generator: torch.Generator) -> None:
        """Add value columns, initialised as at the start, until there are `classes`."""
        missing = classes - self.values.shape[1]
        if missing > 0:
            rows = self.values.shape[0]
            new = initial_rows(rows, missing, rows, generator, self.values.dtype).to(self.values.device)
            self.values = torch.cat([self.values, new], dim=1)

    # ── forward ──────────────────────────────────────────────────────────────────────────────────────
    def forward(self, x: Tensor, gammas: Sequence[Tensor | None] | None = None) -> Pass:
        """Activations of all layers for prepared inputs ``(N, D)``; pass `gammas` to reuse them over batches."""
        gammas = self.gammas if gammas is None else gammas
        inputs, norms, activations = [x], [None], []
        for number, (layer, gamma) in enumerate(zip(self.layers, gammas, strict=True)):
            if number:
                below = activations[-1]
                norm = below.norms().clamp_min(1e-12)
                scores = below.entries_matmul(None, layer.keys.T) / norm
                inputs.append(below.to_dense() / norm)
                norms.append(norm)
            else:
                scores = x @ layer.keys.T
            activations.append(inhibit(scores, self.k, gamma, self.inhibition == "mask"))
        return Pass(inputs, norms, activations)

    def activate(self, x: Tensor, gammas: Sequence[Tensor | None] | None = None) -> Activations:
        """Activations of the top layer for prepared inputs ``(N, D)``."""
        return self.forward(x, gammas).top

    def logits(self, x: Tensor, batch: int = 2048) -> Tensor:
        """Logits ``(N, C)`` of prepared inputs ``(N, D)``, in batches; nothing is counted."""
        gammas = self.gammas
        parts = [self.activate(part, gammas).matmul(self.values) for part in x.split(batch)]
        return torch.cat(parts) if parts else x.new_zeros(0, self.values.shape[1])

    # ── backward ─────────────────────────────────────────────────────────────────────────────────────
    def entry_gradients(
        self, state: Pass, to_logits: Tensor, to_activations: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        """∂L/∂z of every layer, one number per entry of its activations (dense ``(B, r)`` where they are dense).

        Args:
            state: of the forward pass.
            to_logits: ∂L/∂logits, ``(B, C)``.
            to_activations: per layer, ∂L/∂a beyond what comes from above: ``(M,)`` per entry of its
                activations, ``(B, r)`` if they are dense, or None.
        """
        gradients: list[Tensor] = []
        for number in reversed(range(len(self.layers))):
            activations = state.activations[number]
            if number == len(self.layers) - 1:
                if activations.is_dense:
                    hidden = to_logits @ self.values.T
                else:
                    hidden = (to_logits[activations.sample] * self.values[activations.neuron]).sum(1)  # (M,)
            else:
                to_input = state.activations[number + 1].entries_matmul(gradients[-1], self.layers[number + 1].keys)
                unit, norm = state.inputs[number + 1], state.norms[number + 1]
                to_input = (to_input - unit * (to_input * unit).sum(1, keepdim=True)) / norm
                hidden = to_input if activations.is_dense else to_input[activations.sample, activations.neuron]
            if to_activations is not None and to_activations[number] is not None:
                hidden = hidden + to_activations[number]
            if activations.is_dense:
                hidden = hidden * ((activations.dense > 0) & activations.dense_positive)
            else:
                hidden = hidden * activations.positive
            gradients.append(hidden)
        return gradients[::-1]

    def gradients(
        self,
        state: Pass,
        to_logits: Tensor,
        to_activations: Sequence[Tensor | None] | None = None,
    ) -> Gradients:
        """Gradients of the touched rows.

        Args:
            state: of the forward pass.
            to_logits: as `entry_gradients`.
            to_activations: as `entry_gradients`.
        """
        hidden = self.entry_gradients(state, to_logits, to_activations)
        rows, keys, values = [], [], to_logits
        for number, layer in enumerate(self.layers):
            activations, neurons = state.activations[number], len(layer.keys)
            everything = torch.arange(neurons, device=layer.keys.device)
            if activations.is_dense:
                touched = position = everything
            else:
                mask = torch.zeros(neurons, dtype=torch.bool, device=layer.keys.device)
                mask[activations.neuron] = True
                touched = mask.nonzero().flatten()
                position = torch.empty_like(everything)
                position[touched] = torch.arange(len(touched), device=layer.keys.device)
            rows.append(touched)
            keys.append(activations.transposed_matmul(hidden[number], state.inputs[number], position, len(touched)))
            if number == len(self.layers) - 1:
                values = activations.transposed_matmul(None, to_logits, position, len(touched))
        return Gradients(rows, keys, values)

    def apply(self, gradients: Gradients, lr: float, clip: float) -> float:
        """One SGD step with these gradients: global clipping, update, clamp at zero, unit keys.

        Args:
            gradients: of the rows to change; all others stay as they are.
            lr: learning rate.
            clip: the largest global norm.

        Returns:
            The norm before clipping.
        """
        norm = gradients.norm()
        rate = lr * min(1.0, clip / (norm + 1e-6))
        top = gradients.rows[-1]
        self.values[top] = (self.values[top] - rate * gradients.values).clamp_min(0)
        for layer, rows, gradient in zip(self.layers, gradients.rows, gradients.keys, strict=True):
            layer.keys[rows] = unit_rows((layer.keys[rows] - rate * gradient).clamp_min(0))
        return norm

    def count(self, state: Pass) -> None:
        """Advance the GABA counters; called in training only (SDMLP's code also counts in evaluation)."""
        for layer, activations in zip(self.layers, state.activations, strict=True):
            layer.counters += activations.counts().to(layer.counters.dtype)
