"""Nearest class mean by cosine similarity: the smallest learner, and the best one with five images per class."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from ssd_edge.answers.graph import HeadGraph
from ssd_edge.learners.base import Learner, Progress, Task, TensorSpec
from ssd_edge.learners.closed_form.linear import COUNTS
from ssd_edge.learners.closed_form.sums import ClassStatistics, check_seen, check_sums, counts_without
from ssd_edge.learners.priors import Priors


@dataclasses.dataclass(frozen=True)
class Settings:
    """NCM has no settings."""


class NCM(Learner):
    """Nearest class mean, argmax_c cos(z, μ_c), on embeddings centred by the pretraining mean.

    Classes are removed and joined exactly and learners merged and subtracted exactly: each class has its own count and
    sum.
    """

    name: ClassVar[str] = "ncm"
    display: str = "NCM"
    family = "closed form"
    panel = True
    candidate = True
    removal = "exact"
    Settings: ClassVar[type] = Settings

    def _start(self, priors: Priors) -> None:
        self.counts = torch.zeros(0, dtype=torch.float64)
        self.sums = torch.zeros(0, self.dim, dtype=torch.float64)

    def _learn(self, task: Task, progress: Progress) -> dict[str, float]:
        labels = task.labels.cpu()
        self._grow(int(labels.max()) + 1)
        self.counts += torch.bincount(labels, minlength=len(self.counts))
        self.sums.index_add_(0, labels, task.embeddings.cpu().double())
        progress(1.0)
        return {}

    def sums_of(self, task: Task) -> ClassStatistics:
        sums = ClassStatistics(self.dim)
        sums.add(task.embeddings, task.labels)
        return sums

    def _grow(self, classes: int) -> None:
        missing = max(classes - len(self.counts), 0)
        self.counts = torch.cat([self.counts, self.counts.new_zeros(missing)])
        self.sums = torch.cat([self.sums, self.sums.new_zeros(missing, self.dim)])

    def _remove(self, row: int, approximately: bool) -> bool:
        self.counts[row], self.sums[row] = 0.0, 0.0
        return True

    def _join(self, row: int, into: int) -> None:
        for kept in (self.counts, self.sums):
            kept[into] += kept[row]
            kept[row] = 0.0

    def _common(self) -> dict[str, Any]:
        return self._shared_settings()

    def _hold(self, sums: dict[str, Tensor]) -> None:
        self.counts, self.sums = sums["counts"].clone(), sums["sums"].clone()

    def _merge(self, other: NCM, rows: Tensor) -> None:
        self._grow(int(rows.max()) + 1 if len(rows) else 0)
        self.counts.index_add_(0, rows, other.counts)
        self.sums.index_add_(0, rows, other.sums)

    def _subtract(self, other: NCM, rows: Tensor) -> Tensor:
        known = other.counts > 0
        self.counts = counts_without(self.counts, other.counts[known], rows[known])
        self.sums = self.sums.index_add(0, rows[known], -other.sums[known])
        self.sums[self.counts == 0] = 0.0  # rounding would leave a residue
        return self.counts

    def scores(self, embeddings: Tensor) -> Tensor:
        return torch.nn.functional.normalize(embeddings.cpu()) @ self._unit_means().T

    def write_head(self, graph: HeadGraph, x: str) -> str:
        return graph.matmul(graph.unit(x), "means", self._unit_means().T)

    def _unit_means(self) -> Tensor:
        """Class means of unit length, float32 ``(C, D)``; zero for a class without samples."""
        return torch.nn.functional.normalize((self.sums / self.counts.clamp_min(1)[:, None]).float())

    def schema(self) -> dict[str, TensorSpec]:
        return {
            "counts": COUNTS,
            "sums": TensorSpec(("C", "D"), "float64", "sum of the embeddings of each class", adds=True),
        }

    def _tensors(self) -> dict[str, Tensor]:
        return {"counts": self.counts, "sums": self.sums}

    def _check(self, state: dict[str, Tensor]) -> None:
        check_seen(state, self.name)
        check_sums(state["counts"], state["sums"])

    def _load(self, tensors: dict[str, Tensor]) -> None:
        self.counts, self.sums = tensors["counts"], tensors["sums"]
