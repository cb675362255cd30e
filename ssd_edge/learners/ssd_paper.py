"""`ssd-paper`: Algorithm 1 of the SSD paper (arXiv 2512.15267) to the letter, every reading switchable.

What the paper leaves open, the evidence for each reading and what it is worth: docs/method.md.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_edge.config import setting
from ssd_edge.distillation import (
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
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.learners import sdmlp
from ssd_edge.learners.base import TensorSpec
from ssd_edge.learners.sdmlp import SDMLPLearner
from ssd_edge.priors import Priors
from ssd_edge.sdmlp import SDMLP
from ssd_edge.topk import Activations


@dataclasses.dataclass(frozen=True)
class Settings(sdmlp.Settings):
    """Settings of SSD, beyond SDMLP's."""

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


class SSDPaper(SDMLPLearner):
    """SDMLP distilled from its previous self on the Top-n neurons and on the logits."""

    name: ClassVar[str] = "ssd-paper"
    display: ClassVar[str] = "SSD (paper)"
    Settings: ClassVar[type] = Settings

    def __init__(
        self, dim: int, settings: Any, priors: Priors, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__(dim, settings, priors, seed, device)
        r = settings.neurons
        self.n = r if settings.selection == "all" else parse_top_n(settings.top_n, settings.k, r)
        self.table = TopNTable(torch.arange(self.n, device=self.device), torch.zeros(self.n, device=self.device))
        self.accumulated = torch.zeros(r, dtype=torch.float64, device=self.device)
        self.accumulated_samples = 0.0
        net = self.net
        self.initial = (net.keys.clone(), net.counters.clone()) if settings.student_init == "pretrained" else None
        self.copy: tuple[Tensor, Tensor, Tensor] | None = None  # keys, values, counters of a kept teacher
        self.targets: Targets | None = None

    # ── the teacher ──────────────────────────────────────────────────────────────────────────────────
    def _begin(self, inputs: Tensor, labels: Tensor) -> None:
        settings, net = self.settings, self.net
        teacher = self._teacher()
        if self.tasks_learned and self.initial is not None:
            net.keys, net.counters = self.initial[0].clone(), self.initial[1].clone()
            outputs, net.values = net.values.shape[1], net.values[:, :0]
            net.grow(outputs, self.generator(3))
        self.running = torch.zeros(settings.neurons, dtype=torch.float64, device=self.device)
        self.counters_before = net.counters.clone()
        self.targets = None
        if self.tasks_learned:
            self.outputs = self._scope(labels)
            self.teacher_table, self.student_table = self._columns(inputs)
            before = settings.hidden_source == "before_inhibition"
            self.targets = teacher_targets(teacher, inputs, self.teacher_table, before)
            self.slots = self.student_table.slots(settings.neurons)

    def _teacher(self) -> SDMLP:
        """The former self that teaches, with the student's outputs; those that a kept one never had are 0."""
        net = self.net
        if self.copy is None:
            return copy.copy(net)
        keys, values, counters = self.copy
        return SDMLP(keys, F.pad(values, (0, net.values.shape[1] - values.shape[1])), counters, net.k, net.switch)

    def _scope(self, labels: Tensor) -> Tensor | None:
        """Which outputs are distilled; None: all."""
        seen = (self.seen == 1).nonzero().flatten().to(self.device)
        if self.settings.logit_scope == "old":
            return seen
        if self.settings.logit_scope == "seen":
            return torch.cat([seen, labels]).unique()
        return None

    def _columns(self, inputs: Tensor) -> tuple[TopNTable, TopNTable]:
        """The (teacher's, student's) tables of the neurons to distil."""
        mode, mine = self.settings.index_mode, self.table
        if mode == "teacher":
            return mine, mine
        counts = count_activations(self.net, inputs)  # of the student before its first step
        student = select((counts / len(inputs)).float(), self.n)
        if mode == "rank_matched":
            return mine, student
        if mode == "student":
            return student, student
        if mode == "union":
            indices = torch.cat([mine.indices, student.indices]).unique()
        else:  # may be empty: then only the logits are distilled
            indices = mine.indices[torch.isin(mine.indices, student.indices)]
        table = TopNTable(indices, torch.zeros(len(indices), device=self.device))
        return table, table

    # ── the losses ───────────────────────────────────────────────────────────────────────────────────
    def _gradients(
        self, index: Tensor, x: Tensor, labels: Tensor, logits: Tensor, activations: Activations
    ) -> tuple[dict[str, Any], Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        settings = self.settings
        loss, gradient = cross_entropy(logits, labels)
        if self.targets is None:
            weight = settings.ce_weight if settings.first_task_weight == "alpha" else 1.0
            return {"cross_entropy": loss}, weight * gradient, None, None
        alpha, lam = settings.ce_weight, settings.hidden_weight
        picked, wanted = logits, self.targets.logits[index]
        if self.outputs is not None:
            picked, wanted = picked[:, self.outputs], wanted[:, self.outputs]
        logit_loss, to_logits = divergence(picked, wanted, settings.temperature, settings.direction)
        to_logits = (1 - alpha) * (1 - lam) * to_logits
        if self.outputs is None:
            total = alpha * gradient + to_logits
        else:
            total = (alpha * gradient).index_add(1, self.outputs, to_logits)
        losses = {"cross_entropy": loss, "logit_distillation": logit_loss}
        table, taught = self.student_table, self.targets.table(index)
        if lam == 0 or not len(table.indices):
            return losses, total, None, None
        weight = (1 - alpha) * lam
        if settings.hidden_source == "before_inhibition":
            scores = x @ self.net.keys[table.indices].T
            hidden, slope = hidden_loss(
                scores.clamp_min(0), taught, settings.temperature, settings.hidden, settings.direction
            )
            losses["hidden_distillation"] = hidden
            return losses, total, None, (table.indices, weight * slope * (scores > 0))
        answered = activations.columns(self.slots, len(table.indices))
        hidden, slope = hidden_loss(answered, taught, settings.temperature, settings.hidden, settings.direction)
        losses["hidden_distillation"] = hidden
        slope = torch.cat([weight * slope, slope.new_zeros(len(slope), 1)], dim=1)  # column n: not in the table
        if activations.is_dense:
            column = torch.where(self.slots >= 0, self.slots, len(table.indices))
            return losses, total, slope[:, column], None
        column = self.slots[activations.neuron]
        column = torch.where(column >= 0, column, len(table.indices))
        return losses, total, slope[activations.sample, column], None

    # ── after a task ─────────────────────────────────────────────────────────────────────────────────
    def _observe(self, activations: Activations) -> None:
        if self.settings.frequency_source == "running":
            self.running += activations.counts()

    def _end(self, inputs: Tensor, labels: Tensor) -> None:
        settings, by_class = self.settings, None
        samples = float(len(inputs))
        if settings.frequency_source == "running":
            counts, samples = self.running, samples * settings.epochs
        elif settings.frequency_source == "gaba_counter":
            counts, samples = (self.net.counters - self.counters_before).double(), samples * settings.epochs
        elif settings.selection == "class_entropy":
            by_class = count_activations(self.net, inputs, labels, int(labels.max()) + 1)
            counts = by_class.sum(1)
        else:
            counts = count_activations(self.net, inputs)
        if settings.selection == "class_entropy" and by_class is None:
            by_class = count_activations(self.net, inputs, labels, int(labels.max()) + 1)
        if settings.accumulate_tasks:
            self.accumulated += counts
            self.accumulated_samples += samples
            counts, samples = self.accumulated, self.accumulated_samples
        frequencies = (counts / samples).clamp(0, 1).float()
        self.table = select(frequencies, self.n, settings.selection, by_class, self.generator(purpose=4))
        self.targets = None
        self._keep_teacher()

    def _keep_teacher(self) -> None:
        net, kind = self.net, self.settings.teacher
        if kind == "previous" or (kind == "first" and self.copy is not None):
            return
        now = (net.keys.clone(), net.values.clone(), net.counters.clone())
        if kind == "ema" and self.copy is not None:
            decay, missing = self.settings.teacher_decay, net.values.shape[1] - self.copy[1].shape[1]
            values = torch.cat([self.copy[1], now[1][:, net.values.shape[1] - missing :]], dim=1)
            former = (self.copy[0], values, self.copy[2])
            now = tuple(decay * a + (1 - decay) * b for a, b in zip(former, now, strict=True))
        self.copy = now

    # ── the state ────────────────────────────────────────────────────────────────────────────────────
    @property
    def top_n(self) -> TopNTable:
        """The neurons that the next task distils."""
        return TopNTable(self.table.indices.cpu(), self.table.frequencies.cpu())

    def schema(self) -> dict[str, TensorSpec]:
        r, settings = self.settings.neurons, self.settings
        number = str(self.dtype).removeprefix("torch.")
        schema = {
            **super().schema(),
            "top_n_indices": TensorSpec((self.n,), "uint32", "the neurons that the next task distils"),
            "top_n_frequencies": TensorSpec((self.n,), "float32", "how often each was active in the last task"),
        }
        if settings.accumulate_tasks:
            schema["accumulated"] = TensorSpec((r,), "float64", "activations over all tasks (accumulate_tasks)")
            schema["accumulated_samples"] = TensorSpec((1,), "float64", "samples behind them")
        if self.initial is not None:
            schema["initial_keys"] = TensorSpec((r, "D"), number, "what every task starts from (student_init)")
            schema["initial_counters"] = TensorSpec((r,), number, "their GABA counters")
        if settings.teacher != "previous":
            schema["teacher_keys"] = TensorSpec((r, "D"), number, "the kept teacher (teacher=first or ema)")
            schema["teacher_values"] = TensorSpec((r, "P"), number, "its values")
            schema["teacher_counters"] = TensorSpec((r,), number, "its GABA counters")
        return schema

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            **super()._tensors(),
            "top_n_indices": self.table.indices.cpu().to(torch.uint32),  # few kernels know uint32
            "top_n_frequencies": self.table.frequencies,
        }
        if self.settings.accumulate_tasks:
            tensors["accumulated"] = self.accumulated
            tensors["accumulated_samples"] = torch.tensor([self.accumulated_samples], dtype=torch.float64)
        if self.initial is not None:
            tensors["initial_keys"], tensors["initial_counters"] = self.initial
        if self.settings.teacher != "previous":
            net = self.net
            empty = (torch.zeros_like(net.keys), net.values[:, :0], torch.zeros_like(net.counters))
            names = ("teacher_keys", "teacher_values", "teacher_counters")
            tensors.update(zip(names, self.copy or empty, strict=True))
        return tensors

    def _load(self, tensors: dict[str, Tensor]) -> None:
        super()._load(tensors)
        indices = tensors["top_n_indices"].to(torch.int64)
        if len(indices) and int(indices.max()) >= self.settings.neurons:
            raise BundleRefusedError(
                f"the Top-n table names neuron {int(indices.max())}, but there are {self.settings.neurons}"
            )
        self.table = TopNTable(indices.to(self.device), tensors["top_n_frequencies"].to(self.device))
        if self.settings.accumulate_tasks:
            self.accumulated = tensors["accumulated"].to(self.device)
            self.accumulated_samples = float(tensors["accumulated_samples"][0])
        if self.initial is not None:
            self.initial = (tensors["initial_keys"].to(self.device), tensors["initial_counters"].to(self.device))
        if self.settings.teacher != "previous" and self.tasks_learned:
            self.copy = tuple(
                tensors[name].to(self.device) for name in ("teacher_keys", "teacher_values", "teacher_counters")
            )
