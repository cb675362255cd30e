"""Limits on the time and memory of a learn, and the time and memory it takes."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable

from ssd_edge.errors import GateRefusedError, InputError
from ssd_edge.system import MIB, reset_peak, resident

log = logging.getLogger(__name__)

LEARNING = 0.5  # of the time that remains after embedding; the rest is for the trial and for the guard
TRIAL = 0.8  # of the remaining time; trying stops there to leave time for the guard and the commit

# Called with the stage, the share of it that is done, 0..1, and the seconds it will still take (None if unknown yet).
Watcher = Callable[[str, float, float | None], None]


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits of one learn; None for no limit.

    A gradient learner stops early when its time is up. Steps that cannot be interrupted (one pass over the images, a
    closed-form solution) may exceed the limit; a warning then says so. Memory is that of the whole process and is
    checked between the steps of a learn, so a single step may exceed the limit.

    Attributes:
        seconds: Wall time.
        mb: Resident memory, MiB.
    """

    seconds: float | None = None
    mb: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            InputError: A limit is not a positive number.
        """
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"the budget of {name} must be a number above 0, but is {value}")


class Meter:
    """Measures one learn: call `stage` when a stage starts, and `tick` during it.

    Args:
        budget: Limits; None for no limits.
        watcher: Called with the progress, at most a few times per second.
        clock: Monotonic clock in seconds.

    Attributes:
        budget: The limits.
        stopped: True if a stage was stopped early.
    """

    def __init__(
        self, budget: Budget | None = None, watcher: Watcher | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.budget = budget or Budget()
        self.stopped = False
        self._watcher, self._clock = watcher, clock
        self._began = self._stage_began = clock()
        self._stage, self._reported, self._until = "", -math.inf, math.inf
        self._stop_requested = False
        self._resets = reset_peak()

    @property
    def seconds(self) -> float:
        """Seconds since the learn started."""
        return self._clock() - self._began

    @property
    def peak_mb(self) -> int | None:
        """Peak memory of the process during the learn in MiB, or None if the system does not report it."""
        peak = resident("VmHWM") // MIB
        return peak if self._resets and peak else None

    def stage(self, name: str, share: float = 1.0) -> None:
        """Start a stage that may take this share of the remaining time."""
        self._finish_stage()
        self._stage, self._stage_began, self._reported = name, self._clock(), -math.inf
        left = math.inf if self.budget.seconds is None else self.budget.seconds - self.seconds
        self._until = self._stage_began + share * left

    def tick(self, share: float) -> bool:
        """Report the share of the stage that is done, 0..1; return True if its time is up.

        Raises:
            GateRefusedError: The process holds more memory than the budget allows.
        """
        self.check_memory()
        now = self._clock()
        if self._watcher is not None and (now - self._reported >= 0.2 or share >= 1):
            self._reported = now
            left = (now - self._stage_began) * (1 - share) / share if share > 0 else None
            self._watcher(self._stage, share, left)
        self._stop_requested = now >= self._until and share < 1
        return self._stop_requested

    def _finish_stage(self) -> None:
        """Count a stage as stopped early if it ended after a request to stop."""
        self.stopped, self._stop_requested = self.stopped or self._stop_requested, False

    def check_embedding(self, share: float) -> None:
        """`tick` for a stage that cannot be stopped early.

        Raises:
            GateRefusedError: It will take longer than the whole budget, or needs more memory.
        """
        self.tick(share)
        seconds, spent = self.budget.seconds, self._clock() - self._stage_began
        needed = spent / share if share > 0 else 0.0
        if seconds is not None and share < 1 and spent > 0.1 * seconds and needed > seconds:
            raise GateRefusedError(
                f"embedding these images takes about {needed:.1f} s here, but the budget is {seconds:g} s; use fewer "
                "images or more time. Nothing was changed"
            )
        self._stop_requested = False

    def check_memory(self, more: int = 0) -> None:
        """Check the memory of the process.

        Args:
            more: Bytes that the next step needs in addition.

        Raises:
            GateRefusedError: It exceeds the budget.
        """
        if self.budget.mb is None:
            return
        held = resident() // MIB
        needed = held + more / MIB
        if needed > self.budget.mb:
            addition = f", and {more / MIB:.0f} more are needed" if more else ""
            raise GateRefusedError(
                f"this process holds {held} MiB{addition}, but the budget is {self.budget.mb:g} MiB; use fewer images, "
                "a higher budget, or a smaller learner. Nothing was changed"
            )

    def warnings(self) -> list[str]:
        """Return warnings about the budget."""
        self._finish_stage()
        limit, warnings = self.budget.seconds, []
        if self.stopped:
            warnings.append(f"learning was stopped early to keep the budget of {limit:g} s; teach again with more time")
        if limit is not None and self.seconds > limit:
            warnings.append(
                f"it took {self.seconds:.1f} s, longer than the budget of {limit:g} s: it could not be stopped"
            )
        return warnings
