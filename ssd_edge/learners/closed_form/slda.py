"""Streaming linear discriminant analysis (Hayes & Kanan 2020) with exact statistics."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from ssd_edge.config import setting
from ssd_edge.learners.base import LARGEST_COUNT, TensorSpec
from ssd_edge.learners.closed_form.linear import PER_CLASS, LinearLearner
from ssd_edge.learners.closed_form.sums import check_covariance, discriminant, likeliest_weight, shrink
from ssd_edge.learners.priors import Priors


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of streaming LDA."""

    prior_weight: float = setting(-1.0, "weight of the prior covariance in samples; -1: the most likely", minimum=-1)
    per_class: bool = setting(False, PER_CLASS)


class SLDA(LinearLearner):
    """Linear discriminant analysis with exact, OAS-shrunk pooled covariance and the pretraining covariance as prior."""

    name: ClassVar[str] = "slda"
    display: str = "SLDA"
    panel = True
    candidate = True
    Settings: ClassVar[type] = Settings

    def _start(self, priors: Priors) -> None:
        super()._start(priors)
        self.prior, self.prior_weight = torch.zeros(self.dim, self.dim), 0.0
        if priors.within_covariance is not None:
            self.prior = torch.from_numpy(priors.within_covariance).float()
            self.prior_weight = self.settings.prior_weight

    def solve(self) -> tuple[Tensor, Tensor, dict[str, float]]:
        statistics = self.statistics
        scatter, weight = statistics.scatter_within(), self.prior_weight
        freedom = statistics.degrees_of_freedom
        if weight < 0:
            weight = likeliest_weight(scatter, freedom, shrink(self.prior.double(), float("inf")))
        covariance = (scatter + weight * self.prior.double()) / max(freedom + weight, 1.0)
        values, bias = discriminant(statistics.means, statistics.counts, covariance, freedom + weight)
        return values, bias, {"prior_weight": weight}

    def _common(self) -> dict[str, Any]:
        weight = {"the weight of the prior covariance": self.prior_weight}
        return {**super()._common(), "the prior covariance": self.prior, **weight}

    def schema(self) -> dict[str, TensorSpec]:
        return {
            **super().schema(),
            "prior": TensorSpec(
                (self.dim, self.dim), "float32", "within-class covariance from pretraining", shipped=True
            ),
            "prior_weight": TensorSpec(
                (1,), "float64", "weight of the prior in samples; -1: the most likely", least=-1, most=LARGEST_COUNT
            ),
        }

    def _tensors(self) -> dict[str, Tensor]:
        weight = torch.tensor([self.prior_weight], dtype=torch.float64)
        return {**super()._tensors(), "prior": self.prior, "prior_weight": weight}

    def _check(self, state: dict[str, Tensor]) -> None:
        super()._check(state)
        check_covariance(state["prior"], f"the prior covariance of '{self.name}'")

    def _load(self, tensors: dict[str, Tensor]) -> None:
        super()._load(tensors)
        self.prior, self.prior_weight = tensors["prior"], float(tensors["prior_weight"][0])
