"""`sdmlp`: the sparse Top-K network trained by gradients, task after task (Bricken et al. 2023).

Plain SGD on the cross-entropy over all outputs, without masks and task identities. SSD adds distillation.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from ssd_edge.answers.graph import HeadGraph
from ssd_edge.errors import InputError
from ssd_edge.learners.base import LARGEST_COUNT, Learner, Progress, Task, TensorSpec, check_unit
from ssd_edge.learners.gradient.distillation import count_activations
from ssd_edge.learners.gradient.network import (
    ANNOUNCED,
    SDMLP,
    Layer,
    NetworkSettings,
    check_announced,
    initial_rows,
    layer_name,
    prepare,
)
from ssd_edge.learners.gradient.penalties import DISPLAY, Penalty, PenaltySettings
from ssd_edge.learners.gradient.trainer import Observer, TaskLoss, Trainer
from ssd_edge.learners.priors import Priors
from ssd_edge.learners.removal import blank

UNIT_ROUNDING = 1e-3  # of the length of keys, after many steps in float32
MAX_SWITCH = 5_000_000.0  # C of SDMLP's experiments without pretraining


@dataclasses.dataclass(frozen=True)
class Settings(PenaltySettings, NetworkSettings):
    """Settings of SDMLP."""


class SDMLPLearner(Learner):
    """A sparse network trained on each task in turn.

    Attributes:
        net: the network.
        switch: C of the GABA switch; 0 until the first task if neither the settings nor pretraining give it.
        announced: number of classes that the stream has announced.
        observer: called with the forward pass of each training step, for analysis; None: nothing is observed.
    """

    name: ClassVar[str] = "sdmlp"
    display: str = "SDMLP"
    family = "gradient"
    baseline = True
    removal = "output only"
    settings: Settings
    Settings: ClassVar[type] = Settings
    dtype = torch.float32

    def _configure(self) -> None:
        settings = self.settings
        self.switch = settings.switch
        self.announced = 0
        self.observer: Observer | None = None
        self.penalty = Penalty(settings, self.device, self.dtype)
        if settings.penalty != "none":
            self.display = f"{self.display}+{DISPLAY[settings.penalty]}"

    def _start(self, priors: Priors) -> None:
        settings, dim = self.settings, self.dim
        r, generator = settings.neurons, self.generator(purpose=1)
        keys, counters = initial_rows(r, dim, dim, generator, self.dtype), torch.zeros(r, dtype=self.dtype)
        known = (priors.keys, priors.counters) if settings.pretrained else (None, None)
        if known[0] is not None and known[1] is not None and known[0].shape == (r, dim):
            keys, counters = (torch.from_numpy(array).to(self.dtype) for array in known)
            self.switch = settings.switch or float(priors.student.get("switch", 1.0))
            if settings.gaba == "close":
                counters = counters.clamp_min(self.switch)
            shift = priors.student.get("shift", settings.shift)
            if shift != settings.shift:
                self.note = f"its keys were pretrained for shift {shift:g}, not {settings.shift:g} (pretrain --student)"
        elif settings.pretrained:
            self.note = f"the backbone has no {r:,} pretrained keys; random ones are used"
        layers = [Layer(keys.to(self.device), counters.to(self.device))]
        for _ in range(settings.layers - 1):
            keys = initial_rows(r, r, r, generator, self.dtype).to(self.device)
            layers.append(Layer(keys, torch.zeros(r, dtype=self.dtype, device=self.device)))
        self.net = self._network(layers, torch.zeros(r, 0, dtype=self.dtype, device=self.device))

    def _network(self, layers: list[Layer], values: Tensor) -> SDMLP:
        switch = self.switch or math.inf  # set by the first task
        return SDMLP(layers, values, self.settings.k, switch, self.settings.inhibition)

    def expect(self, classes: int) -> None:
        self.announced = classes if self.settings.outputs == "announced" else 0
        if not self.tasks_learned:
            self.net.grow(self.announced, self.generator(purpose=2))

    def prepared(self, embeddings: Tensor) -> Tensor:
        """Return the network's inputs ``(N, D)`` on its device."""
        return prepare(embeddings.to(self.device, self.dtype), self.settings.shift)

    def parameters(self) -> dict[str, Tensor]:
        """Return the tensors that gradients change, by name."""
        return self.net.parameters()

    # ── learning ─────────────────────────────────────────────────────────────────────────────────────
    def trainer(self, task: Task) -> Trainer:
        """Prepare the training of a task: outputs for its classes, its loss, and the penalty.

        `learn` calls this, runs the epochs and ends the task; a benchmark may run single epochs instead.
        """
        settings, net = self.settings, self.net
        if not self.switch:
            self.switch = max(1.0, min(MAX_SWITCH, 0.5 * len(task.labels) * settings.epochs_of(len(task.labels))))
            net.switch = self.switch
        inputs, labels = self.prepared(task.embeddings), task.labels.to(self.device)
        # another purpose than in `expect`: columns drawn later must not repeat the first ones
        net.grow(max(self.announced, int(labels.max()) + 1), self.generator(purpose=5 if net.values.numel() else 2))
        loss = self._task_loss(inputs, labels)
        self.penalty.begin(self.parameters())
        net.frozen = self._frozen(inputs)
        return Trainer(net, settings, self.penalty, loss, inputs, labels, self.observer)

    def _learn(self, task: Task, progress: Progress) -> dict[str, float]:
        settings, generator = self.settings, self.generator()
        trainer = self.trainer(task)
        measured: dict[str, float] = {}
        epochs = settings.epochs_of(len(task.labels))
        for epoch in range(epochs):
            order = torch.randperm(len(task.labels), generator=generator).to(self.device)
            if epoch in (0, epochs - 1):
                when = "first" if epoch == 0 else "last"
                norms = trainer.gradient_norms(order[: settings.batch])
                measured.update({f"{name}_gradient_{when}": norm for name, norm in norms.items()})
            totals = trainer.epoch(order)
            if not all(math.isfinite(value) for value in totals.values()):
                raise InputError(f"{self.display} diverged in epoch {epoch + 1}; lower learner.lr ({settings.lr})")
            if self.penalty.active:
                totals["penalty"] = float(self.penalty.value(self.parameters()))
            measured.update(totals)
            measured["epochs"] = float(epoch + 1)
            if progress((epoch + 1) / epochs):
                break
        self._end(trainer.inputs)
        generator = self.generator(purpose=6)
        self.penalty.consolidate(self.parameters(), trainer.inputs, self.net.linearise, generator=generator)
        return measured

    def _frozen(self, inputs: Tensor) -> list[Tensor] | None:
        """Return, per layer, the neurons that the task must not change, bool ``(r,)``; None if it may change all.

        Sparse memory finetuning (Lin et al. 2025): those may change that the task activates often (term frequency) and
        that were rarely active before (inverse document frequency, from the counters).
        """
        count = self.settings.memory_rows
        if not count or not self.tasks_learned:
            return None
        frozen = []
        for layer, active in zip(self.net.layers, count_activations(self.net, inputs), strict=True):
            samples = layer.counters.double().sum() / self.settings.k  # about as many have been counted
            score = active / active.sum() * ((samples + 1) / (layer.counters.double() + 1)).log()
            mask = torch.ones_like(active, dtype=torch.bool)
            mask[score.topk(min(count, len(mask))).indices] = False
            frozen.append(mask)
        return frozen

    def _task_loss(self, inputs: Tensor, labels: Tensor) -> TaskLoss:
        """Return the loss of a task, before its first step.

        Args:
            inputs: prepared inputs of the task, ``(N, D)``.
            labels: ``(N,)``; the network has an output for each of them.
        """
        return TaskLoss()

    def _end(self, inputs: Tensor) -> None:
        """Finish a task after its last step; `inputs` are its prepared inputs."""

    def _remove(self, row: int, approximately: bool) -> bool:
        if not approximately:
            return super()._remove(row, approximately)
        blank(self, row)
        return False

    # ── predicting, and the state ────────────────────────────────────────────────────────────────────
    def scores(self, embeddings: Tensor) -> Tensor:
        return self.net.logits(self.prepared(embeddings)).float().cpu()

    def write_head(self, graph: HeadGraph, x: str) -> str:
        net = self.net
        if self.settings.shift:
            x = graph.add("Sub", x, graph.scalar(self.settings.shift))
        below = graph.unit(graph.add("Relu", x))
        for number, (layer, gamma) in enumerate(zip(net.layers, net.gammas, strict=True)):
            neurons, label = len(layer.keys), f"_{number}" if number else ""
            if number:
                below = graph.unit(below)
            scores = graph.matmul(below, f"keys{label}", layer.keys.T)
            if net.inhibition == "mask":
                below = _write_mask(graph, scores, net.k, neurons)
            else:
                below = _write_inhibition(graph, scores, net.k, neurons, gamma, label)
        return graph.matmul(below, "values", net.values[:, : graph.classes])

    def schema(self) -> dict[str, TensorSpec]:
        schema: dict[str, TensorSpec] = {}
        r, number = self.settings.neurons, str(self.dtype).removeprefix("torch.")
        for layer in range(self.settings.layers):
            keys, counters = layer_name("keys", layer), layer_name("counters", layer)
            schema[keys] = TensorSpec((r, r if layer else "D"), number, "W1, the keys", least=0)
            schema[counters] = TensorSpec(
                (r,), number, "activations of each neuron so far, for the GABA switch", least=0, most=LARGEST_COUNT
            )
        schema["values"] = TensorSpec((r, "C"), number, "W2, the contribution of each neuron to each class", least=0)
        shapes = {name: spec.shape for name, spec in schema.items() if not name.startswith("counters")}
        return {
            **schema,
            "switch": TensorSpec(
                (1,), "float64", "C, set by the first task or by pretraining", least=0, most=LARGEST_COUNT
            ),
            "announced": ANNOUNCED,
            **self.penalty.schema(shapes, number),
        }

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for number, layer in enumerate(self.net.layers):
            tensors[layer_name("keys", number)] = layer.keys
            tensors[layer_name("counters", number)] = layer.counters
        return {
            **tensors,
            "values": self.net.values,
            "switch": torch.tensor([self.switch], dtype=torch.float64),
            "announced": torch.tensor([self.announced]),
            **self.penalty.tensors(self.parameters()),
        }

    def renumber(self, tensors: dict[str, Tensor], rows: Tensor) -> None:
        tensors["announced"] -= (rows < self.announced).sum()

    def _check(self, state: dict[str, Tensor]) -> None:
        check_announced(state, state["values"].shape[1])
        for layer in range(self.settings.layers):
            # shorter where float32 cannot represent the square of a length
            check_unit(state[layer_name("keys", layer)], UNIT_ROUNDING, "the keys of neurons", or_shorter=True)
        self.penalty.check(state)

    def _load(self, tensors: dict[str, Tensor]) -> None:
        self.switch, self.announced = float(tensors["switch"][0]), int(tensors["announced"][0])
        values = tensors["values"].to(self.device)
        self.net = net = self._network([], values)
        net.layers = [  # assigned because normalising unit rows once more would change their last bits
            Layer(*(tensors[layer_name(name, number)].to(self.device) for name in ("keys", "counters")))
            for number in range(self.settings.layers)
        ]
        net.values = values
        self.penalty.load(tensors)


def _write_inhibition(graph: HeadGraph, scores: str, k: int, neurons: int, gamma: Tensor | None, label: str) -> str:
    """Write ReLU(u − γ I): u = ReLU(scores), I its (k+1)-th largest value; without γ all switches are closed.

    Only the value of I is needed: a tie with it becomes 0, as in `topk.inhibit`.
    """
    u, rank = graph.add("Relu", scores), min(k + 1, neurons)
    inhibition = graph.column(graph.top(u, rank, neurons, "learner.k"), rank - 1)
    if gamma is not None:
        inhibition = graph.add("Mul", graph.weight(f"gamma{label}", gamma), inhibition)
    return graph.add("Relu", graph.add("Sub", u, inhibition))


def _write_mask(graph: HeadGraph, scores: str, k: int, neurons: int) -> str:
    """Write the k largest positive scores, zeros elsewhere; the runtime decides between equal scores."""
    count = min(k, neurons)
    top = graph.top(scores, count, neurons, "learner.k")
    zeros = graph.add("ConstantOfShape", graph.add("Shape", scores))
    return graph.add("ScatterElements", zeros, f"{top}/1", graph.add("Relu", top), axis=1)
