"""Streaming linear discriminant analysis (Hayes & Kanan 2020) with exact statistics: the default learner.

docs/slda.md says what it was measured against, and what each part is worth.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ssd_edge.answers.graph import HeadGraph
from ssd_edge.config import setting
from ssd_edge.learners.base import LARGEST_COUNT, Task, TensorSpec, check_drawn
from ssd_edge.learners.closed_form.discriminant import Discriminant
from ssd_edge.learners.closed_form.linear import (
    BUDGET_CLASSES,
    LIMIT,
    PER_CLASS,
    LinearLearner,
    features_within,
    random_directions,
)
from ssd_edge.learners.closed_form.sums import (
    ClassStatistics,
    check_covariance,
    likeliest_weight,
    shrink,
)
from ssd_edge.learners.priors import Priors

MIN_VARIANCE = 1e-12
ROUNDING = 4e-7  # relative error of float32 second moments, per √D and sample


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of streaming LDA."""

    prior_weight: float = setting(-1.0, "weight of the prior covariance in samples; -1: the most likely", minimum=-1)
    budget_mb: float = setting(16.0, LIMIT, minimum=0.0)
    budget_classes: int = setting(100, BUDGET_CLASSES, minimum=2)
    per_class: bool = setting(False, PER_CLASS)
    second_view: bool = setting(
        False, "learn each image also with its middle enlarged and mirrored; better with few photographs, not for text"
    )


class SLDA(LinearLearner):
    """Linear discriminant analysis with exact, OAS-shrunk pooled covariance.

    The covariance of a backbone's pretraining data is the prior, if the backbone has it. Sums and moments are stored in
    float32, so the state has about 2 D² bytes; an embedding whose state exceeds the budget is projected on as many
    random directions as fit. With `per_class`, moments of `budget_classes` classes have to fit.
    """

    name: ClassVar[str] = "slda"
    display: str = "SLDA"
    panel = True
    candidate = True
    second_views = True
    Settings: ClassVar[type] = Settings
    single: ClassVar[bool] = True

    def _configure(self) -> None:
        settings: Settings = self.settings
        if settings.second_view:
            self.display = "SLDA, two views"
        self.size = self.dim
        if settings.budget_mb:
            self.size = features_within(settings.budget_mb, settings.budget_classes, self.dim, self._schema_of)
        if self.size < self.dim:
            check_drawn(self.dim * self.size, f"{self.size:,} random directions")

    def _start(self, priors: Priors) -> None:
        super()._start(priors)
        self.projection = self._draw()
        self.prior: Tensor | None = None
        self.prior_weight = 0.0
        if priors.within_covariance is not None and self.settings.prior_weight:
            self.prior = torch.from_numpy(priors.within_covariance).float()
            self.prior_weight = self.settings.prior_weight

    def feature_count(self) -> int:
        return self.size

    def _draw(self) -> Tensor:
        return random_directions(self.dim, self.size, self.seed).to(self.device)

    def features(self, embeddings: Tensor) -> Tensor:
        return embeddings @ self.projection if len(self.projection) else embeddings

    def class_statistics(self) -> ClassStatistics | None:
        return self.statistics if self.size == self.dim else None

    def _write_features(self, graph: HeadGraph, x: str) -> str:
        return graph.matmul(x, "projection", self.projection) if len(self.projection) else x

    def solve(self) -> tuple[Tensor, Tensor, dict[str, float]]:
        found, weight = self._discriminant()
        return *found.weights(self.statistics.means, self.statistics.counts), {"prior_weight": weight}

    def held_out_scores(self, task: Task, part: Tensor) -> Tensor:
        means, counts = self.statistics.means, self.statistics.counts
        vectors, apart = self.features(task.embeddings.to(self.device)).cpu(), None
        if self.wants_second_view and task.second is not None:
            second = self.features(task.second.to(self.device)).cpu()
            vectors, apart = (vectors + second) / 2, (vectors - second) / 2
        return self._discriminant()[0].held_out(means, counts, vectors, task.labels, part, apart)

    def _discriminant(self) -> tuple[Discriminant, float]:
        """Return the discriminant, and the weight of the prior covariance in samples."""
        statistics, weight = self.statistics, self.prior_weight
        scatter, freedom = statistics.scatter_within(), statistics.degrees_of_freedom
        if self.prior is not None:
            prior = self.features(self.features(self.prior).mT).mT.double().cpu()
            if weight < 0:
                weight = likeliest_weight(scatter, freedom, shrink(prior, float("inf")))
            scatter.add_(prior, alpha=weight)
        covariance = scatter.div_(max(freedom + weight, 1.0))  # in place: with many features, memory takes the time
        # Rounding the second moments to float32 makes the scatter of nearly equal images indefinite by about this much.
        size, square = len(covariance), float(statistics.second.diagonal().mean()) / max(statistics.total, 1.0)
        rounding = max(ROUNDING * math.sqrt(size) * square, MIN_VARIANCE)
        covariance.diagonal().add_(rounding)
        apart = statistics.sketch
        if apart is not None:
            apart = apart / max(freedom + weight, 1.0)
        return Discriminant.fit(covariance, freedom + weight, apart), weight

    def _common(self) -> dict[str, Any]:
        return {
            **super()._common(),
            "the presence of a prior covariance": self.prior is not None,  # first: then both are compared
            **({} if self.prior is None else {"the prior covariance": self.prior}),
            "the weight of the prior covariance": self.prior_weight,
            **({"the seed of the random directions": self.seed} if self.size < self.dim else {}),
        }

    def _schema_of(self, size: int) -> dict[str, TensorSpec]:
        return {
            **super()._schema_of(size),
            "prior_weight": TensorSpec(
                (1,),
                "float64",
                "weight of the prior in samples; -1: the most likely; 0: none",
                least=-1,
                most=LARGEST_COUNT,
            ),
        }

    def schema(self) -> dict[str, TensorSpec]:
        prior = TensorSpec((self.dim, self.dim), "float32", "within-class covariance from pretraining", shipped=True)
        return super().schema() if self.prior is None else {**super().schema(), "prior": prior}

    def _tensors(self) -> dict[str, Tensor]:
        weight = torch.tensor([self.prior_weight], dtype=torch.float64)
        prior = {} if self.prior is None else {"prior": self.prior}
        return {**super()._tensors(), **prior, "prior_weight": weight}

    def _check(self, state: dict[str, Tensor]) -> None:
        super()._check(state)
        if "prior" in state:
            check_covariance(state["prior"], f"the prior covariance of '{self.name}'")

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state from `state_dict`, with or without a prior covariance."""
        weight = state.get("prior_weight")
        self.prior = None if weight is None or not bool(weight.any()) else torch.zeros(0)  # for the schema
        super().load_state_dict(state)

    def _load(self, tensors: dict[str, Tensor]) -> None:
        super()._load(tensors)
        self.projection = self._draw()
        self.prior, self.prior_weight = tensors.get("prior"), float(tensors["prior_weight"][0])
