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
from ssd_edge.learners.gradient.network import SDMLP, Layer, Pass
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
    first_task_weight: Literal["one", "alpha"] = setting("one", "weight of the cross-entropy where there is no teacher")
    direction: Literal["teacher_student", "student_teacher", "symmetric"] = setting(
        "teacher_student", "of the divergence; Eq. 2-3 print student_teacher, practice is the other"
    )
    hidden: Literal["kl_softmax", "mse", "normalised_mse", "cosine"] = setting("kl_softmax", "loss on the activations")
    hidden_source: Literal["after_inhibition", "before_inhibition"] = setting(
        "after_inhibition", "which activations; before it, a step touches all table rows"
    )
    index_mode: Literal["teacher", "student", "rank_matched", "union", "intersection"] = setting(
        "teacher", "whose Top-n neurons: the teacher's on the last task, the student's on the new data, or both"
    )
    logit_scope: Literal["all", "old", "seen"] = setting("all", "which outputs are distilled")
    selection: Literal["frequency", "low_entropy", "class_entropy", "random", "all"] = setting(
        "frequency", "how the Top-n neurons are chosen"
    )
    frequency_source: Literal["end_pass", "running", "gaba_counter"] = setting(
        "end_pass", "where the frequencies come from: one pass at the end of a task, its training, or the counters"
    )
    accumulate_tasks: bool = setting(False, "whether frequencies add up over tasks")
    teacher: Literal["previous", "ema", "first"] = setting("previous", "which former self; the others keep a copy")
    teacher_decay: float = setting(0.5, "of the averaged teacher, per task", minimum=0.0, maximum=1.0)
    student_init: Literal["continue", "pretrained"] = setting("continue", "what a task starts from")

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
        self.accumulated = [torch.zeros(r, dtype=torch.float64, device=self.device) for _ in layers]
        self.accumulated_samples = 0.0
        self.initial = self.net.copy().layers if settings.student_init == "pretrained" else None
        self.kept: SDMLP | None = None  # a teacher that is not the previous self
        self.targets: Targets | None = None

    def _table(self, indices: Tensor, frequencies: Tensor) -> TopNTable:
        return TopNTable(indices.to(self.device), frequencies.to(self.device))

    # ── the teacher ──────────────────────────────────────────────────────────────────────────────────
    def _begin(self, inputs: Tensor, labels: Tensor) -> None:
        settings, net = self.settings, self.net
        teacher = self._teacher()
        if self.tasks_learned and self.initial is not None:
            net.layers = [Layer(layer.keys.clone(), layer.counters.clone()) for layer in self.initial]
            outputs, net.values = net.values.shape[1], net.values[:, :0]
            net.grow(outputs, self.generator(3))
        self.running = [torch.zeros(settings.neurons, dtype=torch.float64, device=self.device) for _ in net.layers]
        self.counters_before = [layer.counters.clone() for layer in net.layers]
        self.targets = None
        if self.tasks_learned:
            self.outputs = self._scope(labels)
            self.teacher_tables, self.student_tables = self._columns(inputs)
            before = settings.hidden_source == "before_inhibition"
            self.targets = teacher_targets(teacher, inputs, self.teacher_tables, before)
            self.slots = [table.slots(settings.neurons) for table in self.student_tables]

    def _teacher(self) -> SDMLP:
        """The former self that teaches, with the student's outputs; those that a kept one never had are 0."""
        net, kept = self.net, self.kept
        if kept is None:  # it has answered before the first step; only another start would change it before
            return net if self.initial is None else net.copy()
        values = F.pad(kept.values, (0, net.values.shape[1] - kept.values.shape[1]))
        teacher = SDMLP(kept.layers, values, net.k, net.switch, net.inhibition, net.decay_epochs)  # unit keys again
        teacher.epochs_done = net.epochs_done
        return teacher

    def _scope(self, labels: Tensor) -> Tensor | None:
        """Which outputs are distilled; None: all."""
        seen = (self.seen == 1).nonzero().flatten().to(self.device)
        if self.settings.logit_scope == "old":
            return seen
        if self.settings.logit_scope == "seen":
            return torch.cat([seen, labels]).unique()
        return None

    def _columns(self, inputs: Tensor) -> tuple[list[TopNTable], list[TopNTable]]:
        """The (teacher's, student's) tables of the neurons to distil, per layer."""
        mode, mine = self.settings.index_mode, self.tables
        if mode == "teacher":
            return mine, mine
        counts = count_activations(self.net, inputs)  # of the student before its first step
        student = [select((count / len(inputs)).float(), self.n) for count in counts]
        if mode == "rank_matched":
            return mine, student
        if mode == "student":
            return student, student
        both = []
        for one, other in zip(mine, student, strict=True):
            if mode == "union":
                indices = torch.cat([one.indices, other.indices]).unique()
            else:  # may be empty: then only the logits are distilled
                indices = one.indices[torch.isin(one.indices, other.indices)]
            both.append(self._table(indices, torch.zeros(len(indices))))
        return both, both

    # ── the losses ───────────────────────────────────────────────────────────────────────────────────
    def _components(self, index: Tensor, x: Tensor, labels: Tensor, logits: Tensor, state: Pass) -> list[Component]:
        settings = self.settings
        loss, gradient = cross_entropy(logits, labels)
        if self.targets is None:
            weight = settings.ce_weight if settings.first_task_weight == "alpha" else 1.0
            return [Component("cross_entropy", loss, weight, gradient)]
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
        if lam and any(len(table.indices) for table in self.student_tables):
            components.append(self._hidden(index, state, (1 - alpha) * lam))
        return components

    def _hidden(self, index: Tensor, state: Pass, weight: float) -> Component:
        """The hidden term: the mean over layers of the distance between table activations."""
        settings, layers = self.settings, len(self.net.layers)
        before, loss = settings.hidden_source == "before_inhibition", 0.0
        to_activations: list[Tensor | None] = [None] * layers
        to_scores: list[tuple[Tensor, Tensor] | None] = [None] * layers
        for layer, (table, activations) in enumerate(zip(self.student_tables, state.activations, strict=True)):
            if not len(table.indices):
                continue
            if before:
                scores = state.inputs[layer] @ self.net.layers[layer].keys[table.indices].T
                answered = scores.clamp_min(0)
            else:
                answered = activations.columns(self.slots[layer], len(table.indices))
            taught = self.targets.hidden[layer].table(index)
            part, slope = hidden_loss(answered, taught, settings.temperature, settings.hidden, settings.direction)
            loss, slope = loss + part / layers, slope / layers
            if before:
                to_scores[layer] = (table.indices, slope * (scores > 0))
            else:
                to_activations[layer] = self._entries(slope, layer, state)
        return Component("hidden_distillation", loss, weight, None, to_activations, to_scores)

    def _entries(self, slope: Tensor, layer: int, state: Pass) -> Tensor:
        """∂L/∂a of table columns ``(B, n)`` as one number per entry of a layer's activations."""
        activations, slots, outside = state.activations[layer], self.slots[layer], slope.shape[1]
        slope = F.pad(slope, (0, 1))  # column n: not in the table
        column = torch.where(slots >= 0, slots, outside)
        return slope[:, column] if activations.is_dense else slope[activations.sample, column[activations.neuron]]

    def _terms(self) -> Terms | None:
        settings, targets = self.settings, self.targets
        if targets is None:
            return Terms(settings.ce_weight if settings.first_task_weight == "alpha" else 1.0)
        alpha, lam = settings.ce_weight, settings.hidden_weight
        hidden = bool(lam and len(self.student_tables[0].indices))
        as_published = settings.hidden == "kl_softmax" and settings.hidden_source == "after_inhibition"
        if settings.direction != "teacher_student" or len(self.slots) > 1 or (hidden and not as_published):
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
    def _observe(self, state: Pass) -> None:
        if self.settings.frequency_source == "running":
            for total, activations in zip(self.running, state.activations, strict=True):
                total += activations.counts()

    def _counted(self, counts: list[Tensor]) -> None:
        if self.settings.frequency_source == "running":
            for total, new in zip(self.running, counts, strict=True):
                total += new

    def _end(self, inputs: Tensor, labels: Tensor) -> None:
        settings, samples = self.settings, float(len(inputs))
        epochs = self.net.epochs_done - self.epochs_before  # fewer than set where the task was stopped
        by_class: list[Tensor | None] = [None] * len(self.net.layers)
        if settings.selection == "class_entropy":
            by_class = count_activations(self.net, inputs, labels, int(labels.max()) + 1)
        if settings.frequency_source == "running":
            counts, samples = self.running, samples * epochs
        elif settings.frequency_source == "gaba_counter":
            layers = zip(self.net.layers, self.counters_before, strict=True)
            counts = [(layer.counters - before).double() for layer, before in layers]
            samples *= epochs
        elif settings.selection == "class_entropy":
            counts = [part.sum(1) for part in by_class]
        else:
            counts = count_activations(self.net, inputs)
        if settings.accumulate_tasks:
            counts = [total + new for total, new in zip(self.accumulated, counts, strict=True)]
            self.accumulated, self.accumulated_samples = counts, self.accumulated_samples + samples
            samples = self.accumulated_samples
        generator = self.generator(purpose=4)
        self.tables = [
            select((count / samples).clamp(0, 1).float(), self.n, settings.selection, classes, generator)
            for count, classes in zip(counts, by_class, strict=True)
        ]
        self.targets = None
        self._keep_teacher()

    def _keep_teacher(self) -> None:
        kind, former = self.settings.teacher, self.kept
        if kind == "previous" or (kind == "first" and former is not None):
            return
        now = self.net.copy()
        if kind == "ema" and former is not None:
            decay = self.settings.teacher_decay
            old = former.values.shape[1]
            now.values[:, :old] = decay * former.values + (1 - decay) * now.values[:, :old]
            for mine, before in zip(now.layers, former.layers, strict=True):
                mine.keys = decay * before.keys + (1 - decay) * mine.keys
                mine.counters = decay * before.counters + (1 - decay) * mine.counters
        self.kept = now

    # ── the state ────────────────────────────────────────────────────────────────────────────────────
    def schema(self) -> dict[str, TensorSpec]:
        r, settings, schema = self.settings.neurons, self.settings, super().schema()
        for layer in range(settings.layers):
            indices, frequencies = name_of("top_n_indices", layer), name_of("top_n_frequencies", layer)
            schema[indices] = TensorSpec((self.n,), "uint32", "the neurons that the next task distils")
            schema[frequencies] = TensorSpec((self.n,), "float32", "how often each was active in the last task")
            if settings.accumulate_tasks:
                reason = "activations over all tasks (accumulate_tasks)"
                schema[name_of("accumulated", layer)] = TensorSpec((r,), "float64", reason)
        if settings.accumulate_tasks:
            schema["accumulated_samples"] = TensorSpec((1,), "float64", "samples behind them")
        if self.initial is not None:
            for name, spec in self._net_schema("initial_").items():
                schema[name] = dataclasses.replace(spec, reason="what every task starts from (student_init)")
        if settings.teacher != "previous":
            kept = {**self._net_schema("teacher_"), "teacher_values": TensorSpec((r, "P"), self.number, "")}
            for name, spec in kept.items():
                schema[name] = dataclasses.replace(spec, reason="the kept teacher (teacher=first or ema)")
        return schema

    def _tensors(self) -> dict[str, Tensor]:
        settings, tensors = self.settings, super()._tensors()
        for layer, table in enumerate(self.tables):
            # few kernels know uint32
            tensors[name_of("top_n_indices", layer)] = table.indices.cpu().to(torch.uint32)
            tensors[name_of("top_n_frequencies", layer)] = table.frequencies
            if settings.accumulate_tasks:
                tensors[name_of("accumulated", layer)] = self.accumulated[layer]
        if settings.accumulate_tasks:
            tensors["accumulated_samples"] = torch.tensor([self.accumulated_samples], dtype=torch.float64)
        if self.initial is not None:
            tensors.update(self._net_tensors("initial_", self.initial))
        if settings.teacher != "previous":
            kept = self.kept
            if kept is None:  # zeros until there is one
                kept = self.net.copy()
                kept.layers = [Layer(layer.keys * 0, layer.counters * 0) for layer in kept.layers]
                kept.values = kept.values[:, :0]
            tensors.update(self._net_tensors("teacher_", kept.layers))
            tensors["teacher_values"] = kept.values
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
            if settings.accumulate_tasks:
                self.accumulated[layer] = tensors[name_of("accumulated", layer)].to(self.device)
        if settings.accumulate_tasks:
            self.accumulated_samples = float(tensors["accumulated_samples"][0])
        if self.initial is not None:
            self.initial = self._net_layers("initial_", tensors)
        if settings.teacher != "previous" and self.tasks_learned:
            self.kept = self.net.copy()
            self.kept.layers = self._net_layers("teacher_", tensors)
            self.kept.values = tensors["teacher_values"].to(self.device)
