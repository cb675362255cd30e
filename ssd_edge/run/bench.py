"""How long learning takes here: SSD by dense autograd, by touched rows in PyTorch, and compiled, side by side.

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_edge import learners
from ssd_edge.learners.gradient import epoch
from ssd_edge.learners.priors import Priors
from ssd_edge.run.storage import environment
from ssd_edge.system import PROCESS, reset_peak, resident

DIM, CLASSES, BATCH, CLUSTERS = 256, 10, 128, 6
FIRST_EPOCHS = 10  # of the task before the measured one
FEW_EPOCHS = 2  # of what is only timed
FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "asimd", "sve", "bf16", "i8mm")
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        neurons: sizes of the network that are compared with dense autograd.
        samples: of the task.
        epochs: over it.
        curve: sizes of which only the compiled epoch is timed, against the scores alone.
        curve_epochs: over the task, in those.
    """

    neurons: tuple[int, ...] = (1000, 10_000)
    samples: int = 2560
    epochs: int = 20
    curve: tuple[int, ...] = ()
    curve_epochs: int = 100


FULL = Size(samples=10_000, epochs=40, curve=(1000, 3000, 10_000, 30_000, 100_000))


def clustered(samples: int, rows: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings of two classes as a backbone might give them: ``(N, 256)`` of unit variance, and their rows.

    A class is a mixture of six Gaussians. Their means have variance ½ in every dimension, the noise around them has ½:
    neighbours stay neighbours, so training converges, and a few neurons come to answer a class.

    Args:
        samples: N.
        rows: of the classes.
        seed: of the samples; a class's means depend on its row alone.
    """
    draw = torch.Generator().manual_seed(1000 + seed)
    labels = torch.tensor(rows)[torch.randint(2, (samples,), generator=draw)]
    means = torch.stack(
        [torch.randn(CLUSTERS, DIM, generator=torch.Generator().manual_seed(row)) for row in range(max(rows) + 1)]
    )
    cluster = torch.randint(CLUSTERS, (samples,), generator=draw)
    noise = torch.randn(samples, DIM, generator=draw)
    return (means[labels, cluster] + noise) / 2**0.5, labels


def dense_epoch(
    learner: Any, keys: Tensor, values: Tensor, inputs: Tensor, labels: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    """What the usual PyTorch code does: every neuron through forward, backward, clip, step, clamp and norm.

    Args:
        learner: an ``ssd`` whose task has begun; gives settings, table and teacher targets.
        keys: ``(r, D)``.
        values: ``(r, C)``.
        inputs: prepared, ``(N, D)``.
        labels: ``(N,)``.
        order: of the samples, ``(N,)``.

    Returns:
        Keys and values after the epoch.
    """
    settings, targets, table = learner.settings, learner.targets, learner.tables[0].indices
    keys, values = keys.clone().requires_grad_(True), values.clone().requires_grad_(True)
    optimiser = torch.optim.SGD([keys, values], settings.lr)
    alpha, lam, temperature = settings.ce_weight, settings.hidden_weight, settings.temperature

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        log_q, p = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
        return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")

    for index in order.split(settings.batch):
        u = F.relu(inputs[index] @ keys.T)
        inhibition = u.topk(settings.k + 1, dim=1).values[:, -1:].detach()
        a = F.relu(u - inhibition)
        logits = a @ values
        hidden = divergence(a[:, table], targets.hidden[0].table(index))
        logit = divergence(logits, targets.logits[index])
        loss = alpha * F.cross_entropy(logits, labels[index]) + (1 - alpha) * (lam * hidden + (1 - lam) * logit)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([keys, values], settings.clip)
        optimiser.step()
        with torch.no_grad():
            values.clamp_(min=0)
            keys.clamp_(min=0)
            keys.div_(keys.norm(dim=1, keepdim=True).clamp_min(1e-12))
    return keys.detach(), values.detach()


class Race:
    """One task, learned in several ways from the same state.

    Args:
        neurons: r.
        first: the task before it.
        second: the task.
        epochs: over it.
    """

    def __init__(self, neurons: int, first: learners.Task, second: learners.Task, epochs: int) -> None:
        self.options = {"name": "ssd", "neurons": neurons, "inhibition": "subtract", "batch": BATCH}
        self.options["top_n"] = "1000" if neurons > 1000 else "1.0k"
        before = self._learner(FIRST_EPOCHS, "auto")
        before.learn(first)
        self.state, self.epochs = before.state_dict(), epochs
        self.learner = self._ready("torch", second)
        self.inputs, self.labels = self.learner.prepared(second.embeddings), second.labels
        self.second, draw = second, torch.Generator().manual_seed(1)
        self.orders = [torch.randperm(len(self.labels), generator=draw) for _ in range(epochs)]

    def _learner(self, epochs: int, engine: str) -> Any:
        learner = learners.build({**self.options, "epochs": epochs, "engine": engine}, DIM, Priors())
        learner.expect(CLASSES)
        return learner

    def _ready(self, engine: str, task: learners.Task) -> Any:
        """A learner in the common state, with the teacher's targets in hand."""
        learner = self._learner(self.epochs, engine)
        learner.load_state_dict(self.state)
        learner._begin(learner.prepared(task.embeddings), task.labels)
        learner.moved = learner._moved()
        return learner

    def dense(self) -> Iterator[Any]:
        """An epoch by dense autograd at each step; yields the learner. What comes before an epoch is done at once."""
        twin = self._ready("torch", self.second)

        def go() -> Iterator[Any]:
            for order in self.orders:
                twin.net.layers[0].keys, twin.net.values = dense_epoch(
                    twin, twin.net.keys, twin.net.values, self.inputs, self.labels, order
                )
                yield twin

        return go()

    def touched(self) -> Iterator[Any]:
        """An epoch by touched rows in PyTorch at each step."""
        twin = self._ready("torch", self.second)

        def go() -> Iterator[Any]:
            for order in self.orders:
                twin._epoch(order, self.inputs, self.labels)
                yield twin

        return go()

    def compiled(self) -> Iterator[Any]:
        """A compiled epoch at each step, as `SDMLPLearner._learn` runs it; the first has the making of the caches."""
        twin = self._ready("compiled", self.second)

        def go() -> Iterator[Any]:
            twin.lazy = epoch.start(twin.net, twin.settings, epoch.known_terms(twin), self.inputs, self.labels)
            for order in self.orders:
                if twin.lazy.ready():
                    twin.lazy.run(order)
                else:
                    twin.lazy.drop()
                    twin._epoch(order, self.inputs, self.labels)
                yield twin

        return go()

    def scores(self) -> Iterator[Any]:
        """Nothing but the float32 scores of an epoch's batches, all that an exact Top-K seems to need."""
        net = self.learner.net
        for order in self.orders:
            for index in order.split(BATCH):
                self.inputs[index] @ net.keys.T
            yield self.learner


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed(runs: dict[str, Iterator[Any]], epochs: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every epoch of each run, and the learner each ends with; they take turns, epoch by epoch."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    ends = {}
    for _ in range(epochs):
        for name, run in runs.items():
            began = time.perf_counter()
            ends[name] = next(run)
            seconds[name].append(time.perf_counter() - began)
    return seconds, ends


def compare(race: Race, test: learners.Task) -> dict[str, Any]:
    """One network size: seconds, ratios, and what both ends answer.

    Returns:
        ``ratio`` is the whole task by dense autograd over the whole task compiled, one thread each; ``scores_ratio``
        the median compiled epoch of the second half over the scores alone; both None without Numba.
    """
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
    row: dict[str, Any] = {
        "neurons": race.options["neurons"],
        "samples": len(race.labels),
        "epochs": epochs,
        "seconds": {name: _spread(times) for name, times in seconds.items()},
        "seconds_all_threads": {name: _spread(times) for name, times in all_cores.items()},
        "threads": cores,
        "touched_ratio": statistics.median(seconds["dense"]) / statistics.median(seconds["touched"]),
    }
    answers = {name: learner.predict(test.embeddings) for name, learner in ends.items()}
    row["accuracy"] = {name: float((rows == test.labels).double().mean()) for name, rows in answers.items()}
    if not native:
        return {**row, "ratio": None, "ratio_all_threads": None, "scores_ratio": None}
    late = statistics.median(seconds["compiled"][epochs // 2 :])
    lazy = ends["compiled"].lazy
    return {
        **row,
        "ratio": sum(seconds["dense"]) / sum(seconds["compiled"]),
        "ratio_all_threads": statistics.median(all_cores["dense"]) * epochs / sum(all_cores["compiled"]),
        "scores_ratio": late / statistics.median(seconds["scores"]),
        "first_epoch": seconds["compiled"][0],
        "second_half": late,
        "equal_predictions": float((answers["dense"] == answers["compiled"]).double().mean()),
        "evaluated": lazy.evaluated,
        "anchored": lazy.anchored,
    }


def _spread(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "least": min(times), "most": max(times), "sum": sum(times)}


def growth(neurons: int, first: learners.Task, second: learners.Task, epochs: int) -> dict[str, Any]:
    """The compiled epoch alone at one network size, one thread: first epoch, median of the second half, scores."""
    with threads(1):
        race = Race(neurons, first, second, epochs)
        scores, _ = timed({"scores": race.scores()}, 2)
        seconds, ends = timed({"compiled": race.compiled()}, epochs)
    times = seconds["compiled"]
    return {
        "neurons": neurons,
        "first_epoch": times[0],
        "second_half": statistics.median(times[epochs // 2 :]),
        "scores": min(scores["scores"]),
        "evaluated": ends["compiled"].lazy.evaluated,
    }


def warm_up() -> float | None:
    """Load the compiled epoch, or compile it where no machine code is kept yet; seconds, or None without Numba."""
    began = time.perf_counter()
    if epoch.kernels("auto") is None:
        return None
    options = {"name": "ssd", "neurons": 64, "k": 3, "epochs": 1, "inhibition": "subtract", "engine": "compiled"}
    learner = learners.build(options, DIM, Priors())
    learner.learn(learners.Task(*clustered(9, (0, 1))))
    return time.perf_counter() - began


def memory(neurons: int, samples: int) -> dict[str, float] | None:
    """MiB that learning a task takes beyond the learner and its embeddings, in a process of its own; Linux only."""
    if not (PROCESS / "clear_refs").exists():
        return None
    code = f"from ssd_edge import benching; benching._print_memory({neurons}, {samples})"
    # what is freed goes back at once: else the peak depends on what the allocator happens to keep
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=variables)
    return json.loads(run.stdout) if run.returncode == 0 else None


def _print_memory(neurons: int, samples: int) -> None:
    torch.set_num_threads(1)
    options = {"name": "ssd", "neurons": neurons, "epochs": 5, "inhibition": "subtract", "engine": "compiled"}
    learner: Any = learners.build({**options, "top_n": "1000" if neurons > 1000 else "1.0k"}, DIM, Priors())
    learner.expect(CLASSES)
    for rows in ((0, 1), (2, 3)):  # everything is loaded and compiled then
        learner.learn(learners.Task(*clustered(BATCH, rows)))
    task = learners.Task(*clustered(samples, (4, 5)))
    reset_peak()
    before = resident("VmRSS")
    learner.learn(task)
    net, mib = learner.net, 2**20
    parts = {
        "on_top": resident("VmHWM") - before,
        "peak": resident("VmHWM"),
        "model": 4 * (net.keys.numel() + net.values.numel()),
        "inputs": 4 * task.embeddings.numel(),
        "batch_scores": 4 * BATCH * neurons,
        "all_scores": 4 * samples * neurons,
    }
    print(json.dumps({name: value / mib for name, value in parts.items()}))


def synthetic(samples: int) -> tuple[learners.Task, learners.Task, learners.Task]:
    """Two tasks of `clustered` embeddings, and 4,000 others of both to test with."""
    parts = [clustered(2000, rows, seed=1) for rows in ((0, 1), (2, 3))]
    test = learners.Task(*(torch.cat(part) for part in zip(*parts, strict=True)))
    return learners.Task(*clustered(samples, (0, 1))), learners.Task(*clustered(samples, (2, 3))), test


def bench(
    size: Size | None = None,
    say: Say = lambda text: None,
    tasks: tuple[learners.Task, learners.Task, learners.Task] | None = None,
) -> dict[str, Any]:
    """Everything, as ``ssd-edge bench --json`` prints it.

    Args:
        size: how much; None: what takes less than a minute.
        say: told what is being measured.
        tasks: the one before, the one that is measured, and what to test with; None: `synthetic`.

    Returns:
        ``ratios`` by name (None without Numba), one row a network size, the curve, memory, machine and versions.
    """
    size = size or Size()
    loading = warm_up()
    first, second, test = tasks or synthetic(size.samples)
    rows, curve, ratios = [], [], {}
    for neurons in size.neurons:
        say(f"{neurons:,} neurons")
        row = compare(Race(neurons, first, second, size.epochs), test)
        rows.append(row)
        ratios[f"cpu_r{neurons}"] = row["ratio"]
        ratios[f"cpu_r{neurons}_all_threads"] = row["ratio_all_threads"]
        ratios[f"cpu_r{neurons}_without_numba"] = row["touched_ratio"]
        ratios[f"scores_r{neurons}"] = row["scores_ratio"]
    if loading is not None:
        for neurons in size.curve:
            say(f"the compiled epoch at {neurons:,} neurons")
            curve.append(growth(neurons, first, second, size.curve_epochs))
    return {
        "ratios": ratios,
        "rows": rows,
        "curve": curve,
        "memory_mib": memory(max(size.neurons), 10_000) if loading is not None and size.curve else None,
        "loading_seconds": loading,
        "features": features(),
        **environment(),
    }


def features() -> list[str]:
    """What this processor can do that matters here."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return []
    return [name for name in FEATURES if name in told]
