"""`sdmlp`: the sparse Top-K network trained by gradients, task after task (Bricken et al. 2023).

Plain SGD on the cross-entropy over all outputs, no masking, no task id: what SSD adds distillation to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ssd_edge.config import setting
from ssd_edge.errors import InputError
from ssd_edge.learners.base import HeadGraph, Learner, Progress, Task, TensorSpec
from ssd_edge.learners.gradient import epoch as epochs
from ssd_edge.learners.gradient.distillation import cross_entropy
from ssd_edge.learners.gradient.network import SDMLP, Gradients, Layer, Pass, initial_rows, prepare
from ssd_edge.learners.gradient.penalties import DISPLAY, Penalty, PenaltySettings, Slot
from ssd_edge.learners.priors import Priors
from ssd_edge.learners.removal import blank

MAX_SWITCH = 5_000_000.0  # C of SDMLP's experiments without pretraining


@dataclasses.dataclass(frozen=True)
class NetworkSettings:
    """Settings of the network and its training. Published: lr=0.05, epochs=2000 (500 for CIFAR-100 and MNIST)."""

    neurons: int = setting(1000, "r, the number of keys of a hidden layer", minimum=2, maximum=1_000_000)
    layers: int = setting(1, "hidden layers; the papers have one", minimum=1, maximum=8)
    k: int = setting(10, "neurons that stay active", minimum=1)
    shift: float = setting(0.0, "s of the input step ReLU(z - s); the keys belong to one s (docs/method.md)")
    epochs: int = setting(40, "passes over a task; with this lr a fifth of the published schedule", minimum=1)
    lr: float = setting(0.5, "plain SGD; 0.05 as published needs the published 2,000 epochs", above=0.0)
    batch: int = setting(128, "samples a step, as published", minimum=1)
    clip: float = setting(1.0, "largest norm of the gradient, as published", above=0.0)
    pretrained: bool = setting(True, "start from the backbone's keys where it brings some of this size")
    inhibition: Literal["gaba", "subtract", "mask"] = setting(
        "gaba", "gaba: subtraction behind the switch; subtract: closed from the start; mask: the k largest pass"
    )
    gaba: Literal["close", "keep"] = setting("close", "switches of pretrained keys: left alone a third never closes")
    switch: float = setting(0.0, "C, activations that close a switch; 0: half of samples x epochs of a task", minimum=0)
    outputs: Literal["announced", "arriving"] = setting("announced", "announced: later classes are negatives too")
    engine: Literal["auto", "torch", "compiled"] = setting(
        "auto", "what runs an epoch; auto: compiled where numba is there, the loss is plain and the task long enough"
    )

    def __post_init__(self) -> None:
        """Check what one field says against another."""
        if self.k > self.neurons:
            raise InputError(f"learner.k must be at most learner.neurons, but is {self.k} of {self.neurons}")


@dataclasses.dataclass(frozen=True)
class Settings(PenaltySettings, NetworkSettings):
    """Settings of SDMLP."""


@dataclasses.dataclass(frozen=True)
class Component:
    """One term of the loss of a batch, with its gradients.

    Attributes:
        name: of the loss.
        loss: unweighted.
        weight: in the sum.
        to_logits: ∂loss/∂logits, ``(B, C)``, or None.
        to_activations: per layer, as `SDMLP.gradients` takes them, or None.
    """

    name: str
    loss: Tensor
    weight: float
    to_logits: Tensor | None = None
    to_activations: list[Tensor | None] | None = None


def name_of(what: str, layer: int) -> str:
    """What a tensor of a hidden layer is called in a state: ``keys``, ``keys_1``, … bottom first."""
    return f"{what}_{layer}" if layer else what


class SDMLPLearner(Learner):
    """The training loop that SSD shares: prepare, activate, cross-entropy, penalty, touched-row step."""

    name: ClassVar[str] = "sdmlp"
    display: str = "SDMLP"
    family = "gradient"
    baseline = True
    removal = "output only"
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
        layers = [Layer(keys.to(self.device), counters.to(self.device))]
        for _ in range(settings.layers - 1):
            keys = initial_rows(r, r, r, generator, self.dtype).to(self.device)
            layers.append(Layer(keys, torch.zeros(r, dtype=self.dtype, device=self.device)))
        self.net = SDMLP(
            layers,
            torch.zeros(r, 0, dtype=self.dtype, device=self.device),
            settings.k,
            self.switch or math.inf,  # set by the first task
            settings.inhibition,
        )
        self.announced = 0
        self.penalty = Penalty(settings, self.device, self.dtype)
        if settings.penalty != "none":
            self.display = f"{self.display}+{DISPLAY[settings.penalty]}"

    def expect(self, classes: int) -> None:
        self.announced = classes if self.settings.outputs == "announced" else 0
        if not self.tasks_learned:
            self.net.grow(self.announced, self.generator(purpose=2))

    def prepared(self, embeddings: Tensor) -> Tensor:
        """The network's inputs ``(N, D)`` on its device."""
        return prepare(embeddings.to(self.device, self.dtype), self.settings.shift)

    # ── learning ─────────────────────────────────────────────────────────────────────────────────────
    def _learn(self, task: Task, progress: Progress) -> dict[str, float]:
        settings, generator, net = self.settings, self.generator(), self.net
        if not self.switch:
            self.switch = max(1.0, min(MAX_SWITCH, 0.5 * len(task.labels) * settings.epochs))
            net.switch = self.switch
        inputs, labels = self.prepared(task.embeddings), task.labels.to(self.device)
        # another purpose than in `expect`: columns drawn later must not repeat the first ones
        net.grow(max(self.announced, int(labels.max()) + 1), self.generator(purpose=5 if net.values.numel() else 2))
        self._begin(inputs, labels)
        self.penalty.begin(self.parameters())
        self.moved = self._moved()
        measured: dict[str, float] = {}
        fast = epochs.start(net, settings, epochs.known_terms(self), inputs, labels)
        for epoch in range(settings.epochs):
            order = torch.randperm(len(labels), generator=generator).to(self.device)
            if epoch in (0, settings.epochs - 1):
                when = "first" if epoch == 0 else "last"
                measured.update(self._norms(*self._batch(order[: settings.batch], inputs, labels)[:2], when))
            if fast is not None and fast.ready():
                totals, counts = fast.run(order)
                self._counted([counts])
            else:
                if fast is not None:
                    fast.drop()
                totals = self._epoch(order, inputs, labels)
            if not all(math.isfinite(value) for value in totals.values()):
                raise InputError(f"{self.display} diverged in epoch {epoch + 1}; lower learner.lr ({settings.lr})")
            if self.penalty.active:
                totals["penalty"] = float(self.penalty.value(self.parameters()))
            measured.update(totals)
            measured["epochs"] = float(epoch + 1)
            if progress((epoch + 1) / settings.epochs):
                break
        self._end(inputs, labels)
        self.penalty.consolidate(self.parameters(), inputs, self.linearise, generator=self.generator(purpose=6))
        return measured

    def _batch(self, index: Tensor, inputs: Tensor, labels: Tensor) -> tuple[list[Component], Pass, Tensor]:
        """The terms of the loss of some samples, the forward pass behind them, and its logits."""
        state = self.net.forward(inputs[index])
        logits = state.top.matmul(self.net.values)
        return self._components(index, inputs[index], labels[index], logits, state), state, logits

    def _epoch(self, order: Tensor, inputs: Tensor, labels: Tensor) -> dict[str, float]:
        """One pass over a task; the means over it of what its steps report."""
        totals: dict[str, float] = {}
        for index in order.split(self.settings.batch):
            components, state, logits = self._batch(index, inputs, labels)
            self.net.count(state)
            self._observe(state)
            values = self._step(components, state, logits, labels[index])
            values.update({part.name: float(part.loss) for part in components})
            for name, value in values.items():
                totals[name] = totals.get(name, 0.0) + value * len(index) / len(labels)
        return totals

    def _step(self, components: list[Component], state: Pass, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """One update; the gradient's norm, whether it was clipped, and the mean number of active neurons."""
        settings, net, penalty = self.settings, self.net, self.penalty
        gradients = self._gradient(components, state)
        likelihood = None
        if penalty.tracks:
            beta = settings.penalty_beta
            likelihood = net.gradients(state, beta * cross_entropy(beta * logits, labels)[1])
        if penalty.active:
            gradients = self._penalised(gradients)
        before = self._rows(gradients.rows) if penalty.tracks else {}
        norm = net.apply(gradients, settings.lr, settings.clip)
        if likelihood is not None:
            self._track(likelihood, gradients.rows, before)
        for mask, rows in zip(self.moved, gradients.rows, strict=True):
            mask[rows] = True
        active = sum(float(part.counts().sum()) for part in state.activations) / len(labels) / len(net.layers)
        return {"gradient_norm": norm, "clipped": float(norm > settings.clip), "active_neurons": active}

    def _gradient(self, components: Sequence[Component], state: Pass) -> Gradients:
        """Gradients of the weighted sum of loss terms."""
        layers = range(len(self.net.layers))
        to_logits = sum(part.weight * part.to_logits for part in components if part.to_logits is not None)
        if not isinstance(to_logits, Tensor):  # a hidden term alone
            to_logits = torch.zeros(state.top.shape[0], self.net.values.shape[1]).to(self.net.values)
        to_activations: list[Tensor | None] = [None for _ in layers]
        for part in components:
            for layer in layers:
                if part.to_activations is not None and (slope := part.to_activations[layer]) is not None:
                    to_activations[layer] = part.weight * slope
        return self.net.gradients(state, to_logits, to_activations)

    def _norms(self, components: list[Component], state: Pass, when: str) -> dict[str, float]:
        """How strongly each weighted loss term pulls at the weights, in this batch."""
        pulls = {part.name: self._gradient([part], state).norm() for part in components}
        if self.penalty.active:
            parts = (self.penalty.gradient(name, parameter) for name, parameter in self.parameters().items())
            pulls["penalty"] = math.sqrt(sum(float(part.square().sum()) for part in parts))
        return {f"{name}_gradient_{when}": value for name, value in pulls.items()}

    def _begin(self, inputs: Tensor, labels: Tensor) -> None:
        """Before the first step of a task."""

    def _observe(self, state: Pass) -> None:
        """At each step of training."""

    def _counted(self, counts: list[Tensor]) -> None:
        """After an epoch whose steps nobody could observe: activations of each neuron in it, per layer ``(r,)``."""

    def _end(self, inputs: Tensor, labels: Tensor) -> None:
        """After the last step of a task."""

    def _terms(self) -> epochs.Terms | None:
        """What `_components` gives, as the compiled epoch takes it; None where that knows no such loss."""
        return epochs.Terms(1.0)

    def _components(self, index: Tensor, x: Tensor, labels: Tensor, logits: Tensor, state: Pass) -> list[Component]:
        """The terms of the loss of a batch; a name occurs once."""
        loss, gradient = cross_entropy(logits, labels)
        return [Component("cross_entropy", loss, 1.0, gradient)]

    def _remove(self, row: int, approximately: bool) -> bool:
        if not approximately:
            return super()._remove(row, approximately)
        blank(self, row)
        return False

    # ── penalties ────────────────────────────────────────────────────────────────────────────────────
    def parameters(self) -> dict[str, Tensor]:
        """What is learned by gradients, by name."""
        keys = {name_of("keys", number): layer.keys for number, layer in enumerate(self.net.layers)}
        return {**keys, "values": self.net.values}

    def _moved(self) -> list[Tensor]:
        """Per layer, the rows that a penalty pulls at: bool ``(r,)``. All others lie on every anchor."""
        moved = [torch.zeros(len(layer.keys), dtype=torch.bool, device=self.device) for layer in self.net.layers]
        if self.penalty.active:
            for layer, mask in enumerate(moved):
                name = name_of("keys", layer)
                mask |= (self.penalty.gradient(name, self.net.layers[layer].keys) != 0).any(1)
            moved[-1] |= (self.penalty.gradient("values", self.net.values) != 0).any(1)
        return moved

    def _penalised(self, gradients: Gradients) -> Gradients:
        """With the penalty's pull on these rows and on all that have moved since an anchor."""
        wider = gradients.widened(self.moved)
        for number, layer in enumerate(self.net.layers):
            wider.keys[number] += self.penalty.gradient(name_of("keys", number), layer.keys, wider.rows[number])
        wider.values += self.penalty.gradient("values", self.net.values, wider.rows[-1])
        return wider

    def _rows(self, rows: list[Tensor]) -> dict[str, Tensor]:
        """Copies of some rows of every parameter."""
        keys = {
            name_of("keys", number): layer.keys[some]
            for number, (layer, some) in enumerate(zip(self.net.layers, rows, strict=True))
        }
        return {**keys, "values": self.net.values[rows[-1]]}

    def _track(self, likelihood: Gradients, rows: list[Tensor], before: dict[str, Tensor]) -> None:
        """Tell SI what the step changed; rows that the likelihood does not reach add nothing to its path."""
        after = self._rows(rows)
        wide = likelihood.widened([_mask(some, layer.keys) for some, layer in zip(rows, self.net.layers, strict=True)])
        for number, some in enumerate(rows):
            name = name_of("keys", number)
            self.penalty.track(name, wide.keys[number], after[name] - before[name], some)
        self.penalty.track("values", wide.values, after["values"] - before["values"], rows[-1])

    def linearise(self, inputs: Tensor) -> tuple[Tensor, Callable[[Tensor], dict[str, Slot]]]:
        """Logits ``(B, C)`` of prepared inputs, and the map from ∂L/∂logits to per-sample gradients."""
        net = self.net
        state = net.forward(inputs)
        code = state.top.to_dense()

        def pullback(cotangent: Tensor) -> dict[str, Slot]:
            slots = {}
            for number, entries in enumerate(net.entry_gradients(state, cotangent)):
                delta = state.activations[number].spread(entries)
                slots[name_of("keys", number)] = Slot(delta, state.inputs[number])
            slots["values"] = Slot(cotangent, code, transposed=True)
            return slots

        return state.top.matmul(net.values), pullback

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
        schema, r = {}, self.settings.neurons
        for layer in range(self.settings.layers):
            keys, counters = name_of("keys", layer), name_of("counters", layer)
            schema[keys] = TensorSpec((r, r if layer else "D"), self.number, "W1, the addresses")
            schema[counters] = TensorSpec((r,), self.number, "activations so far, for the GABA switch")
        return {
            **schema,
            "values": TensorSpec((r, "C"), self.number, "W2, what each neuron says of each class"),
            "switch": TensorSpec((1,), "float64", "C, fixed by the first task or by pretraining"),
            "announced": TensorSpec((1,), "int64", "classes that the stream has announced"),
            **self._penalty_schema(),
        }

    @property
    def number(self) -> str:
        """Name of the network's number type."""
        return str(self.dtype).removeprefix("torch.")

    def _penalty_schema(self) -> dict[str, TensorSpec]:
        r, layers = self.settings.neurons, range(self.settings.layers)
        shapes = {name_of("keys", layer): (r, r if layer else "D") for layer in layers}
        described = self.penalty.schema({**shapes, "values": (r, "C")}, self.number)
        return {name: TensorSpec(*spec) for name, spec in described.items()}

    def _tensors(self) -> dict[str, Tensor]:
        layers: dict[str, Tensor] = {}
        for number, layer in enumerate(self.net.layers):
            layers[name_of("keys", number)] = layer.keys
            layers[name_of("counters", number)] = layer.counters
        return {
            **layers,
            "values": self.net.values,
            "switch": torch.tensor([self.switch], dtype=torch.float64),
            "announced": torch.tensor([self.announced]),
            **self.penalty.tensors(self.parameters()),
        }

    def _renumber(self, tensors: dict[str, Tensor], rows: Tensor) -> None:
        tensors["announced"] -= (rows < self.announced).sum()

    def _load(self, tensors: dict[str, Tensor]) -> None:
        self.switch, self.announced = float(tensors["switch"][0]), int(tensors["announced"][0])
        net = self.net
        net.layers = [
            Layer(*(tensors[name_of(what, number)].to(self.device) for what in ("keys", "counters")))
            for number in range(self.settings.layers)
        ]
        net.values, net.switch = tensors["values"].to(self.device), self.switch or math.inf
        self.penalty.load({name: tensors[name] for name in self._penalty_schema()})


def _mask(rows: Tensor, keys: Tensor) -> Tensor:
    mask = torch.zeros(len(keys), dtype=torch.bool, device=keys.device)
    mask[rows] = True
    return mask


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
