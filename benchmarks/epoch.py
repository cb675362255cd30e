"""Time epochs of SSD on a task that distils: dense autograd, touched rows in PyTorch, and compiled, side by side.

Usage: [SSD_EDGE_DATA=FOLDER] python benchmarks/epoch.py [--quick] [--json FILE]

Like `ssd-edge bench --full`, on embeddings of CIFAR-10 if SSD_EDGE_DATA has it (classes 2 and 3 of the training images
after 0 and 1; accuracy on test images), otherwise on the clustered Gaussian embeddings of `ssd_edge.run.bench`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

import torch

from ssd_edge.cli.bench import lines
from ssd_edge.learners import Task
from ssd_edge.run import bench


def cifar() -> tuple[Task, Task, Task]:
    """Return embeddings of two tasks of two classes and of their test images."""
    from ssd_edge.backbones.embedder import open_backbone
    from ssd_edge.config import BackboneConfig, DataConfig
    from ssd_edge.data import load
    from ssd_edge.report.terminal import Console
    from ssd_edge.run.embed import embed

    dataset = load(DataConfig(path="cifar10-jpg.tar.xz"), 0)
    embedded = embed(dataset, open_backbone(BackboneConfig(name="tiny"), torch.device("cpu")), Console(), True)

    def task(part: str, labels: torch.Tensor, rows: range) -> Task:
        index = torch.isin(labels, torch.tensor(rows)).nonzero().flatten()
        return Task(torch.from_numpy(embedded[part])[index], labels[index])

    train, test = (torch.from_numpy(labels) for labels in (dataset.train_labels, dataset.test_labels))
    return task("train", train, range(2)), task("train", train, range(2, 4)), task("test", test, range(4))


def main() -> None:
    """Print the table; write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the epochs, and no larger networks")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    real = bool(os.environ.get("SSD_EDGE_DATA"))
    size = dataclasses.replace(bench.FULL, epochs=10, curve=()) if args.quick else bench.FULL
    report = bench.bench(size, lambda text: print(text, file=sys.stderr), cifar() if real else None)
    print("\n".join(lines(report)))
    if args.json:
        about = {
            "command": "python benchmarks/epoch.py" + " --quick" * args.quick,
            "data": "embeddings of CIFAR-10" if real else "clustered Gaussian embeddings",
        }
        args.json.write_text(json.dumps({**about, **report.to_dict()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
