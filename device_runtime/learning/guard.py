"""Checks between learning and committing.

`judge` and `judge_edit` look at a change, `Judgement.check` refuses it. A change is refused if it would harm the
device: NaN or infinity, forgetting above the limit, a class that is never predicted. Anything that only an operator can
decide, such as a mislabelled folder, is a warning. No old image is needed: old classes are represented by their means
and the pooled within-class covariance.

All distances are squared Mahalanobis distances in that covariance. Distances between means are corrected for the
sampling noise of the means, so that two samples of one class have an expected distance of 0, whatever their size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from device_runtime.learning.retention import Predictions, predict_pseudo, scores_of
from device_runtime.results import ClassRetention, Record, Retention, Suspects
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import GateRefusedError, InputError
from ssd_edge.learners import Learner
from ssd_edge.learners.closed_form.sums import ClassStatistics

# Thresholds on images were set on CIFAR-10 embeddings (256 features), see benchmarks/retention.py --images.
SAME_CLASS = 2.0  # squared distance of means below which the best linear rule errs on Φ(−√2/2) = 24 % of images
RECOGNISED = 0.5  # minimum share of a folder predicted as one class to call it a duplicate of that class
FEW = 3  # images: a group has at least this many
MIXED_SHARE = 0.2  # of a folder: a group has at least this share
TELLABLE = 9.0  # squared distance above which single images can be told apart: Φ(−3/2) = 7 % errors
SURE = 2.0  # standard errors; a lower value finds more mixed folders and flags more clean ones
ROUNDS = 10  # of regrouping a folder; two or three are enough
AXES = 16  # principal directions of the old means; in all directions the mean of a few images is too noisy
FAR = 3.0  # times the median squared distance from the centre; natural images reach 2.5 in folders of 20
KNOWN_BEFORE = 0.1  # minimum accuracy on a class before the change for a later accuracy of 0 to be an alarm
SHOWN = 5  # names in a message


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits on forgetting.

    Attributes:
        max_forgetting: Largest estimated drop of the mean accuracy on old classes, 0..1. A larger drop is refused, and
            so is a change after which an old class is never predicted. 1 allows everything.
        class_warning: Drop of a single class above which a warning names it, 0..1.
    """

    max_forgetting: float = 0.1
    class_warning: float = 0.25

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            InputError: A value is NaN or outside 0..1.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0.0 <= value <= 1.0:  # also true for NaN
                raise InputError(f"{field.name} must be a share from 0 to 1, but is {value}; 0.1 is ten points")


@dataclasses.dataclass(frozen=True)
class Judgement(Record):
    """Result of `judge` and `judge_edit`.

    Attributes:
        retention: Estimated accuracy on the old classes; None without old classes or if the scores are not finite.
        agreement: Share of the new images for which both learners choose the same old class, among old classes only;
            None without old classes. It is 1 for a learner that only adds a class.
        warnings: Sentences.
        refusals: Sentences; empty if the change may be committed.
        suspects: Images that the warnings refer to.
    """

    retention: Retention | None
    agreement: float | None
    warnings: list[str]
    refusals: list[str]
    suspects: list[Suspects]

    def check(self) -> None:
        """Refuse the change if there is a reason to.

        Raises:
            GateRefusedError: There are refusals; the message lists all of them.
        """
        if self.refusals:
            raise GateRefusedError("nothing was changed: " + "; ".join(self.refusals))


def judge(
    before: Learner,
    after: Learner,
    statistics: ClassStatistics,
    embeddings: Tensor,
    rows: Tensor,
    registry: ClassRegistry,
    limits: Limits | None = None,
    names: Sequence[str] | None = None,
) -> Judgement:
    """Judge a learn before it is committed.

    Args:
        before: The learner before it.
        after: The learner after it.
        statistics: Statistics of the old classes, without the new images.
        embeddings: Embeddings of the new images, float32 ``(N, D)``.
        rows: Rows that they were taught as, int64 ``(N,)``; of new or known classes.
        registry: All classes, including the new ones.
        limits: Limits on forgetting; None for the defaults.
        names: Names of the images in messages; None for ``image 0``, …
    """
    limits = limits or Limits()
    shown = [f"image {number}" for number in range(len(embeddings))] if names is None else list(names)
    suspects: list[Suspects] = []
    warnings = _check_images(before, statistics, embeddings, rows, registry, shown, suspects)
    refusals = _check_finite(after, embeddings)
    retention, agreement = None, None
    if not refusals and statistics.total:
        predictions = predict_pseudo(before, after, statistics)
        not_finite = "the taught learner gives NaN or infinity for old classes; teach again with other images"
        retention = _check_forgetting(predictions, registry, limits, warnings, refusals, not_finite)
        agreement = _agreement(before, after, embeddings) if predictions.finite else None
    return Judgement(retention, agreement, warnings, refusals, suspects)


def judge_edit(
    before: Learner,
    after: Learner,
    statistics: ClassStatistics,
    registry: ClassRegistry,
    limits: Limits | None = None,
    renumbered: Mapping[int, int] | None = None,
) -> Judgement:
    """Judge a change that has no new images before it is committed.

    Args:
        before: The learner before it.
        after: The learner after it, with its classes still in the same rows.
        statistics: Statistics of the classes to tell apart, in the same rows.
        registry: Classes of these rows.
        limits: Limits on forgetting; None for the defaults.
        renumbered: Row → row that counts as the same class after the change.
    """
    warnings: list[str] = []
    refusals = _check_finite(after, torch.zeros(0, after.dim))
    retention = None
    if not refusals and statistics.total and bool(after.seen.any()):
        found = predict_pseudo(before, after, statistics)
        same = torch.arange(max(len(before.seen), len(after.seen)))  # a merge adds rows
        for row, target in (renumbered or {}).items():
            same[row] = target
        predictions = Predictions(same[found.rows], same[found.before], same[found.after], found.finite)
        not_finite = "the edited learner gives NaN or infinity; roll back to an earlier generation"
        retention = _check_forgetting(predictions, registry, limits or Limits(), warnings, refusals, not_finite)
    return Judgement(retention, None, warnings, refusals, [])


def _check_finite(after: Learner, embeddings: Tensor) -> list[str]:
    """Return a refusal if the learner's state or its scores for the new images hold NaN or infinity."""
    broken = [name for name, t in after.state_dict().items() if t.is_floating_point() and not t.isfinite().all()]
    if broken:
        return [f"the taught learner holds NaN or infinity in {', '.join(broken)}; teach again with other images"]
    scores = scores_of(after, embeddings, after.seen.nonzero().flatten())
    bad = int((~scores.isfinite()).any(1).sum())
    if bad:
        return [
            f"the taught learner gives NaN or infinity for {bad} of the {len(scores)} new images; teach again without "
            "them"
        ]
    return []


def _check_forgetting(
    predictions: Predictions,
    registry: ClassRegistry,
    limits: Limits,
    warnings: list[str],
    refusals: list[str],
    not_finite: str,
) -> Retention | None:
    """Return the retention estimate with its worst class, and add to the messages.

    Args:
        predictions: Predictions before and after.
        registry: Names of the rows.
        limits: Limits on forgetting.
        warnings: Warnings are added here.
        refusals: Refusals are added here.
        not_finite: Refusal if the scores are not finite.
    """
    if not predictions.finite:
        refusals.append(not_finite)
        return None
    mean = predictions.summary()
    classes = predictions.per_class()
    row, old, new = max(classes, key=lambda entry: entry[1] - entry[2])
    worst = ClassRetention(registry.names[row], round(old, 4), round(new, 4), round(old - new, 4))
    if mean.drop > limits.max_forgetting:
        refusals.append(
            f"the estimated accuracy on the old classes is {mean.accuracy_before:.0%} before and "
            f"{mean.accuracy_after:.0%} after, {mean.drop:.3f} less where max_forgetting allows "
            f"{limits.max_forgetting:g}; '{worst.label}' loses most ({old:.0%} to {new:.0%}). Check that the new "
            "images show no old class, use a learner that forgets less (landmark), or raise max_forgetting"
        )
    lost = [registry.names[r] for r, was, now in classes if was >= KNOWN_BEFORE and now == 0.0]
    if lost and limits.max_forgetting < 1:
        refusals.append(
            f"{_quoted(lost)} would never be predicted again; check that the new images show another class, or teach "
            "it again together with the new one"
        )
    if not refusals:
        for row, old, new in classes:
            if old - new > limits.class_warning:
                warnings.append(
                    f"'{registry.names[row]}' may be recognised less often now: estimated {old:.0%} before and "
                    f"{new:.0%} after; try it, and roll back if it matters more than the new class"
                )
    return dataclasses.replace(mean, worst=worst)


def _agreement(before: Learner, after: Learner, embeddings: Tensor) -> float | None:
    known = before.seen.nonzero().flatten()
    if not len(known):
        return None
    old, new = (scores_of(learner, embeddings, known).argmax(1) for learner in (before, after))
    return round(float((old == new).double().mean()), 4)


class _Space:
    """Whitened space, in which the pooled within-class covariance is the identity, and the old means in it."""

    def __init__(self, statistics: ClassStatistics) -> None:
        known, covariance = int((statistics.counts > 0).sum()), statistics.within_covariance()
        self.factor = torch.linalg.cholesky(statistics.shrunk_covariance())
        self.means, self.counts = self.whiten(statistics.means), statistics.counts
        # With fewer images the covariance is too rough to judge a few images.
        self.trusted = statistics.degrees_of_freedom >= 2 * self.factor.shape[0]
        self.trace = float(torch.cholesky_solve(covariance, self.factor).trace())  # D, less what shrinkage removes
        centred = self.means[self.counts > 0] - self.means[self.counts > 0].mean(0)
        self.axes = torch.linalg.svd(centred, full_matrices=False).Vh[: min(known - 1, AXES)].T

    def whiten(self, vectors: Tensor) -> Tensor:
        """Return whitened vectors, float64 ``(N, D)``."""
        white: Tensor = torch.linalg.solve_triangular(self.factor, vectors.double().T, upper=False).T
        return white

    def noise(self, row: int) -> float:
        """Return the expected squared error of an old mean."""
        return self.trace / float(self.counts[row])

    def distance(self, group: Tensor, row: int) -> float:
        """Return the squared distance of the mean of a group ``(n, D)`` from an old mean, less the noise of both."""
        distance = float((group.mean(0) - self.means[row]).square().sum())
        return distance - float(group.var(0).sum()) / len(group) - self.noise(row)


def _check_images(
    before: Learner,
    statistics: ClassStatistics,
    embeddings: Tensor,
    rows: Tensor,
    registry: ClassRegistry,
    names: list[str],
    suspects: list[Suspects],
) -> list[str]:
    """Return warnings about duplicates of known classes, mixed folders and outliers; add to `suspects`."""
    warnings: list[str] = []
    if statistics.degrees_of_freedom <= 0:
        return warnings  # no class has two images, so there is no covariance
    space, predicted = _Space(statistics), before.predict(embeddings)
    for row in torch.unique(rows).tolist():
        own = (rows == row).nonzero().flatten()
        if len(own) < FEW:
            continue
        white, answers, label = space.whiten(embeddings[own]), predicted[own], registry.names[row]
        known = row < len(statistics.counts) and float(statistics.counts[row]) > 0
        duplicate = _duplicate(space, white, answers, row if known else None)
        if duplicate is not None:
            like, count = registry.names[duplicate], int((answers == duplicate).sum())
            advice = (
                f"check the label: they are taught as '{label}'"
                if known
                else f"more images of a known class are taught under its own name, '{like}'"
            )
            warnings.append(
                f"'{label}' looks like '{like}': {count} of {len(own)} images are recognised as it; {advice}"
            )
            continue
        odd = torch.zeros(len(own), dtype=torch.bool)
        for other in torch.unique(answers).tolist():
            if other == row or not space.trusted:
                continue
            strays = _known_strays(space, white, row, other) if known else _strays(space, white, answers, other)
            if strays.any():
                odd, found = odd | strays, own[strays].tolist()
                like, quoted = registry.names[other], _quoted([names[i] for i in found])
                suspects.append(Suspects("like", label, like, found))
                warnings.append(
                    f"{len(found)} of {len(own)} images taught as '{label}' look like '{like}' ({quoted}); if the "
                    "folder is mixed up, roll back and teach without them"
                )
        far = own[_outliers(white) & ~odd].tolist()
        if far:
            suspects.append(Suspects("far", label, None, far))
            warnings.append(
                f"{len(far)} of {len(own)} images taught as '{label}' are unlike the others "
                f"({_quoted([names[i] for i in far])}); check them, and teach without them if they show something else"
            )
    return warnings


def _duplicate(space: _Space, white: Tensor, answers: Tensor, own: int | None) -> int | None:
    """Return the known class that these images belong to, other than `own`, or None."""
    row = int(answers.mode().values)
    if row == own or float((answers == row).double().mean()) < RECOGNISED:
        return None
    distance = space.distance(white, row)
    if distance > SAME_CLASS or (own is not None and space.distance(white, own) < distance + TELLABLE):
        return None
    return row


def _known_strays(space: _Space, white: Tensor, own: int, row: int) -> Tensor:
    """Return which images of the known class `own` belong to the known class `row`, bool ``(n,)``."""
    separation = float((space.means[own] - space.means[row]).square().sum()) - space.noise(own) - space.noise(row)
    gain = (white - space.means[own]).square().sum(1) - (white - space.means[row]).square().sum(1)
    strays = gain > 0
    clear = separation >= TELLABLE and _is_group(strays) and float(gain[strays].mean()) >= separation / 2
    return strays if clear and space.distance(white[strays], row) <= TELLABLE else strays & False


def _is_group(strays: Tensor) -> bool:
    """Return True if there are enough strays to report."""
    return int(strays.sum()) >= max(FEW, math.ceil(MIXED_SHARE * len(strays)))


def _strays(space: _Space, white: Tensor, answers: Tensor, row: int) -> Tensor:
    """Return which images of a new class belong to the known class `row`, bool ``(n,)``; all False if it is not clear.

    Two groups, one with the mean of `row` and one with a mean of its own, are separated by the likelihood ratio in the
    principal directions of the old means, starting from the learner's predictions.
    """
    none, strays = torch.zeros(len(white), dtype=torch.bool), answers == row
    points, mean = white @ space.axes, space.means[row] @ space.axes
    gain, separation = torch.zeros(len(white)), 0.0
    for _ in range(ROUNDS):
        rest = ~strays
        if not _is_group(strays) or rest.sum() < max(FEW, len(white) // 3):  # a single group
            return none
        centre = points[rest].mean(0)
        separation = float((centre - mean).square().sum()) - points.shape[1] / int(rest.sum())
        gain = (points - centre).square().sum(1) - (points - mean).square().sum(1)
        strays, last = gain > 0, strays
        if torch.equal(strays, last):
            break
    else:
        return none  # not converged: there are no two groups
    # Images of `row` gain `separation` on average; the tail of another class gains little.
    count = int(strays.sum())
    if separation < TELLABLE or float(gain[strays].mean()) < separation / 2:
        return none
    if space.distance(white[strays], row) > TELLABLE:  # close to `row`, but another class
        return none
    # The grouping is biased along these axes. In all other directions the tail of a class is as far from `row` as the
    # rest of the class.
    across = white - points @ space.axes.T
    noise = SURE * math.sqrt(4 * across.shape[1] / (count * (len(white) - count)))  # of both means
    return strays if _gain(across[strays], across[~strays], space, row) > max(SAME_CLASS, noise) else none


def _gain(group: Tensor, rest: Tensor, space: _Space, row: int) -> float:
    """Return how much closer the mean of a group is to an old mean than to the mean of `rest`, less the noise."""
    mean = space.means[row] - space.axes @ (space.axes.T @ space.means[row])
    to_rest = float((group.mean(0) - rest.mean(0)).square().sum()) - float(rest.var(0).sum()) / len(rest)
    return to_rest - (float((group.mean(0) - mean).square().sum()) - space.noise(row))


def _outliers(white: Tensor) -> Tensor:
    """Return which images lie far from the median of all, bool ``(n,)``."""
    distance = (white - white.median(0).values).square().sum(1)
    size = white.shape[1]
    # Wilson & Hilferty 1931: the cube root of χ²/D is nearly normal. It raises the limit in few dimensions.
    centre, deviation = 1 - 2 / (9 * size), math.sqrt(2 / (9 * size))
    limit = max(FAR, ((centre + 4 * deviation) / centre) ** 3)
    return distance > limit * distance.median().clamp_min(1e-12)


def _quoted(names: Sequence[str]) -> str:
    """Return the first few names in quotes, and the number of the others."""
    text = ", ".join(f"'{name}'" for name in names[:SHOWN])
    return text if len(names) <= SHOWN else f"{text} and {len(names) - SHOWN} more"
