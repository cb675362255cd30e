"""Drift of the images that a device sees, relative to those that its classes were learned from.

Two quantities of each image are counted in bins. Both are relative to the nearest class, so that a change in the class
frequencies is not drift:

* *directions*: the embedding's offset from the class mean along the 16 principal directions of the within-class
  covariance. The expected counts follow from the class statistics of the bundle.
* *distance*: the embedding's Mahalanobis distance from the class mean. Real embeddings have far heavier tails than a
  Gaussian with the same covariance, so the reference is the device's own first `WINDOW` images.

Scores and rejects are reported too, but do not affect the level, because they also depend on the class frequencies. The
memory is fixed, and no image or embedding is stored. docs/service.md has figures on photographs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import threading
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ssd_edge.errors import InputError
from ssd_edge.learners.closed_form.sums import ClassStatistics

log = logging.getLogger(__name__)

# Limits of the population stability index Σ (o − e) ln(o/e), a convention of credit scoring (N. Siddiqi, Credit Risk
# Scorecards, 2006).
MODERATE, DRIFTED = 0.1, 0.25
BINS = 10
WINDOW = 1000  # images; a report covers the last one to two windows
# Without drift, the index of n images in B bins is distributed like χ²(B − 1)/n (B. Yurdakul, Statistical Properties of
# Population Stability Index, 2018): for n = 300, one in two thousand reaches 0.1.
MINIMUM = 300
DIRECTIONS = 16
SOLID = 30  # images per class; the error of a mean of n images acts like drift with an index of 1/n
SAMPLES, AT_ONCE = 20_000, 1000

DISTANCES = np.geomspace(0.5, 1.5, BINS - 1)  # bin edges of distance/√D, which is about 1 for a Gaussian
SHARES = np.array([0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 0.99999])  # bin edges of the score
Level = Literal["collecting", "stable", "moderate", "drifted"]
KEYS = ("counts", "images", "rejected", "windows", "reference")


class Reference:
    """Expected counts for a device's classes, computed from their statistics.

    Args:
        statistics: Statistics of the classes.

    Attributes:
        dim: Dimension D of the embeddings.
        solid: True if a class has at least `SOLID` images; otherwise the expected counts are not used.
        edges: Bin edges, ``(directions, BINS − 1)``.
        expected: Shares of the images in each bin, float64 ``(directions, BINS)``.
        digest: Digest that identifies the reference of stored counts, uint8 ``(32,)``.

    Raises:
        InputError: No class has an image.
    """

    def __init__(self, statistics: ClassStatistics) -> None:
        seen = statistics.counts > 0
        if not bool(seen.any()):
            raise InputError("drift is measured relative to classes, but this device has none yet; teach it one first")
        self._means = statistics.means[seen].double()
        self._solid = (statistics.counts[seen] >= SOLID).numpy()
        self.dim, self.solid = self._means.shape[1], bool(self._solid.any())
        covariance = statistics.shrunk_covariance()
        variances, vectors = torch.linalg.eigh(covariance)  # ascending
        kept = min(DIRECTIONS, self.dim)
        self._axes = vectors[:, -kept:] / variances[-kept:].sqrt()
        self._precision = torch.linalg.inv(covariance)
        self._weights = self._means @ self._precision
        self._bias = 0.5 * (self._weights * self._means).sum(1)
        known = b"".join(t.numpy().tobytes() for t in (self._means, self._axes, statistics.counts))
        self.digest = np.frombuffer(hashlib.sha256(known).digest(), np.uint8)
        self.edges, self.expected = self._expect(covariance)

    def _expect(self, covariance: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return bin edges and expected shares from the deciles of sampled embeddings.

        An embedding takes part only with its products with the weights, which decide the nearest class, and with the
        axes. They are sampled instead: with thousands of features that takes a hundredth of the time.
        """
        means = self._means[torch.from_numpy(self._solid)] if self.solid else self._means
        products = torch.cat([self._weights.T, self._axes], 1)
        variances, vectors = torch.linalg.eigh(products.T @ covariance @ products)
        factor = (vectors * variances.clamp_min(0).sqrt()).T
        centres, own = means @ products, self._means @ self._axes
        generator = torch.Generator().manual_seed(0)
        parts = []
        for start in range(0, SAMPLES, AT_ONCE):
            noise = torch.randn(AT_ONCE, len(factor), generator=generator, dtype=torch.float64) @ factor
            sampled = centres[torch.arange(start, start + AT_ONCE) % len(means)] + noise
            nearest = (sampled[:, : len(self._means)] - self._bias).argmax(1)
            parts.append((sampled[:, len(self._means) :] - own[nearest]).numpy())
        offsets = np.concatenate(parts)
        edges = np.quantile(offsets, np.arange(1, BINS) / BINS, axis=0).T
        return edges, np.full((len(edges), BINS), 1 / BINS)

    def measure(self, embeddings: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return offsets ``(N, directions)``, distance/√D ``(N,)`` and whether each nearest class is solid ``(N,)``."""
        wide = embeddings.double()
        nearest = (wide @ self._weights.T - self._bias).argmax(1)
        offset = wide - self._means[nearest]
        square = ((offset @ self._precision) * offset).sum(1).clamp_min(0)
        solid = self._solid[nearest.numpy()] if self.solid else np.ones(len(wide), bool)
        return (offset @ self._axes).numpy(), (square / self.dim).sqrt().numpy(), solid


@dataclasses.dataclass(frozen=True)
class DriftReport:
    """Drift over the last one to two windows of images; a figure is None while there are too few images for it.

    Attributes:
        level: ``collecting`` (fewer than `MINIMUM` images), ``stable``, ``moderate`` (index of at least 0.1) or
            ``drifted`` (at least 0.25).
        psi: The index that decides, the larger of `psi_directions` and `psi_distance`.
        psi_directions: Mean index over the directions, relative to the bundle's statistics; relative to the device's
            first window if no class was learned from at least `SOLID` images.
        psi_distance: Index of the distances, relative to the first window.
        psi_score: Index of the scores, relative to the first window.
        images: Number of images.
        images_needed: Smallest number of further images until there is a level.
        reject_rate: Share of rejected images.
        reject_rate_at_first: Share of rejected images in the first window.
    """

    level: Level
    psi: float | None
    psi_directions: float | None
    psi_distance: float | None
    psi_score: float | None
    images: int
    images_needed: int
    reject_rate: float | None
    reject_rate_at_first: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return dataclasses.asdict(self)


class Monitor:
    """Drift counts of the first window, the last full window and the current window; thread-safe.

    Args:
        reference: Reference of the current generation. Counts start anew with another reference.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self._lock = threading.Lock()
        rows = len(reference.edges) + 2  # then distance, score
        self._counts = np.zeros((3, rows, BINS), np.int64)  # first, last, current window
        self._images = np.zeros(3, np.int64)
        self._rejected = np.zeros(3, np.int64)
        self._windows = np.zeros(1, np.int64)  # number of full windows

    def add(self, embeddings: Tensor | np.ndarray, scores: ArrayLike, known: ArrayLike | None = None) -> None:
        """Count images.

        Args:
            embeddings: Embeddings ``(N, D)``.
            scores: Probability of the best class ``(N,)``.
            known: False for an image that was rejected as unknown ``(N,)``; None if no image was rejected.

        Raises:
            InputError: Shapes do not match, an embedding is not finite, or a score is outside 0..1. Nothing is counted.
        """
        vectors = torch.as_tensor(embeddings)
        shares = np.asarray(scores, np.float64)
        accepted = np.ones(len(shares), bool) if known is None else np.asarray(known, bool)
        count, dim = len(vectors), self.reference.dim
        if tuple(vectors.shape) != (count, dim) or shares.shape != (count,) or accepted.shape != (count,):
            raise InputError(
                f"embeddings, scores and known have the shapes {tuple(vectors.shape)}, {shares.shape} and "
                f"{accepted.shape}, but (N, {dim}), (N,) and (N,) are required; nothing was counted"
            )
        if not bool(vectors.isfinite().all()):
            raise InputError("an embedding is NaN or infinite; nothing was counted. Check the backbone")
        if not ((shares >= 0) & (shares <= 1)).all():  # also false for NaN
            raise InputError("a score is outside 0 to 1; nothing was counted. Pass probabilities, not logits")
        offsets, distances, solid = self.reference.measure(vectors)
        bins = np.empty((count, self._counts.shape[1]), np.int64)
        for row, edges in enumerate(self.reference.edges):
            bins[:, row] = np.searchsorted(edges, offsets[:, row])
        bins[~solid, : len(self.reference.edges)] = -1  # not counted
        bins[:, -2] = np.searchsorted(DISTANCES, distances)
        bins[:, -1] = np.searchsorted(SHARES, shares)
        with self._lock:
            at = 0
            while at < count:
                part = slice(at, at + WINDOW - int(self._images[2]))
                self._count(bins[part], accepted[part])
                at = part.stop

    def _count(self, bins: np.ndarray, accepted: np.ndarray) -> None:
        """Count images in the current window, which has space for them; a full window becomes the last one."""
        for row in range(bins.shape[1]):
            column = bins[:, row]
            self._counts[2, row] += np.bincount(column[column >= 0], minlength=BINS)
        self._images[2] += len(bins)
        self._rejected[2] += int((~accepted).sum())
        if self._images[2] == WINDOW:
            for kept in (self._counts, self._images, self._rejected):
                kept[1] = kept[2]
                if self._windows[0] == 0:
                    kept[0] = kept[2]
                kept[2] = 0
            self._windows += 1

    def report(self) -> DriftReport:
        """Return the drift over the last one to two windows."""
        with self._lock:
            counts, images, rejected = self._counts.copy(), self._images.copy(), self._rejected.copy()
            filled = int(self._windows[0])
        recent, total = counts[1] + counts[2], int(images[1] + images[2])
        later = recent if filled > 1 else counts[2]  # the first window is not compared with itself
        first = [_shares(row) for row in counts[0]] if filled else [None] * len(recent)
        if self.reference.solid:
            pairs = list(zip(recent[:-2], self.reference.expected, strict=True))
        else:
            pairs = list(zip(later[:-2], first[:-2], strict=True))
        each = [psi(*pair) for pair in pairs]
        known = [value for value in each if value is not None]
        directions = float(np.mean(known)) if len(known) == len(each) else None
        distance, score = psi(later[-2], first[-2]), psi(later[-1], first[-1])
        needed = MINIMUM if self.reference.solid else WINDOW + MINIMUM
        worst = max((value for value in (directions, distance) if value is not None), default=None)
        return DriftReport(
            level=level(worst),
            psi=_rounded(worst),
            psi_directions=_rounded(directions),
            psi_distance=_rounded(distance),
            psi_score=_rounded(score),
            images=total,
            images_needed=0 if worst is not None else max(needed - total, 1),
            reject_rate=_rounded(int(rejected[1] + rejected[2]) / total if total else None),
            reject_rate_at_first=_rounded(int(rejected[0]) / WINDOW if filled else None),
        )

    def state(self) -> dict[str, np.ndarray]:
        """Return the counts as named arrays of fixed size, for `ssd_edge.files.write_tensors`."""
        with self._lock:
            arrays: list[np.ndarray] = [
                self._counts,
                self._images,
                self._rejected,
                self._windows,
                self.reference.digest,
            ]
            return {name: array.copy() for name, array in zip(KEYS, arrays, strict=True)}

    @classmethod
    def from_state(cls, reference: Reference, state: Mapping[str, np.ndarray]) -> Monitor:
        """Continue with stored counts. Damaged counts and those of another reference are dropped and logged."""
        monitor = cls(reference)
        fresh = monitor.state()
        if set(state) != set(KEYS) or any(
            state[name].shape != array.shape or state[name].dtype != array.dtype for name, array in fresh.items()
        ):
            log.warning("the drift counts are damaged; counting starts anew", extra={"code": "drift_reset"})
        elif not np.array_equal(state["reference"], reference.digest):
            log.info(
                "the classes have changed since the drift counts were stored; counting starts anew",
                extra={"code": "drift_reset"},
            )
        elif not _plausible(state):
            log.warning("the drift counts are inconsistent; counting starts anew", extra={"code": "drift_reset"})
        else:
            monitor._counts, monitor._images, monitor._rejected, monitor._windows = (
                np.array(state[name]) for name in KEYS[:-1]
            )
        return monitor


def psi(observed: np.ndarray, expected: np.ndarray | None) -> float | None:
    """Return the population stability index of counts ``(BINS,)`` relative to shares; None if there are too few."""
    if expected is None or observed.sum() < MINIMUM:
        return None
    shares = _shares(observed)
    return float(((shares - expected) * np.log(shares / expected)).sum())


def level(index: float | None) -> Level:
    """Return the level of an index."""
    if index is None:
        return "collecting"
    return "drifted" if index >= DRIFTED else "moderate" if index >= MODERATE else "stable"


def _shares(counts: np.ndarray) -> np.ndarray:
    """Return the share of each bin, with half an image added to each so that no share is 0."""
    return np.asarray((counts + 0.5) / (counts.sum() + BINS / 2))


def _plausible(state: Mapping[str, np.ndarray]) -> bool:
    """Return True if the counts are consistent with each other."""
    counts, images, rejected = state["counts"], state["images"], state["rejected"]
    filled = int(state["windows"][0])
    full = [WINDOW if filled > 0 else 0] * 2
    return (
        filled >= 0
        and images[:2].tolist() == full
        and 0 <= images[2] < WINDOW
        and bool((counts >= 0).all() and (rejected >= 0).all() and (rejected <= images).all())
        and bool((counts.sum(2) <= images[:, None]).all() and (counts[:, -2:].sum(2) == images[:, None]).all())
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
