"""Checks between learning and committing.

`judge` and `judge_edit` look at a change, `Judgement.check` refuses it. A change is refused if it would harm the
device: NaN or infinity, more forgetting than allowed since the classes were taught, new images that would not be
recognised. Anything that only an operator can decide, such as a mislabelled folder, is a warning. No old image is
needed: old classes are represented by stand-ins, see `ssd_edge.learners.retention`.

Distances are squared Mahalanobis distances in the pooled within-class covariance. Distances between means are corrected
for the sampling noise of the means, so that two samples of one class have an expected distance of 0, whatever their
size.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from device_runtime.learning.state import DeviceState
from device_runtime.results import ClassRetention, Retention, Suspects
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import GateRefusedError, InputError
from ssd_edge.learners import Learner
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.retention import Cost, TrackRecord, cost, scores_of

KIND = "estimate for the classes of the bundle, from their test images and stand-ins; no old image was used"
TOO_FEW = "cannot be estimated: the bundle has {} test images of the old classes on record, and {} are needed"
OTHERWISE = "cannot be estimated: too much has changed since the classes of the bundle were tested"
CHANGED = 0.03  # distance of the estimate from the test results from which on it is not shown: beyond, it errs more
ENOUGH = 30  # test images of all old classes, with which their mean accuracy is known within nine points or so
NOTICEABLE = 0.005  # drop of the mean accuracy below which a change is not held responsible for earlier losses
CONFIDENCE = 1.645  # of the upper bound on recognition, in standard errors: one-sided 95 %
# Thresholds on images were set on CIFAR-10 embeddings (256 features).
CONFUSED = 0.35  # share of held-out images answered as a known class by a learner that has learned the others as new
CLEAR = 0.8  # share of a folder answered with one class, not with ``unknown``, that needs no further evidence
RECOGNISED = 0.5  # minimum share of a folder predicted as one class to call it a duplicate of that class
FEW = 3  # images: a group has at least this many
MIXED_SHARE = 0.2  # of a folder: a group has at least this share
SAME_CLASS = 2.0  # squared distance of means below which the best linear rule errs on Φ(−√2/2) = 24 % of images
TELLABLE = 9.0  # squared distance above which single images can be told apart: Φ(−3/2) = 7 % errors
SURE = 2.0  # standard errors; a lower value finds more mixed folders and flags more clean ones
ROUNDS = 10  # of regrouping a folder; two or three are enough
AXES = 16  # principal directions of the old means; in all directions the mean of a few images is too noisy
FAR = 3.0  # times the median squared distance from the centre; natural images reach 2.5 in folders of 20
SHOWN = 5  # names in a message


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits on what a change may cost.

    Attributes:
        max_forgetting: Largest estimated loss of accuracy since the classes were installed or taught, by this and all
            earlier changes: the mean over the old classes, 0..1. 1 allows everything.
        max_class_forgetting: Largest such loss of a single class, 0..1.
        class_warning: Drop of a single class by this change above which a warning names it, 0..1.
        min_recognised: Share of the held-out images of a taught class that must be recognised, 0..1. A class is refused
            if its true share is below with 95 % confidence. 0 also accepts images of a known class under the name of
            another.
        force: Allow everything but NaN.
        hints: Let messages name the options that allow a refused change; False where there are none.
    """

    max_forgetting: float = 0.1
    max_class_forgetting: float = 0.5
    class_warning: float = 0.25
    min_recognised: float = 0.3
    force: bool = False
    hints: bool = True

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
class Trial:
    """Answers to new images by learners that have learned the other new images only.

    Attributes:
        answers: Predicted rows, int64 ``(N,)``; −1 for an image that was never held out.
        promised: `calibration.promises` of the answers, float64 ``(N, G)``; 0 for an image that was never held out.
    """

    answers: Tensor
    promised: Tensor

    def of(self, own: Tensor) -> Tensor:
        """Return the answers to those of the images `own` that were held out."""
        answers = self.answers[own]
        return answers[answers >= 0]


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Result of `judge` and `judge_edit`.

    Attributes:
        retention: Estimated accuracy on the old classes; None without old classes or if the scores are not finite.
        agreement: Share of the new images for which both learners choose the same old class, among old classes only;
            None without old classes. It is 1 for a learner that only adds a class.
        warnings: Sentences.
        refusals: Sentences; empty if the change may be committed.
        suspects: Images that the warnings refer to.
        record: Held-out results with the losses by this change.
    """

    retention: Retention | None
    agreement: float | None
    warnings: list[str]
    refusals: list[str]
    suspects: list[Suspects]
    record: TrackRecord

    def check(self) -> None:
        """Refuse the change if there is a reason to.

        Raises:
            GateRefusedError: There are refusals; the message lists all of them.
        """
        if self.refusals:
            raise GateRefusedError("nothing was changed: " + "; ".join(self.refusals))


def judge(
    before: DeviceState,
    after: DeviceState,
    embeddings: Tensor,
    rows: Tensor,
    trial: Trial,
    limits: Limits | None = None,
    names: Sequence[str] | None = None,
) -> Judgement:
    """Judge a learn before it is committed.

    Args:
        before: The state before it.
        after: The state after it, with the thresholds and held-out results of the taught classes.
        embeddings: Embeddings of the new images, float32 ``(N, D)``.
        rows: Rows that they were taught as, int64 ``(N,)``; of new or known classes.
        trial: Answers to them while they were held out.
        limits: Limits; None for the defaults.
        names: Names of the images in messages; None for ``image 0``, …
    """
    limits, registry = limits or Limits(), after.registry
    shown = [f"image {number}" for number in range(len(embeddings))] if names is None else list(names)
    suspects: list[Suspects] = []
    answers = _answers(before, embeddings)
    warnings = _check_images(before, answers, trial, embeddings, rows, registry, shown, suspects)
    refusals = _check_finite(after.learner, embeddings)
    retention, agreement, record = None, None, after.record
    if not refusals:
        messages = _unrecognised(rows, trial, registry, limits)
        if limits.min_recognised:
            messages += _mislabelled(before, answers, rows, registry, limits)
        (warnings if limits.force else refusals).extend(messages)
        if before.statistics.total:
            found = cost(before.learner, after.learner, before.statistics, before.record)
            found = _with_unknown(found, before, after, set(rows.tolist()))
            record = after.record.after(found.before - found.after, found.rows)
            not_finite = "the taught learner gives NaN or infinity for old classes; teach again with other images"
            retention = _check_forgetting(
                found, before.record, record, registry, limits, warnings, refusals, not_finite
            )
            agreement = _agreement(before.learner, after.learner, embeddings) if found.finite else None
    return Judgement(retention, agreement, warnings, refusals, suspects, record)


def judge_edit(
    before: DeviceState,
    after: Learner,
    statistics: ClassStatistics,
    registry: ClassRegistry,
    limits: Limits | None = None,
    renumbered: Mapping[int, int] | None = None,
) -> Judgement:
    """Judge a change that has no new images before it is committed.

    Args:
        before: The state before it.
        after: The learner after it, with its classes still in the same rows.
        statistics: Statistics of the classes to tell apart, in the same rows.
        registry: Classes of these rows.
        limits: Limits; None for the defaults.
        renumbered: Row → row that counts as the same class after the change.
    """
    warnings: list[str] = []
    refusals = _check_finite(after, torch.zeros(0, after.dim))
    retention, record = None, before.record
    if not refusals and statistics.total and bool(after.seen.any()):
        same = torch.arange(max(len(before.learner.seen), len(after.seen)))  # a merge adds rows
        for row, target in (renumbered or {}).items():
            same[row] = target
        found = cost(before.learner, after, statistics, record, same)
        record = record.after(found.before - found.after, found.rows)
        not_finite = "the edited learner gives NaN or infinity; roll back to an earlier generation"
        retention = _check_forgetting(
            found, before.record, record, registry, limits or Limits(), warnings, refusals, not_finite
        )
    return Judgement(retention, None, warnings, refusals, [], record)


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


def _answers(state: DeviceState, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest class of each embedding, int64 ``(N,)``, and if it is accepted, bool ``(N,)``."""
    if not len(state.registry):
        return torch.full((len(embeddings),), -1), torch.zeros(len(embeddings), dtype=torch.bool)
    nearest = state.learner.predict(embeddings)
    return nearest, state.rejector.accepts(embeddings, nearest)[0]


def _unrecognised(rows: Tensor, trial: Trial, registry: ClassRegistry, limits: Limits) -> list[str]:
    """Return a message for each taught class whose held-out images are not recognised as it."""
    messages = []
    for row in torch.unique(rows).tolist():
        answers = trial.of(rows == row)
        count, right = len(answers), int((answers == row).sum())
        if not count or _upper_bound(right, count) >= limits.min_recognised:
            continue
        other = int(answers[answers != row].mode().values)
        wrong = int((answers == other).sum())
        messages.append(
            f"{right} of {count} held-out images of '{registry.names[row]}' would be recognised, and {wrong} taken for "
            f"'{registry.names[other]}'. Check that they show what it says; if they do, take more and different "
            f"images{', or allow it with --force' if limits.hints else ''}"
        )
    return messages


def _mislabelled(
    before: DeviceState, answers: tuple[Tensor, Tensor], rows: Tensor, registry: ClassRegistry, limits: Limits
) -> list[str]:
    """Return a message for each known class whose new images are clearly those of another known class.

    They would be recognised afterwards, at the cost of the other class, which stand-ins do not always show.
    """
    messages = []
    allowed = "; if it is right, allow it with --force" if limits.hints else ""
    nearest, accepted = answers
    answered = nearest.masked_fill(~accepted, -1)
    for row in torch.unique(rows).tolist():
        if row >= len(before.registry):
            continue
        own = answered[rows == row]
        other = int(own.mode().values)
        count = int((own == other).sum())
        if other not in (row, -1) and count >= CLEAR * len(own):
            messages.append(
                f"{count} of {len(own)} images taught as '{registry.names[row]}' are recognised as "
                f"'{registry.names[other]}'. Check the label{allowed}"
            )
    return messages


def _upper_bound(right: int, count: int) -> float:
    """Return the upper end of the one-sided 95 % interval of a share (Wilson 1927)."""
    share, square = right / count, CONFIDENCE**2
    reach = CONFIDENCE * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return (share + square / (2 * count) + reach) / (1 + square / count)


def _with_unknown(found: Cost, before: DeviceState, after: DeviceState, taught: set[int]) -> Cost:
    """Count stand-ins of taught classes that would now be ``unknown``; other classes keep their thresholds."""
    share = found.after.clone()
    for number, row in enumerate(found.rows.tolist()):
        if row in taught:
            was = before.rejector.acceptance(row, before.rejector)
            share[number] *= min(before.rejector.acceptance(row, after.rejector) / max(was, 1e-6), 1.0)
    return dataclasses.replace(found, after=share)


def _check_forgetting(
    found: Cost,
    before: TrackRecord,
    after: TrackRecord,
    registry: ClassRegistry,
    limits: Limits,
    warnings: list[str],
    refusals: list[str],
    not_finite: str,
) -> Retention | None:
    """Return the retention estimate with its worst class, and add to the messages.

    Args:
        found: Estimated accuracy before and after the change.
        before: Held-out results and losses before it.
        after: The same after it.
        registry: Names of the rows.
        limits: Limits.
        warnings: Warnings are added here.
        refusals: Refusals are added here.
        not_finite: Refusal if the scores are not finite.
    """
    if not found.finite:
        refusals.append(not_finite)
        return None
    rows, drops = found.rows, found.before - found.after
    worst = int(drops.argmax())
    old, new = float(found.before[worst]), float(found.after[worst])
    label = registry.names[int(rows[worst])]
    lost, earlier = after.lost[rows], before.lost[rows]
    base = torch.tensor([registry.entries[row].origin == "base" for row in rows.tolist()])
    groups = [("the old classes", torch.ones_like(base))]
    if bool(base.any()):
        groups.insert(0, ("the classes of the bundle", base))
    messages = []
    for group, which in groups:
        total, past = float(lost[which].mean()), float(earlier[which].mean())
        if total > limits.max_forgetting and total - past > NOTICEABLE:
            messages.append(
                f"{group} would lose {total - past:.3f} of their accuracy, after {past:.3f} by earlier changes, where "
                f"max_forgetting allows {limits.max_forgetting:g} in all; '{label}' loses most ({old:.0%} to "
                f"{new:.0%}). Check that the new images show no old class"
                f"{', use a learner that forgets less (slda), or raise max_forgetting' if limits.hints else ''}"
            )
            break
    gone = [registry.names[int(row)] for row in rows[(lost > limits.max_class_forgetting) & (drops > NOTICEABLE)]]
    if gone and limits.max_forgetting < 1:
        messages.append(
            f"{_quoted(gone)} would lose {float(lost.max()):.0%} of the images recognised when taught, where at most "
            f"{limits.max_class_forgetting:.0%} are allowed; check that the new images show another class, or teach it "
            "again together with the new one"
        )
    (warnings if limits.force else refusals).extend(messages)
    if not messages:
        for row, was, now in zip(rows.tolist(), found.before.tolist(), found.after.tolist(), strict=True):
            if was - now > limits.class_warning:
                warnings.append(
                    f"'{registry.names[row]}' may be recognised less often now: estimated {was:.0%} before and "
                    f"{now:.0%} after; try it, and roll back if it matters more than the new class"
                )
    kind = _unknown_level(found, before, base)
    levels = [float((part * before.accepted(rows))[base].mean()) for part in (found.before, found.after)]
    return Retention(
        kind=kind or KIND,
        accuracy_before=None if kind else round(levels[0], 4),
        accuracy_after=None if kind else round(levels[1], 4),
        drop=round(float(drops.mean()), 4),
        lost=round(float(lost.mean()), 4),
        worst=ClassRetention(label, round(old, 4), round(new, 4), round(old - new, 4)),
    )


def _unknown_level(found: Cost, before: TrackRecord, tested: Tensor) -> str:
    """Return why the accuracy on the classes of the bundle cannot be estimated, or an empty string.

    Held-out images of a class that was taught on the device come from one occasion and resemble each other, so that
    they say little about later images; only test images of the workstation do.

    Args:
        found: Estimated accuracy before and after the change.
        before: Held-out results before it.
        tested: True for the old classes that the workstation has tested, bool ``(n,)``.
    """
    rows = found.rows[tested]
    count = int(before.tested[rows].sum())
    if count < ENOUGH:
        return TOO_FEW.format(count, ENOUGH)
    moved = abs(float((found.after[tested] - before.expected(rows)).mean()))
    return OTHERWISE if moved > CHANGED else ""


def _agreement(before: Learner, after: Learner, embeddings: Tensor) -> float | None:
    known = before.seen.nonzero().flatten()
    if not len(known):
        return None
    old, new = (scores_of(learner, embeddings, known).argmax(1) for learner in (before, after))
    return round(float((old == new).double().mean()), 4)


class _Space:
    """Whitened space, in which the pooled within-class covariance is the identity, and the old means in it."""

    def __init__(self, statistics: ClassStatistics) -> None:
        known, self._statistics = int((statistics.counts > 0).sum()), statistics
        self.factor = torch.linalg.cholesky(statistics.shrunk_covariance())
        self.means, self.counts = self.whiten(statistics.means), statistics.counts
        # With fewer images the covariance is too rough to judge a few images.
        self.trusted = statistics.degrees_of_freedom >= 2 * self.factor.shape[0]
        centred = self.means[self.counts > 0] - self.means[self.counts > 0].mean(0)
        self.axes = torch.linalg.svd(centred, full_matrices=False).Vh[: min(known - 1, AXES)].T

    @functools.cached_property
    def _trace(self) -> float:
        """D, less what shrinkage removes; it takes long for many features and is needed for suspicious images only."""
        return float(torch.cholesky_solve(self._statistics.within_covariance(), self.factor).trace())

    def whiten(self, vectors: Tensor) -> Tensor:
        """Return whitened vectors, float64 ``(N, D)``."""
        white: Tensor = torch.linalg.solve_triangular(self.factor, vectors.double().T, upper=False).T
        return white

    def noise(self, row: int) -> float:
        """Return the expected squared error of an old mean."""
        return self._trace / float(self.counts[row])

    def distance(self, group: Tensor, row: int) -> float:
        """Return the squared distance of the mean of a group ``(n, D)`` from an old mean, less the noise of both."""
        distance = float((group.mean(0) - self.means[row]).square().sum())
        return distance - float(group.var(0).sum()) / len(group) - self.noise(row)


def _check_images(
    before: DeviceState,
    answered: tuple[Tensor, Tensor],
    trial: Trial,
    embeddings: Tensor,
    rows: Tensor,
    registry: ClassRegistry,
    names: list[str],
    suspects: list[Suspects],
) -> list[str]:
    """Return warnings about duplicates of known classes, mixed folders and outliers; add to `suspects`."""
    warnings: list[str] = []
    statistics = before.statistics
    if statistics.degrees_of_freedom <= 0:
        return warnings  # no class has two images, so there is no covariance
    space, (predicted, accepted) = _Space(statistics), answered
    for row in torch.unique(rows).tolist():
        own = (rows == row).nonzero().flatten()
        if len(own) < FEW:
            continue
        white, answers, label = space.whiten(embeddings[own]), predicted[own], registry.names[row]
        known = row < len(statistics.counts) and float(statistics.counts[row]) > 0
        if known:
            duplicate = _duplicate(space, white, answers, row)
            if duplicate is None and not bool(((answers == row) & accepted[own]).any()):
                warnings.append(
                    f"none of the {len(own)} images taught as '{label}' was recognised as it before; if they show "
                    "something else, roll back, because from now on it is recognised as well"
                )
        else:
            duplicate = _known_class(answers, accepted[own], trial.of(own))
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


def _known_class(answers: Tensor, accepted: Tensor, held_out: Tensor) -> int | None:
    """Return the known class that images of a new class belong to, or None.

    They are recognised as it, or a learner that has learned others of them under the new name cannot tell the two apart
    and answers about half of them with each.

    Args:
        answers: Answers before the learn, int64 ``(n,)``.
        accepted: False where the answer was ``unknown``, bool ``(n,)``.
        held_out: Answers while the images were held out.
    """
    row = int(answers.mode().values)
    confused = float((held_out == row).double().mean()) if len(held_out) else 0.0
    recognised = float(((answers == row) & accepted).double().mean())
    clear = recognised >= CLEAR or (recognised >= RECOGNISED and confused >= CONFUSED)
    return row if clear else None


def _duplicate(space: _Space, white: Tensor, answers: Tensor, own: int) -> int | None:
    """Return the known class that images of the known class `own` belong to, other than `own`, or None."""
    row = int(answers.mode().values)
    if row == own or float((answers == row).double().mean()) < RECOGNISED:
        return None
    distance = space.distance(white, row)
    if distance > SAME_CLASS or space.distance(white, own) < distance + TELLABLE:
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
