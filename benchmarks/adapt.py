"""Adapt a backbone to one half of the classes, and compare heads on it with those on the backbone as it was.

Usage: python benchmarks/adapt.py DATA [--backbone lite0] [--per-class 0] [--tests 0] [--negative] [--orders 3]
       [--steps 200] [--rate 0.005] [--hold 0] [--validate] [--json FILE]

DATA is what data.path accepts. Each order draws the half, on which the tail of the network is trained; a head (the
default learner) then learns all classes, with features that the half standardises. --negative makes grey negatives of
the images. --validate holds out the last quarter of each class's training images in the order of their files, and uses
no test image. What the trunk gives is cached. A row that is in the file already is not run again. One thread.
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
from tails import Schedule, earliest, features, train, vectors_of

from ssd_edge import files
from ssd_edge.adaptation.tail import Tail, TailState
from ssd_edge.backbones import distilled, names
from ssd_edge.backbones import package as packages
from ssd_edge.backbones.embedder import Embedder, level_standardisation, open_backbone
from ssd_edge.backbones.graph import NetworkGraph
from ssd_edge.backbones.onnx import OnnxEmbedder
from ssd_edge.config import BackboneConfig, DataConfig
from ssd_edge.data import Images, cache, load
from ssd_edge.images import Pixels
from ssd_edge.learners import Task
from ssd_edge.learners.closed_form.slda import SLDA
from ssd_edge.learners.priors import Priors
from ssd_edge.run.storage import environment

GREY = np.array([0.299, 0.587, 0.114], np.float32)
VIEWS = 4


class Negatives(Images):
    """Images as grey negatives."""

    def load(self, indices: Any, form: Pixels) -> np.ndarray:
        """Decode images and invert their brightness."""
        grey = 255 - super().load(indices, form) @ GREY
        return np.repeat(grey[..., None], 3, 3).round().astype(np.uint8)


def graph_of(embedder: Embedder, config: BackboneConfig) -> NetworkGraph:
    """Return the graph of a backbone; that of a package of PyTorch joins levels."""
    if embedder.graph is not None:
        return embedder.graph
    folder = names.package_folder(config)
    assert folder is not None
    network = distilled.from_package(packages.load(folder), 0)
    return distilled.as_graph(network, network.build(), {})


class Data:
    """Vectors of all training images and of test images, and of a package, which has a graph only here, embeddings."""

    def __init__(self, args: argparse.Namespace) -> None:
        config = BackboneConfig(args.backbone)
        embedder = open_backbone(config, torch.device("cpu"))
        data = load(DataConfig(path=args.data, max_per_class=args.per_class), 0)
        graph, self.name, self.classes = graph_of(embedder, config), data.name, len(data.classes)
        train, test, self.labels, self.truth = data.train, data.test, data.train_labels, data.test_labels
        if args.tests and args.tests < len(test):
            chosen = np.sort(np.random.default_rng(0).permutation(len(test))[: args.tests])
            test, self.truth = test.take(chosen), self.truth[chosen]
        if args.negative:
            train, test = (Negatives(part._items, part.names) for part in (train, test))
        self.cut, self.widths = earliest(graph), OnnxEmbedder(graph).widths
        key = {"adapt": graph.identity, "data": data.fingerprint, "tests": args.tests, "negative": args.negative}
        found = cache.embeddings(
            {**key, "version": 1},
            lambda: {
                "train": vectors_of(self.cut, graph, train, VIEWS),
                "test": vectors_of(self.cut, graph, test, 1)[0],
            },
        )
        self.train, self.test = found["train"], found["test"]
        self.priors, self.package = embedder.priors, None
        if embedder.graph is None:
            self.package = [
                np.concatenate([embedder.embed(part) for part in images.batches(embedder.pixels)])
                for images in (train, test)
            ]


def judged(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, truth: np.ndarray, half: np.ndarray, priors: Priors
) -> dict[str, float]:
    """Return the accuracy of a head on all classes, on the half and on the later ones."""
    head = SLDA(train.shape[1], SLDA.Settings(), priors)
    head.learn(Task(torch.from_numpy(train.astype(np.float32)), torch.from_numpy(labels)))
    right = head.predict(torch.from_numpy(test.astype(np.float32))).numpy() == truth
    shares = {"all": right, "half": right[half[truth]], "later": right[~half[truth]]}
    return {name: round(float(part.mean()), 4) for name, part in shares.items()}


def one(data: Data, order: int, schedule: Schedule, validate: bool) -> dict[str, Any]:
    """Return the accuracies of one order."""
    labels, kept, held = data.labels, np.arange(len(data.labels)), None
    half = np.zeros(data.classes, bool)
    half[np.random.default_rng(1000 + order).permutation(data.classes)[: data.classes // 2]] = True
    if validate:
        members = [np.flatnonzero(labels == label) for label in range(data.classes)]
        held = np.sort(np.concatenate([part[len(part) - len(part) // 4 :] for part in members]))
        kept = np.setdiff1d(kept, held)
    own, truth = kept[half[labels[kept]]], data.truth if held is None else labels[held]
    began = time.monotonic()
    state = train(data.cut.tail, data.train, own, labels[own], data.widths, schedule)
    found: dict[str, Any] = {"order": order, "images": len(own), "seconds": round(time.monotonic() - began)}

    def judge(tail: TailState) -> dict[str, float]:
        ready = Tail(tail)
        seen = features(ready, data.train[0])
        tested = features(ready, data.test) if held is None else seen[held]
        mu, sigma = level_standardisation(seen[own], data.widths)
        return judged((seen[kept] - mu) / sigma, labels[kept], (tested - mu) / sigma, truth, half, Priors())

    found |= {"frozen": judge(data.cut.tail), "adapted": judge(state)}
    if data.package:
        seen, tested = data.package
        tested = tested if held is None else seen[held]
        found["package"] = judged(seen[kept], labels[kept], tested, truth, half, data.priors)
    return found


def main() -> None:
    """Print the accuracies, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--backbone", default="lite0")
    parser.add_argument("--per-class", type=int, default=0)
    parser.add_argument("--tests", type=int, default=0)
    parser.add_argument("--negative", action="store_true")
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--steps", type=int, default=Schedule.steps)
    parser.add_argument("--rate", type=float, default=Schedule.rate)
    parser.add_argument("--hold", type=float, default=Schedule.hold)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = Data(args)
    schedule = Schedule(steps=args.steps, rate=args.rate, hold=args.hold)
    case = {"data": data.name, "backbone": args.backbone, "per_class": args.per_class, "negative": args.negative}
    case |= {"tests": args.tests, "validate": args.validate, "at": str(data.cut.place), **dataclasses.asdict(schedule)}
    result: dict[str, Any] = {**environment(), "rows": []}
    for order in range(args.orders):
        if args.json and args.json.exists():  # another process may have added rows
            result = json.loads(args.json.read_text(encoding="utf-8"))
        if any(row["case"] == case and row["order"] == order for row in result["rows"]):
            continue
        row = {"case": case, **one(data, order, schedule, args.validate)}
        print(json.dumps(row), flush=True)
        if args.json:
            if args.json.exists():
                result = json.loads(args.json.read_text(encoding="utf-8"))
            result["rows"].append(row)
            files.write_json(args.json, result)


if __name__ == "__main__":
    main()
