"""Sufficient statistics: all that closed-form learners keep of the data they have seen.

Sums are accumulated in float64, so that the order of tasks and samples does not matter beyond rounding.
Nothing here grows with the number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ssd_edge.errors import InputError

PRIOR_GRID = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)
LEAST_SIGNAL = 1e-3  # images of few, alike classes must not talk the read-out out of telling them apart
RIDGE_GRID = tuple(10.0 ** (e / 2) for e in range(-12, 9))  # λ relative to the mean eigenvalue
NO_VARIANCE = 1e-12  # of the mean square: less than this is what rounding leaves of equal samples


class ClassStatistics:
    """Counts, sums and second moments of embeddings.

    Attributes:
        counts: float64 ``(C,)``.
        sums: float64 ``(C, D)``; a mean is sums/counts. (The mean of a single image is that image's
            embedding, which is why a class must be taught with at least three.)
        per_class: whether second moments are kept class by class, so that a class can be taken out again.
        moments: float64, Σ z zᵀ over all samples ``(D, D)``, or of each class ``(C, D, D)``.
        single: whether sums and moments are kept in float32, at half the size: they are still added up in float64, and
            rounded where a change ends (`settle`).
    """

    def __init__(self, dim: int, per_class: bool = False, single: bool = False) -> None:
        self.per_class, self.single = per_class, single
        self.counts = torch.zeros(0, dtype=torch.float64)
        self.sums = torch.zeros(0, dim, dtype=torch.float64)
        self.moments = torch.zeros((0, dim, dim) if per_class else (dim, dim), dtype=torch.float64)

    def copy(self) -> ClassStatistics:
        """Statistics of their own, equal bit for bit."""
        twin = ClassStatistics(self.sums.shape[1], self.per_class, self.single)
        twin.counts, twin.sums, twin.moments = self.counts.clone(), self.sums.clone(), self.moments.clone()
        return twin

    def grow(self, classes: int) -> None:
        """Make room for rows up to `classes`."""
        missing = classes - len(self.counts)
        if missing > 0:
            self.counts = torch.cat([self.counts, self.counts.new_zeros(missing)])
            self.sums = torch.cat([self.sums, self.sums.new_zeros(missing, self.sums.shape[1])])
            if self.per_class:
                self.moments = torch.cat([self.moments, self.moments.new_zeros(missing, *self.moments.shape[1:])])

    def add(self, vectors: Tensor, labels: Tensor) -> None:
        """Add samples: ``(N, D)`` and their rows, int64 ``(N,)``."""
        self.grow(int(labels.max()) + 1)
        labels = labels.cpu()
        for part, truth in zip(vectors.split(4096), labels.split(4096), strict=True):
            wide = part.cpu().double()
            self.counts.index_add_(0, truth, torch.ones(len(truth), dtype=torch.float64))
            self.sums.index_add_(0, truth, wide)
            if self.per_class:
                for row in truth.unique():
                    own = wide[truth == row]
                    self.moments[row] += own.T @ own
            else:
                self.moments += wide.T @ wide
        # A product XᵀX may be an ulp off symmetric, but only a triangle is saved: a restart must change no bit.
        touched = labels.unique() if self.per_class else ...
        self.moments[touched] = (self.moments[touched] + self.moments[touched].mT) / 2

    def remove(self, row: int, approximately: bool = False) -> bool:
        """Forget the samples of one class; its row stays, empty.

        One sum of all second moments does not say which part of it is this class's. What `approximately` takes out
        of it is n μμᵀ + (n − 1) W, W the pooled within-class covariance: what a class of that size and mean adds on
        average. W is the same afterwards, so what the class has said of it stays.

        Args:
            row: of the class.
            approximately: whether that will do where second moments are not kept class by class.

        Returns:
            Whether nothing of the class is left: with `per_class`, or if it had one sample or was the only class.

        Raises:
            InputError: second moments are not kept class by class, and an approximation was not asked for.
        """
        if not (self.per_class or approximately):
            raise InputError("the second moments of all classes are one sum, from which no class can be taken out")
        count, total = float(self.counts[row]), self.total
        if self.per_class:
            for kept in (self.counts, self.sums, self.moments):
                kept[row] = 0.0
        elif count:
            scatter, freedom = self.scatter_within(), self.degrees_of_freedom
            self.counts[row], self.sums[row] = 0.0, 0.0
            # put together from its parts, not subtracted: nothing can turn negative, and of no class 0 is left
            moments = (self.degrees_of_freedom / freedom if freedom else 0.0) * scatter + self._scatter_of_means()
            self.moments = (moments + moments.mT) / 2
        return self.per_class or count <= 1 or count == total

    def join(self, row: int, into: int) -> None:
        """Count the samples of one class as those of another; its row stays, empty.

        Raises:
            InputError: both are one row.
        """
        if row == into:
            raise InputError(f"row {row} cannot be joined with itself; name two rows")
        for kept in (self.counts, self.sums, *((self.moments,) if self.per_class else ())):
            kept[into] += kept[row]
            kept[row] = 0.0

    def subtract(self, other: ClassStatistics, rows: Tensor) -> None:
        """Take out what others have seen: the inverse of `merge`, but for rounding.

        Args:
            other: keeps the same moments.
            rows: int64; its row i is row ``rows[i]`` of these. Where it has no samples that does not matter.

        Raises:
            InputError: these hold fewer samples of a class than the other; nothing has changed then.
        """
        known = other.counts > 0
        rows = rows[known]
        self.counts = counts_without(self.counts, other.counts[known], rows)
        empty = self.counts == 0
        self.sums = self.sums.index_add(0, rows, -other.sums[known])
        self.sums[empty] = 0.0  # rounding leaves no exact 0
        if self.per_class:
            self.moments = self.moments.index_add(0, rows, -other.moments[known])
            self.moments[empty] = 0.0
        else:
            self.moments = torch.zeros_like(self.moments) if empty.all() else self.moments - other.moments

    def without_rows(self, rows: Iterable[int]) -> ClassStatistics:
        """A copy without some empty rows; those above move up.

        Raises:
            InputError: a row holds samples, or there is none of that number.
        """
        left_out = set(rows)
        held = [row for row in sorted(left_out) if not 0 <= row < len(self.counts) or self.counts[row]]
        if held:
            raise InputError(
                f"of {len(self.counts)} rows only empty ones can be left out, but rows {held} are not; remove or join "
                "their classes first"
            )
        kept = torch.tensor([row for row in range(len(self.counts)) if row not in left_out], dtype=torch.int64)
        fewer = ClassStatistics(self.sums.shape[1], self.per_class, self.single)
        fewer.counts, fewer.sums = self.counts[kept], self.sums[kept]
        fewer.moments = self.moments[kept] if self.per_class else self.moments.clone()
        return fewer

    def merge(self, other: ClassStatistics, rows: Tensor) -> None:
        """Add what others have seen: their row i to row ``rows[i]`` of these; both keep the same moments."""
        if len(rows):
            self.grow(int(rows.max()) + 1)
        self.counts.index_add_(0, rows, other.counts)
        self.sums.index_add_(0, rows, other.sums)
        if self.per_class:
            self.moments.index_add_(0, rows, other.moments)
        else:
            self.moments += other.moments

    @property
    def second(self) -> Tensor:
        """Σ z zᵀ over all samples, ``(D, D)``."""
        return self.moments.sum(0) if self.per_class else self.moments

    @property
    def means(self) -> Tensor:
        """Class means ``(C, D)``; zero for a class without samples."""
        return self.sums / self.counts.clamp_min(1)[:, None]

    @property
    def total(self) -> float:
        """Number of samples."""
        return float(self.counts.sum())

    @property
    def degrees_of_freedom(self) -> float:
        """Degrees of freedom of `scatter_within`: samples minus classes that have any."""
        return self.total - int((self.counts > 0).sum())

    def scatter_within(self) -> Tensor:
        """Σ (z − μ_y)(z − μ_y)ᵀ, ``(D, D)``: exact, from the sums alone."""
        return self.second - self._scatter_of_means()

    def within_covariance(self) -> Tensor:
        """Return the pooled within-class covariance ``(D, D)``, zero if no class has two samples."""
        return self.scatter_within() / max(self.degrees_of_freedom, 1.0)

    def shrunk_covariance(self) -> Tensor:
        """Return `within_covariance` shrunk by `oas_shrinkage`: positive definite."""
        return shrink(self.within_covariance(), max(self.degrees_of_freedom, 1.0))

    def _scatter_of_means(self) -> Tensor:
        """Σ_c n_c μ_c μ_cᵀ, ``(D, D)``."""
        means = self.means
        return (means * self.counts[:, None]).T @ means

    def covariance(self, row: int) -> Tensor:
        """Covariance of one class, ``(D, D)``, divided by n − 1; zero for one sample. With `per_class` only."""
        count, mean = self.counts[row], self.sums[row] / self.counts[row].clamp_min(1)
        covariance = (self.moments[row] - count * torch.outer(mean, mean)) / (count - 1).clamp_min(1)
        mean_square = self.moments[row].diagonal() / count.clamp_min(1)
        varies = (covariance.diagonal() > NO_VARIANCE * mean_square).double()
        return covariance * torch.outer(varies, varies)

    def settle(self) -> None:
        """Round to what `state` keeps, so that a restart changes no bit; nothing without `single`."""
        if self.single:
            self.sums, self.moments = self.sums.float().double(), self.moments.float().double()

    def state(self) -> dict[str, Tensor]:
        """Named tensors; symmetric matrices as their upper triangles. With `single`, call `settle` before."""
        kind = torch.float32 if self.single else torch.float64
        return {"counts": self.counts, "sums": self.sums.to(kind), "second": pack_symmetric(self.moments).to(kind)}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> ClassStatistics:
        """Restore; the inverse of `state`, bit for bit."""
        single = state["sums"].dtype == torch.float32
        statistics = cls(state["sums"].shape[1], per_class=state["second"].ndim == 2, single=single)
        statistics.counts = state["counts"].clone()
        statistics.sums = state["sums"].to(torch.float64, copy=True)
        statistics.moments = unpack_symmetric(state["second"].double(), state["sums"].shape[1])
        return statistics


def counts_without(counts: Tensor, taken: Tensor, rows: Tensor) -> Tensor:
    """The samples that are left of each class, float64 ``(C,)``.

    Args:
        counts: before, float64 ``(C,)``.
        taken: how many are taken out, above 0, float64 ``(N,)``.
        rows: of which classes, int64 ``(N,)``; one may come more than once.

    Raises:
        InputError: more of a class than there are.
    """
    missing = int(rows.max()) + 1 - len(counts) if len(rows) else 0
    counts = torch.cat([counts, counts.new_zeros(max(missing, 0))])
    left = counts.index_add(0, rows, -taken)
    if bool((left < 0).any()):
        row = int(left.argmin())
        raise InputError(
            f"what was never added cannot be subtracted: row {row} has {counts[row]:.0f} samples, the other "
            f"{counts[row] - left[row]:.0f}; subtract from what was taught or merged with the other"
        )
    return left


def pack_symmetric(matrix: Tensor) -> Tensor:
    """The upper triangles of ``(…, n, n)`` as ``(…, n(n+1)/2)``."""
    row, column = torch.triu_indices(*matrix.shape[-2:])
    return matrix[..., row, column].clone()


def unpack_symmetric(packed: Tensor, size: int) -> Tensor:
    """The inverse of `pack_symmetric`."""
    matrix = packed.new_zeros(*packed.shape[:-1], size, size)
    row, column = torch.triu_indices(size, size)
    matrix[..., row, column] = packed
    matrix[..., column, row] = packed
    return matrix


def oas_shrinkage(covariance: Tensor, samples: float) -> float:
    """Share of the identity in the oracle-approximating shrinkage (OAS) estimate of Chen et al. 2010.

    With S the covariance of p dimensions from n samples, (tr S² + tr² S) / ((n + 1)(tr S² − tr² S/p)), at most 1.
    This is scikit-learn's form; Eq. 23 of the paper has (1 − 2/p) tr S² above and n + 1 − 2/p below, which differs
    only where p is small.

    Args:
        covariance: empirical, ``(D, D)``.
        samples: how many samples it was estimated from.
    """
    size = covariance.shape[0]
    mean_variance = float(covariance.trace()) / size
    mean_square = float(covariance.square().mean())
    denominator = (samples + 1.0) * (mean_square - mean_variance**2 / size)
    return 1.0 if denominator <= 0 else min(1.0, (mean_square + mean_variance**2) / denominator)


def shrink(covariance: Tensor, samples: float) -> Tensor:
    """The covariance shrunk by `oas_shrinkage` towards a multiple of the identity: always invertible."""
    size = covariance.shape[0]
    share = oas_shrinkage(covariance, samples)
    variance = max(float(covariance.trace()) / size, 1e-12)
    share = max(share, 1e-6)
    return (1.0 - share) * covariance + share * variance * torch.eye(size, dtype=covariance.dtype)


def shrink_to_diagonal(covariance: Tensor, share: float) -> Tensor:
    """The covariance with `share` of what stands beside its diagonal taken away; always invertible."""
    diagonal = covariance.diagonal().diag()
    jitter = 1e-4 * torch.eye(len(covariance), dtype=covariance.dtype) * covariance.diagonal().mean()
    return (1.0 - share) * covariance + share * diagonal + jitter


def likeliest_weight(scatter: Tensor, freedom: float, prior: Tensor) -> float:
    """How many samples a prior covariance should count for: the weight under which the data are likeliest.

    With an inverse-Wishart prior of mean Σ₀ and weight w, Σ's posterior mean is (w Σ₀ + S)/(w + N), and the
    marginal likelihood of the scatter S is known in closed form: |wΣ₀|^(ν/2) |wΣ₀ + S|^(−(ν+N)/2)
    Γ_D((ν+N)/2)/Γ_D(ν/2) up to a constant, with ν = w + D + 1.

    Args:
        scatter: S, within-class, ``(D, D)``.
        freedom: N, its degrees of freedom.
        prior: Σ₀, ``(D, D)``, positive definite.
    """
    size, best, chosen = prior.shape[0], -float("inf"), PRIOR_GRID[0]
    log_prior = float(torch.linalg.slogdet(prior).logabsdet)
    for weight in PRIOR_GRID:
        before = torch.tensor(weight + size + 1.0, dtype=torch.float64)
        after = before + freedom
        evidence = (
            0.5 * before * (size * math.log(weight) + log_prior)
            - 0.5 * after * torch.linalg.slogdet(weight * prior + scatter).logabsdet
            + torch.mvlgamma(after / 2, size)
            - torch.mvlgamma(before / 2, size)
        )
        if float(evidence) > best:
            best, chosen = float(evidence), weight
    return chosen


def discriminant(means: Tensor, counts: Tensor, covariance: Tensor, samples: float) -> tuple[Tensor, Tensor]:
    """Linear discriminant with equal class priors: w_c = Λ⁻¹ μ_c, b_c = −½ μ_cᵀ Λ⁻¹ μ_c.

    With few samples the estimate of μᵀΛ⁻¹μ is too large by tr(Λ⁻¹Σ)/n_c, so that a class taught with few
    images next to classes taught with many is never predicted; `gaussian_readout` allows for it.

    Args:
        means: ``(C, D)``.
        counts: ``(C,)``; a class with 0 samples gets a bias of −∞.
        covariance: within-class, ``(D, D)``; shrunk here to Λ.
        samples: how many samples stand behind it.

    Returns:
        Values ``(D, C)`` and biases ``(C,)``, float64.
    """
    factor = torch.linalg.cholesky(shrink(covariance, samples))
    values = torch.cholesky_solve(means.T, factor)
    bias = (means.T * values).sum(0)
    return values, (-0.5 * bias).masked_fill(counts == 0, -torch.inf)


def gaussian_readout(means: Tensor, counts: Tensor, covariance: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
    """The linear read-out of Gaussian classes whose means are themselves uncertain (probabilistic LDA, Ioffe 2006).

    A class mean is drawn from N(0, B), a sample from N(mean, W). After n_c samples the mean is known up to
    (B⁻¹ + n_c W⁻¹)⁻¹, and an embedding is expected at the shrunken mean with a spread of W plus that. On the axes on
    which W = 1 and B is diagonal b, with τ_c = b/(n_c b + 1) what is left unknown of the mean,

        log p(x | c) = Σ x m/(1 + τ) − ½ Σ m²/(1 + τ) − ½ Σ log(1 + τ) − ½ Σ x²/(1 + τ),   m = n_c τ x̄.

    The last term is the only one that is not linear in x, and hardly differs between classes: it is replaced by its
    mean over the samples seen. So few images give a nearest mean along the directions that matter, and many give
    linear discriminant analysis, and classes of 5 and of 5,000 images can be compared.

    Args:
        means: of the samples, ``(C, D)``, around the mean that new classes are expected at.
        counts: ``(C,)``; a class with 0 samples gets a bias of −∞.
        covariance: W, ``(D, D)``, positive definite.
        signal: B, ``(D, D)``.

    Returns:
        Values ``(D, C)`` and biases ``(C,)``, float64.
    """
    factor = torch.linalg.cholesky(covariance)
    half = torch.linalg.solve_triangular(factor, signal, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    variances, rotation = torch.linalg.eigh((whitened + whitened.mT) / 2)
    axes = torch.linalg.solve_triangular(factor.mT, rotation, upper=True)
    known = counts[:, None]
    unknown = variances.clamp_min(0) / (known * variances.clamp_min(0) + 1.0)
    there, precision = means @ axes, 1.0 / (1.0 + unknown)
    shrunk = known * unknown * there
    seen = 1.0 + (known * there.square()).sum(0) / counts.sum().clamp_min(1)
    bias = (-shrunk.square() * precision + precision.log() - seen * precision).sum(1) / 2
    values = axes @ (shrunk * precision).T
    return values, bias.masked_fill(counts == 0, -torch.inf)


def signal_scale(means: Tensor, counts: Tensor, covariance: Tensor, signal: Tensor) -> float:
    """By how much to raise `signal`: half-way, as a factor, to the scatter seen between the means, less their noise.

    Half-way, because a few classes tell the scatter no better than pretraining does.

    Args:
        means: ``(C, D)``.
        counts: ``(C,)``; classes with 0 samples do not count.
        covariance: within-class, ``(D, D)``.
        signal: B, ``(D, D)``.

    Returns:
        At least √`LEAST_SIGNAL`; 1 for fewer than two classes.
    """
    means, counts = means[counts > 0], counts[counts > 0]
    if len(counts) < 2:
        return 1.0
    apart = (means - means.mean(0)).square().sum() / (len(counts) - 1)
    noise = covariance.trace() * (1.0 / counts).mean()
    return math.sqrt(max(float((apart - noise) / signal.trace()), LEAST_SIGNAL))


def ridge(statistics: ClassStatistics, strength: float = 0.0) -> tuple[Tensor, Tensor, float]:
    """Ridge regression on one-hot targets with an unpenalised bias: min Σ |y − Wᵀz − b|² + λ |W|².

    Recursive least squares (RLS) over the same samples, started from P = I/λ and with a bias that λ leaves alone,
    ends at the same solution, in any order of the samples; here nothing is inverted before the end.

    Args:
        statistics: of the features.
        strength: λ, on the scale of the summed squares. 0: the λ of a grid that minimises generalised
            cross-validation (Golub, Heath & Wahba 1979), GCV(λ) = (RSS/N) / (1 − df/N)², from the statistics.

    Returns:
        Values ``(D, C)``, biases ``(C,)`` (float64; −∞ for a class without samples) and λ.
    """
    total, counts = statistics.total, statistics.counts
    if not total:
        values = statistics.sums.new_zeros(statistics.sums.shape[::-1])
        return values, torch.full_like(counts, -torch.inf), strength
    centre = statistics.sums.sum(0) / total
    gram, cross = _centred(statistics)
    eigenvalues, vectors = torch.linalg.eigh(gram)
    eigenvalues = eigenvalues.clamp_min(0)
    projected = vectors.T @ cross
    chosen = strength or _cross_validated(eigenvalues, projected, counts)
    values = vectors @ (projected / (eigenvalues + chosen)[:, None])
    bias = counts / total - centre @ values
    return values, bias.masked_fill(counts == 0, -torch.inf), chosen


def ridge_strength(statistics: ClassStatistics) -> float:
    """The λ that `ridge` would choose, from eigenvectors in float32: half the time, and a grid asks for no more.

    Args:
        statistics: of at least one sample.
    """
    gram, cross = _centred(statistics)
    eigenvalues, vectors = torch.linalg.eigh(gram.float())
    projected = vectors.double().T @ cross
    return _cross_validated(eigenvalues.double().clamp_min(0), projected, statistics.counts)


def _centred(statistics: ClassStatistics) -> tuple[Tensor, Tensor]:
    """Σ (z − z̄)(z − z̄)ᵀ ``(D, D)`` and Σ (z − z̄) yᵀ ``(D, C)``, y one-hot."""
    total, centre = statistics.total, statistics.sums.sum(0) / statistics.total
    gram = statistics.second - total * torch.outer(centre, centre)
    return gram, (statistics.sums - torch.outer(statistics.counts, centre)).T


def _cross_validated(eigenvalues: Tensor, projected: Tensor, counts: Tensor) -> float:
    """The λ of the grid with the least GCV, see `ridge`.

    Args:
        eigenvalues: of the centred Gram matrix, ``(D,)``, at least 0.
        projected: the centred cross products on its eigenvectors, ``(D, C)``.
        counts: ``(C,)``.
    """
    total, power = float(counts.sum()), projected.square().sum(1)
    spread = float((counts - counts.square() / total).sum())  # Σ |y − ȳ|²
    scale = max(float(eigenvalues.mean()), 1e-12)
    best, chosen = float("inf"), scale
    for relative in RIDGE_GRID:
        penalty = relative * scale
        inverse = 1.0 / (eigenvalues + penalty)
        residual = max(spread - float((power * (inverse + penalty * inverse.square())).sum()), 0.0)
        freedom = float((eigenvalues * inverse).sum()) + 1.0
        if freedom >= total:
            continue
        score = residual / total / (1.0 - freedom / total) ** 2
        if score < best:
            best, chosen = score, penalty
    return chosen
