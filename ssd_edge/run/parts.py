"""Sums over a part of the images of a stream, which add up to those of all: what a worker of a cluster computes.

A worker keeps nothing between two parts. Whatever is computed again, because a worker died, replaces what was lost and
cannot count twice. No size depends on the number of images, except for embeddings that the run asks for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load as unpack_arrays
from safetensors.numpy import save as pack_arrays

from ssd_edge import learners
from ssd_edge.backbones.embedder import Embedder, TorchEmbedder
from ssd_edge.backbones.graph import NetworkGraph
from ssd_edge.backbones.onnx import OnnxEmbedder
from ssd_edge.backbones.package import BackbonePackage
from ssd_edge.data.arrays import Images, Kind
from ssd_edge.errors import InputError
from ssd_edge.images import check_embedded
from ssd_edge.images.second import second_view
from ssd_edge.learners import Task
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.priors import Priors

TEST = -1  # number of the experience of test images
EMBED_BATCH = 512  # images decoded at once


@dataclasses.dataclass(frozen=True)
class Work:
    """What a worker needs to know.

    Attributes:
        backbone: The backbone.
        options: ``name`` and settings of the learner.
        dim: Embedding size D.
        priors: Priors of the backbone.
        seed: Seed of the learner.
        kind: Kind of the images, see `Images.packed`.
        standardisation: Mean and scale of raw features, float32 ``(D,)`` each; None if the backbone standardises.
        measure_only: Measure mean and deviation of the features, and nothing else.
    """

    backbone: NetworkGraph | BackbonePackage
    options: Mapping[str, Any]
    dim: int
    priors: Priors
    seed: int
    kind: Kind
    standardisation: tuple[np.ndarray, np.ndarray] | None = None
    measure_only: bool = False


@dataclasses.dataclass(frozen=True)
class Rows:
    """Images of a part.

    Attributes:
        position: Positions in the training or test images, int64 ``(n,)``.
        experience: Number of the experience of each, or `TEST`, int64 ``(n,)``.
        row: Class rows, int64 ``(n,)``.
        keep: True for images whose embedding is returned, too, ``(n,)``.
        packed: The images, as `Images.packed` returns them.
        names: Their names.
    """

    position: np.ndarray
    experience: np.ndarray
    row: np.ndarray
    keep: np.ndarray
    packed: Sequence[bytes]
    names: Sequence[str]


@dataclasses.dataclass
class Moments:
    """Number, mean and sum of squared deviations of features, which add up stably (Chan, Golub & LeVeque 1979).

    Attributes:
        count: Number of images.
        mean: float64 ``(D,)``.
        squares: Σ (f − mean)², float64 ``(D,)``.
    """

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Return the moments of features ``(n, D)``."""
        wide = features.astype(np.float64)
        mean = wide.mean(0)
        return cls(len(wide), mean, ((wide - mean) ** 2).sum(0))

    def plus(self, other: Moments) -> Moments:
        """Return the moments of the images of both."""
        count, apart = self.count + other.count, other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        return Moments(count, mean, self.squares + other.squares + apart**2 * (self.count * other.count / count))

    @property
    def deviation(self) -> np.ndarray:
        """Standard deviation ``(D,)``."""
        deviation: np.ndarray = np.sqrt(self.squares / self.count)
        return deviation


@dataclasses.dataclass
class Totals:
    """What was found in images of one experience; two of the same experience add up.

    Attributes:
        experience: Its number.
        images: Number of images.
        rows: Class row of each row of the statistics, int64 ``(k,)``.
        sums: `Learner.sums_of` these images; None for test images.
        embeddings: Statistics of the embeddings, if `sums` are of something else and the run needs them; else None.
        positions: Positions of the images whose embeddings follow, int64 ``(m,)``.
        kept: Their standardised embeddings, float32 ``(m, D)``.
        second: Those of their second views, ``(m, D)`` or ``(0, D)``.
        moments: Moments of the raw features, if they are measured; else None.
        bad: A sentence for each file that cannot be used.
        failures: Other errors.
    """

    experience: int
    images: int
    rows: np.ndarray
    sums: ClassStatistics | None = None
    embeddings: ClassStatistics | None = None
    positions: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    kept: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.float32))
    second: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.float32))
    moments: Moments | None = None
    bad: list[str] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)

    def plus(self, other: Totals) -> Totals:
        """Return the totals of the images of both; this object may be changed."""
        rows, there = _joined_rows(self.rows, other.rows)
        return Totals(
            self.experience,
            self.images + other.images,
            rows,
            _added(self.sums, other.sums, there),
            _added(self.embeddings, other.embeddings, there),
            np.concatenate([self.positions, other.positions]),
            _stacked(self.kept, other.kept),
            _stacked(self.second, other.second),
            self.moments.plus(other.moments) if self.moments and other.moments else self.moments or other.moments,
            self.bad + other.bad,
            self.failures + other.failures,
        )

    def to_bytes(self) -> bytes:
        """Return the totals as a safetensors file."""
        arrays = {
            "numbers": np.array([self.experience, self.images], np.int64),
            "rows": self.rows,
            "positions": self.positions,
            "kept": self.kept,
            "second": self.second,
            "bad": _text(self.bad),
            "failures": _text(self.failures),
        }
        for name, statistics in (("sums", self.sums), ("embeddings", self.embeddings)):
            if statistics is not None:
                arrays |= {f"{name}.{key}": tensor.numpy() for key, tensor in statistics.state().items()}
        if self.moments is not None:
            arrays |= {"count": np.array([self.moments.count]), "mean": self.moments.mean}
            arrays["squares"] = self.moments.squares
        return pack_arrays({name: np.ascontiguousarray(array) for name, array in arrays.items()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Totals:
        """Restore from `to_bytes`."""
        arrays = unpack_arrays(data)
        experience, images = arrays["numbers"].tolist()
        moments = None
        if "count" in arrays:
            moments = Moments(int(arrays["count"][0]), arrays["mean"], arrays["squares"])
        return cls(
            experience,
            images,
            arrays["rows"],
            _statistics(arrays, "sums."),
            _statistics(arrays, "embeddings."),
            arrays["positions"],
            arrays["kept"],
            arrays["second"],
            moments,
            _lines(arrays["bad"]),
            _lines(arrays["failures"]),
        )


class Worker:
    """Embeds images and adds them up. One backbone is loaded once.

    Args:
        work: What to do.
        device: Where a package is run, and where features are computed.
        threads: Threads of the backbone; 0: its own choice.
    """

    def __init__(self, work: Work, device: str | torch.device = "cpu", threads: int = 0) -> None:
        self.work = work
        self.embedder: Embedder
        if isinstance(work.backbone, BackbonePackage):
            self.embedder = TorchEmbedder(work.backbone, torch.device(device))
        else:
            self.embedder = OnnxEmbedder(work.backbone, threads)
        self.learner = learners.build(work.options, work.dim, work.priors, work.seed, device)

    def totals(self, rows: Rows) -> list[Totals]:
        """Return the totals of images, one for each experience among them, ascending."""
        return [self._of_one(number, rows) for number in np.unique(rows.experience).tolist()]

    def _of_one(self, experience: int, rows: Rows) -> Totals:
        chosen = np.flatnonzero(rows.experience == experience)
        places: list[int] = chosen.tolist()
        names = [rows.names[place] for place in places]
        images = Images.unpacked(self.work.kind, [rows.packed[place] for place in places], names)
        found = Totals(experience, len(chosen), np.zeros(0, np.int64))
        test = experience == TEST
        views = not test and not self.work.measure_only and self.learner.wants_second_view
        try:
            raw = self._embedded(images, lambda pixels: pixels)
            second = self._embedded(images, second_view) if views else None
        except InputError as error:
            found.bad = [problem for problem in images.problems() if problem is not None]
            found.failures = [] if found.bad else [str(error)]
            return found
        if self.work.measure_only:
            found.moments = Moments.of(raw)
            return found
        vectors = self._standardised(raw)
        others = None if second is None else self._standardised(second)
        keep = rows.keep[chosen]
        found.positions, found.kept = rows.position[chosen][keep], vectors[keep]
        if others is not None:
            found.second = others[keep]
        if not test:
            self._add(found, vectors, rows.row[chosen], others)
        return found

    def _embedded(self, images: Images, view: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Return the raw embeddings of a view of images ``(n, D)``."""
        found = [self.embedder.embed(view(pixels)) for pixels in images.batches(self.embedder.pixels, EMBED_BATCH)]
        embeddings = np.concatenate(found)
        check_embedded(embeddings, images.names)
        return embeddings

    def _standardised(self, raw: np.ndarray) -> np.ndarray:
        if self.work.standardisation is None:
            return np.ascontiguousarray(raw, np.float32)
        mu, sigma = self.work.standardisation
        return np.ascontiguousarray((raw - mu) / sigma, np.float32)

    def _add(self, found: Totals, vectors: np.ndarray, rows: np.ndarray, second: np.ndarray | None) -> None:
        """Add up embeddings ``(n, D)`` of classes ``(n,)``."""
        found.rows, places = np.unique(rows, return_inverse=True)
        embeddings, labels = torch.from_numpy(vectors), torch.from_numpy(places.astype(np.int64))
        others = None if second is None else torch.from_numpy(second)
        found.sums = self.learner.sums_of(Task(embeddings, labels, others))
        if self.learner.class_statistics() is None:
            found.embeddings = ClassStatistics(self.work.dim)
            found.embeddings.add(embeddings, labels)


def added(parts: Iterable[Totals]) -> list[Totals]:
    """Add up totals of the same experience; return one of each experience, in the order of their first ones."""
    found: dict[int, Totals] = {}
    for part in parts:
        before = found.get(part.experience)
        found[part.experience] = part if before is None else before.plus(part)
    return list(found.values())


def _joined_rows(mine: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
    """Return class rows followed by those of `other` that are not among them, and where each of `other` is then."""
    rows = np.concatenate([mine, np.setdiff1d(other, mine)])
    order = np.argsort(rows)
    return rows, torch.from_numpy(order[np.searchsorted(rows, other, sorter=order)].astype(np.int64))


def _added(mine: ClassStatistics | None, other: ClassStatistics | None, there: torch.Tensor) -> ClassStatistics | None:
    if mine is None or other is None:
        return mine or other
    mine.merge(other, there)
    return mine


def _stacked(mine: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.concatenate([part for part in (mine, other) if len(part)]) if len(mine) or len(other) else mine


def _statistics(arrays: Mapping[str, np.ndarray], prefix: str) -> ClassStatistics | None:
    state = {name[len(prefix) :]: torch.from_numpy(array) for name, array in arrays.items() if name.startswith(prefix)}
    return ClassStatistics.unchecked(state) if state else None


def _text(lines: Sequence[str]) -> np.ndarray:
    return np.frombuffer("\0".join(lines).encode(errors="surrogateescape"), np.uint8)  # no name contains a zero


def _lines(text: np.ndarray) -> list[str]:
    return text.tobytes().decode(errors="surrogateescape").split("\0") if len(text) else []
