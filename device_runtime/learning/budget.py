"""What a learn may take, what it has taken, and how much of it is left."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable

from ssd_edge.errors import GateRefusedError, InputError
from ssd_edge.system import MIB, reset_peak, resident

log = logging.getLogger(__name__)

TRIAL = 0.4  # of the time that is left after embedding: the rest is for learning from all images, and for the guard
RESERVE = 0.8  # of the time that is left: learning ends there, so that the guard and the commit have theirs

# Told the stage, the share of it that is done, 0..1, and the seconds that it will still take (None: too early to say).
Watcher = Callable[[str, float, float | None], None]


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits of one learn; None: no limit.

    A gradient learner stops early when its time is up. What cannot be stopped (one pass over the images, solving in
    closed form) may overrun; that is said in the report. Memory is that of the whole process, and is looked at between
    the steps of a learn, so that a single step can exceed it.

    Attributes:
        seconds: wall time.
        mb: resident memory, MiB.
    """

    seconds: float | None = None
    mb: float | None = None

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            InputError: a limit that is no positive number.
        """
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"the budget of {name} must be a number above 0, but is {value}")


class Meter:
    """Watches one learn: call `stage` when a part begins, and its `tick` as it goes on.

    Args:
        budget: what it may take.
        watcher: told how far it is, a few times a second at most.
        clock: monotonic seconds.

    Attributes:
        stopped: whether something was told to stop early.
    """

    def __init__(
        self, budget: Budget | None = None, watcher: Watcher | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.budget = budget or Budget()
        self.stopped = False
        self._watcher, self._clock = watcher, clock
        self._began = self._since = clock()
        self._stage, self._told, self._until = "", -math.inf, math.inf
        self._asked = False
        self._resets = reset_peak()

    @property
    def seconds(self) -> float:
        """Since the learn began."""
        return self._clock() - self._began

    @property
    def peak_mb(self) -> int | None:
        """The most memory that the process has held during the learn, MiB; None where the system does not say."""
        peak = resident("VmHWM") // MIB
        return peak if self._resets and peak else None

    def stage(self, name: str, share: float = 1.0) -> None:
        """Begin a part that may take this share of the time that is left."""
        self._end()
        self._stage, self._since, self._told = name, self._clock(), -math.inf
        left = math.inf if self.budget.seconds is None else self.budget.seconds - self.seconds
        self._until = self._since + share * left

    def tick(self, share: float) -> bool:
        """So much of the stage is done, 0..1; True when its time is up.

        Raises:
            GateRefusedError: more memory is held than the budget allows.
        """
        self.check_memory()
        now = self._clock()
        if self._watcher is not None and (now - self._told >= 0.2 or share >= 1):
            self._told = now
            left = (now - self._since) * (1 - share) / share if share > 0 else None
            self._watcher(self._stage, share, left)
        self._asked = now >= self._until and share < 1
        return self._asked

    def _end(self) -> None:
        """What was asked to stop, and told of no more that it did, has stopped."""
        self.stopped, self._asked = self.stopped or self._asked, False

    def check_embedding(self, share: float) -> None:
        """`tick` for what cannot be done by half.

        Raises:
            GateRefusedError: it will take longer than the whole budget, or takes more memory.
        """
        self.tick(share)
        seconds, spent = self.budget.seconds, self._clock() - self._since
        needed = spent / share if share > 0 else 0.0
        if seconds is not None and share < 1 and spent > 0.1 * seconds and needed > seconds:
            raise GateRefusedError(
                f"embedding these images takes about {needed:.1f} s here, but the budget is {seconds:g} s; give fewer "
                "images or more time. Nothing was changed"
            )
        self._asked = False  # it cannot

    def check_memory(self, more: int = 0) -> None:
        """Refuse to go on with more memory than the budget allows.

        Args:
            more: bytes that the next step needs beyond what is held.

        Raises:
            GateRefusedError: with both figures.
        """
        if self.budget.mb is None:
            return
        held = resident() // MIB
        needed = held + more / MIB
        if needed > self.budget.mb:
            coming = f", and {more / MIB:.0f} more are needed" if more else ""
            raise GateRefusedError(
                f"this process holds {held} MiB{coming}, but the budget is {self.budget.mb:g} MiB; give fewer images, "
                "a higher budget, or use a smaller learner. Nothing was changed"
            )

    def warnings(self) -> list[str]:
        """What is to be said about the budget, in sentences."""
        self._end()
        limit, told = self.budget.seconds, []
        if self.stopped:
            told.append(f"learning was stopped early to keep the budget of {limit:g} s; teach again with more time")
        if limit is not None and self.seconds > limit:
            told.append(f"it took {self.seconds:.1f} s, longer than the budget of {limit:g} s: it could not be stopped")
        return told
