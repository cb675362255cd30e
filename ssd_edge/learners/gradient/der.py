"""`der`: dark experience replay (DER and DER++, Buzzega et al. 2020), here on frozen embeddings.

The memory is a uniform sample of everything taught, drawn by reservoir sampling, with the logits that the network gave
for each sample. A step adds to the cross-entropy of the task α times the mean squared difference of these logits and
today's, and in DER++ β times the cross-entropy of further samples from memory. Samples enter at the end of their task,
with the logits of the network then; in the paper they enter at every step.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_edge.config import setting
from ssd_edge.learners.base import LARGEST_COUNT, TensorSpec
from ssd_edge.learners.gradient import replay
from ssd_edge.learners.gradient.replay import Replay
from ssd_edge.learners.priors import Priors


@dataclasses.dataclass(frozen=True)
class Settings(replay.Settings):
    """Settings of DER."""

    logit_weight: float = setting(0.3, "alpha, weight of the difference of logits", minimum=0.0)
    label_weight: float = setting(0.0, "beta, weight of the labels of replayed samples; above 0: DER++", minimum=0.0)


def reservoir(held: int, offered: int, size: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw the places of new samples in a uniform sample of all (Vitter's Algorithm R).

    Args:
        held: places in use; the others are filled first.
        offered: samples offered before.
        size: number of places.
        count: number of new samples.
        generator: draws the places.

    Returns:
        For each place the new sample that takes it, int64 ``(size,)``, or -1.
    """
    taken = [-1] * size
    drawn = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    for number, share in enumerate(drawn):
        place = held if held < size else int(share * (offered + number + 1))
        held = min(held + 1, size)
        if place < size:
            taken[place] = number
    return torch.tensor(taken)


class DER(Replay):
    """A ReLU MLP with stored samples and their logits.

    Attributes:
        exemplar_logits: logits of the stored samples, ``(memory, C)``.
        offered: number of samples that the memory is drawn from.
    """

    name: ClassVar[str] = "der"
    display: str = "DER (replay)"
    settings: Settings
    Settings: ClassVar[type] = Settings

    def _configure(self) -> None:
        super()._configure()
        self.offered = 0
        if self.settings.label_weight:
            self.display = "DER++ (replay)"

    def _start(self, priors: Priors) -> None:
        super()._start(priors)
        self.exemplar_logits = torch.zeros(self.settings.memory, 0, device=self.device)

    @torch.no_grad()
    def _set_outputs(self, weight: Tensor, bias: Tensor) -> None:
        """Replace the outputs; a new one counts as if it had been there when the samples were stored."""
        super()._set_outputs(weight, bias)
        added = self._forward(self.exemplars)[:, self.exemplar_logits.shape[1] :] * self.kept[:, None]
        self.exemplar_logits = torch.cat([self.exemplar_logits, added], 1)[:, : len(bias)]

    # ── learning ─────────────────────────────────────────────────────────────────────────────────────
    def _loss(self, logits: Tensor, labels: Tensor, index: Tensor) -> dict[str, Tensor]:
        losses, settings = super()._loss(logits, labels, index), self.settings
        drawn = self._drawn(len(labels))
        if not len(drawn):
            return losses
        difference = F.mse_loss(self._forward(self.exemplars[drawn]), self.exemplar_logits[drawn])
        losses["distillation"] = settings.logit_weight * difference
        if settings.label_weight:
            losses["replay"] = settings.label_weight * self._replayed(self._drawn(len(labels)))
        return losses

    @torch.no_grad()
    def _end(self, inputs: Tensor, labels: Tensor) -> None:
        """Offer the samples of the task to the memory, in random order."""
        generator = self.generator(purpose=5)
        order = torch.randperm(len(labels), generator=generator)
        held = int(self.kept.sum())
        taken = reservoir(held, self.offered, self.settings.memory, len(labels), generator)
        places = (taken >= 0).nonzero().flatten().to(self.device)
        samples = order[taken[taken >= 0]].to(self.device)
        self.exemplars[places], self.exemplar_rows[places] = inputs[samples], labels[samples]
        self.exemplar_logits[places] = self._forward(inputs[samples])
        self.offered += len(labels)

    def _drop(self, row: int) -> None:
        others, held = self.kept & (self.exemplar_rows != row), int(self.kept.sum())
        logits = self.exemplar_logits[others]
        super()._drop(row)
        self.exemplar_logits = torch.zeros_like(self.exemplar_logits)
        self.exemplar_logits[: len(logits)] = logits
        self.offered = self.offered * len(logits) // max(held, 1)

    # ── the state ────────────────────────────────────────────────────────────────────────────────────
    def schema(self) -> dict[str, TensorSpec]:
        return {
            **super().schema(),
            "exemplar_logits": TensorSpec((self.settings.memory, "C"), "float32", "REPLAY: their logits when stored"),
            "offered": TensorSpec((1,), "int64", "samples that the memory is drawn from", least=0, most=LARGEST_COUNT),
        }

    def _tensors(self) -> dict[str, Tensor]:
        return {
            **super()._tensors(),
            "exemplar_logits": self.exemplar_logits,
            "offered": torch.tensor([self.offered]),
        }

    def _load(self, tensors: dict[str, Tensor]) -> None:
        super()._load(tensors)
        self.exemplar_logits, self.offered = tensors["exemplar_logits"].to(self.device), int(tensors["offered"][0])
