"""Follow the generations of a device, whichever process commits them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from device_runtime.device import Device
from device_runtime.service.frames import RateLimitedWarning
from ssd_edge.errors import SSDEdgeError

log = logging.getLogger(__name__)

REFRESH = 1.0  # seconds between two looks


class Follower:
    """Keeper of a device at its current generation; thread-safe.

    Args:
        device: An open device.
        changed: Called when another generation is in use, also if a thread of this process has committed it.
        clock: Monotonic clock in seconds.
    """

    def __init__(
        self,
        device: Device,
        changed: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device, self._changed = device, changed
        self._lock = threading.RLock()
        self._mark: tuple[int, ...] | None = None  # see `Generations.mark`
        self._number = device.generation.number
        self._warning = RateLimitedWarning(clock)

    def look(self) -> None:
        """Load the current generation if it is another one; a generation that cannot be read is logged."""
        with self._lock:
            mark = self._device.store.mark()
            if mark != self._mark:  # `Device.refresh` reads and verifies several megabytes
                try:
                    self._device.refresh()
                except (SSDEdgeError, OSError) as error:
                    number = self._device.generation.number
                    text = f"generation {number} stays in use: the current one cannot be read ({error})"
                    self._warning.warn(text, "generation_lost")
                    return
                self._mark = mark
            generation = self._device.generation
            if generation.number != self._number:
                self._number = generation.number
                text = "generation %d is in use now, with %d classes"
                log.info(text, self._number, len(self._device.classes), extra={"code": "generation"})
                self._changed()
