"""`pmr`: replay of the samples closest to prototypes (PMR, Ho et al. 2023).

A class's prototype is its mean feature in the network of the moment, so it moves with the network. After each task the
prototypes are computed again, and of every class the samples closest to its prototype stay in memory. During a task
each step also takes as many samples from memory as from the task. A sample is answered with the nearest prototype of
what is kept. The paper's network is meta-learned on text; here only its memory is repeated, on the MLP of the other
baselines.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ssd_edge.learners.gradient.icarl import ICaRL
from ssd_edge.learners.gradient.replay import Replay


class PMR(ICaRL):
    """A ReLU MLP with replay of the samples closest to prototypes."""

    name: ClassVar[str] = "pmr"
    display: str = "PMR (replay)"
    pooled: ClassVar[bool] = False

    def _begin(self, inputs: Tensor, labels: Tensor) -> None:
        Replay._begin(self, inputs, labels)

    def _loss(self, logits: Tensor, labels: Tensor, index: Tensor) -> dict[str, Tensor]:
        losses = {"cross_entropy": F.cross_entropy(logits, labels)}
        drawn = self._drawn(len(labels))
        if len(drawn):
            losses["replay"] = self._replayed(drawn)
        return losses

    def _end(self, inputs: Tensor, labels: Tensor) -> None:
        """Keep nothing of the task but its exemplars."""

    def _choose(self, embeddings: Tensor, labels: Tensor, fresh: list[int], share: int) -> None:
        super()._choose(embeddings, labels, [*fresh, *self.mean_rows.tolist()], share)

    def _order(self, features: Tensor, count: int) -> Tensor:
        """Choose the samples closest to their mean; the closest is first."""
        distances = (features - features.mean(0)).square().sum(1)
        return distances.argsort(stable=True)[:count]
