"""Compare ways to protect old classes in SDMLP on Split CIFAR-10 (5 tasks of 2 classes), on held-out training images.

Usage: SSD_EDGE_DATA=FOLDER python benchmarks/variants.py [--orders N] [--json FILE] [NAME ...]

Rows: SDMLP updates the rows (keys and values of neurons) that a batch reaches. *Sparse memory finetuning* (Lin et al.
2025) updates only those that a task activates unusually often: `learner.memory_rows`.
Targets: SSD distils the answers of its previous self to each image of the task. Without a previous self, the targets
are the mean of these answers over each class of the task (*class means*); the answers of the network itself, at the
same step, to the image with half of its features missing (*other view*); or, for embeddings drawn from the mean and the
deviations of each old class, that class (*statistics*) and also its mean logits (*soft statistics*). "Bytes" is what
the targets need beside the network, while a task of 8,000 images is learned and between tasks.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from split import TASKS, accuracies, embeddings, protocol
from torch import Tensor

from ssd_edge.backbones.embedder import open_backbone
from ssd_edge.config import BackboneConfig
from ssd_edge.learners import Learner, Task
from ssd_edge.learners.gradient import ssd
from ssd_edge.learners.gradient.distillation import Targets
from ssd_edge.learners.gradient.network import Pass
from ssd_edge.learners.gradient.sdmlp import SDMLPLearner
from ssd_edge.learners.gradient.ssd import SSD, DistillationLoss
from ssd_edge.learners.gradient.trainer import LossTerm, TaskLoss
from ssd_edge.learners.priors import Priors
from ssd_edge.run import metrics
from ssd_edge.run.storage import environment


class Snapshot(SSD):
    """SSD; reports the bytes of the teacher's answers."""

    during = between = 0

    def _task_loss(self, inputs: Tensor, labels: Tensor) -> TaskLoss:
        loss = super()._task_loss(inputs, labels)
        if isinstance(loss, DistillationLoss):
            hidden = loss.targets.hidden[0]
            parts = [loss.targets.logits, *([hidden.slots, hidden.activations] if self.settings.hidden_weight else [])]
            self.during = sum(part.nbytes for part in parts)
        return loss


class ClassMeans(Snapshot):
    """Targets are the previous self's mean answers to each class of the task."""

    def _task_loss(self, inputs: Tensor, labels: Tensor) -> TaskLoss:
        loss = super()._task_loss(inputs, labels)
        if isinstance(loss, DistillationLoss):
            logits = loss.targets.logits
            means = torch.stack([logits[labels == row].mean(0) for row in labels.unique()])
            loss.targets = Targets(means[torch.searchsorted(labels.unique(), labels)], loss.targets.hidden)
            self.during = means.nbytes
        return loss


class OtherViewLoss(DistillationLoss):
    """Targets are the network's own answers at the same step to a view with half of the features missing."""

    def __init__(self, learner: OtherView, inputs: Tensor, loss: DistillationLoss) -> None:
        super().__init__(loss.settings, loss.targets, loss.slots, loss.outputs)
        self.learner, self.inputs = learner, inputs
        self.generator = learner.generator(purpose=9)

    def terms(self, index: Tensor, labels: Tensor, logits: Tensor, state: Pass) -> list[LossTerm]:
        part = self.inputs[index]
        view = part * (torch.rand(part.shape, generator=self.generator) < 0.5)
        view = view / view.norm(dim=1, keepdim=True).clamp_min(1e-12)
        self.targets = Targets(self.targets.logits.clone(), self.targets.hidden)
        self.targets.logits[index] = self.learner.net.logits(view)
        return super().terms(index, labels, logits, state)

    def compiled(self) -> None:
        return None


class OtherView(Snapshot):
    """See `OtherViewLoss`."""

    def _task_loss(self, inputs: Tensor, labels: Tensor) -> TaskLoss:
        loss = super()._task_loss(inputs, labels)
        self.during = 0
        return OtherViewLoss(self, inputs, loss) if isinstance(loss, DistillationLoss) else loss


class Statistics(SDMLPLearner):
    """Embeddings drawn from statistics of old classes are learned with each task."""

    during = 0

    def _configure(self) -> None:
        super()._configure()
        self.statistics: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def between(self) -> int:
        return sum(part.nbytes for parts in self.statistics.values() for part in parts)

    def _learn(self, task: Task, progress: Any) -> dict[str, float]:
        generator, per_class = self.generator(purpose=9), len(task.labels) // len(task.rows)
        drawn = [
            mean + deviation * torch.randn(per_class, self.dim, generator=generator)
            for mean, deviation, _ in self.statistics.values()
        ]
        labels = [torch.full((per_class,), row) for row in self.statistics]
        measured = super()._learn(
            Task(torch.cat([task.embeddings, *drawn]), torch.cat([task.labels, *labels])), progress
        )
        for row in task.rows.tolist():
            own = task.embeddings[task.labels == row]
            logits = self.net.logits(self.prepared(own)).mean(0)
            self.statistics[row] = (own.mean(0), own.std(0), logits)
        return measured

    def _task_loss(self, inputs: Tensor, labels: Tensor) -> TaskLoss:
        return TaskLoss()


class SoftStatistics(Statistics):
    """The same; drawn embeddings are distilled towards the mean logits of their class as well."""

    Settings = ssd.Settings

    def _task_loss(self, inputs: Tensor, labels: Tensor) -> TaskLoss:
        if not self.statistics:
            return TaskLoss()
        outputs = self.net.values.shape[1]
        logits = self.net.logits(inputs)  # new images: own answers before the first step, by class
        for row in labels.unique().tolist():
            known = self.statistics.get(row)
            logits[labels == row] = logits[labels == row].mean(0) if known is None else known[2][:outputs]
        return DistillationLoss(self.settings, Targets(logits, []), [torch.zeros(0)], None)


SDMLP, DISTIL = {"name": "sdmlp"}, {"hidden_weight": 0.0}
VARIANTS: dict[str, tuple[type[Learner], dict[str, Any]]] = {
    "full": (SDMLPLearner, {}),
    **{f"rows {rows}": (SDMLPLearner, {"memory_rows": rows}) for rows in (30, 100, 200, 400)},
    "ssd": (Snapshot, {"top_n": "100"}),
    "ssd rows 200": (Snapshot, {"top_n": "100", "memory_rows": 200}),
    "class means": (ClassMeans, DISTIL),
    "other view": (OtherView, DISTIL),
    "statistics": (Statistics, {}),
    "soft statistics": (SoftStatistics, DISTIL),
}


def run(name: str, priors: Priors, vectors: Tensor, labels: Tensor, order: int) -> dict[str, Any]:
    """Train one variant on the five tasks; return its metrics, the share of rows it changed, and bytes of targets."""
    kind, options = VARIANTS[name]
    train, held_out, row = protocol(labels, order)
    learner = kind(vectors.shape[1], kind.Settings(**options), priors, order)
    learner.expect(2 * TASKS)
    began, matrix, changed = time.perf_counter(), [], []
    for task in range(TASKS):
        index = train[row[train] // 2 == task]
        before = {key: part.clone() for key, part in learner.net.parameters().items()}
        learner.learn(Task(vectors[index], row[index]))
        if task:
            moved = [(part != before[key]).any(1) for key, part in learner.net.parameters().items()]
            changed.append(float(torch.stack(moved).any(0).double().mean()))
        matrix.append(accuracies(learner, vectors[held_out], row[held_out], task))
    found = metrics.summary(matrix).to_dict()
    return {
        "variant": name,
        "order": order,
        **{key: found[key] for key in ("average_accuracy", "backward_transfer", "learning_accuracy")},
        "changed": sum(changed) / len(changed),
        "bytes_during": getattr(learner, "during", 0),
        "bytes_between": getattr(learner, "between", 0),
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    """Print one line per variant and order; write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(VARIANTS))
    parser.add_argument("--orders", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    embedder = open_backbone(BackboneConfig(name="tiny"), torch.device("cpu"))
    vectors, labels = embeddings("cifar10-jpg.tar.xz", embedder)
    rows = []
    for order in range(args.orders):
        for name in args.names:
            rows.append(run(name, embedder.priors, vectors, labels, order))
            print(rows[-1], flush=True)
            if args.json:
                found = {"command": "python benchmarks/variants.py", **environment(), "rows": rows}
                args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
