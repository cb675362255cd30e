"""Measure what a second view of each image is worth to the default learner.

Usage: python benchmarks/views.py DATA [--backbone lite0] [--per-class 0] [--shots 3 5 10 20 0] [--beside 3 5 20]
       [--orders 5] [--json FILE]

DATA is what data.path accepts. Each order draws the images (at most --shots of a class; 0: all) and the classes of the
first task, which standardises, as in heads.py. With and without `learner.second_view` the learner gets the same images.
--beside limits the images of one class in five, beside all images of the others. A file that --json names is added to.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from heads import Data

from ssd_edge import learners
from ssd_edge.run.storage import environment

ONE_IN = 5  # classes has few images beside many of the others


def answers(data: Data, order: int, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Return which test images are recognised after learning the chosen ones, without and with second views."""
    parts = data.train[chosen], data.second[chosen], data.test
    train, second, test = data.standardise(order, chosen, *parts)
    task, right = learners.Task(train, torch.from_numpy(data.labels[chosen]), second), {}
    for name, two in (("one", False), ("two", True)):
        learner = learners.build({"name": "slda", "second_view": two}, train.shape[1], data.priors, 0)
        learner.learn(task)
        right[name] = (learner.predict(test) == data.test_labels).numpy()
    return right


def equal(data: Data, shots: int, orders: int) -> dict[str, Any]:
    """Return the accuracy of each order with the same number of images of each class."""
    found: dict[str, list[float]] = {"one": [], "two": []}
    for order in range(orders):
        for name, right in answers(data, order, data.draw(order, shots)).items():
            found[name].append(float(right.mean()))
    return {"images": shots, **found}


def beside(data: Data, few: int, orders: int) -> dict[str, Any]:
    """Return the accuracy of each order on classes of few images, and on the others, which have all of theirs."""
    found: dict[str, list[float]] = {f"{name}_{kind}": [] for name in ("one", "two") for kind in ("few", "others")}
    for order in range(orders):
        limited = np.random.default_rng(order).permutation(data.classes)[: max(data.classes // ONE_IN, 1)]
        everything, some = data.draw(order, 0), data.draw(order, few)
        chosen = np.concatenate(
            [some[np.isin(data.labels[some], limited)], everything[~np.isin(data.labels[everything], limited)]]
        )
        mine = np.isin(data.test_labels.numpy(), limited)
        for name, right in answers(data, order, chosen).items():
            found[f"{name}_few"].append(float(right[mine].mean()))
            found[f"{name}_others"].append(float(right[~mine].mean()))
    return {"images": few, **found}


def main() -> None:
    """Print the accuracies, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--backbone", default="lite0")
    parser.add_argument("--per-class", type=int, default=0)
    parser.add_argument("--shots", type=int, nargs="+", default=[3, 5, 10, 20, 0])
    parser.add_argument("--beside", type=int, nargs="*", default=[])
    parser.add_argument("--orders", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, rows, mixed = Data(args.data, args.backbone, "auto", args.per_class, second=True), [], []
    for shots in args.shots:
        rows.append(equal(data, shots, args.orders))
        print(f"{shots or 'all'} images: {change(rows[-1], 'one', 'two')}", flush=True)
    for few in args.beside:
        mixed.append(beside(data, few, args.orders))
        kinds = (f"{kind} {change(mixed[-1], f'one_{kind}', f'two_{kind}')}" for kind in ("few", "others"))
        print(f"{few} images beside all: {', '.join(kinds)}", flush=True)
    if args.json:
        limit = f" --per-class {args.per_class}" if args.per_class else ""
        command = f"python benchmarks/views.py {Path(args.data).name} --backbone {args.backbone}{limit}"
        result: dict[str, Any] = {
            "command": command,
            "data": data.name,
            "backbone": args.backbone,
            "rows": rows,
            "beside": mixed,
        }
        results = json.loads(args.json.read_text()) if args.json.exists() else []
        kept = [other for other in results if other["command"] != command]
        args.json.write_text(json.dumps([*kept, {**result, **environment()}], indent=1) + "\n")


def change(row: dict[str, Any], before: str, after: str) -> str:
    """Return two mean accuracies as the first and the difference."""
    first, second = (100 * statistics.fmean(row[name]) for name in (before, after))
    return f"{first:.1f} {second - first:+.1f}"


if __name__ == "__main__":
    main()
