"""The periodic work of a service that predicts: heartbeats, new generations, drift counts, status for systemd."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from device_runtime.device import Device, Prediction
from device_runtime.service import systemd
from device_runtime.service.frames import RateLimitedWarning
from device_runtime.store import watch_state
from ssd_edge.classes import UNKNOWN
from ssd_edge.errors import EnvironmentUnfitError, InputError, SSDEdgeError, require

if TYPE_CHECKING:
    from device_runtime.service.drift import DriftReport, Monitor

log = logging.getLogger(__name__)

REFRESH, STATUS, SAVE = 1.0, 10.0, 60.0  # periods in seconds


class Upkeep:
    """Periodic work of the thread that predicts; only `report` may be called by others.

    Args:
        device: An open device.
        clock: Monotonic clock in seconds.
        changed: Called when another generation is in use, whichever thread or process has committed it.
        drifted: Called with the report when its level is another one.

    Attributes:
        heart: Heartbeats for systemd's watchdog.
        named: Number of images with a prediction.
        skipped: Number of images without one.
    """

    def __init__(
        self,
        device: Device,
        clock: Callable[[], float] = time.monotonic,
        changed: Callable[[], object] = lambda: None,
        drifted: Callable[[DriftReport], object] = lambda report: None,
    ) -> None:
        self._device, self._clock, self._changed, self._drifted = device, clock, changed, drifted
        self.heart = systemd.Heartbeat(clock)
        self.named = self.skipped = 0
        self._saved = 0  # number of images when the counts were last saved
        self._monitor: Monitor | None = None
        self._current: tuple[int, ...] | None = None  # see `_mark`
        self._number = device.generation.number
        self._level = self._last = ""
        self._warning, self._skips = RateLimitedWarning(clock), RateLimitedWarning(clock)
        self._due = dict.fromkeys((REFRESH, STATUS, SAVE), clock())

    def warm_up(self) -> None:
        """Run the backbone once, which may build an engine."""
        size = self._device.bundle.size
        self._device.embedder.embed(np.zeros((1, size, size, 3), np.uint8))  # whatever it gives for a black image

    def start(self) -> None:
        """Continue with the stored drift counts; loads PyTorch."""
        found = watch_state.load(self._device.store.root)
        self._count_with(found[0] if found else None)
        self._due |= {period: self._clock() + period for period in (STATUS, SAVE)}

    def count(self, prediction: Prediction, embeddings: np.ndarray, event: bool) -> None:
        """Count an image with a prediction.

        Args:
            prediction: Its prediction.
            embeddings: Its embedding, float32 ``(1, D)``.
            event: True if it also counts for drift.
        """
        if event and self._monitor is not None and self._monitor.reference.dim == embeddings.shape[1]:
            self._monitor.add(embeddings, [prediction.score or 0.0], [prediction.label != UNKNOWN])
        self.named, self._last = self.named + 1, prediction.label

    def skip(self, error: InputError) -> None:
        """Count an image without a prediction."""
        self.skipped += 1
        self._skips.warn(f"no prediction: {error}", "no_prediction")

    def work(self) -> None:
        """Do what is due: send a heartbeat, check for a new generation, send the status, save the counts."""
        self.heart.beat()
        now = self._clock()
        for period, work in ((REFRESH, self._refresh), (STATUS, self._send_status), (SAVE, self._save)):
            if now >= self._due[period]:
                self._due[period] = now + period
                work()

    def report(self) -> DriftReport | None:
        """Return the drift of the images; None if it is not measured."""
        monitor = self._monitor
        return None if monitor is None else monitor.report()

    def close(self) -> None:
        """Notify systemd that the service stops, report what was skipped, and save the counts."""
        systemd.notify("STOPPING=1", "stopping")
        if self.skipped:
            text = "%d of %d images had no prediction"
            log.warning(text, self.skipped, self.skipped + self.named, extra={"code": "no_prediction"})
        self._save()

    def _refresh(self) -> None:
        current = self._mark()
        if current == self._current:  # `Device.refresh` reads and verifies several megabytes
            return
        try:
            self._device.refresh()
        except (SSDEdgeError, OSError) as error:
            number = self._device.generation.number
            text = f"generation {number} stays in use: the current one cannot be read ({error})"
            self._warning.warn(text, "generation_lost")
            return
        self._current = current
        if self._device.generation.number != self._number:  # also if a thread of this process has committed it
            self._number = self._device.generation.number
            text = "generation %d is in use now, with %d classes"
            log.info(text, self._number, len(self._device.classes), extra={"code": "generation"})
            self._count_with(None if self._monitor is None else self._monitor.state())
            self._changed()

    def _mark(self) -> tuple[int, ...]:
        """Return a value that changes with every commit, which replaces the file CURRENT."""
        try:
            about = (self._device.store.root / "CURRENT").stat()
        except OSError:
            return ()
        return about.st_ino, about.st_mtime_ns, about.st_ctime_ns

    def _count_with(self, counts: Mapping[str, np.ndarray] | None) -> None:
        """Create a monitor for the current generation, with the given counts if they belong to its classes."""
        self._monitor = None
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
        except InputError:  # another process has removed the last class meanwhile
            return
        self._monitor = Monitor(reference) if counts is None else Monitor.from_state(reference, counts)

    def _send_status(self) -> None:
        report = self._reported()
        last = f", last: {self._last}" if self._last else ""
        skipped = f", {self.skipped} without a prediction" if self.skipped else ""
        number, level = self._device.generation.number, "collecting" if report is None else report.level
        systemd.notify("", f"generation {number}: {self.named} images{skipped}{last}; drift: {level}")

    def _reported(self) -> DriftReport | None:
        """Return the drift, and tell about another level of it."""
        report = self.report()
        if report is not None and report.level != self._level:
            if report.level in ("moderate", "drifted"):
                text = "the images have drifted from those that were learned (drift: %s, index %s)"
                log.warning(text, report.level, report.psi, extra={"code": "drift"})
            self._level = report.level
            self._drifted(report)
        return report

    def _save(self) -> None:
        if self._monitor is None or self._saved == self.named + self.skipped:
            return
        report = self._reported()
        assert report is not None
        fields = {
            "report": report.to_dict(),
            "named": self.named,
            "skipped": self.skipped,
            "generation": self._device.generation.number,
        }
        try:
            watch_state.save(self._device.store.root, self._monitor.state(), fields, self._clock())
        except (SSDEdgeError, OSError) as error:
            log.warning("the drift counts were not saved: %s", error, extra={"code": "not_saved"})
            return
        self._saved = self.named + self.skipped
