"""Memory, disk space and temperatures of this machine at the moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from device_runtime.machine import board
from ssd_edge.system import MIB, disk_free, resident


def vitals(state: Path, root: Path = Path("/"), run: board.Run | None = None) -> dict[str, Any]:
    """Return the machine's memory, disk space, temperatures and power mode as JSON values.

    On a Jetson this calls ``nvpmodel``, so call it at most about once a minute.

    Args:
        state: A folder on the disk that holds the device's state.
        root: Root of the file system to read.
        run: Returns the standard output of a command, empty if it failed.

    Returns:
        rss_mb (of this process), available_mb (free memory), disk_free_mb (None if the disk cannot be read),
        temperatures (zone → °C), hottest (°C; None without a readable zone), power_mode (empty if unknown).
    """
    found = board.describe(root, run)
    try:
        free: int | None = disk_free(state) // MIB
    except OSError:
        free = None
    return {
        "rss_mb": resident(process=root / "proc/self") // MIB,
        "available_mb": found.available_mb,
        "disk_free_mb": free,
        "temperatures": found.temperatures,
        "hottest": max(found.temperatures.values(), default=None),
        "power_mode": found.power_mode,
    }
