"""FlyModel (Shen, Dasgupta & Navlakha 2021): sparse codes after the fruit fly's Kenyon cells, one weight row per class.

A class updates only its own row, so no class affects another; one pass over the data, no gradients.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ssd_edge.answers.graph import HeadGraph
from ssd_edge.config import setting
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.learners.base import Learner, Progress, Task, TensorSpec, check_drawn
from ssd_edge.learners.closed_form.linear import BATCH
from ssd_edge.learners.priors import Priors


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the FlyModel; the defaults are those published for Split CIFAR-10."""

    neurons: int = setting(1000, "number of Kenyon cells n", minimum=2, maximum=1_000_000)
    inputs_per_neuron: int = setting(32, "number of embedding values that a neuron sums", minimum=1)
    lr: float = setting(0.005, "factor of the code that one sample adds to its class", above=0.0)
    active: float = setting(0.01, "fraction of neurons that stay active", above=0.0, maximum=1.0)


class FlyModel(Learner):
    """Scores h Wᵀ with sparse codes h; a sample adds lr·h to the row of its class in W, which is clipped at 1.

    The code follows the implementation of the SDMLP authors: the embedding is scaled to [0, 1] by its minimum and
    maximum; each neuron sums `inputs_per_neuron` distinct values of it; sums of at least the (1 − active) quantile of
    the sample (linear between order statistics) are kept, the others set to 0; the code is divided by its maximum.

    W is clipped once per task. As all terms are non-negative, the result is min(1, sum over all samples) in any order,
    so learners with the same seed merge exactly and classes are joined and removed exactly. The inputs of the neurons
    are drawn from the seed and not part of the state.

    Raises:
        InputError: a neuron has more inputs than the embedding has values.
    """

    name: ClassVar[str] = "flymodel"
    display: str = "FlyModel"
    family = "closed form"
    panel = True
    removal = "exact"
    Settings: ClassVar[type] = Settings

    def _configure(self) -> None:
        settings = self.settings
        if settings.inputs_per_neuron > self.dim:
            raise InputError(
                f"learner.inputs_per_neuron is {settings.inputs_per_neuron}, but embeddings have only {self.dim} "
                f"values; set it to {self.dim} or less"
            )
        check_drawn(settings.neurons * self.dim, f"the inputs of learner.neurons={settings.neurons:,}")
        # Number of sorted sums from the quantile at (n − 1)(1 − active) on; 1e-9 guards against rounding down.
        self.kept = 1 + math.floor((settings.neurons - 1) * settings.active + 1e-9)

    def _start(self, priors: Priors) -> None:
        self.projection = self._draw()
        self.weights = torch.zeros(0, self.settings.neurons)

    def _draw(self) -> Tensor:
        """Return the inputs of each neuron as a 0/1 matrix ``(D, n)``."""
        neurons, generator = self.settings.neurons, torch.Generator().manual_seed(self.seed)
        drawn = torch.rand(neurons, self.dim, generator=generator)
        projection = torch.zeros(neurons, self.dim).scatter_(1, drawn.topk(self.settings.inputs_per_neuron).indices, 1)
        return projection.T.contiguous().to(self.device)

    def code(self, embeddings: Tensor) -> Tensor:
        """Return codes ``(N, n)`` in [0, 1] of embeddings ``(N, D)``; zero for a constant embedding."""
        least, most = embeddings.aminmax(dim=1, keepdim=True)
        scaled = (embeddings - least) / (most - least).clamp_min(torch.finfo(embeddings.dtype).tiny)
        sums = (scaled @ self.projection).clamp_min(0)
        strongest = sums.topk(self.kept, dim=1).values
        sums = sums.masked_fill(sums < strongest[:, -1:], 0.0)
        return sums / strongest[:, :1].clamp_min(torch.finfo(sums.dtype).tiny)

    def _learn(self, task: Task, progress: Progress) -> dict[str, float]:
        self._grow(int(task.labels.max()) + 1)
        sums = torch.zeros(self.weights.shape, dtype=torch.float64)
        for start in range(0, len(task.labels), BATCH):
            part = slice(start, start + BATCH)
            code = self.code(task.embeddings[part].to(self.device)).cpu()
            sums += torch.zeros_like(self.weights).index_add_(0, task.labels[part].cpu(), code)
            progress(start / len(task.labels))
        grown = self.weights + self.settings.lr * sums
        self.weights = grown.clamp_max(1.0).float()
        progress(1.0)
        return {"clipped": float((grown > 1.0).double().mean())}

    def _grow(self, classes: int) -> None:
        missing = max(classes - len(self.weights), 0)
        self.weights = torch.cat([self.weights, self.weights.new_zeros(missing, self.settings.neurons)])

    def _remove(self, row: int, approximately: bool) -> bool:
        self.weights[row] = 0.0
        return True

    def _join(self, row: int, into: int) -> None:
        # Exact despite clipping: min(1, min(1, a) + min(1, b)) = min(1, a + b) for non-negative a and b.
        self.weights[into] = (self.weights[into] + self.weights[row]).clamp_max(1.0)
        self.weights[row] = 0.0

    def _common(self) -> dict[str, Any]:
        return {**self._shared_settings(), "the seed of the neurons' inputs": self.seed}

    def _merge(self, other: FlyModel, rows: Tensor) -> None:
        self._grow(int(rows.max()) + 1 if len(rows) else 0)
        self.weights = self.weights.index_add(0, rows, other.weights).clamp_max(1.0)

    def _subtract(self, other: FlyModel, rows: Tensor) -> Tensor:
        raise InputError(
            f"{self.display} learners cannot be subtracted: their weights are clipped at 1, which loses the sums. Let "
            "one learner learn after the other instead of merging them"
        )

    def scores(self, embeddings: Tensor) -> Tensor:
        weights = self.weights.T.to(self.device)
        parts = [(self.code(part.to(self.device)) @ weights).cpu() for part in torch.split(embeddings, BATCH)]
        return torch.cat(parts) if len(embeddings) else torch.zeros(0, len(self.weights))

    def write_head(self, graph: HeadGraph, x: str) -> str:
        tiny, least = torch.finfo(torch.float32).tiny, graph.reduce("ReduceMin", x)
        span = graph.add("Sub", graph.reduce("ReduceMax", x), least)
        scaled = graph.divide(graph.add("Sub", x, least), span, tiny)
        sums = graph.add("Relu", graph.matmul(scaled, "projection", self.projection))
        strongest = graph.top(sums, self.kept, self.settings.neurons, "learner.active")
        weaker = graph.add("Less", sums, graph.column(strongest, self.kept - 1))  # ties with the last one stay
        kept = graph.add("Where", weaker, graph.scalar(0.0), sums)
        code = graph.divide(kept, graph.column(strongest, 0), tiny)
        return graph.matmul(code, "weights", self.weights[: graph.classes].T)

    def schema(self) -> dict[str, TensorSpec]:
        return {
            "weights": TensorSpec(
                ("C", self.settings.neurons), "float32", "how often each class activated each neuron", least=0, most=1
            )
        }

    def _tensors(self) -> dict[str, Tensor]:
        return {"weights": self.weights}

    def _check(self, state: dict[str, Tensor]) -> None:
        weights, seen = state["weights"], state["seen"]
        if len(weights) != len(seen) or bool(weights[seen == 0].any()):
            raise BundleRefusedError(
                f"the weights of '{self.name}' are not those of its learned rows; restore the file"
            )

    def _load(self, tensors: dict[str, Tensor]) -> None:
        self.projection = self._draw()
        self.weights = tensors["weights"]
