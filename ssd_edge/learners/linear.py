"""What closed-form learners share: sufficient statistics of some features, linear values solved from them.

One pass, no epochs, order-invariant up to rounding.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor

from ssd_edge.learners.base import Learner, Progress, Task, TensorSpec
from ssd_edge.priors import Priors
from ssd_edge.statistics import ClassStatistics

NEVER = -1e30  # the bias of a class without samples; −∞ would not be a valid state
BATCH = 4096


class LinearLearner(Learner):
    """Scores are linear in features of the embedding."""

    def __init__(
        self, dim: int, settings: Any, priors: Priors, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__(dim, settings, priors, seed, device)
        self.statistics = ClassStatistics(self.feature_count())
        self.values = torch.zeros(self.feature_count(), 0)
        self.bias = torch.zeros(0)

    def feature_count(self) -> int:
        """F, the number of features."""
        return self.dim

    def features(self, embeddings: Tensor) -> Tensor:
        """Features ``(N, F)`` of embeddings ``(N, D)``."""
        return embeddings

    def observe(self, features: Tensor) -> None:
        """See the features ``(N, F)`` of a part of the task that is being learned."""

    @abc.abstractmethod
    def solve(self) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Values ``(F, C)`` and biases ``(C,)`` from the statistics, and measurements."""

    def _learn(self, task: Task, progress: Progress) -> dict[str, float]:
        self.statistics.grow(int(task.labels.max()) + 1)
        for start in range(0, len(task.labels), BATCH):
            part = slice(start, start + BATCH)
            features = self.features(task.embeddings[part].to(self.device))
            self.observe(features)
            self.statistics.add(features, task.labels[part])
            progress(0.9 * start / len(task.labels))
        values, bias, measured = self.solve()
        # contiguous: another memory order would change the last bits of a product after a restart
        self.values, self.bias = values.float().contiguous(), bias.float().clamp_min(NEVER)
        progress(1.0)
        return measured

    def scores(self, embeddings: Tensor) -> Tensor:
        values, bias = self.values.to(self.device), self.bias.to(self.device)
        parts = [(self.features(part.to(self.device)) @ values + bias).cpu() for part in embeddings.split(BATCH)]
        return torch.cat(parts) if parts else torch.zeros(0, self.values.shape[1])

    def schema(self) -> dict[str, TensorSpec]:
        size = self.feature_count()
        return {
            "counts": TensorSpec(("C",), "float64", "samples seen of each class"),
            "sums": TensorSpec(("C", size), "float64", "sum of the features of each class"),
            "second": TensorSpec(
                (size * (size + 1) // 2,), "float64", "second moments of the features, all classes, upper triangle"
            ),
            "values": TensorSpec((size, "C"), "float32", "solved from the statistics"),
            "bias": TensorSpec(("C",), "float32", "solved from the statistics"),
        }

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.statistics.state(), "values": self.values, "bias": self.bias}

    def _load(self, tensors: dict[str, Tensor]) -> None:
        self.statistics = ClassStatistics.from_state(tensors)
        self.values, self.bias = tensors["values"], tensors["bias"]
