"""Results of a run: one object per file that a run writes for its readers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ssd_edge.report.results import Results
from ssd_edge.run.metrics import Summary


@dataclasses.dataclass(frozen=True)
class LearnerResult:
    """Metrics and cost of one learner on the stream.

    Attributes:
        summary: Metrics of its accuracy matrix.
        display: Name for people, e.g. ``SDMLP+EWC``.
        seconds: Training time.
        state_bytes: Size of what it learned.
    """

    summary: Summary
    display: str
    seconds: float
    state_bytes: int

    @property
    def average_accuracy(self) -> float:
        """Mean final accuracy over all tasks."""
        return self.summary.average_accuracy

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        cost = {"display": self.display, "seconds": self.seconds, "state_bytes": self.state_bytes}
        return {**self.summary.to_dict(), **cost}


@dataclasses.dataclass(frozen=True)
class TaskInfo:
    """Contents of one task.

    Attributes:
        classes: Names of its classes.
        train: Number of training images.
        test: Number of test images; None for an experience, which has no test images of its own.
    """

    classes: tuple[str, ...]
    train: int
    test: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        counts = {"train": self.train} if self.test is None else {"train": self.train, "test": self.test}
        return {"classes": list(self.classes), **counts}


@dataclasses.dataclass(frozen=True)
class RunResult:
    """Result of a whole run; `to_dict` gives the content of ``metrics.json``.

    Attributes:
        learner: Name of the main learner.
        main: Its result.
        baselines: Results of the baselines by learner name.
        panel: Results of the panel's heads and of joint training by name.
        data: Name of the data set.
        split: Where the test images come from.
        classes: Class names by row.
        tasks: The groups of classes that are introduced together.
        experiences: What arrives at each step of the stream.
        introduced: For each task, the experience that introduces it.
        kind: Kind of the stream.
        online: True if each sample was seen once.
        train_images: Number of training images.
        test_images: Number of test images.
        class_accuracy: Final test accuracy of the main learner by class name.
        embed_seconds: Time spent on embeddings.
        choice: Comparison made by ``learner.name=auto``; None if a learner was named.
    """

    learner: str
    main: LearnerResult
    baselines: Mapping[str, LearnerResult]
    panel: Mapping[str, LearnerResult]
    data: str
    split: str
    classes: tuple[str, ...]
    tasks: tuple[TaskInfo, ...]
    experiences: tuple[TaskInfo, ...]
    introduced: tuple[int, ...]
    kind: str
    online: bool
    train_images: int
    test_images: int
    class_accuracy: Mapping[str, float]
    embed_seconds: float
    choice: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            **self.main.to_dict(),
            "learner": self.learner,
            "data": self.data,
            "split": self.split,
            "classes": list(self.classes),
            "tasks": [task.to_dict() for task in self.tasks],
            "stream": {"kind": self.kind, "online": self.online},
            "introduced": list(self.introduced),
            "experiences": [experience.to_dict() for experience in self.experiences],
            "train_images": self.train_images,
            "test_images": self.test_images,
            "class_accuracy": dict(self.class_accuracy),
            "embed_seconds": self.embed_seconds,
            "baselines": {name: result.to_dict() for name, result in self.baselines.items()},
            "panel": {name: result.average_accuracy for name, result in self.panel.items()},
            "panel_details": {name: result.to_dict() for name, result in self.panel.items()},
            **({} if self.choice is None else {"choice": dict(self.choice)}),
        }


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Accuracy of a finished run, a bundle or a device on a data set.

    Attributes:
        run: Folder of the run, file of the bundle, or root of the device.
        results: All answers, as a report shows them.
    """

    run: str
    results: Results

    @property
    def data(self) -> str:
        """Name of the data set."""
        return self.results.data

    @property
    def images(self) -> int:
        """Number of images scored."""
        return len(self.results.answers.truth)

    @property
    def which(self) -> str:
        """Which images of the data set were scored."""
        return self.results.which

    @property
    def accuracy(self) -> float:
        """Share of correct answers."""
        return self.results.answers.accuracy

    @property
    def class_accuracy(self) -> dict[str, float]:
        """The same by class name, for classes with images."""
        return self.results.answers.by_class(self.results.classes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        keys = ("run", "data", "images", "which", "accuracy", "class_accuracy")
        return {key: getattr(self, key) for key in keys}
