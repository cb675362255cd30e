"""What a stream of tasks needs, ready to be learned: embeddings, learner rows, and which sample comes when."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ssd_edge import learners
from ssd_edge.backbones.embedder import Embedder
from ssd_edge.backbones.embedder import standardisation as measure
from ssd_edge.data import Dataset
from ssd_edge.run.streams import Stream


@dataclasses.dataclass(frozen=True)
class StreamData:
    """Everything that a stream of tasks needs.

    Attributes:
        train: standardised embeddings ``(N, D)``.
        train_rows: learner rows, int64 ``(N,)``.
        test: ``(M, D)``.
        test_rows: ``(M,)``.
        train_tasks: per experience, the indices of its training samples.
        test_tasks: per group of classes that are introduced together, of its test samples.
        introduced: per group, the experience that introduces it.
        names: class names by row.
        standardisation: (mu, sigma) that the first task gave to a backbone without its own; else None.
        embed_seconds: time spent on the embeddings.
    """

    train: Tensor
    train_rows: Tensor
    test: Tensor
    test_rows: Tensor
    train_tasks: tuple[Tensor, ...]
    test_tasks: tuple[Tensor, ...]
    introduced: tuple[int, ...]
    names: tuple[str, ...]
    standardisation: tuple[np.ndarray, np.ndarray] | None
    embed_seconds: float = 0.0

    def task(self, number: int) -> learners.Task:
        """Training data of one experience."""
        index = self.train_tasks[number]
        return learners.Task(self.train[index], self.train_rows[index])


def prepare(dataset: Dataset, stream: Stream, embedder: Embedder, embedded: Mapping[str, np.ndarray]) -> StreamData:
    """Standardise, translate labels to rows, and cut into experiences (training) and groups of classes (test)."""
    train, test, standardisation = embedded["train"], embedded["test"], None
    train_tasks = stream.experiences(dataset.train_labels)
    if not embedder.standardised:  # later tasks must not be looked at: the first one's statistics stay
        mu, sigma = (part.astype(np.float32) for part in measure(train[train_tasks[0]]))
        standardisation = (mu, sigma)
        train, test = ((part - mu) / sigma for part in (train, test))
    return StreamData(
        train=torch.from_numpy(np.ascontiguousarray(train, dtype=np.float32)),
        train_rows=torch.from_numpy(stream.rows(dataset.train_labels)),
        test=torch.from_numpy(np.ascontiguousarray(test, dtype=np.float32)),
        test_rows=torch.from_numpy(stream.rows(dataset.test_labels)),
        train_tasks=tuple(torch.from_numpy(index) for index in train_tasks),
        test_tasks=tuple(torch.from_numpy(index) for index in stream.groups(dataset.test_labels)),
        introduced=stream.introduced,
        names=tuple(dataset.classes[label] for label in stream.order),
        standardisation=standardisation,
    )


def accuracies(learner: learners.Learner, prepared: StreamData, experience: int) -> list[float | None]:
    """Accuracy on the test samples of each group of classes after an experience; None where it comes later."""

    def accuracy(index: Tensor) -> float:
        return float((learner.predict(prepared.test[index]) == prepared.test_rows[index]).double().mean())

    groups = zip(prepared.test_tasks, prepared.introduced, strict=True)
    return [accuracy(index) if introduced <= experience else None for index, introduced in groups]
