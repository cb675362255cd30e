"""Probabilities from scores: a softmax whose temperature makes held-out images likely (Guo et al. 2017).

Of each class, the sums of −log softmax(scores/T) of its held-out images at fixed temperatures T are enough: they add up
over learns, and no image and no score is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST, MOST, STEPS = -10, 14, 4  # powers of two: scores may lie in 0..1, or differ by thousands
TEMPERATURES = 2.0 ** (torch.arange(LEAST * STEPS, MOST * STEPS + 1, dtype=torch.float64) / STEPS)
BATCH = 1024
WORST = 1e6  # largest loss of an image, so that sums stay exact to a millionth


def losses(scores: Tensor, columns: Tensor) -> Tensor:
    """Return −log softmax(scores/T) of the true class of each image, at each of `TEMPERATURES`.

    Args:
        scores: Scores of the learned classes, ``(N, C)``.
        columns: Column of the true class, int64 ``(N,)``.

    Returns:
        float64 ``(N, G)``, 0..`WORST`.
    """
    found = torch.zeros(len(scores), len(TEMPERATURES), dtype=torch.float64)
    for start in range(0, len(scores), BATCH):
        part = slice(start, start + BATCH)
        wide, true = scores[part].double(), columns[part, None]
        for number, t in enumerate(TEMPERATURES.tolist()):
            found[part, number] = -(wide / t).log_softmax(1).gather(1, true)[:, 0]
    return found.clamp(0.0, WORST)


def temperature(sums: Tensor, tested: Tensor) -> float | None:
    """Return the temperature at which held-out images are most likely; every class counts alike.

    Without an error on record the likeliest temperature would be zero, which promises too much. So it is the highest
    that is as likely up to the factor e, about as if one more image were tested.

    Args:
        sums: Sums of `losses` over the held-out images of each class, ``(C, G)``.
        tested: Number of these images, ``(C,)``.

    Returns:
        None if nothing is known: no image was held out, or no two classes compared.
    """
    known = tested > 0
    if not bool(sums[known].any()):
        return None
    mean = (sums[known] / tested[known, None]).mean(0)
    enough = mean <= mean.min() + 1.0 / float(tested.sum())
    return float(TEMPERATURES[enough.nonzero().max()])


def probabilities(scores: Tensor, temperature: float) -> Tensor:
    """Return the probabilities of the classes, float64 ``(N, C)``.

    Args:
        scores: Scores of the learned classes, ``(N, C)``.
        temperature: From `temperature`.
    """
    return (scores.double() / temperature).softmax(1)
