"""`finetune`: a ReLU MLP of the same size, trained on each task in turn: the lower bound.

With another schedule and all tasks at once it is `joint`, the panel's upper bound for what a network of this
size can know of these embeddings.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_edge.config import setting
from ssd_edge.errors import InputError
from ssd_edge.learners.base import Learner, Progress, Task, TensorSpec
from ssd_edge.priors import Priors


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the ReLU MLP."""

    neurons: int = setting(1000, "hidden units, as many as SDMLP has", minimum=1, maximum=1_000_000)
    epochs: int = setting(40, "passes over a task", minimum=1)
    min_steps: int = setting(0, "more epochs where a task has fewer steps than this", minimum=0)
    lr: float = setting(0.05, "learning rate; its peak with one_cycle", above=0.0)
    batch: int = setting(128, "samples a step", minimum=1)
    clip: float = setting(1.0, "largest norm of the gradient", above=0.0)
    optimiser: Literal["sgd", "adamw"] = setting("sgd", "plain SGD as SDMLP's; adamw for joint training")
    one_cycle: bool = setting(False, "one-cycle schedule over a task, for joint training")
    weight_decay: float = setting(0.0, "of adamw", minimum=0.0)
    outputs: Literal["announced", "arriving"] = setting("announced", "announced: later classes are negatives too")


# Chosen on a held-out fifth of CIFAR-10's training embeddings, never on test data (docs/method.md).
JOINT = Settings(epochs=20, min_steps=2000, lr=1e-3, batch=256, optimiser="adamw", one_cycle=True, weight_decay=0.05)


class FineTune(Learner):
    """z → ReLU(V z + b) → logits, cross-entropy over all outputs, no protection against forgetting."""

    name: ClassVar[str] = "finetune"
    display: ClassVar[str] = "fine-tuning"
    Settings: ClassVar[type] = Settings

    def __init__(
        self, dim: int, settings: Any, priors: Priors, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__(dim, settings, priors, seed, device)
        generator = self.generator(purpose=1)
        self.hidden_weight = self._uniform(settings.neurons, dim, dim, generator)
        self.hidden_bias = self._uniform(settings.neurons, 1, dim, generator)[:, 0]
        self.output_weight = torch.zeros(0, settings.neurons, device=self.device)
        self.output_bias = torch.zeros(0, device=self.device)
        self.announced = 0

    def _uniform(self, rows: int, columns: int, fan_in: int, generator: torch.Generator) -> Tensor:
        bound = 1.0 / math.sqrt(fan_in)
        return ((torch.rand(rows, columns, generator=generator) * 2 - 1) * bound).to(self.device)

    def expect(self, classes: int) -> None:
        self.announced = classes if self.settings.outputs == "announced" else 0

    def _forward(self, embeddings: Tensor) -> Tensor:
        hidden = F.relu(F.linear(embeddings, self.hidden_weight, self.hidden_bias))
        return F.linear(hidden, self.output_weight, self.output_bias)

    def _learn(self, task: Task, progress: Progress) -> dict[str, float]:
        settings, generator = self.settings, self.generator()
        missing = max(self.announced, int(task.labels.max()) + 1) - len(self.output_bias)
        if missing > 0:
            new = self._uniform(missing, settings.neurons + 1, settings.neurons, self.generator(purpose=2))
            self.output_weight = torch.cat([self.output_weight, new[:, :-1]])
            self.output_bias = torch.cat([self.output_bias, new[:, -1]])
        inputs, labels = task.embeddings.to(self.device), task.labels.to(self.device)
        steps_per_epoch = -(-len(labels) // settings.batch)
        epochs = max(settings.epochs, -(-settings.min_steps // steps_per_epoch))
        parameters = [self.hidden_weight, self.hidden_bias, self.output_weight, self.output_bias]
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimiser: torch.optim.Optimizer
        if settings.optimiser == "sgd":
            optimiser = torch.optim.SGD(parameters, lr=settings.lr)
        else:
            optimiser = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        schedule = None
        if settings.one_cycle:
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimiser, settings.lr, total_steps=epochs * steps_per_epoch, cycle_momentum=False
            )
        mean_loss = math.nan
        try:
            for epoch in range(epochs):
                order = torch.randperm(len(labels), generator=generator).to(self.device)
                total = torch.zeros((), device=self.device)
                for index in order.split(settings.batch):
                    loss = F.cross_entropy(self._forward(inputs[index]), labels[index])
                    optimiser.zero_grad(set_to_none=True)
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
                    optimiser.step()
                    if schedule is not None:
                        schedule.step()
                    total += loss.detach() * len(index)
                mean_loss = float(total) / len(labels)
                if not math.isfinite(mean_loss):
                    raise InputError(f"{self.display} diverged in epoch {epoch + 1}; lower learner.lr ({settings.lr})")
                progress((epoch + 1) / epochs)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
        return {"cross_entropy": mean_loss}

    @torch.no_grad()
    def scores(self, embeddings: Tensor) -> Tensor:
        parts = [self._forward(part.to(self.device)).cpu() for part in embeddings.split(4096)]
        return torch.cat(parts) if parts else torch.zeros(0, len(self.output_bias))

    def schema(self) -> dict[str, TensorSpec]:
        r = self.settings.neurons
        return {
            "hidden_weight": TensorSpec((r, "D"), "float32", "first layer"),
            "hidden_bias": TensorSpec((r,), "float32", "first layer"),
            "output_weight": TensorSpec(("C", r), "float32", "second layer"),
            "output_bias": TensorSpec(("C",), "float32", "second layer"),
            "announced": TensorSpec((1,), "int64", "classes that the stream has announced"),
        }

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "hidden_weight": self.hidden_weight,
            "hidden_bias": self.hidden_bias,
            "output_weight": self.output_weight,
            "output_bias": self.output_bias,
            "announced": torch.tensor([self.announced]),
        }

    def _load(self, tensors: dict[str, Tensor]) -> None:
        self.announced = int(tensors["announced"][0])
        self.hidden_weight = tensors["hidden_weight"].to(self.device)
        self.hidden_bias = tensors["hidden_bias"].to(self.device)
        self.output_weight = tensors["output_weight"].to(self.device)
        self.output_bias = tensors["output_bias"].to(self.device)
