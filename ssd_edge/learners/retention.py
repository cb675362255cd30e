"""Held-out results of classes, measured when they were taught, and estimates of what a later change costs them.

When a class is taught, some of its images are held out and the number that is answered correctly is stored: the only
honest figure about it, since its images are gone afterwards. What a change costs is estimated with stand-ins: Gaussian
embeddings around the class mean, with the covariance of the training images. Nearly all of them are recognised, because
the learner was solved from the same images; real errors gather on hard images. A share of the stand-ins is therefore
hard: their noise is scaled, for each class by itself, until only few are recognised. The share is such that of all as
many are recognised as held-out images were (`TrackRecord.measured`). Were the noise of all scaled instead, a new class
would seem to take images from old ones that it leaves alone: it mostly takes hard ones, which were answered wrongly
before.

Stand-ins of a class lie around its first images (`TrackRecord.anchors`): images taught later under the same name count
only if they were recognised as it, so that a series of mislabelled images cannot move what is to be remembered.

The same held-out images say how sure the learner may be of an answer (`TrackRecord.confidence`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from ssd_edge.errors import BundleRefusedError
from ssd_edge.learners import calibration
from ssd_edge.learners.base import LARGEST_COUNT, Learner, TensorSpec, check_state
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.unknown import Rejector

SAMPLES = 60  # stand-ins per class: a standard error of at most 6.5 points for one class, far less for the mean
NARROWEST, WIDEST, STEPS = 0.25, 32.0, 8  # of the bisection for the scale of the noise
SPREAD = 1.3  # while there is nothing to match: Gaussians are easier to classify than real embeddings
MOST = 1 - 0.5 / SAMPLES  # highest share that can be matched
EASY = 1.15  # scale of the noise of the other stand-ins: new images vary more than those it was measured on
FEW = 0.5  # samples per feature below which all stand-ins are scaled alike: safer, and more good classes are refused
HARD = 0.3  # share of hard stand-ins that is recognised
ROUNDING = 1e-6  # of sums of probabilities
PRIOR = 20.0  # images that the mean of all classes counts as: images of one occasion tell less than their number
SCHEMA = {
    "tested": TensorSpec(("C",), "float64", "held-out images of each class", least=0, most=LARGEST_COUNT, whole=True),
    "nearest": TensorSpec(("C",), "float64", "of these, nearest to it", least=0, most=LARGEST_COUNT, whole=True),
    "right": TensorSpec(("C",), "float64", "of these, not 'unknown'", least=0, most=LARGEST_COUNT, whole=True),
    "promised": TensorSpec(
        ("C", len(calibration.TEMPERATURES)),
        "float64",
        "summed probabilities of the answers to them, at fixed temperatures",
        least=0,
        most=LARGEST_COUNT,
    ),
    "taught": TensorSpec(("C",), "uint8", "1 for a class that a device was taught and tested", most=1),
    "spread": TensorSpec(("C",), "float64", "scale of the noise of hard stand-ins", least=NARROWEST, most=WIDEST),
    "hard": TensorSpec(("C",), "float64", "share of the stand-ins that is hard", least=0, most=1),
    "lost": TensorSpec(("C",), "float64", "estimated loss of accuracy since it was taught", least=0, most=1),
    "anchors": TensorSpec(("C", "D"), "float32", "mean of the images of each class that are to be remembered"),
    "anchored": TensorSpec(("C",), "float64", "number of these images", least=0, most=LARGEST_COUNT, whole=True),
}


@dataclasses.dataclass(frozen=True)
class TrackRecord:
    """Held-out results of each class and their estimated loss since; immutable. Its size depends on C and D only.

    Attributes:
        tested: Number of held-out images, float64 ``(C,)``.
        nearest: How many of them were nearest to their class, float64 ``(C,)``.
        right: How many of these were answered with it, not with ``unknown``, float64 ``(C,)``.
        promised: Sums of the `calibration.promises` of the answers to them, float64 ``(C, G)``.
        taught: 1 for a class that was tested by a device, when it was taught there, uint8 ``(C,)``.
        spread: Scale of the noise of hard stand-ins, float64 ``(C,)``.
        hard: Share of the stand-ins that is hard, 0..1, float64 ``(C,)``.
        lost: Estimated loss of accuracy by all later changes, 0..1, float64 ``(C,)``.
        anchors: Mean of the images that are to be remembered, float32 ``(C, D)``.
        anchored: Number of these images, float64 ``(C,)``.
    """

    tested: Tensor
    nearest: Tensor
    right: Tensor
    promised: Tensor
    taught: Tensor
    spread: Tensor
    hard: Tensor
    lost: Tensor
    anchors: Tensor
    anchored: Tensor

    @classmethod
    def of(
        cls,
        learner: Learner,
        statistics: ClassStatistics,
        tested: Tensor,
        nearest: Tensor,
        right: Tensor,
        promised: Tensor | None = None,
    ) -> TrackRecord:
        """Return the record of classes that were tested once, with all of them in place.

        Args:
            learner: The learner that was tested.
            statistics: Class statistics.
            tested: Number of test images of each class, ``(C,)``; may be zero.
            nearest: How many of them are nearest to their class, ``(C,)``.
            right: How many of these are accepted, ``(C,)``.
            promised: Sums of the `calibration.promises` of the test images, ``(C, G)``; None if they are not known.
        """
        classes = len(statistics.counts)
        zeros = torch.zeros(classes, dtype=torch.float64)
        anchors = statistics.means.float(), statistics.counts.clone()
        promised = torch.zeros(classes, len(calibration.TEMPERATURES)).double() if promised is None else promised
        counted = cls(
            tested.double(),
            nearest.double(),
            right.double(),
            promised,
            zeros.byte(),
            zeros + 1.0,
            zeros,
            zeros,
            *anchors,
        )
        return counted._matched(learner, statistics, range(classes))

    @classmethod
    def tested_on(
        cls, learner: Learner, statistics: ClassStatistics, rejector: Rejector, images: Tensor, rows: Tensor
    ) -> TrackRecord:
        """Return the record of classes after testing a learner on embeddings of images.

        Args:
            learner: The learner.
            statistics: Class statistics.
            rejector: Thresholds for ``unknown``.
            images: Test embeddings, ``(N, D)``.
            rows: Their rows, int64 ``(N,)``.
        """
        answers = learner.predict(images).cpu()
        nearest = answers == rows
        parts = torch.ones_like(nearest), nearest, nearest & rejector.accepts(images, answers)[0]
        classes = len(statistics.counts)
        tested, near, right = (torch.bincount(rows[part], minlength=classes) for part in parts)
        promised = torch.zeros(classes, len(calibration.TEMPERATURES)).double()
        promised = promised.index_add(0, rows, promises_of(learner, images))
        return cls.of(learner, statistics, tested, near, right, promised=promised)

    def measured(
        self,
        learner: Learner,
        statistics: ClassStatistics,
        row: int,
        tested: int,
        nearest: int,
        right: int,
        recognised: Tensor,
        promised: Tensor,
    ) -> TrackRecord:
        """Return a record with further held-out images of a class, and its noise scaled to match all of them.

        Args:
            learner: The learner that has learned all images of the class.
            statistics: Class statistics with all images.
            row: Row of the class, new or known.
            tested: Number of its images that were held out.
            nearest: How many of them were nearest to their class.
            right: How many of these were accepted.
            recognised: Embeddings of those new images that the learner recognised before, ``(n, D)``; ignored for a
                class that is new.
            promised: Sum of the `calibration.promises` of the held-out images, ``(G,)``.
        """
        answers = {row: (torch.tensor([tested, nearest, right]), promised)}
        return self._with_answers(answers, statistics, recognised)._matched(learner, statistics, [row])

    def gathered(
        self, learner: Learner, statistics: ClassStatistics, answers: Mapping[int, tuple[Tensor, Tensor]]
    ) -> TrackRecord:
        """Return a record with further held-out images of several classes, taught on other devices.

        Args:
            learner: The learner that has learned all images of the classes.
            statistics: Class statistics with all images.
            answers: Row of a class → as for `measured`: the numbers of images tested, nearest to it and accepted
                ``(3,)``, and `promised`.
        """
        nobody = self.anchors[:0]
        return self._with_answers(answers, statistics, nobody)._matched(learner, statistics, sorted(answers))

    def _with_answers(
        self, answers: Mapping[int, tuple[Tensor, Tensor]], statistics: ClassStatistics, recognised: Tensor
    ) -> TrackRecord:
        """Return a record with further held-out images, arguments as for `gathered` and `measured`; not yet matched."""
        grown = self._grown(max(answers, default=-1) + 1)
        counts = {
            name: getattr(grown, name).clone()
            for name in ("tested", "nearest", "right", "promised", "taught", "anchored")
        }
        anchors, means = grown.anchors.clone(), statistics.means.float()
        for row, (tested, promised) in answers.items():
            for name, count in zip(("tested", "nearest", "right"), tested, strict=True):
                counts[name][row] += count
            counts["promised"][row] += promised
            if earlier := float(grown.anchored[row]):
                counts["anchored"][row] += len(recognised)
                anchors[row] = (earlier * anchors[row] + recognised.sum(0)) / (earlier + len(recognised))
            else:
                counts["anchored"][row], anchors[row] = statistics.counts[row], means[row]
                counts["taught"][row] = 1
        return dataclasses.replace(grown, anchors=anchors, **counts)

    def joined(self, learner: Learner, statistics: ClassStatistics, rows: Iterable[int], into: int) -> TrackRecord:
        """Return a record in which the classes `rows` count for `into`, which keeps the largest loss among them.

        Args:
            learner: The learner after they were joined.
            statistics: Class statistics after they were joined.
            rows: Rows that were joined.
            into: Row that they were joined into.
        """
        added = ("tested", "nearest", "right", "promised", "anchored")
        parts = {name: getattr(self, name).clone() for name in (*added, "lost", "anchors")}
        together = torch.tensor([into, *rows], dtype=torch.int64)
        weights = self.anchored[together]
        parts["anchors"][into] = (weights @ self.anchors[together].double() / weights.sum().clamp_min(1)).float()
        parts["lost"][into] = self.lost[together].max()
        for name in added:
            parts[name][into] = parts[name][together].sum(0)
        return dataclasses.replace(self, **parts)._matched(learner, statistics, [into])

    def counts(self, row: int) -> Tensor:
        """Return how many images of a class were tested, nearest to it and accepted, float64 ``(3,)``."""
        return torch.stack([part[row] for part in (self.tested, self.nearest, self.right)])

    def confidence(self, scores: Tensor) -> Tensor | None:
        """Return the probabilities with which the best scores are right, float64 ``(N,)``; None if nothing is known.

        Args:
            scores: Scores of all classes, ``(N, C)``.
        """
        found = self.temperatures()
        return None if found is None else calibration.confidence(scores, found)

    def temperatures(self) -> Tensor | None:
        """Return the temperature of answers with each class, float64 ``(C,)``; None if nothing is known."""
        return calibration.temperatures(self.promised, self.nearest, self.tested, self.taught == 1)

    def without_rows(self, rows: Iterable[int]) -> TrackRecord:
        """Return a record without some rows; later rows move up."""
        removed = set(rows)
        kept = torch.tensor([row for row in range(len(self.tested)) if row not in removed], dtype=torch.int64)
        return TrackRecord(**{name: getattr(self, name)[kept] for name in SCHEMA})

    def after(self, drops: Tensor, rows: Tensor) -> TrackRecord:
        """Return a record with further losses ``(n,)`` of the classes `rows`; gains make up for earlier promised."""
        lost = self.lost.clone()
        lost[rows] = (lost[rows] + drops).clamp(0.0, 1.0)
        return dataclasses.replace(self, lost=lost)

    def expected(self, rows: Tensor) -> Tensor:
        """Return which share of images of some classes was nearest to them when they were taught, ``(n,)``.

        The shares are shrunk towards the mean of all classes.
        """
        return _shrunk(self.nearest, self.tested)[rows]

    def accepted(self, rows: Tensor) -> Tensor:
        """Return which share of these images was accepted, not ``unknown``, ``(n,)``; shrunk in the same way."""
        return _shrunk(self.right, self.nearest)[rows]

    def state(self) -> dict[str, np.ndarray]:
        """Return named arrays for a safetensors file."""
        return {name: getattr(self, name).numpy().copy() for name in SCHEMA}

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> TrackRecord:
        """Restore from the arrays of `state`, bit for bit.

        Raises:
            BundleRefusedError: An array is missing, or has a wrong shape or impossible values.
        """
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
        check_state(tensors, SCHEMA, {}, "held-out results")
        if bool((tensors["right"] > tensors["nearest"]).any() or (tensors["nearest"] > tensors["tested"]).any()):
            raise BundleRefusedError("more held-out images were recognised than tested; install the bundle again")
        if bool((tensors["promised"] > tensors["tested"][:, None] + ROUNDING).any()):
            raise BundleRefusedError("probabilities of held-out images exceed their number; install the bundle again")
        return cls(*(tensors[name] for name in SCHEMA))

    def _grown(self, classes: int) -> TrackRecord:
        missing = classes - len(self.tested)
        if missing <= 0:
            return self
        zeros = torch.zeros(missing, dtype=torch.float64)
        return TrackRecord(
            tested=torch.cat([self.tested, zeros]),
            nearest=torch.cat([self.nearest, zeros]),
            right=torch.cat([self.right, zeros]),
            taught=torch.cat([self.taught, zeros.byte()]),
            promised=torch.cat([self.promised, zeros[:, None].expand(-1, self.promised.shape[1])]),
            spread=torch.cat([self.spread, zeros + 1.0]),
            hard=torch.cat([self.hard, zeros]),
            lost=torch.cat([self.lost, zeros]),
            anchors=torch.cat([self.anchors, torch.zeros(missing, self.anchors.shape[1])]),
            anchored=torch.cat([self.anchored, zeros]),
        )

    def _matched(self, learner: Learner, statistics: ClassStatistics, rows: Iterable[int]) -> TrackRecord:
        """Return a record with the noise of the hard stand-ins of some classes, by bisection, and their share anew."""
        index = torch.tensor([row for row in rows if float(statistics.counts[row])], dtype=torch.int64)
        if not len(index):
            return self
        spread, hard = self.spread.clone(), self.hard.clone()
        if not float(self.tested.sum()) or int(learner.seen.sum()) < 2:  # a single class is always recognised
            spread[index], hard[index] = SPREAD, 1.0
            return dataclasses.replace(self, spread=spread, hard=hard)
        anchors, wider = self.anchors[index].double(), _noise(statistics, wide=True)

        def recognised(scale: Tensor, noise: Tensor = wider) -> Tensor:
            return _share(learner.predict(_stand_ins(anchors, scale, noise)), index)

        expected, few = self.expected(index), statistics.degrees_of_freedom < FEW * self.anchors.shape[1]
        easy = expected  # not looked at where the covariance says too little about what is easy
        if not few:
            easy = recognised(torch.full((len(index),), EASY).double(), _noise(statistics))
        wide = (easy < expected) | few  # all stand-ins are scaled; for some learners the noise is too wide as it is
        target = torch.where(wide, expected.clamp_max(MOST), HARD)
        low, high = (torch.full((len(index),), value).double() for value in (NARROWEST, WIDEST))
        for _ in range(STEPS):
            middle = (low * high).sqrt()
            enough = recognised(middle) > target
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        spread[index] = (low * high).sqrt()
        share = (easy - expected) / (easy - recognised(spread[index])).clamp_min(1e-6)
        hard[index] = torch.where(wide, 1.0, share.clamp(0.0, 1.0))
        return dataclasses.replace(self, spread=spread, hard=hard)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Estimated accuracy on old classes before and after a change.

    Attributes:
        rows: Rows of the old classes, int64 ``(n,)``.
        before: Accuracy before, float64 ``(n,)``.
        after: Accuracy after, float64 ``(n,)``.
        finite: True if all scores after the change are finite.
    """

    rows: Tensor
    before: Tensor
    after: Tensor
    finite: bool


def cost(
    before: Learner, after: Learner, statistics: ClassStatistics, record: TrackRecord, same: Tensor | None = None
) -> Cost:
    """Estimate what a change costs the classes in `statistics` with stand-ins that both learners classify.

    Args:
        before: The learner before it.
        after: The learner after it.
        statistics: Class statistics before it.
        record: Held-out results before it.
        same: Row → row that counts as the same class, int64 ``(C',)``; None if each row is a class.
    """
    rows, learned = (statistics.counts > 0).nonzero().flatten(), after.seen.nonzero().flatten()
    same = torch.arange(max(len(before.seen), len(after.seen))) if same is None else same
    anchors, hard = record.anchors[rows].double(), record.hard[rows]
    shares, finite = [torch.zeros(len(rows), dtype=torch.float64) for _ in range(2)], True
    for wide, scale, weight in ((False, torch.full_like(hard, EASY), 1 - hard), (True, record.spread[rows], hard)):
        if not bool(weight.any()):
            continue
        vectors = _stand_ins(anchors, scale, _noise(statistics, wide))
        scores = scores_of(after, vectors, learned)
        finite &= bool(scores.isfinite().all())
        for total, answers in zip(shares, (before.predict(vectors), learned[scores.argmax(1)]), strict=True):
            total += weight * _share(same[answers], same[rows])
    return Cost(rows, shares[0], shares[1], finite)


def _shrunk(part: Tensor, whole: Tensor) -> Tensor:
    """Return part/whole by class ``(C,)``, shrunk towards the share of all classes together; 1 without images."""
    total = float(whole.sum())
    return (part + PRIOR * (float(part.sum()) / total if total else 1.0)) / (whole + PRIOR)


def scores_of(learner: Learner, vectors: Tensor, rows: Tensor) -> Tensor:
    """Return the scores ``(N, len(rows))`` of some classes; a learner may have outputs for classes yet to come."""
    return learner.scores(vectors)[:, rows]


def promises_of(learner: Learner, images: Tensor) -> Tensor:
    """Return the `calibration.promises` of embeddings ``(N, D)``, float64 ``(N, G)``."""
    return calibration.promises(scores_of(learner, images, learner.seen.nonzero().flatten()))


def _noise(statistics: ClassStatistics, wide: bool = False) -> Tensor:
    """Return the noise of stand-ins ``(SAMPLES, D)``, float64, the same for every class and every call.

    Args:
        statistics: Class statistics, whose covariance it has.
        wide: Shrink the covariance more, towards equal variances, as for hard stand-ins.
    """
    if wide:
        factor = torch.linalg.cholesky(statistics.regular_covariance().float())  # shrunk enough for float32
    else:
        factor = torch.linalg.cholesky(statistics.shrunk_covariance()).float()
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(SAMPLES // 2, len(factor), generator=generator, dtype=torch.float64).float() @ factor.T
    noise: Tensor = torch.cat([half, -half]).double()
    return noise  # antithetic: the sample mean of a class is exact


def _stand_ins(means: Tensor, spread: Tensor, noise: Tensor) -> Tensor:
    """Return stand-ins of classes, float32 ``(n · SAMPLES, D)``: `SAMPLES` consecutive rows per class."""
    return (means[:, None] + spread[:, None, None] * noise).flatten(0, 1).float()


def _share(answers: Tensor, rows: Tensor) -> Tensor:
    """Return which share of the stand-ins of each class is answered with it, float64 ``(n,)``."""
    return (answers.reshape(len(rows), SAMPLES) == rows[:, None]).double().mean(1)
