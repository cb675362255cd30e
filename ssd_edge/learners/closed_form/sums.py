"""Sufficient statistics of classes, and the estimators that closed-form learners solve from them.

Sums are accumulated in float64, so the order of tasks and samples matters only up to rounding. No size depends on the
number of samples. That does not hide them: docs/privacy.md says what can be recovered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ssd_edge.errors import BundleRefusedError, InputError

PRIOR_GRID = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)
LEAST_SHARE = 1e-6  # weight of the identity in a covariance: it is then positive definite
LEAST_SHRINKAGE = 0.5  # from 0.05 to 0.9 `unknown` is detected equally well (AUROC within 0.01); more overfits less
RIDGE_GRID = tuple(10.0 ** (e / 2) for e in range(-12, 9))  # λ relative to the mean eigenvalue
PROBES = 64  # random vectors of which the mean of vᵀMv is the trace of a matrix within about one percent
NO_VARIANCE = 1e-12  # relative to the mean square: smaller variances are rounding errors of equal samples
# A sum of D² products that is stored after every change is indefinite by at most these shares of √D times its largest
# diagonal element: float64, and float32 after some 10,000 changes (one rounding contributes 3e-8).
ROUNDING, SINGLE_ROUNDING = 1e-12, 4e-6


class ClassStatistics:
    """Counts, sums and second moments of embeddings by class.

    Args:
        dim: dimension D.
        per_class: True to store second moments per class, so that classes can be removed exactly.
        single: True to store sums and moments in float32: half the size. They are still accumulated in float64 and
            rounded after each change (`settle`).
        views: True to sketch how far second views are from the first.

    Attributes:
        counts: number of samples, float64 ``(C,)``.
        sums: sums of embeddings, float64 ``(C, D)``. With one sample the sum is its embedding, so devices require at
            least three images per class.
        moments: Σ z zᵀ over all samples ``(D, D)``, or per class ``(C, D, D)``; float64. Of two views x and y it is
            Σ mmᵀ + Σ ddᵀ with their mean m, which counts in the sums, and half their difference d.
        apart: Σ ddᵀV with the vectors V of `probes`, ``(D, P)``, or per class ``(C, D, P)``; without `views` P is 0.
            Thereby tr(A Σ ddᵀ) can be estimated for any A; the matrix itself would double the state.
    """

    def __init__(self, dim: int, per_class: bool = False, single: bool = False, views: bool = False) -> None:
        self.per_class, self.single = per_class, single
        self.counts = torch.zeros(0, dtype=torch.float64)
        self.sums = torch.zeros(0, dim, dtype=torch.float64)
        leading, vectors = (0,) if per_class else (), min(dim, PROBES) if views else 0
        self.moments = torch.zeros(*leading, dim, dim, dtype=torch.float64)
        self.apart = torch.zeros(*leading, dim, vectors, dtype=torch.float64)

    def copy(self) -> ClassStatistics:
        """Return an independent, bit-identical copy."""
        copied = ClassStatistics(self.sums.shape[1], self.per_class, self.single)
        copied.counts, copied.sums = self.counts.clone(), self.sums.clone()
        copied.moments, copied.apart = self.moments.clone(), self.apart.clone()
        return copied

    def grow(self, classes: int) -> None:
        """Append empty rows until there are `classes` rows."""
        missing = classes - len(self.counts)
        if missing > 0:
            self.counts = torch.cat([self.counts, self.counts.new_zeros(missing)])
            self.sums = torch.cat([self.sums, self.sums.new_zeros(missing, self.sums.shape[1])])
            if self.per_class:
                self.moments = torch.cat([self.moments, self.moments.new_zeros(missing, *self.moments.shape[1:])])
                self.apart = torch.cat([self.apart, self.apart.new_zeros(missing, *self.apart.shape[1:])])

    def add(self, vectors: Tensor, labels: Tensor, second: Tensor | None = None) -> None:
        """Add samples.

        Args:
            vectors: ``(N, D)``.
            labels: class rows, int64 ``(N,)``.
            second: a second view of each sample, ``(N, D)``: both views then count half.
        """
        self.grow(int(labels.max()) + 1)
        labels = labels.cpu()
        apart = None
        if second is not None:  # ½(xxᵀ + yyᵀ) = mmᵀ + ddᵀ
            vectors, second = vectors.double(), second.double()
            vectors, apart = (vectors + second) / 2, (vectors - second) / 2
        for part, rows in zip(torch.split(vectors, 4096), torch.split(labels, 4096), strict=True):
            wide = part.cpu().double()
            self.counts.index_add_(0, rows, torch.ones(len(rows), dtype=torch.float64))
            self.sums.index_add_(0, rows, wide)
            self._add_squares(wide, rows)
        if apart is not None:
            self._add_squares(apart.cpu(), labels)
            self._add_sketch(apart.cpu(), labels)
        # XᵀX may be asymmetric by an ulp, but only a triangle is stored and a restart must not change any bit.
        if self.per_class:
            changed = torch.unique(labels)
            self.moments[changed] = (self.moments[changed] + self.moments[changed].mT) / 2
        else:
            self.moments.add_(self.moments.mT.contiguous()).div_(2)

    def _add_squares(self, vectors: Tensor, labels: Tensor) -> None:
        """Add the products of float64 vectors ``(N, D)`` to the second moments."""
        if not self.per_class:
            self.moments += vectors.T @ vectors
            return
        for row in torch.unique(labels):
            own = vectors[labels == row]
            self.moments[row] += own.T @ own

    def _add_sketch(self, apart: Tensor, labels: Tensor) -> None:
        """Add half the differences of views, float64 ``(N, D)``, to their sketch."""
        if not self.apart.shape[-1]:
            return
        along = apart @ probes(self.sums.shape[1])
        if not self.per_class:
            self.apart += apart.T @ along
            return
        for row in torch.unique(labels):
            self.apart[row] += apart[labels == row].T @ along[labels == row]

    def remove(self, row: int, approximately: bool = False) -> bool:
        """Remove the samples of a class, leaving its row empty.

        From pooled second moments, an approximate removal subtracts n μμᵀ + (n − 1) W with W the pooled within-class
        covariance: the expected contribution of a class of that size and mean. W stays the same, including what the
        class contributed to it.

        Args:
            row: class row.
            approximately: accept this approximation if second moments are not stored per class.

        Returns:
            True if nothing of the class is left: with `per_class`, or if it had one sample with one view or was the
            only class.

        Raises:
            InputError: second moments are not stored per class, and `approximately` is False.
        """
        if not (self.per_class or approximately):
            raise InputError("second moments are pooled over all classes, so a class cannot be removed exactly")
        count, total = float(self.counts[row]), self.total
        if self.per_class:
            for tensor in (self.counts, self.sums, self.moments, self.apart):
                tensor[row] = 0.0
        elif count:
            scatter, freedom = self.scatter_within(), self.degrees_of_freedom
            self.counts[row], self.sums[row] = 0.0, 0.0
            # Recomputed from its parts, not subtracted: variances stay non-negative, and zero without classes.
            share = self.degrees_of_freedom / freedom if freedom else 0.0
            moments = share * scatter + self._scatter_of_means()
            self.apart = share * self.apart
            self.moments = (moments + moments.mT) / 2
        alone = not count or (count == 1 and self.sketch is None)  # then its scatter is zero
        return self.per_class or alone or count == total

    def join(self, row: int, into: int) -> None:
        """Join class `row` into class `into`, leaving its row empty.

        Raises:
            InputError: both rows are the same.
        """
        if row == into:
            raise InputError(f"row {row} cannot be joined with itself; choose two different rows")
        for tensor in (self.counts, self.sums, *((self.moments, self.apart) if self.per_class else ())):
            tensor[into] += tensor[row]
            tensor[row] = 0.0

    def subtract(self, other: ClassStatistics, rows: Tensor) -> None:
        """Subtract other statistics: the inverse of `merge`, up to rounding.

        Args:
            other: statistics with the same `per_class`, and with the same `views` or of one view.
            rows: int64 mapping from its rows to rows of these statistics; ignored for empty rows.

        Raises:
            InputError: a class has fewer samples than in `other`; nothing is changed then.
        """
        known = other.counts > 0
        rows = rows[known]
        self.counts = counts_without(self.counts, other.counts[known], rows)
        empty = self.counts == 0
        self.sums = self.sums.index_add(0, rows, -other.sums[known])
        self.sums[empty] = 0.0  # rounding would leave a residue
        if self.per_class:
            self.moments = self.moments.index_add(0, rows, -other.moments[known])
            self.apart = self.apart.index_add(0, rows, -other._sketch_like(self)[known])
            self.moments[empty] = self.apart[empty] = 0.0
        elif empty.all():
            self.moments, self.apart = torch.zeros_like(self.moments), torch.zeros_like(self.apart)
        else:
            self.moments, self.apart = self.moments - other.moments, self.apart - other._sketch_like(self)

    def without_rows(self, rows: Iterable[int]) -> ClassStatistics:
        """Return a copy without some empty rows; later rows move up.

        Raises:
            InputError: a row is not empty or does not exist.
        """
        deleted = set(rows)
        invalid = [row for row in sorted(deleted) if not 0 <= row < len(self.counts) or self.counts[row]]
        if invalid:
            raise InputError(
                f"only empty rows of the {len(self.counts)} can be deleted, but rows {invalid} are not; remove or join "
                "their classes first"
            )
        kept = torch.tensor([row for row in range(len(self.counts)) if row not in deleted], dtype=torch.int64)
        fewer = ClassStatistics(self.sums.shape[1], self.per_class, self.single)
        fewer.counts, fewer.sums = self.counts[kept], self.sums[kept]
        fewer.moments = self.moments[kept] if self.per_class else self.moments.clone()
        fewer.apart = self.apart[kept] if self.per_class else self.apart.clone()
        return fewer

    def merge(self, other: ClassStatistics, rows: Tensor) -> None:
        """Add other statistics, as those of `subtract`: their row i to row ``rows[i]``."""
        if len(rows):
            self.grow(int(rows.max()) + 1)
        self.counts.index_add_(0, rows, other.counts)
        self.sums.index_add_(0, rows, other.sums)
        if self.per_class:
            self.moments.index_add_(0, rows, other.moments)
            self.apart.index_add_(0, rows, other._sketch_like(self))
        else:
            self.moments += other.moments
            self.apart += other._sketch_like(self)

    def _sketch_like(self, other: ClassStatistics) -> Tensor:
        """Return the sketch with as many columns as that of `other`: the differences of one view are zero."""
        missing = other.apart.shape[-1] - self.apart.shape[-1]
        return torch.nn.functional.pad(self.apart, (0, missing)) if not self.apart.shape[-1] else self.apart

    @property
    def second(self) -> Tensor:
        """Σ z zᵀ over all samples, ``(D, D)``."""
        return self.moments.sum(0) if self.per_class else self.moments

    @property
    def sketch(self) -> Tensor | None:
        """Σ ddᵀV over all samples, ``(D, P)``; None without `views`."""
        apart = self.apart.sum(0) if self.per_class else self.apart
        return apart if apart.shape[-1] else None

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
        """Return the within-class scatter Σ (z − μ_y)(z − μ_y)ᵀ, ``(D, D)``."""
        scatter = self._scatter_of_means()
        return torch.sub(self.second, scatter, out=scatter)  # in place: with many features, new memory takes the time

    def within_covariance(self) -> Tensor:
        """Return the pooled within-class covariance ``(D, D)``, zero if no class has two samples."""
        return self.scatter_within().div_(max(self.degrees_of_freedom, 1.0))

    def shrunk_covariance(self) -> Tensor:
        """Return `within_covariance` shrunk by `oas_shrinkage`: positive definite."""
        return shrink(self.within_covariance(), max(self.degrees_of_freedom, 1.0))

    def regular_covariance(self) -> Tensor:
        """Return `within_covariance` shrunk by at least `LEAST_SHRINKAGE`, for use on other images.

        Its small eigenvalues are too small where it was estimated from few images, more so than OAS allows for.
        """
        return shrink(self.within_covariance(), max(self.degrees_of_freedom, 1.0), LEAST_SHRINKAGE)

    def _scatter_of_means(self) -> Tensor:
        """Return Σ_c n_c μ_c μ_cᵀ, ``(D, D)``."""
        means = self.means
        return (means * self.counts[:, None]).T @ means

    def covariance(self, row: int) -> Tensor:
        """Return the covariance of a class ``(D, D)``, divided by n − 1; zero for one sample. Requires `per_class`."""
        count, mean = self.counts[row], self.sums[row] / self.counts[row].clamp_min(1)
        covariance = (self.moments[row] - count * torch.outer(mean, mean)) / (count - 1).clamp_min(1)
        mean_square = self.moments[row].diagonal() / count.clamp_min(1)
        varies = (covariance.diagonal() > NO_VARIANCE * mean_square).double()
        return covariance * torch.outer(varies, varies)

    def settle(self) -> None:
        """Round to the precision of `state`, so that a restart does not change any bit; no effect without `single`."""
        if self.single:
            self.sums, self.moments = self.sums.float().double(), self.moments.float().double()
            self.apart = self.apart.float().double()

    def state(self) -> dict[str, Tensor]:
        """Return the state as tensors, symmetric matrices as upper triangles. With `single`, call `settle` first."""
        kind = torch.float32 if self.single else torch.float64
        apart = {"apart": self.apart.to(kind)} if self.apart.shape[-1] else {}
        second = pack_symmetric(self.moments).to(kind)
        return {"counts": self.counts, "sums": self.sums.to(kind), "second": second, **apart}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> ClassStatistics:
        """Restore statistics from `state`, bit for bit, after checking that its tensors match each other.

        Args:
            state: tensors whose shapes and ranges have been checked.

        Raises:
            BundleRefusedError: no samples have these sums, see `check`.
        """
        statistics = cls.unchecked(state)
        statistics.check()
        return statistics

    @classmethod
    def unchecked(cls, state: dict[str, Tensor]) -> ClassStatistics:
        """Restore statistics from `state` without checking that its tensors match each other, see `check`."""
        single = state["sums"].dtype == torch.float32
        statistics = cls(0, per_class=state["second"].ndim == 2, single=single)
        statistics.counts = state["counts"].clone()
        statistics.sums = state["sums"].to(torch.float64, copy=True)
        statistics.moments = unpack_symmetric(state["second"].double(), state["sums"].shape[1])
        none = state["sums"].new_zeros(*statistics.moments.shape[:-1], 0)
        statistics.apart = state.get("apart", none).to(torch.float64, copy=True)
        return statistics

    def check(self, known: ClassStatistics | None = None) -> None:
        """Check that samples with these counts, sums, moments and sketches can exist, up to rounding.

        Args:
            known: statistics that were subtracted to give these; their rounding is allowed as well.

        Raises:
            BundleRefusedError: a class without samples has a sum, a scatter around the class means is indefinite, or
                second views are further from the first than the second moments say.
        """
        check_sums(self.counts, self.sums)
        rounding = SINGLE_ROUNDING if self.single else ROUNDING
        more = float(known.moments.diagonal(dim1=-2, dim2=-1).max()) if known is not None and known.total else 0.0
        self._check_sketch(rounding, more)
        what = "the second moments, less those of the class means,"
        if not self.per_class:
            if not self.total and bool(self.moments.any()):
                raise BundleRefusedError(
                    "the second moments are those of samples, but there are none; restore the file"
                )
            _check_scatter(self.scatter_within(), self.moments, rounding, what, more)
            return
        if bool(self.moments[self.counts == 0].any()):
            raise BundleRefusedError("a class without samples has second moments; restore the file")
        for row in self.counts.nonzero().flatten().tolist():
            mean, own = self.sums[row] / self.counts[row], self.moments[row]
            scatter = own - self.counts[row] * torch.outer(mean, mean)
            _check_scatter(scatter, own, rounding, f"{what} of row {row}", more)

    def _check_sketch(self, rounding: float, more: float) -> None:
        """Check that each vᵀ Σ ddᵀ v is in the range from 0 to vᵀ Σ zzᵀ v."""
        if not self.apart.numel():
            return
        vectors = probes(self.sums.shape[1])
        most, along = (vectors * (self.moments @ vectors)).sum(-2), (vectors * self.apart).sum(-2)
        largest = self.moments.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
        slack = rounding * math.sqrt(len(vectors)) * (largest + more) * vectors.square().sum(0)
        if bool(((along < -slack) | (along > most + slack)).any()):
            raise BundleRefusedError(
                "the differences of two views are not those of samples with these second moments; restore the file"
            )


def probes(size: int, most: int = PROBES) -> Tensor:
    """Return vectors v in columns of which the mean of vᵀMv is the trace of a matrix, float64 ``(size, P)``.

    The axes, if there are at most `most`: the sum of vᵀMv over Σ |v|²/size is then exact. Otherwise `PROBES` vectors of
    random signs (Hutchinson 1989), always the same ones.
    """
    if size <= most:
        return torch.eye(size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, (size, PROBES), generator=generator).double() * 2 - 1


def check_sums(counts: Tensor, sums: Tensor) -> None:
    """Check that classes without samples have no sum.

    Args:
        counts: ``(C,)``.
        sums: ``(C, D)``.

    Raises:
        BundleRefusedError: one has.
    """
    if bool(sums[counts == 0].any()):
        raise BundleRefusedError("a class without samples has a sum of embeddings; restore the file")


def check_seen(state: dict[str, Tensor], owner: str) -> None:
    """Check that exactly the learned rows of a state have samples.

    Raises:
        BundleRefusedError: they do not.
    """
    if not torch.equal(state["counts"] > 0, state["seen"] == 1):
        raise BundleRefusedError(
            f"the state of '{owner}' has samples of the rows {_short(state['counts'] > 0)}, but has learned "
            f"{_short(state['seen'] == 1)}; restore the file"
        )


def check_covariance(matrix: Tensor, what: str) -> None:
    """Check that a float32 matrix ``(n, n)`` is symmetric and, up to rounding, positive semidefinite.

    Raises:
        BundleRefusedError: it is not.
    """
    scale = float(matrix.diagonal().max()) if matrix.numel() else 0.0
    if not torch.allclose(matrix, matrix.mT, rtol=0, atol=SINGLE_ROUNDING * abs(scale)):
        raise BundleRefusedError(f"{what} is not symmetric; restore the file")
    _check_scatter(matrix.double(), matrix.double(), SINGLE_ROUNDING, what)


def _check_scatter(scatter: Tensor, moments: Tensor, rounding: float, what: str, more: float = 0.0) -> None:
    """Check that a symmetric matrix is positive semidefinite up to the rounding of `moments`, both ``(n, n)``.

    Args:
        scatter: the matrix.
        moments: second moments that it was computed from.
        rounding: of one element, relative to the largest one.
        what: name for the message.
        more: largest diagonal element of moments that were subtracted from others to give these.
    """
    size = len(moments)
    if not size:
        return
    least, most = (float(value) for value in moments.diagonal().aminmax())
    most += more
    slack = rounding * math.sqrt(size) * most
    indefinite = least < (-slack if more else 0) or bool((scatter.diagonal() < -slack).any())
    if not indefinite and most > 0:
        scaled = scatter / most
        scaled.diagonal().add_(2 * slack / most)
        indefinite = int(torch.linalg.cholesky_ex(scaled).info) != 0
    elif not indefinite:
        indefinite = bool(scatter.any())  # no variance, so no covariance
    if indefinite:
        raise BundleRefusedError(f"{what} are indefinite, as those of no samples are; restore the file")


def _short(rows: Tensor) -> str:
    """Return the first few numbers of selected rows ``(C,)``, for a message."""
    return ", ".join(map(str, rows.nonzero().flatten()[:10].tolist())) or "none"


def counts_without(counts: Tensor, taken: Tensor, rows: Tensor) -> Tensor:
    """Subtract numbers of samples from the counts of classes; return the remaining counts, float64 ``(C,)``.

    Args:
        counts: float64 ``(C,)``.
        taken: numbers to subtract, positive, float64 ``(N,)``.
        rows: class rows to subtract them from, int64 ``(N,)``; may repeat.

    Raises:
        InputError: a class has fewer samples.
    """
    missing = int(rows.max()) + 1 - len(counts) if len(rows) else 0
    counts = torch.cat([counts, counts.new_zeros(max(missing, 0))])
    left = counts.index_add(0, rows, -taken)
    if bool((left < 0).any()):
        row = int(left.argmin())
        raise InputError(
            f"only statistics that were added can be subtracted: row {row} has {counts[row]:.0f} samples, the other "
            f"{counts[row] - left[row]:.0f}; subtract only what was learned or merged"
        )
    return left


def pack_symmetric(matrix: Tensor) -> Tensor:
    """Return the upper triangles of ``(…, n, n)`` as ``(…, n(n+1)/2)``."""
    *leading, size, _ = matrix.shape
    packed = matrix.new_zeros(*leading, size * (size + 1) // 2)
    for number, part in enumerate(_triangle(packed, size)):  # indices would take more than the matrices
        part.copy_(matrix[..., number, number:])
    return packed


def unpack_symmetric(packed: Tensor, size: int) -> Tensor:
    """Restore symmetric matrices ``(…, size, size)`` from `pack_symmetric`."""
    matrix = packed.new_zeros(*packed.shape[:-1], size, size)
    for number, part in enumerate(_triangle(packed, size)):
        matrix[..., number, number:] = part
        matrix[..., number:, number] = part
    return matrix


def _triangle(packed: Tensor, size: int) -> Iterable[Tensor]:
    """Return the rows of packed upper triangles as views, or nothing if there are no numbers."""
    return torch.split(packed, list(range(size, 0, -1)), -1) if packed.numel() else ()


def oas_shrinkage(covariance: Tensor, samples: float) -> float:
    """Return the weight of the identity in oracle approximating shrinkage (OAS; Chen et al. 2010).

    With S the covariance of p dimensions from n samples, min(1, (tr S² + tr² S) / ((n + 1)(tr S² − tr² S/p))), as in
    scikit-learn. Eq. 23 of the paper has (1 − 2/p) tr S² in the numerator and n + 1 − 2/p in the denominator, which
    differs for small p only.

    Args:
        covariance: empirical covariance, ``(D, D)``.
        samples: number of samples it was estimated from.
    """
    size = covariance.shape[0]
    mean_variance = float(covariance.trace()) / size
    mean_square = (float(torch.linalg.vector_norm(covariance)) / size) ** 2  # without a matrix of squares
    denominator = (samples + 1.0) * (mean_square - mean_variance**2 / size)
    return 1.0 if denominator <= 0 else min(1.0, (mean_square + mean_variance**2) / denominator)


def shrink(covariance: Tensor, samples: float, least: float = LEAST_SHARE) -> Tensor:
    """Return the covariance shrunk by `oas_shrinkage` towards a multiple of the identity: positive definite.

    Args:
        covariance: empirical covariance, ``(D, D)``.
        samples: number of samples it was estimated from.
        least: smallest weight of the identity.
    """
    share = max(oas_shrinkage(covariance, samples), least)
    blended = (1.0 - share) * covariance
    blended.diagonal().add_(share * max(float(covariance.trace()) / len(covariance), 1e-12))
    return blended


def likeliest_weight(scatter: Tensor, freedom: float, prior: Tensor) -> float:
    """Return the weight of a prior covariance, in samples, that maximises the marginal likelihood of the data.

    With an inverse-Wishart prior of mean Σ₀ and weight w, the posterior mean of Σ is (w Σ₀ + S)/(w + N), and the
    marginal likelihood of the scatter S is |wΣ₀|^(ν/2) |wΣ₀ + S|^(−(ν+N)/2) Γ_D((ν+N)/2)/Γ_D(ν/2) up to a constant,
    with ν = w + D + 1. The weight is chosen from `PRIOR_GRID`.

    Args:
        scatter: within-class scatter S, ``(D, D)``.
        freedom: degrees of freedom N of S.
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


def ridge(statistics: ClassStatistics, strength: float = 0.0) -> tuple[Tensor, Tensor, float]:
    """Solve ridge regression on one-hot targets with an unpenalised bias: min Σ |y − Wᵀz − b|² + λ |W|².

    The solution equals that of recursive least squares over the same samples in any order, started from P = I/λ with an
    unpenalised bias.

    Args:
        statistics: statistics of the features.
        strength: λ, on the scale of the summed squares. 0: chosen from a grid to minimise generalised cross-validation
            (Golub, Heath & Wahba 1979), GCV(λ) = (RSS/N) / (1 − df/N)².

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


def _centred(statistics: ClassStatistics) -> tuple[Tensor, Tensor]:
    """Return Σ (z − z̄)(z − z̄)ᵀ ``(D, D)`` and Σ (z − z̄) yᵀ ``(D, C)`` with one-hot y."""
    total, centre = statistics.total, statistics.sums.sum(0) / statistics.total
    gram = statistics.second - total * torch.outer(centre, centre)
    return gram, (statistics.sums - torch.outer(statistics.counts, centre)).T


def _cross_validated(eigenvalues: Tensor, projected: Tensor, counts: Tensor) -> float:
    """Return the λ of `RIDGE_GRID` with the smallest GCV, see `ridge`.

    Args:
        eigenvalues: eigenvalues of the centred Gram matrix, ``(D,)``, non-negative.
        projected: centred cross products projected on its eigenvectors, ``(D, C)``.
        counts: number of samples, ``(C,)``.
    """
    total, power = float(counts.sum()), projected.square().sum(1)
    target_scatter = float((counts - counts.square() / total).sum())  # Σ |y − ȳ|²
    scale = max(float(eigenvalues.mean()), 1e-12)
    best, chosen = float("inf"), scale
    for relative in RIDGE_GRID:
        penalty = relative * scale
        inverse = 1.0 / (eigenvalues + penalty)
        residual = max(target_scatter - float((power * (inverse + penalty * inverse.square())).sum()), 0.0)
        freedom = float((eigenvalues * inverse).sum()) + 1.0
        if freedom >= total:
            continue
        score = residual / total / (1.0 - freedom / total) ** 2
        if score < best:
            best, chosen = score, penalty
    return chosen
