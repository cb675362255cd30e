"""Compiled epochs: the decision whether a task can use them, and the arrays that they work on.

The active neurons of a sample are searched among its m best at an earlier time and among those whose keys have moved
far since. A bound on what all other neurons can have gained proves them complete; without a proof all neurons are
evaluated (docs/speed.md).
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssd_edge.errors import EnvironmentUnfitError, InputError
from ssd_edge.learners.gradient.distillation import HiddenTargets
from ssd_edge.learners.gradient.network import SDMLP, Engine, NetworkSettings
from ssd_edge.learners.gradient.penalties import Penalty
from ssd_edge.system import cache_folder

CANDIDATES = 6  # m is at least this multiple of k
SPARE = 4  # m is at least this multiple of the largest number of active neurons in the first batch
MIN_WORK = 2e10  # multiplications of all scores of a task below which loading machine code takes longer than it saves
MIN_WORK_UNCACHED = 1e12  # the same where the code is compiled in every process
MAX_K = 1 / 8  # of r, largest k + 1
MAX_ACTIVE = 1 / 16  # share of active neurons above which plain PyTorch takes less time
LANES_SHARE = 1 / 4  # of r, largest share of always-evaluated keys, which are stored twice
LANES_LEAST = 256
EVALUATION_COST = 3.0  # cost of one score in a full evaluation relative to one in a lane
MAX_MISSES = 0.5  # share of samples without a proof above which plain PyTorch takes less time


@dataclasses.dataclass(frozen=True)
class CompiledLoss:
    """The loss of a task as the compiled epoch can compute it.

    Attributes:
        cross_entropy: weight of the cross-entropy.
        logits: the teacher's logits ``(N, C)``, or None without distillation.
        logit_weight: weight of the logit distillation.
        outputs: the outputs that are distilled, int64, or None for all.
        hidden: the teacher's activations of table neurons, or None.
        hidden_weight: weight of the hidden distillation.
        slots: the table column of each neuron, int64 ``(r,)``, or -1; required with `hidden`.
        temperature: T of both.
    """

    cross_entropy: float
    logits: Tensor | None = None
    logit_weight: float = 0.0
    outputs: Tensor | None = None
    hidden: HiddenTargets | None = None
    hidden_weight: float = 0.0
    slots: Tensor | None = None
    temperature: float = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the loss terms that are reported."""
        distilled = ("logit_distillation",) if self.logits is not None else ()
        return ("cross_entropy", *distilled, *(("hidden_distillation",) if self.hidden is not None else ()))


class Caches(NamedTuple):
    """The best neurons of every sample, in the order that the kernel takes them.

    Attributes:
        neurons: int32 ``(N, m)`` by excess, descending, padded with -1.
        excess: ``(N, m)``, z − γ·I of each, i.e. how far it was above its threshold; reduced by the distance that the
            key had moved when cached.
        bound: ``(N,)``, largest excess of all other neurons.
        level: ``(N,)``, the inhibition I that `excess` refers to.
        slack: ``(N,)``, distance that keys may move before the bound proves nothing.
        path: float64 ``(r,)``, distance that each key has moved since the caches were filled.
    """

    neurons: NDArray[np.int32]
    excess: NDArray[Any]
    bound: NDArray[Any]
    level: NDArray[Any]
    slack: NDArray[Any]
    path: NDArray[np.float64]


class Lanes(NamedTuple):
    """Neurons that are evaluated for every sample, in the order that the kernel takes them.

    Attributes:
        lane: int32 ``(r,)``, the lane of each neuron, or -1.
        neurons: int32, the neuron of each lane.
        blocks: their keys, transposed, ``(blocks, D, LANES)``.
        counts: int64 ``(1,)``, number of lanes in use.
    """

    lane: NDArray[np.int32]
    neurons: NDArray[np.int32]
    blocks: NDArray[Any]
    counts: NDArray[np.int64]


class PenaltyArrays(NamedTuple):
    """A penalty on keys and values, in the order that the kernel takes it; arrays without rows if there is none.

    Attributes:
        importance: ΣΩ of the keys, ``(r, D)``.
        anchored: ΣΩθ* of the keys, ``(r, D)``.
        value_importance: ΣΩ of the values, ``(r, C)``.
        value_anchored: ΣΩθ* of the values, ``(r, C)``.
        steep: float64 ``(r,)``, largest curvature of the penalty in each row, 2wΩ.
        moved: bool ``(r,)``, rows off their anchors; changed by the kernel, like the next two.
        key_paths: path integrals of SI, ``(r, D)``.
        value_paths: the same for the values, ``(r, C)``.
    """

    importance: NDArray[Any]
    anchored: NDArray[Any]
    value_importance: NDArray[Any]
    value_anchored: NDArray[Any]
    steep: NDArray[np.float64]
    moved: NDArray[np.bool_]
    key_paths: NDArray[Any]
    value_paths: NDArray[Any]


class TeacherArrays(NamedTuple):
    """The teacher's answers, in the order that the kernel takes them; arrays without columns if not distilled.

    Attributes:
        outputs: int64 ``(O,)``, outputs that are distilled.
        probabilities: ``(N, O)``, softened.
        entropy: ``(N,)``, negative entropy of the probabilities.
        table: int32 ``(r,)``, the table column of each neuron, or -1.
        slots: int64 ``(N, t)``, active columns of the table.
        hidden: float64 ``(N, t)``, their probabilities.
        rest: float64 ``(N,)``, probability of each other column.
        hidden_entropy: float64 ``(N,)``, negative entropy over the table.
    """

    outputs: NDArray[np.int64]
    probabilities: NDArray[Any]
    entropy: NDArray[Any]
    table: NDArray[np.int32]
    slots: NDArray[np.int64]
    hidden: NDArray[np.float64]
    rest: NDArray[np.float64]
    hidden_entropy: NDArray[np.float64]


def kernels(engine: Engine) -> ModuleType | None:
    """Import `ssd_edge.learners.gradient.kernels`; return None without Numba.

    Raises:
        EnvironmentUnfitError: Numba is missing and engine is ``compiled``.
    """
    # Numba keeps machine code beside the source; where that is read-only, it would use a folder of its own in the home
    if not os.access(Path(__file__).parent, os.W_OK):
        os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_folder() / "numba"))
    try:
        return importlib.import_module("ssd_edge.learners.gradient.kernels")
    except ImportError as error:
        if engine == "compiled":
            raise EnvironmentUnfitError(
                f"learner.engine=compiled needs the package numba, which cannot be loaded here ({error}); "
                "pip install 'ssd-edge[fast]', or set learner.engine=auto"
            ) from None
        return None


def unfit(net: SDMLP, settings: NetworkSettings, loss: CompiledLoss | None) -> str:
    """Return why a task cannot use the compiled epoch, or "" if it can."""
    r = len(net.keys)
    if net.keys.device.type != "cpu":
        return f"the learner is on {net.keys.device.type}"
    if len(net.layers) > 1:
        return f"learner.layers is {len(net.layers)}, not 1"
    if settings.k + 1 > MAX_K * r:
        return f"learner.k = {settings.k} of {r} neurons is not sparse (at most an eighth)"
    if loss is None:
        return "it does not support this loss (distillation other than the paper's)"
    return ""


def start(
    net: SDMLP,
    settings: NetworkSettings,
    loss: CompiledLoss | None,
    penalty: Penalty,
    moved: Tensor,
    inputs: Tensor,
    labels: Tensor,
) -> CompiledEpochs | None:
    """Return the compiled epochs of a task, or None if it is trained in PyTorch.

    Args:
        net: network; each epoch changes it in place.
        settings: settings of the training.
        loss: loss of the task, or None if the compiled epoch cannot compute it.
        penalty: penalty whose `begin` has been called for this task.
        moved: bool ``(r,)``, rows off their anchors; changed by each epoch.
        inputs: prepared, ``(N, D)``.
        labels: int64 ``(N,)``.

    Raises:
        InputError: learner.engine=compiled, but this task cannot use it.
        EnvironmentUnfitError: learner.engine=compiled without Numba.
    """
    if settings.engine == "torch":
        return None
    reason = unfit(net, settings, loss)
    if settings.engine == "compiled" and reason:
        raise InputError(f"learner.engine is compiled, but {reason}; set learner.engine=auto")
    passes = settings.epochs_of(len(labels))
    work = math.inf if settings.engine == "compiled" else net.keys.numel() * len(labels) * passes
    compiled = None if reason or work < MIN_WORK else kernels(settings.engine)
    if compiled is None or loss is None or (work < MIN_WORK_UNCACHED and not compiled.CACHED):
        return None
    return CompiledEpochs(compiled, net, settings, loss, penalty, moved, inputs, labels)


class CompiledEpochs:
    """Compiled epochs over one task.

    Args:
        compiled: the module `kernels`.
        net: network; changed in place.
        settings: settings of the training.
        loss: loss of the task.
        penalty: penalty of the task.
        moved: bool ``(r,)``, rows off their anchors; changed by each epoch.
        inputs: prepared, ``(N, D)``.
        labels: int64 ``(N,)``.

    Attributes:
        full: number of samples for which all neurons were evaluated in the last epoch.
        fills: how often the caches of all samples were filled.
    """

    def __init__(
        self,
        compiled: ModuleType,
        net: SDMLP,
        settings: NetworkSettings,
        loss: CompiledLoss,
        penalty: Penalty,
        moved: Tensor,
        inputs: Tensor,
        labels: Tensor,
    ) -> None:
        self.compiled, self.net, self.settings, self.loss, self.penalty = compiled, net, settings, loss, penalty
        self.pressed = _penalty_arrays(penalty, moved)
        self.inputs, self.x, self.labels = inputs, inputs.contiguous().numpy(), labels.contiguous().numpy()
        (self.neurons, self.dim), self.samples = net.keys.shape, len(inputs)
        self.rank = net.k + (net.inhibition != "mask")
        self.density = max(float((inputs[:512] != 0).float().mean()), 1 / self.dim)
        self.teacher = _teacher_arrays(loss, self.x, self.neurons)
        self.full = self.fills = self.pause = self.wait = 0
        self.search: tuple[Caches, Lanes] | None = None
        self.lowest = 1.0  # least γ of a neuron without a lane
        self.limit = self.excess = 0.0  # distance at which a key gets a lane; cost above that of fresh caches
        self.first_lanes: int | None = None  # number of lanes after the first epoch with these caches

    def ready(self) -> bool:
        """Return True if the next epoch can be compiled: few active neurons, and caches that are worth it."""
        if self.wait:
            self.wait -= 1
            return False
        if self.search is not None or self.net.gamma is None:
            return True
        first = self.inputs[: self.settings.batch]
        return float(self.net.activate(first).counts().sum()) <= MAX_ACTIVE * self.neurons * len(first)

    def invalidate(self) -> None:
        """Drop the caches after the keys were changed elsewhere."""
        self.search = None

    @property
    def evaluated(self) -> int:
        """Number of neurons that are evaluated for every sample."""
        return 0 if self.search is None else int(self.search[1].counts[0])

    def run(self, order: Tensor) -> dict[str, float]:
        """Run one epoch.

        Args:
            order: order of the samples, int64 ``(N,)``.

        Returns:
            Means over the epoch, by name, as of `Trainer.epoch`.
        """
        net, settings, loss, compiled = self.net, self.settings, self.loss, self.compiled
        layer = net.layers[0]
        layer.keys, net.values = layer.keys.contiguous(), net.values.contiguous()
        caches, lanes = self.search or self._fill()
        weights = (loss.cross_entropy, loss.logit_weight, loss.hidden_weight)
        width = 0 if loss.hidden is None else loss.hidden.width
        subtracts = net.inhibition != "mask"
        switch = net.switch if net.inhibition == "gaba" else 0.0
        numbers = (settings.lr, settings.clip, *weights, loss.temperature, switch, width)
        pressure = 2 * self.penalty.weight if self.penalty.active else 0.0
        beta = self.penalty.settings.penalty_beta if self.penalty.tracks else 0.0
        totals = np.zeros(compiled.TOTALS)
        before = caches.path.copy()
        frozen = np.zeros(self.neurons, np.bool_) if net.frozen is None else net.frozen[0].numpy()
        compiled.epoch(
            *(self.x, self.labels, order.numpy(), min(settings.batch, self.samples)),
            *(layer.keys.numpy(), net.values.numpy(), layer.counters.numpy(), frozen),
            *(tuple(caches), tuple(lanes), tuple(self.teacher), tuple(self.pressed)),
            np.array([*numbers, self.rank, subtracts, self.limit, self.lowest, pressure, beta], np.float64),
            totals,
        )
        self.full = int(totals[compiled.MISSES])
        # neurons with an open switch that were evaluated without being active
        idle = max(0.0, totals[compiled.EVALUATED] - totals[compiled.ACTIVE] * self.samples)
        self._plan(caches, lanes, caches.path - before, idle)
        places = (compiled.CROSS_ENTROPY, compiled.LOGIT, compiled.HIDDEN)
        named = zip(("cross_entropy", "logit_distillation", "hidden_distillation"), places, strict=True)
        reported = {"gradient_norm": compiled.NORM, "clipped": compiled.CLIPPED, "active_neurons": compiled.ACTIVE}
        reported.update({name: place for name, place in named if name in loss.names})
        return {name: float(totals[place]) for name, place in reported.items()}

    # ── caches ───────────────────────────────────────────────────────────────────────────────────────
    def _fill(self) -> tuple[Caches, Lanes]:
        """Cache the best neurons of every sample, from the scores of one batch at a time."""
        net, count = self.net, self.samples
        dtype, most = self.x.dtype, max(LANES_LEAST, int(LANES_SHARE * self.neurons))
        gamma = net.gamma
        gammas = torch.ones_like(net.counters) if gamma is None else gamma
        excited = (gammas <= 0).nonzero().flatten()  # active whatever the inhibition
        lane = np.full(self.neurons, -1, np.int32)
        listed = np.zeros(max(min(most, self.neurons), len(excited)), np.int32)
        lane[excited.numpy()], listed[: len(excited)] = np.arange(len(excited)), excited.numpy()
        side = self.compiled.LANES
        blocks = _aligned((-(-len(listed) // side), self.dim, side), dtype)
        keys = net.keys.numpy()
        for at, neuron in enumerate(excited.numpy()):
            blocks[at // side, :, at % side] = keys[neuron]
        self.lowest = float(gammas[gammas > 0].min()) if len(excited) < self.neurons else 1.0
        portion, cached = min(self.settings.batch, count), CANDIDATES * net.k
        if gamma is not None:
            cached = max(cached, int(SPARE * float(net.activate(self.inputs[:portion]).per_sample().max())))
        cached = min(cached, self.neurons - 1)
        best, excess = np.empty((count, cached), np.int32), np.empty((count, cached), dtype)
        bound, level = np.empty(count, dtype), np.empty(count, dtype)
        buffer = torch.empty(portion, self.neurons, dtype=self.inputs.dtype)
        for begin in range(0, count, portion):
            part = slice(begin, begin + portion)
            samples = self.inputs[part]
            scores = torch.mm(samples, net.keys.T, out=buffer[: len(samples)])
            if gamma is not None:
                inhibition = scores.topk(self.rank, dim=1).values[:, -1:].clamp_min(0)
                scores -= gamma * inhibition
                scores[:, excited] = -torch.inf  # always evaluated
                top, index = scores.topk(cached + 1, dim=1)
            else:
                top, index = scores.topk(cached + 1, dim=1)
                inhibition = top[:, self.rank - 1 : self.rank].clamp_min(0)
                top = top - inhibition
            best[part], excess[part] = index[:, :-1], top[:, :-1]
            bound[part], level[part] = top[:, -1], inhibition[:, 0]
        best[~np.isfinite(excess)] = -1
        caches = Caches(best, excess, bound, level, -bound, np.zeros(self.neurons))
        self.search = (caches, Lanes(lane, listed, blocks, np.array([len(excited)])))
        self.fills += 1
        self.limit = max(float(np.quantile(caches.slack, 0.02)), 0.0)
        self.excess, self.first_lanes = 0.0, None
        return self.search

    def _plan(self, caches: Caches, lanes: Lanes, moved: NDArray[np.float64], idle: float) -> None:
        """Decide after an epoch how far a key may move before it gets a lane, and whether to fill the caches anew.

        Costs are counted, never timed, so that a run takes the same path on every machine.

        Args:
            caches: caches of the epoch.
            lanes: lanes of the epoch.
            moved: distance that each key has moved in the epoch, ``(r,)``.
            idle: scores that were computed because a switch had been more open when the caches were filled.
        """
        # infinite if all neurons are cached or in lanes; no score of unit vectors changes by more than 2
        slack = np.sort(np.minimum(caches.slack, 2.0))
        count = self.evaluated
        if self.full > MAX_MISSES * self.samples and self.fills > 1:
            # filling the caches anew did not help: wait twice as long before the next try
            self.pause = self.wait = max(1, 2 * self.pause)
            self.search = None
            return
        expected = np.sort((caches.path + moved)[lanes.lane < 0])
        full = EVALUATION_COST * self.neurons / self.density
        tried = np.unique(np.quantile(slack, np.linspace(0, 0.3, 61)).clip(0))
        new_lanes = len(expected) - np.searchsorted(expected, tried, side="right")
        misses = np.searchsorted(slack, tried) / self.samples
        self.limit = float(tried[np.argmin(new_lanes + full * misses)])
        # rent or buy: fill anew once the accumulated extra cost of these caches exceeds the cost of filling
        if self.first_lanes is None:
            self.first_lanes = count
        self.excess += full * self.full + self.samples * max(0, count - self.first_lanes) + EVALUATION_COST * idle
        if self.excess > full * self.samples:
            self.search = None


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return zeros aligned to a cache line; otherwise every wide load would touch two lines."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + size].view(dtype).reshape(shape)


def _penalty_arrays(penalty: Penalty, moved: Tensor) -> PenaltyArrays:
    """Return the arrays of a penalty, which share memory with it."""
    none, steep = torch.zeros(0, 0, dtype=penalty.dtype), torch.zeros(0, dtype=torch.float64)
    if penalty.active:
        largest = [penalty.importance[name].amax(1) for name in ("keys", "values")]
        steep = (2 * penalty.weight * torch.maximum(*largest)).double()

    def taken(part: Mapping[str, Tensor], name: str, exists: bool) -> NDArray[Any]:
        return (part[name] if exists else none).numpy()

    return PenaltyArrays(
        importance=taken(penalty.importance, "keys", penalty.active),
        anchored=taken(penalty.anchored, "keys", penalty.active),
        value_importance=taken(penalty.importance, "values", penalty.active),
        value_anchored=taken(penalty.anchored, "values", penalty.active),
        steep=steep.numpy(),
        moved=moved.numpy(),
        key_paths=taken(penalty.path, "keys", penalty.tracks),
        value_paths=taken(penalty.path, "values", penalty.tracks),
    )


def _teacher_arrays(loss: CompiledLoss, x: NDArray[Any], neurons: int) -> TeacherArrays:
    """Compute the arrays of the teacher for the inputs x ``(N, D)``."""
    samples, dtype = len(x), x.dtype
    empty, zeros = np.zeros((samples, 0)), np.zeros(samples)
    arrays = TeacherArrays(
        outputs=np.zeros(0, np.int64),
        probabilities=empty.astype(dtype),
        entropy=zeros.astype(dtype),
        table=np.full(neurons, -1, np.int32),
        slots=np.zeros((samples, 0), np.int64),
        hidden=empty,
        rest=zeros,
        hidden_entropy=zeros,
    )
    if loss.logits is not None:
        outputs = torch.arange(loss.logits.shape[1]) if loss.outputs is None else loss.outputs
        log_p = (loss.logits[:, outputs] / loss.temperature).log_softmax(1)
        arrays = arrays._replace(
            outputs=outputs.numpy(),
            probabilities=log_p.exp().numpy(),
            entropy=(log_p.exp() * log_p).sum(1).numpy(),
        )
    if loss.hidden is not None and loss.slots is not None:
        targets, width = loss.hidden, loss.hidden.width
        inside = targets.slots < width
        scaled = (targets.activations.double() / loss.temperature).masked_fill(~inside, 0)
        others = width - inside.sum(1)
        # all inactive columns are equal, exp(0), so one term with their number stands for them
        terms = [scaled.masked_fill(~inside, -torch.inf), others.to(scaled.dtype).log()[:, None]]
        log_rest = -torch.cat(terms, 1).logsumexp(1)
        log_p = scaled + log_rest[:, None]
        p, rest = log_p.exp().masked_fill(~inside, 0), log_rest.exp()
        arrays = arrays._replace(
            table=loss.slots.numpy().astype(np.int32),
            slots=targets.slots.numpy(),
            hidden=p.numpy(),
            rest=rest.numpy(),
            hidden_entropy=((p * log_p).sum(1) + others * rest * log_rest).numpy(),
        )
    return arrays
