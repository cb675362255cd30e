"""Open-set rejection: predict ``unknown`` for embeddings too far from the predicted class.

The score of an embedding z for class c is the cosine between Wz and Wμ_c, where W whitens a shrunk within-class
covariance and the origin is the mean of the pretraining data, since embeddings are standardised.
It was chosen among Mahalanobis and relative Mahalanobis distances and the learner's own scores, on
classes held out of the training data. It ignores the length of z.

The threshold of a class comes from the scores of its own images, each against a mean without it. They are used as
s = −log(1 − cos), which is close to normal, and only their number, sum and sum of squares are stored. The threshold is
the lower end of the one-sided prediction interval of Student's t for one more image (Hahn & Meeker 1991):
m + shift − t·d·√(1 + 1/n), with m the mean of the n scores and d their deviation. d is pooled with the deviation that
is typical of other classes, which counts as `PRIOR` images, and ``shift`` says by how much images of a later occasion
score lower than images taken together. Training measures both on held-out images, see `Rejector.calibrate`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from ssd_edge.classes import UNKNOWN
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.learners.base import LARGEST_COUNT, TensorSpec, check_state, check_unit
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.whitening import SCHEMA as WHITENING
from ssd_edge.learners.whitening import Whitening

RATE = 0.95
PRIOR = 20.0  # images that the typical deviation counts as
DEVIATION = 0.4  # of s in a class if nothing was held out; measured: groceries 0.24, CIFAR-10 0.1 (EfficientNet-Lite0)
FOLDS = 3
HELD_OUT = 200  # images per class that `calibrate` holds out, at most
NEVER = 2.0  # threshold of a row without samples: no cosine reaches it
CLOSEST = 1e-6  # smallest 1 − cosine, which bounds s by 13.8
DIRECTION_ROUNDING = 1e-4  # of the length of a direction in float32
_NORMAL = NormalDist()
SCHEMA = {
    "fitted": TensorSpec((3,), "float64", "rate, shift and typical deviation of s", least=-100, most=100),
    **WHITENING,
    "directions": TensorSpec(("C", "D"), "float32", "whitened mean of each class, of unit length", least=-2, most=2),
    "thresholds": TensorSpec(("C",), "float32", "smallest cosine of each class that is accepted", least=-1, most=NEVER),
    "scores": TensorSpec(
        ("C", 3), "float64", "number, sum and sum of squares of s of held-out images of each class",
        least=-LARGEST_COUNT, most=200 * LARGEST_COUNT,
    ),
}  # fmt: skip


def strength(cosines: Tensor) -> Tensor:
    """Return s = −log(1 − cos) of cosines; close to normal within a class."""
    return -torch.log((1 - cosines).clamp_min(CLOSEST))


def t_quantile(rate: float, freedom: float) -> float:
    """Return the quantile of Student's t, within 0.002 from 10 degrees of freedom on (Abramowitz & Stegun, 26.7.5)."""
    z = _NORMAL.inv_cdf(rate)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


@dataclasses.dataclass(frozen=True)
class Rejector:
    """Thresholds for the classes of one generation; immutable. Its size depends on C and D only.

    W, shift and deviation are fixed from the start, so that teaching a class does not change any decision for another.

    Attributes:
        rate: Share of a class's own images that should be accepted.
        shift: Difference of s for images of another occasion; at most 0.
        deviation: Typical standard deviation of s within a class.
        whitening: W.
        directions: Wμ_c/|Wμ_c|, float32 ``(C, D)``; zero for a row without samples.
        thresholds: Cosines, float32 ``(C,)``, finite.
        scores: Number, sum and sum of squares of s over held-out images, float64 ``(C, 3)``. They add up in a merge.
    """

    rate: float
    shift: float
    deviation: float
    whitening: Whitening
    directions: Tensor
    thresholds: Tensor
    scores: Tensor

    @classmethod
    def fit(
        cls, statistics: ClassStatistics, rate: float = RATE, shift: float = 0.0, deviation: float = DEVIATION
    ) -> Rejector:
        """Fit W and the directions to class statistics, and thresholds as far as they follow from them.

        Args:
            statistics: Class statistics of embeddings; any number of classes, including zero.
            rate: Share of a class's own images that should be accepted, between 0.5 and 1.
            shift: See `Rejector`.
            deviation: See `Rejector`.

        Raises:
            InputError: The rate is out of range, or the statistics hold NaN or infinity.
        """
        if not 0.5 < rate < 1:
            raise InputError(f"the rate of accepted own images must be above 0.5 and below 1, but is {rate}")
        if not all(bool(torch.isfinite(t).all()) for t in statistics.state().values()):
            raise InputError("the class statistics hold NaN or infinity; roll back or deploy the bundle again")
        dim = statistics.sums.shape[1]
        whitening, covariance = Whitening.identity(dim), statistics.within_covariance()
        if statistics.degrees_of_freedom > 0 and float(covariance.trace()) > 0:
            whitening = Whitening.fit(covariance, statistics.degrees_of_freedom)
        parts = torch.zeros(0, dim), torch.zeros(0), torch.zeros(0, 3).double()
        return cls(rate, shift, deviation, whitening, *parts)._grown(len(statistics.counts), statistics)

    @classmethod
    def calibrate(
        cls,
        statistics: ClassStatistics,
        train: Tensor,
        train_rows: Tensor,
        test: Tensor,
        test_rows: Tensor,
        rate: float = RATE,
        part: Tensor | None = None,
    ) -> Rejector:
        """Fit to the data of a training run and calibrate on held-out images.

        Training images are held out in `FOLDS` parts, each scored with W and means of the others. Test images say how
        much images of another occasion differ: shift and deviation describe held-out training and test images in equal
        parts, two numbers for all classes together.

        Args:
            statistics: Class statistics of the training embeddings.
            train: Training embeddings, ``(N, D)``.
            train_rows: Their rows, int64 ``(N,)``.
            test: Test embeddings, ``(M, D)``; may be empty.
            test_rows: Their rows, int64 ``(M,)``.
            rate: Share of a class's own images that should be accepted.
            part: `held_out_parts` of the training embeddings, if these are not all that were learned; all that are held
                out have to be among them.
        """
        classes = len(statistics.counts)
        part = held_out_parts(train_rows, classes) if part is None else part
        scores = torch.zeros(classes, 3, dtype=torch.float64)
        for number in range(FOLDS):
            held_out = part == number
            rest = statistics.copy()
            rest.subtract(*_of(train[held_out], train_rows[held_out]))
            cosines = cls.fit(rest).score(train[held_out], train_rows[held_out])
            scores += _moments(cosines, train_rows[held_out], classes)
        fitted, many = cls.fit(statistics, rate), scores[:, 0] > 1
        freedom = float((scores[many, 0] - 1).sum())
        if freedom < 1:
            return fitted
        variance = float(_scatter(scores)[many].sum()) / freedom
        shift = 0.0
        tested = many[test_rows] if len(test_rows) else torch.zeros(0, dtype=torch.bool)
        if bool(tested.any()):
            rows = test_rows[tested]
            differences = strength(fitted.score(test[tested], rows).double()) - _means(scores)[rows]
            shift = min(float(differences.mean()) / 2, 0.0)
            variance = (variance + float(differences.var(unbiased=False))) / 2 + shift**2
        calibrated = dataclasses.replace(fitted, shift=shift, deviation=math.sqrt(max(variance, 1e-6)), scores=scores)
        return calibrated._with_thresholds(range(classes), statistics)

    def with_class(self, row: int, statistics: ClassStatistics, embeddings: Tensor) -> Rejector:
        """Return a rejector with the threshold of one class calibrated on its new embeddings; the others do not change.

        Each embedding is scored against the mean of the class without it (leave one out). Scores of earlier images of
        the class count as well, as they are expected against its new mean.

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
        grown = self._turned(row, statistics)
        total = float(statistics.counts[row])
        if total > 1:
            wide = embeddings.double()
            others = (statistics.sums[row] - wide) / (total - 1)
            white, means = (self.whitening.of(part) for part in (wide, others))
            cosines = torch.nn.functional.cosine_similarity(white, means)
            scores = grown.scores.clone()
            scores[row] += _moments(cosines, torch.zeros(count, dtype=torch.int64), 1)[0]
            grown = dataclasses.replace(grown, scores=scores)
        return grown._with_thresholds([row], statistics)

    def without_rows(self, rows: Iterable[int]) -> Rejector:
        """Return a rejector without some rows; later rows move up, bit-identical.

        Raises:
            InputError: A row is out of range.
        """
        removed, classes = set(rows), len(self.thresholds)
        self._check_rows(removed, classes)
        kept = torch.tensor([row for row in range(classes) if row not in removed], dtype=torch.int64)
        parts = {name: getattr(self, name)[kept] for name in ("directions", "thresholds", "scores")}
        return dataclasses.replace(self, **parts)

    def joined(self, rows: Iterable[int], into: int, statistics: ClassStatistics) -> Rejector:
        """Return a rejector in which class `into` also accepts what the classes `rows` accepted.

        Args:
            rows: Rows that were joined into it.
            into: Row of the class.
            statistics: Class statistics after they were joined.

        Raises:
            InputError: A row is out of range.
        """
        others = [row for row in rows if row != into]
        self._check_rows({into, *others}, len(self.thresholds))
        turned, scores = self._turned(into, statistics), self.scores.clone()
        scores[into] = turned.scores[into]
        for row in others:
            scores[into] += _turn(self.scores[row], float(self.directions[row] @ turned.directions[into]))
        return dataclasses.replace(turned, scores=scores)._with_thresholds([into], statistics)

    def merged(
        self, row: int, other: Rejector, there: int, base: Tensor | None, statistics: ClassStatistics
    ) -> Rejector:
        """Return a rejector with one class as another device and this one have taught it.

        A class that only the other device has taught is accepted as there. Thresholds of another W cannot be used;
        then the threshold follows from the statistics.

        Args:
            row: Row of the class here, new or known.
            other: Thresholds of the other device.
            there: Row of the class there.
            base: Scores ``(3,)`` of the bundle that both have installed, if this device has taught the class since;
                zero for a class that the bundle does not have. None if only the other device has taught it.
            statistics: Class statistics after the merge.

        Raises:
            InputError: There is no such row.
        """
        self._check_rows({row}, len(statistics.counts))
        grown = self._grown(max(row + 1, len(self.thresholds)), statistics)
        parts = {name: getattr(grown, name).clone() for name in ("directions", "thresholds", "scores")}
        if not self.whitening.equals(other.whitening):
            parts["scores"][row] = 0.0
            turned = dataclasses.replace(grown, **parts)._turned(row, statistics)
            return turned._with_thresholds([row], statistics)
        if base is None:
            for name, part in parts.items():
                part[row] = getattr(other, name)[there]
            return dataclasses.replace(grown, **parts)
        turned = grown._turned(row, statistics)
        parts = {"directions": turned.directions, "scores": turned.scores.clone()}
        theirs = other.scores[there] - base
        if float(theirs[0]) > 0:
            cosine = float(other.directions[there] @ turned.directions[row])
            parts["scores"][row] += _turn(theirs, cosine)
        return dataclasses.replace(turned, **parts)._with_thresholds([row], statistics)

    def gathered(self, parts: Mapping[int, Iterable[tuple[Tensor, Tensor]]], statistics: ClassStatistics) -> Rejector:
        """Return a rejector with classes that several devices with this W have taught since they installed one bundle.

        Args:
            parts: Row of a class → of each device the scores ``(3,)`` of its held-out images, and the mean that they
                were scored against, ``(D,)``.
            statistics: Class statistics with all that was taught.
        """
        gathered = self._grown(len(statistics.counts), statistics)
        for row, taught in parts.items():
            gathered = gathered._turned(row, statistics)
            scores = gathered.scores.clone()
            for part, mean in taught:
                white = self.whitening.of(mean).double()
                scores[row] += _turn(
                    part, float(white @ gathered.directions[row].double() / white.norm().clamp_min(1e-30))
                )
            gathered = dataclasses.replace(gathered, scores=scores)
        return gathered._with_thresholds(parts, statistics)

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
        whitened = self.whitening.of(embeddings.float())
        length = whitened.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        cosine: Tensor = (whitened * self.directions[rows]).sum(1) / length
        return cosine

    def acceptance(self, row: int, after: Rejector) -> float:
        """Estimate which share of a class's earlier images another rejector with the same W accepts, 0..1.

        Args:
            row: Row of the class in both.
            after: The other rejector.
        """
        mean, variance, freedom = self._normal(row)
        if not freedom:
            return 1.0
        cosine = float((self.directions[row] @ after.directions[row]).clamp(-1, 1))
        turned = float(_turn(torch.tensor([1.0, mean, mean**2], dtype=torch.float64), cosine)[1])
        limit = float(strength(after.thresholds[row].double()))
        return _NORMAL.cdf((turned + self.shift - limit) / math.sqrt(variance))

    def state(self) -> dict[str, np.ndarray]:
        """Return named arrays for a safetensors file."""
        return {
            "fitted": np.array([self.rate, self.shift, self.deviation], np.float64),
            **{name: tensor.numpy() for name, tensor in self.whitening.state().items()},
            "directions": self.directions.numpy().copy(),
            "thresholds": self.thresholds.numpy().copy(),
            "scores": self.scores.numpy().copy(),
        }

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Rejector:
        """Restore from the arrays of `state`, bit for bit.

        Raises:
            BundleRefusedError: An array is missing, has a wrong shape or values that `fit` does not give.
        """
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
        check_state(tensors, SCHEMA, {}, UNKNOWN)
        rate, shift, deviation = tensors["fitted"].tolist()
        directions, thresholds, scores = (tensors[key] for key in ("directions", "thresholds", "scores"))
        counts = scores[:, 0]
        if not (0.5 < rate < 1 and shift <= 0 < deviation):
            raise BundleRefusedError(
                f"the thresholds for '{UNKNOWN}' are damaged: a rate of {rate:g}, a shift of {shift:g} and a deviation "
                f"of {deviation:g}; install the bundle again"
            )
        tolerance = 1e-6 * (1 + scores[:, 2].abs())
        possible = (counts >= 0) & (counts == counts.round())
        possible &= scores[:, 1].square() <= counts * (scores[:, 2] + tolerance)
        if not bool(possible.all()):
            raise BundleRefusedError(
                f"the scores behind the thresholds for '{UNKNOWN}' are damaged: no images have the number, sum and sum "
                f"of squares {scores[~possible][0].tolist()}; install the bundle again"
            )
        check_unit(directions, DIRECTION_ROUNDING, f"the directions of '{UNKNOWN}'")
        whitening = Whitening.from_state(tensors)
        return cls(rate, shift, deviation, whitening, directions, thresholds, scores)

    def _check(self, embeddings: Tensor) -> None:
        dim = self.whitening.dim
        if embeddings.ndim != 2 or embeddings.shape[1] != dim:
            raise InputError(f"embeddings must have shape (N, {dim}), but have {tuple(embeddings.shape)}")
        if not bool(torch.isfinite(embeddings).all()):
            raise InputError("an embedding holds NaN or infinity; check the image and the backbone")

    @staticmethod
    def _check_rows(rows: set[int], classes: int) -> None:
        wrong = [row for row in sorted(rows) if not 0 <= row < classes]
        if wrong:
            raise InputError(f"there are {classes} rows, so there is no row {wrong[0]}; rows are numbered from 0")

    def _white_means(self, rows: Iterable[int], statistics: ClassStatistics) -> Iterable[tuple[int, Tensor]]:
        """Yield some rows, each with the whitened mean of its class, float64 ``(D,)``; zero without samples."""
        means = statistics.means
        return ((row, self.whitening.of(means[row])) for row in rows)

    def _directions(self, rows: Iterable[int], statistics: ClassStatistics) -> Tensor:
        """Return the whitened means of some classes at unit length, float32 ``(n, D)``; zero without samples."""
        white = [mean for _, mean in self._white_means(rows, statistics)]
        return torch.stack([(mean / mean.norm()).float() if bool(mean.any()) else mean.float() for mean in white])

    def _grown(self, classes: int, statistics: ClassStatistics) -> Rejector:
        """Return a rejector with `classes` rows; the new ones follow from the statistics."""
        first = len(self.thresholds)
        if classes <= first:
            return self
        new = range(first, classes)
        directions = torch.cat([self.directions, self._directions(new, statistics)])
        thresholds = torch.cat([self.thresholds, torch.full((len(new),), NEVER)])
        scores = torch.cat([self.scores, self.scores.new_zeros(len(new), 3)])
        grown = dataclasses.replace(self, directions=directions, thresholds=thresholds, scores=scores)
        return grown._with_thresholds(new, statistics)

    def _turned(self, row: int, statistics: ClassStatistics) -> Rejector:
        """Return a rejector with the direction of a class from the statistics, and its scores as expected there."""
        grown = self._grown(max(row + 1, len(self.thresholds)), statistics)
        directions, scores = grown.directions.clone(), grown.scores.clone()
        directions[row] = self._directions([row], statistics)[0]
        scores[row] = _turn(scores[row], float(directions[row] @ grown.directions[row]))
        return dataclasses.replace(grown, directions=directions, scores=scores)

    def _normal(self, row: int) -> tuple[float, float, float]:
        """Return mean and variance of s for one more image of a class, and the degrees of freedom; 0 without scores."""
        count = float(self.scores[row, 0])
        if not count:
            return 0.0, 1.0, 0.0
        freedom = PRIOR + count - 1
        scatter = float(_scatter(self.scores[row]))
        variance = (PRIOR * self.deviation**2 + scatter) / freedom * (1 + 1 / count)
        return float(_means(self.scores[row])), variance, freedom

    def _with_thresholds(self, rows: Iterable[int], statistics: ClassStatistics) -> Rejector:
        """Return a rejector with the thresholds of some rows computed from their scores, or else their statistics."""
        thresholds, unscored = self.thresholds.clone(), []
        for row in rows:
            mean, variance, freedom = self._normal(row)
            if not bool(self.directions[row].any()):
                thresholds[row] = NEVER
            elif freedom:
                thresholds[row] = self._threshold(mean, variance, freedom)
            else:
                unscored.append(row)
        for row, white in self._white_means(unscored, statistics) if unscored else ():
            # Expected for a new image z: |Wz|² is the squared length of Wμ, which the estimate exceeds by D/n, plus D.
            count, dim, squared = float(statistics.counts[row]), len(white), float(white.square().sum())
            true = max(squared - dim / count, 0.0)
            mean = float(strength(torch.tensor(true / math.sqrt(squared * (true + dim)))))
            thresholds[row] = self._threshold(mean, self.deviation**2 * (1 + 1 / count), PRIOR)
        return dataclasses.replace(self, thresholds=thresholds)

    def _threshold(self, mean: float, variance: float, freedom: float) -> float:
        """Return the smallest cosine that is accepted, for mean and variance of s for one more image."""
        limit = mean + self.shift - t_quantile(self.rate, freedom) * math.sqrt(variance)
        return min(max(-math.expm1(-limit), -1.0), 1.0)


def held_out_parts(rows: Tensor, classes: int) -> Tensor:
    """Return the part in which `Rejector.calibrate` holds out each image, int64 ``(N,)``; −1 if it never does.

    Args:
        rows: Rows of the images, int64 ``(N,)``.
        classes: Number of rows.
    """
    part, generator = torch.full_like(rows, -1), torch.Generator().manual_seed(0)
    for row in range(classes):
        own = (rows == row).nonzero().flatten()
        if len(own) < FOLDS:  # a class needs images in every part
            continue
        some = own[torch.randperm(len(own), generator=generator)[:HELD_OUT]]
        part[some] = torch.arange(len(some)) % FOLDS
    return part


def _of(embeddings: Tensor, rows: Tensor) -> tuple[ClassStatistics, Tensor]:
    """Return statistics of embeddings, and the rows that they stand for."""
    statistics = ClassStatistics(embeddings.shape[1])
    if len(rows):
        statistics.add(embeddings, rows)
    return statistics, torch.arange(len(statistics.counts))


def _moments(cosines: Tensor, rows: Tensor, classes: int) -> Tensor:
    """Return number, sum and sum of squares of s by row, float64 ``(C, 3)``."""
    s = strength(cosines.double())
    values = torch.stack([torch.ones_like(s), s, s.square()], 1)
    return torch.zeros(classes, 3, dtype=torch.float64).index_add_(0, rows, values)


def _means(scores: Tensor) -> Tensor:
    return scores[..., 1] / scores[..., 0].clamp_min(1)


def _scatter(scores: Tensor) -> Tensor:
    """Return Σ (s − m)² from number, sum and sum of squares."""
    return (scores[..., 2] - scores[..., 1].square() / scores[..., 0].clamp_min(1)).clamp_min(0)


def _turn(scores: Tensor, cosine: float) -> Tensor:
    """Return the scores ``(3,)`` of images as expected against another direction, at this cosine to the first one.

    What is not along the first direction is noise in all others, so that cosines shrink by that factor.
    """
    count = float(scores[0])
    if not count:
        return scores
    mean = 1 - torch.exp(-_means(scores))
    moved = float(strength(mean * min(max(cosine, -1.0), 1.0)))
    return torch.stack([scores[0], torch.tensor(count * moved).double(), count * moved**2 + _scatter(scores)])
