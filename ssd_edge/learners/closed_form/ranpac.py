"""RanPAC without its fine-tuning (McDonnell et al. 2023): ridge regression on random ReLU features."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ssd_edge.answers.graph import HeadGraph
from ssd_edge.config import setting
from ssd_edge.learners.base import check_drawn
from ssd_edge.learners.closed_form.linear import BUDGET_CLASSES, PER_CLASS, features_within
from ssd_edge.learners.closed_form.ridge import STRENGTH, Ridge
from ssd_edge.learners.priors import Priors

MOST_FEATURES = 20000
FEATURES = "number of random features M; the state grows with M²/2"
BUDGET = "size limit of the state in MB at budget_classes, from which M follows; 0: use features"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of RanPAC."""

    features: int = setting(2000, FEATURES, minimum=2, maximum=MOST_FEATURES)
    strength: float = setting(0.0, STRENGTH, minimum=0.0)
    per_class: bool = setting(False, PER_CLASS)
    budget_mb: float = setting(0.0, BUDGET, minimum=0.0)
    budget_classes: int = setting(100, BUDGET_CLASSES, minimum=2)


class RanPAC(Ridge):
    """Ridge regression on ReLU(z R) with R random normal.

    R is drawn from the seed and not part of the state. With a memory budget, the number of features is the largest, up
    to 20,000, whose state fits for `budget_classes` classes; 1 MB is a million bytes.

    Raises:
        InputError: the budget is too small for two features.
    """

    name: ClassVar[str] = "ranpac"
    display: str = "RanPAC"
    Settings: ClassVar[type] = Settings

    def _configure(self) -> None:
        check_drawn(self.dim * self.feature_count(), f"the weights of {self.feature_count():,} features")

    def _start(self, priors: Priors) -> None:
        super()._start(priors)
        self.projection = self._draw()

    def _draw(self) -> Tensor:
        """Return R ``(D, M)``."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(self.dim, self.feature_count(), generator=generator)
        return (drawn / math.sqrt(self.dim)).to(self.device)

    def feature_count(self) -> int:
        settings: Settings = self.settings
        if not settings.budget_mb:
            return settings.features
        return features_within(settings.budget_mb, settings.budget_classes, MOST_FEATURES, self._schema_of)

    def features(self, embeddings: Tensor) -> Tensor:
        return (embeddings @ self.projection).clamp_min(0)

    def _write_features(self, graph: HeadGraph, x: str) -> str:
        return graph.add("Relu", graph.matmul(x, "projection", self.projection))

    def _load(self, tensors: dict[str, Tensor]) -> None:
        super()._load(tensors)
        self.projection = self._draw()

    def _common(self) -> dict[str, Any]:
        return {**super()._common(), "the seed of the random features": self.seed}
