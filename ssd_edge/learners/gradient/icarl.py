"""`icarl`: a reference with replay (iCaRL, Rebuffi et al. 2017), here on frozen embeddings.

A fixed number of training samples (exemplars) is kept as embeddings and used again in every later task. Features are
the activations of the last hidden layer. Each output is a sigmoid: outputs of the task's classes are trained on labels,
those of all classes taught before on the network's outputs before the task (Algorithm 3). Exemplars are the samples
whose running mean is closest to the class mean (herding, Algorithm 4). Prediction is by the nearest mean of exemplars
(Algorithm 1).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_edge.answers.graph import HeadGraph
from ssd_edge.errors import InputError
from ssd_edge.learners.base import Progress, Task
from ssd_edge.learners.closed_form.linear import NEVER
from ssd_edge.learners.gradient.replay import Replay


def herd(features: Tensor, count: int) -> Tensor:
    """Choose distinct samples whose running mean follows the mean of all (iCaRL, Algorithm 4).

    Args:
        features: features of one class, ``(n, r)``.
        count: number of samples to choose, clipped to n.

    Returns:
        Indices int64 ``(min(count, n),)`` in order of choice; every prefix is the choice for a smaller count.
    """
    mean, chosen_sum = features.mean(0), torch.zeros_like(features[0])
    squares, free = features.square().sum(1), torch.zeros(len(features), device=features.device)
    order = torch.empty(min(count, len(features)), dtype=torch.int64, device=features.device)
    for number in range(len(order)):
        # |mean − (sum + f)/(number + 1)|² up to a constant and a factor
        distance = squares - 2 * (features @ ((number + 1) * mean - chosen_sum)) + free
        order[number] = chosen = distance.argmin()
        free[chosen] = torch.inf
        chosen_sum += features[chosen]
    return order


class ICaRL(Replay):
    """A ReLU MLP with exemplars; those of a class are contiguous, in herding order.

    Attributes:
        pooled: True if exemplars are trained on like samples of the task.
        means: unit mean feature ``(K, r)`` of the exemplars of each class with exemplars.
        mean_rows: these classes, int64 ``(K,)``, ascending.
    """

    name: ClassVar[str] = "icarl"
    display: str = "iCaRL (replay)"
    pooled: ClassVar[bool] = True

    def _configure(self) -> None:
        super()._configure()
        self.means = torch.zeros(0, self.settings.neurons, device=self.device)
        self.mean_rows = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.old = self.mean_rows  # (O,), classes taught before this task and not in it
        self.targets = torch.zeros(0, 0, device=self.device)  # (N, O), their outputs before this task

    @torch.no_grad()
    def _features(self, embeddings: Tensor) -> Tensor:
        """Return the features ``(N, r)`` of embeddings, of unit length; a zero row stays zero."""
        parts = [F.normalize(self._activations(part.to(self.device))[-1]) for part in torch.split(embeddings, 4096)]
        return torch.cat(parts) if parts else torch.zeros(0, self.settings.neurons, device=self.device)

    # ── learning ─────────────────────────────────────────────────────────────────────────────────────
    def _learn(self, task: Task, progress: Progress) -> dict[str, float]:
        classes = len({*self.mean_rows.tolist(), *task.rows.tolist()})
        if classes > self.settings.memory:
            raise InputError(
                f"learner.memory is {self.settings.memory}, but {classes} classes need an exemplar each; raise it"
            )
        self.old = self.mean_rows[~torch.isin(self.mean_rows, task.rows.to(self.device))]
        embeddings = torch.cat([task.embeddings.to(self.device), self.exemplars[self.kept]])
        labels = torch.cat([task.labels.to(self.device), self.exemplar_rows[self.kept]])
        pool = Task(embeddings, labels)
        measured = super()._learn(pool if self.pooled else task, progress)
        self._choose(embeddings, labels, task.rows.tolist(), self.settings.memory // classes)
        return measured

    @torch.no_grad()
    def _begin(self, inputs: Tensor, labels: Tensor) -> None:
        self.targets = torch.cat([self._forward(part)[:, self.old].sigmoid() for part in torch.split(inputs, 4096)])

    def _loss(self, logits: Tensor, labels: Tensor, index: Tensor) -> dict[str, Tensor]:
        wanted = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        wanted[:, self.old] = self.targets[index]
        # summed over outputs, so that the weight of a class does not depend on their number
        each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(0) / len(labels)
        old = torch.zeros_like(each, dtype=torch.bool)
        old[self.old] = True
        losses = {"cross_entropy": each[~old].sum()}
        if len(self.old):
            losses["distillation"] = each[old].sum()
        return losses

    def _end(self, inputs: Tensor, labels: Tensor) -> None:
        self.targets = self.targets[:0]

    def _choose(self, embeddings: Tensor, labels: Tensor, fresh: list[int], share: int) -> None:
        """Choose exemplars for all classes.

        Args:
            embeddings: embeddings of the task and of all exemplars, ``(N, D)``.
            labels: ``(N,)``.
            fresh: classes to choose anew; other classes keep their first exemplars.
            share: exemplars per class.
        """
        chosen: dict[int, Tensor] = {}
        for row in sorted({*fresh, *self.mean_rows.tolist()}):
            if row in fresh:
                members = embeddings[labels == row]
                chosen[row] = members[self._order(self._features(members), share)]
            else:
                chosen[row] = self.exemplars[self.exemplar_rows == row][:share]
        held = torch.cat(list(chosen.values()))
        counts = torch.tensor([len(part) for part in chosen.values()], device=self.device)
        self._keep(held, torch.tensor(list(chosen), device=self.device).repeat_interleave(counts))

    def _order(self, features: Tensor, count: int) -> Tensor:
        """Choose at most `count` of the samples of a class with features ``(n, r)``; return indices, best first."""
        return herd(features, count)

    def _keep(self, exemplars: Tensor, rows: Tensor) -> None:
        super()._keep(exemplars, rows)
        self._average()

    def _average(self) -> None:
        """Compute the means of the exemplars' features with the current network."""
        features, rows = self._features(self.exemplars[self.kept]), self.exemplar_rows[self.kept]
        self.mean_rows = torch.unique(rows)
        means = [features[rows == row].mean(0) for row in self.mean_rows]
        self.means = F.normalize(torch.stack(means)) if means else self.means[:0]

    # ── predicting, and the state ────────────────────────────────────────────────────────────────────
    def scores(self, embeddings: Tensor) -> Tensor:
        """Return the cosines ``(N, C)`` of the features and the mean exemplar of each class."""
        scores = torch.full((len(embeddings), len(self.output_bias)), NEVER)
        scores[:, self.mean_rows.cpu()] = (self._features(embeddings) @ self.means.T).cpu()
        return scores

    def write_head(self, graph: HeadGraph, x: str) -> str:
        means = self.means.new_zeros(graph.classes, self.means.shape[1])
        means[self.mean_rows] = self.means  # all taught classes have one
        return graph.matmul(graph.unit(self._write_hidden(graph, x)), "means", means.T)

    @staticmethod
    def _may_keep(kept: set[int], learned: set[int]) -> bool:
        return kept == learned

    def _load(self, tensors: dict[str, Tensor]) -> None:
        super()._load(tensors)
        self._average()
