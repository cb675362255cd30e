"""Attack the sums that a device keeps: reconstruct embeddings, and test whether an image was learned.

Usage: python benchmarks/privacy.py DATA [--backbone lite0] [--cases 4] [--json FILE]

DATA is what data.path accepts; training and test images are pooled and shuffled. A device knows the ten classes with
the most images, `KNOWN` images of each, and is then taught k more images of one of them. The attacker has the class
statistics (counts, sums, second moments) of one generation or of two, and, for the membership tests, the candidate
images: those that were taught, and as many others of the same class. Figures of two generations are means over --cases
of the classes. The accuracy is that of the linear discriminant of the (disturbed) statistics on the other images of the
ten classes. One thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from shared import auroc, read
from torch import Tensor

from ssd_edge.backbones.embedder import level_standardisation
from ssd_edge.learners.closed_form.discriminant import Discriminant
from ssd_edge.learners.closed_form.linear import random_directions
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.run.storage import environment

KNOWN, CLASSES = 20, 10
NEW = (1, 2, 3, 5, 10)
TESTED = 30
NOISES = (0.0, 0.3, 1.0, 3.0, 10.0, 30.0)
# one generation: features, 0: all; number of classes; images of each, 0: all but `LEFT`
STATES = ((0, 10, 5), (0, 10, 40), (0, 50, 20), (0, 50, 0), (512, 50, 20), (512, 50, 0), (256, 50, 20), (256, 50, 0))
LEFT = 10


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


def largest(moment: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues of a moment, ascending, and their vectors ``(D, count)``."""
    values, vectors = eigsh(moment.numpy(), count, which="LA", v0=np.ones(len(moment)))
    return torch.from_numpy(values), torch.from_numpy(vectors.copy())


def reconstruct(total: Tensor, moment: Tensor, count: int) -> Tensor:
    """Return the embeddings ``(k, D)`` with this sum and second moment; exact for one and two, else one of many."""
    values, vectors = largest(moment, count)
    root = vectors * values.clamp_min(1e-300).sqrt()  # Z = root Qᵀ with an orthogonal Q
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
    _, vectors = largest(moment, count)
    return (candidates @ vectors).square().sum(1) / candidates.square().sum(1)


def metric(statistics: ClassStatistics) -> Tensor:
    """Return the inverse of all second moments."""
    size = statistics.sums.shape[1]
    identity = torch.eye(size, dtype=torch.float64)
    return torch.linalg.inv(statistics.second + 1e-6 * statistics.second.trace() / size * identity)


def accuracy(statistics: ClassStatistics, test: Tensor, rows: Tensor, disturbed: bool) -> float:
    """Return the accuracy of the linear discriminant; noise and rounding may make the covariance indefinite."""
    covariance = statistics.within_covariance()
    if disturbed:
        values, vectors = torch.linalg.eigh(covariance)
        covariance = vectors * values.clamp_min(1e-6 * float(values.max())) @ vectors.T
    solved = Discriminant.fit(covariance, statistics.degrees_of_freedom)
    weights, bias = solved.weights(statistics.means, statistics.counts)
    return float(((test @ weights + bias).argmax(1) == rows).double().mean())


@dataclasses.dataclass(frozen=True)
class Pool:
    """Embeddings of a data set by class, the largest first, in random order; float64 ``(n, D)`` each."""

    name: str
    parts: list[Tensor]

    @classmethod
    def of(cls, path: str, backbone: str) -> Pool:
        """Return the embeddings of training and test images."""
        data, dataset, _ = read(path, backbone, 0, 0)
        vectors = torch.cat([data.train, data.test])
        if not data.standardised:
            mu, sigma = map(torch.from_numpy, level_standardisation(data.train.numpy(), data.widths))
            vectors = (vectors - mu) / sigma
        labels, rng = np.concatenate([data.train_labels, data.test_labels]), np.random.default_rng(0)
        parts = [vectors[rng.permutation(np.flatnonzero(labels == label))].double() for label in np.unique(labels)]
        return cls(dataset.name, sorted(parts, key=len, reverse=True))

    @property
    def dim(self) -> int:
        """Number of features."""
        return self.parts[0].shape[1]

    def narrowed(self, size: int) -> Pool:
        """Return projections on random directions, which `slda` takes of an embedding beyond its budget."""
        directions = random_directions(self.dim, size, 0).double()
        return Pool(self.name, [part @ directions for part in self.parts])

    def known(self, counts: Sequence[int], per_class: bool = False) -> ClassStatistics:
        """Return the statistics of the first images of each class."""
        statistics = ClassStatistics(self.dim, per_class)
        for row, count in enumerate(counts):
            statistics.add(self.parts[row][:count], torch.full((count,), row))
        return statistics


def mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


def two_generations(pool: Pool, cases: int, noise: float = 0.0, kind: str = "float64") -> dict[str, Any]:
    """Attack the difference of two neighbouring generations."""
    similar: dict[int, list[float]] = {count: [] for count in NEW}
    means: dict[int, list[float]] = {count: [] for count in NEW}
    wrong = dict.fromkeys(NEW, 0.0)
    member, errors, right = [], [], []
    before = pool.known([KNOWN] * CLASSES)
    for row in range(cases):
        generator = torch.Generator().manual_seed(row)
        _, fresh, others, _ = pool.parts[row].tensor_split([KNOWN, KNOWN + TESTED, KNOWN + 2 * TESTED])
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
        inside, outside = in_span(moment, TESTED, fresh), in_span(moment, TESTED, others)
        member.append(auroc(inside, outside))
        limits = torch.cat([inside, outside])
        errors.append(min(float((inside < t).double().mean() + (outside >= t).double().mean()) / 2 for t in limits))
        tests = [part[KNOWN + TESTED * (row == own) :] for own, part in enumerate(pool.parts[:CLASSES])]
        rows = torch.cat([torch.full((len(part),), own) for own, part in enumerate(tests)])
        right.append(accuracy(after, torch.cat(tests), rows, bool(noise) or kind == "bfloat16"))
    return {
        "noise": noise,
        "kind": kind,
        "cosine": {str(count): mean(values) for count, values in similar.items()},
        "largest_relative_error": {str(count): float(f"{value:.2g}") for count, value in wrong.items()},
        "cosine_of_mean": {str(count): mean(values) for count, values in means.items()},
        "membership": {"images": TESTED, "auroc": mean(member), "error": mean(errors)},
        "accuracy": mean(right),
    }


def one_generation(whole: Pool) -> list[dict[str, Any]]:
    """Test membership with one generation: closeness to the class mean in the metric of all second moments."""
    rows = []
    for features, classes, images in STATES:
        if classes > len(whole.parts):
            continue
        pool = whole.narrowed(features) if features else whole
        counts = [images or len(part) - LEFT for part in pool.parts[:classes]]
        statistics = pool.known(counts)
        inverse, found = metric(statistics), []
        for row, count in enumerate(counts):
            members, others = (
                -(centred @ inverse * centred).sum(1)
                for centred in (part - statistics.means[row] for part in pool.parts[row].tensor_split([count]))
            )
            found.append(auroc(members, others))
        entry = {"features": pool.dim, "classes": classes, "images": images, "total": sum(counts), "auroc": mean(found)}
        if images:
            own, both = pool.known(counts[:1], per_class=True).moments[0], pool.parts[0].tensor_split([images])
            entry["auroc_per_class"] = auroc(*(in_span(own, images, candidates) for candidates in both))
        rows.append(entry)
        print(entry, flush=True)
    return rows


def main() -> None:
    """Print the figures, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--backbone", default="lite0", help="what backbone.name accepts")
    parser.add_argument("--cases", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pool = Pool.of(args.data, args.backbone)
    one = one_generation(pool)
    neighbours = []
    for noise, kind in (*((noise, "float64") for noise in NOISES), (0.0, "float32"), (0.0, "bfloat16")):
        neighbours.append(two_generations(pool, args.cases, noise, kind))
        print(neighbours[-1], flush=True)
    result = {
        "command": f"python benchmarks/privacy.py {Path(args.data).name} --cases {args.cases}",
        **environment(),
        "data": pool.name,
        "backbone": args.backbone,
        "known": KNOWN,
        "dim": pool.dim,
        "two": neighbours,
        "one": one,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
