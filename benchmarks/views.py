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

import torch
from heads import Data, accuracy

from ssd_edge import learners
from ssd_edge.run.storage import environment


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
    data, rows = Data(args.data, args.backbone, "auto", args.per_class, second=True), []
    for shots in args.shots:
        found: dict[str, list[float]] = {"one": [], "two": []}
        for order in range(args.orders):
            chosen = data.draw(order, shots)
            parts = data.train[chosen], data.second[chosen], data.test
            train, second, test = data.standardise(order, chosen, *parts)
            task = learners.Task(train, torch.from_numpy(data.labels[chosen]), second)
            for name, two in (("one", False), ("two", True)):
                options = {"name": "slda", "second_view": two}
                learner = learners.build(options, train.shape[1], data.priors, 0)
                learner.learn(task)
                found[name].append(accuracy(learner, test, data.test_labels))
        rows.append({"images": shots, **found})
        gain = 100 * (statistics.fmean(found["two"]) - statistics.fmean(found["one"]))
        print(f"{shots or 'all'} images: {100 * statistics.fmean(found['one']):.1f} → {gain:+.2f}", flush=True)
    if args.json:
        limit = f" --per-class {args.per_class}" if args.per_class else ""
        command = f"python benchmarks/views.py {Path(args.data).name} --backbone {args.backbone}{limit}"
        result: dict[str, Any] = {"command": command, "data": data.name, "backbone": args.backbone, "rows": rows}
        results = json.loads(args.json.read_text()) if args.json.exists() else []
        kept = [other for other in results if other["command"] != command]
        args.json.write_text(json.dumps([*kept, {**result, **environment()}], indent=1) + "\n")


if __name__ == "__main__":
    main()
