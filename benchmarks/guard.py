"""Compare what the guard says about learns with the truth, over series of good, mislabelled and worthless learns.

Usage: python benchmarks/guard.py DATA [--backbone lite0] [--learner slda ...]
       [--series 4] [--learns 25] [--second-view] [--json FILE]

DATA is what data.path accepts. Each series starts from half of the classes, in turn with 20, 60 and 10 training images
of each. One half of the test images is the workstation's, from which thresholds and held-out results come; the other
half is the truth. Then follow learns of random kinds, each through the function that a device calls: a new class with
3, 5, 20 or up to 100 images; more images of a known class; images of one known class taught as another, once or again
and again; noise taught as a known or a new class; the same images a second time; a known class under a second name.
A learn that the guard refuses is not kept. Embeddings are computed once; one thread.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared import Embedded, read
from torch import Tensor

from device_runtime.install.installed import InstalledBundle
from device_runtime.learning.budget import Meter
from device_runtime.learning.guard import Limits
from device_runtime.learning.state import DeviceState
from device_runtime.learning.teach import teach
from ssd_edge import learners
from ssd_edge.backbones.embedder import level_standardisation
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import GateRefusedError, InputError
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.retention import TrackRecord
from ssd_edge.learners.unknown import Rejector
from ssd_edge.run.storage import environment

PER_CLASS = (20, 60, 10)  # training images of each class of the bundle, by series
KINDS = {  # share of the learns, in percent
    "new, 3 images": 6, "new, 5": 14, "new, 20": 14, "new, 100": 10, "more": 10, "mislabelled": 10,
    "mislabelled again and again": 12, "noise as a known class": 6, "noise as a new class": 6, "same images again": 6,
    "second name": 6,
}  # fmt: skip
NOISE, TEN, THIRTY = 20, 10, 30


class Series:
    """A device, and the images that it can be taught."""

    def __init__(
        self, data: Embedded, options: dict[str, Any], priors: Any, number: int, per_class: int = 0, base: int = 0
    ) -> None:
        self.rng, count = np.random.default_rng(100 + number), len(data.classes)
        order = self.rng.permutation(count)
        base = base or count // 2
        self.base, self.new = order[:base], list(order[base:])
        if data.standardised:
            mu, sigma = torch.zeros(()), torch.ones(())
        else:
            mu, sigma = map(
                torch.from_numpy,
                level_standardisation(data.train[np.isin(data.train_labels, self.base)].numpy(), data.widths),
            )

        def joined(images: Tensor, noise: Tensor) -> Tensor:
            return ((torch.cat([images, noise]) - mu) / sigma).float()

        # Images are named by their positions: first the training images, then those of noise.
        self.images, self.test = joined(data.train, data.noise), ((data.test - mu) / sigma).float()
        self.second = None
        if data.second is not None and data.second_noise is not None:
            self.second = joined(data.second, data.second_noise)
        self.noise = np.arange(len(data.train), len(self.images))
        self.names = data.classes
        self.labels, self.test_labels = data.train_labels, data.test_labels
        self.left = {label: self.rng.permutation(np.flatnonzero(self.labels == label)) for label in range(count)}
        self.sink = tuple(self.rng.choice(self.base, 2, replace=False))
        self.truth = torch.from_numpy(self.rng.random(len(self.test)) < 0.5)
        self.sets: dict[str, np.ndarray] = {}
        self.taught: dict[str, str] = {}
        self.state = self._install(options, priors, per_class or PER_CLASS[number % len(PER_CLASS)])

    def _install(self, options: dict[str, Any], priors: Any, per_class: int) -> DeviceState:
        parts = [self.take(label, per_class) for label in self.base]
        rows = torch.cat([torch.full((len(part),), row) for row, part in enumerate(parts)])
        chosen, dim = np.concatenate(parts), self.images.shape[1]
        vectors, second = self.images[chosen], None if self.second is None else self.second[chosen]
        learner = learners.build(options, dim, priors, 0)
        learner.learn(learners.Task(vectors, rows, second))
        statistics = ClassStatistics(dim)
        statistics.add(vectors, rows)
        known = torch.from_numpy(np.isin(self.test_labels, self.base)) & ~self.truth
        row_of = {label: row for row, label in enumerate(self.base)}
        tests = torch.tensor([row_of[label] for label in self.test_labels[known.numpy()]])
        rejector = Rejector.calibrate(statistics, vectors, rows, self.test[known], tests)
        record = TrackRecord.tested_on(learner, statistics, rejector, self.test[known], tests)
        registry = ClassRegistry()
        for row, label in enumerate(self.base):
            registry = registry.add(self.names[label], "base", int((rows == row).sum()))
        bundle = InstalledBundle("guard", 1, "cpu", 224, dim, "fp32", "0" * 64, None, "0" * 16, (), {})
        counted = statistics if learner.class_statistics() is None else None
        return DeviceState(registry, learner, counted, rejector, record, bundle, b"", b"")

    def take(self, label: int, count: int) -> np.ndarray:
        """Return images of a class that were not taken before."""
        taken, self.left[label] = self.left[label][:count], self.left[label][count:]
        return taken

    def some(self, label: int, count: int) -> np.ndarray:
        """Return random images of a class."""
        return self.rng.permutation(np.flatnonzero(self.labels == label))[:count]

    def accuracies(self, names: list[str]) -> np.ndarray:
        """Return the true accuracy on some classes, with ``unknown`` counted as wrong."""
        images = self.test[self.truth]
        rows = self.state.learner.predict(images)
        answers = np.array(self.state.registry.names, object)[rows.numpy()]
        answers[~self.state.rejector.accepts(images, rows)[0].numpy()] = "unknown"
        true = np.array(self.names, object)[self.test_labels[self.truth.numpy()]]
        return np.array([(answers[true == name] == name).mean() for name in names])

    def draw(self, kind: str, number: int) -> tuple[str, np.ndarray]:
        """Return the name and the images of a learn."""
        known = [label for label, name in enumerate(self.names) if self.state.registry.row(name) is not None]
        if kind.startswith("new"):
            count = int(kind.split()[1])
            label = self.new.pop() if self.new else int(self.rng.choice(known))
            return self.names[label], self.take(label, count)
        if kind == "more":
            label = int(self.rng.choice(known))
            return self.names[label], self.take(label, TEN)
        if kind == "mislabelled":
            label, other = self.rng.choice(known, 2, replace=False)
            return self.names[other], self.some(label, TEN)
        if kind == "mislabelled again and again":
            return self.names[self.sink[1]], self.some(self.sink[0], TEN)
        if kind.startswith("noise"):
            name = f"noise {number}" if kind.endswith("new class") else self.names[int(self.rng.choice(known))]
            return name, self.rng.permutation(self.noise)[:NOISE]
        if kind == "same images again":
            name = str(self.rng.choice(list(self.sets))) if self.sets else ""
            return name, self.sets.get(name, self.noise[:0])
        return f"second {number}", self.some(int(self.rng.choice(known)), THIRTY)

    def learn(self, name: str, chosen: np.ndarray, seed: int) -> Any:
        """Teach as a device does; raises what the guard raises."""

        def embedded(sources: Any, progress: Any, second: bool) -> Tensor:
            embeddings = self.second if second else self.images
            assert embeddings is not None
            return embeddings[[int(source.view(np.int64)[0]) for source in sources]]

        images, meter = [np.array([position], np.int64).view(np.uint8) for position in chosen], Meter(None, None)
        self.state, result = teach(self.state, {name: images}, embedded, seed, Limits(), meter, self.taught)
        self.taught |= {one.digest: one.label for one in result.taught if one.digest}
        self.sets[name] = chosen
        return result


def run(data: Embedded, options: dict[str, Any], priors: Any, series: int, learns: int) -> dict[str, Any]:
    """Return errors of the estimates, what was accepted and refused, and what the series lost."""
    accepted, refused, warned = Counter[str](), Counter[str](), Counter[str]()
    levels, drops, losses, classes = [], [], [], []
    unestimated, passes = 0, defaultdict(list)
    for number in range(series):
        one = Series(data, options, priors, number)
        first, kinds = list(one.state.registry.names), list(KINDS)
        start = one.accuracies(first)
        for step in range(learns):
            kind = str(one.rng.choice(kinds, p=np.array(list(KINDS.values())) / sum(KINDS.values())))
            name, chosen = one.draw(kind, step)
            if not len(chosen):
                continue
            old = [known for known in one.state.registry.names if known in one.names]
            before = one.accuracies(old)
            try:
                result = one.learn(name, chosen, step)
            except (GateRefusedError, InputError):
                refused[kind] += 1
                continue
            accepted[kind] += 1
            warned[kind] += any("looks like" in warning or "before" in warning for warning in result.warnings)
            estimate, after = result.old_classes, one.accuracies(old)
            drops.append(estimate.drop - float((before - after).mean()))
            if estimate.accuracy_after is None:
                unestimated += 1
            else:
                levels.append(estimate.accuracy_after - float(after[np.isin(old, first)].mean()))
            if kind in ("new, 5", "new, 20", "new, 100") and name in one.names:
                own = one.test[one.test_labels == one.names.index(name)]
                row = torch.full((len(own),), one.state.registry.row_of(name))
                passes[kind].append(float(one.state.rejector.accepts(own, row)[0].double().mean()))
        lost = start - one.accuracies(first)
        losses.append(float(lost.mean()))
        classes.append(float(lost.max()))
        print(f"  series {number}: {start.mean():.3f} lost {lost.mean():+.3f}, one class {lost.max():+.3f}", flush=True)
    return {
        "learns": sum(accepted.values()) + sum(refused.values()),
        "accepted": dict(accepted),
        "refused": dict(refused),
        "warned": dict(warned),
        "cannot_be_estimated": unestimated,
        "level_error_mean": float(np.abs(levels).mean()) if levels else None,
        "level_error_worst": float(np.abs(levels).max()) if levels else None,
        "drop_error_mean": float(np.abs(drops).mean()) if drops else None,
        "drop_underestimated_most": float(-min(drops)) if drops else None,
        "lost_by_series": losses,
        "lost_most_by_a_class": classes,
        "new_class_passes": {kind: [float(np.mean(found)), len(found)] for kind, found in passes.items()},
    }


def main() -> None:
    """Print the results, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--backbone", default="lite0", help="what backbone.name accepts")
    parser.add_argument("--learner", nargs="+", default=["slda"])
    parser.add_argument("--series", type=int, default=4)
    parser.add_argument("--learns", type=int, default=25)
    parser.add_argument("--per-class", type=int, default=300, help="images of each class that are embedded, at most")
    parser.add_argument("--second-view", action="store_true", help="as learner.second_view")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, dataset, embedder = read(args.data, args.backbone, args.per_class, 2 * NOISE, args.second_view)
    written: dict[str, Any] = {"data": dataset.name, "features": embedder.dim, "learners": {}}
    for name in args.learner:
        print(f"{dataset.name}, {embedder.dim} features, {name}:")
        options = {"name": name, **({"second_view": True} if args.second_view else {})}
        found = run(data, options, embedder.priors, args.series, args.learns)
        written["learners"][name] = found
        print(json.dumps(found, indent=1))
    if args.json:
        command = f"python benchmarks/guard.py {Path(args.data).name} --series {args.series} --learns {args.learns}"
        command += f" --backbone {args.backbone}{' --second-view' if args.second_view else ''}"
        earlier = json.loads(args.json.read_text()) if args.json.is_file() else []
        args.json.write_text(json.dumps([*earlier, {"command": command, **environment(), **written}], indent=2) + "\n")


if __name__ == "__main__":
    main()
