"""FeCAM (Goswami et al. 2023): nearest class mean by the Mahalanobis distance of each class.

Each class has its own count, sum and second moments: classes are removed and joined exactly, learners are merged and
subtracted exactly, and no class affects another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_edge.answers.graph import HeadGraph
from ssd_edge.config import setting
from ssd_edge.errors import InputError
from ssd_edge.learners.base import Learner, Progress, Task, TensorSpec, check_drawn
from ssd_edge.learners.closed_form.linear import (
    BATCH,
    BUDGET_CLASSES,
    LIMIT,
    NEVER,
    features_within,
    random_directions,
    statistics_schema,
)
from ssd_edge.learners.closed_form.sums import ClassStatistics, check_seen
from ssd_edge.learners.priors import Priors

JITTER = 1e-7  # on the diagonal of correlation matrices, which can be singular, e.g. with two samples


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of FeCAM."""

    shrink_diagonal: float = setting(1.0, "γ1, factor of the mean variance added to the diagonal, twice", minimum=0.001)
    shrink_off_diagonal: float = setting(
        1.0, "γ2, factor of the mean covariance added off the diagonal, twice", minimum=0.0
    )
    tukey: float = setting(
        1.0,
        "exponent of sign(z)|z|^tukey; the published 0.5 suits ReLU outputs but not signed embeddings; 1: off",
        above=0.0,
        maximum=1.0,
    )

    budget_mb: float = setting(100.0, LIMIT, minimum=0.0)
    budget_classes: int = setting(100, BUDGET_CLASSES, minimum=2)

    def __post_init__(self) -> None:
        """Check the shrinkage.

        Raises:
            InputError: the shrunk covariance would not be positive definite for all data.
        """
        if self.shrink_off_diagonal > self.shrink_diagonal:
            raise InputError(
                f"learner.shrink_off_diagonal must be at most learner.shrink_diagonal = {self.shrink_diagonal:g}, or "
                f"the covariance may be singular, but is {self.shrink_off_diagonal:g}"
            )


def shrink_twice(covariance: Tensor, diagonal: float, off_diagonal: float) -> Tensor:
    """Apply Σ ← Σ + γ1 V̄ I + γ2 C̄ (11ᵀ − I) twice, with V̄ the mean variance and C̄ the mean covariance of Σ.

    Args:
        covariance: Σ, ``(D, D)``, positive semidefinite.
        diagonal: γ1.
        off_diagonal: γ2; the result is positive semidefinite if it is at most γ1.
    """
    size = len(covariance)
    identity = torch.eye(size, dtype=covariance.dtype)
    for _ in range(2):
        variance = covariance.diagonal().mean()
        mean_covariance = (covariance.sum() - covariance.trace()) / max(size * (size - 1), 1)
        covariance = covariance + diagonal * variance * identity + off_diagonal * mean_covariance * (1.0 - identity)
    return covariance


def correlation(covariance: Tensor) -> Tensor:
    """Return the correlation matrix of a covariance ``(D, D)``; dimensions without variance are uncorrelated."""
    deviation = covariance.diagonal().sqrt()
    deviation = deviation.masked_fill(deviation == 0, 1.0)
    scaled = covariance / torch.outer(deviation, deviation)
    return scaled.fill_diagonal_(1.0)


def _schema_of(size: int) -> dict[str, TensorSpec]:
    return statistics_schema(size, per_class=True)


class FeCAM(Learner):
    """Nearest class mean with scores −(x − m_c)ᵀ R_c⁻¹ (x − m_c).

    x and m_c are the embedding and the class mean scaled to unit length, R_c is the correlation matrix of the shrunk
    covariance of the class; for a class of one sample it is the identity. An embedding whose state would exceed the
    budget is projected on as many random directions as fit.
    """

    name: ClassVar[str] = "fecam"
    display: str = "FeCAM"
    family = "closed form"
    panel = True
    candidate = True
    removal = "exact"
    Settings: ClassVar[type] = Settings

    def _configure(self) -> None:
        settings: Settings = self.settings
        self.size = self.dim
        if settings.budget_mb:
            self.size = features_within(settings.budget_mb, settings.budget_classes, self.dim, _schema_of)
        if self.size < self.dim:
            check_drawn(self.dim * self.size, f"{self.size:,} random directions")
        self._solved: dict[int, tuple[Tensor, Tensor]] = {}  # by row; a cache, not part of the state

    def _start(self, priors: Priors) -> None:
        self.statistics = ClassStatistics(self.size, per_class=True)
        self.projection = self._draw()

    def _draw(self) -> Tensor:
        return random_directions(self.dim, self.size, self.seed).to(self.device)

    def _transform(self, embeddings: Tensor) -> Tensor:
        tukey: float = self.settings.tukey
        if len(self.projection):
            embeddings = embeddings.to(self.device) @ self.projection
        return embeddings if tukey == 1.0 else embeddings.sign() * embeddings.abs() ** tukey

    def _learn(self, task: Task, progress: Progress) -> dict[str, float]:
        self.statistics.add(self._transform(task.embeddings), task.labels)
        for row in task.rows.tolist():
            self._solved.pop(row, None)
        progress(1.0)
        return {}

    def sums_of(self, task: Task) -> ClassStatistics:
        sums = ClassStatistics(self.size, per_class=True)
        sums.add(self._transform(task.embeddings), task.labels)
        return sums

    def _remove(self, row: int, approximately: bool) -> bool:
        self._solved.pop(row, None)
        return self.statistics.remove(row)

    def _join(self, row: int, into: int) -> None:
        self.statistics.join(row, into)
        self._solved.clear()

    def _common(self) -> dict[str, Any]:
        return {
            **self._shared_settings(),
            **({"the seed of the directions": self.seed} if len(self.projection) else {}),
        }

    def _hold(self, sums: dict[str, Tensor]) -> None:
        self.statistics, self._solved = ClassStatistics.unchecked(sums), {}

    def check_part(self, sums: Mapping[str, Tensor]) -> None:
        ClassStatistics.unchecked(dict(sums)).check(self.statistics)

    def _merge(self, other: FeCAM, rows: Tensor) -> None:
        self.statistics.merge(other.statistics, rows)
        self._solved.clear()

    def _subtract(self, other: FeCAM, rows: Tensor) -> Tensor:
        self.statistics.subtract(other.statistics, rows)
        self._solved.clear()
        return self.statistics.counts

    def solve(self, row: int) -> tuple[Tensor, Tensor]:
        """Return the unit mean m ``(D,)`` of a class and L⁻ᵀ ``(D, D)``, with LLᵀ = R_c its correlation matrix.

        The squared distance of x is |(x − m) L⁻ᵀ|².
        """
        if row not in self._solved:
            settings, identity = self.settings, torch.eye(self.size, dtype=torch.float64)
            covariance = self.statistics.covariance(row)
            shrunk = shrink_twice(covariance, settings.shrink_diagonal, settings.shrink_off_diagonal)
            factor = torch.linalg.cholesky(correlation(shrunk) + JITTER * identity)
            inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
            mean = F.normalize(self.statistics.sums[row], dim=0)
            # contiguous, see LinearLearner
            self._solved[row] = mean.float().to(self.device), inverse.T.float().contiguous().to(self.device)
        return self._solved[row]

    def scores(self, embeddings: Tensor) -> Tensor:
        """Return negative squared distances ``(N, C)``; a class without samples is never the best."""
        counts = self.statistics.counts
        scores = torch.full((len(embeddings), len(counts)), NEVER)
        for start in range(0, len(embeddings), BATCH):
            part = slice(start, start + BATCH)
            unit = F.normalize(self._transform(embeddings[part].to(self.device)))
            for row in counts.nonzero().flatten().tolist():
                mean, factor = self.solve(row)
                scores[part, row] = -((unit - mean) @ factor).square().sum(1).cpu()
        return scores

    def write_head(self, graph: HeadGraph, x: str) -> str:
        if len(self.projection):
            x = graph.matmul(x, "projection", self.projection)
        if self.settings.tukey != 1.0:
            power = graph.add("Pow", graph.add("Abs", x), graph.scalar(self.settings.tukey))
            x = graph.add("Mul", graph.add("Sign", x), power)
        # All classes at once: (x − m_c) L_c⁻ᵀ is one product of (C, N, D) and (C, D, D).
        means = torch.zeros(graph.classes, 1, self.size)
        factors = torch.zeros(graph.classes, self.size, self.size)
        for row in self.statistics.counts.nonzero().flatten().tolist():
            means[row, 0], factors[row] = self.solve(row)
        away = graph.add("Sub", graph.unit(x), graph.weight("means", means))
        squares = graph.add("ReduceSumSquare", graph.matmul(away, "factors", factors), graph.indices(-1), keepdims=0)
        return graph.add("Neg", graph.add("Transpose", squares, perm=[1, 0]))

    def schema(self) -> dict[str, TensorSpec]:
        return _schema_of(self.size)

    def _tensors(self) -> dict[str, Tensor]:
        return self.statistics.state()

    def _check(self, state: dict[str, Tensor]) -> None:
        check_seen(state, self.name)

    def _load(self, tensors: dict[str, Tensor]) -> None:
        self.statistics = ClassStatistics.from_state(tensors)
        self.projection = self._draw()
        self._solved.clear()
