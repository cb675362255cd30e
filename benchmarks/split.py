"""Compare settings of any learner on Split CIFAR-10 (5 tasks of 2 classes), on held-out training images.

Usage: SSD_EDGE_DATA=FOLDER python benchmarks/split.py [--json FILE] [--order N] SETTINGS...

SETTINGS is a comma-separated list, e.g. name=sdmlp,lr=0.5,epochs=40. The extra key keys_shift pretrains SDMLP keys for
that input shift first (on Tiny-ImageNet-32, like the shipped keys); without it the shipped keys are used. A seeded
fifth of the training images is held out for measuring; test images are not used. One thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ssd_edge import learners
from ssd_edge.backbones.embedder import open_backbone
from ssd_edge.backbones.keys import pretrain_student
from ssd_edge.config import BackboneConfig, DataConfig, StudentConfig
from ssd_edge.data import load
from ssd_edge.learners.priors import Priors
from ssd_edge.report.terminal import Console
from ssd_edge.run import metrics
from ssd_edge.run.embed import embed
from ssd_edge.run.storage import environment

TASKS = 5


def embeddings(name: str, embedder: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the training embeddings and labels of a data set."""
    dataset = load(DataConfig(path=name), 0)
    return torch.from_numpy(embed(dataset, embedder, Console(), True)["train"]), torch.from_numpy(dataset.train_labels)


def keys_for(shift: float, embedder: Any) -> Priors:
    """Return the priors with SDMLP keys pretrained for another input shift."""
    vectors, labels = embeddings("tiny-imagenet32-jpg.tar.xz", embedder)
    config = StudentConfig(shift=shift)
    keys, counters, switch, _ = pretrain_student(vectors, labels, int(labels.max()) + 1, config, 0, lambda text: None)
    student = {**embedder.priors.student, "shift": shift, "switch": switch}
    return dataclasses.replace(embedder.priors, keys=keys.numpy(), counters=counters.numpy(), student=student)


def protocol(labels: torch.Tensor, order: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return indices of the training and held-out samples, and the learner row of every label in this class order."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))
    row = torch.from_numpy(np.argsort(np.random.default_rng(order).permutation(10)))[labels]
    return shuffled[len(labels) // 5 :], shuffled[: len(labels) // 5], row


def accuracies(learner: learners.Learner, vectors: torch.Tensor, row: torch.Tensor, task: int) -> list[float | None]:
    """Return the accuracy on held-out samples of each task after learning `task`; None for later ones."""
    right, of = learner.predict(vectors) == row, row // 2
    return [float(right[of == other].double().mean()) if other <= task else None for other in range(TASKS)]


def run(options: dict[str, Any], priors: Priors, vectors: torch.Tensor, labels: torch.Tensor, order: int) -> dict:
    """Train one learner on the five tasks and return its metrics."""
    train, held_out, row = protocol(labels, order)
    learner = learners.build(options, vectors.shape[1], priors, order)
    learner.expect(10)
    began, matrix = time.perf_counter(), []
    for task in range(TASKS):
        index = train[row[train] // 2 == task]
        learner.learn(learners.Task(vectors[index], row[index]))
        matrix.append(accuracies(learner, vectors[held_out], row[held_out], task))
    return {**metrics.summary(matrix).to_dict(), "seconds": time.perf_counter() - began}


def main() -> None:
    """Print one line per setting; write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+")
    parser.add_argument("--order", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    embedder = open_backbone(BackboneConfig(name="tiny"), torch.device("cpu"))
    vectors, labels = embeddings("cifar10-jpg.tar.xz", embedder)
    rows = []
    for text in args.settings:
        options = {key: yaml.safe_load(value) for key, _, value in (part.partition("=") for part in text.split(","))}
        shift = options.pop("keys_shift", None)
        priors = embedder.priors if shift is None else keys_for(float(shift), embedder)
        result = run(options, priors, vectors, labels, args.order)
        rows.append({"settings": text, "order": args.order, **result})
        print(
            f"{text:60} accuracy {result['average_accuracy']:.3f}  BWT {result['backward_transfer']:+.3f}  "
            f"just learned {result['learning_accuracy']:.3f}  {result['seconds']:.0f} s",
            flush=True,
        )
    if args.json:
        command = "python benchmarks/split.py SETTINGS"
        args.json.write_text(json.dumps({"command": command, **environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
