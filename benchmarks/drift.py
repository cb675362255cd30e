"""Indices of the drift monitor on shifted images, and its false alarms on clean ones.

Usage: SSD_EDGE_DATA=FOLDER python benchmarks/drift.py RUN [--json FILE]

RUN is a finished run on nine classes of CIFAR-10 (examples/cifar10.yaml) with the class statistics of a device.
Its test images are shifted before they are embedded, then fed to `Monitor` in random order:
- `WINDOW` clean images followed by n shifted ones, for both indices;
- shifted images from the start, which only the directions can detect.
Indices are means over `DRAWS` random draws. A false alarm is one of `CLEAN_DRAWS` draws of clean images whose level is
not stable.
"""

from __future__ import annotations

import argparse
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from device_runtime.service.drift import DRIFTED, MODERATE, WINDOW, DriftReport, Monitor, Reference
from ssd_edge.backbones.embedder import Embedder, open_backbone
from ssd_edge.config import BackboneConfig, DataConfig
from ssd_edge.data import Dataset, load
from ssd_edge.images import Pixels
from ssd_edge.learners.unknown import Rejector
from ssd_edge.report.terminal import Console
from ssd_edge.run import finished
from ssd_edge.run.embed import embed
from ssd_edge.run.storage import environment
from ssd_edge.run.train import set_threads

SHIFTED = 2000  # number of shifted images
DRAWS, CLEAN_DRAWS = 20, 2000
IMAGES = (300, 600, 1000)
ALARMS = (300, 1000)

Shift = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _each(change: Callable[[Image.Image], Image.Image]) -> Shift:
    return lambda pixels, rng: np.stack([np.asarray(change(Image.fromarray(one))) for one in pixels])


def _compressed(quality: int) -> Shift:
    def change(image: Image.Image) -> Image.Image:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        return Image.open(io.BytesIO(out.getvalue())).convert("RGB")

    return _each(change)


def _noisy(sigma: float) -> Shift:
    return lambda pixels, rng: np.clip(pixels + rng.normal(0, sigma, pixels.shape), 0, 255).astype(np.uint8)


def _darker(share: float) -> Shift:
    return lambda pixels, rng: (pixels * share).astype(np.uint8)


SHIFTS: dict[str, Shift] = {
    "blur, radius 0.5": _each(lambda image: image.filter(ImageFilter.GaussianBlur(0.5))),
    "blur, radius 1": _each(lambda image: image.filter(ImageFilter.GaussianBlur(1))),
    "three quarters as bright": _darker(0.75),
    "half as bright": _darker(0.5),
    "a quarter as bright": _darker(0.25),
    "noise, σ 5": _noisy(5),
    "noise, σ 15": _noisy(15),
    "JPEG, quality 75": _compressed(75),
    "JPEG, quality 30": _compressed(30),
    "red and blue swapped": lambda pixels, rng: pixels[..., ::-1],
    "upside down": lambda pixels, rng: pixels[:, ::-1],
}


class Box:
    """Reference, learner and rejector of a device with the run."""

    def __init__(self, run: Path) -> None:
        trained = finished.read(run)
        self.names, self.learner = trained.registry.names, trained.learner
        self.reference, self.rejector = Reference(trained.statistics), Rejector.fit(trained.statistics)

    def seen(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the embeddings, their scores and whether each is accepted as known."""
        shares = torch.cat([self.learner.scores(part) for part in vectors.split(4096)])[:, : len(self.names)].softmax(1)
        best, rows = shares.max(1)
        return vectors, best, self.rejector.accepts(vectors, rows)[0]

    def report(self, *parts: tuple[tuple[Tensor, Tensor, Tensor], np.ndarray]) -> DriftReport:
        """Return the report of a monitor after these images, one part after the other."""
        monitor = Monitor(self.reference)
        for seen, chosen in parts:
            monitor.add(*(array[torch.from_numpy(chosen)] for array in seen))
        return monitor.report()


def embedded(data: Dataset, kept: np.ndarray, embedder: Embedder, shift: Shift | None = None) -> Tensor:
    """Return the embeddings of shifted test images."""
    rng = np.random.default_rng(0)
    parts = []
    for some in np.array_split(kept, -(-len(kept) // 256)):
        pixels = data.test.load(some, Pixels(32))
        if shift is not None:
            pixels = shift(pixels, rng)
        if embedder.pixels.size != 32:
            size = (embedder.pixels.size, embedder.pixels.size)
            pixels = np.stack(
                [np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BICUBIC)) for one in pixels]
            )
        parts.append(torch.from_numpy(embedder.embed(np.ascontiguousarray(pixels))))
    return torch.cat(parts)


def index_of(box: Box, clean: tuple[Tensor, ...], shifted: tuple[Tensor, ...]) -> dict[str, Any]:
    """Return a row of the table: means over draws by number of images."""
    after: dict[str, Any] = {}
    for count in IMAGES:
        later, early, levels = [], [], Counter()
        for seed in range(DRAWS):
            rng = np.random.default_rng([count, seed])
            first = rng.permutation(len(clean[0]))[:WINDOW]
            some = rng.permutation(len(shifted[0]))[:count]
            later.append(box.report((clean, first), (shifted, some)))
            early.append(box.report((shifted, some)))
            levels[later[-1].level] += 1
        after[str(count)] = {
            **{
                key: float(np.mean([getattr(one, key) for one in later]))
                for key in ("psi_directions", "psi_distance", "psi")
            },
            "psi_score": float(np.mean([one.psi_score for one in later])),
            "psi_directions_from_start": float(np.mean([one.psi_directions for one in early])),
            "levels": {level: levels[level] / DRAWS for level in ("stable", "moderate", "drifted")},
        }
    known = shifted[2]
    return {"images": after, "unknown": float((~known).double().mean())}


def false_alarms(box: Box, clean: tuple[Tensor, ...]) -> dict[str, Any]:
    """Return how often clean images are reported as moderate or drifted, with and without a first window."""
    found = {}
    for count in ALARMS:
        levels = {"from_start": Counter(), "after_first_window": Counter()}
        indices: dict[str, list[float]] = {kind: [] for kind in levels}
        for seed in range(CLEAN_DRAWS):
            order = np.random.default_rng([count, seed, 7]).permutation(len(clean[0]))
            window = clean, order[WINDOW : WINDOW + count]
            for kind, parts in (("from_start", [window]), ("after_first_window", [(clean, order[:WINDOW]), window])):
                report = box.report(*parts)
                levels[kind][report.level] += 1
                indices[kind].append(report.psi)
        found[str(count)] = {
            kind: {
                **{level: counted[level] / CLEAN_DRAWS for level in ("moderate", "drifted")},
                "mean_psi": float(np.mean(indices[kind])),
                "largest_psi": max(indices[kind]),
            }
            for kind, counted in levels.items()
        }
    return found


def main() -> None:
    """Print the tables, and write them as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    set_threads(0)
    embedder = open_backbone(BackboneConfig(name="tiny"), torch.device("cpu"))
    ten, hundred = (load(DataConfig(path=f"cifar{n}-jpg.tar.xz"), 0) for n in (10, 100))
    box = Box(args.run)
    row = np.array([box.names.index(name) if name in box.names else -1 for name in ten.classes])[ten.test_labels]
    (new,) = [name for name in ten.classes if name not in box.names]
    everything = torch.from_numpy(embed(ten, embedder, Console(), True)["test"])
    clean = box.seen(everything[torch.from_numpy(row >= 0)])
    kept = np.random.default_rng(0).permutation(np.flatnonzero(row >= 0))[:SHIFTED]
    np.testing.assert_allclose(embedded(ten, kept[:64], embedder), everything[torch.from_numpy(kept[:64])], atol=1e-3)

    sources = {name: lambda shift=shift: embedded(ten, kept, embedder, shift) for name, shift in SHIFTS.items()}
    far = np.random.default_rng(1).permutation(len(hundred.test))[:SHIFTED]
    sources[f"CIFAR-10's {new}, never taught"] = lambda: everything[torch.from_numpy(row < 0)]
    sources["CIFAR-100"] = lambda: embedded(hundred, far, embedder)
    table = {}
    print("index along the directions / of the distance / along the directions from the start, after", *IMAGES)
    for name, source in sources.items():
        found = table[name] = index_of(box, clean, box.seen(source()))
        keys = ("psi_directions", "psi_distance", "psi_directions_from_start")
        cells = ["/".join(f"{one[key]:.3f}" for key in keys) for one in found["images"].values()]
        print(f"{name:32}{'  '.join(cells)}  unknown {found['unknown']:.3f}", flush=True)
    alarms = false_alarms(box, clean)
    print(json.dumps(alarms, indent=1))
    if args.json:
        record = {
            "command": "python benchmarks/drift.py RUN (RUN: ssd-edge train --config examples/cifar10.yaml)",
            **environment(),
            "limits": {"moderate": MODERATE, "drifted": DRIFTED},
            "draws": DRAWS,
            "clean_draws": CLEAN_DRAWS,
            "shifts": table,
            "false_alarms": alarms,
        }
        args.json.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
