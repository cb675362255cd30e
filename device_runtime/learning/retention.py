"""Estimate how much a learn costs the old classes, without any old image.

Old classes are represented by pseudo-embeddings drawn from their means and the pooled within-class covariance, which
the bundle contains. The learner classifies them before and after the learn; the difference is the estimated drop.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from device_runtime.results import Retention
from ssd_edge.learners import Learner
from ssd_edge.learners.closed_form.sums import ClassStatistics

SAMPLES = 100  # per old class: a standard error of at most five points for one class, far less for the mean
SPREAD = 1.3  # times the standard deviation: real embeddings lie near a boundary more often than Gaussian ones
KIND = "estimate from class statistics; no old image was used"


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Predictions of a learner for the same pseudo-embeddings before and after a change.

    Attributes:
        rows: True rows, int64 ``(N,)``; `SAMPLES` consecutive entries per class.
        before: Predicted rows before the change, int64 ``(N,)``.
        after: Predicted rows after the change, int64 ``(N,)``.
        finite: True if all scores after the change are finite.
    """

    rows: Tensor
    before: Tensor
    after: Tensor
    finite: bool

    def per_class(self) -> list[tuple[int, float, float]]:
        """Return row, accuracy before and accuracy after for each old class."""
        result = []
        for row in torch.unique(self.rows).tolist():
            own = self.rows == row
            old, new = ((predicted[own] == row).double().mean() for predicted in (self.before, self.after))
            result.append((row, float(old), float(new)))
        return result

    def summary(self) -> Retention:
        """Return the mean accuracies over all pseudo-embeddings."""
        old, new = ((predicted == self.rows).double() for predicted in (self.before, self.after))
        error = float((old - new).std()) / math.sqrt(len(old)) if len(old) > 1 else 0.0
        return Retention(
            kind=KIND,
            accuracy_before=round(float(old.mean()), 4),
            accuracy_after=round(float(new.mean()), 4),
            drop=round(float(old.mean() - new.mean()), 4),
            drop_error=round(error, 4),
        )


def pseudo_embeddings(statistics: ClassStatistics, seed: int = 0, spread: float = SPREAD) -> tuple[Tensor, Tensor]:
    """Draw Gaussian embeddings of the classes in `statistics`.

    Args:
        statistics: Statistics of the classes.
        seed: Seed of the noise.
        spread: Factor on the noise. A Gaussian with the true covariance is easier to classify than real embeddings,
            which hides small losses; ``benchmarks/retention.py`` chose `SPREAD`.

    Returns:
        Embeddings, float32 ``(C · SAMPLES, D)``, and their rows, int64 ``(C · SAMPLES,)``.
    """
    factor = spread * torch.linalg.cholesky(statistics.shrunk_covariance())
    rows = (statistics.counts > 0).nonzero().flatten().repeat_interleave(SAMPLES)
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(len(rows) // SAMPLES, SAMPLES // 2, len(factor), generator=generator, dtype=torch.float64)
    noise = torch.cat([half, -half], 1).flatten(0, 1)  # antithetic: the sample mean of a class is exact
    return (statistics.means[rows] + noise @ factor.T).float(), rows


def predict_pseudo(before: Learner, after: Learner, statistics: ClassStatistics, spread: float = SPREAD) -> Predictions:
    """Classify pseudo-embeddings of the classes in `statistics` with both states of a learner; see `estimate`."""
    vectors, rows = pseudo_embeddings(statistics, spread=spread)
    taught = after.seen.nonzero().flatten()
    scores = scores_of(after, vectors, taught)
    return Predictions(rows, before.predict(vectors), taught[scores.argmax(1)], bool(scores.isfinite().all()))


def scores_of(learner: Learner, vectors: Tensor, rows: Tensor) -> Tensor:
    """Return the scores ``(N, len(rows))`` of some classes; a learner may have outputs for classes yet to come."""
    return learner.scores(vectors)[:, rows]


def estimate(before: Learner, after: Learner, statistics: ClassStatistics) -> Retention:
    """Estimate the accuracy on the old classes before and after a learn.

    Use the drop; the level is rough and depends on the learner. ``benchmarks/retention.py`` compares the drop with the
    true one on CIFAR-10: true drops below five points are estimated within half a point on average and within 1.5
    points always; the larger drops of fine-tuning are overestimated by up to 13 points.

    Args:
        before: The learner that has learned the old classes only.
        after: The learner that has also learned the new ones.
        statistics: Statistics of the old classes.

    Returns:
        The estimate, without `Retention.worst`.
    """
    return predict_pseudo(before, after, statistics).summary()
