"""Measure the effect of each part of `landmark`: response of the neurons, source of the keys, number of directions.

Usage: python benchmarks/directions.py [--json FILE]

Needs cifar10-jpg.tar.xz and tiny-imagenet32-jpg.tar.xz under $SSD_EDGE_DATA. Accuracy is measured on 10,000 held-out
training images of CIFAR-10 after learning the other 40,000 (all, or 5, 20 and 100 per class: mean of five draws). Test
images are not used. The constants of `landmark` were chosen on the same images.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from ssd_edge import learners
from ssd_edge.backbones import landmarks as made_from
from ssd_edge.backbones.embedder import open_backbone
from ssd_edge.config import BackboneConfig, DataConfig
from ssd_edge.data import load
from ssd_edge.learners.base import Task
from ssd_edge.learners.closed_form import landmark as default
from ssd_edge.learners.priors import Priors
from ssd_edge.report.terminal import Console
from ssd_edge.run.embed import embed
from ssd_edge.run.storage import environment
from ssd_edge.run.train import set_threads

SHOTS, DRAWS, HELD_OUT = (5, 20, 100, 0), 5, 10_000
Response = Callable[[Tensor, float], Tensor]


def top_k(share: float) -> Response:
    """Return Top-K inhibition by subtraction, as in SDMLP, which keeps the largest `share` of each sample's cosines."""

    def respond(cosines: Tensor, gain: float) -> Tensor:
        left = cosines.shape[1] - max(1, round(share * cosines.shape[1]))
        return (cosines - cosines.kthvalue(left, dim=1, keepdim=True).values).clamp_min(0)

    return respond


def relu(cosines: Tensor, gain: float) -> Tensor:
    """Apply ReLU, the response of random-projection ridge."""
    return cosines.clamp_min(0)


@contextlib.contextmanager
def answering(respond: Response | None) -> Iterator[None]:
    """Replace the response of the neurons, both where landmarks are made and where they are used."""
    with contextlib.ExitStack() as stack:
        if respond is not None:
            for module in (made_from, default):
                stack.enter_context(mock.patch.object(module, "respond", respond))
        yield


def shots_of(labels: Tensor, count: int, draw: int) -> Tensor:
    """Return indices of `count` samples per class, 0 for all."""
    if not count:
        return torch.arange(len(labels))
    generator = torch.Generator().manual_seed(draw)
    own = [(labels == row).nonzero().flatten() for row in labels.unique()]
    return torch.cat([one[torch.randperm(len(one), generator=generator)[:count]] for one in own])


def main() -> None:
    """Print the table, and write it as JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    set_threads(0)
    embedder = open_backbone(BackboneConfig(name="tiny"), torch.device("cpu"))

    def read(name: str) -> tuple[Tensor, Tensor]:
        dataset = load(DataConfig(path=name), 0)
        return torch.from_numpy(embed(dataset, embedder, Console(), True)["train"]), torch.from_numpy(
            dataset.train_labels
        )

    (old, old_labels), (embeddings, labels) = read("tiny-imagenet32-jpg.tar.xz"), read("cifar10-jpg.tar.xz")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(7))
    held, kept = order[:HELD_OUT], order[HELD_OUT:]
    rows = []

    def judge(name: str, priors: Priors, respond: Response | None = None, **settings: object) -> None:
        row: dict = {"variant": name}
        for shots in SHOTS:
            right = []
            for draw in range(DRAWS if shots else 1):
                learner = learners.build({"name": "landmark", **settings}, embedder.dim, priors)
                index = kept[shots_of(labels[kept], shots, draw)]
                with answering(respond):
                    learner.learn(Task(embeddings[index], labels[index]))
                    right.append(float((learner.predict(embeddings[held]) == labels[held]).double().mean()))
            row[str(shots)] = statistics.fmean(right)
        row["state_bytes"] = learner.memory_bytes()
        rows.append(row)
        print(f"{name:44}" + "".join(f" {row[str(shots)]:8.4f}" for shots in SHOTS), flush=True)

    def priors_of(directions: int, respond: Response | None = None, neurons: int = 1500) -> Priors:
        with answering(respond):
            made = made_from.make_landmarks(old, old_labels, 200, neurons, directions, 0, lambda line: None)
        return Priors(landmarks=made)

    print(f"{'':44}" + "".join(f" {shots or 'all':>8}" for shots in SHOTS))
    judge("as shipped", embedder.priors)
    judge("random keys, no directions", Priors(), keys="random")
    for name, respond in (("ReLU", relu), *((f"Top-K, k = {share:g} r", top_k(share)) for share in (0.5, 0.33, 0.1))):
        judge(f"response: {name}", priors_of(900, respond), respond)
    judge("no weight on pretraining's spread", embedder.priors, prior_weight=1.0)
    for directions in (150, 300, 600, 1250, 1900):
        judge(f"{directions:,} directions of 2,500 neurons", priors_of(directions, neurons=2500))
    if args.json:
        command = "python benchmarks/directions.py"
        args.json.write_text(json.dumps({"command": command, **environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
