"""Attack the sums that a device keeps: reconstruct embeddings, and test whether an image was learned.

Usage: SSD_EDGE_DATA=FOLDER python benchmarks/privacy.py [--repeats N] [--json FILE]

The bundled backbone embeds 260 training and 100 test images of each class of CIFAR-10. A device knows all ten classes
with `KNOWN` images each and is then taught k more images of one of them. The attacker has the
class statistics (counts, sums, second moments) of one generation or of two, and, for the membership tests,
the candidate images: those that were taught, and as many others of the same class. Figures are means over classes and
repeats. The accuracy is that of the linear discriminant of the (disturbed) statistics on the test images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssd_edge.backbones.embedder import open_backbone
from ssd_edge.config import BackboneConfig, DataConfig
from ssd_edge.data import load
from ssd_edge.learners.closed_form.discriminant import Discriminant
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.run.storage import environment

KNOWN, TRAIN, TEST, CLASSES = 100, 260, 100, 10
NEW = (1, 2, 3, 5, 10)
TESTED = 40
SIZES = (3, 5, 10, 20, 50, 100, 200)
NOISES = (0.0, 0.3, 1.0, 3.0, 10.0, 30.0)
PER_CLASS_SIZES = (5, 20, 100)


def auroc(members: Tensor, others: Tensor) -> float:
    """Return the probability that a member scores higher than another image."""
    greater = (members[:, None] > others[None, :]).double() + 0.5 * (members[:, None] == others[None, :])
    return float(greater.mean())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def taught(statistics: ClassStatistics, vectors: Tensor, row: int) -> ClassStatistics:
    """Return the statistics after these embeddings were added to a class."""
    after = statistics.copy()
    after.add(vectors, torch.full((len(vectors),), row))
    after.settle()
    return after


def stored(statistics: ClassStatistics, noise: float, generator: torch.Generator, kind: str) -> ClassStatistics:
    """Return statistics as a generation would keep them: with noise in units of one feature, or rounded."""
    kept = statistics.copy()
    if noise:
        kept.sums = kept.sums + noise * torch.randn(kept.sums.shape, generator=generator, dtype=torch.float64)
        drawn = noise * torch.randn(kept.moments.shape, generator=generator, dtype=torch.float64)
        kept.moments = kept.moments + (drawn + drawn.mT) / 2**0.5
    if kind == "float32":
        kept.sums, kept.moments = kept.sums.float().double(), kept.moments.float().double()
    if kind == "bfloat16":
        kept.sums, kept.moments = kept.sums.bfloat16().double(), kept.moments.bfloat16().double()
    return kept


def difference(before: ClassStatistics, after: ClassStatistics, row: int) -> tuple[Tensor, Tensor]:
    """Return the sum and the second moment of the embeddings that were added in between."""
    return after.sums[row] - before.sums[row], after.second - before.second


def reconstruct(total: Tensor, moment: Tensor, count: int) -> Tensor:
    """Return the embeddings ``(k, D)`` with this sum and second moment; exact for one and two, else one of many."""
    values, vectors = torch.linalg.eigh(moment)
    root = vectors[:, -count:] * values[-count:].clamp_min(1e-300).sqrt()  # Z = root Qᵀ with an orthogonal Q
    # Z 1 = total: Q maps 1/√k to root⁻¹ total/√k; the rest of Q is free, and for k = 2 only a sign
    target = torch.linalg.lstsq(root, total[:, None]).solution[:, 0]
    first = torch.nn.functional.normalize(torch.ones(count, dtype=torch.float64), dim=0)
    goal = torch.nn.functional.normalize(target, dim=0)
    mirror = first - goal
    size = mirror @ mirror
    rotation = torch.eye(count, dtype=torch.float64)
    if size > 1e-20:
        rotation = rotation - 2 * torch.outer(mirror, mirror) / size  # maps 1/√k to the goal
    return (root @ rotation).T


def matched(found: Tensor, true: Tensor) -> tuple[float, float]:
    """Return the mean cosine, and the largest relative error, of each true embedding and the most similar found one."""
    unit = torch.nn.functional.normalize
    cosines, nearest = (unit(true) @ unit(found).T).max(1)
    return float(cosines.mean()), float(((found[nearest] - true).norm(dim=1) / true.norm(dim=1)).max())


def in_span(moment: Tensor, count: int, candidates: Tensor) -> Tensor:
    """Return the share of each candidate that lies in the span of the added embeddings, for ``count`` < D."""
    vectors = torch.linalg.eigh(moment).eigenvectors[:, -count:]
    return (candidates @ vectors).square().sum(1) / candidates.square().sum(1)


def closeness(statistics: ClassStatistics, row: int, candidates: Tensor) -> Tensor:
    """Return how close each candidate is to the mean of its class, in the metric of all second moments."""
    size = statistics.sums.shape[1]
    moment = statistics.second + 1e-6 * statistics.second.trace() / size * torch.eye(size, dtype=torch.float64)
    centred = candidates - statistics.means[row]
    return -(centred * torch.linalg.solve(moment, centred.T).T).sum(1)


def accuracy(statistics: ClassStatistics, test: Tensor, rows: Tensor) -> float:
    """Return the accuracy of the linear discriminant of the statistics; noise may make the covariance indefinite."""
    values, vectors = torch.linalg.eigh(statistics.within_covariance())
    covariance = vectors * values.clamp_min(1e-6 * float(values.max())) @ vectors.T
    weights, bias = Discriminant.fit(covariance, statistics.degrees_of_freedom).weights(
        statistics.means, statistics.counts
    )
    return float(((test @ weights + bias).argmax(1) == rows).double().mean())


class Pool:
    """Embeddings of a part of CIFAR-10.

    Attributes:
        train: float64 ``(CLASSES, TRAIN, D)``.
        test, rows: float64 ``(CLASSES * TEST, D)`` and the class of each.
    """

    def __init__(self) -> None:
        embedder = open_backbone(BackboneConfig(name="tiny"), torch.device("cpu"))
        dataset = load(DataConfig(path="cifar10-jpg.tar.xz"), 0)

        def some(images: Any, labels: np.ndarray, count: int) -> Tensor:
            chosen = [np.flatnonzero(labels == label)[:count] for label in range(CLASSES)]
            pixels = images.load(np.concatenate(chosen), embedder.pixels)
            return torch.from_numpy(embedder.embed(pixels)).double().view(CLASSES, count, -1)

        self.train = some(dataset.train, dataset.train_labels, TRAIN)
        self.test = some(dataset.test, dataset.test_labels, TEST).flatten(0, 1)
        self.rows = torch.arange(CLASSES).repeat_interleave(TEST)

    def known(self, count: int, order: Tensor, per_class: bool = False) -> ClassStatistics:
        """Return the statistics of the first `count` images of each class."""
        statistics = ClassStatistics(self.train.shape[2], per_class)
        for row in range(CLASSES):
            statistics.add(self.train[row, order[:count]], torch.full((count,), row))
        return statistics


def cases(repeats: int) -> Iterator[tuple[int, Tensor, torch.Generator]]:
    """Yield a class, an order of its images and a generator for each repeat and class."""
    for repeat in range(repeats):
        for row in range(CLASSES):
            generator = torch.Generator().manual_seed(100 * repeat + row)
            yield row, torch.randperm(TRAIN, generator=generator), generator


def mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


def two_generations(pool: Pool, repeats: int, noise: float = 0.0, kind: str = "float64") -> dict[str, Any]:
    """Attack the difference of two neighbouring generations."""
    similar: dict[int, list[float]] = {count: [] for count in NEW}
    means: dict[int, list[float]] = {count: [] for count in NEW}
    wrong = dict.fromkeys(NEW, 0.0)
    member, errors, right = [], [], []
    for row, order, generator in cases(repeats):
        before = pool.known(KNOWN, order)
        fresh, others = pool.train[row, order[KNOWN : KNOWN + TESTED]], pool.train[row, order[KNOWN + TESTED :]]
        kept = stored(before, noise, generator, kind)
        for count in NEW:
            after = stored(taught(before, fresh[:count], row), noise, generator, kind)
            total, moment = difference(kept, after, row)
            cosines, error = matched(reconstruct(total, moment, count), fresh[:count])
            similar[count].append(cosines)
            wrong[count] = max(wrong[count], error)
            means[count].append(cosine(total, fresh[:count].sum(0)))
        after = stored(taught(before, fresh, row), noise, generator, kind)
        _, moment = difference(kept, after, row)
        inside, outside = in_span(moment, TESTED, fresh), in_span(moment, TESTED, others[:TESTED])
        member.append(auroc(inside, outside))
        limits = torch.cat([inside, outside])
        errors.append(min(float((inside < t).double().mean() + (outside >= t).double().mean()) / 2 for t in limits))
        right.append(accuracy(after, pool.test, pool.rows))
    return {
        "noise": noise,
        "kind": kind,
        "cosine": {str(count): mean(values) for count, values in similar.items()},
        "largest_relative_error": {str(count): float(f"{value:.2g}") for count, value in wrong.items()},
        "cosine_of_mean": {str(count): mean(values) for count, values in means.items()},
        "membership": {"images": TESTED, "auroc": mean(member), "error": mean(errors)},
        "accuracy": mean(right),
    }


def one_generation(pool: Pool, repeats: int) -> list[dict[str, Any]]:
    """Test membership with one generation in which every class has n images."""
    rows = []
    for size in SIZES:
        found, separate = [], []
        for row, order, _ in cases(repeats):
            statistics = pool.known(size, order)
            members, others = pool.train[row, order[:size]], pool.train[row, order[size : size + max(size, 40)]]
            found.append(auroc(closeness(statistics, row, members), closeness(statistics, row, others)))
            if size in PER_CLASS_SIZES:
                own = pool.known(size, order, per_class=True).moments[row]
                span = [in_span(own, size, candidates) for candidates in (members, others)]
                separate.append(auroc(*span))
        entry = {"images": size, "auroc": mean(found), **({"auroc_per_class": mean(separate)} if separate else {})}
        rows.append(entry)
        print(entry, flush=True)
    return rows


def main() -> None:
    """Print the figures, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pool = Pool()
    neighbours = []
    for noise, kind in (*((noise, "float64") for noise in NOISES), (0.0, "float32"), (0.0, "bfloat16")):
        neighbours.append(two_generations(pool, args.repeats, noise, kind))
        print(neighbours[-1], flush=True)
    result = {
        "command": f"python benchmarks/privacy.py --repeats {args.repeats}",
        **environment(),
        "known": KNOWN,
        "dim": pool.train.shape[2],
        "two": neighbours,
        "one": one_generation(pool, args.repeats),
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
