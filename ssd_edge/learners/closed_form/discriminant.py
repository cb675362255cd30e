"""The linear discriminant of a within-class covariance, and its answers to samples that are held out of it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ssd_edge.learners.closed_form.sums import LEAST_SHARE, oas_shrinkage

EXACT_TRACE, SIGNS = 300, 64  # dimensions up to which a trace is exact, and random vectors beyond
MOST_USED = 0.99  # of the samples' degrees of freedom: bounds a quotient, which would be infinite at 1


@dataclasses.dataclass(frozen=True)
class Discriminant:
    """Linear discriminant with equal class priors: scores zᵀΛ⁻¹μ_c − ½ μ_cᵀΛ⁻¹μ_c.

    The mean of n_c samples makes μᵀΛ⁻¹μ too large by tr(Λ⁻¹Σ)/n_c, so a class with few samples would rarely be
    predicted next to classes with many; this is subtracted. Λ is solved from the same samples as Σ, which makes the
    trace t too small as well: of one sample that is left out, xᵀΛ⁻¹x is larger by the factor 1/(1 − (1 − s) t/N)
    (Sherman & Morrison), with s the weight of the identity in Λ and N the number of samples.

    Attributes:
        factor: L with Λ = LLᵀ, the within-class covariance Σ shrunk by `oas_shrinkage`, float64 ``(D, D)``.
        share: s.
        trace: t = tr(Λ⁻¹Σ).
        samples: N.
        views: Number of views of each sample in Σ, which then has this many times the rank.
    """

    factor: Tensor
    share: float
    trace: float
    samples: float
    views: int = 1

    @classmethod
    def fit(cls, covariance: Tensor, samples: float, views: int = 1) -> Discriminant:
        """Solve the discriminant of a covariance.

        Args:
            covariance: Σ, float64 ``(D, D)``; overwritten, because with many features new memory takes the time.
            samples: Number of samples that it was estimated from.
            views: Number of views of each.
        """
        size, signs = len(covariance), _signs(len(covariance)).to(covariance)
        share, mean = max(oas_shrinkage(covariance, samples), LEAST_SHARE), float(covariance.trace()) / size
        along = covariance @ signs
        covariance.mul_(1.0 - share).diagonal().add_(share * max(mean, 1e-12))
        factor = torch.linalg.cholesky(covariance, out=covariance)
        trace = float((signs * torch.cholesky_solve(along, factor)).sum()) * size / float(signs.square().sum())
        return cls(factor, share, trace, samples, views)

    def weights(self, means: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return values ``(D, C)`` and biases ``(C,)`` of the scores, float64.

        Args:
            means: Class means, float64 ``(C, D)``.
            counts: Number of samples, ``(C,)``; a class without samples gets a bias of −∞.
        """
        values = torch.cholesky_solve(means.T, self.factor)
        bias = (means.T * values).sum(0) - self._noise(self.samples) / counts.clamp_min(1)
        return values, (-0.5 * bias).masked_fill(counts == 0, -torch.inf)

    def held_out(
        self, means: Tensor, counts: Tensor, vectors: Tensor, labels: Tensor, part: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        """Return scores of samples, each by the discriminant of all samples but those of its part.

        Removing the samples f of a class, k of its n, from the scatter removes U (I + 11ᵀ/(n − k)) Uᵀ with
        U = (x_i − μ_c)_{i∈f}: Λ⁻¹ changes by a matrix of rank k (Woodbury), and its mean becomes (nμ − Σ_f x)/(n − k).
        So all that is needed are products of means and samples in Λ⁻¹. The weight of the identity relative to the
        scatter stays that of all samples.

        Args:
            means: Class means with all samples, ``(C, D)``.
            counts: Number of all samples, ``(C,)``.
            vectors: The samples, ``(N, D)``; they count in all of the above.
            labels: Their classes, int64 ``(N,)``.
            part: Number of the part of each, int64 ``(N,)``; negative: it is never held out.
            seen: What is scored of each sample, ``(N, D)``, if it is not what was learned of it.

        Returns:
            float64 ``(N, C)``; −∞ for a class of which nothing is left, and for samples that are never held out.
        """
        classes, rest = len(counts), max(1.0 - self.share, LEAST_SHARE)
        rows = torch.cat([means, vectors.to(means), *([] if seen is None else [seen.to(means)])])
        white = torch.linalg.solve_triangular(self.factor, rows.T, upper=False)
        products = white.T @ white[:, : classes + len(vectors)]  # Q, (C + N, C + N), or (C + 2N, C + N)
        scores = torch.full((len(labels), classes), -torch.inf, dtype=torch.float64)
        for number in torch.unique(part[part >= 0]).tolist():
            held = (part == number).nonzero().flatten()
            own, columns = labels[held], torch.cat([torch.arange(classes), classes + held])
            shown = columns if seen is None else torch.cat([columns, classes + len(labels) + held])
            spread = products[shown][:, classes + held] - products[shown][:, own]  # QU
            within = spread[: len(columns)]
            inner = torch.eye(len(held)) - (own[:, None] == own) / counts[own]
            inner = inner * (self.samples / rest) - (within[classes:] - within[own])
            left = self.samples - len(held)
            changed = products[shown][:, columns] + spread @ torch.linalg.solve(inner, within.T)
            changed *= left / self.samples
            remaining = counts - torch.bincount(own, minlength=classes)
            kept = remaining.clamp_min(1)
            into = torch.cat([(counts / kept).diag(), -torch.nn.functional.one_hot(own, classes) / kept])
            new = changed @ into
            lengths = (into * new[: len(columns)]).sum(0) - self._noise(left) / kept
            scores[held] = (new[-len(held) :] - 0.5 * lengths).masked_fill(remaining == 0, -torch.inf)
        return scores

    def _noise(self, samples: float) -> float:
        """Return what one sample adds to the squared length of its class mean, see `Discriminant`."""
        used = (1.0 - self.share) * self.trace / max(self.views * samples, 1.0)
        return self.trace / (1.0 - min(used, MOST_USED))


def _signs(size: int) -> Tensor:
    """Return vectors v in columns of which the mean of vᵀMv is the trace of a matrix, float64 ``(size, n)``.

    For few dimensions it is exact. Random signs are within about one percent (Hutchinson 1989), always the same ones;
    an inverse would take as long as everything else.
    """
    if size <= EXACT_TRACE:
        return torch.eye(size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, (size, SIGNS), generator=generator).double() * 2 - 1
