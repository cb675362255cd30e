"""Ridge regression on one-hot targets: on the embedding, and on random ReLU features."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ssd_edge.config import setting
from ssd_edge.learners.linear import LinearLearner
from ssd_edge.priors import Priors
from ssd_edge.statistics import ridge


@dataclasses.dataclass(frozen=True)
class RidgeSettings:
    """Nothing to set: the strength is chosen by generalised cross-validation from the statistics."""


class Ridge(LinearLearner):
    """Exact and order-invariant. One-hot targets weigh classes by their size, so a class taught with few
    images beside large ones is hardly ever predicted: for that use `ssd`, `slda` or `ncm`.
    """

    name: ClassVar[str] = "ridge"
    display: ClassVar[str] = "ridge"
    Settings: ClassVar[type] = RidgeSettings

    def solve(self) -> tuple[Tensor, Tensor, dict[str, float]]:
        values, bias, penalty = ridge(self.statistics)
        return values, bias, {"penalty": penalty}


@dataclasses.dataclass(frozen=True)
class RandomProjectionRidgeSettings:
    """Settings of ridge on random features."""

    features: int = setting(2000, "M; the state grows with M²/2", minimum=2, maximum=20000)


class RandomProjectionRidge(Ridge):
    """Ridge on ReLU(z R), R random normal: RanPAC without its fine-tuning (McDonnell et al. 2023).

    R is drawn again from the seed and is not part of the state.
    """

    name: ClassVar[str] = "rp_ridge"
    display: ClassVar[str] = "RanPAC"
    Settings: ClassVar[type] = RandomProjectionRidgeSettings

    def __init__(
        self, dim: int, settings: Any, priors: Priors, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__(dim, settings, priors, seed, device)
        generator = torch.Generator().manual_seed(seed)
        projection = torch.randn(dim, settings.features, generator=generator) / math.sqrt(dim)
        self.projection = projection.to(self.device)

    def feature_count(self) -> int:
        return self.settings.features

    def features(self, embeddings: Tensor) -> Tensor:
        return (embeddings @ self.projection).clamp_min(0)
