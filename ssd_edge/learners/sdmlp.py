"""`sdmlp`: the sparse Top-K network trained by gradients, task after task (Bricken et al. 2023).

Plain SGD on the cross-entropy over all outputs, no masking, no task id: what SSD adds distillation to.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ssd_edge.config import setting
from ssd_edge.distillation import cross_entropy
from ssd_edge.errors import InputError
from ssd_edge.learners.base import Learner, Progress, Task, TensorSpec
from ssd_edge.priors import Priors
from ssd_edge.sdmlp import SDMLP, initial_rows, prepare
from ssd_edge.topk import Activations

MAX_SWITCH = 5_000_000.0  # C of SDMLP's experiments without pretraining


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of SDMLP. The published schedule is lr=0.05 and epochs=2000 (500 for CIFAR-100 and MNIST)."""

    neurons: int = setting(1000, "r, the number of keys", minimum=2, maximum=1_000_000)
    k: int = setting(10, "neurons that stay active", minimum=1)
    shift: float = setting(0.0, "s of the input step ReLU(z - s); the keys belong to one s (docs/method.md)")
    epochs: int = setting(40, "passes over a task; with this lr a fifth of the published schedule", minimum=1)
    lr: float = setting(0.5, "plain SGD; 0.05 as published needs the published 2,000 epochs", above=0.0)
    batch: int = setting(128, "samples a step, as published", minimum=1)
    clip: float = setting(1.0, "largest norm of the gradient, as published", above=0.0)
    pretrained: bool = setting(True, "start from the backbone's keys where it brings some of this size")
    gaba: Literal["close", "keep"] = setting("close", "switches of pretrained keys: left alone a third never closes")
    switch: float = setting(0.0, "C, activations that close a switch; 0: half of samples x epochs of a task", minimum=0)
    count_in_eval: bool = setting(False, "whether predicting advances the switches too, as SDMLP's code does")
    outputs: Literal["announced", "arriving"] = setting("announced", "announced: later classes are negatives too")

    def __post_init__(self) -> None:
        """Check what one field says against another."""
        if self.k > self.neurons:
            raise InputError(f"learner.k must be at most learner.neurons, but is {self.k} of {self.neurons}")


class SDMLPLearner(Learner):
    """The training loop that SSD shares: prepare, activate, cross-entropy, touched-row step."""

    name: ClassVar[str] = "sdmlp"
    display: ClassVar[str] = "SDMLP"
    Settings: ClassVar[type] = Settings
    dtype = torch.float32

    def __init__(
        self, dim: int, settings: Any, priors: Priors, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__(dim, settings, priors, seed, device)
        r, generator = settings.neurons, self.generator(purpose=1)
        keys, counters = initial_rows(r, dim, dim, generator, self.dtype), torch.zeros(r, dtype=self.dtype)
        self.switch = settings.switch
        usable = settings.pretrained and priors.keys is not None and priors.counters is not None
        if usable and priors.keys.shape == (r, dim):
            keys = torch.from_numpy(priors.keys).to(self.dtype)
            self.switch = settings.switch or float(priors.student.get("switch", 1.0))
            counters = torch.from_numpy(priors.counters).to(self.dtype)
            if settings.gaba == "close":
                counters = counters.clamp_min(self.switch)
            shift = priors.student.get("shift", settings.shift)
            if shift != settings.shift:
                self.note = f"its keys were pretrained for shift {shift:g}, not {settings.shift:g} (pretrain --student)"
        elif settings.pretrained:
            self.note = f"the backbone brings no {r:,} pretrained keys; random ones are used"
        self.net = SDMLP(
            keys.to(self.device),
            torch.zeros(r, 0, dtype=self.dtype, device=self.device),
            counters.to(self.device),
            settings.k,
            self.switch or math.inf,  # set by the first task
        )
        self.announced = 0

    def expect(self, classes: int) -> None:
        self.announced = classes if self.settings.outputs == "announced" else 0

    def prepared(self, embeddings: Tensor) -> Tensor:
        """The network's inputs ``(N, D)`` on its device."""
        return prepare(embeddings.to(self.device, self.dtype), self.settings.shift)

    def _learn(self, task: Task, progress: Progress) -> dict[str, float]:
        settings, generator = self.settings, self.generator()
        if not self.switch:
            self.switch = max(1.0, min(MAX_SWITCH, 0.5 * len(task.labels) * settings.epochs))
            self.net.switch = self.switch
        inputs, labels = self.prepared(task.embeddings), task.labels.to(self.device)
        self.net.grow(max(self.announced, int(labels.max()) + 1), self.generator(purpose=2))
        self._begin(inputs, labels)
        measured: dict[str, float] = {}
        steps = 0
        for epoch in range(settings.epochs):
            order = torch.randperm(len(labels), generator=generator).to(self.device)
            totals: dict[str, float] = {}
            for index in order.split(settings.batch):
                x, truth = inputs[index], labels[index]
                activations = self.net.activate(x, self.net.gamma)
                self.net.count(activations)
                self._observe(activations)
                logits = activations.matmul(self.net.values)
                losses, to_logits, to_activations, to_scores = self._gradients(index, x, truth, logits, activations)
                losses["gradient_norm"] = self.net.step(
                    x, activations, to_logits, to_activations, settings.lr, settings.clip, to_scores
                )
                for name, value in losses.items():
                    totals[name] = totals.get(name, 0.0) + float(value) * len(index) / len(labels)
                steps += 1
            if not all(math.isfinite(value) for value in totals.values()):
                raise InputError(f"{self.display} diverged in epoch {epoch + 1}; lower learner.lr ({settings.lr})")
            measured = totals
            progress((epoch + 1) / settings.epochs)
        self._end(inputs, labels)
        return measured

    def _begin(self, inputs: Tensor, labels: Tensor) -> None:
        """Before the first step of a task."""

    def _observe(self, activations: Activations) -> None:
        """At each step of training."""

    def _end(self, inputs: Tensor, labels: Tensor) -> None:
        """After the last step of a task."""

    def _gradients(
        self, index: Tensor, x: Tensor, labels: Tensor, logits: Tensor, activations: Activations
    ) -> tuple[dict[str, Any], Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        """Losses, ∂L/∂logits, and what `SDMLP.step` takes beyond it."""
        loss, gradient = cross_entropy(logits, labels)
        return {"cross_entropy": loss}, gradient, None, None

    def scores(self, embeddings: Tensor) -> Tensor:
        inputs = self.prepared(embeddings)
        logits = self.net.logits(inputs)
        if self.settings.count_in_eval:
            for part in inputs.split(2048):
                self.net.count(self.net.activate(part, self.net.gamma))
        return logits.float().cpu()

    def schema(self) -> dict[str, TensorSpec]:
        r, number = self.settings.neurons, str(self.dtype).removeprefix("torch.")
        return {
            "keys": TensorSpec((r, "D"), number, "W1, the addresses"),
            "values": TensorSpec((r, "C"), number, "W2, what each neuron says of each class"),
            "counters": TensorSpec((r,), number, "activations so far, for the GABA switch"),
            "switch": TensorSpec((1,), "float64", "C, fixed by the first task or by pretraining"),
            "announced": TensorSpec((1,), "int64", "classes that the stream has announced"),
        }

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "keys": self.net.keys,
            "values": self.net.values,
            "counters": self.net.counters,
            "switch": torch.tensor([self.switch], dtype=torch.float64),
            "announced": torch.tensor([self.announced]),
        }

    def _load(self, tensors: dict[str, Tensor]) -> None:
        self.switch, self.announced = float(tensors["switch"][0]), int(tensors["announced"][0])
        net = self.net
        net.keys, net.values = tensors["keys"].to(self.device), tensors["values"].to(self.device)
        net.counters, net.switch = tensors["counters"].to(self.device), self.switch or math.inf
