"""Speed of learning on this machine: SSD by dense autograd, by touched rows in PyTorch, and compiled, side by side.

All start from the same state, see the same batches and the same cached teacher targets, and minimise the same loss.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_edge import files
from ssd_edge.errors import InputError
from ssd_edge.learners.base import Task
from ssd_edge.learners.gradient import epoch
from ssd_edge.learners.gradient.network import Engine
from ssd_edge.learners.gradient.penalties import DISPLAY
from ssd_edge.learners.gradient.ssd import SSD, DistillationLoss, Settings
from ssd_edge.learners.gradient.trainer import Trainer
from ssd_edge.learners.priors import Priors
from ssd_edge.run.storage import environment
from ssd_edge.system import PROCESS, reset_peak, resident

DIM, CLASSES, BATCH, CLUSTERS = 256, 10, 128, 6
FIRST_EPOCHS = 10  # on the task before the measured one
SWITCH, NEARLY_CLOSED = 200_000.0, 0.05  # C, and the share of it by which open switches miss it at most
FEW_EPOCHS = 2  # of variants that are only timed
FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "asimd", "sve", "bf16", "i8mm")


@dataclasses.dataclass(frozen=True)
class Case:
    """A network that is compared with dense autograd.

    Attributes:
        neurons: r.
        penalty: penalty of the measured task, as ``learner.penalty``.
        open_switches: most GABA switches are still a little open, as with pretrained keys and ``learner.gaba=keep``.
    """

    neurons: int
    penalty: Literal["none", "ewc", "si"] = "none"
    open_switches: bool = False

    @property
    def name(self) -> str:
        """Name in the report's ratios, e.g. ``r1000_ewc``."""
        penalty = "" if self.penalty == "none" else f"_{self.penalty}"
        return f"r{self.neurons}{penalty}{'_open' * self.open_switches}"

    def __str__(self) -> str:
        penalty = "" if self.penalty == "none" else f", {DISPLAY[self.penalty]}"
        return f"{self.neurons:,} neurons{penalty}{', open switches' * self.open_switches}"


SMALL_CASES = (Case(1000), Case(1000, "ewc"), Case(1000, "si"), Case(1000, open_switches=True))


@dataclasses.dataclass(frozen=True)
class Size:
    """Amount of work to measure.

    Attributes:
        cases: networks that are compared with dense autograd.
        samples: samples of a task.
        epochs: epochs over it.
        curve: network sizes of which only the compiled epoch is timed, against the scores alone.
        curve_epochs: epochs over the task for these.
    """

    cases: tuple[Case, ...] = (*SMALL_CASES, Case(10_000))
    samples: int = 2560
    epochs: int = 20
    curve: tuple[int, ...] = ()
    curve_epochs: int = 100


FULL = Size(
    cases=(*SMALL_CASES, *(dataclasses.replace(case, neurons=10_000) for case in SMALL_CASES)),
    samples=10_000,
    epochs=40,
    curve=(1000, 3000, 10_000, 30_000, 100_000),
)


@dataclasses.dataclass(frozen=True)
class Spread:
    """Seconds of the epochs of one variant."""

    median: float
    least: float
    most: float
    sum: float


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Comparison of the compiled epochs with the other variants of one network.

    Attributes:
        ratio: seconds of the whole task by dense autograd over those compiled, one thread each.
        ratio_all_threads: the same with all threads.
        scores_ratio: median compiled epoch of the second half over the scores alone.
        first_epoch: seconds of the first compiled epoch, in which the caches are filled.
        second_half: median seconds of an epoch of the second half.
        equal_predictions: share of test samples for which dense autograd and the compiled epochs predict the same.
        active: mean number of active neurons of a sample in the last epoch.
        evaluated: number of neurons that are evaluated for every sample at the end.
        anchored: how often the caches were filled.
    """

    ratio: float
    ratio_all_threads: float
    scores_ratio: float
    first_epoch: float
    second_half: float
    equal_predictions: float
    active: float
    evaluated: int
    anchored: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Measurements of one network.

    Attributes:
        case: the network.
        samples: samples of the task.
        epochs: epochs over it.
        seconds: by variant, with one thread.
        seconds_all_threads: by variant, with all threads.
        threads: number of all threads.
        touched_ratio: median epoch by dense autograd over that by touched rows.
        accuracy: test accuracy at the end, by variant.
        compiled: comparison of the compiled epochs; None without Numba.
    """

    case: Case
    samples: int
    epochs: int
    seconds: dict[str, Spread]
    seconds_all_threads: dict[str, Spread]
    threads: int
    touched_ratio: float
    accuracy: dict[str, float]
    compiled: Compiled | None

    def ratios(self) -> dict[str, float | None]:
        """Return the ratios by their names in the report."""
        compiled, name = self.compiled, self.case.name
        return {
            f"cpu_{name}": None if compiled is None else compiled.ratio,
            f"cpu_{name}_all_threads": None if compiled is None else compiled.ratio_all_threads,
            f"cpu_{name}_without_numba": self.touched_ratio,
            f"scores_{name}": None if compiled is None else compiled.scores_ratio,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON."""
        row = dataclasses.asdict(self)
        compiled, case = row.pop("compiled"), row.pop("case")
        return {**case, **row, **(compiled or {"ratio": None, "ratio_all_threads": None, "scores_ratio": None})}


@dataclasses.dataclass(frozen=True)
class Point:
    """The compiled epoch at one network size, in seconds with one thread.

    Attributes:
        neurons: r.
        first_epoch: the first epoch, in which the caches are filled.
        second_half: median epoch of the second half.
        scores: the scores of an epoch alone.
        evaluated: number of neurons that are evaluated for every sample at the end.
    """

    neurons: int
    first_epoch: float
    second_half: float
    scores: float
    evaluated: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of learning one task, in MiB.

    Attributes:
        on_top: peak beyond what was resident before.
        peak: peak of the process.
        model: keys and values.
        inputs: embeddings of the task.
        batch_scores: scores of one batch.
        all_scores: scores of the whole task, which are never held.
    """

    on_top: float
    peak: float
    model: float
    inputs: float
    batch_scores: float
    all_scores: float


@dataclasses.dataclass(frozen=True)
class Report:
    """All that `bench` measures.

    Attributes:
        rows: one comparison per case.
        curve: one point per network size of the curve.
        memory: memory of learning a task; None if not measured.
        loading_seconds: seconds to load the compiled epoch; None without Numba.
        features: features of the processor that matter for the speed.
        environment: machine and versions, as of `environment`.
    """

    rows: list[Comparison]
    curve: list[Point]
    memory: Memory | None
    loading_seconds: float | None
    features: list[str]
    environment: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as ``ssd-edge bench --json`` prints it."""
        return {
            "ratios": {name: value for row in self.rows for name, value in row.ratios().items()},
            "rows": [row.to_dict() for row in self.rows],
            "curve": [dataclasses.asdict(point) for point in self.curve],
            "memory_mib": None if self.memory is None else dataclasses.asdict(self.memory),
            "loading_seconds": self.loading_seconds,
            "features": self.features,
            **self.environment,
        }


def clustered(samples: int, rows: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw embeddings of two classes, similar to those of a backbone.

    A class is a mixture of six Gaussians. Their means have variance ½ in every dimension, and so has the noise around
    them. Neighbours stay neighbours, so training converges and few neurons respond to a class.

    Args:
        samples: N.
        rows: rows of the classes.
        seed: seed of the samples; the means of a class depend on its row alone.

    Returns:
        Embeddings ``(N, 256)`` of unit variance, and their rows.
    """
    draw = torch.Generator().manual_seed(1000 + seed)
    labels = torch.tensor(rows)[torch.randint(2, (samples,), generator=draw)]
    means = torch.stack(
        [torch.randn(CLUSTERS, DIM, generator=torch.Generator().manual_seed(row)) for row in range(max(rows) + 1)]
    )
    cluster = torch.randint(CLUSTERS, (samples,), generator=draw)
    noise = torch.randn(samples, DIM, generator=draw)
    return (means[labels, cluster] + noise) / 2**0.5, labels


def dense_epoch(learner: SSD, trainer: Trainer, keys: Tensor, values: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Run one epoch as usual PyTorch code does: every neuron in forward, backward, clip, step, clamp and norm.

    GABA counters and the path integrals of SI are updated in the learner.

    Args:
        learner: an ``ssd``.
        trainer: its training of a task that distils.
        keys: ``(r, D)``.
        values: ``(r, C)``.
        order: order of the samples, ``(N,)``.

    Returns:
        Keys and values after the epoch.

    Raises:
        InputError: the task does not distil.
    """
    if not isinstance(trainer.loss, DistillationLoss):
        raise InputError("the first task does not distil; train a task before it")
    settings, targets, table = learner.settings, trainer.loss.targets, learner.tables[0].indices
    net, penalty = learner.net, learner.penalty
    parameters = {"keys": keys.clone().requires_grad_(True), "values": values.clone().requires_grad_(True)}
    keys, values = parameters.values()
    optimiser = torch.optim.SGD([keys, values], settings.lr)
    alpha, lam, temperature = settings.ce_weight, settings.hidden_weight, settings.temperature

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        log_q, p = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
        return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")

    for index in torch.split(order, settings.batch):
        u, labels = F.relu(trainer.inputs[index] @ keys.T), trainer.labels[index]
        inhibition, gamma = u.topk(settings.k + 1, dim=1).values[:, -1:].detach(), net.gamma
        a = F.relu(u - (inhibition if gamma is None else gamma * inhibition))
        logits = a @ values
        hidden = divergence(a[:, table], targets.hidden[0].table(index))
        logit = divergence(logits, targets.logits[index])
        cross_entropy = F.cross_entropy(logits, labels)
        loss = alpha * cross_entropy + (1 - alpha) * (lam * hidden + (1 - lam) * logit)
        if penalty.active:
            for name, theta in parameters.items():  # without its constant
                pulled = penalty.importance[name] * theta - 2 * penalty.anchored[name]
                loss = loss + penalty.weight * (theta * pulled).sum()
        likelihood: Sequence[Tensor] = ()
        if penalty.tracks:
            scaled = F.cross_entropy(settings.penalty_beta * logits, labels)
            likelihood = torch.autograd.grad(scaled, [keys, values], retain_graph=True)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # PyTorch does not annotate it
        torch.nn.utils.clip_grad_norm_([keys, values], settings.clip)
        before = [theta.detach().clone() for theta in (keys, values)] if penalty.tracks else []
        optimiser.step()
        with torch.no_grad():
            net.layers[0].counters += (a > 0).sum(0)
            values.clamp_(min=0)
            keys.clamp_(min=0)
            keys.div_(keys.norm(dim=1, keepdim=True).clamp_min(1e-12))
            for name, gradient, old in zip(parameters, likelihood, before, strict=False):
                penalty.track(name, gradient, parameters[name] - old)
    return keys.detach(), values.detach()


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A learner in the middle of a task.

    Attributes:
        learner: the learner.
        trainer: its training of the task.
    """

    learner: SSD
    trainer: Trainer


Run = Iterator[Contestant]  # runs an epoch per step


class Race:
    """One task, learned in several ways from the same state.

    Args:
        case: the network.
        first: the task before the measured one.
        second: the measured task.
        epochs: epochs over it.
    """

    def __init__(self, case: Case, first: Task, second: Task, epochs: int) -> None:
        self.case, self.epochs, self.second = case, epochs, second
        before = self._learner(FIRST_EPOCHS, "auto")
        if case.open_switches:
            draw = torch.Generator().manual_seed(2)
            before.net.layers[0].counters += SWITCH * (1 - NEARLY_CLOSED * torch.rand(case.neurons, generator=draw))
        before.learn(first)
        self.state = before.state_dict()
        self.start = self._contestant("torch")
        draw = torch.Generator().manual_seed(1)
        self.orders = [torch.randperm(len(second.labels), generator=draw) for _ in range(epochs)]

    def _learner(self, epochs: int, engine: Engine) -> SSD:
        return new_learner(self.case, epochs, engine)

    def _contestant(self, engine: Engine) -> Contestant:
        """Return a learner in the common state, with the teacher's targets computed."""
        learner = self._learner(self.epochs, engine)
        learner.load_state_dict(self.state)
        return Contestant(learner, learner.trainer(self.second))

    # What comes before the first epoch is not part of a run's time, so each method prepares its contestant at once and
    # returns a generator of the epochs.
    def dense(self) -> Run:
        """Return a run by dense autograd."""
        contestant = self._contestant("torch")

        def epochs() -> Run:
            net = contestant.learner.net
            for order in self.orders:
                net.layers[0].keys, net.values = dense_epoch(
                    contestant.learner, contestant.trainer, net.keys, net.values, order
                )
                yield contestant

        return epochs()

    def touched(self) -> Run:
        """Return a run by touched rows in PyTorch."""
        return self._run("torch")

    def compiled(self) -> Run:
        """Return a run of compiled epochs; the first one fills the caches."""
        return self._run("compiled")

    def _run(self, engine: Engine) -> Run:
        contestant = self._contestant(engine)

        def epochs() -> Run:
            for order in self.orders:
                contestant.trainer.epoch(order)
                yield contestant

        return epochs()

    def scores(self) -> Run:
        """Compute only the float32 scores of an epoch's batches, seemingly the least that an exact Top-K needs."""
        net, inputs = self.start.learner.net, self.start.trainer.inputs
        for order in self.orders:
            for index in torch.split(order, BATCH):
                inputs[index] @ net.keys.T
            yield self.start


def new_learner(case: Case, epochs: int, engine: Engine) -> SSD:
    """Return a new ``ssd`` for `CLASSES` announced classes."""
    settings = Settings(
        neurons=case.neurons,
        inhibition="gaba" if case.open_switches else "subtract",
        switch=SWITCH if case.open_switches else 0.0,
        penalty=case.penalty,
        batch=BATCH,
        top_n="1000" if case.neurons > 1000 else "1.0k",
        epochs=epochs,
        engine=engine,
    )
    learner = SSD(DIM, settings, Priors())
    learner.expect(CLASSES)
    return learner


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch use this number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed(runs: Mapping[str, Run], epochs: int) -> tuple[dict[str, list[float]], dict[str, Contestant]]:
    """Time every epoch of several runs, which take turns epoch by epoch.

    Returns:
        Seconds per epoch, and the contestant at the end, by name of the run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    ends: dict[str, Contestant] = {}
    for _ in range(epochs):
        for name, run in runs.items():
            began = time.perf_counter()
            ends[name] = next(run)
            seconds[name].append(time.perf_counter() - began)
    return seconds, ends


def compare(race: Race, test: Task) -> Comparison:
    """Measure seconds, ratios and predictions of one network."""
    epochs, few = race.epochs, min(FEW_EPOCHS, race.epochs)
    native = epoch.kernels("auto") is not None
    with threads(1):
        seconds, _ = timed({"touched": race.touched(), "scores": race.scores()}, few)
        whole = {"dense": race.dense(), **({"compiled": race.compiled()} if native else {})}
        more, ends = timed(whole, epochs)
    seconds.update(more)
    cores = torch.get_num_threads()
    with threads(cores):
        all_cores, _ = timed({"dense": race.dense(), "touched": race.touched()}, few)
        if native:
            all_cores.update(timed({"compiled": race.compiled()}, epochs)[0])
    predictions = {name: end.learner.predict(test.embeddings) for name, end in ends.items()}
    compiled = None
    engine = ends["compiled"].trainer.compiled if native else None
    if engine is not None:
        late = statistics.median(seconds["compiled"][epochs // 2 :])
        compiled = Compiled(
            ratio=sum(seconds["dense"]) / sum(seconds["compiled"]),
            ratio_all_threads=statistics.median(all_cores["dense"]) * epochs / sum(all_cores["compiled"]),
            scores_ratio=late / statistics.median(seconds["scores"]),
            first_epoch=seconds["compiled"][0],
            second_half=late,
            equal_predictions=float((predictions["dense"] == predictions["compiled"]).double().mean()),
            active=float(ends["compiled"].learner.net.activate(engine.inputs[:1000]).per_sample().double().mean()),
            evaluated=engine.evaluated,
            anchored=engine.fills,
        )
    return Comparison(
        case=race.case,
        samples=len(race.second.labels),
        epochs=epochs,
        seconds={name: _spread(times) for name, times in seconds.items()},
        seconds_all_threads={name: _spread(times) for name, times in all_cores.items()},
        threads=cores,
        touched_ratio=statistics.median(seconds["dense"]) / statistics.median(seconds["touched"]),
        accuracy={name: float((rows == test.labels).double().mean()) for name, rows in predictions.items()},
        compiled=compiled,
    )


def _spread(times: list[float]) -> Spread:
    return Spread(median=statistics.median(times), least=min(times), most=max(times), sum=sum(times))


def growth(neurons: int, first: Task, second: Task, epochs: int) -> Point:
    """Measure the compiled epoch alone at one network size, with one thread."""
    with threads(1):
        race = Race(Case(neurons), first, second, epochs)
        scores, _ = timed({"scores": race.scores()}, 2)
        seconds, ends = timed({"compiled": race.compiled()}, epochs)
    times, engine = seconds["compiled"], ends["compiled"].trainer.compiled
    return Point(
        neurons=neurons,
        first_epoch=times[0],
        second_half=statistics.median(times[epochs // 2 :]),
        scores=min(scores["scores"]),
        evaluated=0 if engine is None else engine.evaluated,
    )


def warm_up() -> float | None:
    """Load the compiled epoch, or compile it if no machine code is cached; return the seconds, None without Numba."""
    began = time.perf_counter()
    if epoch.kernels("auto") is None:
        return None
    settings = Settings(neurons=64, k=3, epochs=1, inhibition="subtract", engine="compiled")
    SSD(DIM, settings, Priors()).learn(Task(*clustered(9, (0, 1))))
    return time.perf_counter() - began


def memory(neurons: int, samples: int) -> Memory | None:
    """Measure the memory of learning a task, in a process of its own; None if the system does not report peaks."""
    if not files.exists(PROCESS / "clear_refs"):
        return None
    code = f"from ssd_edge.run import bench; bench.print_memory({neurons}, {samples})"
    # freed memory is returned at once; otherwise the peak depends on what the allocator happens to keep
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=variables)
    return Memory(**json.loads(run.stdout)) if run.returncode == 0 else None


def print_memory(neurons: int, samples: int) -> None:
    """Learn a task and print the fields of `Memory` as JSON; `memory` calls it in a new process."""
    torch.set_num_threads(1)
    learner = new_learner(Case(neurons), 5, "compiled")
    for rows in ((0, 1), (2, 3)):  # loads and compiles everything
        learner.learn(Task(*clustered(BATCH, rows)))
    task = Task(*clustered(samples, (4, 5)))
    reset_peak()
    before = resident("VmRSS")
    learner.learn(task)
    net, mib = learner.net, 2**20
    measured = Memory(
        on_top=(resident("VmHWM") - before) / mib,
        peak=resident("VmHWM") / mib,
        model=4 * (net.keys.numel() + net.values.numel()) / mib,
        inputs=4 * task.embeddings.numel() / mib,
        batch_scores=4 * BATCH * neurons / mib,
        all_scores=4 * samples * neurons / mib,
    )
    print(json.dumps(dataclasses.asdict(measured)))


def synthetic(samples: int) -> tuple[Task, Task, Task]:
    """Return two tasks of `clustered` embeddings, and 4,000 other samples of both for testing."""
    parts = [clustered(2000, rows, seed=1) for rows in ((0, 1), (2, 3))]
    test = Task(*(torch.cat(part) for part in zip(*parts, strict=True)))
    return Task(*clustered(samples, (0, 1))), Task(*clustered(samples, (2, 3))), test


def bench(
    size: Size | None = None,
    log: Callable[[str], None] = lambda text: None,
    tasks: tuple[Task, Task, Task] | None = None,
) -> Report:
    """Run the whole benchmark.

    Args:
        size: amount of work; None: an amount that takes less than a minute.
        log: called with a line per measurement that starts.
        tasks: the task before the measured one, the measured task, and test samples; None: `synthetic`.
    """
    size = size or Size()
    loading = warm_up()
    first, second, test = tasks or synthetic(size.samples)
    rows: list[Comparison] = []
    curve: list[Point] = []
    for case in size.cases:
        log(str(case))
        rows.append(compare(Race(case, first, second, size.epochs), test))
    if loading is not None:
        for neurons in size.curve:
            log(f"the compiled epoch at {neurons:,} neurons")
            curve.append(growth(neurons, first, second, size.curve_epochs))
    held = memory(max(case.neurons for case in size.cases), 10_000) if loading is not None and size.curve else None
    return Report(rows, curve, held, loading, features(), environment())


def features() -> list[str]:
    """Return the processor's features that matter here."""
    try:
        listed = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return []
    return [name for name in FEATURES if name in listed]
