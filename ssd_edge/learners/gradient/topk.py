"""Top-K inhibition with the GABA switch → sparse activations.

SDMLP (Bricken et al. 2023) lets only about k neurons answer an input: u = ReLU(z); I is the (k+1)-th largest
u of the sample; a_j = ReLU(u_j − γ_j·I). γ_j rises from −1 (GABA excites: every neuron is active) to +1
(exact Top-K by subtraction) with the number of times that neuron j has been active.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

DENSE_ABOVE = 1 / 8  # share of active neurons above which a dense array is the smaller one


def _coo(row: Tensor, column: Tensor, value: Tensor, rows: int, columns: int) -> Tensor:
    """A sparse matrix ``(rows, columns)``; its product with a dense one costs only its entries."""
    return torch.sparse_coo_tensor(torch.stack([row, column]), value, (rows, columns), check_invariants=False)


@dataclasses.dataclass(frozen=True)
class Activations:
    """Activations of N samples over r neurons: a list of the active ones, or dense while most are active.

    Attributes:
        shape: ``(N, r)``.
        sample: int64 ``(M,)``, ascending; which sample an entry belongs to. None if dense.
        neuron: int64 ``(M,)``. None if dense.
        value: ``(M,)``, > 0.
        positive: bool ``(M,)``, whether the score behind an entry is > 0: where it is not (open GABA switch),
            no gradient passes.
        dense: ``(N, r)`` or None.
        dense_positive: bool ``(N, r)``, `positive` for the dense form.
    """

    shape: tuple[int, int]
    sample: Tensor | None = None
    neuron: Tensor | None = None
    value: Tensor | None = None
    positive: Tensor | None = None
    dense: Tensor | None = None
    dense_positive: Tensor | None = None

    @property
    def is_dense(self) -> bool:
        """Whether the dense form is held."""
        return self.dense is not None

    def counts(self) -> Tensor:
        """How many samples activate each neuron: int64 ``(r,)``."""
        if self.dense is not None:
            return (self.dense > 0).sum(0)
        return torch.bincount(self.neuron, minlength=self.shape[1])

    def norms(self) -> Tensor:
        """L2 norm of each sample's activations, ``(N, 1)``."""
        if self.dense is not None:
            return self.dense.norm(dim=1, keepdim=True)
        squares = self.value.new_zeros(self.shape[0]).index_add_(0, self.sample, self.value.square())
        return squares.sqrt()[:, None]

    def to_dense(self) -> Tensor:
        """``(N, r)`` with zeros where inactive."""
        return self.spread(self.dense if self.is_dense else self.value)

    def spread(self, entries: Tensor) -> Tensor:
        """One number per entry ``(M,)`` as dense ``(N, r)``, zeros elsewhere; what is dense already stays."""
        if self.is_dense:
            return entries
        dense = entries.new_zeros(self.shape)
        dense[self.sample, self.neuron] = entries
        return dense

    def matmul(self, values: Tensor) -> Tensor:
        """a W2: ``(N, r) @ (r, C)`` → ``(N, C)``, by rows of active neurons while that takes less memory."""
        if self.dense is not None or len(self.value) * values.shape[1] > self.shape[0] * self.shape[1]:
            return self.to_dense() @ values
        product = values.new_zeros(self.shape[0], values.shape[1])
        return product.index_add_(0, self.sample, self.value[:, None] * values[self.neuron])

    def transposed_matmul(self, entries: Tensor | None, other: Tensor, position: Tensor, rows: int) -> Tensor:
        """Sums over samples: ``(rows, N) @ (N, m)``, the left matrix holding one number per entry.

        Args:
            entries: ``(M,)`` in place of the activations' values, dense ``(N, r)`` if they are dense; None: values.
            other: ``(N, m)``.
            position: int64 ``(r,)``, row of the result for each neuron (of those that are active).
            rows: rows of the result; all neurons, in order, if the activations are dense.
        """
        if self.dense is not None:
            return (self.dense if entries is None else entries).T @ other
        spread = _coo(position[self.neuron], self.sample, self.value if entries is None else entries, rows, len(other))
        return spread @ other

    def entries_matmul(self, entries: Tensor | None, other: Tensor) -> Tensor:
        """Sums over neurons: ``(N, r) @ (r, m)``, the left matrix holding one number per entry (as above)."""
        if self.dense is not None:
            return (self.dense if entries is None else entries) @ other
        return _coo(self.sample, self.neuron, self.value if entries is None else entries, *self.shape) @ other

    def columns(self, slot: Tensor, width: int) -> Tensor:
        """Dense activations of chosen neurons, ``(N, width)``.

        Args:
            slot: int64 ``(r,)``: the column of each neuron, or -1.
            width: number of columns.
        """
        if self.dense is not None:
            table = self.dense.new_zeros(self.shape[0], width)
            chosen = (slot >= 0).nonzero().flatten()
            table[:, slot[chosen]] = self.dense[:, chosen]
            return table
        table = self.value.new_zeros(self.shape[0], width)
        column = slot[self.neuron]
        inside = column >= 0
        table[self.sample[inside], column[inside]] = self.value[inside]
        return table


def gaba(counters: Tensor, switch: float) -> Tensor:
    """γ = clip(−1 + 2c/C, −1, 1) per neuron, ``(r,)``.

    Args:
        counters: activations c of each neuron so far, ``(r,)``.
        switch: C, the count at which the switch of a neuron is closed.
    """
    return (2.0 * counters / switch - 1.0).clamp(-1.0, 1.0)


def inhibit(scores: Tensor, k: int, gamma: Tensor | None = None, mask: bool = False) -> Activations:
    """Top-K inhibition, by subtraction (SDMLP's own) or by masking.

    By subtraction a neuron is active iff u_j > γ_j·I, so ties with the (k+1)-th value are inactive once the
    switch is closed. As in SDMLP, k + 1 is clipped to r: with k = r the smallest value is subtracted.
    By masking the k largest positive scores pass unchanged (SDMLP's FLAT_MASK).

    Args:
        scores: z, ``(N, r)``.
        k: neurons that stay active at most, per sample, once γ = 1.
        gamma: ``(r,)``; None: all 1 (closed), which is cheaper. Not used with `mask`.
        mask: mask instead of subtracting.

    Returns:
        Activations: u − γ·I, or u, of the active neurons.
    """
    count, neurons = scores.shape
    if mask:
        top, index = scores.topk(min(k, neurons), dim=1)
        if k > DENSE_ABOVE * neurons:
            dense = torch.zeros_like(scores).scatter_(1, index, top.clamp_min(0))
            return Activations((count, neurons), dense=dense, dense_positive=dense > 0)
        return _sparse(top, index, neurons)
    rank = min(k + 1, neurons)
    if gamma is None and rank - 1 <= DENSE_ABOVE * neurons:
        top, index = scores.topk(rank, dim=1)
        top = top.clamp_min(0)  # the rectifier, of the few that can be active
        return _sparse(top[:, :-1] - top[:, -1:], index[:, :-1], neurons)
    u = scores.clamp_min(0)
    inhibition = u.topk(rank, dim=1).values[:, -1:]  # (N, 1), a constant for the gradient
    a = (u - (inhibition if gamma is None else gamma * inhibition)).clamp_min(0)
    active = a > 0
    if int(active.sum()) > DENSE_ABOVE * count * neurons:
        return Activations((count, neurons), dense=a, dense_positive=scores > 0)
    sample, neuron = active.nonzero(as_tuple=True)
    return Activations((count, neurons), sample, neuron, a[sample, neuron], scores[sample, neuron] > 0)


def _sparse(value: Tensor, index: Tensor, neurons: int) -> Activations:
    """The positive ones of candidate activations ``(N, m)`` of the neurons ``(N, m)``."""
    active = value > 0
    sample = torch.arange(len(value), device=value.device)[:, None].expand(active.shape)[active]
    value = value[active]
    return Activations((len(index), neurons), sample, index[active], value, torch.ones_like(value, dtype=bool))
