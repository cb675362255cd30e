"""Before a generation is committed: does the taught learner answer, does it still know the old classes, and are the
new images what their label says?

`judge` looks; `Judgement.check` refuses. A refusal is for what would harm the device (numbers that are none,
forgetting over the limit, a class that is gone); what only an operator can know, such as a mislabelled folder, is a
warning. No old image is needed: old classes are known by their means and the pooled within-class covariance.

Distances are squared Mahalanobis distances in that covariance. Those between means are corrected for the noise of
the means, so that two samples of one class are 0 apart on average, however few they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from device_runtime.learning.retention import Answers, ask, scores_of
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import GateRefusedError, InputError
from ssd_edge.learners import Learner
from ssd_edge.learners.closed_form.sums import ClassStatistics

# Thresholds on images were set on CIFAR-10's embeddings (256 values), see benchmarks/retention.py --images.
SAME_CLASS = 2.0  # squared distance of means under which the best linear rule errs on Φ(−√2/2) = 24 % of images
RECOGNISED = 0.5  # of a duplicate's images, at least: where classes are hard to tell apart it is not many more
FEW = 3  # images: fewer are no group
MIXED_SHARE = 0.2  # of a folder
TELLABLE = 9.0  # squared distance from which single images can be told apart: Φ(−3/2) = 7 % err
SURE = 2.0  # standard errors; fewer find more mixed folders, and call more clean ones mixed
ROUNDS = 10  # of regrouping a folder; two or three suffice
AXES = 16  # in which old classes differ most; in all dimensions the mean of a few images is too noisy for single images
FAR = 3.0  # times the median squared distance from the middle; natural images reach 2.5 in folders of 20
KNOWN_BEFORE = 0.1  # share of a class that must have been right before for "none is now" to mean anything
SHOWN = 5  # names in a sentence


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is put up with.

    Attributes:
        max_forgetting: largest estimated drop of the old classes' mean accuracy, 0..1; over it a learn is refused, and
            so is one after which an old class is never answered. 1: anything may be forgotten.
        class_warning: drop of a single class from which it is named in a warning, 0..1.
    """

    max_forgetting: float = 0.1
    class_warning: float = 0.25

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            InputError: a share outside 0..1, or none at all.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0.0 <= value <= 1.0:  # also true of NaN
                raise InputError(f"{field.name} must be a share from 0 to 1, but is {value}; 0.1 is ten points")


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What `judge` found; plain values, ready for JSON by `to_json`.

    Attributes:
        retention: as `retention.estimate`, and ``worst`` (label, accuracy_before, accuracy_after, drop); empty where
            there are no old classes or the taught learner cannot be asked.
        agreement: share of the new images to which both states give the same *old* class, were they to choose from
            those alone; None without old classes. A learner that only adds a class keeps it at 1.
        warnings: sentences.
        refusals: sentences; empty if the generation may be committed.
        suspects: of the warnings that point at images: kind (``like`` or ``far``), label, like (a class or None),
            and indices into the embeddings that were judged.
    """

    retention: dict[str, Any]
    agreement: float | None
    warnings: list[str]
    refusals: list[str]
    suspects: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return dataclasses.asdict(self)

    def check(self) -> None:
        """Refuse, if there is a reason to.

        Raises:
            GateRefusedError: with every reason.
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
    """Look at a learn before it is committed.

    Args:
        before: the state that knew the old classes only.
        after: the state that was taught.
        statistics: of the old classes, without the new images.
        embeddings: of the new images, float32 ``(N, D)``.
        rows: what they were taught as, int64 ``(N,)``; rows of new or of known classes.
        registry: names of all classes, the new ones too.
        limits: what is put up with; None: the defaults.
        names: of the images, for the sentences; None: ``image 0`` …
    """
    limits = limits or Limits()
    shown = [f"image {number}" for number in range(len(embeddings))] if names is None else list(names)
    suspects: list[dict[str, Any]] = []
    warnings = _look_at_images(before, statistics, embeddings, rows, registry, shown, suspects)
    refusals = _numbers(after, embeddings)
    retention: dict[str, Any] = {}
    agreement = None
    if not refusals and statistics.total:
        answers = ask(before, after, statistics)
        broken = "the taught learner gives NaN or infinity for old classes; teach again with other images"
        retention = _forgetting(answers, registry, limits, warnings, refusals, broken)
        agreement = _agreement(before, after, embeddings) if answers.finite else None
    return Judgement(retention, agreement, warnings, refusals, suspects)


def judge_edit(
    before: Learner,
    after: Learner,
    statistics: ClassStatistics,
    registry: ClassRegistry,
    limits: Limits | None = None,
    renumbered: Mapping[int, int] | None = None,
) -> Judgement:
    """Look at an edit before it is committed, for which there are no new images.

    Args:
        before: the state before it.
        after: the state after it, its classes still in the same rows.
        statistics: of the classes that should still be told apart, those rows too.
        registry: names of these rows.
        limits: what is put up with; None: the defaults.
        renumbered: row → row that counts as the same class now.
    """
    warnings: list[str] = []
    refusals = _numbers(after, torch.zeros(0, after.dim))
    retention: dict[str, Any] = {}
    if not refusals and statistics.total and bool(after.seen.any()):
        answers = ask(before, after, statistics)
        same = torch.arange(max(len(before.seen), len(after.seen)))  # a merge adds rows
        for row, now in (renumbered or {}).items():
            same[row] = now
        told = Answers(same[answers.rows], same[answers.before], same[answers.after], answers.finite)
        broken = "the edited learner gives NaN or infinity; roll back to an earlier generation"
        retention = _forgetting(told, registry, limits or Limits(), warnings, refusals, broken)
    return Judgement(retention, None, warnings, refusals, [])


def _numbers(after: Learner, embeddings: Tensor) -> list[str]:
    """What is not a number in the taught learner or in what it answers to the new images."""
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


def _forgetting(
    answers: Answers,
    registry: ClassRegistry,
    limits: Limits,
    warnings: list[str],
    refusals: list[str],
    broken: str,
) -> dict[str, Any]:
    """The retention estimate with its worst class; adds to the sentences, `broken` where the answers are no numbers."""
    if not answers.finite:
        refusals.append(broken)
        return {}
    retention: dict[str, Any] = dict(answers.summary())
    classes = answers.per_class()
    row, old, new = max(classes, key=lambda entry: entry[1] - entry[2])
    worst, drop = registry.names[row], float(retention["drop"])
    retention["worst"] = {
        "label": worst,
        "accuracy_before": round(old, 4),
        "accuracy_after": round(new, 4),
        "drop": round(old - new, 4),
    }
    if drop > limits.max_forgetting:
        refusals.append(
            f"of the old classes about {retention['accuracy_before']:.0%} would be recognised before and "
            f"{retention['accuracy_after']:.0%} after, {drop:.3f} less where max_forgetting allows "
            f"{limits.max_forgetting:g}; '{worst}' loses most ({old:.0%} to {new:.0%}). Check that the new images show "
            "no old class, use a learner that keeps what it knows (landmark), or raise max_forgetting"
        )
    gone = [registry.names[r] for r, was, now in classes if was >= KNOWN_BEFORE and now == 0.0]
    if gone and limits.max_forgetting < 1:  # else whoever teaches has said that anything may be forgotten
        refusals.append(
            f"{_listed(gone)} would never be answered again; check that the new images show another class, or teach "
            "it again together with the new one"
        )
    if not refusals:
        for row, old, new in classes:
            if old - new > limits.class_warning:
                warnings.append(
                    f"'{registry.names[row]}' may be recognised less often now: estimated {old:.0%} before and "
                    f"{new:.0%} after; try it, and roll back if it matters more than the new class"
                )
    return retention


def _agreement(before: Learner, after: Learner, embeddings: Tensor) -> float | None:
    known = before.seen.nonzero().flatten()
    if not len(known):
        return None
    old, new = (scores_of(learner, embeddings, known).argmax(1) for learner in (before, after))
    return round(float((old == new).double().mean()), 4)


class _Space:
    """Embeddings in which the pooled within-class covariance is the identity, and the old means in it."""

    def __init__(self, statistics: ClassStatistics) -> None:
        known, covariance = int((statistics.counts > 0).sum()), statistics.within_covariance()
        self.factor = torch.linalg.cholesky(statistics.shrunk_covariance())
        self.means, self.counts = self.whiten(statistics.means), statistics.counts
        # From fewer images than this the covariance is too rough for a judgement of a few images.
        self.trusted = statistics.degrees_of_freedom >= 2 * self.factor.shape[0]
        self.trace = float(torch.cholesky_solve(covariance, self.factor).trace())  # D, less what shrinkage takes
        centred = self.means[self.counts > 0] - self.means[self.counts > 0].mean(0)
        self.axes = torch.linalg.svd(centred, full_matrices=False).Vh[: min(known - 1, AXES)].T

    def whiten(self, vectors: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor, vectors.double().T, upper=False).T

    def noise(self, row: int) -> float:
        """Expected squared error of an old mean."""
        return self.trace / float(self.counts[row])

    def apart(self, group: Tensor, row: int) -> float:
        """Squared distance of a group's mean ``(n, D)`` from an old mean, without the noise of both."""
        distance = float((group.mean(0) - self.means[row]).square().sum())
        return distance - float(group.var(0).sum()) / len(group) - self.noise(row)


def _look_at_images(
    before: Learner,
    statistics: ClassStatistics,
    embeddings: Tensor,
    rows: Tensor,
    registry: ClassRegistry,
    names: list[str],
    suspects: list[dict[str, Any]],
) -> list[str]:
    """Warnings about duplicates of known classes, mixed-up folders and images far from the others."""
    warnings: list[str] = []
    if statistics.degrees_of_freedom <= 0:
        return warnings  # no class with two images: nothing is known about distances
    space, answered = _Space(statistics), before.predict(embeddings)
    for row in rows.unique().tolist():
        own = (rows == row).nonzero().flatten()
        if len(own) < FEW:
            continue
        white, said, label = space.whiten(embeddings[own]), answered[own], registry.names[row]
        known = row < len(statistics.counts) and float(statistics.counts[row]) > 0
        double = _duplicate(space, white, said, row if known else None)
        if double is not None:
            like, count = registry.names[double], int((said == double).sum())
            advice = (
                f"check the label: they are taught as '{label}'"
                if known
                else f"more images of a known class are taught under its own name, '{like}'"
            )
            seen = f"{count} of {len(own)} images are recognised as it"
            warnings.append(f"'{label}' looks like '{like}': {seen}; {advice}")
            continue
        odd = torch.zeros(len(own), dtype=torch.bool)
        for other in said.unique().tolist():
            if other == row or not space.trusted:
                continue
            strays = _others(space, white, row, other) if known else _strays(space, white, said, other)
            if strays.any():
                odd, found = odd | strays, own[strays].tolist()
                like, which = registry.names[other], _listed([names[i] for i in found])
                suspects.append({"kind": "like", "label": label, "like": like, "indices": found})
                warnings.append(
                    f"{len(found)} of {len(own)} images taught as '{label}' look like '{like}' ({which}); if the "
                    "folder is mixed up, roll back and teach without them"
                )
        far = own[_far(white) & ~odd].tolist()
        if far:
            suspects.append({"kind": "far", "label": label, "like": None, "indices": far})
            warnings.append(
                f"{len(far)} of {len(own)} images taught as '{label}' are unlike the others "
                f"({_listed([names[i] for i in far])}); look at them, and teach without them if they are something else"
            )
    return warnings


def _duplicate(space: _Space, white: Tensor, said: Tensor, own: int | None) -> int | None:
    """The known class that these images are one with, if any; never `own`, and not if they are nearer to that."""
    row = int(said.mode().values)
    if row == own or float((said == row).double().mean()) < RECOGNISED:
        return None
    distance = space.apart(white, row)
    if distance > SAME_CLASS or (own is not None and space.apart(white, own) < distance + TELLABLE):
        return None
    return row


def _others(space: _Space, white: Tensor, own: int, row: int) -> Tensor:
    """Which images ``(n,)`` of a folder for the known class `own` belong to the known class `row`, bool."""
    apart = float((space.means[own] - space.means[row]).square().sum()) - space.noise(own) - space.noise(row)
    gain = (white - space.means[own]).square().sum(1) - (white - space.means[row]).square().sum(1)
    strays = gain > 0
    clear = apart >= TELLABLE and _group(strays) and float(gain[strays].mean()) >= apart / 2
    return strays if clear and space.apart(white[strays], row) <= TELLABLE else strays & False


def _group(strays: Tensor) -> bool:
    """Whether they are enough to speak of."""
    return int(strays.sum()) >= max(FEW, math.ceil(MIXED_SHARE * len(strays)))


def _strays(space: _Space, white: Tensor, said: Tensor, row: int) -> Tensor:
    """Which images ``(n,)`` belong to the known class `row` while the others do not; bool, none where it is not clear.

    Two groups, one with the mean of `row` and one with a mean of its own, are told apart by the likelihood ratio in
    the directions in which old classes differ, starting from what the learner recognises.
    """
    none, strays = torch.zeros(len(white), dtype=torch.bool), said == row
    points, mean = white @ space.axes, space.means[row] @ space.axes
    gain, apart = torch.zeros(len(white)), 0.0
    for _ in range(ROUNDS):
        rest = ~strays
        if not _group(strays) or rest.sum() < max(FEW, len(white) // 3):  # one group only
            return none
        middle = points[rest].mean(0)
        apart = float((middle - mean).square().sum()) - points.shape[1] / int(rest.sum())
        gain = (points - middle).square().sum(1) - (points - mean).square().sum(1)
        strays, last = gain > 0, strays
        if torch.equal(strays, last):
            break
    else:
        return none  # it goes to and fro: no two groups
    # Those of `row` gain `apart` on average; the tail of another class gains little.
    count = int(strays.sum())
    if apart < TELLABLE or float(gain[strays].mean()) < apart / 2:
        return none
    if space.apart(white[strays], row) > TELLABLE:  # near `row` as classes go, but none of it
        return none
    # Grouping has bent these directions; in the others a tail of the class is as far from `row` as all of it.
    across = white - points @ space.axes.T
    doubt = SURE * math.sqrt(4 * across.shape[1] / (count * (len(white) - count)))  # of the noise of both means
    return strays if _nearer(across[strays], across[~strays], space, row) > max(SAME_CLASS, doubt) else none


def _nearer(group: Tensor, rest: Tensor, space: _Space, row: int) -> float:
    """How much nearer a group's mean is to an old mean than to that of the others, squared distances without noise."""
    mean = space.means[row] - space.axes @ (space.axes.T @ space.means[row])
    to_rest = float((group.mean(0) - rest.mean(0)).square().sum()) - float(rest.var(0).sum()) / len(rest)
    return to_rest - (float((group.mean(0) - mean).square().sum()) - space.noise(row))


def _far(white: Tensor) -> Tensor:
    """Which images ``(n,)`` lie far from the middle of all, bool."""
    distance = (white - white.median(0).values).square().sum(1)
    size = white.shape[1]
    # Wilson & Hilferty 1931: the cube root of χ²/D is nearly normal. In few dimensions FAR is not far.
    centre, deviation = 1 - 2 / (9 * size), math.sqrt(2 / (9 * size))
    limit = max(FAR, ((centre + 4 * deviation) / centre) ** 3)
    return distance > limit * distance.median().clamp_min(1e-12)


def _listed(words: Sequence[str]) -> str:
    """The first few, quoted, and how many more there are."""
    text = ", ".join(f"'{word}'" for word in words[:SHOWN])
    return text if len(words) <= SHOWN else f"{text} and {len(words) - SHOWN} more"
