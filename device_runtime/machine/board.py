"""What this machine is, as its own files say; nothing is written, and what is not there stays empty."""

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

from ssd_edge.system import usable_cores
from ssd_edge.targets import numbers

TIMEOUT = 5.0  # seconds, for a tool that only prints a line

# Jetson Linux release → the JetPack that brings it, as NVIDIA published them; 36.4 came with more than one.
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
    """A machine. Texts may be empty and numbers 0: then the machine does not say.

    Attributes:
        model: of a board with a device tree, e.g. ``NVIDIA Jetson Orin Nano Developer Kit``.
        l4t: Jetson Linux release, e.g. ``36.4.3``.
        jetpack: that belongs to it.
        architecture: e.g. ``aarch64``.
        processor: its name; ARM boards have none.
        cpus: that this process may use.
        memory_mb: MiB in all.
        available_mb: MiB that a new process can have without swapping.
        power_mode: what ``nvpmodel`` says, e.g. ``15W``; a figure of a Jetson means little without it.
        temperatures: zone → °C.
        python: version of the interpreter.
        system: the operating system.
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
        """Whether it is a Jetson; in a container only one of the two may be seen."""
        return bool(self.l4t) or "Jetson" in self.model

    @property
    def title(self) -> str:
        """What to call it beside a figure, e.g. ``NVIDIA Jetson AGX Orin, JetPack 7.2, mode MAXN, 12 CPUs``."""
        parts = [self.model or self.processor or self.architecture or "unknown machine"]
        if self.jetson:
            parts.append(f"JetPack {self.jetpack}" if self.jetpack else f"L4T {self.l4t or 'unknown'}")
            parts.append(f"mode {self.power_mode}" if self.power_mode else "power mode unknown")
        return ", ".join([*parts, f"{self.cpus} CPUs"])

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes and `jetson` as JSON values."""
        return {**dataclasses.asdict(self), "jetson": self.jetson}


def describe(root: Path = Path("/"), run: Run | None = None) -> Board:
    """This machine.

    Args:
        root: of the file system that is read.
        run: gives the standard output of a command, empty when it failed.
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
    """Where a device keeps its state: ``$SSD_EDGE_ROOT``, else a folder in the user's data directory."""
    if named := os.environ.get("SSD_EDGE_ROOT"):
        return Path(named)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "ssd-edge" / "device"


def run_tool(command: Sequence[str]) -> str:
    """Standard output of a short command; empty when it is missing, fails or hangs."""
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
    """``# R36 (release), REVISION: 4.3, …`` → ``36.4.3``."""
    found = re.match(r"#\s*R(\d+)\s*\(release\),\s*REVISION:\s*(\d+(?:\.\d+)*)", text)
    return f"{found[1]}.{found[2]}" if found else ""


def _memory(text: str) -> dict[str, int]:
    """/proc/meminfo in MiB."""
    return {name: int(kib) // 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _temperatures(folder: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for zone in sorted(folder.glob("thermal_zone*")):
        name = _text(zone / "type").strip() or zone.name
        # a zone that is switched off answers with an error in place of a number; of two with one name the hotter counts
        with contextlib.suppress(ValueError):
            found[name] = max(int(_text(zone / "temp")) / 1000, found.get(name, -273.15))
    return found
