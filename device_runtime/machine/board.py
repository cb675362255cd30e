"""Description of this machine, read from system files."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ssd_edge import files
from ssd_edge.errors import SSDEdgeError
from ssd_edge.system import usable_cores
from ssd_edge.targets import numbers

TIMEOUT = 5.0  # seconds, for a tool that prints one line

# Jetson Linux release → its JetPack, as published by NVIDIA; 36.4 belongs to several.
JETPACKS: dict[tuple[int, ...], str] = {
    (32, 7): "4.6",
    (35, 4): "5.1.2",
    (36, 3): "6.0",
    (36, 4): "6.1 to 6.2",
    (36, 5): "6.2.2",
    (38, 2): "7.0",
    (38, 4): "7.1",
    (39, 2): "7.2",
}

Run = Callable[[Sequence[str]], str]


@dataclasses.dataclass(frozen=True)
class Board:
    """A machine. Unknown strings are empty and unknown numbers 0.

    Attributes:
        model: Model in the device tree, e.g. ``NVIDIA Jetson Orin Nano Developer Kit``.
        l4t: Jetson Linux release, e.g. ``36.4.3``.
        jetpack: JetPack release of `l4t`.
        architecture: Architecture, e.g. ``aarch64``.
        processor: Name of the CPU; empty on ARM boards.
        cpus: Number of CPUs that this process may use.
        memory_mb: Total memory in MiB.
        available_mb: Memory in MiB that a new process can have without swapping.
        power_mode: Power mode reported by ``nvpmodel``, e.g. ``15W``, on which the speed of a Jetson depends.
        temperatures: Temperature of each thermal zone in °C.
        python: Version of the interpreter.
        system: Name of the operating system.
    """

    model: str = ""
    l4t: str = ""
    jetpack: str = ""
    architecture: str = ""
    processor: str = ""
    cpus: int = 0
    memory_mb: int = 0
    available_mb: int = 0
    power_mode: str = ""
    temperatures: dict[str, float] = dataclasses.field(default_factory=dict)
    python: str = ""
    system: str = ""

    @property
    def jetson(self) -> bool:
        """True for a Jetson. A container may see only the release or only the model."""
        return bool(self.l4t) or "Jetson" in self.model

    @property
    def title(self) -> str:
        """Description for a table of results, e.g. ``NVIDIA Jetson AGX Orin, JetPack 7.2, mode MAXN, 12 CPUs``."""
        parts = [self.model or self.processor or self.architecture or "unknown machine"]
        if self.jetson:
            parts.append(f"JetPack {self.jetpack}" if self.jetpack else f"L4T {self.l4t or 'unknown'}")
            parts.append(f"mode {self.power_mode}" if self.power_mode else "power mode unknown")
        return ", ".join([*parts, f"{self.cpus} CPUs"])

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes and `jetson` as JSON values."""
        return {**dataclasses.asdict(self), "jetson": self.jetson}


def describe(root: Path = Path("/"), run: Run | None = None) -> Board:
    """Describe this machine.

    Args:
        root: Root of the file system to read.
        run: Returns the standard output of a command, empty if it failed.
    """
    l4t = _l4t(_text(root / "etc/nv_tegra_release"))
    memory = _memory(_text(root / "proc/meminfo"))
    return Board(
        model=_text(root / "proc/device-tree/model").strip("\0 \n"),
        l4t=l4t,
        jetpack=JETPACKS.get(numbers(l4t)[:2], ""),
        architecture=platform.machine(),
        processor=_field(r"model name\s*:\s*(.+)", _text(root / "proc/cpuinfo")),
        cpus=usable_cores(),
        memory_mb=memory.get("MemTotal", 0),
        available_mb=memory.get("MemAvailable", 0),
        power_mode=_field(r"NV Power Mode:\s*(.+)", (run or run_tool)(["nvpmodel", "-q"])),
        temperatures=_temperatures(root / "sys/class/thermal"),
        python=platform.python_version(),
        system=_field(r'PRETTY_NAME="?([^"\n]+)', _text(root / "etc/os-release")) or platform.system(),
    )


def default_root() -> Path:
    """Return the root of the device's state: ``$SSD_EDGE_ROOT``, or a folder in the user's data directory."""
    if named := os.environ.get("SSD_EDGE_ROOT"):
        return Path(named)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "ssd-edge" / "device"


def run_tool(command: Sequence[str]) -> str:
    """Return the standard output of a short command; empty if the command is missing, fails or hangs."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _field(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1].strip() if found else ""


def _l4t(text: str) -> str:
    """Parse ``# R36 (release), REVISION: 4.3, …`` as ``36.4.3``."""
    found = re.match(r"#\s*R(\d+)\s*\(release\),\s*REVISION:\s*(\d+(?:\.\d+)*)", text)
    return f"{found[1]}.{found[2]}" if found else ""


def _memory(text: str) -> dict[str, int]:
    """Parse /proc/meminfo and return its values in MiB."""
    return {name: int(kib) // 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _temperatures(folder: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    zones: Sequence[Path] = ()
    with contextlib.suppress(SSDEdgeError):  # not reported here
        zones = files.list_folder(folder)
    for zone in zones:
        if not zone.name.startswith("thermal_zone"):
            continue
        name = _text(zone / "type").strip() or zone.name
        # a disabled zone returns an error text; of zones with the same name the hottest counts
        with contextlib.suppress(ValueError):
            found[name] = max(int(_text(zone / "temp")) / 1000, found.get(name, -273.15))
    return found
