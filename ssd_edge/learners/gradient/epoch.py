"""Whether a task can be learned by the compiled epoch, and the arrays that it works on.

A sample's Top-K is looked for among its m best neurons at an earlier time and among neurons whose keys have moved
far since; a bound on what all others can have gained proves it complete, or all are evaluated (docs/speed.md).
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ssd_edge.errors import EnvironmentUnfitError, InputError
from ssd_edge.learners.gradient.distillation import HiddenTargets
from ssd_edge.learners.gradient.network import SDMLP
from ssd_edge.learners.gradient.topk import DENSE_ABOVE

Engine = Literal["auto", "torch", "compiled"]

CANDIDATES = 6  # m of a sample is so many times k
FEW = 2e10  # multiplications of all scores of a task below which loading machine code takes longer than it saves
FEW_UNKEPT = 1e12  # the same where it has to be compiled in every process
OPEN = 1 / 8  # share of neurons with an open switch above which nothing is sparse
LANES_SHARE = 1 / 4  # of r, at most, for always-evaluated keys: they are held twice
LANES_LEAST = 256
EVALUATE = 3.0  # cost of one neuron's score in a full evaluation; 1: of one in a lane
HOPELESS = 0.5  # share of samples that could not be proved from which an epoch is better taken by plain PyTorch


@dataclasses.dataclass(frozen=True)
class Terms:
    """The loss of a task, as the compiled epoch can compute it.

    Attributes:
        cross_entropy: its weight.
        logits: the teacher's logits ``(N, C)``, or None: nothing is distilled.
        logit_weight: of their divergence.
        outputs: which of them, int64, or None: all.
        hidden: the teacher's table activations, or None.
        hidden_weight: of their divergence.
        slots: the table column of each neuron, int64 ``(r,)``, or -1.
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
        """Of the losses that are reported."""
        distilled = ("logit_distillation",) if self.logits is not None else ()
        return ("cross_entropy", *distilled, *(("hidden_distillation",) if self.hidden is not None else ()))


def kernels(engine: Engine) -> ModuleType | None:
    """`kernels`, or None where Numba is missing.

    Raises:
        EnvironmentUnfitError: it is missing, and the setting insists.
    """
    try:
        return importlib.import_module("ssd_edge.learners.gradient.kernels")
    except ImportError as error:
        if engine == "compiled":
            raise EnvironmentUnfitError(
                f"learner.engine=compiled needs the package numba, which cannot be loaded here ({error}); "
                "pip install 'ssd-edge[fast]', or set learner.engine=auto"
            ) from None
        return None


def known_terms(learner: Any) -> Terms | None:
    """The loss of an `SDMLPLearner`'s task; None where a penalty or a subclass adds what a compiled epoch cannot know.

    A subclass that changes a step's part without saying so in `_terms` (or `_counted`) is run by PyTorch.
    """
    if learner.penalty.active or learner.penalty.tracks:
        return None

    def depth(method: str) -> int:
        return next(depth for depth, base in enumerate(type(learner).__mro__) if method in vars(base))

    steps = (("_components", "_terms"), ("_step", "_terms"), ("_gradient", "_terms"), ("_observe", "_counted"))
    if any(depth(changed) < depth(known) for changed, known in steps):
        return None
    return learner._terms()


def unfit(net: SDMLP, settings: Any, terms: Terms | None) -> str:
    """Why a task cannot be learned by the compiled epoch; empty where it can."""
    r = len(net.keys)
    if net.keys.device.type != "cpu":
        return f"the learner is on {net.keys.device.type}"
    if len(net.layers) > 1:
        return f"learner.layers is {len(net.layers)}, not 1"
    if settings.k + 1 > DENSE_ABOVE * r:
        return f"learner.k = {settings.k} of {r} neurons is not sparse (at most an eighth)"
    if terms is None:
        return "its loss is none that the compiled epoch knows (a penalty, or another distillation than the paper's)"
    return ""


def start(net: SDMLP, settings: Any, terms: Terms | None, inputs: Tensor, labels: Tensor) -> LazyEpochs | None:
    """The compiled epochs of a task, or None: plain PyTorch.

    Args:
        net: the network; changed in place by each epoch.
        settings: the learner's.
        terms: of the loss, or None where they are not known.
        inputs: prepared, ``(N, D)``.
        labels: int64 ``(N,)``.

    Raises:
        InputError: learner.engine=compiled, but this task cannot be learned so.
        EnvironmentUnfitError: learner.engine=compiled without Numba.
    """
    if settings.engine == "torch":
        return None
    reason = unfit(net, settings, terms)
    if settings.engine == "compiled" and reason:
        raise InputError(f"learner.engine is compiled, but {reason}; set learner.engine=auto")
    work = math.inf if settings.engine == "compiled" else net.keys.numel() * len(labels) * settings.epochs
    compiled = None if reason or work < FEW else kernels(settings.engine)
    if compiled is None or (work < FEW_UNKEPT and not compiled.KEPT):
        return None
    return LazyEpochs(compiled, net, settings, terms, inputs, labels)


class LazyEpochs:
    """Epochs over one task.

    Args:
        compiled: `kernels`.
        net: changed in place.
        settings: the learner's.
        terms: of the loss.
        inputs: prepared, ``(N, D)``.
        labels: int64 ``(N,)``.

    Attributes:
        full: evaluations of all neurons that single samples needed in the last epoch.
        evaluated: neurons that were evaluated for every sample at the end of it.
        anchored: how often the caches of all samples were made.
    """

    def __init__(
        self, compiled: ModuleType, net: SDMLP, settings: Any, terms: Terms, inputs: Tensor, labels: Tensor
    ) -> None:
        self.compiled, self.net, self.settings, self.terms = compiled, net, settings, terms
        self.inputs, self.x, self.labels = inputs, inputs.contiguous().numpy(), labels.contiguous().numpy()
        (self.neurons, self.dim), self.samples = net.keys.shape, len(inputs)
        self.rank = net.k + (net.inhibition != "mask")
        self.cached = min(CANDIDATES * net.k, self.neurons - 1)
        self.density = max(float((inputs[:512] != 0).float().mean()), 1 / self.dim)
        self.loss = _targets(terms, self.x, self.neurons)
        self.full = self.anchored = self.pause = self.wait = 0
        self.state: tuple[np.ndarray, ...] | None = None

    def ready(self) -> bool:
        """Whether the next epoch can be compiled: few open switches, and caches that are worth it."""
        if self.wait:
            self.wait -= 1
            return False
        return len(self._opened()) <= OPEN * self.neurons

    def drop(self) -> None:
        """Forget the caches: the keys were changed by someone else."""
        self.state = None

    @property
    def evaluated(self) -> int:
        """Neurons that are evaluated for every sample."""
        return 0 if self.state is None else int(self.lanes[3][0])

    def run(self, order: Tensor) -> tuple[dict[str, float], Tensor]:
        """One epoch.

        Args:
            order: of the samples, int64 ``(N,)``.

        Returns:
            The means that a step reports, by name; activations of each neuron, int64 ``(r,)``.
        """
        net, settings, terms, compiled = self.net, self.settings, self.terms, self.compiled
        layer = net.layers[0]
        layer.keys, layer.counters, net.values = layer.keys.contiguous(), layer.counters, net.values.contiguous()
        if self.state is None:
            self._anchor()
        weights = (terms.cross_entropy, terms.logit_weight, terms.hidden_weight)
        width = 0 if terms.hidden is None else terms.hidden.width
        subtracts = net.inhibition != "mask"
        numbers = (settings.lr, settings.clip, *weights, terms.temperature, net.switch, width)
        totals, activity = np.zeros(compiled.TOTALS), np.zeros(self.neurons, np.int64)
        before = self.state[4].copy()
        compiled.epoch(
            *(self.x, self.labels, order.numpy(), min(settings.batch, self.samples)),
            *(layer.keys.numpy(), net.values.numpy(), layer.counters.numpy()),
            *(self.state, self.lanes, self.loss),
            *(np.array([*numbers, self.rank, subtracts, self.limit], np.float64), totals, activity),
        )
        self.full = int(totals[compiled.MISSES])
        self._plan(self.state[4] - before)
        places = (compiled.CROSS_ENTROPY, compiled.LOGIT, compiled.HIDDEN)
        named = zip(("cross_entropy", "logit_distillation", "hidden_distillation"), places, strict=True)
        told = {"gradient_norm": compiled.NORM, "clipped": compiled.CLIPPED, "active_neurons": compiled.ACTIVE}
        told.update({name: place for name, place in named if name in terms.names})
        return {name: float(totals[place]) for name, place in told.items()}, torch.from_numpy(activity)

    # ── caches ───────────────────────────────────────────────────────────────────────────────────────
    def _opened(self) -> np.ndarray:
        """Neurons whose switch is open."""
        net = self.net
        if net.inhibition != "gaba":
            return np.zeros(0, np.int64)
        return (net.counters < net.switch).nonzero().flatten().numpy()

    def _anchor(self) -> None:
        """Cache every sample's best neurons, by scores of a batch at a time."""
        net, count = self.net, self.samples
        opened, number = self._opened(), self.x.dtype
        lane, most = np.full(self.neurons, -1, np.int32), max(LANES_LEAST, int(LANES_SHARE * self.neurons))
        listed = np.zeros(max(min(most, self.neurons), len(opened)), np.int32)
        lane[opened], listed[: len(opened)] = np.arange(len(opened)), opened
        side = self.compiled.LANES
        blocks = _aligned((-(-len(listed) // side), self.dim, side), number)
        keys = net.keys.numpy()
        for at, neuron in enumerate(opened):
            blocks[at // side, :, at % side] = keys[neuron]
        best, scores = np.empty((count, self.cached), np.int32), np.empty((count, self.cached), number)
        bound, slack = np.empty(count, number), np.empty(count, number)
        closed, portion = torch.from_numpy(opened), min(self.settings.batch, count)
        held = torch.empty(portion, self.neurons, dtype=self.inputs.dtype)
        for begin in range(0, count, portion):
            part = slice(begin, begin + portion)
            samples = self.inputs[part]
            all_scores = torch.mm(samples, net.keys.T, out=held[: len(samples)])
            all_scores[:, closed] = -torch.inf  # always evaluated
            top, index = all_scores.topk(self.cached + 1, dim=1)
            best[part], scores[part] = index[:, :-1], top[:, :-1]
            bound[part], slack[part] = top[:, -1], top[:, self.rank - 1] - top[:, -1]
        best[~np.isfinite(scores)] = -1
        self.state = (best, scores, bound, slack, np.zeros(self.neurons))
        self.lanes = (lane, listed, blocks, np.array([len(opened), len(opened)]))
        self.anchored += 1
        self.limit = max(float(np.quantile(slack, 0.02)), 0.0)
        self.excess, self.lanes_at_first = 0.0, None

    def _plan(self, moved: np.ndarray) -> None:
        """After an epoch: how far a key may move before it gets a lane; whether to begin anew.

        Costs are counted, never timed, so that the same run takes the same path on every machine.

        Args:
            moved: how far each key has moved in the epoch, ``(r,)``.
        """
        # infinite where all neurons are cached or in lanes; no score of unit vectors changes by more than 2
        lane, path, slack = self.lanes[0], self.state[4], np.sort(np.minimum(self.state[3], 2.0))
        count = self.evaluated
        if self.full > HOPELESS * self.samples and self.anchored > 1:
            # began anew, and in vain: each time twice as long until the next try
            self.pause = self.wait = max(1, 2 * self.pause)
            self.state = None
            return
        expected = np.sort((path + moved)[lane < 0])
        full = EVALUATE * self.neurons / self.density
        tried = np.unique(np.quantile(slack, np.linspace(0, 0.3, 61)).clip(0))
        lanes = len(expected) - np.searchsorted(expected, tried, side="right")
        misses = np.searchsorted(slack, tried) / self.samples
        self.limit = float(tried[np.argmin(lanes + full * misses)])
        # rent or buy: what caches cost more than new ones would, summed up, against the cost of new ones
        if self.lanes_at_first is None:
            self.lanes_at_first = count
        self.excess += full * self.full + self.samples * max(0, count - self.lanes_at_first)
        if self.excess > full * self.samples:
            self.state = None


def _aligned(shape: tuple[int, ...], number: np.dtype) -> np.ndarray:
    """Zeros that begin where a line of cache does: else every wide load would touch two."""
    size = int(np.prod(shape)) * number.itemsize
    raw = np.zeros(size + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + size].view(number).reshape(shape)


def _targets(terms: Terms, x: np.ndarray, neurons: int) -> tuple[np.ndarray, ...]:
    """The teacher's answers as the kernel takes them: probabilities and negative entropies."""
    samples, number = len(x), x.dtype
    table, width = np.full(neurons, -1, np.int32), 0
    none, zeros = np.zeros((samples, 0)), np.zeros(samples)
    outputs, wanted, entropy = np.zeros(0, np.int64), none.astype(number), zeros.astype(number)
    slots, hidden, rest, hidden_entropy = np.zeros((samples, 0), np.int64), none, zeros, zeros
    if terms.logits is not None:
        outputs = torch.arange(terms.logits.shape[1]) if terms.outputs is None else terms.outputs
        log_p = (terms.logits[:, outputs] / terms.temperature).log_softmax(1)
        wanted, entropy = log_p.exp().numpy(), (log_p.exp() * log_p).sum(1).numpy()
        outputs = outputs.numpy()
    if terms.hidden is not None:
        answers, width = terms.hidden, terms.hidden.width
        inside = answers.slots < width
        answered = (answers.activations.double() / terms.temperature).masked_fill(~inside, 0)
        others = width - inside.sum(1)
        # all columns that are not active are equal: exp(0), so many times
        shift = torch.cat([answered.masked_fill(~inside, -torch.inf), others.to(answered.dtype).log()[:, None]], 1)
        log_rest = -shift.logsumexp(1)
        log_p = answered + log_rest[:, None]
        p, rest = log_p.exp().masked_fill(~inside, 0), log_rest.exp()
        hidden_entropy = ((p * log_p).sum(1) + others * rest * log_rest).numpy()
        slots, hidden, rest, table = answers.slots.numpy(), p.numpy(), rest.numpy(), terms.slots.numpy()
    return outputs, wanted, entropy, table.astype(np.int32), slots, hidden, rest, hidden_entropy
