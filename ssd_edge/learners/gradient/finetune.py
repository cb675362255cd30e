"""`finetune`: a ReLU MLP trained on each task in turn, the lower bound of the panel.

With a penalty it is EWC, online EWC, SI, MAS or L2. With another schedule and all tasks at once it is `joint`, the
panel's upper bound for a network of this size on these embeddings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_edge.answers.graph import HeadGraph
from ssd_edge.config import setting
from ssd_edge.errors import InputError
from ssd_edge.learners.base import Learner, Progress, Task, TensorSpec
from ssd_edge.learners.gradient.network import ANNOUNCED, check_announced, layer_name
from ssd_edge.learners.gradient.penalties import DISPLAY, Penalty, PenaltySettings, Slot
from ssd_edge.learners.priors import Priors
from ssd_edge.learners.removal import blank


@dataclasses.dataclass(frozen=True)
class NetworkSettings:
    """Settings of the ReLU MLP and its training."""

    neurons: int = setting(1000, "hidden units, as many as SDMLP has", minimum=1, maximum=1_000_000)
    layers: int = setting(1, "hidden layers, each of `neurons`", minimum=1, maximum=8)
    epochs: int = setting(40, "passes over a task", minimum=1, maximum=1_000_000)
    min_steps: int = setting(0, "more epochs if a task has fewer steps than this", minimum=0, maximum=1_000_000_000)
    lr: float = setting(0.05, "learning rate; its peak with one_cycle", above=0.0)
    batch: int = setting(128, "samples per step", minimum=1)
    clip: float = setting(1.0, "largest norm of the gradient", above=0.0)
    optimiser: Literal["sgd", "adamw"] = setting("sgd", "plain SGD as for SDMLP; adamw for joint training")
    one_cycle: bool = setting(False, "one-cycle schedule over a task, for joint training")
    weight_decay: float = setting(0.0, "weight decay of adamw", minimum=0.0)
    outputs: Literal["announced", "arriving"] = setting("announced", "announced: later classes are negatives too")


@dataclasses.dataclass(frozen=True)
class Settings(PenaltySettings, NetworkSettings):
    """Settings of fine-tuning, with or without a penalty."""

    def __post_init__(self) -> None:
        """Check fields against each other.

        Raises:
            InputError: a penalty is combined with an optimiser other than plain SGD.
        """
        if self.penalty != "none" and (self.optimiser != "sgd" or self.weight_decay):
            raise InputError(
                f"learner.penalty={self.penalty} requires plain SGD, but learner.optimiser is {self.optimiser} with "
                f"learner.weight_decay {self.weight_decay:g}; omit both, or the penalty"
            )


# chosen on a held-out fifth of CIFAR-10's training embeddings, never on test data (docs/method.md)
JOINT = Settings(epochs=20, min_steps=2000, lr=1e-3, batch=256, optimiser="adamw", one_cycle=True, weight_decay=0.05)


def parameter_name(kind: Literal["weight", "bias"], layer: int) -> str:
    """Return the name of a hidden layer's parameter: ``hidden_weight``, ``hidden_weight_1``, … from the bottom up."""
    return layer_name(f"hidden_{kind}", layer)


def run_epochs(
    learner: Learner,
    count: int,
    epochs: int,
    step: Callable[[Tensor], dict[str, Tensor]],
    progress: Progress,
    extra: Callable[[], dict[str, float]] = dict,
) -> dict[str, float]:
    """Run epochs in random order until `progress` returns True.

    Args:
        learner: learner with the settings ``batch`` and ``lr``; its generator draws the orders.
        count: number of samples N.
        epochs: passes over them.
        step: takes one step with the samples of these indices ``(B,)``; returns the terms of their loss before it.
        progress: see `Progress`.
        extra: returns further measurements after an epoch.

    Returns:
        Mean of each loss term over the last epoch, further measurements, and ``epochs``, the number of epochs.

    Raises:
        InputError: a measurement is not finite.
    """
    settings, generator = learner.settings, learner.generator()
    measured: dict[str, float] = {}
    for epoch in range(epochs):
        order = torch.randperm(count, generator=generator).to(learner.device)
        totals: dict[str, Tensor] = {}
        for index in torch.split(order, settings.batch):
            for name, loss in step(index).items():
                totals[name] = totals.get(name, 0.0) + loss.detach() * len(index)
        measured = {**{name: float(total) / count for name, total in totals.items()}, **extra()}
        if not all(math.isfinite(value) for value in measured.values()):
            raise InputError(f"{learner.display} diverged in epoch {epoch + 1}; lower learner.lr ({settings.lr})")
        measured["epochs"] = float(epoch + 1)
        if progress((epoch + 1) / epochs):
            break
    return measured


class FineTune(Learner):
    """A ReLU MLP: z → ReLU(V z + b), once or several times → logits; cross-entropy over all outputs.

    Attributes:
        parameters: weights ``(out, in)`` and biases ``(out,)`` by their names in the state, bottom first.
        penalty: penalty against forgetting; has no effect unless the settings select one.
    """

    name: ClassVar[str] = "finetune"
    display: str = "fine-tuning"
    family = "gradient"
    baseline = True
    removal = "output only"
    with_penalty: ClassVar[str] = "{}"  # template of the display name with a penalty
    settings: Settings
    Settings: ClassVar[type] = Settings

    def _configure(self) -> None:
        self.announced = 0
        self.penalty = Penalty(self.settings, self.device)
        if self.settings.penalty != "none":
            self.display = self.with_penalty.format(DISPLAY[self.settings.penalty])

    def _start(self, priors: Priors) -> None:
        settings, dim, generator = self.settings, self.dim, self.generator(purpose=1)
        self.parameters: dict[str, Tensor] = {}
        for layer in range(settings.layers):
            inputs = settings.neurons if layer else dim
            self.parameters[parameter_name("weight", layer)] = self._uniform(
                settings.neurons, inputs, inputs, generator
            )
            self.parameters[parameter_name("bias", layer)] = self._uniform(settings.neurons, 1, inputs, generator)[:, 0]
        self.parameters["output_weight"] = torch.zeros(0, settings.neurons, device=self.device)
        self.parameters["output_bias"] = torch.zeros(0, device=self.device)

    def _uniform(self, rows: int, columns: int, fan_in: int, generator: torch.Generator) -> Tensor:
        bound = 1.0 / math.sqrt(fan_in)
        return ((torch.rand(rows, columns, generator=generator) * 2 - 1) * bound).to(self.device)

    @property
    def hidden_weight(self) -> Tensor:
        """Weights of the first layer, ``(r, D)``."""
        return self.parameters["hidden_weight"]

    @property
    def hidden_bias(self) -> Tensor:
        """Biases of the first layer, ``(r,)``."""
        return self.parameters["hidden_bias"]

    @property
    def output_weight(self) -> Tensor:
        """Weights of the last layer, ``(C, r)``."""
        return self.parameters["output_weight"]

    @property
    def output_bias(self) -> Tensor:
        """Biases of the last layer, ``(C,)``."""
        return self.parameters["output_bias"]

    def expect(self, classes: int) -> None:
        self.announced = classes if self.settings.outputs == "announced" else 0
        if not self.tasks_learned:
            self._set_outputs(self.output_weight[:0], self.output_bias[:0])  # drop outputs announced before
            self._grow(self.announced)

    def _grow(self, classes: int) -> None:
        """Add outputs until there are `classes`.

        Rows do not depend on the number of calls within a task: all are parts of the same draw.
        """
        present, r = len(self.output_bias), self.settings.neurons
        first = 0 if not self.tasks_learned else present
        if classes > present:
            drawn = self._uniform(classes - first, r + 1, r, self.generator(purpose=2))[present - first :]
            weight, bias = torch.cat([self.output_weight, drawn[:, :-1]]), torch.cat([self.output_bias, drawn[:, -1]])
            self._set_outputs(weight, bias)

    def _set_outputs(self, weight: Tensor, bias: Tensor) -> None:
        self.parameters["output_weight"], self.parameters["output_bias"] = weight, bias

    # ── the network ──────────────────────────────────────────────────────────────────────────────────
    def _activations(self, inputs: Tensor) -> list[Tensor]:
        """Return the input ``(B, D)`` and the activations ``(B, r)`` of every hidden layer, bottom first."""
        activations = [inputs]
        for layer in range(self.settings.layers):
            weight, bias = (
                self.parameters[parameter_name("weight", layer)],
                self.parameters[parameter_name("bias", layer)],
            )
            activations.append(F.relu(F.linear(activations[-1], weight, bias)))
        return activations

    def _forward(self, embeddings: Tensor) -> Tensor:
        """Return logits ``(B, C)``."""
        return F.linear(self._activations(embeddings)[-1], self.output_weight, self.output_bias)

    def linearise(self, inputs: Tensor) -> tuple[Tensor, Callable[[Tensor], dict[str, Slot]]]:
        """Return the logits ``(B, C)`` of embeddings, and the map from ∂L/∂logits to per-sample gradients."""
        activations = self._activations(inputs)
        active = [(part > 0).to(part.dtype) for part in activations[1:]]

        def pullback(cotangent: Tensor) -> dict[str, Slot]:
            slots = {"output_weight": Slot(cotangent, activations[-1]), "output_bias": Slot(cotangent, None)}
            delta, weight = cotangent, self.output_weight
            for layer in reversed(range(self.settings.layers)):
                delta = (delta @ weight).mul_(active[layer])
                slots[parameter_name("weight", layer)] = Slot(delta, activations[layer])
                slots[parameter_name("bias", layer)] = Slot(delta, None)
                weight = self.parameters[parameter_name("weight", layer)]
            return slots

        return F.linear(activations[-1], self.output_weight, self.output_bias), pullback

    # ── learning ─────────────────────────────────────────────────────────────────────────────────────
    def _begin(self, inputs: Tensor, labels: Tensor) -> None:
        """Prepare a task before its first step; there is an output for each of its classes."""

    def _loss(self, logits: Tensor, labels: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Compute the weighted terms of the loss of a batch; their sum is minimised.

        Args:
            logits: ``(B, C)``.
            labels: ``(B,)``.
            index: positions of the samples in the inputs of `_begin`, ``(B,)``.
        """
        return {"cross_entropy": F.cross_entropy(logits, labels)}

    def _end(self, inputs: Tensor, labels: Tensor) -> None:
        """Finish a task after its last step."""

    def _learn(self, task: Task, progress: Progress) -> dict[str, float]:
        """Learn one task.

        Returns:
            Mean of each loss term over the last epoch, the penalty after it, and ``epochs``, the number of epochs.
        """
        settings = self.settings
        self._grow(max(self.announced, int(task.labels.max()) + 1))
        inputs, labels = task.embeddings.to(self.device), task.labels.to(self.device)
        steps_per_epoch = -(-len(labels) // settings.batch)
        epochs = max(settings.epochs, -(-settings.min_steps // steps_per_epoch))
        self._begin(inputs, labels)
        self.penalty.begin(self.parameters)
        parameters = list(self.parameters.values())
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimiser: torch.optim.Optimizer
        if settings.optimiser == "sgd":
            optimiser = torch.optim.SGD(parameters, lr=settings.lr)
        else:
            optimiser = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        schedule = None
        if settings.one_cycle:
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimiser, settings.lr, total_steps=epochs * steps_per_epoch, cycle_momentum=False
            )

        def step(index: Tensor) -> dict[str, Tensor]:
            losses = self._step(inputs[index], labels[index], index, optimiser)
            if schedule is not None:
                schedule.step()
            return losses

        def extra() -> dict[str, float]:
            return {"penalty": float(self.penalty.value(self.parameters))} if self.penalty.active else {}

        try:
            measured = run_epochs(self, len(labels), epochs, step, progress, extra)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
        self._end(inputs, labels)
        self.penalty.consolidate(self.parameters, inputs, self.linearise, generator=self.generator(purpose=6))
        return measured

    def _step(
        self, inputs: Tensor, labels: Tensor, index: Tensor, optimiser: torch.optim.Optimizer
    ) -> dict[str, Tensor]:
        """Take one step with the clipped gradient of loss and penalty; return the loss terms before it."""
        settings, penalty, parameters = self.settings, self.penalty, self.parameters
        logits = self._forward(inputs)
        losses = self._loss(logits, labels, index)
        likelihood: tuple[Tensor, ...] = ()
        if penalty.tracks:
            observed = F.cross_entropy(settings.penalty_beta * logits, labels)
            likelihood = torch.autograd.grad(observed, list(parameters.values()), retain_graph=True)
        optimiser.zero_grad(set_to_none=True)
        terms = list(losses.values())
        sum(terms[1:], terms[0]).backward()  # type: ignore[no-untyped-call]  # PyTorch does not annotate it
        if penalty.active:
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    parameter.grad += penalty.gradient(name, parameter)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()} if likelihood else {}
        torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip)
        optimiser.step()
        for (name, old), gradient in zip(before.items(), likelihood, strict=True):
            penalty.track(name, gradient, parameters[name].detach() - old)
        return losses

    def _remove(self, row: int, approximately: bool) -> bool:
        if not approximately:
            return super()._remove(row, approximately)
        blank(self, row)
        return False

    # ── predicting, and the state ────────────────────────────────────────────────────────────────────
    @torch.no_grad()
    def scores(self, embeddings: Tensor) -> Tensor:
        parts = [self._forward(part.to(self.device)).cpu() for part in torch.split(embeddings, 4096)]
        return torch.cat(parts) if parts else torch.zeros(0, len(self.output_bias))

    def write_head(self, graph: HeadGraph, x: str) -> str:
        weight, bias = self.output_weight[: graph.classes], self.output_bias[: graph.classes]
        return graph.affine(self._write_hidden(graph, x), "output", weight, bias)

    def _write_hidden(self, graph: HeadGraph, x: str) -> str:
        """Write the hidden layers into an ONNX graph; return the name of the last one's output."""
        for layer in range(self.settings.layers):
            weight = self.parameters[parameter_name("weight", layer)]
            bias = self.parameters[parameter_name("bias", layer)]
            x = graph.add("Relu", graph.affine(x, f"hidden_{layer}", weight, bias))
        return x

    def _shapes(self) -> dict[str, tuple[str | int, ...]]:
        """Return the symbolic shapes of the parameters."""
        r = self.settings.neurons
        shapes: dict[str, tuple[str | int, ...]] = {}
        for layer in range(self.settings.layers):
            shapes[parameter_name("weight", layer)] = (r, r if layer else "D")
            shapes[parameter_name("bias", layer)] = (r,)
        return {**shapes, "output_weight": ("C", r), "output_bias": ("C",)}

    def schema(self) -> dict[str, TensorSpec]:
        shapes = self._shapes()
        described = {name: TensorSpec(shape, "float32", "parameter of the network") for name, shape in shapes.items()}
        return {**described, **self.penalty.schema(shapes, "float32"), "announced": ANNOUNCED}

    def _check(self, state: dict[str, Tensor]) -> None:
        check_announced(state, len(state["output_bias"]))
        self.penalty.check(state)

    def _tensors(self) -> dict[str, Tensor]:
        return {
            **self.parameters,
            **self.penalty.tensors(self.parameters),
            "announced": torch.tensor([self.announced]),
        }

    def renumber(self, tensors: dict[str, Tensor], rows: Tensor) -> None:
        tensors["announced"] -= (rows < self.announced).sum()

    def _load(self, tensors: dict[str, Tensor]) -> None:
        self.announced = int(tensors["announced"][0])
        self.parameters = {name: tensors[name].to(self.device) for name in self._shapes()}
        self.penalty.load(tensors)
