"""Probabilities from scores: a softmax whose temperature promises as many right answers as held-out images had.

Of each class, the summed probabilities of the answers to its held-out images at fixed temperatures are enough: they add
up over learns, and no image and no score is kept. The softmax is over the best few classes only: over all of them, an
answer would promise less with every class that is added, however unlike. The likeliest temperature (Guo et al. 2017)
would depend on the few images that are most wrong; where few images are taught, it promises ten points too little.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssd_edge.answers import head

LEAST, MOST, STEPS = -16, 14, 2  # powers of two: scores may lie in 0..1, or differ by thousands
TEMPERATURES = 2.0 ** (torch.arange(LEAST * STEPS, MOST * STEPS + 1, dtype=torch.float64) / STEPS)
PRIOR = 20.0  # images that the mean of all classes counts as within a group


def promises(scores: Tensor) -> Tensor:
    """Return the probability of the best class at each of `TEMPERATURES`, float64 ``(N, G)``.

    Args:
        scores: Scores of the learned classes, ``(N, C)``.
    """
    below = _below(scores)
    return torch.stack([(-(below / t).logsumexp(1)).exp() for t in TEMPERATURES.tolist()], 1)


def temperatures(promised: Tensor, right: Tensor, tested: Tensor, taught: Tensor) -> Tensor | None:
    """Return the temperature for answers with each class: one for all that are `taught`, and one for the others.

    At it, the probabilities of the answers to held-out images are on average the share that is right; every class
    counts alike, and half an image more is counted as wrong. Groups with few images are drawn to the mean of all.

    Args:
        promised: Sums of `promises` over the held-out images of each class, ``(C, G)``.
        right: Number of them that were answered with their class, ``(C,)``.
        tested: Number of them, ``(C,)``.
        taught: True for classes that were taught on a device, from few images, bool ``(C,)``.

    Returns:
        float64 ``(C,)``; None if nothing is known: no image was held out, or no two classes compared.
    """
    known = tested > 0
    sums, images = promised[known], tested[known, None]
    if not bool(sums.any()) or bool((sums == images).all()):
        return None
    means, shares, total = sums / images, right[known] / tested[known], float(tested.sum())
    promise, share = means.mean(0), float(shares.mean())
    found = torch.zeros(len(tested), dtype=torch.float64)
    for group in (taught, ~taught):
        own, count = group[known], float(tested[group].sum())
        weight = count / (count + PRIOR)
        if count:
            curve = weight * means[own].mean(0) + (1 - weight) * promise
            target = weight * float(shares[own].mean()) + (1 - weight) * share
        else:
            curve, target = promise, share
        found[group] = _meeting(curve, (target * total + 0.5) / (total + 1.0))
    return found


def _meeting(curve: Tensor, target: float) -> float:
    """Return the temperature at which a falling curve ``(G,)`` meets a value, interpolated between two of the grid."""
    above = int((curve > target).sum())
    if above in (0, len(curve)):
        return float(TEMPERATURES[min(above, len(curve) - 1)])
    left, right = float(curve[above - 1]), float(curve[above])
    part = (left - target) / (left - right)
    return float(2.0 ** (LEAST + (above - 1 + part) / STEPS))


def confidence(scores: Tensor, found: Tensor) -> Tensor:
    """Return the probability of the best class of each image, float64 ``(N,)``.

    Args:
        scores: Scores of the learned classes, ``(N, C)``.
        found: From `temperatures`, ``(C,)``.
    """
    return torch.from_numpy(head.confidence(scores.numpy(), found.numpy()))


def _below(scores: Tensor) -> Tensor:
    """Return how far the best scores are below the best one, float64 ``(N, min(C, head.COMPARED))``."""
    best = scores.double().topk(min(head.COMPARED, scores.shape[1]), dim=1).values
    return best - best[:, :1]
