"""Counts of what a service has seen, and the drift of it; saved in the root and continued after a restart."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from device_runtime.device import Device, Prediction
from device_runtime.service.frames import RateLimitedWarning
from device_runtime.store import watch_state
from ssd_edge.classes import UNKNOWN
from ssd_edge.errors import EnvironmentUnfitError, InputError, SSDEdgeError, require

if TYPE_CHECKING:
    from device_runtime.service.drift import DriftReport, Monitor

log = logging.getLogger(__name__)

SAVE = 60.0  # seconds between two times that the counts are saved


class Counts:
    """Images with and without a prediction, and drift counts of the current generation's classes.

    One thread calls `add` and `skip`, the same or another one the rest; `report` may be called by any.

    Args:
        device: An open device.
        drifted: Called with the report when its level is another one.
        clock: Monotonic clock in seconds.

    Attributes:
        named: Number of images with a prediction.
        skipped: Number of images without one.
    """

    def __init__(
        self,
        device: Device,
        drifted: Callable[[DriftReport], object] = lambda report: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device, self._drifted, self._clock = device, drifted, clock
        self.named = self.skipped = 0
        self._saved = 0  # number of images when the counts were last saved
        self._monitor: Monitor | None = None
        self._number = 0  # generation of the monitor
        self._level = self._last = ""
        self._skips = RateLimitedWarning(clock)

    def start(self) -> None:
        """Continue with the stored drift counts; loads PyTorch."""
        found = watch_state.load(self._device.store.root)
        self._count_with(found[0] if found else None)

    def follow(self) -> None:
        """Continue with the classes of the current generation; do nothing if it is the same one."""
        if self._number != self._device.generation.number:
            self._count_with(None if self._monitor is None else self._monitor.state())

    def add(self, prediction: Prediction, embeddings: np.ndarray, event: bool) -> None:
        """Count an image with a prediction.

        Args:
            prediction: Its prediction.
            embeddings: Its embedding, float32 ``(1, D)``.
            event: True if it also counts for drift.
        """
        monitor = self._monitor  # read once: another thread may replace it
        if event and monitor is not None and monitor.reference.dim == embeddings.shape[1]:
            monitor.add(embeddings, [prediction.score or 0.0], [prediction.label != UNKNOWN])
        self.named, self._last = self.named + 1, prediction.label

    def skip(self, error: InputError) -> None:
        """Count an image without a prediction."""
        self.skipped += 1
        self._skips.warn(f"no prediction: {error}", "no_prediction")

    def report(self) -> DriftReport | None:
        """Return the drift of the images; None if it is not measured."""
        monitor = self._monitor
        return None if monitor is None else monitor.report()

    def look(self) -> str:
        """Tell about another level of drift, and return a line about what was seen."""
        report = self._look()
        last = f", last: {self._last}" if self._last else ""
        skipped = f", {self.skipped} without a prediction" if self.skipped else ""
        number, level = self._device.generation.number, "collecting" if report is None else report.level
        return f"generation {number}: {self.named} images{skipped}{last}; drift: {level}"

    def save(self) -> None:
        """Save the counts, if there are others than were saved before; a failure is logged."""
        monitor, report = self._monitor, self._look()
        if monitor is None or report is None or self._saved == self.named + self.skipped:
            return
        fields = {
            "report": report.to_dict(),
            "named": self.named,
            "skipped": self.skipped,
            "generation": self._device.generation.number,
        }
        try:
            watch_state.save(self._device.store.root, monitor.state(), fields, self._clock())
        except (SSDEdgeError, OSError) as error:
            log.warning("the drift counts were not saved: %s", error, extra={"code": "not_saved"})
            return
        self._saved = self.named + self.skipped

    def close(self) -> None:
        """Report what was skipped, and save the counts."""
        if self.skipped:
            text = "%d of %d images had no prediction"
            log.warning(text, self.skipped, self.skipped + self.named, extra={"code": "no_prediction"})
        self.save()

    def _look(self) -> DriftReport | None:
        report = self.report()
        if report is not None and report.level != self._level:
            if report.level in ("moderate", "drifted"):
                text = "the images have drifted from those that were learned (drift: %s, index %s)"
                log.warning(text, report.level, report.psi, extra={"code": "drift"})
            self._level = report.level
            self._drifted(report)
        return report

    def _count_with(self, counts: Mapping[str, np.ndarray] | None) -> None:
        """Create a monitor for the current generation, with the given counts if they belong to its classes."""
        self._monitor, self._number = None, self._device.generation.number
        if not self._device.classes:
            return
        try:
            require("torch", "device", "measure drift", "'ssd-edge[device]', on a Jetson use that of JetPack")
        except EnvironmentUnfitError as error:
            log.info("drift is not measured: %s", error, extra={"code": "no_drift"})
            return
        from device_runtime.service.drift import Monitor, Reference

        try:
            reference = Reference(self._device.statistics)
        except InputError:  # the last class was removed meanwhile
            return
        self._monitor = Monitor(reference) if counts is None else Monitor.from_state(reference, counts)
