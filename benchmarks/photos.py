"""Follow photographs from the workstation to a device: accuracy, forgetting, `unknown`, time, memory and bytes.

Usage: python benchmarks/photos.py DATA [--new 10] [--images 5 20 0] [--precisions fp32 fp16 int8] [--json FILE]

DATA is what data.path accepts, with a test split of its own. --new classes are withheld (drawn by seed 0); a run learns
the others with default settings and is deployed. Before a class is taught, its test images tell how well `unknown`
works. Each new class is then taught by `Device.learn` with few images (0: all), starting from the installed bundle each
time; accuracy is measured on test images, `unknown` counted as wrong. At the end five of them are taught one after
another, in this process and by one `ssd-edge device learn` each. Times are those of an otherwise idle machine only if
the recorded load is small.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from shared import auroc

import ssd_edge
from device_runtime.device import Device
from device_runtime.install.bundle import install
from exporters.deploy import Options, deploy
from ssd_edge.config import DataConfig
from ssd_edge.data import Dataset, load
from ssd_edge.errors import GateRefusedError
from ssd_edge.learners.registry import LEARNERS
from ssd_edge.run.storage import environment

SEQUENCE, FEW = 5, 20
LATENCY = 60  # images, one at a time
CHILD = """
import json, sys, time
from device_runtime import Device
from ssd_edge.system import MIB, resident
device = Device.open(sys.argv[1])
paths = sys.argv[3:]
device.predict(paths[:3])
times = []
for path in paths:
    began = time.perf_counter()
    device.predict([path])
    times.append(time.perf_counter() - began)
learned = device.learn(sys.argv[2], paths[:20]) if sys.argv[2] else None
times.sort()
print(json.dumps({
    "milliseconds": 1000 * times[len(times) // 2],
    "learn_seconds": learned and learned.seconds,
    "peak_mb": resident("VmHWM") / MIB,
}))
"""


class Photos:
    """Photographs of the data set as arrays and files, and their embeddings on a device."""

    def __init__(self, dataset: Dataset, device: Device, scratch: Path) -> None:
        self.dataset, self.scratch, form = dataset, scratch, device.bundle.pixels
        self.names = np.array(dataset.classes, object)
        self.truth = self.names[dataset.test_labels]
        self.form = form
        pixels = (part for part in dataset.test.batches(form, 256))
        self.vectors = torch.cat([device.embed(list(part)) for part in pixels])

    def train(self, name: str, count: int) -> list[np.ndarray]:
        """Return `count` training images of a class as arrays; 0: all."""
        own = np.flatnonzero(self.dataset.train_labels == self.dataset.classes.index(name))
        return list(self.dataset.train.load(np.random.default_rng(0).permutation(own)[: count or None], self.form))

    def files(self, name: str, count: int) -> list[Path]:
        """Write training images of a class as PNG files and return their paths."""
        folder = self.scratch / "photos" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, pixels in enumerate(self.train(name, count)):
            Image.fromarray(pixels).save(folder / f"{number:03}.png")
        return sorted(folder.iterdir())

    def answers(self, device: Device) -> tuple[np.ndarray, np.ndarray]:
        """Return the nearest class of every test image, and by how much it is accepted."""
        rows = device.learner.predict(self.vectors)
        return np.array(device.classes, object)[rows.numpy()], device.state.rejector.accepts(self.vectors, rows)[
            1
        ].numpy()


def teach(device: Device, photos: Photos, new: list[str], counts: list[int]) -> list[dict[str, Any]]:
    """Teach each new class alone, with each number of images."""
    old = ~np.isin(photos.truth, new)
    nearest, margins = photos.answers(device)
    before = {
        "nearest": float((nearest == photos.truth)[old].mean()),
        "answered": float(((nearest == photos.truth) & (margins >= 0))[old].mean()),
    }
    rows = []
    for count in counts:
        results: dict[str, list[float]] = {}
        refused = []
        for name in new:
            own = photos.truth == name
            try:
                learned = device.learn(name, photos.train(name, count))
            except GateRefusedError as error:
                refused.append(f"{name}: {error}"[:200])
                continue
            nearest, margins = photos.answers(device)
            right = nearest == photos.truth
            row = torch.full((int(own.sum()),), device.classes.index(name))
            passed = device.state.rejector.accepts(photos.vectors[torch.from_numpy(own)], row)[0].double().mean()
            for key, value in {
                "new_nearest": right[own].mean(),
                "new_answered": (right & (margins >= 0))[own].mean(),
                "new_passes": passed,
                "old_nearest": right[old].mean(),
                "old_answered": (right & (margins >= 0))[old].mean(),
                "seconds": learned.seconds,
            }.items():
                results.setdefault(key, []).append(float(value))
            device.rollback()
        means = {key: statistics.fmean(values) for key, values in results.items()}
        rows.append(
            {"images": count, "classes": len(new) - len(refused), "refused": refused, "before": before, **means}
        )
        print(json.dumps(rows[-1], indent=1), flush=True)
    return rows


def child(root: Path, label: str, files: list[Path]) -> dict[str, Any]:
    """Predict one image at a time, and learn, in a process of its own."""
    command = [sys.executable, "-c", CHILD, str(root), label, *map(str, files)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    """Print the results, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--new", type=int, default=10)
    parser.add_argument("--images", type=int, nargs="+", default=[5, 20, 0])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "fp16", "int8"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dataset = load(DataConfig(path=args.data), 0)
    new = [dataset.classes[label] for label in np.random.default_rng(0).permutation(len(dataset.classes))[: args.new]]
    found: dict[str, Any] = {"data": dataset.name, "classes": len(dataset.classes), "new": new, "bundles": {}}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        settings = {"panel": False, "baselines": False, "out": scratch / "runs", "progress": False}
        run = ssd_edge.train(args.data, **settings, **{"data.exclude": new})
        found["run"] = {"accuracy": run.metrics["average_accuracy"], "learner": LEARNERS[run.learner.name].display}
        for precision in args.precisions:
            path, began = scratch / f"{precision}.ssdedge", time.monotonic()
            try:
                deploy(run.folder, Options("jetson", precision=precision), path, lambda text: None)
            except GateRefusedError as error:
                found["bundles"][precision] = {"refused": str(error)}
                print(precision, error, flush=True)
                continue
            root = scratch / precision
            install(root, path)
            some = list(
                dataset.test.load(np.arange(LATENCY) * len(dataset.test) // LATENCY, Device.open(root).bundle.pixels)
            )
            paths = []
            for number, pixels in enumerate(some):
                paths.append(scratch / f"{number:03}.png")
                Image.fromarray(pixels).save(paths[-1])
            found["bundles"][precision] = {
                "bytes": path.stat().st_size,
                "deploy_seconds": time.monotonic() - began,
                **child(root, "", paths),
            }
            print(precision, found["bundles"][precision], flush=True)
        root = scratch / args.precisions[0]
        device = Device.open(root)
        photos = Photos(dataset, device, scratch)
        nearest, margins = photos.answers(device)
        unseen = np.isin(photos.truth, new)
        found["unseen"] = {
            "auroc": auroc(margins[~unseen], margins[unseen]),
            "unseen_answered": float((margins >= 0)[unseen].mean()),
            "known_answered": float((margins >= 0)[~unseen].mean()),
        }
        print(found["unseen"], flush=True)
        found["taught"] = teach(device, photos, new, args.images)
        load_before = os.getloadavg()[0]
        found["child"] = child(root, "first", photos.files(new[0], FEW))
        Device.open(root).rollback()
        steps = []
        for name in new[:SEQUENCE]:
            files, began = photos.files(name, FEW), time.monotonic()
            command = [
                sys.executable,
                "-m",
                "ssd_edge",
                "device",
                "learn",
                "--root",
                root,
                "--label",
                name,
                *files,
                "--json",
            ]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
            steps.append({"label": name, "wall": time.monotonic() - began, "code": done.returncode})
        device = Device.open(root)
        nearest, margins = photos.answers(device)
        right, taught = (nearest == photos.truth) & (margins >= 0), np.isin(photos.truth, new[:SEQUENCE])
        found["sequence"] = {
            "steps": steps,
            "load": load_before,
            "old_answered": float(right[~unseen].mean()),
            "new_answered": float(right[taught].mean()),
        }
        print(json.dumps(found["sequence"], indent=1))
    if args.json:
        command_line = f"python benchmarks/photos.py {Path(args.data).name} --new {args.new}"
        args.json.write_text(json.dumps({"command": command_line, **environment(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
