"""What several benchmarks need: embeddings of data sets and runs, one core, and times on a machine in use."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssd_edge.backbones.embedder import Embedder, open_backbone
from ssd_edge.config import BackboneConfig, DataConfig
from ssd_edge.data import Dataset, load
from ssd_edge.images.second import second_view
from ssd_edge.report.terminal import Console
from ssd_edge.run import finished
from ssd_edge.run.embed import embed, embed_second
from ssd_edge.run.finished import FinishedRun

QUIET_ROUNDS, MOST_ROUNDS = 10, 100


@dataclasses.dataclass(frozen=True)
class Embedded:
    """Embeddings of a data set, standardised unless they depend on the classes of a series."""

    train: Tensor
    train_labels: np.ndarray
    test: Tensor
    test_labels: np.ndarray
    noise: Tensor
    classes: list[str]
    standardised: bool
    widths: tuple[int, ...]  # of levels
    second: Tensor | None = None  # of the second views of `train`
    second_noise: Tensor | None = None


def read(
    path: str, backbone: str, per_class: int, noise: int, second: bool = False
) -> tuple[Embedded, Dataset, Embedder]:
    """Return a data set's embeddings and those of some images of noise, the data set and the backbone.

    Args:
        path: What data.path accepts.
        backbone: What backbone.name accepts.
        per_class: Training images of each class, at most; 0: all.
        noise: Number of images of noise.
        second: Embed second views as well.
    """
    embedder = open_backbone(BackboneConfig(name=backbone), torch.device("cpu"))
    dataset = load(DataConfig(path=path, max_per_class=per_class), 0)
    vectors, side = embed(dataset, embedder, Console(), True), embedder.pixels.size
    pixels = np.random.default_rng(0).integers(0, 256, (noise, side, side, 3)).astype(np.uint8)
    data = Embedded(
        torch.from_numpy(vectors["train"]), dataset.train_labels, torch.from_numpy(vectors["test"]),
        dataset.test_labels, torch.from_numpy(embedder.embed(pixels)), list(dataset.classes), embedder.standardised,
        embedder.widths,
    )  # fmt: skip
    if second:
        views = embed_second(dataset, embedder, Console(), True), embedder.embed(second_view(pixels))
        data = dataclasses.replace(data, second=torch.from_numpy(views[0]), second_noise=torch.from_numpy(views[1]))
    return data, dataset, embedder


class RunOnData:
    """A finished run with its data and its backbone.

    Attributes:
        run: The run.
        dataset: Its data.
        rows: Row of each class of the data in the learner.
    """

    def __init__(self, folder: Path) -> None:
        self.run: FinishedRun = finished.read(folder)
        self.dataset = load(self.run.config.data, self.run.config.run.seed)
        self.rows = np.array([self.run.registry.row_of(name) for name in self.dataset.classes])
        self._embedder = open_backbone(self.run.config.backbone, torch.device("cpu"), folder)
        self._standard = None if self._embedder.standardised else self.run.standardisation(self._embedder.dim)

    def _standardised(self, features: np.ndarray) -> np.ndarray:
        return features if self._standard is None else (features - self._standard[0]) / self._standard[1]

    def embed(self, images: np.ndarray) -> np.ndarray:
        """Return the embeddings of images, as the run's learner takes them."""
        return self._standardised(self._embedder.embed(np.ascontiguousarray(images)))

    def embed_all(self, dataset: Dataset) -> dict[str, np.ndarray]:
        """Return the embeddings ``train`` and ``test`` of a data set, from the cache if they are there."""
        return {
            name: self._standardised(part) for name, part in embed(dataset, self._embedder, Console(), True).items()
        }


def auroc(higher: np.ndarray | Tensor, lower: np.ndarray | Tensor) -> float:
    """Return the probability that a value of the first is greater than one of the second; half if they are equal."""
    a, b = np.asarray(higher)[:, None], np.asarray(lower)[None]
    return float((a > b).mean() + 0.5 * (a == b).mean())


def one_core() -> None:
    """Keep this process and its children on one core: PyTorch and ONNX Runtime then have one thread each."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def least_milliseconds(calls: Sequence[Callable[[int], object]], each: int = 20) -> list[float]:
    """Return the least duration of each function; they take turns, so that other load affects all of them.

    The calling thread, in which they compute after `one_core`, may use any core. Ends when `QUIET_ROUNDS` rounds in a
    row have lowered none of the minima by more than half a percent.

    Args:
        calls: Functions of a running number.
        each: How often each is called in a round.
    """
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    least, quiet = np.full(len(calls), np.inf), 0
    for turn in range(MOST_ROUNDS):
        before = least.copy()
        for number, call in enumerate(calls):
            for index in range(turn * each, (turn + 1) * each):
                began = time.perf_counter()
                call(index)
                least[number] = min(least[number], 1e3 * (time.perf_counter() - began))
        quiet = quiet + 1 if (least > 0.995 * before).all() else 0
        if quiet == QUIET_ROUNDS:
            break
    return [round(float(value), 2) for value in least]


def busy_seconds() -> float:
    """Return the CPU seconds used by all processes since the machine started."""
    ticks = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # without idle and iowait


def wait_for_quiet(timeout: float) -> None:
    """Wait until other processes are idle for two seconds, for at most `timeout` seconds."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        before = busy_seconds()
        time.sleep(2.0)
        if busy_seconds() - before < 0.2:
            return
