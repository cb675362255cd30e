"""Compare the estimate of forgetting with the true drop, and measure how often the guard warns about images.

Usage: SSD_EDGE_DATA=FOLDER python benchmarks/retention.py [--per-class N] [--spread S ...] [--images] [--json FILE]

For each of four classes of CIFAR-10, a learner is trained on the other nine classes with N training images per class,
then on the left-out class with few images. The true accuracies are measured on all test images of the nine classes; the
estimate has only their statistics. --images runs the guard on new classes, known classes under a new name, and folders
in which a quarter of the images show a known class, all from test images. Embeddings are cached. Uses one thread.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from device_runtime.learning.guard import judge
from device_runtime.learning.retention import SPREAD, predict_pseudo
from ssd_edge import learners
from ssd_edge.backbones.embedder import open_backbone
from ssd_edge.classes import ClassRegistry
from ssd_edge.config import BackboneConfig, DataConfig
from ssd_edge.data import load
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.report.terminal import Console
from ssd_edge.run.embed import embed
from ssd_edge.run.storage import environment

WITHOUT = ("truck", "cat", "airplane", "frog")
SHOTS = (5, 20, 100, 500)
LEARNERS: tuple[dict[str, Any], ...] = (
    *({"name": name} for name in ("landmark", "slda", "ncm", "ridge", "fecam")),
    *({"name": name, "epochs": 10} for name in ("sdmlp", "finetune")),
)
FOLDERS, SIZES = 10, (10, 20, 50)
NEW = 9


class Nine:
    """Data of nine known classes and one new class.

    Args:
        data: training and test embeddings and labels.
        without: label of the new class.
        per_class: training images per known class.
    """

    def __init__(self, data: dict[str, torch.Tensor], without: int, per_class: int) -> None:
        self.generator = torch.Generator().manual_seed(without)
        self.labels = [label for label in range(10) if label != without] + [without]
        row = torch.tensor(np.argsort(self.labels))
        self.train, self.train_rows = data["train"], row[data["train_labels"]]
        self.test, self.test_rows = data["test"], row[data["test_labels"]]
        known = torch.cat([self.some(self.train_rows, r, per_class) for r in range(NEW)])
        self.task = learners.Task(self.train[known], self.train_rows[known])
        self.statistics = ClassStatistics(self.train.shape[1])
        self.statistics.add(self.task.embeddings, self.task.labels)

    def some(self, rows: torch.Tensor, row: int, count: int) -> torch.Tensor:
        """Return indices of random samples of a class."""
        own = (rows == row).nonzero().flatten()
        return own[torch.randperm(len(own), generator=self.generator)[:count]]


def taught(learner: learners.Learner, vectors: torch.Tensor) -> learners.Learner:
    """Return a copy of the learner that has learned the embeddings as the new class."""
    copy = learners.restore(*learners.pack(learner))
    copy.learn(learners.Task(vectors, torch.full((len(vectors),), NEW)))
    return copy


def drops(nine: Nine, priors: Any, spreads: list[float]) -> list[dict[str, Any]]:
    """Return true and estimated accuracies for every learner and number of images."""
    rows = []
    old = nine.test_rows != NEW
    vectors, truth = nine.test[old], nine.test_rows[old]
    images = nine.train[nine.some(nine.train_rows, NEW, max(SHOTS))]
    for options in LEARNERS:
        before = learners.build(options, vectors.shape[1], priors, 0)
        before.learn(nine.task)
        for shots in SHOTS:
            after = taught(before, images[:shots])
            true = [float((state.predict(vectors) == truth).double().mean()) for state in (before, after)]
            found = {s: predict_pseudo(before, after, nine.statistics, s).summary().to_dict() for s in spreads}
            rows.append({"learner": options["name"], "images": shots, "true": true, "estimated": found})
    return rows


def folders(nine: Nine, priors: Any) -> dict[int, Counter]:
    """Return the numbers of warnings and refusals of the guard, by folder size."""
    before = learners.build({"name": "slda"}, nine.test.shape[1], priors, 0)
    before.learn(nine.task)
    registry = ClassRegistry()
    for label in nine.labels:
        registry = registry.add(f"class {label}")
    counted = {size: Counter() for size in SIZES}
    for size, count in counted.items():
        for number in range(FOLDERS):
            known = number % NEW
            clean, double = (nine.test[nine.some(nine.test_rows, row, size)] for row in (NEW, known))
            mixed = torch.cat([double[: size // 4], clean[size // 4 :]])
            like = registry.names[known]
            for kind, vectors in (("clean", clean), ("double", double), ("mixed", mixed)):
                after = taught(before, vectors)
                found = judge(before, after, nine.statistics, vectors, torch.full((size,), NEW), registry)
                count[f"{kind}: any warning"] += bool(found.warnings)
                count[f"{kind}: refused"] += bool(found.refusals)
                count["double: found"] += kind == "double" and any(f"looks like '{like}'" in w for w in found.warnings)
                count["mixed: found"] += kind == "mixed" and any(s.like == like for s in found.suspects)
            count["folders of a kind"] += 1
    return counted


def fit(rows: list[dict[str, Any]], spread: float) -> dict[str, float]:
    """Compare the estimated drops of all rows with the true ones."""
    true = np.array([row["true"][0] - row["true"][1] for row in rows])
    estimated = np.array([row["estimated"][spread]["drop"] for row in rows])
    levels = [row["estimated"][spread]["accuracy_before"] - row["true"][0] for row in rows]
    small = true < 0.05
    return {
        "correlation": float(np.corrcoef(true, estimated)[0, 1]),
        "correlation_under_5_points": float(np.corrcoef(true[small], estimated[small])[0, 1]),
        "largest_under_estimate": float((true - estimated).max()),
        "largest_over_estimate": float((estimated - true).max()),
        "mean_error_under_5_points": float(np.abs(true - estimated)[small].mean()),
        "mean_level_error": float(np.mean(levels)),
        "wrong_at_0.1": int(((true > 0.1) != (estimated > 0.1)).sum()),
    }


def main() -> None:
    """Print the tables, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-class", type=int, default=1000)
    parser.add_argument("--spread", type=float, nargs="+", default=[1.0, 1.15, SPREAD, 1.5])
    parser.add_argument("--images", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    embedder = open_backbone(BackboneConfig(), torch.device("cpu"))
    dataset = load(DataConfig(path="cifar10-jpg.tar.xz"), 0)
    data = {name: torch.from_numpy(array) for name, array in embed(dataset, embedder, Console(), True).items()}
    for part, labels in (("train_labels", dataset.train_labels), ("test_labels", dataset.test_labels)):
        data[part] = torch.from_numpy(labels)
    written: dict[str, Any] = {"per_class": args.per_class, "shipped_spread": SPREAD}
    if args.images:
        total = {size: Counter() for size in SIZES}
        for without in range(10):
            for size, count in folders(Nine(data, without, args.per_class), embedder.priors).items():
                total[size].update(count)
        for size, count in total.items():
            print(f"folders of {size} images: " + ", ".join(f"{what} {n}" for what, n in sorted(count.items())))
        written["folders"] = total
    else:
        rows = []
        print(f"{'new':>9} {'learner':>9} {'images':>6} {'true':>16} {'drop':>7}   estimated drop with each spread")
        for name in WITHOUT:
            found = drops(Nine(data, dataset.classes.index(name), args.per_class), embedder.priors, args.spread)
            rows += [{"new": name, **row} for row in found]
            for row in found:
                old, new = row["true"]
                estimates = "  ".join(f"{s:g}: {row['estimated'][s]['drop']:+.3f}" for s in args.spread)
                line = f"{name:>9} {row['learner']:>9} {row['images']:6} {old:.3f} -> {new:.3f} {old - new:+9.3f}"
                print(f"{line}   {estimates}", flush=True)
        written |= {"rows": rows, "fit": {spread: fit(rows, spread) for spread in args.spread}}
        for spread, values in written["fit"].items():
            print(f"spread {spread:g}: " + ", ".join(f"{what} {value:.3f}" for what, value in values.items()))
    if args.json:
        command = f"python benchmarks/retention.py --per-class {args.per_class}" + " --images" * args.images
        args.json.write_text(json.dumps({"command": command, **environment(), **written}, indent=2) + "\n")


if __name__ == "__main__":
    main()
