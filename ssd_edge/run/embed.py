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
from ssd_edge.data import Dataset, cache
from ssd_edge.errors import InputError
from ssd_edge.report import events
from ssd_edge.report.events import Listener, Message
from ssd_edge.run.streams import Stream

EMBED_BATCH = 512


@dataclasses.dataclass(frozen=True)
class Prepared:
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

    def task(self, number: int) -> learners.Task:
        """Training data of one experience."""
        index = self.train_tasks[number]
        return learners.Task(self.train[index], self.train_rows[index])


def embed(dataset: Dataset, embedder: Embedder, listener: Listener, use_cache: bool) -> dict[str, np.ndarray]:
    """Embeddings ``train`` and ``test``, from the cache where backbone and data are the same."""

    def compute() -> dict[str, np.ndarray]:
        total, done, parts = len(dataset.train) + len(dataset.test), 0, {}
        listener(Message(f"embedding {total:,} images"))
        with events.progress(listener, "embedding") as update:
            for part, images in (("train", dataset.train), ("test", dataset.test)):
                arrays = []
                for pixels in images.batches(embedder.size, EMBED_BATCH):
                    arrays.append(embedder.embed(pixels))
                    done += len(pixels)
                    update(0, done / total, f"{done:,} images")
                parts[part] = np.concatenate(arrays)
        for part, array in parts.items():
            if not np.isfinite(array).all():
                raise InputError(f"the backbone gives NaN or infinity for {part} images; check its weights")
        return parts

    key = {"backbone": embedder.identity, "data": dataset.fingerprint, "torch": torch.__version__}
    return cache.embeddings(key, compute, enabled=use_cache)


def prepare(dataset: Dataset, stream: Stream, embedder: Embedder, embedded: Mapping[str, np.ndarray]) -> Prepared:
    """Standardise, translate labels to rows, and cut into experiences (training) and groups of classes (test)."""
    train, test, standardisation = embedded["train"], embedded["test"], None
    train_tasks = stream.experiences(dataset.train_labels)
    if not embedder.standardised:  # later tasks must not be looked at: the first one's statistics stay
        mu, sigma = (part.astype(np.float32) for part in measure(train[train_tasks[0]]))
        standardisation = (mu, sigma)
        train, test = ((part - mu) / sigma for part in (train, test))
    return Prepared(
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


def accuracies(learner: learners.Learner, prepared: Prepared, experience: int) -> list[float | None]:
    """Accuracy on the test samples of each group of classes after an experience; None where it comes later."""

    def accuracy(index: Tensor) -> float:
        return float((learner.predict(prepared.test[index]) == prepared.test_rows[index]).double().mean())

    groups = zip(prepared.test_tasks, prepared.introduced, strict=True)
    return [accuracy(index) if introduced <= experience else None for index, introduced in groups]
