"""Landmarks and directions of the default learner, computed from the pretraining embeddings of a backbone.

Landmarks are embeddings of r pretraining images. Their responses are redundant, so the learner stores statistics along
n directions only: the leading principal components of the responses, rotated to the axes that separate pretraining
classes best relative to their within-class covariance. Takes seconds on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ssd_edge.learners.closed_form.sums import ClassStatistics, shrink_to_diagonal
from ssd_edge.learners.gradient.network import respond, unit_rows
from ssd_edge.learners.priors import Landmarks

# All constants were chosen on held-out training images of CIFAR-10 (docs/landmark.md).
GAIN = 0.2  # γ of the responses
SAMPLES = 20_000  # embeddings for the principal components
SMALLEST = 1e-9  # smallest variance of a principal component, relative to the largest
# Expected variance of the means of new classes along a direction, relative to the within-class variance: a share of
# that of the pretraining classes, a part that grows with the variance of the direction, and a floor.
OF_CLASSES, OF_VARIANCE, FLOOR = 0.05, 0.015, 0.003
TO_DIAGONAL = 0.3  # shrinkage of the within-class covariance, which 200 classes estimate poorly


def make_landmarks(
    embeddings: Tensor,
    labels: Tensor,
    classes: int,
    neurons: int,
    directions: int,
    seed: int,
    log: Callable[[str], None],
) -> Landmarks:
    """Draw landmarks and compute the directions.

    Args:
        embeddings: standardised embeddings, float32 ``(N, D)``.
        labels: int64 ``(N,)``.
        classes: number of classes C.
        neurons: number of landmarks r, limited by the number of images.
        directions: number of directions n, limited by the rank of the responses.
        seed: seed of the draw.
        log: receives one line of progress.

    Returns:
        Landmarks whose keys and projection are exact in float16.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = unit_rows(embeddings)
    order = torch.randperm(len(inputs), generator=generator)
    keys = inputs[order[:neurons]].half().float()
    sample = respond(inputs[order[-SAMPLES:]] @ keys.T, GAIN)
    mean = sample.mean(0)
    centred = (sample - mean).double()
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(sample))
    variances, axes = variances.flip(0), axes.flip(1)
    # Keep components above rounding error, and at least four samples each for the within-class covariance.
    spanned = int((variances > SMALLEST * variances[0]).sum())
    count = max(1, min(directions, spanned, len(inputs) // 4))
    # Scale to a mean variance of 1: the variance of the responses is so small that rounding would matter.
    scale = variances[:count].mean()
    components = axes[:, :count] / scale.sqrt()
    statistics = ClassStatistics(count)
    for part, rows in zip(torch.split(inputs, 4096), torch.split(labels, 4096), strict=True):
        statistics.add((respond(part @ keys.T, GAIN) - mean).double() @ components, rows)
    transform, signal = _joint_axes(statistics, classes)
    # New classes are expected around the mean of the class means.
    mean = (mean.double() + scale * components @ statistics.means.mean(0)).float()
    projection = (components @ transform).half().float()
    explained = float(variances[:count].sum() / variances.clamp_min(0).sum())
    log(f"landmarks: {len(keys):,} neurons, {count:,} directions with {explained:.2%} of the variance of the responses")
    return Landmarks(keys.numpy(), mean.numpy(), projection.numpy(), signal.float().numpy(), GAIN)


def _joint_axes(statistics: ClassStatistics, classes: int) -> tuple[Tensor, Tensor]:
    """Compute axes on which the within-class covariance is the identity and the expected signal is diagonal.

    Returns:
        Axes as columns ``(n, n)`` and their signal ``(n,)``, descending; float64.
    """
    within = shrink_to_diagonal(statistics.within_covariance(), TO_DIAGONAL)
    means = statistics.means
    means = means - means.mean(0)
    # The scatter of estimated means includes their sampling noise.
    noise = within * float((1.0 / statistics.counts.clamp_min(1)).mean())
    between = means.T @ means / max(classes - 1, 1) - noise
    variances, axes = torch.linalg.eigh(within)
    squared = (axes * (variances.square() / variances.mean())) @ axes.T
    factor = torch.linalg.cholesky(within)
    inverse = torch.linalg.solve_triangular(factor, torch.eye(len(within), dtype=within.dtype), upper=False)
    expected = inverse @ (OF_CLASSES * between + OF_VARIANCE * squared) @ inverse.T
    signal, rotation = torch.linalg.eigh((expected + expected.T) / 2)
    return inverse.T @ rotation.flip(1), signal.flip(0).clamp_min(0) + FLOOR
