"""Compare a device that forgot a class with one that was never taught it.

Usage: python benchmarks/forget.py DATA [--backbone lite0] [--learner slda] [--classes 10] [--json FILE]

DATA is what data.path accepts. The learner is taught all training images; then each of some classes (drawn by seed 0)
is removed from it, and the answers to the test images of the other classes are compared with those of a learner that
was taught only these. One thread.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared import Embedded, read

from ssd_edge import learners
from ssd_edge.backbones.embedder import level_standardisation
from ssd_edge.learners.priors import Priors
from ssd_edge.run.storage import environment


def compare(data: Embedded, learner: str, priors: Priors, count: int) -> dict[str, Any]:
    """Return the share of equal answers and both accuracies, means over forgotten classes."""
    mu, sigma = map(torch.from_numpy, level_standardisation(data.train.numpy(), data.widths))
    train, test = ((part if data.standardised else (part - mu) / sigma).float() for part in (data.train, data.test))
    labels, answers = torch.from_numpy(data.train_labels), torch.from_numpy(data.test_labels)

    def taught(kept: torch.Tensor) -> learners.Learner:
        made = learners.build({"name": learner}, train.shape[1], priors, 0)
        made.learn(learners.Task(train[kept], labels[kept]))
        return made

    whole, found = taught(labels >= 0), []
    for label in np.random.default_rng(0).permutation(len(data.classes))[:count].tolist():
        forgot = copy.deepcopy(whole)
        exact = forgot.remove(label, approximately=True)
        others = answers != label
        after, never = forgot.predict(test[others]), taught(labels != label).predict(test[others])
        right = [float((one == answers[others]).double().mean()) for one in (after, never)]
        row = {"class": data.classes[label], "exact": exact, "same": float((after == never).double().mean())}
        found.append({**row, "accuracy": right[0], "accuracy_never": right[1]})
        print(found[-1], flush=True)
    return {
        "same": float(np.mean([row["same"] for row in found])),
        "least_same": min(row["same"] for row in found),
        "accuracy_differs_most": max(abs(row["accuracy"] - row["accuracy_never"]) for row in found),
        "classes": found,
    }


def main() -> None:
    """Print the results, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--backbone", default="lite0", help="what backbone.name accepts")
    parser.add_argument("--learner", default="slda")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, dataset, embedder = read(args.data, args.backbone, 0, 0)
    found = compare(data, args.learner, embedder.priors, args.classes)
    print({key: value for key, value in found.items() if key != "classes"})
    if args.json:
        facts = {"data": dataset.name, "features": embedder.dim, "learner": args.learner}
        command = f"python benchmarks/forget.py {Path(args.data).name} --classes {args.classes}"
        args.json.write_text(json.dumps({"command": command, **environment(), **facts, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
