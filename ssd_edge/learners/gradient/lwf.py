"""`lwf`: fine-tuning with distillation of its old outputs on the new data (Li and Hoiem 2016).

"Learning without Forgetting": before the first step of a task, the network's logits for the classes taught before are
computed once on the task's own embeddings. During the task α·T²·KL(softmax(old/T) ‖ softmax(new/T)) over these outputs
is added to the cross-entropy. The teacher's logits are discarded after the task.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_edge.config import setting
from ssd_edge.learners.gradient import finetune
from ssd_edge.learners.gradient.finetune import FineTune


@dataclasses.dataclass(frozen=True)
class Settings(finetune.Settings):
    """Settings of LwF."""

    distillation_weight: float = setting(1.0, "alpha, weight of distillation relative to cross-entropy", minimum=0.0)
    temperature: float = setting(2.0, "T of the distillation, as published", above=0.0)


class LwF(FineTune):
    """A ReLU MLP with cross-entropy on all outputs and distillation on those of classes taught before."""

    name: ClassVar[str] = "lwf"
    display: str = "LwF"
    baseline = False
    with_penalty: ClassVar[str] = "LwF+{}"
    settings: Settings
    Settings: ClassVar[type] = Settings

    def _configure(self) -> None:
        super()._configure()
        self.old = torch.zeros(0, dtype=torch.int64, device=self.device)  # (O,), classes taught before this task
        self.targets = torch.zeros(0, 0, device=self.device)  # (N, O), their logits before this task

    @torch.no_grad()
    def _begin(self, inputs: Tensor, labels: Tensor) -> None:
        self.old = self.seen.nonzero().flatten().to(self.device)
        self.targets = torch.cat([self._forward(part)[:, self.old] for part in torch.split(inputs, 4096)])

    def _loss(self, logits: Tensor, labels: Tensor, index: Tensor) -> dict[str, Tensor]:
        losses = super()._loss(logits, labels, index)
        if len(self.old):
            temperature = self.settings.temperature
            log_new = (logits[:, self.old] / temperature).log_softmax(1)
            log_old = (self.targets[index] / temperature).log_softmax(1)
            divergence = F.kl_div(log_new, log_old, reduction="batchmean", log_target=True)
            losses["distillation"] = self.settings.distillation_weight * temperature**2 * divergence
        return losses

    def _end(self, inputs: Tensor, labels: Tensor) -> None:
        self.targets = self.targets[:0]
