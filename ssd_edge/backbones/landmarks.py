"""The default learner's neurons and directions, made once from a backbone's own pretraining embeddings.

Neurons are landmarks: embeddings of pretraining images. What r of them answer is highly redundant, so statistics
are kept only along the n directions of their activity that carry most: variance first (the principal components of
the code), then the axes along which pretraining classes differ most beside their spread. Seconds on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ssd_edge.learners.closed_form.sums import ClassStatistics, shrink_to_diagonal
from ssd_edge.learners.gradient.network import prepare, respond
from ssd_edge.learners.priors import Landmarks

Say = Callable[[str], None]
# All chosen on held-out training images of CIFAR-10 (docs/landmark.md). GAIN is the γ of the response; SAMPLES
# embeddings give the principal components, down to SMALLEST of the largest variance.
GAIN, SAMPLES, SMALLEST = 0.2, 20_000, 1e-9
# How far the means of new classes are expected to lie apart along a direction, in units of the spread within classes:
# a share of what is seen of the pretraining classes, a part that grows with the direction's variance (for few
# images that is nearest mean), and a floor.
OF_CLASSES, OF_VARIANCE, FLOOR = 0.05, 0.015, 0.003
TO_DIAGONAL = 0.3  # shrinkage of the within-class covariance: 200 classes do not tell it well


def make_landmarks(
    embeddings: Tensor, labels: Tensor, classes: int, neurons: int, directions: int, seed: int, say: Say
) -> Landmarks:
    """Draw landmarks and find the directions.

    Args:
        embeddings: standardised, float32 ``(N, D)``.
        labels: int64 ``(N,)``.
        classes: C.
        neurons: r; fewer where there are fewer images.
        directions: n; fewer where the images do not span as many.
        seed: of the draw.
        say: called with one line.

    Returns:
        Numbers that fp16 holds exactly where the package keeps fp16.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = prepare(embeddings, None)
    order = torch.randperm(len(inputs), generator=generator)
    keys = inputs[order[:neurons]].half().float()
    sample = respond(inputs[order[-SAMPLES:]] @ keys.T, GAIN)
    mean = sample.mean(0)
    centred = (sample - mean).double()
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(sample))
    variances, axes = variances.flip(0), axes.flip(1)
    # no more than rounding leaves sense in, and samples enough to know how they vary within classes
    spanned = int((variances > SMALLEST * variances[0]).sum())
    found = max(1, min(directions, spanned, len(inputs) // 4))
    # Scaled to a mean variance of 1: in the code itself it is so small that rounding would be felt.
    scale = variances[:found].mean()
    components = axes[:, :found] / scale.sqrt()
    statistics = ClassStatistics(found)
    for part, truth in zip(inputs.split(4096), labels.split(4096), strict=True):
        statistics.add((respond(part @ keys.T, GAIN) - mean).double() @ components, truth)
    transform, signal = _joint_axes(statistics, classes)
    # New classes are expected around the mean of the old ones, each counted alike.
    mean = (mean.double() + scale * components @ statistics.means.mean(0)).float()
    projection = (components @ transform).half().float()
    held = float(variances[:found].sum() / variances.clamp_min(0).sum())
    say(f"landmarks: {len(keys):,} neurons, {found:,} directions that hold {held:.2%} of the code's variance")
    return Landmarks(keys.numpy(), mean.numpy(), projection.numpy(), signal.float().numpy(), GAIN)


def _joint_axes(statistics: ClassStatistics, classes: int) -> tuple[Tensor, Tensor]:
    """Axes on which the spread within classes is 1, and the expected signal of each, largest first.

    Returns:
        Axes as columns ``(n, n)`` and signal ``(n,)``, float64.
    """
    within = shrink_to_diagonal(statistics.within_covariance(), TO_DIAGONAL)
    means = statistics.means
    means = means - means.mean(0)
    # estimated means lie apart by their own noise too
    noise = within * float((1.0 / statistics.counts.clamp_min(1)).mean())
    between = means.T @ means / max(classes - 1, 1) - noise
    variances, axes = torch.linalg.eigh(within)
    squared = (axes * (variances.square() / variances.mean())) @ axes.T
    factor = torch.linalg.cholesky(within)
    inverse = torch.linalg.solve_triangular(factor, torch.eye(len(within), dtype=within.dtype), upper=False)
    expected = inverse @ (OF_CLASSES * between + OF_VARIANCE * squared) @ inverse.T
    signal, rotation = torch.linalg.eigh((expected + expected.T) / 2)
    return inverse.T @ rotation.flip(1), signal.flip(0).clamp_min(0) + FLOOR
