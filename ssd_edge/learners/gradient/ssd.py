"""`ssd`: Algorithm 1 of the SSD paper (arXiv 2512.15267) to the letter, every reading switchable.

What the paper leaves open, the evidence for each reading and what it is worth: docs/method.md.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_edge.config import setting
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.learners.base import TensorSpec
from ssd_edge.learners.gradient.distillation import (
    Targets,
    TopNTable,
    count_activations,
    cross_entropy,
    divergence,
    hidden_loss,
    parse_top_n,
    select,
    teacher_targets,
)
from ssd_edge.learners.gradient.epoch import Terms
from ssd_edge.learners.gradient.network import Pass
from ssd_edge.learners.gradient.penalties import PenaltySettings
from ssd_edge.learners.gradient.sdmlp import Component, NetworkSettings, SDMLPLearner, name_of
from ssd_edge.learners.priors import Priors


@dataclasses.dataclass(frozen=True)
class DistillationSettings(NetworkSettings):
    """Settings of SSD's distillation, and of the network and its training."""

    ce_weight: float = setting(0.7, "alpha, of cross-entropy against distillation (Eq. 6)", minimum=0.0, maximum=1.0)
    hidden_weight: float = setting(0.1, "lambda, of hidden against logits (Eq. 6)", minimum=0.0, maximum=1.0)
    temperature: float = setting(8.0, "T of both distillation losses", above=0.0)
    top_n: str = setting("1.0k", "neurons distilled: a number, a multiple of k ('1.0k') or a fraction of r")
    direction: Literal["teacher_student", "student_teacher"] = setting(
        "teacher_student", "of the divergence; Eq. 2-3 print student_teacher, practice is the other"
    )
    hidden: Literal["kl_softmax", "mse"] = setting("kl_softmax", "loss on the activations")
    logit_scope: Literal["all", "old", "seen"] = setting("all", "which outputs are distilled")
    selection: Literal["frequency", "random", "all"] = setting("frequency", "how the Top-n neurons are chosen")

    def __post_init__(self) -> None:
        """Check what one field says against another."""
        super().__post_init__()
        n = parse_top_n(self.top_n, self.k, self.neurons)
        if n < self.k and self.selection != "all":
            raise InputError(f"learner.top_n gives {n} neurons, but must give at least learner.k = {self.k}")


@dataclasses.dataclass(frozen=True)
class Settings(PenaltySettings, DistillationSettings):
    """Settings of SSD."""


class SSD(SDMLPLearner):
    """SDMLP distilled from its previous self on the Top-n neurons of each hidden layer and on the logits."""

    name: ClassVar[str] = "ssd"
    display: str = "SSD"
    Settings: ClassVar[type] = Settings

    def __init__(
        self, dim: int, settings: Any, priors: Priors, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__(dim, settings, priors, seed, device)
        r, layers = settings.neurons, range(settings.layers)
        self.n = r if settings.selection == "all" else parse_top_n(settings.top_n, settings.k, r)
        self.tables = [self._table(torch.arange(self.n), torch.zeros(self.n)) for _ in layers]
        self.targets: Targets | None = None

    def _table(self, indices: Tensor, frequencies: Tensor) -> TopNTable:
        return TopNTable(indices.to(self.device), frequencies.to(self.device))

    # ── the teacher ──────────────────────────────────────────────────────────────────────────────────
    def _begin(self, inputs: Tensor, labels: Tensor) -> None:
        self.targets = None
        if self.tasks_learned:
            self.outputs = self._scope(labels)
            # answered before the first step, by the network that is about to change
            self.targets = teacher_targets(self.net, inputs, self.tables)
            self.slots = [table.slots(self.settings.neurons) for table in self.tables]

    def _scope(self, labels: Tensor) -> Tensor | None:
        """Which outputs are distilled; None: all."""
        seen = (self.seen == 1).nonzero().flatten().to(self.device)
        if self.settings.logit_scope == "old":
            return seen
        if self.settings.logit_scope == "seen":
            return torch.cat([seen, labels]).unique()
        return None

    # ── the losses ───────────────────────────────────────────────────────────────────────────────────
    def _components(self, index: Tensor, x: Tensor, labels: Tensor, logits: Tensor, state: Pass) -> list[Component]:
        settings = self.settings
        loss, gradient = cross_entropy(logits, labels)
        if self.targets is None:
            return [Component("cross_entropy", loss, 1.0, gradient)]
        alpha, lam = settings.ce_weight, settings.hidden_weight
        picked, wanted = logits, self.targets.logits[index]
        if self.outputs is not None:
            picked, wanted = picked[:, self.outputs], wanted[:, self.outputs]
        logit_loss, to_logits = divergence(picked, wanted, settings.temperature, settings.direction)
        if self.outputs is not None:
            to_logits = torch.zeros_like(logits).index_add_(1, self.outputs, to_logits)
        components = [
            Component("cross_entropy", loss, alpha, gradient),
            Component("logit_distillation", logit_loss, (1 - alpha) * (1 - lam), to_logits),
        ]
        if lam:
            components.append(self._hidden(index, state, (1 - alpha) * lam))
        return components

    def _hidden(self, index: Tensor, state: Pass, weight: float) -> Component:
        """The hidden term: the mean over layers of the distance between table activations."""
        settings, layers, loss = self.settings, len(self.net.layers), 0.0
        to_activations: list[Tensor | None] = []
        for layer, activations in enumerate(state.activations):
            answered = activations.columns(self.slots[layer], self.n)
            taught = self.targets.hidden[layer].table(index)
            part, slope = hidden_loss(answered, taught, settings.temperature, settings.hidden, settings.direction)
            loss = loss + part / layers
            to_activations.append(self._entries(slope / layers, layer, state))
        return Component("hidden_distillation", loss, weight, None, to_activations)

    def _entries(self, slope: Tensor, layer: int, state: Pass) -> Tensor:
        """∂L/∂a of table columns ``(B, n)`` as one number per entry of a layer's activations."""
        activations, slots, outside = state.activations[layer], self.slots[layer], slope.shape[1]
        slope = F.pad(slope, (0, 1))  # column n: not in the table
        column = torch.where(slots >= 0, slots, outside)
        return slope[:, column] if activations.is_dense else slope[activations.sample, column[activations.neuron]]

    def _terms(self) -> Terms | None:
        settings, targets = self.settings, self.targets
        if targets is None:
            return Terms(1.0)
        alpha, lam = settings.ce_weight, settings.hidden_weight
        hidden = bool(lam)
        if settings.direction != "teacher_student" or len(self.slots) > 1 or (hidden and settings.hidden == "mse"):
            return None
        return Terms(
            cross_entropy=alpha,
            logits=targets.logits,
            logit_weight=(1 - alpha) * (1 - lam),
            outputs=self.outputs,
            hidden=targets.hidden[0] if hidden else None,
            hidden_weight=(1 - alpha) * lam if hidden else 0.0,
            slots=self.slots[0],
            temperature=settings.temperature,
        )

    # ── after a task ─────────────────────────────────────────────────────────────────────────────────
    def _end(self, inputs: Tensor, labels: Tensor) -> None:
        generator = self.generator(purpose=4)
        self.tables = [
            select((count / len(inputs)).float(), self.n, self.settings.selection, generator)
            for count in count_activations(self.net, inputs)
        ]
        self.targets = None

    # ── the state ────────────────────────────────────────────────────────────────────────────────────
    def schema(self) -> dict[str, TensorSpec]:
        schema = super().schema()
        for layer in range(self.settings.layers):
            indices, frequencies = name_of("top_n_indices", layer), name_of("top_n_frequencies", layer)
            schema[indices] = TensorSpec((self.n,), "uint32", "the neurons that the next task distils")
            schema[frequencies] = TensorSpec((self.n,), "float32", "how often each was active in the last task")
        return schema

    def _tensors(self) -> dict[str, Tensor]:
        tensors = super()._tensors()
        for layer, table in enumerate(self.tables):
            # few kernels know uint32
            tensors[name_of("top_n_indices", layer)] = table.indices.cpu().to(torch.uint32)
            tensors[name_of("top_n_frequencies", layer)] = table.frequencies
        return tensors

    def _load(self, tensors: dict[str, Tensor]) -> None:
        super()._load(tensors)
        settings, self.tables = self.settings, []
        for layer in range(settings.layers):
            indices = tensors[name_of("top_n_indices", layer)].to(torch.int64)
            if len(indices) and int(indices.max()) >= settings.neurons:
                raise BundleRefusedError(
                    f"the Top-n table names neuron {int(indices.max())}, but there are {settings.neurons}"
                )
            self.tables.append(self._table(indices, tensors[name_of("top_n_frequencies", layer)]))
