"""One stable answer for a stream of frames: what most of the last frames say.

Example:
    >>> consensus = Consensus()
    >>> [consensus.add(label, 0.9, at) for at, label in enumerate(["cup", "cup", "nut", "cup", "cup"])]
    [None, None, 'cup', 'cup', 'cup']
"""

from __future__ import annotations

import collections
import math

from ssd_edge.errors import InputError


class Consensus:
    """A majority vote over the last frames, in which ``unknown`` is a label like any other.

    More than half of the votes are asked for, so there are no ties. Where no label has them the answer is None
    rather than the one before: a stale answer would look like a sure one. With ``minimum`` at least 2 a single
    odd frame is never the answer, and where ``share`` is at most (minimum − 1)/minimum (the defaults) it does
    not even interrupt one. The price is the delay: a new object is answered after ``share * window`` frames.

    Args:
        window: how many frames vote.
        share: of them that must agree, above 0.5 and at most 1.
        minimum: frames since the start or the last gap before there is an answer.
        gap: seconds without a frame after which the earlier ones no longer count; math.inf: they always do.

    Attributes:
        score: mean score of the frames that agree with the last answer, 0.0 where there is none.

    Raises:
        InputError: a value is out of range.
    """

    def __init__(self, window: int = 5, share: float = 0.6, minimum: int = 3, gap: float = 2.0) -> None:
        if not 1 <= minimum <= window:
            raise InputError(f"minimum must be between 1 and window, but is {minimum} of {window}; lower it")
        if not 0.5 < share <= 1:
            raise InputError(f"share must be above 0.5 and at most 1, but is {share}; two labels could tie below")
        if not gap > 0:
            raise InputError(f"gap must be above 0 seconds, but is {gap}")
        self.share, self.minimum, self.gap = share, minimum, gap
        self._votes: collections.deque[tuple[str, float]] = collections.deque(maxlen=window)
        self._last: float | None = None
        self.score = 0.0

    def add(self, label: str, score: float = 1.0, at: float | None = None) -> str | None:
        """Count a frame.

        Args:
            label: what it was taken for, or ``unknown``.
            score: of that, finite.
            at: when it was taken, in seconds of a clock that nobody sets (`time.monotonic`, or the camera's own);
                a step back is a gap too. None: it follows the frame before without a gap.

        Returns:
            The label that enough of the last frames agree on, else None.

        Raises:
            InputError: no label, or score or time is no number; the frame is not counted.
        """
        if not isinstance(label, str) or not label:
            raise InputError(f"a frame needs a label or 'unknown', but has {label!r}")
        if not math.isfinite(score) or (at is not None and not math.isfinite(at)):
            raise InputError(f"score and time of a frame must be finite, but are {score} and {at}")
        if at is not None:
            if self._last is not None and not 0 <= at - self._last <= self.gap:
                self.reset()
            self._last = at
        self._votes.append((label, float(score)))
        self.score = 0.0
        if len(self._votes) < self.minimum:
            return None
        counts = collections.Counter(voted for voted, _ in self._votes)
        winner, votes = counts.most_common(1)[0]
        if votes / len(self._votes) < self.share:
            return None
        self.score = sum(own for voted, own in self._votes if voted == winner) / votes
        return winner

    def reset(self) -> None:
        """Forget all frames: another camera position, another generation."""
        self._votes.clear()
        self._last, self.score = None, 0.0
