"""Data and a measure shared by the tests of learners with replay."""

from __future__ import annotations

import torch

from ssd_edge.learners.base import Learner, Task

DIM = 8


def task(rows: tuple[int, ...], count: int = 200, seed: int = 0) -> Task:
    """Draw samples of some of seven Gaussian classes; each row always has the same mean."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(rows).repeat(count // len(rows))
    means = 3.0 * torch.randn(7, DIM, generator=torch.Generator().manual_seed(99))
    return Task(means[labels] + torch.randn(len(labels), DIM, generator=generator), labels)


def accuracy(learner: Learner, test: Task) -> float:
    return float((learner.predict(test.embeddings) == test.labels).double().mean())
