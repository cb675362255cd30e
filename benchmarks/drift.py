"""Indices of the drift monitor on shifted images, and its false alarms on clean ones.

Usage: python benchmarks/drift.py RUN [--other DATA ...] [--json FILE]

RUN is a finished run that left out some classes of its data (data.exclude). Its test images are shifted in the pixels
of the backbone's input, embedded, and then fed to `Monitor` in random order:
- `WINDOW` clean images followed by n shifted ones, for both indices;
- shifted images from the start, which only the directions can detect.
The classes that were left out, with all of their images, and test images of --other data come last. Indices are means
over `DRAWS` random draws. A false alarm is one of `CLEAN_DRAWS` draws of clean images whose level is not stable. What
needs more images than there are is left out. One thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from shared import RunOnData
from torch import Tensor

from device_runtime.service.drift import DRIFTED, MINIMUM, MODERATE, WINDOW, DriftReport, Monitor, Reference
from ssd_edge import files
from ssd_edge.config import DataConfig
from ssd_edge.data import load
from ssd_edge.learners.retention import TrackRecord
from ssd_edge.learners.unknown import Rejector
from ssd_edge.run.storage import environment

SHIFTED = 600  # number of shifted images
DRAWS, CLEAN_DRAWS = 20, 2000
IMAGES = (300, 600)
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
    "blur, radius 1": _each(lambda image: image.filter(ImageFilter.GaussianBlur(1))),
    "blur, radius 2": _each(lambda image: image.filter(ImageFilter.GaussianBlur(2))),
    "blur, radius 4": _each(lambda image: image.filter(ImageFilter.GaussianBlur(4))),
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


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a monitor counts of images.

    Attributes:
        measured: Result of `Reference.measure`.
        scores: Probability of each answer.
        known: Whether each is accepted as known.
    """

    measured: tuple[np.ndarray, np.ndarray, np.ndarray]
    scores: np.ndarray
    known: np.ndarray

    def __len__(self) -> int:
        return len(self.known)


class Measured(Reference):
    """Reference whose embeddings are numbers of images that were measured before: draws repeat them."""

    def __init__(self, reference: Reference, parts: tuple[Seen, ...]) -> None:
        self.solid, self.edges, self.expected = reference.solid, reference.edges, reference.expected
        self.digest, self.dim = reference.digest, 1
        self._found = [np.concatenate(each) for each in zip(*(part.measured for part in parts), strict=True)]

    def measure(self, embeddings: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what was measured of these images."""
        offsets, distances, solid = (array[embeddings[:, 0].long().numpy()] for array in self._found)
        return offsets, distances, solid


class Box:
    """Reference, learner, thresholds and record of a device with the run."""

    def __init__(self, trained: RunOnData) -> None:
        run = trained.run
        self.trained, self.classes, self.reference = trained, len(run.registry), Reference(run.statistics)
        self.rejector = Rejector.from_state(files.parse_tensors(run.states["unknown"], "unknown.safetensors")[0])
        self.record = TrackRecord.from_state(files.parse_tensors(run.states["record"], "record.safetensors")[0])

    def seen(self, vectors: np.ndarray) -> Seen:
        """Return what a monitor counts of these embeddings."""
        embeddings = torch.from_numpy(vectors)
        scores = self.trained.run.learner.scores(embeddings)[:, : self.classes]
        shares, rows = self.record.confidence(scores), scores.argmax(1)
        assert shares is not None
        return Seen(
            self.reference.measure(embeddings), shares.numpy(), self.rejector.accepts(embeddings, rows)[0].numpy()
        )

    def shifted(self, images: np.ndarray, shift: Shift) -> Seen:
        """Return what a monitor counts of images that were shifted."""
        rng = np.random.default_rng(0)
        parts = np.array_split(images, -(-len(images) // 64))
        return self.seen(np.concatenate([self.trained.embed(shift(part, rng)) for part in parts]))

    def report(self, *parts: tuple[Seen, np.ndarray]) -> DriftReport:
        """Return the report of a monitor after some images of each part, one part after the other."""
        monitor, first = Monitor(Measured(self.reference, tuple(seen for seen, _ in parts))), 0
        for seen, chosen in parts:
            monitor.add(torch.from_numpy(first + chosen)[:, None], seen.scores[chosen], seen.known[chosen])
            first += len(seen)
        return monitor.report()


def index_of(box: Box, clean: Seen, shifted: Seen) -> dict[str, Any]:
    """Return a row of the table: means over draws by number of images."""
    after: dict[str, Any] = {}
    for count in (count for count in IMAGES if count <= len(shifted)):
        later, early, levels = [], [], Counter[str]()
        for seed in range(DRAWS):
            rng = np.random.default_rng([count, seed])
            first = rng.permutation(len(clean))[:WINDOW]
            some = rng.permutation(len(shifted))[:count]
            later.append(box.report((clean, first), (shifted, some)))
            early.append(box.report((shifted, some)).psi_directions)
            levels[later[-1].level] += 1
        after[str(count)] = {
            **{
                key: _mean([getattr(one, key) for one in later])
                for key in ("psi_directions", "psi_distance", "psi", "psi_score")
            },
            "psi_directions_from_start": _mean(early),
            "levels": {level: levels[level] / DRAWS for level in ("stable", "moderate", "drifted")},
        }
    return {"images": after, "unknown": float((~shifted.known).mean())}


def _mean(values: list[float | None]) -> float | None:
    """Return the mean; None if too few images are near a class that gives a reference, in any draw."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def false_alarms(box: Box, clean: Seen) -> dict[str, Any]:
    """Return how often clean images are reported as moderate or drifted, with and without a first window."""
    found: dict[str, Any] = {}
    for count in ALARMS:
        for kind, first in (("from_start", 0), ("after_first_window", WINDOW)):
            if first + count > len(clean):
                continue
            levels, indices = Counter[str](), list[float | None]()
            for seed in range(CLEAN_DRAWS):
                order = np.random.default_rng([count, seed, 7]).permutation(len(clean))
                parts = [(clean, order[:first])] if first else []
                report = box.report(*parts, (clean, order[first : first + count]))
                levels[report.level] += 1
                indices.append(report.psi)
            found.setdefault(str(count), {})[kind] = {
                **{level: levels[level] / CLEAN_DRAWS for level in ("collecting", "moderate", "drifted")},
                "mean_psi": _mean(indices),
                "largest_psi": max((index for index in indices if index is not None), default=None),
            }
    return found


def main() -> None:
    """Print the tables, and write them as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--other", nargs="*", default=[], help="other data, as data.path: none of its classes is known")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    trained = RunOnData(args.run)
    config, pixels, dataset = trained.run.config, trained.run.pixels, trained.dataset
    box = Box(trained)
    clean = box.seen(trained.embed_all(dataset)["test"])
    kept = np.random.default_rng(0).permutation(len(dataset.test))[:SHIFTED]
    images = dataset.test.load(kept, pixels)

    sources: dict[str, Callable[[], Seen]] = {
        name: lambda shift=shift: box.shifted(images, shift) for name, shift in SHIFTS.items()
    }
    if config.data.exclude:
        left_out = load(dataclasses.replace(config.data, classes=config.data.exclude, exclude=()), config.run.seed)
        sources[f"{len(config.data.exclude)} classes, never taught"] = lambda: box.seen(
            np.concatenate(list(trained.embed_all(left_out).values()))
        )
    for path in args.other:
        far = load(DataConfig(path=path), 0)
        some = np.random.default_rng(1).permutation(len(far.test))[:SHIFTED]
        sources[far.name] = lambda far=far, some=some: box.seen(trained.embed(far.test.load(some, pixels)))
    table = {}
    print("index along the directions / of the distance / along the directions from the start, after", *IMAGES)
    for name, source in sources.items():
        found = table[name] = index_of(box, clean, source())
        keys = ("psi_directions", "psi_distance", "psi_directions_from_start")
        cells = ["/".join("–" if one[k] is None else f"{one[k]:.3f}" for k in keys) for one in found["images"].values()]
        print(f"{name:32}{'  '.join(cells)}  unknown {found['unknown']:.3f}", flush=True)
    alarms = false_alarms(box, clean)
    print(json.dumps(alarms, indent=1))
    if args.json:
        others = f" --other {' '.join(Path(path).name for path in args.other)}" if args.other else ""
        train = f"ssd-edge train data.path={Path(dataset.name).name} data.exclude={','.join(config.data.exclude)}"
        record = {
            "command": f"python benchmarks/drift.py RUN{others} (RUN: {train})",
            **environment(),
            "data": dataset.name,
            "features": trained.run.learner.dim,
            "clean": len(clean),
            "clean_counted_along_directions": float(clean.measured[2].mean()),
            "clean_unknown": float((~clean.known).mean()),
            "limits": {"moderate": MODERATE, "drifted": DRIFTED},
            "least": MINIMUM,
            "draws": DRAWS,
            "clean_draws": CLEAN_DRAWS,
            "shifts": table,
            "false_alarms": alarms,
        }
        args.json.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
