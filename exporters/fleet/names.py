"""Find out which devices mean the same by a name.

Two devices that have taught a class of the same name are compared by the class means of their images, where differences
within a class are equally large in all directions. Means of few images are apart by chance: that is subtracted. What
remains is compared with the distance of two different classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ssd_edge.learners.whitening import Whitening

FAR = 0.5  # of the median squared distance of two different classes; docs/fleet.md has what it finds
ERRORS = 2.0  # standard errors of the estimated distance on top
LEAST_CLASSES = 3  # below, nothing is known about the distance of two different classes


@dataclasses.dataclass(frozen=True)
class Means:
    """Class means.

    Attributes:
        vectors: float64 ``(n, D)``.
        counts: Number of images of each, float64 ``(n,)``.
    """

    vectors: Tensor
    counts: Tensor

    def of(self, rows: Sequence[int]) -> Means:
        """Return some of the means."""
        index = torch.tensor(list(rows), dtype=torch.int64)
        return Means(self.vectors[index], self.counts[index])

    def pooled(self) -> Means:
        """Return the one mean of all images."""
        count = self.counts.sum()
        return Means((self.counts @ self.vectors / count)[None], count[None])


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """Distance of class means, and how large it may be if they are of one class.

    Attributes:
        whitening: W, the inverse root of the within-class covariance Σ.
        noise: tr(WΣW), the expected squared length of one image's difference from its class mean.
        error: Standard deviation of the squared length of the mean of n such differences, times n.
        typical: Median squared distance of the means of two different classes.
    """

    whitening: Whitening
    noise: float
    error: float
    typical: float

    @classmethod
    def of(cls, scatter: Tensor, freedom: float, classes: Means) -> Yardstick | None:
        """Return the yardstick of a fleet; None if it has too few classes or images.

        Args:
            scatter: Sum of the scatters around the mean of each class on each device, ``(D, D)``: what devices mean by
                a name does not matter to it.
            freedom: Its degrees of freedom.
            classes: Mean of each name.
        """
        if len(classes.counts) < LEAST_CLASSES or not freedom > 0 or not float(scatter.trace()) > 0:
            return None
        covariance = scatter / freedom
        whitening = Whitening.fit(covariance, freedom)
        white = whitening.of(whitening.of(covariance).mT.contiguous())
        noise, error = float(white.trace()), float(torch.linalg.vector_norm(white)) * 2**0.5
        bare = cls(whitening, noise, error, 0.0)
        first, second = torch.triu_indices(len(classes.counts), len(classes.counts), 1)
        typical = float(bare.apart(classes, classes)[first, second].median())
        return dataclasses.replace(bare, typical=typical) if typical > 0 else None

    def apart(self, one: Means, other: Means) -> Tensor:
        """Return unbiased estimates of the squared distances of class means, ``(n, m)``."""
        squared = torch.cdist(self.whitening.of(one.vectors), self.whitening.of(other.vectors)).square()
        return squared - self.noise * _chance(one, other)

    def differ(self, one: Means, other: Means) -> Tensor:
        """Return which class means are evidently not of one class, bool ``(n, m)``."""
        return self.apart(one, other) > FAR * self.typical + ERRORS * self.error * _chance(one, other)


def _chance(one: Means, other: Means) -> Tensor:
    return 1 / one.counts[:, None] + 1 / other.counts[None]


def group(yardstick: Yardstick | None, known: Means, new: Means) -> list[int]:
    """Group devices that mean the same by a name.

    Those that are close to what the name means already join it. Of the others, the one that most agree with leads the
    next group.

    Args:
        yardstick: Which means differ; None: none do.
        known: What the name, and the names made from it, mean already: k means.
        new: Mean of each device.

    Returns:
        Number of the group of each device: below k a known one, from k on a new one.
    """
    groups, left = [0] * len(new.counts), list(range(len(new.counts)))
    if yardstick is None:
        return groups

    def join(number: int, mean: Means) -> None:
        agree = ~yardstick.differ(new.of(left), mean)[:, 0]
        for device, joins in zip(list(left), agree.tolist(), strict=True):
            if joins:
                groups[device] = number
                left.remove(device)

    for number in range(len(known.counts)):
        join(number, known.of([number]))
    number = len(known.counts)
    while left:
        rest = new.of(left)
        agree = ~yardstick.differ(rest, rest)
        leader = int((agree.sum(1) + rest.counts / (1 + rest.counts.sum())).argmax())  # of equals, most images
        mean = rest.of(agree[leader].nonzero().flatten().tolist()).pooled()
        groups[left.pop(leader)] = number
        join(number, mean)
        number += 1
    return groups
