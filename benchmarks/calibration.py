"""Compare the probabilities of answers with how often they are right, while a device learns class after class.

Usage: python benchmarks/calibration.py DATA [--backbone lite0] [--learner slda ...] [--series 2] [--learns 25]
       [--per-class N] [--second-view] [--json FILE]

DATA is what data.path accepts. A bundle knows half of the classes, at most 25, with all of their training images; then
other classes are taught one by one, each through the function that a device calls, with 5, with 20 or with all images.
A learn that the guard refuses is left out. One half of the test images is the workstation's, which calibrates the
bundle; the other half is the truth. The expected calibration error (ECE) is the mean distance, over 15 equal bins of
the probability, between the probability of the answer and the share of right answers, weighted by images. It is given
for the classes of the bundle and for the taught ones, by what was answered ("when it says cup") and by what is shown;
and with `unknown` left out. With few images it is never zero: "floor" is what it would be on average if every
probability were right. One thread.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from guard import Series
from shared import Embedded, read

from ssd_edge.errors import GateRefusedError, InputError
from ssd_edge.run.storage import environment

BINS = 15
SHOTS = (5, 20, 1000)
POINTS = (0, 5, 10, 25, 50)  # taught classes after which the error is measured
MOST_BASE = 25
DRAWS = 100  # of the floor


def calibration_error(shares: np.ndarray, right: np.ndarray) -> float:
    """Return the expected calibration error of probabilities ``(N,)``."""
    bins = np.minimum((shares * BINS).astype(int), BINS - 1)
    return float(np.abs(np.bincount(bins, shares - right, BINS)).sum() / max(len(shares), 1))


def summary(shares: np.ndarray, right: np.ndarray) -> dict[str, float] | None:
    """Return what is reported of a group of images; None without images."""
    if not len(shares):
        return None
    rng = np.random.default_rng(0)
    perfect = [calibration_error(shares, rng.random(len(shares)) < shares) for _ in range(DRAWS)]
    return {
        "ece": calibration_error(shares, right),
        "floor": float(np.mean(perfect)),
        "mean_score": float(shares.mean()),
        "right": float(right.mean()),
        "images": len(shares),
    }


def observe(one: Series) -> dict[str, np.ndarray]:
    """Return what a device answers to the images that are the truth, of all classes that it knows."""
    registry = one.state.registry
    row_of = {name: row for row, name in enumerate(registry.names)}
    images = one.test[one.truth]
    rows = np.array([row_of.get(one.names[label], -1) for label in one.test_labels[one.truth.numpy()]])
    images, rows = images[torch.from_numpy(rows >= 0)], rows[rows >= 0]
    scores = one.state.learner.scores(images)[:, : len(registry)]
    shares, answers = one.state.record.confidence(scores), scores.argmax(1)
    assert shares is not None
    raw = scores.double().softmax(1).amax(1)
    taught = np.array([entry.origin == "device" for entry in registry.entries])
    return {
        "shares": shares.numpy(),
        "raw": raw.numpy(),
        "right": answers.numpy() == rows,
        "accepted": one.state.rejector.accepts(images, answers)[0].numpy(),
        "answered_new": taught[answers.numpy()],
        "shown_new": taught[rows],
    }


def run(data: Embedded, options: dict[str, Any], priors: Any, series: int, learns: int, shots: int) -> dict[str, Any]:
    """Teach classes with `shots` images each; return the errors by the number of taught classes."""
    seen: dict[int, list[dict[str, np.ndarray]]] = defaultdict(list)
    refused = 0
    for number in range(series):
        one = Series(data, options, priors, number, per_class=SHOTS[-1], base=min(len(data.classes) // 2, MOST_BASE))
        for taught in range(min(len(one.new), learns) + 1):
            if taught:
                label = one.new.pop()
                try:
                    one.learn(data.classes[label], one.take(label, shots), taught)
                except (GateRefusedError, InputError) as error:
                    refused += 1
                    print(f"  refused: {error}", flush=True)
            if taught in POINTS:
                seen[taught].append(observe(one))
    found = {}
    for taught, parts in seen.items():
        every = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        yes = np.ones(len(every["right"]), bool)
        groups = {
            "all": yes,
            "answered": every["accepted"],
            "answers of the bundle": ~every["answered_new"],
            "answers taught": every["answered_new"],
            "images of the bundle": ~every["shown_new"],
            "images taught": every["shown_new"],
        }
        found[str(taught)] = {
            "softmax of scores": calibration_error(every["raw"], every["right"]),
            **{name: summary(every["shares"][group], every["right"][group]) for name, group in groups.items()},
        }
        row = "  ".join(
            f"{name} {100 * one['ece']:.1f} (floor {100 * one['floor']:.1f}; says {one['mean_score']:.2f}, right "
            f"{one['right']:.2f})"
            for name, one in found[str(taught)].items()
            if isinstance(one, dict)
        )
        print(f"  {taught} taught: {row}", flush=True)
    return {"refused": refused, "taught": found}


def main() -> None:
    """Print the results, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--backbone", default="lite0", help="as backbone.name")
    parser.add_argument("--learner", nargs="+", default=["slda"])
    parser.add_argument("--series", type=int, default=2)
    parser.add_argument("--learns", type=int, default=25)
    parser.add_argument("--per-class", type=int, default=0, help="training images of each class, at most; 0: all")
    parser.add_argument("--second-view", action="store_true", help="as learner.second_view")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, dataset, embedder = read(args.data, args.backbone, args.per_class, 0, args.second_view)
    written: list[dict[str, Any]] = json.loads(args.json.read_text()) if args.json and args.json.is_file() else []
    command = f"python benchmarks/calibration.py {Path(args.data).name} --series {args.series} --learns {args.learns}"
    command += f" --per-class {args.per_class}" if args.per_class else ""
    command += " --second-view" if args.second_view else ""
    for name in args.learner:
        results, options = {}, {"name": name, **({"second_view": True} if args.second_view else {})}
        for shots in SHOTS:
            print(f"{dataset.name}, {embedder.dim} features, {name}, {shots} images of each new class:", flush=True)
            results[str(shots)] = run(data, options, embedder.priors, args.series, args.learns, shots)
        entry = {"data": dataset.name, "backbone": args.backbone, "features": embedder.dim, "learner": name}
        written.append({"command": command, **environment(), **entry, "images": results})
    if args.json:
        args.json.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
