"""Top-K inhibition with the GABA switch, and the activations that it leaves.

In SDMLP (Bricken et al. 2023) about k neurons respond to an input: u = ReLU(z); I is the (k+1)-th largest u of the
sample; a_j = ReLU(u_j − γ_j·I). γ_j rises with the number of times that neuron j has been active, from −1 (GABA
excites: every neuron is active) to +1 (exact Top-K by subtraction).
"""

from __future__ import annotations

import abc
import dataclasses

import torch
from torch import Tensor

DENSE_ABOVE = 1 / 32  # share of active neurons above which a step takes less time with a dense array than with a list


class Activations(abc.ABC):
    """Activations of N samples over r neurons, as a list of entries or as a dense array.

    An *entry* is one activation that is stored. Arguments and results named `entries` hold one number per entry:
    ``(M,)`` in the sparse form, ``(N, r)`` in the dense form.
    """

    shape: tuple[int, int]
    is_dense: bool

    @abc.abstractmethod
    def counts(self) -> Tensor:
        """Return how many samples activate each neuron, int64 ``(r,)``."""

    @abc.abstractmethod
    def per_sample(self) -> Tensor:
        """Return how many neurons each sample activates, int64; trailing samples without any may be missing."""

    @abc.abstractmethod
    def norms(self) -> Tensor:
        """Return the L2 norm of each sample's activations, ``(N, 1)``."""

    @abc.abstractmethod
    def to_dense(self) -> Tensor:
        """Return the activations as ``(N, r)``, with zeros where inactive."""

    @abc.abstractmethod
    def indicator(self) -> Activations:
        """Return the same activations with every positive value replaced by 1."""

    @abc.abstractmethod
    def touched(self) -> tuple[Tensor, Tensor]:
        """Return the neurons with an entry, int64 ``(R,)`` ascending, and the place of each neuron there, ``(r,)``."""

    @abc.abstractmethod
    def spread(self, entries: Tensor) -> Tensor:
        """Return entries as dense ``(N, r)``, with zeros elsewhere."""

    @abc.abstractmethod
    def gather(self, dense: Tensor) -> Tensor:
        """Return the entries of a dense array ``(N, r)``; the inverse of `spread`."""

    @abc.abstractmethod
    def passed(self, entries: Tensor) -> Tensor:
        """Return entries of a gradient with zeros where the inhibition lets no gradient pass."""

    @abc.abstractmethod
    def entry_products(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the entries of ``left @ right.T`` for left ``(N, m)`` and right ``(r, m)``."""

    @abc.abstractmethod
    def matmul(self, values: Tensor) -> Tensor:
        """Return the product of the activations and ``(r, C)``, i.e. ``(N, C)``."""

    @abc.abstractmethod
    def entries_matmul(self, entries: Tensor | None, other: Tensor) -> Tensor:
        """Return the product ``(N, r) @ (r, m)`` of entries (None: the activations) and `other`."""

    @abc.abstractmethod
    def transposed_matmul(self, entries: Tensor | None, other: Tensor, position: Tensor, rows: int) -> Tensor:
        """Return the product ``(rows, N) @ (N, m)`` of transposed entries and `other`.

        Args:
            entries: entries; None: the activations.
            other: ``(N, m)``.
            position: int64 ``(r,)``, row of the result for each active neuron.
            rows: number of rows of the result; must be r, in order, in the dense form.
        """

    @abc.abstractmethod
    def columns(self, slot: Tensor, width: int) -> Tensor:
        """Return the activations of selected neurons, dense ``(N, width)``.

        Args:
            slot: int64 ``(r,)``, the column of each neuron, or -1.
            width: number of columns.
        """

    @abc.abstractmethod
    def from_columns(self, table: Tensor, slot: Tensor) -> Tensor:
        """Return columns ``(N, width)`` as entries, 0 for neurons without a column; the transpose of `columns`."""


@dataclasses.dataclass(frozen=True)
class SparseActivations(Activations):
    """A list of the active neurons of each sample.

    Attributes:
        shape: ``(N, r)``.
        sample: int64 ``(M,)``, ascending, sample of each entry.
        neuron: int64 ``(M,)``, neuron of each entry.
        value: ``(M,)``, > 0.
        positive: bool ``(M,)``, True where the score behind an entry is > 0. No gradient passes elsewhere (an open
            GABA switch).
    """

    shape: tuple[int, int]
    sample: Tensor
    neuron: Tensor
    value: Tensor
    positive: Tensor
    is_dense = False

    def counts(self) -> Tensor:
        return torch.bincount(self.neuron, minlength=self.shape[1])

    def per_sample(self) -> Tensor:
        return torch.bincount(self.sample)

    def norms(self) -> Tensor:
        squares = self.value.new_zeros(self.shape[0]).index_add_(0, self.sample, self.value.square())
        return squares.sqrt().unsqueeze(1)

    def to_dense(self) -> Tensor:
        return self.spread(self.value)

    def indicator(self) -> SparseActivations:
        return dataclasses.replace(self, value=torch.ones_like(self.value))

    def touched(self) -> tuple[Tensor, Tensor]:
        mask = torch.zeros(self.shape[1], dtype=torch.bool, device=self.neuron.device)
        mask[self.neuron] = True
        rows = mask.nonzero().flatten()
        position = torch.empty(self.shape[1], dtype=torch.int64, device=rows.device)
        position[rows] = torch.arange(len(rows), device=rows.device)
        return rows, position

    def spread(self, entries: Tensor) -> Tensor:
        dense = entries.new_zeros(self.shape)
        dense[self.sample, self.neuron] = entries
        return dense

    def gather(self, dense: Tensor) -> Tensor:
        return dense[self.sample, self.neuron]

    def passed(self, entries: Tensor) -> Tensor:
        return entries * self.positive

    def entry_products(self, left: Tensor, right: Tensor) -> Tensor:
        return (left[self.sample] * right[self.neuron]).sum(1)

    def matmul(self, values: Tensor) -> Tensor:
        if len(self.value) * values.shape[1] > self.shape[0] * self.shape[1]:
            return self.to_dense() @ values  # takes less memory than the rows of all entries
        product = values.new_zeros(self.shape[0], values.shape[1])
        return product.index_add_(0, self.sample, self.value[:, None] * values[self.neuron])

    def entries_matmul(self, entries: Tensor | None, other: Tensor) -> Tensor:
        return _coo(self.sample, self.neuron, self.value if entries is None else entries, *self.shape) @ other

    def transposed_matmul(self, entries: Tensor | None, other: Tensor, position: Tensor, rows: int) -> Tensor:
        values = self.value if entries is None else entries
        return _coo(position[self.neuron], self.sample, values, rows, len(other)) @ other

    def columns(self, slot: Tensor, width: int) -> Tensor:
        table = self.value.new_zeros(self.shape[0], width)
        column = slot[self.neuron]
        inside = column >= 0
        table[self.sample[inside], column[inside]] = self.value[inside]
        return table

    def from_columns(self, table: Tensor, slot: Tensor) -> Tensor:
        padded, column = _with_zero_column(table, slot)
        return padded[self.sample, column[self.neuron]]


@dataclasses.dataclass(frozen=True)
class DenseActivations(Activations):
    """An array of all activations, used while most neurons are active.

    Attributes:
        shape: ``(N, r)``.
        dense: ``(N, r)``, ≥ 0.
        positive: bool ``(N, r)``, True where the score is > 0.
    """

    shape: tuple[int, int]
    dense: Tensor
    positive: Tensor
    is_dense = True

    def counts(self) -> Tensor:
        return (self.dense > 0).sum(0)

    def per_sample(self) -> Tensor:
        return (self.dense > 0).sum(1)

    def norms(self) -> Tensor:
        norms: Tensor = self.dense.norm(dim=1, keepdim=True)
        return norms

    def to_dense(self) -> Tensor:
        return self.dense

    def indicator(self) -> DenseActivations:
        return dataclasses.replace(self, dense=(self.dense > 0).to(self.dense.dtype))

    def touched(self) -> tuple[Tensor, Tensor]:
        everything = torch.arange(self.shape[1], device=self.dense.device)
        return everything, everything

    def spread(self, entries: Tensor) -> Tensor:
        return entries

    def gather(self, dense: Tensor) -> Tensor:
        return dense

    def passed(self, entries: Tensor) -> Tensor:
        return entries * ((self.dense > 0) & self.positive)

    def entry_products(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right.T

    def matmul(self, values: Tensor) -> Tensor:
        return self.dense @ values

    def entries_matmul(self, entries: Tensor | None, other: Tensor) -> Tensor:
        return (self.dense if entries is None else entries) @ other

    def transposed_matmul(self, entries: Tensor | None, other: Tensor, position: Tensor, rows: int) -> Tensor:
        return (self.dense if entries is None else entries).T @ other

    def columns(self, slot: Tensor, width: int) -> Tensor:
        table = self.dense.new_zeros(self.shape[0], width)
        chosen = (slot >= 0).nonzero().flatten()
        table[:, slot[chosen]] = self.dense[:, chosen]
        return table

    def from_columns(self, table: Tensor, slot: Tensor) -> Tensor:
        padded, column = _with_zero_column(table, slot)
        return padded[:, column]


def _coo(row: Tensor, column: Tensor, value: Tensor, rows: int, columns: int) -> Tensor:
    """Return a sparse matrix ``(rows, columns)``; its product with a dense matrix costs only its entries."""
    return torch.sparse_coo_tensor(torch.stack([row, column]), value, (rows, columns), check_invariants=False)


def _with_zero_column(table: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """Return the table with a column of zeros at its end, and slots in which -1 points to that column."""
    return torch.nn.functional.pad(table, (0, 1)), torch.where(slot >= 0, slot, table.shape[1])


def gaba(counters: Tensor, switch: float) -> Tensor:
    """Return γ = clip(−1 + 2c/C, −1, 1) per neuron, ``(r,)``.

    Args:
        counters: activations c of each neuron so far, ``(r,)``.
        switch: C, the count at which the switch of a neuron is closed.
    """
    return (2.0 * counters / switch - 1.0).clamp(-1.0, 1.0)


def inhibit(scores: Tensor, k: int, gamma: Tensor | None = None, mask: bool = False) -> Activations:
    """Apply Top-K inhibition, by subtraction (the rule of SDMLP) or by masking.

    By subtraction a neuron is active iff u_j > γ_j·I, so ties with the (k+1)-th value are inactive once the switch is
    closed. As in SDMLP, k + 1 is clipped to r: with k = r the smallest value is subtracted. By masking the k largest
    positive scores pass unchanged (FLAT_MASK of SDMLP's code).

    Args:
        scores: z, ``(N, r)``.
        k: largest number of active neurons per sample once γ = 1.
        gamma: ``(r,)``; None means 1 for all (closed), which is cheaper. Not used with `mask`.
        mask: mask instead of subtracting.

    Returns:
        u − γ·I, or u, of the active neurons.
    """
    count, neurons = scores.shape
    if mask:
        top, index = scores.topk(min(k, neurons), dim=1)
        if k > DENSE_ABOVE * neurons:
            dense = torch.zeros_like(scores).scatter_(1, index, top.clamp_min(0))
            return DenseActivations((count, neurons), dense, dense > 0)
        return _sparse(top, index, neurons)
    rank = min(k + 1, neurons)
    if gamma is None and rank - 1 <= DENSE_ABOVE * neurons:
        top, index = scores.topk(rank, dim=1)
        top = top.clamp_min(0)  # ReLU of the few that can be active
        return _sparse(top[:, :-1] - top[:, -1:], index[:, :-1], neurons)
    u = scores.clamp_min(0)
    inhibition = u.topk(rank, dim=1).values[:, -1:]  # (N, 1), a constant for the gradient
    a = u.sub_(inhibition) if gamma is None else u.addcmul_(inhibition, gamma, value=-1)
    a = a.clamp_min_(0)
    if int(a.count_nonzero()) > DENSE_ABOVE * count * neurons:
        return DenseActivations((count, neurons), a, scores > 0)
    sample, neuron = a.nonzero(as_tuple=True)
    return SparseActivations((count, neurons), sample, neuron, a[sample, neuron], scores[sample, neuron] > 0)


def _sparse(value: Tensor, index: Tensor, neurons: int) -> SparseActivations:
    """Return the positive ones of candidate activations ``(N, m)`` of the neurons ``(N, m)``."""
    active = value > 0
    sample = torch.arange(len(value), device=value.device)[:, None].expand(active.shape)[active]
    value = value[active]
    positive = torch.ones_like(value, dtype=torch.bool)
    return SparseActivations((len(index), neurons), sample, index[active], value, positive)
