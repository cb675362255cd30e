"""SDMLP: a network of hidden layers whose keys compete.

Bricken et al., "Sparse Distributed Memory is a Continual Learner", 2023; docs/method.md has the details of its code.

x = ReLU(z − s)/‖·‖ → scores W1 x → Top-K inhibition → logits W2ᵀ a. There are no biases; all weights are non-negative
and keys have unit length. With more than one hidden layer (SDMLP and SSD are published with one) each further layer
takes the activations below it, scaled to unit length, as its x.

The gradient of the loss reaches only the rows of neurons that were active in the batch, so a step computes, clips,
updates and constrains only those. For plain SGD this is exact: every other row has a zero gradient and already obeys
the constraints.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ssd_edge.config import setting
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.learners.base import LARGEST_COUNT, TensorSpec
from ssd_edge.learners.gradient.penalties import Slot
from ssd_edge.learners.gradient.topk import Activations, gaba, inhibit

ANNOUNCED = TensorSpec((1,), "int64", "number of classes that the stream has announced", least=0, most=LARGEST_COUNT)

Inhibition = Literal["gaba", "subtract", "mask"]
Engine = Literal["auto", "torch", "compiled"]
EPOCHS = 40
FEW_STEPS = 300  # chosen on held-out training images (docs/method.md, benchmarks/few.py)


@dataclasses.dataclass(frozen=True)
class NetworkSettings:
    """Settings of the network and its training. Published: lr=0.05, epochs=2000 (500 for CIFAR-100 and MNIST)."""

    neurons: int = setting(1000, "r, the number of keys of a hidden layer", minimum=2, maximum=1_000_000)
    layers: int = setting(1, "hidden layers; the papers have one", minimum=1, maximum=8)
    k: int = setting(10, "neurons that stay active", minimum=1)
    shift: float = setting(0.0, "s of the input step ReLU(z - s); the keys belong to one s (docs/method.md)")
    epochs: int = setting(
        EPOCHS, "passes over a task; with this lr a fifth of the published schedule", minimum=1, maximum=1_000_000
    )
    min_steps: int = setting(
        0, f"repeat few images until a task has so many steps; 0: {FEW_STEPS} with {EPOCHS} epochs, none with others",
        minimum=0, maximum=1_000_000_000,
    )  # fmt: skip
    memory_rows: int = setting(
        0, "neurons that a task after the first may change, by TF-IDF of their activations; 0: all", minimum=0
    )
    lr: float = setting(0.5, "plain SGD; 0.05 as published needs the published 2,000 epochs", above=0.0)
    batch: int = setting(128, "samples per step, as published", minimum=1)
    clip: float = setting(1.0, "largest norm of the gradient, as published", above=0.0)
    pretrained: bool = setting(True, "start from the backbone's keys if it has keys of this size")
    inhibition: Literal["gaba", "subtract", "mask"] = setting(
        "gaba", "gaba: subtraction behind the switch; subtract: closed from the start; mask: the k largest pass"
    )
    gaba: Literal["close", "keep"] = setting("close", "switches of pretrained keys; if kept, a third never closes")
    switch: float = setting(0.0, "C, activations that close a switch; 0: half of samples x epochs of a task", minimum=0)
    outputs: Literal["announced", "arriving"] = setting("announced", "announced: later classes are negatives too")
    engine: Literal["auto", "torch", "compiled"] = setting(
        "auto", "runs an epoch; auto: compiled if numba is installed, the loss is plain and the task is long enough"
    )

    def __post_init__(self) -> None:
        """Check fields against each other.

        Raises:
            InputError: k is larger than the number of neurons.
        """
        if self.k > self.neurons:
            raise InputError(f"learner.k must be at most learner.neurons, but is {self.k} of {self.neurons}")

    def epochs_of(self, samples: int) -> int:
        """Return the number of passes over a task: `epochs`, or more if it has too few samples for `min_steps`."""
        least = self.min_steps or (FEW_STEPS if self.epochs == EPOCHS else 0)
        return max(self.epochs, -(-least // -(-samples // self.batch)))


def layer_name(tensor: str, layer: int) -> str:
    """Return the name of a hidden layer's tensor: ``keys``, ``keys_1``, … from the bottom up."""
    return f"{tensor}_{layer}" if layer else tensor


def prepare(embeddings: Tensor, shift: float | None) -> Tensor:
    """Apply the input step of the network: ReLU(z − s), then the L2 norm per row. A zero row stays zero.

    Args:
        embeddings: standardised, ``(N, D)``.
        shift: s; None keeps the sign and only scales rows to unit length.
    """
    if shift is None:
        return unit_rows(embeddings)
    x = (embeddings - shift).clamp_min_(0)  # in place: a task may be large
    return x.div_(x.norm(dim=1, keepdim=True).clamp_min(1e-12))


def respond(cosines: Tensor, gain: float) -> Tensor:
    """Return exp(γ cos), the response of each neuron without inhibition, ``(N, r)``.

    The exponential of the cosine is the limit of addressing in a sparse distributed memory with many hard locations
    around each key (Bricken & Pehlevan 2021), and it is smooth.

    Args:
        cosines: cosines of inputs and keys, ``(N, r)``.
        gain: γ.
    """
    return (gain * cosines).exp()


def initial_rows(rows: int, columns: int, fan_in: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Draw uniformly from ±1/√fan_in (the default of a linear layer) and clamp at zero: about half are 0."""
    bound = 1.0 / math.sqrt(fan_in)
    drawn = torch.rand(rows, columns, generator=generator, dtype=torch.float64) * 2 - 1
    return (drawn * bound).clamp_min(0).to(dtype)


def unit_rows(matrix: Tensor) -> Tensor:
    """Divide rows by their L2 norm. A zero row (a dead key) stays zero."""
    unit: Tensor = matrix / matrix.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return unit


def check_announced(state: dict[str, Tensor], outputs: int) -> None:
    """Check that a network has the outputs that were announced to it: the next task adds those that are missing.

    Raises:
        BundleRefusedError: it has fewer.
    """
    announced = int(state["announced"][0])
    if announced > outputs:
        raise BundleRefusedError(
            f"{announced} classes were announced, but there are outputs for {outputs}; restore the file"
        )


@dataclasses.dataclass
class Layer:
    """One hidden layer.

    Attributes:
        keys: ``(r, inputs)``, non-negative unit rows.
        counters: ``(r,)``, number of times that each neuron was active in training.
    """

    keys: Tensor
    counters: Tensor


@dataclasses.dataclass(frozen=True)
class Pass:
    """State of a forward pass, kept for the backward pass; one entry per hidden layer, bottom first.

    Attributes:
        inputs: ``(B, inputs)`` of each layer, rows of unit length.
        norms: ``(B, 1)``, length of each layer's input before scaling; empty for the first layer.
        activations: activations of each layer.
    """

    inputs: list[Tensor]
    norms: list[Tensor]
    activations: list[Activations]

    @property
    def top(self) -> Activations:
        """Activations of the top layer, which the logits are computed from."""
        return self.activations[-1]


@dataclasses.dataclass
class Gradients:
    """Gradients of the rows that a batch reaches.

    Attributes:
        rows: per layer, int64 ``(R,)``, the neurons.
        keys: per layer, ``(R, inputs)``.
        values: ``(R, C)`` for the rows of the top layer.
    """

    rows: list[Tensor]
    keys: list[Tensor]
    values: Tensor

    def norm(self) -> float:
        """Return the global L2 norm."""
        return math.sqrt(sum(float(part.norm()) ** 2 for part in (*self.keys, self.values)))

    def without(self, masks: Sequence[Tensor]) -> Gradients:
        """Return the gradients without some rows.

        Args:
            masks: per layer, bool ``(r,)``, the rows to leave out.
        """
        kept = [~mask[rows] for mask, rows in zip(masks, self.rows, strict=True)]
        rows = [part[chosen] for part, chosen in zip(self.rows, kept, strict=True)]
        return Gradients(
            rows, [part[chosen] for part, chosen in zip(self.keys, kept, strict=True)], self.values[kept[-1]]
        )

    def widened(self, masks: Sequence[Tensor]) -> Gradients:
        """Return the same gradients with zeros for further rows.

        Args:
            masks: per layer, bool ``(r,)``, the rows to add.
        """
        rows: list[Tensor] = []
        keys: list[Tensor] = []
        values = self.values
        for layer, (present, mask) in enumerate(zip(self.rows, masks, strict=True)):
            union = mask.clone()
            union[present] = True
            all_rows = union.nonzero().flatten()
            place = torch.searchsorted(all_rows, present)
            rows.append(all_rows)
            keys.append(_placed(self.keys[layer], place, len(all_rows)))
            if layer == len(self.rows) - 1:
                values = _placed(self.values, place, len(all_rows))
        return Gradients(rows, keys, values)


def _step(parameter: Tensor, rows: Tensor, gradient: Tensor, rate: float, unit: Tensor | None = None) -> None:
    """Take a step in place: update of some rows, clamp at zero, and unit length of those in `unit`, bool ``(R,)``."""
    everything = len(rows) == len(parameter)  # rows are distinct
    part = parameter if everything else parameter[rows]
    part.sub_(gradient, alpha=rate).clamp_min_(0)
    if unit is not None:
        # a row without a gradient stays as it is to the last bit
        length = part.norm(dim=1).clamp_min(1e-12)
        part.div_(length.where(unit, torch.ones_like(length)).unsqueeze(1))
    if not everything:
        parameter[rows] = part


def _placed(part: Tensor, place: Tensor, rows: int) -> Tensor:
    """Return zeros ``(rows, …)`` with `part` in the rows `place`."""
    result = part.new_zeros(rows, part.shape[1])
    result[place] = part
    return result


class SDMLP:
    """The network and its touched-row update. Plain tensors: gradients are in closed form.

    Attributes:
        layers: hidden layers, bottom first.
        values: W2, ``(r, C)``, non-negative.
        k: number of neurons that stay active in each layer.
        switch: C of the GABA switch.
        inhibition: ``gaba`` (subtraction behind a switch), ``subtract`` (switch closed from the start), or ``mask``.
        frozen: per layer, neurons that no step changes, bool ``(r,)``; None: every neuron may change.
    """

    def __init__(
        self, layers: Sequence[Layer], values: Tensor, k: int, switch: float, inhibition: Inhibition = "gaba"
    ) -> None:
        # counters change in place, so they are copied; the operations on keys and values create new tensors
        self.layers = [Layer(unit_rows(layer.keys.clamp_min(0)), layer.counters.clone()) for layer in layers]
        self.values = values.clamp_min(0)
        self.k = k
        self.switch = switch
        self.inhibition = inhibition
        self.frozen: list[Tensor] | None = None

    @property
    def keys(self) -> Tensor:
        """W1 of the top layer, ``(r, inputs)``."""
        return self.layers[-1].keys

    @property
    def counters(self) -> Tensor:
        """Counters of the top layer, ``(r,)``."""
        return self.layers[-1].counters

    @property
    def gammas(self) -> list[Tensor | None]:
        """γ per neuron of each layer, or None where every switch is closed."""
        if self.inhibition != "gaba":
            return [None] * len(self.layers)
        closed = [bool((layer.counters >= self.switch).all()) for layer in self.layers]
        return [
            None if shut else gaba(layer.counters, self.switch) for shut, layer in zip(closed, self.layers, strict=True)
        ]

    @property
    def gamma(self) -> Tensor | None:
        """γ of the top layer."""
        return self.gammas[-1]

    def parameters(self) -> dict[str, Tensor]:
        """Return the tensors that gradients change, by name."""
        keys = {layer_name("keys", number): layer.keys for number, layer in enumerate(self.layers)}
        return {**keys, "values": self.values}

    def copy(self) -> SDMLP:
        """Return an independent copy, equal bit for bit."""
        twin = SDMLP(self.layers, self.values, self.k, self.switch, self.inhibition)
        # assigned again because normalising unit rows once more would change their last bits
        twin.layers = [Layer(layer.keys.clone(), layer.counters.clone()) for layer in self.layers]
        twin.values = self.values.clone()
        return twin

    def grow(self, classes: int, generator: torch.Generator) -> None:
        """Add value columns until there are `classes`, drawn as at initialisation."""
        missing = classes - self.values.shape[1]
        if missing > 0:
            rows = self.values.shape[0]
            new = initial_rows(rows, missing, rows, generator, self.values.dtype).to(self.values.device)
            self.values = torch.cat([self.values, new], dim=1)

    # ── forward ──────────────────────────────────────────────────────────────────────────────────────
    def forward(self, x: Tensor, gammas: Sequence[Tensor | None] | None = None) -> Pass:
        """Compute the activations of all layers.

        Args:
            x: prepared inputs, ``(N, D)``.
            gammas: as the property; pass it to compute it once for several batches.
        """
        gammas = self.gammas if gammas is None else gammas
        inputs, norms = [x], [x.new_zeros(0)]
        activations: list[Activations] = []
        for number, (layer, gamma) in enumerate(zip(self.layers, gammas, strict=True)):
            if number:
                below = activations[-1]
                norm = below.norms().clamp_min(1e-12)
                scores = below.entries_matmul(None, layer.keys.T) / norm
                inputs.append(below.to_dense() / norm)
                norms.append(norm)
            else:
                scores = x @ layer.keys.T
            activations.append(inhibit(scores, self.k, gamma, self.inhibition == "mask"))
        return Pass(inputs, norms, activations)

    def activate(self, x: Tensor, gammas: Sequence[Tensor | None] | None = None) -> Activations:
        """Return the activations of the top layer for prepared inputs ``(N, D)``."""
        return self.forward(x, gammas).top

    def logits(self, x: Tensor, batch: int = 2048) -> Tensor:
        """Return the logits ``(N, C)`` of prepared inputs ``(N, D)``, in batches; counters do not change."""
        gammas = self.gammas
        parts = [self.activate(part, gammas).matmul(self.values) for part in torch.split(x, batch)]
        return torch.cat(parts) if parts else x.new_zeros(0, self.values.shape[1])

    # ── backward ─────────────────────────────────────────────────────────────────────────────────────
    def entry_gradients(
        self, state: Pass, to_logits: Tensor, to_activations: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        """Compute ∂L/∂z of every layer, one number per entry of its activations.

        Args:
            state: state of the forward pass.
            to_logits: ∂L/∂logits, ``(B, C)``.
            to_activations: per layer, ∂L/∂a of loss terms on the activations themselves, one number per entry, or None.
        """
        gradients: list[Tensor] = []
        for number in reversed(range(len(self.layers))):
            activations = state.activations[number]
            if number == len(self.layers) - 1:
                hidden = activations.entry_products(to_logits, self.values)
            else:
                to_input = state.activations[number + 1].entries_matmul(gradients[-1], self.layers[number + 1].keys)
                unit, norm = state.inputs[number + 1], state.norms[number + 1]
                hidden = activations.gather((to_input - unit * (to_input * unit).sum(1, keepdim=True)) / norm)
            direct = None if to_activations is None else to_activations[number]
            if direct is not None:
                hidden = hidden + direct
            gradients.append(activations.passed(hidden))
        return gradients[::-1]

    def gradients(
        self, state: Pass, to_logits: Tensor, to_activations: Sequence[Tensor | None] | None = None
    ) -> Gradients:
        """Compute the gradients of the touched rows.

        Args:
            state: state of the forward pass.
            to_logits: as in `entry_gradients`.
            to_activations: as in `entry_gradients`.
        """
        hidden = self.entry_gradients(state, to_logits, to_activations)
        rows: list[Tensor] = []
        keys: list[Tensor] = []
        values = to_logits
        for number, activations in enumerate(state.activations):
            touched, position = activations.touched()
            rows.append(touched)
            keys.append(activations.transposed_matmul(hidden[number], state.inputs[number], position, len(touched)))
            if number == len(self.layers) - 1:
                values = activations.transposed_matmul(None, to_logits, position, len(touched))
        return Gradients(rows, keys, values)

    def apply(self, gradients: Gradients, lr: float, clip: float) -> float:
        """Take one SGD step: global clipping, update, clamp at zero, unit keys.

        Args:
            gradients: gradients of the rows to change; all other rows stay unchanged.
            lr: learning rate.
            clip: largest global norm.

        Returns:
            The norm before clipping.
        """
        if self.frozen is not None:
            gradients = gradients.without(self.frozen)
        lengths = [part.norm(dim=1) for part in gradients.keys]
        norm = math.sqrt(sum(float(part.norm()) ** 2 for part in (*lengths, gradients.values)))
        rate = lr * min(1.0, clip / (norm + 1e-6))
        for layer, rows, gradient, length in zip(self.layers, gradients.rows, gradients.keys, lengths, strict=True):
            _step(layer.keys, rows, gradient, rate, length > 0)
        _step(self.values, gradients.rows[-1], gradients.values, rate)
        return norm

    def count(self, state: Pass) -> None:
        """Advance the GABA counters. Called in training only, whereas SDMLP's code also counts in evaluation."""
        for layer, activations in zip(self.layers, state.activations, strict=True):
            layer.counters += activations.counts().to(layer.counters.dtype)

    def linearise(self, inputs: Tensor) -> tuple[Tensor, Callable[[Tensor], dict[str, Slot]]]:
        """Return the logits ``(B, C)`` of prepared inputs, and the map from ∂L/∂logits to per-sample gradients."""
        state = self.forward(inputs)
        code = state.top.to_dense()

        def pullback(cotangent: Tensor) -> dict[str, Slot]:
            slots: dict[str, Slot] = {}
            for number, entries in enumerate(self.entry_gradients(state, cotangent)):
                delta = state.activations[number].spread(entries)
                slots[layer_name("keys", number)] = Slot(delta, state.inputs[number])
            slots["values"] = Slot(cotangent, code, transposed=True)
            return slots

        return state.top.matmul(self.values), pullback
