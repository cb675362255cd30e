"""`Station`: everything that the service can do, without a word of HTTP or MQTT."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from device_runtime.device import NAMED, Device, Observation
from device_runtime.results import History, describe
from device_runtime.serve.events import Events
from device_runtime.service.follower import Follower
from ssd_edge import images
from ssd_edge.errors import EnvironmentUnfitError, InputError

T = TypeVar("T")

log = logging.getLogger(__name__)

WORKERS = 2  # threads that decode and predict: while one embeds, another decodes
MOST_WAITING = 64  # requests that wait for one of them


class BusyError(EnvironmentUnfitError):
    """More was asked for at once than the device does; the same request may be sent again."""


class UnknownError(InputError):
    """Something is named that does not exist."""


class Station:
    """A device with all that runs beside it. Every method may be called from any thread.

    Args:
        device: An open device.
        events: Where changes are published.

    Attributes:
        device: See above.
        events: See above.
        began: Time of the start, monotonic seconds.
    """

    def __init__(self, device: Device, events: Events | None = None) -> None:
        self.device, self.events = device, events or Events()
        self.began = time.monotonic()
        self._pool = ThreadPoolExecutor(WORKERS, "predict")
        self._counting = threading.Lock()
        self._waiting = self._finished = 0
        self._follower = Follower(device, self._publish_generation)

    def warm(self) -> None:
        """Run the backbone once, which may build an engine."""
        size = self.device.bundle.size
        self.device.embedder.embed(np.zeros((1, size, size, 3), np.uint8))  # whatever it gives for a black image

    def close(self) -> None:
        """End everything; a commit that has begun is finished."""
        self._pool.shutdown(cancel_futures=True)
        self.events.close()

    @property
    def waiting(self) -> int:
        """Number of requests that are predicted or wait for it."""
        return self._waiting

    @property
    def finished(self) -> int:
        """Number of requests that were predicted, or failed to be."""
        return self._finished

    def work(self, task: Callable[[], T]) -> Future[T]:
        """Run something in one of the threads that predict.

        Raises:
            BusyError: Too many requests wait already.
        """
        with self._counting:
            if self._waiting >= WORKERS + MOST_WAITING:
                raise BusyError(f"{self._waiting} requests wait for an answer already; try again in a moment")
            self._waiting += 1
        future = self._pool.submit(task)
        future.add_done_callback(self._done)
        return future

    def _done(self, future: Future[Any]) -> None:
        with self._counting:
            self._waiting -= 1
            self._finished += 1

    def decode(self, data: bytes, name: str) -> np.ndarray:
        """Decode an image as the backbone wants it, uint8 RGB ``(size, size, 3)``.

        Raises:
            InputError: It is not a valid image.
        """
        return images.decode(data, name, self.device.bundle.pixels)

    def predict(self, pixels: Sequence[np.ndarray], names: Sequence[str], reject: bool = True) -> Observation:
        """Predict images in the calling thread; see `Device.observe`."""
        return self.device.observe(list(pixels), reject, names)

    def status(self) -> dict[str, Any]:
        """Return the device's status and that of the service, as JSON values."""
        return {**self.device.status().to_dict(), "uptime": round(time.monotonic() - self.began, 1)}

    def classes(self) -> dict[str, Any]:
        """Return the classes with what is known about how well each is recognised, as JSON values."""
        snapshot = self.device.snapshot
        entries = [
            {"name": entry.name, "images": entry.images, "origin": "device" if entry.origin == "device" else "bundle"}
            for entry in snapshot.registry.entries
        ]
        return {"generation": snapshot.generation.number, "classes": entries}

    def history(self) -> History:
        """Return all generations."""
        return self.device.history()

    def refresh(self) -> None:
        """Follow what this and other processes have committed; call it about once per second."""
        self._follower.look()

    def _publish_generation(self) -> None:
        snapshot = self.device.snapshot
        generation = snapshot.generation
        what = describe(generation.info, NAMED)
        self.events.publish("generation", generation=generation.number, classes=len(snapshot.registry.names), what=what)
