"""Compare closed-form values on the directions of `landmark`: ridge, linear discriminant, and its Gaussian read-out.

Usage: python benchmarks/values.py [--data cifar10-jpg.tar.xz] [--shots 5 20 50 500] [--json FILE]

Requires a data set with a test split. The last class is taught with few images while the others have all of theirs, as
on a device. Printed are the accuracy over all classes and the recall of the new class.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ssd_edge import learners
from ssd_edge.backbones.embedder import open_backbone
from ssd_edge.config import BackboneConfig, DataConfig
from ssd_edge.data import load
from ssd_edge.learners.closed_form.sums import discriminant, ridge
from ssd_edge.report.terminal import Console
from ssd_edge.run.embed import embed
from ssd_edge.run.storage import environment
from ssd_edge.run.train import set_threads


def main() -> None:
    """Print the table; write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10-jpg.tar.xz")
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 20, 50, 500])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    set_threads(0)
    dataset = load(DataConfig(path=args.data), 0)
    embedder = open_backbone(BackboneConfig(name="tiny"), torch.device("cpu"))
    embedded = embed(dataset, embedder, Console(), True)
    train, test = (torch.from_numpy(embedded[part]) for part in ("train", "test"))
    labels, truth = torch.from_numpy(dataset.train_labels), torch.from_numpy(dataset.test_labels)
    last, rows = len(dataset.classes) - 1, []
    learner = learners.build({"name": "landmark"}, embedder.dim, embedder.priors)
    codes = torch.cat([learner.features(part) for part in test.split(4096)]).double()
    print(f"{'new class':>10} {'ridge':>16} {'discriminant':>16} {'landmark':>16}  (accuracy / new class)")
    for shots in [*args.shots, int((labels == last).sum())]:
        few = torch.randperm(int((labels == last).sum()), generator=torch.Generator().manual_seed(0))[:shots]
        index = torch.cat([(labels != last).nonzero().flatten(), (labels == last).nonzero().flatten()[few]])
        learner = learners.build({"name": "landmark"}, embedder.dim, embedder.priors)
        learner.learn(learners.Task(train[index], labels[index]))
        s = learner.statistics
        covariance, freedom = s.within_covariance(), s.degrees_of_freedom
        solutions = {
            "ridge": ridge(s)[:2],
            "discriminant": discriminant(s.means, s.counts, covariance, freedom),
            "landmark": (learner.values.double(), learner.bias.double()),
        }
        row: dict = {"shots": shots}
        for name, (values, bias) in solutions.items():
            answer = (codes @ values + bias).argmax(1)
            row[name] = {
                "accuracy": float((answer == truth).double().mean()),
                "recall": float((answer[truth == last] == last).double().mean()),
            }
        rows.append(row)
        cells = "".join(f" {row[name]['accuracy']:8.3f} / {row[name]['recall']:.3f}" for name in solutions)
        print(f"{shots:10,}{cells}", flush=True)
    if args.json:
        command = f"python benchmarks/values.py --data {args.data}"
        args.json.write_text(json.dumps({"command": command, **environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
