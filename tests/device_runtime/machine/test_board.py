"""Descriptions of machines, read from copies of the system files of four of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from device_runtime.machine import board as boards
from device_runtime.machine.board import describe, run_tool

ORIN_NANO = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: x\n"
    "# KERNEL_VARIANT: oot\n",
    "etc/os-release": 'PRETTY_NAME="Ubuntu 22.04.5 LTS"\nNAME="Ubuntu"\n',
    "proc/meminfo": "MemTotal:        7802916 kB\nMemFree:         1024000 kB\nMemAvailable:    5120000 kB\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "51812\n",
    "sys/class/thermal/thermal_zone8/type": "tj-thermal\n",
    "sys/class/thermal/thermal_zone8/temp": "53250\n",
    "sys/class/thermal/thermal_zone9/type": "cv0-thermal\n",  # switched off: reading gives an error, so no temp here
}
THOR = {
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "etc/nv_tegra_release": "# R38 (release), REVISION: 4.0, GCID: 43443517, BOARD: generic, EABI: aarch64, DATE: x\n",
}
XAVIER = {
    "proc/device-tree/model": "NVIDIA Jetson Xavier NX Developer Kit\0",
    "etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64, DATE: x\n",
}
PC = {
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD Ryzen 7 5800X 8-Core Processor\nmodel name\t: again\n",
    "etc/os-release": "PRETTY_NAME='Debian'\n",
    "proc/meminfo": "MemTotal:       32768000 kB\nMemAvailable:   30000000 kB\n",
}


def made(folder: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def nvpmodel(command: Sequence[str]) -> str:
    assert list(command) == ["nvpmodel", "-q"]
    return "NVPM WARN: fan mode is not set!\nNV Power Mode: MAXN_SUPER\n2\n"


def silent(command: Sequence[str]) -> str:
    return ""


def test_orin_nano(tmp_path: Path) -> None:
    board = describe(made(tmp_path, ORIN_NANO), nvpmodel)
    assert board.model == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert (board.l4t, board.jetpack, board.jetson) == ("36.4.3", "6.1 to 6.2", True)
    assert board.system == "Ubuntu 22.04.5 LTS"
    assert (board.memory_mb, board.available_mb) == (7620, 5000)
    assert board.power_mode == "MAXN_SUPER"
    assert board.temperatures == {"cpu-thermal": 51.812, "tj-thermal": 53.25}
    assert "mode MAXN_SUPER" in board.title
    assert "JetPack 6.1 to 6.2" in board.title
    assert board.to_dict()["jetson"] is True


@pytest.mark.parametrize(
    ("contents", "l4t", "jetpack", "jetson"),
    [
        (THOR, "38.4.0", "7.1", True),
        (XAVIER, "35.4.1", "5.1.2", True),
        (PC, "", "", False),
        ({"etc/nv_tegra_release": "# R41 (release), REVISION: 1.0, GCID: 1\n"}, "41.1.0", "", True),  # not known yet
        ({"etc/nv_tegra_release": "something else"}, "", "", False),
        ({"proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0"}, "", "", False),
        ({"proc/device-tree/model": "NVIDIA Jetson AGX Orin\0"}, "", "", True),  # in a container
    ],
)
def test_release_and_its_jetpack(
    tmp_path: Path, contents: dict[str, str], l4t: str, jetpack: str, jetson: bool
) -> None:
    board = describe(made(tmp_path, contents), silent)
    assert (board.l4t, board.jetpack, board.jetson) == (l4t, jetpack, jetson)


def test_title_of_a_pc_has_its_processor(tmp_path: Path) -> None:
    board = describe(made(tmp_path, PC), silent)
    assert board.title.startswith("AMD Ryzen 7 5800X 8-Core Processor, ")
    assert board.power_mode == ""


def test_title_of_a_jetson_without_a_power_mode(tmp_path: Path) -> None:
    assert "power mode unknown" in describe(made(tmp_path, THOR), silent).title


def test_machine_without_system_files(tmp_path: Path) -> None:
    board = describe(tmp_path, silent)
    assert (board.model, board.memory_mb, board.temperatures) == ("", 0, {})
    assert board.title


def test_hotter_of_two_zones_with_one_name(tmp_path: Path) -> None:
    zones = tmp_path / "sys/class/thermal"
    for number, temp in enumerate(("61000", "48000")):
        made(zones / f"thermal_zone{number}", {"type": "acpitz", "temp": temp})
    assert describe(tmp_path, silent).temperatures == {"acpitz": 61.0}


def test_this_machine() -> None:
    board = describe()
    assert board.cpus >= 1
    assert board.python == ".".join(map(str, sys.version_info[:3]))
    assert board.memory_mb >= board.available_mb > 0


def test_tool_that_fails_hangs_or_is_missing_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "TIMEOUT", 0.2)
    assert run_tool(["no-such-tool-anywhere"]) == ""
    assert run_tool([sys.executable, "-S", "-c", "print('x'); raise SystemExit(1)"]) == ""
    assert run_tool(["sleep", "5"]) == ""
    assert run_tool(["echo", "yes"]) == "yes\n"


def test_default_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSD_EDGE_ROOT", "/data/here")
    assert boards.default_root() == Path("/data/here")
    monkeypatch.delenv("SSD_EDGE_ROOT")
    monkeypatch.setenv("XDG_DATA_HOME", "/xdg")
    assert boards.default_root() == Path("/xdg/ssd-edge/device")
