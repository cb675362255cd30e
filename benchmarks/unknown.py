"""Compare scores for detecting unknown images by AUROC and FPR at 95 % TPR, and measure the rates of the thresholds.

Usage: SSD_EDGE_DATA=FOLDER python benchmarks/unknown.py RUN [--json FILE]

RUN is a finished run on nine classes of CIFAR-10 (examples/cifar10.yaml). The unknown images are all test images of the
tenth class (near) and of CIFAR-100 (far, although some of its classes, like pickup_truck and bus, are near as well).
The score was selected by the column "chosen": for four pairs of the nine classes, learner and statistics were fitted
without the pair on four fifths of the training images, and evaluated on the rest. No test images were used for that.
TPR is the share of known images that are accepted, whether or not they are predicted correctly.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssd_edge import files, learners
from ssd_edge.backbones.embedder import open_backbone
from ssd_edge.config import BackboneConfig, DataConfig
from ssd_edge.data import load
from ssd_edge.learners.closed_form.sums import ClassStatistics, shrink
from ssd_edge.learners.unknown import Rejector
from ssd_edge.report.terminal import Console
from ssd_edge.run import finished
from ssd_edge.run.embed import embed
from ssd_edge.run.storage import environment
from ssd_edge.run.train import set_threads

PAIRS = (("automobile", "dog"), ("ship", "cat"), ("horse", "frog"), ("bird", "airplane"))
IMAGES = (3, 5, 10, 20, 100, 500)
SEEDS = 5


def scores_of(learner: learners.Learner, statistics: ClassStatistics, vectors: Tensor) -> dict[str, Tensor]:
    """Return all scores of embeddings ``(N, D)`` for the predicted class; higher means more likely known."""
    classes = len(statistics.counts)
    logits = torch.cat([learner.scores(part) for part in vectors.split(4096)])[:, :classes].double()
    rows, wide = logits.argmax(1), vectors.double()
    centre = statistics.sums.sum(0) / statistics.total
    everything = statistics.second / statistics.total - torch.outer(centre, centre)

    def squared(points: Tensor, covariance: Tensor) -> Tensor:
        factor = torch.linalg.cholesky(covariance)
        return torch.linalg.solve_triangular(factor, points.T, upper=False).square().sum(0)

    own = squared(wide - statistics.means[rows], statistics.shrunk_covariance())
    background = squared(wide - centre, shrink(everything, statistics.total))
    best = logits.topk(2).values
    return {
        "max softmax": logits.softmax(1).amax(1),
        "max logit": logits.amax(1),
        "energy": logits.logsumexp(1),
        "logit margin": best[:, 0] - best[:, 1],
        "Mahalanobis": -own,
        "relative Mahalanobis": background - own,
        "whitened cosine": Rejector.fit(statistics).score(vectors, rows).double(),
    }


def compared(known: Tensor, unknown: Tensor) -> dict[str, float]:
    """Return the AUROC and the share of unknown scores above the fifth percentile of the known ones."""
    # number of known scores below each unknown one
    below = torch.searchsorted(known.sort().values, unknown.contiguous())
    auroc = 1 - below.double().mean() / len(known)
    return {"auroc": float(auroc), "fpr95": float((unknown >= np.quantile(known.numpy(), 0.05)).double().mean())}


def chosen_on(vectors: Tensor, labels: Tensor, names: list[str], embedder) -> dict[str, dict[str, float]]:
    """Return the column "chosen": the means over `PAIRS`."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))
    held, kept = shuffled[: len(labels) // 5], shuffled[len(labels) // 5 :]
    found: dict[str, list[dict[str, float]]] = {}
    for pair in PAIRS:
        out = torch.tensor([names.index(name) for name in pair])
        row = torch.full((len(names),), -1)
        row[[n for n in range(len(names)) if n not in out]] = torch.arange(len(names) - 2)
        taught = kept[~torch.isin(labels[kept], out)]
        learner = learners.build({"name": "slda"}, embedder.dim, embedder.priors)
        learner.learn(learners.Task(vectors[taught], row[labels[taught]]))
        statistics = ClassStatistics(embedder.dim)
        statistics.add(vectors[taught], row[labels[taught]])
        unknown = torch.isin(labels[held], out)
        for name, score in scores_of(learner, statistics, vectors[held]).items():
            found.setdefault(name, []).append(compared(score[~unknown], score[unknown]))
    return {name: {key: float(np.mean([one[key] for one in many])) for key in many[0]} for name, many in found.items()}


def blank_frames(size: int) -> dict[str, np.ndarray]:
    """Return frames of a broken or covered camera, uint8 ``(N, size, size, 3)``."""
    rng = np.random.default_rng(0)
    one_colour = rng.integers(0, 256, (200, 1, 1, 3))
    return {
        "black": np.zeros((1, size, size, 3), np.uint8),
        "white": np.full((1, size, size, 3), 255, np.uint8),
        "one colour": np.broadcast_to(one_colour, (200, size, size, 3)).astype(np.uint8),
        "noise": rng.integers(0, 256, (200, size, size, 3)).astype(np.uint8),
    }


def after_teaching(
    rejector: Rejector, statistics: ClassStatistics, taught: Tensor, test: Tensor, others: Tensor
) -> list[dict[str, float]]:
    """Measure the shares of its own and of all other test images that a new class accepts after few images."""
    rows, new = [], len(statistics.counts)
    for count in IMAGES:
        passed = []
        for seed in range(SEEDS):
            few = taught[torch.randperm(len(taught), generator=torch.Generator().manual_seed(seed))[:count]]
            after = statistics.copy()
            after.add(few, torch.full((count,), new))
            with_new = rejector.with_class(new, after, few)
            passed.append(
                [
                    float(with_new.accepts(part, torch.full((len(part),), new))[0].double().mean())
                    for part in (test, others)
                ]
            )
        own, others_rate = np.mean(passed, axis=0)
        worst = min(one[0] for one in passed)
        rows.append({"images": count, "accepted": own, "accepted_worst": worst, "others_accepted": others_rate})
        print(f"taught with {count:3}: {own:.3f} of its test images accepted (worst of {SEEDS}: {worst:.3f}), "
              f"of others: {others_rate:.3f}")  # fmt: skip
    return rows


def main() -> None:
    """Print the tables, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    set_threads(0)
    embedder = open_backbone(BackboneConfig(name="tiny"), torch.device("cpu"))
    ten, hundred = (load(DataConfig(path=f"cifar{n}-jpg.tar.xz"), 0) for n in (10, 100))
    vectors = {part: torch.from_numpy(array) for part, array in embed(ten, embedder, Console(), True).items()}
    far = torch.from_numpy(embed(hundred, embedder, Console(), True)["test"])
    run = finished.read(args.run)
    learner, statistics, names = run.learner, run.statistics, run.registry.names
    (new,) = [name for name in ten.classes if name not in names]
    row = torch.tensor([names.index(name) if name in names else -1 for name in ten.classes])
    train, test = row[torch.from_numpy(ten.train_labels)], row[torch.from_numpy(ten.test_labels)]
    old, near = vectors["test"][test >= 0], vectors["test"][test < 0]

    chosen = chosen_on(vectors["train"][train >= 0], train[train >= 0], names, embedder)
    parts = {"known": old, "near": near, "far": far}
    scores = {part: scores_of(learner, statistics, array) for part, array in parts.items()}
    print(f"{'AUROC / FPR95':22}{'chosen':>15}{new:>15}{'CIFAR-100':>15}")
    table = {}
    for name in chosen:
        table[name] = {
            "chosen": chosen[name],
            **{part: compared(scores["known"][name], scores[part][name]) for part in ("near", "far")},
        }
        print(f"{name:22}" + "".join(f"{one['auroc']:9.3f}/{one['fpr95']:.3f}" for one in table[name].values()))

    rejector = Rejector.from_state(files.read_tensors(args.run / "unknown.safetensors")[0])
    passes = rejector.accepts(old, test[test >= 0])[0].double()
    by_class = {name: float(passes[test[test >= 0] == n].mean()) for n, name in enumerate(names)}
    rates = {part: float(rejector.accepts(v, learner.predict(v))[0].double().mean()) for part, v in parts.items()}
    print(f"accepted at thresholds for {rejector.rate:.2f}: own class {float(passes.mean()):.3f} (classes "
          f"{min(by_class.values()):.3f}..{max(by_class.values()):.3f}); as predicted: "
          + ", ".join(f"{part} {rate:.3f}" for part, rate in rates.items()))  # fmt: skip
    blank = {
        kind: torch.from_numpy(embedder.embed(pixels)) for kind, pixels in blank_frames(embedder.pixels.size).items()
    }
    blank_rates = {kind: float(rejector.accepts(v, learner.predict(v))[0].double().mean()) for kind, v in blank.items()}
    print("accepted, of blank frames: " + ", ".join(f"{kind} {rate:.3f}" for kind, rate in blank_rates.items()))
    taught = after_teaching(rejector, statistics, vectors["train"][train < 0], near, old)
    if args.json:
        record = {
            "command": "python benchmarks/unknown.py RUN (RUN: ssd-edge train --config examples/cifar10.yaml)",
            **environment(),
            "unknown": {"near": new, "far": "CIFAR-100"},
            "images": {part: len(array) for part, array in parts.items()},
            "scores": table,
            "thresholds": {"rate": rejector.rate, "own_class": float(passes.mean()), "by_class": by_class, **rates},
            "blank_frames": blank_rates,
            "new_class": taught,
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
