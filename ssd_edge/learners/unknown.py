"""Open-set rejection: predict ``unknown`` for embeddings too far from the predicted class.

The score of an embedding z for class c is the cosine between Wz and Wμ_c, where W whitens the pooled within-class
covariance (OAS-shrunk) and the origin is the mean of the pretraining data, since embeddings are standardised.
``benchmarks/unknown.py`` chose it among Mahalanobis and relative Mahalanobis distances and the learner's own scores, on
classes held out of the training data. It ignores the length of z.

The threshold of a class follows from its statistics alone, so no image of other objects is needed. With μ the length
of Wμ_c, the component of whitened z along the estimated mean is normal and the squared length of the rest is χ²
distributed (approximated by the cube root, Wilson & Hilferty 1931); the threshold is a quantile of their cosine over a
grid of both.
Real classes vary more along their own mean than the pooled covariance says: by `OWN_SPREAD` times μ, measured on
held-out training images of CIFAR-10. Statistics with ``per_class`` moments contain that variance.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.learners.base import LARGEST_COUNT, TensorSpec, check_state, check_unit
from ssd_edge.learners.closed_form.sums import ClassStatistics

UNKNOWN = "unknown"
RATE = 0.95
OWN_SPREAD = 0.35  # standard deviation along the class mean that the pooled covariance lacks, as a share of μ
PRIOR = 20.0  # weight, in images, of the threshold from statistics against the class's own embeddings
_NORMAL = torch.tensor([NormalDist().inv_cdf((i + 0.5) / 64) for i in range(64)], dtype=torch.float64)
NEVER = 2.0  # threshold of a row without samples: no cosine reaches it
DIRECTION_ROUNDING = 1e-4  # of the length of a direction in float32
SCHEMA = {
    "fitted": TensorSpec(
        (2,), "float64", "rate, and degrees of freedom of the covariance", least=0, most=LARGEST_COUNT
    ),
    # whitened embeddings have a finite length in float32
    "whitening": TensorSpec(
        ("T",), "float32", "lower triangle of what whitens that covariance", least=-1e12, most=1e12
    ),
    "directions": TensorSpec(("C", "D"), "float32", "whitened mean of each class, of unit length", least=-2, most=2),
    "thresholds": TensorSpec(("C",), "float32", "smallest cosine of each class that is accepted", least=-1, most=NEVER),
}


@dataclasses.dataclass(frozen=True)
class Rejector:
    """Thresholds for the classes of one generation; immutable. Its size depends on C and D only.

    W is fixed after `fit`, so that a new class does not change the decisions for other classes; see `outgrown`.

    Attributes:
        rate: Share of a class's own images that should be accepted.
        samples: Degrees of freedom of the covariance that W whitens.
        whitening: W, lower triangular, float32 ``(D, D)``.
        directions: Wμ_c/|Wμ_c|, float32 ``(C, D)``; zero for a row without samples.
        thresholds: Cosines, float32 ``(C,)``, finite.
    """

    rate: float
    samples: float
    whitening: Tensor
    directions: Tensor
    thresholds: Tensor

    @classmethod
    def fit(cls, statistics: ClassStatistics, rate: float = RATE) -> Rejector:
        """Fit W and the thresholds of all classes to their statistics.

        Args:
            statistics: Class statistics of embeddings; any number of classes, including zero.
            rate: Share of a class's own images that should be accepted, between 0.5 and 1.

        Raises:
            InputError: The rate is out of range, or the statistics hold NaN or infinity.
        """
        if not 0.5 < rate < 1:
            raise InputError(f"the rate of accepted own images must be above 0.5 and below 1, but is {rate}")
        if not all(bool(torch.isfinite(t).all()) for t in statistics.state().values()):
            raise InputError("the class statistics hold NaN or infinity; roll back or deploy the bundle again")
        samples = max(statistics.degrees_of_freedom, 0.0)
        dim = statistics.sums.shape[1]
        if samples == 0 or float(statistics.within_covariance().trace()) <= 0:
            whitening = torch.eye(dim, dtype=torch.float64)
        else:
            identity = torch.eye(dim, dtype=torch.float64)
            factor = torch.linalg.cholesky(statistics.shrunk_covariance())
            whitening = torch.linalg.solve_triangular(factor, identity, upper=False)
        # contiguous, because another memory order changes the last bits of a product after a restart
        empty = cls(rate, samples, whitening.float().contiguous(), torch.zeros(0, dim), torch.zeros(0))
        return empty._grown(len(statistics.counts), statistics)

    def with_class(self, row: int, statistics: ClassStatistics, embeddings: Tensor) -> Rejector:
        """Return a rejector with the threshold of one class calibrated on its new embeddings; the others do not change.

        Each embedding is scored against the mean of the class without it (leave one out). The threshold is the mean of
        the quantile of these scores, weighted by their number, and the earlier threshold (of a new class: the one from
        its statistics), weighted by `PRIOR` plus the number of earlier images. If no class was known before, W is
        fitted again.

        Args:
            row: Row of the class, new or known.
            statistics: Class statistics that already include the embeddings.
            embeddings: Embeddings that it was taught with, ``(N, D)``.

        Raises:
            InputError: There are no embeddings, their shape is wrong, they hold NaN or infinity, or the row has fewer
                samples.
        """
        self._check(embeddings)
        count = len(embeddings)
        if not count or not 0 <= row < len(statistics.counts) or float(statistics.counts[row]) < count:
            samples = float(statistics.counts[row]) if 0 <= row < len(statistics.counts) else 0.0
            raise InputError(f"row {row} was taught with {samples:.0f} embeddings, but {count} are given to calibrate")
        if not bool(self.directions.any()):
            return Rejector.fit(statistics, self.rate)._calibrated(row, statistics, embeddings, known=False)
        earlier = float(statistics.counts[row]) > count
        known = earlier and row < len(self.thresholds) and float(self.thresholds[row]) < NEVER
        return self._grown(max(row + 1, len(self.thresholds)), statistics)._calibrated(
            row, statistics, embeddings, known
        )

    def without_rows(self, rows: Iterable[int]) -> Rejector:
        """Return a rejector without some rows; later rows move up, bit-identical.

        Raises:
            InputError: A row is out of range.
        """
        removed, classes = set(rows), len(self.thresholds)
        self._check_rows(removed, classes)
        kept = torch.tensor([row for row in range(classes) if row not in removed], dtype=torch.int64)
        return dataclasses.replace(self, directions=self.directions[kept], thresholds=self.thresholds[kept])

    def refitted(self, row: int, statistics: ClassStatistics) -> Rejector:
        """Return a rejector with one class fitted to its statistics again, for example after a merge.

        The other rows and W do not change, unless no class was known before: then W is fitted again.

        Args:
            row: Row of the class, new or known.
            statistics: The current statistics. A class without samples accepts nothing.

        Raises:
            InputError: There is no such row in the statistics.
        """
        self._check_rows({row}, len(statistics.counts))
        if not bool(self.directions.any()):
            return Rejector.fit(statistics, self.rate)
        grown = self._grown(max(row + 1, len(self.thresholds)), statistics)
        directions, thresholds = grown.directions.clone(), grown.thresholds.clone()
        directions[row], thresholds[row] = self._fit_row(row, statistics)
        return dataclasses.replace(self, directions=directions, thresholds=thresholds)

    def accepts(self, embeddings: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Decide for each embedding whether it is close enough to its predicted class.

        Args:
            embeddings: ``(N, D)``.
            rows: Predicted rows, int64 ``(N,)``.

        Returns:
            True for accepted embeddings, bool ``(N,)``, and the cosine minus the threshold, float32 ``(N,)``.

        Raises:
            InputError: The shapes do not match, a row is out of range, or an embedding holds NaN or infinity.
        """
        self._check(embeddings)
        classes = len(self.thresholds)
        if rows.shape != embeddings.shape[:1] or (len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < classes):
            raise InputError(
                f"rows for {len(embeddings)} embeddings must be below {classes}, but are {tuple(rows.shape)}, "
                f"up to {int(rows.max()) if rows.numel() else 0}"
            )
        margin = self.score(embeddings, rows) - self.thresholds[rows]
        return margin >= 0, margin

    def score(self, embeddings: Tensor, rows: Tensor) -> Tensor:
        """Return the cosine of each embedding ``(N, D)`` and the mean of its class ``(N,)``, float32 ``(N,)``."""
        whitened = embeddings.float() @ self.whitening.T
        length = whitened.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        cosine: Tensor = (whitened * self.directions[rows]).sum(1) / length
        return cosine

    def outgrown(self, statistics: ClassStatistics) -> bool:
        """Return True if `fit` with the current statistics would be clearly better; it changes all thresholds."""
        samples = statistics.total - int((statistics.counts > 0).sum())
        return self.samples < 10 * len(self.whitening) and samples >= 2 * self.samples

    def state(self) -> dict[str, np.ndarray]:
        """Return named arrays for a safetensors file."""
        row, column = torch.tril_indices(*self.whitening.shape)
        return {
            "fitted": np.array([self.rate, self.samples], np.float64),
            "whitening": self.whitening[row, column].numpy().copy(),
            "directions": self.directions.numpy().copy(),
            "thresholds": self.thresholds.numpy().copy(),
        }

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Rejector:
        """Restore from the arrays of `state`, bit for bit.

        Raises:
            BundleRefusedError: An array is missing, has a wrong shape or values that `fit` does not give.
        """
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
        sizes = check_state(tensors, SCHEMA, {}, UNKNOWN)
        dim = sizes["D"]
        rate, samples = tensors["fitted"].tolist()
        directions, thresholds, packed = (tensors[key] for key in ("directions", "thresholds", "whitening"))
        if not (0.5 < rate < 1 and sizes["T"] == dim * (dim + 1) // 2):
            raise BundleRefusedError(
                f"the thresholds for '{UNKNOWN}' are damaged: a rate of {rate:g} and {sizes['T']} numbers that whiten "
                f"{dim} features; install the bundle again"
            )
        whitening = packed.new_zeros(dim, dim)
        row, column = torch.tril_indices(dim, dim)
        whitening[row, column] = packed
        if not bool((whitening.diagonal() > 0).all()):
            raise BundleRefusedError(
                f"the thresholds for '{UNKNOWN}' do not whiten every feature; install the bundle again"
            )
        check_unit(directions, DIRECTION_ROUNDING, f"the directions of '{UNKNOWN}'")
        return cls(rate, samples, whitening, directions, thresholds)

    def _check(self, embeddings: Tensor) -> None:
        dim = len(self.whitening)
        if embeddings.ndim != 2 or embeddings.shape[1] != dim:
            raise InputError(f"embeddings must have shape (N, {dim}), but have {tuple(embeddings.shape)}")
        if not bool(torch.isfinite(embeddings).all()):
            raise InputError("an embedding holds NaN or infinity; check the image and the backbone")

    @staticmethod
    def _check_rows(rows: set[int], classes: int) -> None:
        wrong = [row for row in sorted(rows) if not 0 <= row < classes]
        if wrong:
            raise InputError(f"there are {classes} rows, so there is no row {wrong[0]}; rows are numbered from 0")

    def _grown(self, classes: int, statistics: ClassStatistics) -> Rejector:
        """Return a rejector with `classes` rows; the new ones are fitted to the statistics."""
        rows = range(len(self.thresholds), classes)
        if not rows:
            return self
        fitted = [self._fit_row(row, statistics) for row in rows]
        directions = torch.cat([self.directions, torch.stack([direction for direction, _ in fitted])])
        thresholds = torch.cat([self.thresholds, torch.tensor([threshold for _, threshold in fitted])])
        return dataclasses.replace(self, directions=directions, thresholds=thresholds)

    def _fit_row(self, row: int, statistics: ClassStatistics) -> tuple[Tensor, float]:
        """Return direction ``(D,)`` and threshold of a class from its statistics."""
        wide, count, dim = self.whitening.double(), float(statistics.counts[row]), len(self.whitening)
        mean = wide @ (statistics.sums[row] / max(count, 1.0))
        length = float(mean.norm())
        if count == 0 or length == 0:
            return torch.zeros(dim), NEVER
        direction = mean / length
        true = math.sqrt(max(length**2 - dim / count, 0.0))  # the estimate of |Wμ|² is too large by D/n
        along = true * true / length
        variance, total = 1.0 + (OWN_SPREAD * along) ** 2, float(dim)
        if statistics.per_class and count > 1:
            own = wide @ statistics.covariance(row) @ wide.T
            # With few images it is noise: it is weighted by its degrees of freedom against `PRIOR`.
            trust = (count - 1) / (count - 1 + PRIOR)
            variance += trust * (float(direction @ own @ direction) - variance)
            total += trust * (float(own.trace()) - total)
        variance *= 1.0 + 1.0 / count
        # uncertainty of `true`: the variance of a squared length estimated from `count` samples
        variance += (2.0 * total + 4.0 * count * true**2) / (count * length) ** 2
        across, freedom = max(total - 1.0, 1e-9), max(dim - 1.0, 1.0)
        parallel = along + math.sqrt(variance) * _NORMAL[:, None]
        spread = (1 - 2 / (9 * freedom) + math.sqrt(2 / (9 * freedom)) * _NORMAL).clamp_min(0) ** 3  # χ²/ν
        squared = across * spread + max(true**2 - along**2, 0.0)
        cosines = parallel / (parallel.square() + squared).sqrt().clamp_min(1e-12)
        threshold = float(cosines.flatten().quantile(1 - self.rate))
        return direction.float(), min(max(threshold, -1.0), 1.0)

    def _calibrated(self, row: int, statistics: ClassStatistics, embeddings: Tensor, known: bool) -> Rejector:
        count = len(embeddings)
        direction, threshold = self._fit_row(row, statistics)
        weight, total = PRIOR, float(statistics.counts[row])
        if known:
            weight, threshold = PRIOR + total - count, float(self.thresholds[row])
        if total > 1:
            wide = embeddings.double()
            others = (statistics.sums[row] - wide) / (total - 1)
            white, means = (part @ self.whitening.double().T for part in (wide, others))
            cosines = torch.nn.functional.cosine_similarity(white, means)
            quantile = float(cosines.quantile(1 - self.rate))
            threshold = (weight * threshold + count * quantile) / (weight + count)
        directions, thresholds = self.directions.clone(), self.thresholds.clone()
        directions[row], thresholds[row] = direction, threshold
        return dataclasses.replace(self, directions=directions, thresholds=thresholds)
