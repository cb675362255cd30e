"""Train the tail of a backbone task by task, and carry the statistics of earlier classes along.

Usage: python benchmarks/tail.py DATA [--at 192@7] [--tasks 10] [--orders 2] [--ways WAY …] [--passes 6] [--gate 288]
       [--json FILE]

DATA is what data.path accepts; the backbone is lite0. Way by way and order by order, the tail learns one task after
another, from images of its classes alone. After each task a head (the default learner) is tested on all classes so far:

    carried   statistics of earlier classes are carried along by a ridge map from old to new features, as a device
              could; λ by leaving out each image of the task with all its views
    exact     statistics are taken anew from all images so far, as no device could

A way that is in the file already is not run again. One thread.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tails import Schedule, features, optimiser_of, vectors_of
from torch import Tensor, nn

from ssd_edge import files
from ssd_edge.adaptation.cut import cut
from ssd_edge.adaptation.tail import Tail
from ssd_edge.backbones.embedder import level_standardisation
from ssd_edge.backbones.names import resolve
from ssd_edge.backbones.onnx import OnnxEmbedder
from ssd_edge.config import BackboneConfig, DataConfig
from ssd_edge.data import cache, load
from ssd_edge.learners.closed_form.slda import SLDA
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.gradient.selective import SelectiveDistillation, TopK
from ssd_edge.learners.priors import Priors
from ssd_edge.run.storage import environment

VIEWS = 3
GRID = tuple(10.0 ** (e / 2) for e in range(-6, 7))  # λ relative to the mean eigenvalue
HOLD = 0.1


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to train the tail.

    Attributes:
        tasks: Tasks that change it.
        loss: ``ssd``: Top-K gates, and distillation of the Top-n neurons and the logits of its previous self;
            ``hold``: distillation of all features; ``plain``: none.
        averaged: Go on with the mean of the weights before and after a task.
    """

    tasks: int
    loss: str = "plain"
    averaged: bool = False


WAYS = {
    "frozen": Way(0),
    "first": Way(1),
    "plain": Way(10**6),
    "ssd": Way(10**6, "ssd"),
    "ssd, averaged": Way(10**6, "ssd", True),
    "hold, averaged": Way(10**6, "hold", True),
}


class Data:
    """Vectors of the trunk, for several views of the training images, and of the test images."""

    def __init__(self, path: str, at: str) -> None:
        data, graph = load(DataConfig(path=path), 0), resolve(BackboneConfig(), print)
        parts = cut(graph, at)
        key = {"tail": graph.identity, "at": str(parts.place), "data": data.fingerprint, "views": VIEWS, "version": 1}
        found = cache.embeddings(
            key,
            lambda: {
                "train": vectors_of(parts, graph, data.train, VIEWS),
                "test": vectors_of(parts, graph, data.test, 1),
            },
        )
        self.train, self.test = found["train"], found["test"][0]
        self.labels, self.truth, self.classes = data.train_labels, data.test_labels, len(data.classes)
        self.state, self.widths, self.place = parts.tail, OnnxEmbedder(graph).widths, str(parts.place)
        sizes = np.cumsum([0, *self.widths])
        known = {shape[0] for _, shape in parts.tail.description.parts[:-1]}
        first = next(i for i, width in enumerate(self.widths) if width not in known)
        self.moved = int(sizes[first])  # position of the first feature that training the tail changes


class Gated(nn.Module):
    """A tail with Top-K gates on its hidden layers, and a linear layer on its last features."""

    def __init__(self, tail: Tail, k: int, mu: Tensor, sigma: Tensor) -> None:
        super().__init__()
        self.tail, self.mu, self.sigma = tail, mu, sigma
        self.names = list(tail.hidden) if k else []
        self.gates = nn.ModuleList(TopK(tail.hidden[name], min(k, tail.hidden[name]), 1) for name in self.names)
        self.head: nn.Linear | None = None

    def grow(self, classes: int) -> None:
        """Add outputs that are 0."""
        head = nn.Linear(len(self.mu), classes)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        if self.head is not None:
            with torch.no_grad():
                head.weight[: self.head.out_features] = self.head.weight
                head.bias[: self.head.out_features] = self.head.bias
        self.head = head

    def gate(self, name: str, value: Tensor) -> Tensor:
        """Let the strongest channels of each position respond."""
        passed: Tensor = self.gates[self.names.index(name)](value)
        return passed

    def raw(self, vectors: Tensor) -> Tensor:
        """Return the raw features ``(N, D)``."""
        return self.tail(vectors, self.gate if self.names else None)

    def last(self, vectors: Tensor) -> Tensor:
        """Return the standardised last features."""
        return (self.raw(vectors)[:, -len(self.mu) :] - self.mu) / self.sigma

    def forward(self, vectors: Tensor) -> Tensor:
        """Return logits of all classes so far."""
        logits: Tensor = self.head(self.last(vectors))
        return logits


@torch.inference_mode()
def embedded(model: Gated, vectors: np.ndarray) -> np.ndarray:
    """Return raw features, float64 ``(N, D)``."""
    if not model.names:
        return features(model.tail, vectors).astype(np.float64)
    parts = [model.raw(torch.from_numpy(vectors[i : i + 64].astype(np.float32))) for i in range(0, len(vectors), 64)]
    return torch.cat(parts).double().numpy()


def learn(
    model: Gated, way: Way, distillation: SelectiveDistillation | None, data: Data, index: np.ndarray, rows: np.ndarray,
    first: int, schedule: Schedule, passes: int,
) -> None:  # fmt: skip
    """Train on the images of one task, whose rows begin with `first`."""
    rng = np.random.default_rng(first)
    batch = min(schedule.batch, len(index))
    steps = passes * len(index) // batch
    optimiser, course = optimiser_of(model.tail, model.head, schedule, steps)
    before = copy.deepcopy(model).requires_grad_(False)
    truth, order = torch.from_numpy(rows), np.zeros(0, np.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = rng.permutation(len(index))
        chosen, order = order[:batch], order[batch:]
        views = rng.integers(0, VIEWS, batch)
        inputs = torch.from_numpy(data.train[views, index[chosen]].astype(np.float32))
        if distillation is not None:
            loss = distillation.loss(inputs, truth[chosen])
        else:
            seen = model.last(inputs)
            loss = F.cross_entropy(
                model.head(seen)[:, first:], truth[chosen] - first, label_smoothing=schedule.smoothing
            )
            if way.loss == "hold":
                with torch.no_grad():
                    held = before.last(inputs)
                loss = loss + HOLD * F.mse_loss(seen, held)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.tail.trained, 1.0)
        optimiser.step()
        course.step()
    if way.averaged:
        with torch.no_grad():
            for new, old in zip(model.tail.trained, before.tail.trained, strict=True):
                new.lerp_(old, 0.5)


def carrying(old: np.ndarray, new: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the map of features new ≈ old @ A + b, and the share of the drift that it explains of left-out images.

    Ridge regression of the drift on the old features; without them, the drift is its mean.

    Args:
        old: Features before, ``(N, D)``.
        new: Features after.
        images: Image of each row: all views of an image are left out together.
    """
    centre, drift = old.mean(0), new - old
    shift = drift.mean(0)
    x, y = old - centre, drift - shift
    gram = x @ x.T
    values, vectors = np.linalg.eigh(gram)
    groups = [np.flatnonzero(images == image) for image in np.unique(images)]
    best = (np.inf, 0.0)
    turned = vectors.T @ y
    for share in GRID:
        strength = share * max(values.mean(), 1e-12)
        weights = np.maximum(values, 0) / (np.maximum(values, 0) + strength)
        hat, missed = (vectors * weights) @ vectors.T, y - (vectors * weights) @ turned
        error = 0.0
        for group in groups:
            left = np.linalg.solve(np.eye(len(group)) - hat[np.ix_(group, group)], missed[group])
            error += float((left**2).sum())
        best = min(best, (error, strength))
    error, strength = best
    slope = x.T @ (vectors @ (turned / (np.maximum(values, 0) + strength)[:, None]))
    return np.eye(old.shape[1]) + slope, shift - centre @ slope, 1 - error / max(float((y**2).sum()), 1e-12)


def carried(statistics: ClassStatistics, moved: int, a: np.ndarray, b: np.ndarray) -> ClassStatistics:
    """Return statistics after the features from `moved` on have become x @ a + b."""
    size = statistics.sums.shape[1]
    whole, shift = torch.eye(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    whole[moved:, moved:], shift[moved:] = torch.from_numpy(a), torch.from_numpy(b)
    scatter, means = whole.T @ statistics.scatter_within() @ whole, statistics.means @ whole + shift
    found = ClassStatistics(size)
    found.counts, found.sums = statistics.counts.clone(), means * statistics.counts[:, None]
    found.moments = scatter + (means * statistics.counts[:, None]).T @ means
    found.moments = (found.moments + found.moments.mT) / 2
    return found


def tested(statistics: ClassStatistics, test: np.ndarray, truth: np.ndarray, tasks: list[np.ndarray]) -> list[float]:
    """Return the accuracy on all classes so far, and on those of each task."""
    head = SLDA(test.shape[1], SLDA.Settings(), Priors())
    head.statistics = statistics
    values, bias, _ = head.solve()
    right = ((torch.from_numpy(test) @ values.double() + bias.double()).argmax(1).numpy() == truth).astype(float)
    return [float(right.mean()), *(float(right[np.isin(truth, task)].mean()) for task in tasks)]


def series(data: Data, way: Way, order: int, tasks: int, k: int, schedule: Schedule, passes: int) -> dict[str, Any]:
    """Return the accuracies after each task of one order."""
    began = time.monotonic()
    torch.manual_seed(order)
    classes = np.random.default_rng(1000 + order).permutation(data.classes)
    row_of = np.argsort(classes)
    rows, truth = row_of[data.labels], row_of[data.truth]
    parts = np.array_split(np.arange(data.classes), tasks)
    tail, last = Tail(data.state), data.widths[-1]
    indices = [np.flatnonzero(np.isin(rows, part)) for part in parts]
    mu, sigma = level_standardisation(features(tail, data.train[0, indices[0]]), data.widths)
    tensors = [torch.from_numpy(part[-last:].astype(np.float32)) for part in (mu, sigma)]
    model = Gated(tail, k if way.loss == "ssd" else 0, *tensors)
    distillation = None
    statistics = ClassStatistics(len(mu))
    found: dict[str, list[Any]] = {"carried": [], "exact": [], "explained": []}
    frozen = way.tasks == 0
    everything = (embedded(model, data.train[0]), embedded(model, data.test)) if frozen else None
    for number, (part, index) in enumerate(zip(parts, indices, strict=True)):
        changes = number < way.tasks
        if changes:
            views = data.train[:, index].reshape(-1, data.train.shape[2])
            before = embedded(model, views)
            model.grow(int(part[-1]) + 1)
            if way.loss == "ssd" and distillation is None:
                distillation = SelectiveDistillation(model)
            learn(model, way, distillation, data, index, rows[index], int(part[0]), schedule, passes)
            if distillation is not None:
                distillation.end_task(torch.from_numpy(data.train[0, index].astype(np.float32)).split(64))
            after = embedded(model, views)
            if number == 0:  # the first task standardises, after it has been learned
                mu, sigma = level_standardisation(after[: len(index)], data.widths)
            else:
                moved = slice(data.moved, None)
                scaled = [((each - mu) / sigma)[:, moved] for each in (before, after)]
                a, b, explained = carrying(*scaled, np.tile(np.arange(len(index)), VIEWS))
                statistics = carried(statistics, data.moved, a, b)
                found["explained"].append(explained)
            everything = None
        if everything is None:
            seen = np.flatnonzero(rows <= part[-1]) if way.tasks > 1 else np.arange(len(rows))
            of_test = np.flatnonzero(truth <= part[-1]) if way.tasks > 1 else np.arange(len(truth))
            train, test = np.zeros((len(rows), len(mu))), np.zeros((len(truth), len(mu)))
            train[seen], test[of_test] = embedded(model, data.train[0, seen]), embedded(model, data.test[of_test])
            if way.tasks <= 1:
                everything = train, test
        else:
            train, test = everything
        learned, asked = np.flatnonzero(rows <= part[-1]), np.flatnonzero(truth <= part[-1])
        scaled_train, scaled_test = (train - mu) / sigma, (test[asked] - mu) / sigma
        statistics.add(torch.from_numpy(scaled_train[index]), torch.from_numpy(rows[index]))
        exact = ClassStatistics(len(mu))
        exact.add(torch.from_numpy(scaled_train[learned]), torch.from_numpy(rows[learned]))
        so_far = list(parts[: number + 1])
        found["exact"].append(tested(exact, scaled_test, truth[asked], so_far))
        found["carried"].append(
            tested(statistics, scaled_test, truth[asked], so_far) if way.tasks > 1 else found["exact"][-1]
        )
        print(
            f"  task {number + 1}: carried {found['carried'][-1][0]:.4f}, exact {found['exact'][-1][0]:.4f}", flush=True
        )
    rounded = {key: [np.round(each, 4).tolist() for each in values] for key, values in found.items()}
    return {"order": order, **rounded, "seconds": round(time.monotonic() - began)}


def main() -> None:
    """Print the accuracies, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--at", default="192@7")
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--orders", type=int, default=2)
    parser.add_argument("--ways", nargs="+", metavar="WAY", default=list(WAYS))
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--gate", type=int, default=288)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = Data(args.data, args.at)
    schedule = Schedule(rate=args.rate)
    result: dict[str, Any] = {**environment(), "place": data.place, "rows": []}
    if args.json and args.json.exists():
        result = json.loads(args.json.read_text(encoding="utf-8"))
    about = {"passes": args.passes, "rate": args.rate, "gate": args.gate, "at": data.place}
    for order in range(args.orders):
        for name in args.ways:
            if any(row["way"] == name and row["order"] == order and row["about"] == about for row in result["rows"]):
                continue
            print(f"order {order}, {name}", flush=True)
            row = series(data, WAYS[name], order, args.tasks, args.gate, schedule, args.passes)
            result["rows"].append({"way": name, "about": about, **row})
            if args.json:
                files.write_json(args.json, result)


if __name__ == "__main__":
    main()
