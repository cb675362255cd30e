"""Whitening of embeddings along the few directions in which images of a class differ most.

W = a I + Uᵀ diag(m − a) U is the inverse root of a shrunk within-class covariance: m along its leading axes U, which
are orthonormal, and a in all other directions, whose variances count with their mean. It takes D·R numbers, not D²/2.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ssd_edge.errors import BundleRefusedError
from ssd_edge.learners.base import TensorSpec
from ssd_edge.learners.closed_form.sums import LEAST_SHRINKAGE, oas_shrinkage

RANK = 128  # most axes; `unknown` is detected as well as with all of them, measured on groceries
SPARE, ROUNDS = 16, 3  # of the subspace iteration
SMALL = 512  # features up to which the exact decomposition takes no time
HALF_ROUNDING = 2e-3  # of products of axes in float16
SCHEMA = {
    # whitened embeddings have a finite length in float32
    "whitening": TensorSpec(
        ("V",), "float32", "what multiplies each axis and, last, everything else", least=1e-37, most=1e12
    ),
    "axes": TensorSpec(("R", "D"), "float16", "orthonormal directions of largest variance", least=-1.01, most=1.01),
}


@dataclasses.dataclass(frozen=True)
class Whitening:
    """Symmetric matrix W that whitens embeddings; immutable.

    Attributes:
        factors: m for each axis and, last, a; float32 ``(R + 1,)``, positive.
        axes: U, float32 ``(R, D)`` with values of float16.
    """

    factors: Tensor
    axes: Tensor

    @classmethod
    def identity(cls, dim: int) -> Whitening:
        """Return the whitening of embeddings whose covariance is unknown."""
        return cls(torch.ones(1), torch.zeros(0, dim))

    @classmethod
    def fit(cls, covariance: Tensor, samples: float) -> Whitening:
        """Return the inverse root of a covariance shrunk by at least `LEAST_SHRINKAGE`.

        Its small eigenvalues are too small where it was estimated from few images, more so than OAS allows for.

        Args:
            covariance: Within-class covariance, float64 ``(D, D)``, not zero.
            samples: Number of samples that it was estimated from.
        """
        dim, total = len(covariance), float(covariance.trace())
        mean = total / dim
        share = max(oas_shrinkage(covariance, samples), LEAST_SHRINKAGE)
        variances, axes = _leading(covariance)
        above = variances > 1.000001 * mean  # not by rounding alone
        variances, axes = variances[above], axes[above]
        rest = max(total - float(variances.sum()), 0.0) / max(dim - len(variances), 1)
        variances = torch.cat([variances.double(), torch.tensor([rest], dtype=torch.float64)])
        factors = ((1.0 - share) * variances + share * max(mean, 1e-12)).rsqrt()
        # contiguous, because another memory order changes the last bits of a product after a restart
        return cls(factors.float(), axes.half().float().contiguous())

    @property
    def dim(self) -> int:
        """Number of features D."""
        return self.axes.shape[1]

    def of(self, vectors: Tensor) -> Tensor:
        """Return whitened vectors ``(…, D)``, in the precision of the vectors."""
        factors, axes = self.factors.to(vectors.dtype), self.axes.to(vectors.dtype)
        white: Tensor = factors[-1] * vectors + (vectors @ axes.T * (factors[:-1] - factors[-1])) @ axes
        return white

    def variance(self, covariance: Tensor) -> float:
        """Return the expected squared length of whitened vectors with this covariance ``(D, D)``, tr(W Σ W)."""
        squares, axes = self.factors.double().square(), self.axes.double()
        along = (axes @ covariance * axes).sum(1)
        return float(squares[-1] * covariance.trace() + (squares[:-1] - squares[-1]) @ along)

    def equals(self, other: Whitening) -> bool:
        """Return True if both are the same, bit for bit."""
        return torch.equal(self.factors, other.factors) and torch.equal(self.axes, other.axes)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of `SCHEMA`."""
        return {"whitening": self.factors.clone(), "axes": self.axes.half()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Whitening:
        """Restore from the tensors of `state`, whose shapes and ranges have been checked.

        Raises:
            BundleRefusedError: The axes are not orthonormal, or their number is wrong.
        """
        factors, axes = state["whitening"].clone(), state["axes"].float()
        count, dim = axes.shape
        if len(factors) != count + 1 or count > min(RANK, dim):
            raise BundleRefusedError(
                f"the thresholds for 'unknown' are damaged: {len(factors)} numbers that whiten along {count} axes of "
                f"{dim} features; install the bundle again"
            )
        if not torch.allclose(axes @ axes.T, torch.eye(count), rtol=0, atol=HALF_ROUNDING):
            raise BundleRefusedError(
                "the axes of the thresholds for 'unknown' are not at right angles and of unit length; install the "
                "bundle again"
            )
        return cls(factors, axes)


def _leading(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return at most `RANK` largest eigenvalues of a covariance, and their eigenvectors in rows ``(R, D)``.

    Those of many features are found by subspace iteration in float32, which is accurate for the large ones; the others
    barely differ from the mean of the rest.
    """
    dim = len(covariance)
    if dim <= SMALL:
        values, vectors = torch.linalg.eigh(covariance)
    else:
        matrix, generator = covariance.float(), torch.Generator().manual_seed(0)
        basis = torch.randn(dim, RANK + SPARE, generator=generator)
        for _ in range(ROUNDS + 1):
            basis = torch.linalg.qr(matrix @ basis).Q
        values, turned = torch.linalg.eigh(basis.T @ (matrix @ basis))
        vectors = basis @ turned
    return values[-RANK:], vectors[:, -RANK:].T
