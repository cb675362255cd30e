"""`packnet`, `piggyback` and `supsup`: one hidden layer of ReLU neurons, and a mask on its weights for each task.

All three are published with the task given at test. Here it is inferred: every task's network answers, and the most
certain one is believed (SupSup's search over all masks). A class belongs to the last task that taught it.

- PackNet (Mallya and Lazebnik 2018): train the weights that are free, keep the largest of them for the task, train
  these once more, and never change them again. A task also uses the weights of all tasks before it.
- Piggyback (Mallya, Davis and Lazebnik 2018): a fixed network, here that of the first task, and for each later task a
  mask of real numbers that a threshold makes binary.
- SupSup (Wortsman et al. 2020): random weights that are never trained, and for each task the weights with the highest
  scores, which are trained.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_edge.answers.graph import HeadGraph
from ssd_edge.config import setting
from ssd_edge.errors import BundleRefusedError
from ssd_edge.learners.base import LARGEST_COUNT, Learner, Progress, Task, TensorSpec
from ssd_edge.learners.closed_form.linear import NEVER
from ssd_edge.learners.gradient.finetune import run_epochs
from ssd_edge.learners.priors import Priors
from ssd_edge.learners.removal import blank

Forward = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the network, its training, and the inference of the task."""

    neurons: int = setting(1000, "hidden units, as many as the other networks have", minimum=1, maximum=1_000_000)
    epochs: int = setting(40, "passes over a task", minimum=1, maximum=1_000_000)
    min_steps: int = setting(0, "more epochs if a task has fewer steps than this", minimum=0, maximum=1_000_000_000)
    lr: float = setting(0.05, "learning rate of weights", above=0.0)
    batch: int = setting(128, "samples per step", minimum=1)
    clip: float = setting(1.0, "largest norm of the gradient", above=0.0)
    infer: Literal["entropy", "logit"] = setting(
        "entropy", "the task at test: that of the lowest entropy, or of the largest logit"
    )


def certainties(logits: Tensor) -> Tensor:
    """Return scores ``(N, k)`` of a task's classes that order tasks by entropy, and a task's classes by logit.

    The largest is the negative entropy of the softmax over the logits ``(N, k)``.
    """
    below = logits - logits.amax(1, keepdim=True)
    powers = below.exp()
    total = powers.sum(1, keepdim=True)
    return below - (total.log() - (powers * below).sum(1, keepdim=True) / total)


class StraightThrough(torch.autograd.Function):
    """A binary mask, with the gradient of the numbers that it was made from."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, mask: Tensor) -> Tensor:
        """Return the mask, of the type of the numbers."""
        return mask.to(numbers.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the mask as that of the numbers."""
        return gradients[0], None


def straight_through(numbers: Tensor, mask: Tensor) -> Tensor:
    """Return a mask, bool, as numbers with the gradient of those it was made from."""
    applied: Tensor = StraightThrough.apply(numbers, mask)  # type: ignore[no-untyped-call]
    return applied


class MaskedNetwork(Learner):
    """A network z → ReLU((M_t ⊙ V) z + b) → logits of the classes of task t.

    Attributes:
        hidden_weight: V, ``(r, D)``.
        hidden_bias: b, ``(r,)``.
        masks: the mask of each task, bool ``(T, r, D)``.
        output_weight: ``(C, r)``; zero for classes that no task has taught.
        output_bias: ``(C,)``.
        class_task: task that taught each class, counted from 1, int64 ``(C,)``; 0: none.
    """

    family = "gradient"
    removal = "output only"
    settings: Settings
    Settings: ClassVar[type] = Settings

    def _start(self, priors: Priors) -> None:
        r, device = self.settings.neurons, self.device
        generator = self.generator(purpose=1)
        self.hidden_weight = self._draw(r, self.dim, self.dim, generator)
        self.hidden_bias = self._draw(r, 1, self.dim, generator)[:, 0]
        self.masks = torch.zeros(0, r, self.dim, dtype=torch.bool, device=device)
        self.output_weight = torch.zeros(0, r, device=device)
        self.output_bias = torch.zeros(0, device=device)
        self.class_task = torch.zeros(0, dtype=torch.int64, device=device)

    def _draw(self, rows: int, columns: int, fan_in: int, generator: torch.Generator) -> Tensor:
        """Draw weights ``(rows, columns)`` as PyTorch does for a layer with so many inputs."""
        bound = 1.0 / math.sqrt(fan_in)
        return ((torch.rand(rows, columns, generator=generator) * 2 - 1) * bound).to(self.device)

    # ── learning ─────────────────────────────────────────────────────────────────────────────────────
    def _learn(self, task: Task, progress: Progress) -> dict[str, float]:
        rows = task.rows.to(self.device)
        inputs, labels = task.embeddings.to(self.device), torch.searchsorted(rows, task.labels.to(self.device))
        missing = int(rows.max()) + 1 - len(self.class_task)
        if missing > 0:
            self.class_task = F.pad(self.class_task, (0, missing))
            self.output_weight = F.pad(self.output_weight, (0, 0, 0, missing))
            self.output_bias = F.pad(self.output_bias, (0, missing))
        columns = self.settings.neurons + 1
        drawn = self._draw(len(rows), columns, columns, self.generator(purpose=2))
        weight, bias, mask, measured = self._fit(inputs, labels, drawn[:, :-1], drawn[:, -1], progress)
        self.masks = torch.cat([self.masks, mask[None]])
        self.output_weight[rows], self.output_bias[rows] = weight, bias
        self.class_task[rows] = len(self.masks)
        return measured

    @abc.abstractmethod
    def _fit(
        self, inputs: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, progress: Progress
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
        """Learn the network of a task.

        Args:
            inputs: ``(N, D)``.
            labels: positions of the classes in the task, ``(N,)``.
            weight: random weights of the k outputs of the task, ``(k, r)``.
            bias: their biases, ``(k,)``.
            progress: see `Progress`.

        Returns:
            Weights and biases of the outputs, the mask, bool ``(r, D)``, and measurements.
        """

    def _train(
        self,
        forward: Forward,
        optimisers: Sequence[torch.optim.Optimizer],
        inputs: Tensor,
        labels: Tensor,
        progress: Progress,
        epochs: int | None = None,
    ) -> dict[str, float]:
        """Train parameters in place.

        Args:
            forward: embeddings ``(B, D)`` → logits ``(B, k)``.
            optimisers: optimisers of disjoint parameters, whose gradients are clipped together.
            inputs: ``(N, D)``.
            labels: ``(N,)``.
            progress: see `Progress`.
            epochs: passes over the task; None: those of the settings.
        """
        settings = self.settings
        parameters = [one for optimiser in optimisers for group in optimiser.param_groups for one in group["params"]]

        def step(index: Tensor) -> dict[str, Tensor]:
            loss = F.cross_entropy(forward(inputs[index]), labels[index])
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            for optimiser in optimisers:
                optimiser.step()
            return {"cross_entropy": loss}

        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            passes = epochs or max(settings.epochs, -(-settings.min_steps // -(-len(labels) // settings.batch)))
            return run_epochs(self, len(labels), passes, step, progress)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None

    def _remove(self, row: int, approximately: bool) -> bool:
        if not approximately:
            return super()._remove(row, approximately)
        blank(self, row)
        return False

    # ── predicting ───────────────────────────────────────────────────────────────────────────────────
    def _mask(self, task: int) -> Tensor:
        """Return the weights that a task uses, bool ``(r, D)``."""
        return self.masks[task]

    def _rows(self, task: int) -> Tensor:
        """Return the classes of a task, int64 ``(k,)``."""
        return (self.class_task == task + 1).nonzero().flatten()

    @torch.no_grad()
    def scores(self, embeddings: Tensor) -> Tensor:
        """Return scores ``(N, C)`` that are comparable between tasks."""
        scores = torch.full((len(embeddings), len(self.class_task)), NEVER)
        for task in range(len(self.masks)):
            rows = self._rows(task)
            if not len(rows):
                continue
            hidden = self.hidden_weight * self._mask(task)
            for start in range(0, len(embeddings), 4096):
                part = F.relu(F.linear(embeddings[start : start + 4096].to(self.device), hidden, self.hidden_bias))
                logits = F.linear(part, self.output_weight[rows], self.output_bias[rows])
                found = certainties(logits) if self.settings.infer == "entropy" else logits
                scores[start : start + 4096, rows.cpu()] = found.cpu()
        return scores

    def write_head(self, graph: HeadGraph, x: str) -> str:
        columns, order = [], []
        for task in range(len(self.masks)):
            rows = self._rows(task)
            if not len(rows):
                continue
            weight = self.hidden_weight * self._mask(task)
            hidden = graph.add("Relu", graph.affine(x, f"hidden_{task}", weight, self.hidden_bias))
            logits = graph.affine(hidden, f"output_{task}", self.output_weight[rows], self.output_bias[rows])
            columns.append(_certainties(graph, logits) if self.settings.infer == "entropy" else logits)
            order += rows.tolist()
        places = [order.index(row) if row in order else 0 for row in range(graph.classes)]  # 0: never learned
        return graph.add("Gather", graph.add("Concat", *columns, axis=1), graph.indices(*places), axis=1)

    # ── the state ────────────────────────────────────────────────────────────────────────────────────
    def schema(self) -> dict[str, TensorSpec]:
        r = self.settings.neurons
        return {
            "hidden_weight": TensorSpec((r, "D"), "float32", "weights that all tasks share"),
            "hidden_bias": TensorSpec((r,), "float32", "biases that all tasks share"),
            "masks": TensorSpec(("T", r, -(-self.dim // 8)), "uint8", "mask of each task, a bit per weight"),
            "output_weight": TensorSpec(("C", r), "float32", "weights of the outputs"),
            "output_bias": TensorSpec(("C",), "float32", "biases of the outputs"),
            "class_task": TensorSpec(
                ("C",), "int64", "task that taught each class, from 1; 0: none", least=0, most=LARGEST_COUNT
            ),
        }

    def _check(self, state: dict[str, Tensor]) -> None:
        tasks, learned = len(state["masks"]), int(state["tasks_learned"][0])
        if tasks != learned:
            raise BundleRefusedError(f"there are masks of {tasks} tasks, but {learned} were learned; restore the file")
        of, seen = state["class_task"], state["seen"] == 1
        if bool((of > tasks).any()) or not torch.equal((of > 0)[: len(seen)], seen) or bool(of[len(seen) :].any()):
            raise BundleRefusedError("the tasks of the classes do not match the learned classes; restore the file")

    def _tensors(self) -> dict[str, Tensor]:
        packed = torch.from_numpy(np.packbits(self.masks.cpu().numpy(), axis=2))
        names = ("hidden_weight", "hidden_bias", "output_weight", "output_bias", "class_task")
        return {**{name: getattr(self, name) for name in names}, "masks": packed}

    def _load(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, tensor.to(self.device))
        unpacked = np.unpackbits(tensors["masks"].numpy(), axis=2, count=self.dim)
        self.masks = torch.from_numpy(unpacked).bool().to(self.device)


def _certainties(graph: HeadGraph, logits: str) -> str:
    """Write `certainties` into a graph."""
    below = graph.add("Sub", logits, graph.reduce("ReduceMax", logits))
    powers = graph.add("Exp", below)
    total = graph.reduce("ReduceSum", powers)
    mean = graph.add("Div", graph.reduce("ReduceSum", graph.add("Mul", powers, below)), total)
    return graph.add("Sub", below, graph.add("Sub", graph.add("Log", total), mean))


# ── the methods ──────────────────────────────────────────────────────────────────────────────────────────
@dataclasses.dataclass(frozen=True)
class PackNetSettings(Settings):
    """Settings of PackNet."""

    prune: float = setting(
        0.75, "share of the free weights that a task leaves to later ones; 0.5 to 0.75 as published",
        minimum=0.0, maximum=1.0,
    )  # fmt: skip
    retrain: int = setting(10, "passes over a task after pruning", minimum=1, maximum=1_000_000)


class PackNet(MaskedNetwork):
    """A network whose weights are given to one task after the other; biases are those of the first task."""

    name: ClassVar[str] = "packnet"
    display: str = "PackNet"
    settings: PackNetSettings
    Settings: ClassVar[type] = PackNetSettings

    def _mask(self, task: int) -> Tensor:
        return self.masks[: task + 1].any(0)

    def _fit(
        self, inputs: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, progress: Progress
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
        free, rate, shared = ~self.masks.any(0), self.settings.lr, self.hidden_bias.clone()
        fixed, own = self.hidden_weight * ~free, self.hidden_weight * free
        parameters = [own, weight, bias, *([] if len(self.masks) else [shared])]

        def trainer(allowed: Tensor, progress: Progress, epochs: int | None = None) -> dict[str, float]:
            def forward(x: Tensor) -> Tensor:
                return F.linear(F.relu(F.linear(x, fixed + own * allowed, shared)), weight, bias)

            return self._train(forward, [torch.optim.SGD(parameters, rate)], inputs, labels, progress, epochs)

        measured = trainer(free, progress)
        count = round((1.0 - self.settings.prune) * int(free.sum()))
        largest = torch.where(free, own.abs(), -1.0).flatten().topk(count).indices
        kept = torch.zeros_like(free).flatten().index_fill(0, largest, True).view_as(free)
        measured["cross_entropy"] = trainer(kept, lambda share: None, self.settings.retrain)["cross_entropy"]
        self.hidden_weight, self.hidden_bias = fixed + own * kept, shared
        return weight, bias, kept, measured


@dataclasses.dataclass(frozen=True)
class PiggybackSettings(Settings):
    """Settings of Piggyback."""

    mask_lr: float = setting(1e-4, "Adam's learning rate of masks, as published", above=0.0)
    initial: float = setting(0.01, "first value of a mask, as published")
    threshold: float = setting(0.005, "a weight is used if its mask exceeds this, as published")


class Piggyback(MaskedNetwork):
    """A network trained on the first task, and masks on it for all others."""

    name: ClassVar[str] = "piggyback"
    display: str = "Piggyback"
    settings: PiggybackSettings
    Settings: ClassVar[type] = PiggybackSettings

    def _fit(
        self, inputs: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, progress: Progress
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
        settings, first = self.settings, not len(self.masks)
        fixed, shared = self.hidden_weight.clone(), self.hidden_bias.clone()
        real = torch.full_like(fixed, settings.initial)

        def forward(x: Tensor) -> Tensor:
            used = fixed if first else fixed * straight_through(real, real > settings.threshold)
            return F.linear(F.relu(F.linear(x, used, shared)), weight, bias)

        outputs = torch.optim.SGD([weight, bias], settings.lr)
        rest = torch.optim.SGD([fixed, shared], settings.lr) if first else torch.optim.Adam([real], settings.mask_lr)
        measured = self._train(forward, [outputs, rest], inputs, labels, progress)
        self.hidden_weight, self.hidden_bias = fixed, shared
        return weight, bias, torch.ones_like(fixed, dtype=torch.bool) if first else real > settings.threshold, measured


@dataclasses.dataclass(frozen=True)
class SupSupSettings(Settings):
    """Settings of SupSup."""

    kept: float = setting(0.5, "share of the weights of a layer that a task uses", above=0.0, maximum=1.0)
    score_lr: float = setting(1e-4, "Adam's learning rate of scores, chosen on held-out images", above=0.0)


class SupSup(MaskedNetwork):
    """Random weights of one size and both signs, without biases, and masks on both layers."""

    name: ClassVar[str] = "supsup"
    display: str = "SupSup"
    settings: SupSupSettings
    Settings: ClassVar[type] = SupSupSettings

    def _start(self, priors: Priors) -> None:
        super()._start(priors)
        self.hidden_weight, self.hidden_bias = self._signed(self.hidden_weight), torch.zeros_like(self.hidden_bias)

    def _signed(self, drawn: Tensor) -> Tensor:
        """Return the signs of random numbers ``(m, n)``, of the size that keeps the variance of ReLU neurons."""
        return drawn.sign() * math.sqrt(2.0 / (drawn.shape[1] * self.settings.kept))

    def _highest(self, scores: Tensor) -> Tensor:
        """Return the weights with the highest scores of a layer, bool."""
        count = max(1, round(self.settings.kept * scores.numel()))
        flat = scores.detach().cpu().numpy().ravel()
        return scores >= float(np.partition(flat, -count)[-count])  # NumPy's selection is eight times faster

    def _fit(
        self, inputs: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, progress: Progress
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
        generator, outputs = self.generator(purpose=3), self._signed(weight)
        hidden_scores = self._draw(len(self.hidden_weight), self.dim, self.dim, generator)
        output_scores = self._draw(len(weight), weight.shape[1], weight.shape[1], generator)

        def forward(x: Tensor) -> Tensor:
            hidden = self.hidden_weight * straight_through(hidden_scores, self._highest(hidden_scores))
            output = outputs * straight_through(output_scores, self._highest(output_scores))
            return F.linear(F.relu(F.linear(x, hidden)), output)

        optimiser = torch.optim.Adam([hidden_scores, output_scores], self.settings.score_lr)
        measured = self._train(forward, [optimiser], inputs, labels, progress)
        return outputs * self._highest(output_scores), torch.zeros_like(bias), self._highest(hidden_scores), measured
