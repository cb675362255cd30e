"""KLDA (Momeni, Mazumder & Liu 2024, arXiv 2412.15571): linear discriminant analysis on random Fourier features."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from ssd_edge.answers.graph import HeadGraph
from ssd_edge.config import setting
from ssd_edge.learners.closed_form.discriminant import Discriminant
from ssd_edge.learners.closed_form.linear import BUDGET_CLASSES, PER_CLASS
from ssd_edge.learners.closed_form.ranpac import BUDGET, FEATURES, MOST_FEATURES, RanPAC

FARTHEST = 100.0  # phase: beyond, rounding of float32 would decide; those of real embeddings are below 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of KLDA."""

    features: int = setting(2000, FEATURES, minimum=2, maximum=MOST_FEATURES)
    bandwidth: float = setting(
        0.2, "deviation of the frequencies, relative to 1/√D; smaller is closer to slda", above=0.0
    )
    per_class: bool = setting(False, PER_CLASS)
    budget_mb: float = setting(0.0, BUDGET, minimum=0.0)
    budget_classes: int = setting(100, BUDGET_CLASSES, minimum=2)


class KLDA(RanPAC):
    """Linear discriminant analysis on cos(z R) and sin(z R), which approximate an RBF kernel, with R random normal.

    R is drawn from the seed and not part of the state. As features of a standardised embedding have a mean square of 1,
    two embeddings are √(2D) apart, so that the width of the kernel follows from their dimension.
    """

    name: ClassVar[str] = "klda"
    display: str = "KLDA"
    candidate = False  # `ranpac` and `slda` are tried
    Settings: ClassVar[type] = Settings

    def feature_count(self) -> int:
        count: int = super().feature_count()
        return count // 2 * 2  # pairs

    def _draw(self) -> Tensor:
        """Return R ``(D, M/2)``."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(self.dim, self.feature_count() // 2, generator=generator)
        bandwidth: float = self.settings.bandwidth
        return (drawn * (bandwidth / math.sqrt(self.dim))).to(self.device)

    def _scale(self) -> float:
        """Return the factor that gives all features of an embedding together unit length."""
        return math.sqrt(2 / self.feature_count())

    def features(self, embeddings: Tensor) -> Tensor:
        phases = (embeddings @ self.projection).clamp(-FARTHEST, FARTHEST)
        return torch.cat([phases.cos(), phases.sin()], 1) * self._scale()

    def _write_features(self, graph: HeadGraph, x: str) -> str:
        phases = graph.matmul(x, "projection", self.projection)
        phases = graph.add("Clip", phases, graph.scalar(-FARTHEST), graph.scalar(FARTHEST))
        waves = graph.add("Concat", graph.add("Cos", phases), graph.add("Sin", phases), axis=1)
        return graph.add("Mul", waves, graph.scalar(self._scale()))

    def solve(self) -> tuple[Tensor, Tensor, dict[str, float]]:
        statistics = self.statistics
        found = Discriminant.fit(statistics.within_covariance(), statistics.degrees_of_freedom)
        return *found.weights(statistics.means, statistics.counts), {}
