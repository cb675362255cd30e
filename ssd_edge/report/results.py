"""Results for a report: the answers of a model to test images, and what is known about how it was made.

A run, the evaluation of a run or a bundle, and a device fill the same `Results`; `html.render` makes one page of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Protocol

import numpy as np

from ssd_edge.errors import printable
from ssd_edge.images import Pixels


class Photographs(Protocol):
    """Test images that can be shown; `data.Images` is one."""

    def load(self, indices: Sequence[int], form: Pixels) -> np.ndarray:
        """Return images as uint8 RGB ``(n, size, size, 3)``; raise `InputError` if one cannot be read."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers to test images, one entry per image.

    Attributes:
        names: Names of the images, e.g. ``gear/12.jpg``.
        truth: Rows of their classes, int64 ``(M,)``.
        given: Rows of the answers, int64 ``(M,)``.
        sure: Calibrated probability that the answer is right, float64 ``(M,)``; NaN if it is not known.
        margin: Cosine above the threshold of the answer, float64 ``(M,)``; negative ones are answered with ``unknown``.
        unseen: The same for the best answer among the other classes, as if the model did not know the class of the
            image, float64 ``(M,)``.
    """

    names: tuple[str, ...]
    truth: np.ndarray
    given: np.ndarray
    sure: np.ndarray
    margin: np.ndarray
    unseen: np.ndarray

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        truth: np.ndarray,
        scores: np.ndarray,
        sure: np.ndarray | None,
        margins: Callable[[np.ndarray], np.ndarray],
    ) -> Answers:
        """Return the answers of a model.

        Args:
            names: Names of the images.
            truth: Rows of their classes, int64 ``(M,)``.
            scores: Scores of all classes, ``(M, C)``.
            sure: Probabilities of the best answers ``(M,)``; None if they are not known.
            margins: Returns the cosines above the thresholds of the classes in the given rows, ``(M,)``.
        """
        given = scores.argmax(1)
        others = np.array(scores, dtype=np.float64)
        others[np.arange(len(truth)), truth] = -np.inf
        return cls(
            names=tuple(map(image_name, names)),
            truth=truth,
            given=given,
            sure=np.full(len(truth), np.nan) if sure is None else sure,
            margin=margins(given).astype(np.float64),
            unseen=margins(others.argmax(1)).astype(np.float64),
        )

    @property
    def right(self) -> np.ndarray:
        """True for images that are named correctly, bool ``(M,)``."""
        right: np.ndarray = self.truth == self.given
        return right

    @property
    def accuracy(self) -> float:
        """Share of images that are named correctly."""
        return float(self.right.mean())

    def by_class(self, classes: Sequence[str]) -> dict[str, float]:
        """Return the accuracy by class name, for classes with test images."""
        return {
            name: float(self.right[self.truth == row].mean())
            for row, name in enumerate(classes)
            if (self.truth == row).any()
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays for a safetensors file; the names are its metadata."""
        return {field: getattr(self, field) for field in ("truth", "given", "sure", "margin", "unseen")}


@dataclasses.dataclass(frozen=True)
class LearningPoint:
    """Accuracy after learning from fewer images.

    Attributes:
        images: Largest number of training images per class.
        accuracy: Share of the test images that are named correctly.
        right: Number of test images of each class that are named correctly, by row.
    """

    images: int
    accuracy: float
    right: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Results:
    """Content of a report.

    Attributes:
        model: Name of the model, e.g. ``SLDA``.
        data: Name of the data set.
        which: Which of its images were tested, in words.
        classes: Class names by row.
        learned: Number of training images by row.
        answers: Answers to the test images.
        photographs: The test images; None if they are gone.
        missing: Why there are no photographs.
        fewer: Accuracy after learning from fewer images, ascending; the last point is the model. Empty if not measured.
        next: The command to type next, with a word on what it does.
        metrics: Content of metrics.json, for the report of a run: its stream and the comparison.
        record: How the model was made, as nested plain values; of a run the content of run.json.
    """

    model: str
    data: str
    which: str
    classes: tuple[str, ...]
    learned: tuple[int, ...]
    answers: Answers
    photographs: Photographs | None = None
    missing: str = ""
    fewer: tuple[LearningPoint, ...] = ()
    next: tuple[tuple[str, str], ...] = ()
    metrics: Mapping[str, Any] | None = None
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def image_name(name: str) -> str:
    """Return folder and file of an image, without the path or the archive that they are in."""
    return printable("/".join(PurePosixPath(name.rpartition(": ")[2]).parts[-2:]))
