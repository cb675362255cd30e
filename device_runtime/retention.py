"""What a learn may have cost the old classes, without any old image: an estimate, and called so everywhere.

Old classes are imitated by pseudo-embeddings drawn from their means and the pooled within-class covariance,
which the bundle carries. Both states answer them; the difference is the estimated drop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssd_edge.learners import Learner
from ssd_edge.statistics import ClassStatistics, shrink

SAMPLES = 100  # per old class: a standard error of at most five points for a class, far less for the mean


def pseudo_embeddings(statistics: ClassStatistics, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian stand-ins for the classes in `statistics`: float32 ``(C·100, D)`` and their rows."""
    freedom = max(statistics.total - int((statistics.counts > 0).sum()), 1.0)
    factor = torch.linalg.cholesky(shrink(statistics.scatter_within() / freedom, freedom))
    rows = (statistics.counts > 0).nonzero().flatten().repeat_interleave(SAMPLES)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(rows), factor.shape[0], generator=generator, dtype=torch.float64)
    return (statistics.means[rows] + noise @ factor.T).float(), rows


def estimate(before: Learner, after: Learner, statistics: ClassStatistics) -> dict[str, float | str]:
    """Accuracy on pseudo-embeddings of the old classes before and after a learn.

    Args:
        before: the state that knew the old classes only.
        after: the state that also learned the new one.
        statistics: of the old classes.
    """
    vectors, rows = pseudo_embeddings(statistics)
    old = float((before.predict(vectors) == rows).double().mean())
    new = float((after.predict(vectors) == rows).double().mean())
    return {
        "kind": "estimate from class statistics; no old image was used",
        "accuracy_before": round(old, 4),
        "accuracy_after": round(new, 4),
        "drop": round(old - new, 4),
    }
