"""Teach a device the tenth class of CIFAR-10 from few images, and measure accuracy, forgetting and time.

Usage: SSD_EDGE_DATA=FOLDER python benchmarks/device.py RUN [--images 5 20 100 500] [--json FILE]

RUN is a finished run on the other nine classes (examples/cifar10.yaml). Each row starts from the installed bundle.
Accuracy is measured on all test images, none of which are used for learning. The seconds are those of `learn` in a
running process: embedding, training with and without the held-out images, the retention estimate and the commit.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from device_runtime.device import Device
from device_runtime.install.bundle import install
from exporters.deploy import Options, deploy
from ssd_edge.config import DataConfig
from ssd_edge.data import load
from ssd_edge.run import storage
from ssd_edge.run.train import set_threads

NEW = "truck"


def main() -> None:
    """Print the table, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, nargs="+", default=[5, 20, 100, 500])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    set_threads(0)
    dataset = load(DataConfig(path="cifar10-jpg.tar.xz"), 0)
    new = dataset.classes.index(NEW)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "robot.ssdedge"
        deploy(args.run, Options("jetson"), bundle, lambda text: None)
        install(Path(scratch) / "root", bundle)
        device = Device.open(Path(scratch) / "root")
        form = device.bundle.pixels
        test = device.embed(list(dataset.test.load(np.arange(len(dataset.test)), form)))
        labels = np.array([dataset.classes[label] for label in dataset.test_labels])
        old = dataset.test_labels != new

        def accuracy(which: np.ndarray) -> float:
            answers = np.array(device.classes)[device.learner.predict(test[which]).numpy()]
            return float((answers == labels[which]).mean())

        before = accuracy(old)
        new_images = np.flatnonzero(dataset.train_labels == new)
        device.learn("warm-up", list(dataset.train.load(new_images[:3], form)))  # the first call starts thread pools
        device.rollback(1)
        print(f"{'images':>7} {'new class':>10} {'old before':>11} {'old after':>10} {'estimated':>18} {'seconds':>8}")
        for count in args.images:
            chosen = np.random.default_rng(0).permutation(new_images)[:count]
            result = device.learn(NEW, list(dataset.train.load(chosen, form)))
            row = {
                "images": count,
                "new_accuracy": accuracy(~old),
                "old_accuracy": {"before": before, "after": accuracy(old)},
                "estimate": result.old_classes.to_dict(),
                "held_out": result.held_out.to_dict(),
                "seconds": result.seconds,
            }
            rows.append(row)
            estimate = f"{row['estimate']['accuracy_before']:.3f} -> {row['estimate']['accuracy_after']:.3f}"
            print(
                f"{count:7} {row['new_accuracy']:10.3f} {before:11.3f} {row['old_accuracy']['after']:10.3f} "
                f"{estimate:>18} {row['seconds']:8.2f}",
                flush=True,
            )
            device.rollback(1)
    if args.json:
        command = "python benchmarks/device.py RUN (RUN: ssd-edge train --config examples/cifar10.yaml)"
        args.json.write_text(json.dumps({"command": command, **storage.environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
