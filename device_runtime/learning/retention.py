"""What a learn may have cost the old classes, without any old image: an estimate, and called so everywhere.

Old classes are imitated by pseudo-embeddings drawn from their means and the pooled within-class covariance,
which the bundle carries. Both states answer them; the difference is the estimated drop.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ssd_edge.learners import Learner
from ssd_edge.learners.closed_form.sums import ClassStatistics

SAMPLES = 100  # per old class: a standard error of at most five points for a class, far less for the mean
SPREAD = 1.3  # times the standard deviation: images near a boundary are commoner than a Gaussian says (benchmarks/)


@dataclasses.dataclass(frozen=True)
class Answers:
    """What two states of a learner answer to the same pseudo-embeddings.

    Attributes:
        rows: the class that each was drawn from, int64 ``(N,)``; `SAMPLES` in a row for each class.
        before: rows answered by the state before the learn, int64 ``(N,)``.
        after: and by the state after it.
        finite: whether all scores of the state after are numbers.
    """

    rows: Tensor
    before: Tensor
    after: Tensor
    finite: bool

    def per_class(self) -> list[tuple[int, float, float]]:
        """Row, accuracy before, accuracy after, of every old class."""
        found = []
        for row in self.rows.unique().tolist():
            own = self.rows == row
            old, new = ((answered[own] == row).double().mean() for answered in (self.before, self.after))
            found.append((row, float(old), float(new)))
        return found

    def summary(self) -> dict[str, float | str]:
        """What `estimate` returns."""
        old, new = ((answered == self.rows).double() for answered in (self.before, self.after))
        error = float((old - new).std()) / math.sqrt(len(old)) if len(old) > 1 else 0.0
        return {
            "kind": "estimate from class statistics; no old image was used",
            "accuracy_before": round(float(old.mean()), 4),
            "accuracy_after": round(float(new.mean()), 4),
            "drop": round(float(old.mean() - new.mean()), 4),
            "drop_error": round(error, 4),
        }


def pseudo_embeddings(statistics: ClassStatistics, seed: int = 0, spread: float = SPREAD) -> tuple[Tensor, Tensor]:
    """Gaussian stand-ins for the classes in `statistics`: float32 ``(C·100, D)`` and their rows.

    Args:
        statistics: of the classes.
        seed: of the noise.
        spread: factor on the noise. A Gaussian with the true covariance is easier to tell apart than real
            embeddings are, so that it hides small losses; `SPREAD` was chosen by ``benchmarks/retention.py``.
    """
    factor = spread * torch.linalg.cholesky(statistics.shrunk_covariance())
    rows = (statistics.counts > 0).nonzero().flatten().repeat_interleave(SAMPLES)
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(len(rows) // SAMPLES, SAMPLES // 2, len(factor), generator=generator, dtype=torch.float64)
    noise = torch.cat([half, -half], 1).flatten(0, 1)  # with its mirror image: the mean of a class is exact
    return (statistics.means[rows] + noise @ factor.T).float(), rows


def ask(before: Learner, after: Learner, statistics: ClassStatistics, spread: float = SPREAD) -> Answers:
    """Both states' answers to pseudo-embeddings of the classes in `statistics`; arguments as `estimate`."""
    vectors, rows = pseudo_embeddings(statistics, spread=spread)
    taught = after.seen.nonzero().flatten()
    scores = scores_of(after, vectors, taught)
    return Answers(rows, before.predict(vectors), taught[scores.argmax(1)], bool(scores.isfinite().all()))


def scores_of(learner: Learner, vectors: Tensor, rows: Tensor) -> Tensor:
    """Scores ``(N, len(rows))`` of these classes alone; a learner may have outputs for classes yet to come."""
    return learner.scores(vectors)[:, rows]


def estimate(before: Learner, after: Learner, statistics: ClassStatistics) -> dict[str, float | str]:
    """Accuracy on pseudo-embeddings of the old classes before and after a learn.

    The level is rough (it depends on the learner); the drop is what to look at. ``benchmarks/retention.py`` compares
    it with the true one on CIFAR-10: true drops under five points are met within half a point on average and missed
    by at most 1.5; the larger drops of fine-tuning are exaggerated, by up to 13 points.

    Args:
        before: the state that knew the old classes only.
        after: the state that also learned the new one.
        statistics: of the old classes.

    Returns:
        kind, accuracy_before, accuracy_after, drop, and drop_error: the standard error of the drop that comes from
        the number of pseudo-embeddings (not from their being Gaussian).
    """
    return ask(before, after, statistics).summary()
