"""Measure what a second view of each image is worth to the default learner.

Usage: python benchmarks/views.py DATA [--backbone lite0] [--per-class 0] [--shots 3 5 10 20 0] [--orders 5]
       [--json FILE]

DATA is what data.path accepts. Each order draws the images (at most --shots of a class; 0: all) and the classes of the
first task, which standardises, as in heads.py. With and without `learner.second_view` the learner gets the same images.
A file that --json names is added to.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssd_edge import learners
from ssd_edge.backbones.embedder import level_standardisation, open_backbone
from ssd_edge.config import BackboneConfig, DataConfig
from ssd_edge.data import load
from ssd_edge.report.terminal import Console
from ssd_edge.run.embed import embed
from ssd_edge.run.storage import environment

FIRST_TASK = 5


def main() -> None:
    """Print the accuracies, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--backbone", default="lite0")
    parser.add_argument("--per-class", type=int, default=0)
    parser.add_argument("--shots", type=int, nargs="+", default=[3, 5, 10, 20, 0])
    parser.add_argument("--orders", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    embedder = open_backbone(BackboneConfig(name=args.backbone), torch.device("cpu"))
    dataset = load(DataConfig(path=args.data, max_per_class=args.per_class), 0)
    vectors = embed(dataset, embedder, Console(), True, second=True)
    labels, tested = dataset.train_labels, torch.from_numpy(dataset.test_labels)
    classes, rows = len(dataset.classes), []
    for shots in args.shots:
        found: dict[str, list[float]] = {"one": [], "two": []}
        for order in range(args.orders):
            rng = np.random.default_rng(order)
            own = (rng.permutation(np.flatnonzero(labels == label)) for label in range(classes))
            chosen = np.concatenate([part[: shots or None] for part in own])
            parts = [vectors["train"][chosen], vectors["second"][chosen], vectors["test"]]
            if not embedder.standardised:
                first = np.random.default_rng(1000 + order).permutation(classes)[:FIRST_TASK]
                mean, scale = level_standardisation(parts[0][np.isin(labels[chosen], first)], embedder.widths)
                parts = [((part - mean) / scale).astype(np.float32) for part in parts]
            train, second, test = map(torch.from_numpy, parts)
            task = learners.Task(train, torch.from_numpy(labels[chosen]), second)
            for name, two in (("one", False), ("two", True)):
                options = {"name": "slda", "second_view": two}
                learner = learners.build(options, train.shape[1], embedder.priors, 0)
                learner.learn(task)
                found[name].append(_accuracy(learner, test, tested))
        rows.append({"images": shots, **found})
        gain = 100 * (statistics.fmean(found["two"]) - statistics.fmean(found["one"]))
        print(f"{shots or 'all'} images: {100 * statistics.fmean(found['one']):.1f} → {gain:+.2f}", flush=True)
    if args.json:
        limit = f" --per-class {args.per_class}" if args.per_class else ""
        command = f"python benchmarks/views.py {Path(args.data).name} --backbone {args.backbone}{limit}"
        result: dict[str, Any] = {"command": command, "data": dataset.name, "backbone": args.backbone, "rows": rows}
        results = json.loads(args.json.read_text()) if args.json.exists() else []
        kept = [other for other in results if other["command"] != command]
        args.json.write_text(json.dumps([*kept, {**result, **environment()}], indent=1) + "\n")


def _accuracy(learner: learners.Learner, vectors: Tensor, rows: Tensor) -> float:
    return float((learner.predict(vectors) == rows).double().mean())


if __name__ == "__main__":
    main()
