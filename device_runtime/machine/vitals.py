"""Memory, disk space and temperatures of this machine at the moment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from device_runtime.machine import board


def rss_mb(root: Path = Path("/")) -> int:
    """Return the resident memory of this process in MiB, or 0 where the system does not report it."""
    try:
        pages = int((root / "proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") // board.MIB


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
        free: int | None = board.disk_free_mb(state)
    except OSError:
        free = None
    return {
        "rss_mb": rss_mb(root),
        "available_mb": found.available_mb,
        "disk_free_mb": free,
        "temperatures": found.temperatures,
        "hottest": max(found.temperatures.values(), default=None),
        "power_mode": found.power_mode,
    }
