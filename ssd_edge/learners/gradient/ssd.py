"""`ssd`: Algorithm 1 of the SSD paper (arXiv 2512.15267).

docs/method.md lists what the paper leaves open, the reading taken for each, and what it is worth.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ssd_edge.config import setting
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.learners.base import TensorSpec
from ssd_edge.learners.gradient import sdmlp
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
from ssd_edge.learners.gradient.epoch import CompiledLoss
from ssd_edge.learners.gradient.network import Pass, layer_name
from ssd_edge.learners.gradient.sdmlp import SDMLPLearner
from ssd_edge.learners.gradient.trainer import LossTerm, TaskLoss
from ssd_edge.learners.priors import Priors


@dataclasses.dataclass(frozen=True)
class Settings(sdmlp.Settings):
    """Settings of SSD's distillation, and of the network and its training."""

    ce_weight: float = setting(0.7, "alpha, of cross-entropy against distillation (Eq. 6)", minimum=0.0, maximum=1.0)
    hidden_weight: float = setting(0.1, "lambda, of hidden against logits (Eq. 6)", minimum=0.0, maximum=1.0)
    temperature: float = setting(8.0, "T of both distillation losses", above=0.0)
    top_n: str = setting("1.0k", "neurons distilled: a number, a multiple of k ('1.0k') or a fraction of r")
    direction: Literal["teacher_student", "student_teacher"] = setting(
        "teacher_student", "of the divergence; Eq. 2-3 print student_teacher, common practice is the other"
    )
    hidden: Literal["kl_softmax", "mse"] = setting("kl_softmax", "loss on the activations")
    logit_scope: Literal["all", "old", "seen"] = setting("all", "which outputs are distilled")
    selection: Literal["frequency", "random", "all"] = setting("frequency", "how the Top-n neurons are chosen")

    def __post_init__(self) -> None:
        """Check fields against each other.

        Raises:
            InputError: top_n is malformed, or fewer neurons than k or more than r.
        """
        super().__post_init__()
        n = parse_top_n(self.top_n, self.k, self.neurons)
        if n < self.k and self.selection != "all":
            raise InputError(f"learner.top_n gives {n} neurons, but must give at least learner.k = {self.k}")


class DistillationLoss(TaskLoss):
    """α·cross-entropy + (1 − α)(λ·hidden distillation + (1 − λ)·logit distillation) (Eq. 6).

    Args:
        settings: settings of SSD.
        targets: answers of the teacher on the task's data.
        slots: per layer, the table column of each neuron, int64 ``(r,)``, or -1.
        outputs: the outputs that are distilled, int64, or None for all.
    """

    def __init__(self, settings: Settings, targets: Targets, slots: list[Tensor], outputs: Tensor | None) -> None:
        self.settings, self.targets, self.slots, self.outputs = settings, targets, slots, outputs
        self.logit_weight = (1 - settings.ce_weight) * (1 - settings.hidden_weight)
        self.hidden_weight = (1 - settings.ce_weight) * settings.hidden_weight

    def terms(self, index: Tensor, labels: Tensor, logits: Tensor, state: Pass) -> list[LossTerm]:
        settings, outputs = self.settings, self.outputs
        loss, gradient = cross_entropy(logits, labels)
        student, teacher = logits, self.targets.logits[index]
        if outputs is not None:
            student, teacher = student[:, outputs], teacher[:, outputs]
        logit_loss, to_logits = divergence(student, teacher, settings.temperature, settings.direction)
        if outputs is not None:
            to_logits = torch.zeros_like(logits).index_add_(1, outputs, to_logits)
        terms = [
            LossTerm("cross_entropy", loss, settings.ce_weight, gradient),
            LossTerm("logit_distillation", logit_loss, self.logit_weight, to_logits),
        ]
        if settings.hidden_weight:
            terms.append(self._hidden(index, state))
        return terms

    def _hidden(self, index: Tensor, state: Pass) -> LossTerm:
        """Return the hidden term: the mean over layers of the loss on the activations of table neurons."""
        settings, layers = self.settings, len(state.activations)
        losses: list[Tensor] = []
        to_activations: list[Tensor] = []
        for activations, slots, targets in zip(state.activations, self.slots, self.targets.hidden, strict=True):
            student, teacher = activations.columns(slots, targets.width), targets.table(index)
            loss, slope = hidden_loss(student, teacher, settings.temperature, settings.hidden, settings.direction)
            losses.append(loss / layers)
            to_activations.append(activations.from_columns(slope / layers, slots))
        return LossTerm("hidden_distillation", sum(losses[1:], losses[0]), self.hidden_weight, None, to_activations)

    def compiled(self) -> CompiledLoss | None:
        settings, targets = self.settings, self.targets
        hidden = settings.hidden_weight > 0
        if settings.direction != "teacher_student" or len(self.slots) > 1 or (hidden and settings.hidden == "mse"):
            return None
        return CompiledLoss(
            cross_entropy=settings.ce_weight,
            logits=targets.logits,
            logit_weight=self.logit_weight,
            outputs=self.outputs,
            hidden=targets.hidden[0] if hidden else None,
            hidden_weight=self.hidden_weight if hidden else 0.0,
            slots=self.slots[0],
            temperature=settings.temperature,
        )


class SSD(SDMLPLearner):
    """SDMLP that distils its previous self, on the Top-n neurons of each hidden layer and on the logits.

    Attributes:
        n: number of neurons in a Top-n table.
        tables: per hidden layer, the neurons that the next task distils.
    """

    name: ClassVar[str] = "ssd"
    display: str = "SSD"
    settings: Settings
    Settings: ClassVar[type] = Settings

    def _configure(self) -> None:
        super()._configure()
        settings = self.settings
        r = settings.neurons
        self.n = r if settings.selection == "all" else parse_top_n(settings.top_n, settings.k, r)

    def _start(self, priors: Priors) -> None:
        super()._start(priors)
        indices, frequencies = torch.arange(self.n, device=self.device), torch.zeros(self.n, device=self.device)
        self.tables = [TopNTable(indices, frequencies) for _ in range(self.settings.layers)]

    def _task_loss(self, inputs: Tensor, labels: Tensor) -> TaskLoss:
        if not self.tasks_learned:
            return TaskLoss()
        # the teacher is the network before its first step on this task
        targets = teacher_targets(self.net, inputs, self.tables)
        slots = [table.slots(self.settings.neurons) for table in self.tables]
        return DistillationLoss(self.settings, targets, slots, self._distilled_outputs(labels))

    def _distilled_outputs(self, labels: Tensor) -> Tensor | None:
        """Return the outputs that are distilled, or None for all."""
        if self.settings.logit_scope == "all":
            return None
        old = (self.seen == 1).nonzero().flatten().to(self.device)
        if self.settings.logit_scope == "old":
            return old
        seen: Tensor = torch.unique(torch.cat([old, labels]))
        return seen

    def _end(self, inputs: Tensor) -> None:
        generator = self.generator(purpose=4)
        self.tables = [
            select((count / len(inputs)).float(), self.n, self.settings.selection, generator)
            for count in count_activations(self.net, inputs)
        ]

    # ── the state ────────────────────────────────────────────────────────────────────────────────────
    def schema(self) -> dict[str, TensorSpec]:
        schema = super().schema()
        for layer in range(self.settings.layers):
            indices, frequencies = layer_name("top_n_indices", layer), layer_name("top_n_frequencies", layer)
            schema[indices] = TensorSpec(
                (self.n,), "uint32", "the neurons that the next task distils", least=0, most=self.settings.neurons - 1
            )
            schema[frequencies] = TensorSpec(
                (self.n,), "float32", "how often each was active in the last task", least=0, most=1
            )
        return schema

    def _tensors(self) -> dict[str, Tensor]:
        tensors = super()._tensors()
        for layer, table in enumerate(self.tables):
            # uint32 only here: PyTorch has few kernels for it
            tensors[layer_name("top_n_indices", layer)] = table.indices.cpu().to(torch.uint32)
            tensors[layer_name("top_n_frequencies", layer)] = table.frequencies
        return tensors

    def _check(self, state: dict[str, Tensor]) -> None:
        super()._check(state)
        for layer in range(self.settings.layers):
            indices = state[layer_name("top_n_indices", layer)].tolist()
            if len(set(indices)) < len(indices):
                raise BundleRefusedError("a neuron is in the Top-n table twice; restore the file")

    def _load(self, tensors: dict[str, Tensor]) -> None:
        super()._load(tensors)
        self.tables = []
        for layer in range(self.settings.layers):
            indices = tensors[layer_name("top_n_indices", layer)].to(torch.int64).to(self.device)
            frequencies = tensors[layer_name("top_n_frequencies", layer)].to(self.device)
            self.tables.append(TopNTable(indices, frequencies))
