"""RanPAC without its fine-tuning (McDonnell et al. 2023): ridge regression on random ReLU features."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ssd_edge.config import setting
from ssd_edge.errors import InputError
from ssd_edge.learners.base import BASE_SCHEMA, DTYPES, HeadGraph, TensorSpec
from ssd_edge.learners.closed_form.linear import PER_CLASS
from ssd_edge.learners.closed_form.ridge import STRENGTH, Ridge
from ssd_edge.learners.priors import Priors

MOST_FEATURES = 20000


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of ridge on random features."""

    features: int = setting(2000, "M; the state grows with M²/2", minimum=2, maximum=MOST_FEATURES)
    strength: float = setting(0.0, STRENGTH, minimum=0.0)
    per_class: bool = setting(False, PER_CLASS)
    budget_mb: float = setting(
        0.0,
        "most MB that the state may take at budget_classes; the number of features follows; 0: features as given",
        minimum=0.0,
    )
    budget_classes: int = setting(100, "classes for which the budget must hold", minimum=2)


class RanPAC(Ridge):
    """Ridge on ReLU(z R), R random normal: RanPAC without its fine-tuning (McDonnell et al. 2023).

    R is drawn again from the seed and is not part of the state. With a memory budget there are as many features,
    up to 20,000, as a state of `budget_classes` classes has room for; 1 MB is a million bytes.

    Raises:
        InputError: the budget has no room for two features.
    """

    name: ClassVar[str] = "ranpac"
    display: str = "RanPAC"
    Settings: ClassVar[type] = Settings

    def __init__(
        self, dim: int, settings: Any, priors: Priors, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__(dim, settings, priors, seed, device)
        generator = torch.Generator().manual_seed(seed)
        projection = torch.randn(dim, self.feature_count(), generator=generator) / math.sqrt(dim)
        self.projection = projection.to(self.device)

    def feature_count(self) -> int:
        settings = self.settings
        if not settings.budget_mb:
            return settings.features
        least, most = 2, MOST_FEATURES
        if self._bytes(least) > settings.budget_mb * 1e6:
            raise InputError(
                f"learner.budget_mb {settings.budget_mb:g} has no room for two features and {settings.budget_classes} "
                f"classes, which take {self._bytes(least) / 1e6:g} MB; raise it or lower learner.budget_classes"
            )
        while least < most:
            middle = (least + most + 1) // 2
            if self._bytes(middle) <= settings.budget_mb * 1e6:
                least = middle
            else:
                most = middle - 1
        return least

    def _bytes(self, features: int) -> int:
        """Bytes of the whole state with so many features, after `budget_classes` classes."""
        sizes: dict[str | int, int] = {"C": self.settings.budget_classes, "S": self.settings.budget_classes}

        def size(spec: TensorSpec) -> int:
            return DTYPES[spec.dtype].itemsize * math.prod(sizes.get(part, part) for part in spec.shape)

        return sum(map(size, {**BASE_SCHEMA, **self._schema_of(features)}.values()))

    def features(self, embeddings: Tensor) -> Tensor:
        return (embeddings @ self.projection).clamp_min(0)

    def _write_features(self, graph: HeadGraph, x: str) -> str:
        return graph.add("Relu", graph.matmul(x, "projection", self.projection))

    def _common(self) -> dict[str, Any]:
        return {**super()._common(), "the seed of the random features": self.seed}
