"""Training of a sparse network on one task: loss terms, the touched-row step with a penalty, and epochs.

`Trainer.epoch` runs the compiled epoch where `ssd_edge.learners.gradient.epoch` allows it, and PyTorch elsewhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ssd_edge.learners.gradient import epoch as epochs
from ssd_edge.learners.gradient.distillation import cross_entropy
from ssd_edge.learners.gradient.network import SDMLP, Gradients, NetworkSettings, Pass, layer_name
from ssd_edge.learners.gradient.penalties import Penalty

Observer = Callable[[Pass], None]


@dataclasses.dataclass(frozen=True)
class LossTerm:
    """One term of the loss of a batch, with its gradients.

    Attributes:
        name: name of the term.
        loss: its value, unweighted.
        weight: its weight in the sum.
        to_logits: ∂loss/∂logits, ``(B, C)``, or None.
        to_activations: per layer, as `SDMLP.gradients` takes them, or None.
    """

    name: str
    loss: Tensor
    weight: float
    to_logits: Tensor | None = None
    to_activations: list[Tensor] | None = None


class TaskLoss:
    """Loss of one task: cross-entropy over all outputs.

    A subclass that adds terms overrides both methods.
    """

    def terms(self, index: Tensor, labels: Tensor, logits: Tensor, state: Pass) -> list[LossTerm]:
        """Compute the terms of the loss of a batch; names are unique.

        Args:
            index: places of the samples in the task, ``(B,)``.
            labels: ``(B,)``.
            logits: ``(B, C)``.
            state: state of the forward pass.
        """
        loss, gradient = cross_entropy(logits, labels)
        return [LossTerm("cross_entropy", loss, 1.0, gradient)]

    def compiled(self) -> epochs.CompiledLoss | None:
        """Return the same loss for the compiled epoch, or None if that cannot compute it."""
        return epochs.CompiledLoss(1.0)


class Trainer:
    """Training of a network on one task.

    Args:
        net: network; changed in place.
        settings: settings of the training.
        penalty: penalty whose `begin` has been called for this task.
        loss: loss of the task.
        inputs: prepared inputs, ``(N, D)``.
        labels: int64 ``(N,)``.
        observer: called with the forward pass of each step; the compiled epoch is not used then.

    Attributes:
        compiled: compiled epochs over the task, or None if all epochs run in PyTorch.
    """

    def __init__(
        self,
        net: SDMLP,
        settings: NetworkSettings,
        penalty: Penalty,
        loss: TaskLoss,
        inputs: Tensor,
        labels: Tensor,
        observer: Observer | None = None,
    ) -> None:
        self.net, self.settings, self.penalty, self.loss = net, settings, penalty, loss
        self.inputs, self.labels, self.observer = inputs, labels, observer
        self.moved = self._moved()
        known = loss.compiled() if observer is None else None
        self.compiled = epochs.start(net, settings, known, penalty, self.moved[-1], inputs, labels)

    def epoch(self, order: Tensor) -> dict[str, float]:
        """Run one epoch, compiled if possible.

        Args:
            order: order of the samples, int64 ``(N,)``.

        Returns:
            Means over the epoch of each loss term and of the measurements of a step.
        """
        if self.compiled is not None and self.compiled.ready():
            return self.compiled.run(order)
        if self.compiled is not None:
            self.compiled.invalidate()
        return self.touched_rows_epoch(order)

    def touched_rows_epoch(self, order: Tensor) -> dict[str, float]:
        """Run one epoch in PyTorch; arguments and result as of `epoch`."""
        totals: dict[str, float] = {}
        for index in torch.split(order, self.settings.batch):
            terms, state, logits = self._forward(index)
            self.net.count(state)
            if self.observer is not None:
                self.observer(state)
            measured = self._step(terms, state, logits, self.labels[index])
            measured.update({term.name: float(term.loss) for term in terms})
            for name, value in measured.items():
                totals[name] = totals.get(name, 0.0) + value * len(index) / len(self.labels)
        return totals

    def gradient_norms(self, index: Tensor) -> dict[str, float]:
        """Return the norm of the weighted gradient of each loss term on some samples, and of the penalty."""
        terms, state, _ = self._forward(index)
        norms = {term.name: self._gradients([term], state).norm() for term in terms}
        if self.penalty.active:
            parts = (self.penalty.gradient(name, parameter) for name, parameter in self.net.parameters().items())
            norms["penalty"] = math.sqrt(sum(float(part.square().sum()) for part in parts))
        return norms

    def _forward(self, index: Tensor) -> tuple[list[LossTerm], Pass, Tensor]:
        """Return the loss terms of some samples, the forward pass and the logits."""
        state = self.net.forward(self.inputs[index])
        logits = state.top.matmul(self.net.values)
        return self.loss.terms(index, self.labels[index], logits, state), state, logits

    def _step(self, terms: list[LossTerm], state: Pass, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Take one step; return the gradient's norm, whether it was clipped, and the mean number of active neurons."""
        settings, net, penalty = self.settings, self.net, self.penalty
        gradients = self._gradients(terms, state)
        likelihood = None
        if penalty.tracks:
            beta = penalty.settings.penalty_beta
            likelihood = net.gradients(state, beta * cross_entropy(beta * logits, labels)[1])
        if penalty.active:
            gradients = self._penalised(gradients)
        before = self._rows(gradients.rows) if penalty.tracks else {}
        norm = net.apply(gradients, settings.lr, settings.clip)
        if likelihood is not None:
            self._track(likelihood, gradients.rows, before)
        for mask, rows in zip(self.moved, gradients.rows, strict=True):
            mask[rows] = True
        active = sum(float(part.counts().sum()) for part in state.activations) / len(labels) / len(net.layers)
        return {"gradient_norm": norm, "clipped": float(norm > settings.clip), "active_neurons": active}

    def _gradients(self, terms: Sequence[LossTerm], state: Pass) -> Gradients:
        """Return the gradients of the weighted sum of loss terms; at most one may have gradients of activations."""
        to_logits = sum(term.weight * term.to_logits for term in terms if term.to_logits is not None)
        if not isinstance(to_logits, Tensor):  # a hidden term alone
            to_logits = torch.zeros(state.top.shape[0], self.net.values.shape[1]).to(self.net.values)
        to_activations = None
        for term in terms:
            if term.to_activations is not None:
                to_activations = [term.weight * slope for slope in term.to_activations]
        return self.net.gradients(state, to_logits, to_activations)

    # ── the penalty ──────────────────────────────────────────────────────────────────────────────────
    def _moved(self) -> list[Tensor]:
        """Return, per layer, the rows with a penalty gradient, bool ``(r,)``; all other rows lie on every anchor."""
        moved = [torch.zeros(len(layer.keys), dtype=torch.bool, device=layer.keys.device) for layer in self.net.layers]
        if self.penalty.active:
            for layer, mask in enumerate(moved):
                mask |= (self.penalty.gradient(layer_name("keys", layer), self.net.layers[layer].keys) != 0).any(1)
            moved[-1] |= (self.penalty.gradient("values", self.net.values) != 0).any(1)
        return moved

    def _penalised(self, gradients: Gradients) -> Gradients:
        """Add the penalty's gradient on these rows and on all rows that have moved since an anchor."""
        wider = gradients.widened(self.moved)
        for number, layer in enumerate(self.net.layers):
            wider.keys[number] += self.penalty.gradient(layer_name("keys", number), layer.keys, wider.rows[number])
        wider.values += self.penalty.gradient("values", self.net.values, wider.rows[-1])
        return wider

    def _rows(self, rows: list[Tensor]) -> dict[str, Tensor]:
        """Return copies of some rows of every parameter."""
        keys = {
            layer_name("keys", number): layer.keys[chosen]
            for number, (layer, chosen) in enumerate(zip(self.net.layers, rows, strict=True))
        }
        return {**keys, "values": self.net.values[rows[-1]]}

    def _track(self, likelihood: Gradients, rows: list[Tensor], before: dict[str, Tensor]) -> None:
        """Pass the step's changes to SI; rows that the likelihood does not reach add nothing to its path."""
        after = self._rows(rows)
        wide = likelihood.widened([_mask(part, layer.keys) for part, layer in zip(rows, self.net.layers, strict=True)])
        for number, part in enumerate(rows):
            name = layer_name("keys", number)
            self.penalty.track(name, wide.keys[number], after[name] - before[name], part)
        self.penalty.track("values", wide.values, after["values"] - before["values"], rows[-1])


def _mask(rows: Tensor, keys: Tensor) -> Tensor:
    """Return bool ``(r,)``, True for these rows."""
    mask = torch.zeros(len(keys), dtype=torch.bool, device=keys.device)
    mask[rows] = True
    return mask
