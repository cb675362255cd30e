"""Learn two new classes from 50 images each with `ssd` and 10,000 neurons: seconds and accuracy by epochs.

Usage: SSD_EDGE_DATA=FOLDER python benchmarks/few.py [--json FILE]

As on a device, embeddings are given, the two earlier classes had 5,000 images each, and epochs are compiled. Accuracy
is over the test images of all four classes, for two draws of the 50 images.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from epoch import cifar

from ssd_edge import learners
from ssd_edge.learners.priors import Priors
from ssd_edge.run import bench
from ssd_edge.run.storage import environment

IMAGES, DRAWS, EPOCHS = 50, 2, (40, 200, 500, 1000, 2000)
OPTIONS = {"name": "ssd", "neurons": 10_000, "inhibition": "subtract", "engine": "compiled", "lr": 0.5}


def learner(epochs: int) -> learners.Learner:
    """Return a new learner for ten announced classes."""
    made = learners.build({**OPTIONS, "epochs": epochs}, bench.DIM, Priors())
    made.expect(bench.CLASSES)
    return made


def main() -> None:
    """Print the table; write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    first, second, test = cifar()
    bench.warm_up()
    before = learner(40)
    before.learn(first)
    state, rows = before.state_dict(), []
    classes = second.labels.unique().tolist()
    for epochs in EPOCHS:
        row: dict = {"epochs": epochs, "seconds": [], "accuracy": []}
        for draw in range(DRAWS):
            generator = torch.Generator().manual_seed(draw)
            of = [(second.labels == one).nonzero().flatten() for one in classes]
            index = torch.cat([own[torch.randperm(len(own), generator=generator)[:IMAGES]] for own in of])
            device = learner(epochs)
            device.load_state_dict(state)
            began = time.perf_counter()
            device.learn(learners.Task(second.embeddings[index], second.labels[index]))
            row["seconds"].append(time.perf_counter() - began)
            row["accuracy"].append(float((device.predict(test.embeddings) == test.labels).double().mean()))
        rows.append(row)
        print(f"{epochs:6,} epochs  {max(row['seconds']):6.2f} s  {row['accuracy']}", flush=True)
    if args.json:
        found = {"command": "python benchmarks/few.py", **environment(), "rows": rows}
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
