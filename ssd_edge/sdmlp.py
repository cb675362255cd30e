"""SDMLP: a two-layer network whose keys compete (Bricken et al., "Sparse Distributed Memory is a Continual
Learner", 2023; facts and quirks of the reference code are in docs/method.md).

x = ReLU(z − s)/‖·‖ → scores W1 x → Top-K inhibition → logits W2ᵀ a. No biases; both weight matrices are
non-negative, keys have unit length. The gradient of a cross-entropy-like loss reaches only the rows of
neurons that were active in the batch, so a step computes, clips, updates and constrains only those: for
plain SGD this is exact, because every other row has a zero gradient and already obeys the constraints.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ssd_edge.topk import Activations, gaba, inhibit


def prepare(embeddings: Tensor, shift: float | None) -> Tensor:
    """The network's input step: ReLU(z − s), then L2 per row. A zero row stays zero.

    Args:
        embeddings: standardised, ``(N, D)``.
        shift: s; None: the embedding stays signed and is only brought to unit length.
    """
    x = embeddings if shift is None else (embeddings - shift).clamp_min(0)
    return x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)


def initial_rows(rows: int, columns: int, fan_in: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Uniform in ±1/√fan_in (the default of a linear layer), clamped at zero: about half the weights are 0."""
    bound = 1.0 / math.sqrt(fan_in)
    drawn = torch.rand(rows, columns, generator=generator, dtype=torch.float64) * 2 - 1
    return (drawn * bound).clamp_min(0).to(dtype)


def unit_rows(matrix: Tensor) -> Tensor:
    """Rows divided by their L2 norm; a zero row stays zero (a dead key)."""
    return matrix / matrix.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _spread(row: Tensor, column: Tensor, value: Tensor, rows: int, columns: int) -> Tensor:
    """A sparse matrix ``(rows, columns)``; its product with a dense one costs only its entries."""
    return torch.sparse_coo_tensor(torch.stack([row, column]), value, (rows, columns), check_invariants=False)


class SDMLP:
    """The network and its touched-row update. Plain tensors: gradients are closed-form.

    Attributes:
        keys: W1, ``(r, D)``, non-negative unit rows.
        values: W2, ``(r, C)``, non-negative.
        counters: ``(r,)``, times that each neuron was active in training.
        k: neurons that stay active.
        switch: C of the GABA switch.
    """

    def __init__(self, keys: Tensor, values: Tensor, counters: Tensor, k: int, switch: float) -> None:
        self.keys = unit_rows(keys.clamp_min(0))
        self.values = values.clamp_min(0)
        self.counters = counters.clone()  # counted on in place; keys and values are new tensors already
        self.k = k
        self.switch = switch

    @property
    def gamma(self) -> Tensor | None:
        """γ per neuron, or None when every switch is closed."""
        if bool((self.counters >= self.switch).all()):
            return None
        return gaba(self.counters, self.switch)

    def grow(self, classes: int, generator: torch.Generator) -> None:
        """Add value columns, initialised as at the start, until there are `classes`."""
        missing = classes - self.values.shape[1]
        if missing > 0:
            rows = self.keys.shape[0]
            new = initial_rows(rows, missing, rows, generator, self.values.dtype).to(self.values.device)
            self.values = torch.cat([self.values, new], dim=1)

    def activate(self, x: Tensor, gamma: Tensor | None = None) -> Activations:
        """Activations of prepared inputs ``(N, D)``; pass `gamma` to reuse it over batches."""
        return inhibit(x @ self.keys.T, self.k, gamma)

    def logits(self, x: Tensor, batch: int = 2048) -> Tensor:
        """Logits ``(N, C)`` of prepared inputs ``(N, D)``, in batches; nothing is counted."""
        gamma = self.gamma
        parts = [self.activate(part, gamma).matmul(self.values) for part in x.split(batch)]
        return torch.cat(parts) if parts else x.new_zeros(0, self.values.shape[1])

    def step(
        self,
        x: Tensor,
        activations: Activations,
        logit_gradient: Tensor,
        activation_gradient: Tensor | None,
        lr: float,
        clip: float,
        score_gradient: tuple[Tensor, Tensor] | None = None,
    ) -> float:
        """One SGD step: gradient, global clipping, update, clamp at zero, unit keys; on touched rows only.

        Args:
            x: prepared inputs ``(B, D)``.
            activations: of `x`.
            logit_gradient: ∂L/∂logits, ``(B, C)``.
            activation_gradient: ∂L/∂a beyond what comes through the logits: ``(M,)`` per entry of
                `activations`, ``(B, r)`` if they are dense, or None.
            lr: learning rate.
            clip: the largest global norm of the gradient.
            score_gradient: (neurons ``(n,)``, ∂L/∂z ``(B, n)``) for a loss on scores before the inhibition.

        Returns:
            The gradient's norm before clipping.
        """
        if activations.is_dense:
            rows = torch.arange(self.keys.shape[0], device=x.device)
            hidden = logit_gradient @ self.values.T
            if activation_gradient is not None:
                hidden = hidden + activation_gradient
            hidden = hidden * ((activations.dense > 0) & activations.dense_positive)
            if score_gradient is not None:
                hidden = hidden.index_add(1, score_gradient[0], score_gradient[1])
            value_gradient = activations.dense.T @ logit_gradient
            key_gradient = hidden.T @ x
        else:
            sample, neuron, value = activations.sample, activations.neuron, activations.value
            touched = torch.zeros(self.keys.shape[0], dtype=torch.bool, device=x.device)
            touched[neuron] = True
            if score_gradient is not None:
                touched[score_gradient[0]] = True
            rows = touched.nonzero().flatten()
            position = torch.empty(self.keys.shape[0], dtype=torch.int64, device=x.device)
            position[rows] = torch.arange(len(rows), device=x.device)
            inverse = position[neuron]
            hidden = (logit_gradient[sample] * self.values[neuron]).sum(1)  # (M,)
            if activation_gradient is not None:
                hidden = hidden + activation_gradient
            hidden = hidden * activations.positive
            value_gradient = _spread(inverse, sample, value, len(rows), len(x)) @ logit_gradient
            key_gradient = _spread(inverse, sample, hidden, len(rows), len(x)) @ x
            if score_gradient is not None:
                key_gradient.index_add_(0, position[score_gradient[0]], score_gradient[1].T @ x)
        norm = float((value_gradient.square().sum() + key_gradient.square().sum()).sqrt())
        rate = lr * min(1.0, clip / (norm + 1e-6))
        self.values[rows] = (self.values[rows] - rate * value_gradient).clamp_min(0)
        self.keys[rows] = unit_rows((self.keys[rows] - rate * key_gradient).clamp_min(0))
        return norm

    def count(self, activations: Activations) -> None:
        """Advance the GABA counters; called in training only (SDMLP's code also counts in evaluation)."""
        self.counters += activations.counts().to(self.counters.dtype)
