"""Memory, disk space and temperatures of this machine at the moment."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from device_runtime.machine.board import Run, describe
from ssd_edge.system import MIB, disk_free, resident


@dataclasses.dataclass(frozen=True)
class Vitals:
    """The state of a machine at a moment.

    Attributes:
        rss_mb: Resident memory of this process in MiB.
        available_mb: Memory in MiB that a new process can have without swapping.
        disk_free_mb: Free disk space in MiB; None if the disk cannot be read.
        temperatures: Temperature of each thermal zone in °C.
        hottest: Highest temperature in °C; None without a readable zone.
        power_mode: Power mode of a Jetson; empty if unknown.
    """

    rss_mb: int
    available_mb: int
    disk_free_mb: int | None
    temperatures: dict[str, float]
    hottest: float | None
    power_mode: str

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as JSON values."""
        return dataclasses.asdict(self)


def vitals(state: Path, root: Path = Path("/"), run: Run | None = None) -> Vitals:
    """Return the machine's memory, disk space, temperatures and power mode.

    On a Jetson this calls ``nvpmodel``, so call it at most about once a minute.

    Args:
        state: A folder on the disk that holds the device's state.
        root: Root of the file system to read.
        run: Returns the standard output of a command, empty if it failed.
    """
    board = describe(root, run)
    try:
        free: int | None = disk_free(state) // MIB
    except OSError:
        free = None
    return Vitals(
        rss_mb=resident(process=root / "proc/self") // MIB,
        available_mb=board.available_mb,
        disk_free_mb=free,
        temperatures=board.temperatures,
        hottest=max(board.temperatures.values(), default=None),
        power_mode=board.power_mode,
    )
