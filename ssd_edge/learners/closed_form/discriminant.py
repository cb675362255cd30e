"""The linear discriminant of a within-class covariance, and its answers to samples that are held out of it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ssd_edge.learners.closed_form.sums import LEAST_SHARE, oas_shrinkage, probes

EXACT_TRACE = 300  # dimensions up to which a trace is exact; beyond, an inverse would take as long as everything else
MOST_USED = 0.99  # of the samples' degrees of freedom: bounds a quotient, which would be infinite at 1


@dataclasses.dataclass(frozen=True)
class Discriminant:
    """Linear discriminant with equal class priors: scores zᵀΛ⁻¹μ_c − ½ μ_cᵀΛ⁻¹μ_c.

    The mean of n_c samples makes μᵀΛ⁻¹μ too large by tr(Λ⁻¹Σ)/n_c, so a class with few samples would rarely be
    predicted next to classes with many; this is subtracted. Λ is solved from the same samples as Σ, which makes the
    trace t too small as well: of one sample that is left out, xᵀΛ⁻¹x is larger by the factor 1/(1 − (1 − s) t/N)
    (Sherman & Morrison), with s the weight of the identity in Λ and N the number of samples.

    Of samples with two views, Σ is the covariance of all views, but the class means are those of both views of each
    sample, m, whose covariance is Σ less that of half their difference, d: this one is in the trace.

    Attributes:
        factor: L with Λ = LLᵀ, the within-class covariance Σ shrunk by `oas_shrinkage`, float64 ``(D, D)``.
        share: s.
        trace: t = tr(Λ⁻¹Σ), or of two views tr(Λ⁻¹(Σ − Σ_d)).
        samples: N.
    """

    factor: Tensor
    share: float
    trace: float
    samples: float

    @classmethod
    def fit(cls, covariance: Tensor, samples: float, apart: Tensor | None = None) -> Discriminant:
        """Solve the discriminant of a covariance.

        Args:
            covariance: Σ, float64 ``(D, D)``; overwritten, because with many features new memory takes the time.
            samples: Number of samples that it was estimated from.
            apart: Σ_d V of two views, with the vectors V of `probes`, ``(D, P)``; None for one view.
        """
        size, signs = len(covariance), probes(len(covariance), EXACT_TRACE)
        share, mean = max(oas_shrinkage(covariance, samples), LEAST_SHARE), float(covariance.trace()) / size
        along = covariance @ signs
        covariance.mul_(1.0 - share).diagonal().add_(share * max(mean, 1e-12))
        factor = torch.linalg.cholesky(covariance, out=covariance)
        trace = _trace(signs, torch.cholesky_solve(along, factor))
        if apart is not None:
            trace = max(trace - _trace(probes(size), torch.cholesky_solve(apart, factor)), 0.0)
        return cls(factor, share, trace, samples)

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
        self, means: Tensor, counts: Tensor, vectors: Tensor, labels: Tensor, part: Tensor, apart: Tensor | None = None
    ) -> Tensor:
        """Return scores of samples, each by the discriminant of all samples but those of its part.

        Removing the samples f of a class, k of its n, from the scatter removes U (I + 11ᵀ/(n − k)) Uᵀ with
        U = (x_i − μ_c)_{i∈f}, and of two views also the ddᵀ of each: Λ⁻¹ changes by a matrix of rank k or 2k
        (Woodbury), and its mean becomes (nμ − Σ_f x)/(n − k). So all that is needed are products of means and samples
        in Λ⁻¹. The weight of the identity relative to the scatter stays that of all samples.

        Args:
            means: Class means with all samples, ``(C, D)``.
            counts: Number of all samples, ``(C,)``.
            vectors: The samples, or the mean m of two views of each, ``(N, D)``; they count in all of the above.
            labels: Their classes, int64 ``(N,)``.
            part: Number of the part of each, int64 ``(N,)``; negative: it is never held out.
            apart: Half the difference of two views, d, ``(N, D)``; the first view, m + d, is scored. None for one view.

        Returns:
            float64 ``(N, C)``; −∞ for a class of which nothing is left, and for samples that are never held out.
        """
        classes, rest = len(counts), max(1.0 - self.share, LEAST_SHARE)
        white_means = self._whiten(means)
        between = white_means.T @ white_means
        scores = torch.full((len(labels), classes), -torch.inf, dtype=torch.float64)
        for number in torch.unique(part[part >= 0]).tolist():
            held = (part == number).nonzero().flatten()
            own, k = labels[held], len(held)
            remaining = counts - torch.bincount(own, minlength=classes)
            white = self._whiten(vectors[held] if apart is None else torch.cat([vectors[held], apart[held]]))
            across = white_means.T @ white
            products = torch.cat([torch.cat([between, across], 1), torch.cat([across.T, white.T @ white], 1)])  # Q
            spread = products[:, classes:].clone()  # QU
            spread[:, :k] -= products[:, own]
            within = spread[classes:].clone()  # UᵀQU
            within[:k] -= spread[own]
            inner = torch.eye(len(within), dtype=torch.float64)
            # Of a class of which nothing is left, U1 = 0, and any (I + b 11ᵀ) would do; b = 0 can be inverted.
            inner[:k, :k] -= ((own[:, None] == own) & (remaining[own] > 0)) / counts[own]
            inner *= self.samples / rest
            left = self.samples - k
            changed = products + spread @ torch.linalg.solve(inner - within, spread.T)
            changed *= left / self.samples
            kept = remaining.clamp_min(1)
            into = torch.cat([(counts / kept).diag(), -torch.nn.functional.one_hot(own, classes) / kept])
            new = changed[:, : classes + k] @ into
            lengths = (into * new[: classes + k]).sum(0) - self._noise(left) / kept
            shown = new[classes : classes + k] if apart is None else new[classes : classes + k] + new[classes + k :]
            scores[held] = (shown - 0.5 * lengths).masked_fill(remaining == 0, -torch.inf)
        return scores

    def _whiten(self, rows: Tensor) -> Tensor:
        """Return L⁻¹ times rows ``(N, D)``, float64 ``(D, N)``."""
        white: Tensor = torch.linalg.solve_triangular(self.factor, rows.to(self.factor).T, upper=False)
        return white

    def _noise(self, samples: float) -> float:
        """Return what one sample adds to the squared length of its class mean, see `Discriminant`."""
        used = (1.0 - self.share) * self.trace / max(samples, 1.0)
        return self.trace / (1.0 - min(used, MOST_USED))


def _trace(vectors: Tensor, products: Tensor) -> float:
    """Return the trace of M from the vectors of `probes` and their products M v, both ``(D, P)``."""
    return float((vectors * products).sum()) * len(vectors) / float(vectors.square().sum())
