"""A stable answer for a stream of frames: the majority vote of the last frames, of one generation.

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

    An answer needs more than half of the votes, so there are no ties. Without a majority the answer is None, not the
    previous one. With ``minimum`` of at least 2, a single deviating frame is never the answer; with ``share`` of at
    most (minimum − 1)/minimum, as by default, it does not interrupt the answer either. In return, a new object is
    answered only after ``share * window`` frames.

    Args:
        window: Number of frames that vote.
        share: Share of the votes that an answer needs, above 0.5 and at most 1.
        minimum: Number of frames since the start or the last gap that an answer needs.
        gap: Seconds without a frame after which earlier frames are dropped; math.inf to keep them.

    Attributes:
        score: Mean score of the frames that agree with the last answer; 0.0 without an answer.

    Raises:
        InputError: A value is out of range.
    """

    def __init__(self, window: int = 5, share: float = 0.6, minimum: int = 3, gap: float = 2.0) -> None:
        if not 1 <= minimum <= window:
            raise InputError(f"minimum must be between 1 and window, but is {minimum} of {window}; lower it")
        if not 0.5 < share <= 1:
            raise InputError(f"share must be above 0.5 and at most 1, but is {share}; smaller values allow ties")
        if not gap > 0:
            raise InputError(f"gap must be above 0 seconds, but is {gap}")
        self.share, self.minimum, self.gap = share, minimum, gap
        self._votes: collections.deque[tuple[str, float]] = collections.deque(maxlen=window)
        self._last: float | None = None
        self.score = 0.0

    def add(self, label: str, score: float = 1.0, at: float | None = None) -> str | None:
        """Count a frame.

        Args:
            label: Predicted class, or ``unknown``.
            score: Score of the prediction, finite.
            at: Time in seconds on a monotonic clock (`time.monotonic` or the camera's). A step back counts as a gap.
                None if the frame follows the previous one without a gap.

        Returns:
            The label with enough votes, or None.

        Raises:
            InputError: The label is empty, or the score or time is not finite; the frame is not counted.
        """
        if not isinstance(label, str) or not label:
            raise InputError(f"the label of a frame must be a non-empty string, but is {label!r}")
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
        """Drop all frames, e.g. for another camera position or generation."""
        self._votes.clear()
        self._last, self.score = None, 0.0


class StableAnswer:
    """The stable answer of a camera while generations replace each other: frames of one do not vote with another's.

    Args:
        every: Seconds between two frames at least.

    Attributes:
        last: The last answer that was stable; an empty string before the first.
    """

    def __init__(self, every: float = 0.0) -> None:
        self._consensus = Consensus(gap=max(2.0, 3 * every))
        self._generation, self.last = 0, ""

    def add(self, label: str, score: float | None, generation: int, at: float) -> tuple[str | None, bool]:
        """Count a frame, as `Consensus.add`.

        Returns:
            The stable answer or None, and True if it is another one than `last` was.
        """
        if generation != self._generation:
            self._consensus.reset()
            self._generation = generation
        stable = self._consensus.add(label, score or 0.0, at)
        changed = stable is not None and stable != self.last
        self.last = self.last if stable is None else stable
        return stable, changed
