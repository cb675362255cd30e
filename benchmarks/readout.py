"""Measure whether SDMLP and SSD forget in the keys or in the head, on Split CIFAR-10 (5 tasks of 2 classes).

Usage: SSD_EDGE_DATA=FOLDER python benchmarks/readout.py [--json FILE] [--order N]

After the five tasks the trained values are replaced by closed-form ones (a linear discriminant on the sparse code, from
all training data). The accuracy of that head is what the final keys still represent; the difference to the trained head
was lost in the head. The same head on the keys before the first task is the starting point, and an SDMLP trained on all
classes at once is the upper bound. Accuracy is on held-out training images; one thread.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from split import TASKS, embeddings, protocol

from ssd_edge import learners
from ssd_edge.backbones.embedder import open_backbone
from ssd_edge.config import BackboneConfig
from ssd_edge.learners.closed_form.discriminant import Discriminant
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.run.storage import environment

JOINT = "SDMLP, all classes at once"
SYSTEMS: dict[str, dict[str, Any]] = {
    "SDMLP": {"name": "sdmlp"},
    "SDMLP+EWC": {"name": "sdmlp", "penalty": "ewc"},
    "SSD": {"name": "ssd", "top_n": "100"},
    "SSD+EWC": {"name": "ssd", "top_n": "100", "penalty": "ewc"},
    JOINT: {"name": "sdmlp"},
}


def readout(learner: learners.Learner, train: tuple, test: tuple) -> float:
    """Return the accuracy of a discriminant on the activations of the learner's current keys."""
    net, statistics = learner.net, ClassStatistics(len(learner.net.keys))

    def code(vectors: torch.Tensor) -> torch.Tensor:
        return net.activate(learner.prepared(vectors)).to_dense()

    vectors, rows = train
    for part, truth in zip(vectors.split(4096), rows.split(4096), strict=True):
        statistics.add(code(part), truth)
    covariance, freedom = statistics.within_covariance(), statistics.degrees_of_freedom
    values, bias = Discriminant.fit(covariance, freedom).weights(statistics.means, statistics.counts)
    vectors, rows = test
    return float(((code(vectors).double() @ values + bias).argmax(1) == rows).double().mean())


def main() -> None:
    """Print one line per system; write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--order", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    embedder = open_backbone(BackboneConfig(name="tiny"), torch.device("cpu"))
    vectors, labels = embeddings("cifar10-jpg.tar.xz", embedder)
    train, held_out, row = protocol(labels, args.order)
    given, test = (vectors[train], row[train]), (vectors[held_out], row[held_out])
    rows = []
    for name, options in SYSTEMS.items():
        learner = learners.build(options, vectors.shape[1], embedder.priors, args.order)
        learner.expect(10)
        before = readout(learner, given, test)
        parts = [train] if name == JOINT else [train[row[train] // 2 == task] for task in range(TASKS)]
        for index in parts:
            learner.learn(learners.Task(vectors[index], row[index]))
        own = float((learner.predict(test[0]) == test[1]).double().mean())
        after = readout(learner, given, test)
        rows.append({"system": name, "own_head": own, "closed_form_head": after, "keys_before": before})
        print(f"{name:26} own head {own:.3f}  closed-form head {after:.3f}  on the first keys {before:.3f}", flush=True)
    if args.json:
        command = f"python benchmarks/readout.py --order {args.order}"
        args.json.write_text(json.dumps({"command": command, **environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
