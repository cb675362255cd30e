"""Data of a stream: embeddings, learner rows, and the samples of each task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ssd_edge import learners
from ssd_edge.backbones.embedder import level_standardisation
from ssd_edge.data import Dataset
from ssd_edge.learners.base import Progress
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.run.streams import Stream


@dataclasses.dataclass(frozen=True)
class StreamData:
    """Embeddings and labels of a stream.

    Attributes:
        train: Standardised training embeddings ``(N, D)``; of those `kept`, ``(K, D)``.
        train_rows: Learner rows of all training samples, int64 ``(N,)``.
        test: Standardised test embeddings ``(M, D)``.
        test_rows: Learner rows of the test samples, int64 ``(M,)``.
        train_tasks: For each experience, the indices of its training samples.
        test_tasks: For each group of classes introduced together, the indices of its test samples.
        introduced: For each group, the experience that introduces it.
        names: Class names by row.
        standardisation: Mean and scale of the first task, if the backbone does not standardise; else None.
        second: Standardised embeddings of the second views of the images in `train`; None without.
        embed_seconds: Time spent on the embeddings.
        kept: Positions of the training samples whose embeddings are in `train`, int64 ``(K,)``, ascending; None: all.
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
    second: Tensor | None = None
    embed_seconds: float = 0.0
    kept: Tensor | None = None

    def of_kept(self, values: Tensor) -> Tensor:
        """Return those of values ``(N, …)`` of the training samples that belong to `train`."""
        return values if self.kept is None else values[self.kept]

    @property
    def whole(self) -> learners.Task:
        """All training data whose embeddings are kept, as one task."""
        return learners.Task(self.train, self.of_kept(self.train_rows), self.second)

    def rows_of(self, number: int) -> Tensor:
        """Return the distinct rows that occur in an experience, ascending."""
        rows: Tensor = torch.unique(self.train_rows[self.train_tasks[number]])
        return rows

    def learn(self, learner: learners.Learner, number: int, progress: Progress) -> None:
        """Let a learner learn one experience; `progress` is as for `learners.Learner.learn`."""
        learner.learn(self.task(number), progress)

    def statistics(self) -> ClassStatistics:
        """Return the class statistics of all training embeddings."""
        statistics = ClassStatistics(self.train.shape[1])
        statistics.add(self.train, self.train_rows)
        return statistics

    def task(self, number: int) -> learners.Task:
        """Return the training data of one experience."""
        return self.whole.of(self.train_tasks[number])


def prepare(
    dataset: Dataset,
    stream: Stream,
    standardised: bool,
    embedded: Mapping[str, np.ndarray],
    widths: Sequence[int] = (),
) -> StreamData:
    """Standardise the embeddings, map labels to rows, and divide the samples into tasks.

    Args:
        dataset: Labels and class names.
        stream: Order of classes and samples.
        standardised: True if the embeddings are standardised already.
        embedded: Embeddings ``train`` ``(N, D)`` and ``test`` ``(M, D)``; also ``second`` ``(N, D)``, of second views.
        widths: Widths of their levels, if they are not standardised; empty: one level.
    """
    standardisation = None
    train_tasks = stream.experiences(dataset.train_labels)
    if not standardised:  # by the first task only: later ones are not known yet
        first = embedded["train"][train_tasks[0]]
        mu, sigma = (part.astype(np.float32) for part in level_standardisation(first, widths or first.shape[1:]))
        standardisation = (mu, sigma)
        embedded = {name: (part - mu) / sigma for name, part in embedded.items()}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(part, np.float32)) for name, part in embedded.items()}
    return StreamData(
        train=tensors["train"],
        train_rows=torch.from_numpy(stream.rows(dataset.train_labels)),
        test=tensors["test"],
        test_rows=torch.from_numpy(stream.rows(dataset.test_labels)),
        train_tasks=tuple(torch.from_numpy(index) for index in train_tasks),
        test_tasks=tuple(torch.from_numpy(index) for index in stream.groups(dataset.test_labels)),
        introduced=stream.introduced,
        names=tuple(dataset.classes[label] for label in stream.order),
        standardisation=standardisation,
        second=tensors.get("second"),
    )


def accuracies(learner: learners.Learner, data: StreamData, experience: int) -> list[float | None]:
    """Return the test accuracy on each group of classes after an experience; None for groups introduced later."""

    def accuracy(index: Tensor) -> float:
        return float((learner.predict(data.test[index]) == data.test_rows[index]).double().mean())

    groups = zip(data.test_tasks, data.introduced, strict=True)
    return [accuracy(index) if introduced <= experience else None for index, introduced in groups]
