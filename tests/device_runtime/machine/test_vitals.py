"""Memory, disk space and temperatures of a machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from device_runtime.machine import vitals


def test_vitals_are_those_of_the_machine(tmp_path: Path):
    written = {
        "proc/self/status": "Name:\tpython\nVmRSS:\t  102400 kB\n",
        "proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable:    5120000 kB\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "51812\n",
        "sys/class/thermal/thermal_zone1/type": "tj-thermal\n",
        "sys/class/thermal/thermal_zone1/temp": "53250\n",
    }
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = vitals.vitals(tmp_path / "not yet", tmp_path, lambda command: "NV Power Mode: 15W\n0\n").to_dict()
    assert found.pop("disk_free_mb") == pytest.approx(shutil.disk_usage(tmp_path).free / 2**20, rel=0.1)
    assert found == {
        "rss_mb": 100,
        "available_mb": 5000,
        "temperatures": {"cpu-thermal": 51.812, "tj-thermal": 53.25},
        "hottest": 53.25,
        "power_mode": "15W",
    }


def test_vitals_without_system_files(tmp_path: Path, monkeypatch):
    def dead(path: Path) -> int:
        raise OSError("input/output error")

    monkeypatch.setattr(vitals, "disk_free", dead)
    found = vitals.vitals(tmp_path, tmp_path / "empty", lambda command: "").to_dict()
    assert found == {
        "rss_mb": 0, "available_mb": 0, "disk_free_mb": None, "temperatures": {}, "hottest": None, "power_mode": "",
    }  # fmt: skip
    json.dumps(found)
