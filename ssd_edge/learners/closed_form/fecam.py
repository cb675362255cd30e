"""FeCAM (Goswami et al. 2023): the nearest class mean by a Mahalanobis distance of each class's own.

Nothing is trained. Each class keeps its count, its sum and its second moments, so that classes can be removed and
joined and learners merged and subtracted exactly, and no class changes what another has learned.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_edge.config import setting
from ssd_edge.errors import InputError
from ssd_edge.learners.base import HeadGraph, Learner, Progress, Task, TensorSpec
from ssd_edge.learners.closed_form.linear import BATCH, NEVER, statistics_schema
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.priors import Priors

JITTER = 1e-7  # on the unit diagonal of a correlation matrix: it can be singular still, as with two samples


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of FeCAM."""

    shrink_diagonal: float = setting(1.0, "γ1, share of the mean variance put on the diagonal, twice", minimum=0.001)
    shrink_off_diagonal: float = setting(1.0, "γ2, share of the mean covariance put beside it, twice", minimum=0.0)
    tukey: float = setting(
        1.0,
        "sign(z)|z|^tukey; published 0.5 straightens ReLU outputs; signed embeddings it tears apart at 0; 1: off",
        above=0.0,
        maximum=1.0,
    )

    def __post_init__(self) -> None:
        """Check what one field says against another.

        Raises:
            InputError: a shrinkage that can leave no positive definite matrix.
        """
        if self.shrink_off_diagonal > self.shrink_diagonal:
            raise InputError(
                f"learner.shrink_off_diagonal must be at most learner.shrink_diagonal, or a covariance can lose its "
                f"inverse, but is {self.shrink_off_diagonal:g} of {self.shrink_diagonal:g}"
            )


def shrink_twice(covariance: Tensor, diagonal: float, off_diagonal: float) -> Tensor:
    """Σ + γ1 V̄ I + γ2 C̄ (11ᵀ − I), V̄ the mean variance and C̄ the mean covariance of Σ; then the same of the result.

    Args:
        covariance: Σ, ``(D, D)``.
        diagonal: γ1.
        off_diagonal: γ2; positive semidefinite stays so where it is at most γ1.
    """
    size = len(covariance)
    identity = torch.eye(size, dtype=covariance.dtype)
    for _ in range(2):
        variance = covariance.diagonal().mean()
        mean_covariance = (covariance.sum() - covariance.trace()) / max(size * (size - 1), 1)
        covariance = covariance + diagonal * variance * identity + off_diagonal * mean_covariance * (1.0 - identity)
    return covariance


def correlation(covariance: Tensor) -> Tensor:
    """The covariance ``(D, D)`` over its standard deviations; the identity where there is no variance."""
    deviation = covariance.diagonal().sqrt()
    deviation = deviation.masked_fill(deviation == 0, 1.0)
    scaled = covariance / torch.outer(deviation, deviation)
    return scaled.fill_diagonal_(1.0)


class FeCAM(Learner):
    """−(x − m_c)ᵀ R_c⁻¹ (x − m_c): x and m_c the unit embedding and class mean, R_c the class's correlation matrix.

    R_c comes from the shrunk covariance of the class. A class of one sample has the identity for it.
    """

    name: ClassVar[str] = "fecam"
    display: str = "FeCAM"
    family = "closed form"
    panel = True
    candidate = True
    removal = "exact"
    Settings: ClassVar[type] = Settings

    def __init__(
        self, dim: int, settings: Any, priors: Priors, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__(dim, settings, priors, seed, device)
        self.statistics = ClassStatistics(dim, per_class=True)
        self._solved: dict[int, tuple[Tensor, Tensor]] = {}  # by row; solved when first needed, not saved

    def _transform(self, embeddings: Tensor) -> Tensor:
        if self.settings.tukey == 1.0:
            return embeddings
        return embeddings.sign() * embeddings.abs() ** self.settings.tukey

    def _learn(self, task: Task, progress: Progress) -> dict[str, float]:
        self.statistics.add(self._transform(task.embeddings), task.labels)
        for row in task.rows.tolist():
            self._solved.pop(row, None)
        progress(1.0)
        return {}

    def _remove(self, row: int, approximately: bool) -> bool:
        self._solved.pop(row, None)
        return self.statistics.remove(row)

    def _join(self, row: int, into: int) -> None:
        self.statistics.join(row, into)
        self._solved.clear()

    def _common(self) -> dict[str, Any]:
        return self._shared_settings()

    def _merge(self, other: FeCAM, rows: Tensor) -> None:
        self.statistics.merge(other.statistics, rows)
        self._solved.clear()

    def _subtract(self, other: FeCAM, rows: Tensor) -> Tensor:
        self.statistics.subtract(other.statistics, rows)
        self._solved.clear()
        return self.statistics.counts

    def solve(self, row: int) -> tuple[Tensor, Tensor]:
        """The unit mean ``(D,)`` of a class and L⁻ᵀ ``(D, D)``, LLᵀ its correlation matrix: |(x − m) L⁻ᵀ|² is the
        squared distance.
        """
        if row not in self._solved:
            settings, identity = self.settings, torch.eye(self.dim, dtype=torch.float64)
            covariance = self.statistics.covariance(row)
            shrunk = shrink_twice(covariance, settings.shrink_diagonal, settings.shrink_off_diagonal)
            factor = torch.linalg.cholesky(correlation(shrunk) + JITTER * identity)
            inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
            mean = F.normalize(self.statistics.sums[row], dim=0)
            # contiguous: see LinearLearner
            self._solved[row] = mean.float().to(self.device), inverse.T.float().contiguous().to(self.device)
        return self._solved[row]

    def scores(self, embeddings: Tensor) -> Tensor:
        """Scores ``(N, C)``: minus the squared distances; a class without samples is never the best."""
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
        if self.settings.tukey != 1.0:
            power = graph.add("Pow", graph.add("Abs", x), graph.scalar(self.settings.tukey))
            x = graph.add("Mul", graph.add("Sign", x), power)
        # All classes at once: (x − m_c) L_c⁻ᵀ is one product of (C, N, D) and (C, D, D).
        means = torch.zeros(graph.classes, 1, self.dim)
        factors = torch.zeros(graph.classes, self.dim, self.dim)
        for row in self.statistics.counts.nonzero().flatten().tolist():
            means[row, 0], factors[row] = self.solve(row)
        away = graph.add("Sub", graph.unit(x), graph.weight("means", means))
        squares = graph.add("ReduceSumSquare", graph.matmul(away, "factors", factors), graph.indices(-1), keepdims=0)
        return graph.add("Neg", graph.add("Transpose", squares, perm=[1, 0]))

    def schema(self) -> dict[str, TensorSpec]:
        return statistics_schema(self.dim, per_class=True)

    def _tensors(self) -> dict[str, Tensor]:
        return self.statistics.state()

    def _load(self, tensors: dict[str, Tensor]) -> None:
        self.statistics = ClassStatistics.from_state(tensors)
        self._solved.clear()
