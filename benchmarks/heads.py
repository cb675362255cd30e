"""Compare the default learner with the other closed-form heads on a user's photographs.

Usage: python benchmarks/heads.py DATA [--backbone lite0] [--levels auto] [--shots 5 20 0] [--orders 5] [--heads …]
       [--curve] [--beside] [--json FILE]

DATA is what data.path accepts. All heads see the same embeddings: levels standardised by the first task (five
classes), as a run does. Each order draws the classes of the first task and, where --shots limits them (0: all), the
images. Heads of adjustable size have no more state than --megabytes for all classes; ridge keeps float64 (twice that
of slda), and FeCAM, with a covariance of each class, is left out. Settings are chosen on training images: a fifth of
those of order 0 is held out, for each number of images
(`CANDIDATES`). --curve adds accuracy with 1 to 30 images of each class for several numbers of features; --beside
teaches eight classes with few images beside all images of the others, one at a time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssd_edge import learners
from ssd_edge.backbones.embedder import level_standardisation, open_backbone
from ssd_edge.config import BackboneConfig, DataConfig
from ssd_edge.data import load
from ssd_edge.learners.priors import Priors
from ssd_edge.report.terminal import Console
from ssd_edge.run.embed import embed, embed_second
from ssd_edge.run.storage import environment

FIRST_TASK = 5
CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "slda": [{}],
    "ncm": [{}],
    "ridge": [{}, *({"strength": strength} for strength in (3.0, 30.0, 300.0))],
    "ranpac": [{}],
    "klda": [{}],
    "flymodel": [{}],
}
CURVE = (1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
BESIDE = (5, 20)


class Data:
    """Raw features of a data set."""

    def __init__(self, path: str, backbone: str, levels: str, per_class: int = 0, second: bool = False) -> None:
        config = BackboneConfig(name=backbone, levels=levels)  # type: ignore[arg-type]
        embedder = open_backbone(config, torch.device("cpu"))
        dataset = load(DataConfig(path=path, max_per_class=per_class), 0)
        vectors = embed(dataset, embedder, Console(), True)
        self.name, self.widths, self.standardised = dataset.name, embedder.widths, embedder.standardised
        self.train, self.test = vectors["train"], vectors["test"]
        self.second = embed_second(dataset, embedder, Console(), True) if second else None
        self.labels, self.test_labels = dataset.train_labels, torch.from_numpy(dataset.test_labels)
        self.classes, self.priors = len(dataset.classes), embedder.priors

    def draw(self, order: int, shots: int) -> np.ndarray:
        """Return positions of at most `shots` training images of each class; 0: all."""
        rng = np.random.default_rng(order)
        own = (rng.permutation(np.flatnonzero(self.labels == label)) for label in range(self.classes))
        return np.concatenate([part[: shots or None] for part in own])

    def standardise(self, order: int, chosen: np.ndarray, *others: np.ndarray) -> list[Tensor]:
        """Return the embeddings of arrays of features, standardised by the first task of an order."""
        if self.standardised:
            return [torch.from_numpy(part) for part in others]
        first = np.random.default_rng(1000 + order).permutation(self.classes)[:FIRST_TASK]
        mu, sigma = level_standardisation(self.train[chosen[np.isin(self.labels[chosen], first)]], self.widths)
        return [torch.from_numpy(((part - mu) / sigma).astype(np.float32)) for part in others]


def taught(name: str, options: Mapping[str, Any], vectors: Tensor, rows: Tensor, priors: Priors) -> learners.Learner:
    learner = learners.build({"name": name, **options}, vectors.shape[1], priors, 0)
    learner.learn(learners.Task(vectors, rows))
    return learner


def accuracy(learner: learners.Learner, vectors: Tensor, rows: Tensor) -> float:
    return float((learner.predict(vectors) == rows).double().mean())


def sized(name: str, classes: int, megabytes: float) -> dict[str, Any]:
    """Return the settings that keep a head of adjustable size within the budget."""
    adjustable = {"ranpac", "klda", "slda"}
    return {"budget_mb": megabytes, "budget_classes": classes} if name in adjustable else {}


def compare(data: Data, heads: list[str], shots: list[int], orders: int, megabytes: float) -> list[dict[str, Any]]:
    """Return accuracies of all heads by number of images and order."""
    found = []
    for count in shots:
        best: dict[str, dict[str, Any]] = {}
        accuracies: dict[str, list[float]] = {name: [] for name in heads}
        sizes: dict[str, int] = {}
        for order in range(orders):
            chosen = data.draw(order, count)
            train, test = data.standardise(order, chosen, data.train[chosen], data.test)
            rows = torch.from_numpy(data.labels[chosen])
            if not order:
                held_out = torch.from_numpy(np.random.default_rng(7).permutation(len(rows)) % 5 == 0)
                for name in heads:
                    tried = CANDIDATES.get(name, [{}])
                    results = [
                        accuracy(
                            taught(name, {**option, **sized(name, data.classes, megabytes)},
                                   train[~held_out], rows[~held_out], data.priors),
                            train[held_out], rows[held_out],
                        ) if len(tried) > 1 else 1.0
                        for option in tried
                    ]  # fmt: skip
                    best[name] = {**tried[int(np.argmax(results))], **sized(name, data.classes, megabytes)}
            for name in heads:
                learner = taught(name, best[name], train, rows, data.priors)
                accuracies[name].append(accuracy(learner, test, data.test_labels))
                sizes[name] = learner.memory_bytes()
            means = "  ".join(f"{name} {100 * statistics.fmean(accuracies[name]):.1f}" for name in heads)
            print(f"{count or 'all'} images, {order + 1} orders: {means}", flush=True)
        found.append({"images": count, "accuracy": accuracies, "settings": best, "state_bytes": sizes})
    return found


def curve(data: Data, draws: int = 3) -> list[dict[str, Any]]:
    """Return the accuracy of the default learner with few images of each class, for several numbers of features."""
    total, last = sum(data.widths), data.widths[-1]
    shown = {total: slice(0, total), last: slice(total - last, total)}
    if last > 256:
        shown[256] = slice(total - last, total - last + 256)
    rows = []
    for size, columns in shown.items():
        accuracies = []
        for count in CURVE:
            values = []
            for order in range(draws):
                chosen = data.draw(order, count)
                train, test = data.standardise(order, chosen, data.train[chosen], data.test)
                learner = taught("slda", {}, train[:, columns], torch.from_numpy(data.labels[chosen]), Priors())
                values.append(accuracy(learner, test[:, columns], data.test_labels))
            accuracies.append(statistics.fmean(values))
        steps = min(after - before for before, after in itertools.pairwise(accuracies))
        print(f"{size} features: {100 * accuracies[0]:.1f} … {100 * accuracies[-1]:.1f}, least step {100 * steps:+.2f}")
        rows.append({"features": size, "images": CURVE, "accuracy": accuracies, "least_step": steps})
    return rows


def beside(data: Data, classes: int = 8) -> list[dict[str, Any]]:
    """Return how well classes of few images are recognised beside all images of the others."""
    everything = data.draw(0, 0)
    train, test = data.standardise(0, everything, data.train[everything], data.test)
    labels = torch.from_numpy(data.labels[everything])
    full = taught("slda", {}, train, labels, data.priors).predict(test)
    counts = torch.bincount(labels, minlength=data.classes)
    rows = []
    for few in BESIDE:
        chosen = [label for label in range(data.classes) if counts[label] >= 2 * few][:classes]
        result: dict[str, list[float]] = {"with_all": [], "with_few": [], "others_lose": []}
        for label in chosen:
            own = (labels == label).nonzero().flatten()
            kept = torch.cat([(labels != label).nonzero().flatten(), own[:few]])
            answers = taught("slda", {}, train[kept], labels[kept], data.priors).predict(test)
            mine = data.test_labels == label
            right, before = answers == data.test_labels, full == data.test_labels
            result["with_all"].append(float(before[mine].double().mean()))
            result["with_few"].append(float(right[mine].double().mean()))
            result["others_lose"].append(float(before[~mine].double().mean() - right[~mine].double().mean()))
        rows.append({"images": few, "classes": len(chosen), **{key: statistics.fmean(v) for key, v in result.items()}})
        print(rows[-1])
    return rows


def main() -> None:
    """Print the results, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--backbone", default="lite0")
    parser.add_argument("--levels", default="auto")
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 20, 0])
    parser.add_argument("--orders", type=int, default=5)
    parser.add_argument("--heads", nargs="+", default=[name for name in CANDIDATES if name in learners.LEARNERS])
    parser.add_argument("--megabytes", type=float, default=10.0)
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--beside", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = Data(args.data, args.backbone, args.levels)
    found: dict[str, Any] = {"data": data.name, "backbone": args.backbone, "widths": data.widths}
    found["heads"] = compare(data, args.heads, args.shots, args.orders, args.megabytes)
    if args.curve:
        found["curve"] = curve(data)
    if args.beside:
        found["beside"] = beside(data)
    if args.json:
        command = f"python benchmarks/heads.py {Path(args.data).name} --backbone {args.backbone} --levels {args.levels}"
        earlier = json.loads(args.json.read_text()) if args.json.is_file() else []
        args.json.write_text(json.dumps([*earlier, {"command": command, **environment(), **found}], indent=1) + "\n")


if __name__ == "__main__":
    main()
