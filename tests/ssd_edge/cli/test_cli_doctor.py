"""`ssd-edge doctor` and `ssd-edge profile` through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from device_runtime.machine import board as boards
from device_runtime.machine import doctor as examination
from device_runtime.machine.board import Board
from ssd_edge.cli.doctor import doctor
from ssd_edge.cli.profile import lines, profile
from ssd_edge.errors import BundleRefusedError, InputError


def run(command: Any, *args: str | Path) -> Result:
    return CliRunner().invoke(command, [str(arg) for arg in args])


def test_the_table_ends_with_a_verdict(tmp_path: Path) -> None:
    done = run(doctor, "--root", tmp_path)
    assert done.exit_code == 0, done.output
    table = done.stdout.splitlines()
    assert table[-1] == "fit"
    assert all(len(line) <= 100 for line in table if str(tmp_path) not in line)  # a path is never wrapped
    assert any(line.split()[:2] == ["ok", "onnxruntime"] for line in table)
    assert any(line.split()[:2] == ["ok", "disk"] for line in table)
    assert list(tmp_path.iterdir()) == []


def test_an_unfit_machine_exits_with_code_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "disk_free", lambda path: 1 << 20)
    done = run(doctor, "--root", tmp_path)
    assert done.exit_code == 3
    assert done.stdout.splitlines()[-1] == "unfit: disk"
    assert "-> free some space" in done.stdout
    report = json.loads(run(doctor, "--root", tmp_path, "--json").stdout)
    assert (report["fit"], report["verdict"]) == (False, "unfit: disk")


def test_an_old_jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    xavier = Board(model="NVIDIA Jetson Xavier NX", l4t="35.4.1", jetpack="5.1.2", python="3.10.12")
    monkeypatch.setattr(boards, "describe", lambda: xavier)
    done = run(doctor, "--root", tmp_path)
    assert done.exit_code == 3
    assert done.stdout.splitlines()[-1] == "unfit: jetpack"


def test_json_output(tmp_path: Path, bundle: Path) -> None:
    done = run(doctor, bundle, "--root", tmp_path, "--json")
    report = json.loads(done.stdout)
    assert done.exit_code == 0
    assert report["fit"] is True
    assert all(set(check) == {"name", "state", "found", "fix"} for check in report["checks"])
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert (states["target"], states["signature"]) == ("warning", "note")  # the bundle is for a Jetson
    assert report["machine"]["cpus"] >= 1


def test_a_file_that_is_not_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "x.ssdedge").write_bytes(b"no bundle")
    for command in (doctor, profile):
        assert isinstance(run(command, tmp_path / "x.ssdedge").exception, BundleRefusedError)
        assert isinstance(run(command, tmp_path / "none.ssdedge").exception, InputError)


def test_doctor_needs_only_the_base_packages(tmp_path: Path) -> None:
    """Run in a separate process, where nothing is imported yet."""
    code = """
import sys
for name in ("torch", "onnxruntime", "tensorrt", "cryptography", "onnx", "sklearn", "rich"):
    sys.modules[name] = None
from ssd_edge.cli import cli, main
from ssd_edge.cli.doctor import doctor
cli.add_command(doctor)
main()
"""
    args = [sys.executable, "-c", code, "doctor", "--root", str(tmp_path)]
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done
    assert done.stdout.splitlines()[-1] == "unfit: backbone"
    assert "pip install 'ssd-edge[device]'" in done.stdout
    assert done.stderr == ""


def test_a_profile(bundle: Path, tmp_path: Path) -> None:
    args = (bundle, "--images", "3", "--warm-up", "1", "--root", tmp_path)
    result = json.loads(run(profile, *args, "--json").stdout)
    assert (result["calls"], result["warm_up"], result["batch"]) == (3, 1, 1)
    assert result["bundle"]["learner"] == "slda"
    assert result["memory_mb"]["learned"] > result["memory_mb"]["imports"]
    shown = "\n".join(lines(result))
    assert "3 calls after 1 to warm up" in shown
    assert "jetson-orin-nano" in shown
    assert "This machine is not a Jetson" in shown
    result["machine"] |= {"jetson": True, "title": "Orin"}
    result["fits"][0]["fits"] = False
    report = lines(result)
    assert "This machine is not a Jetson" not in "\n".join(report)
    assert "measured on Orin, with" in report[1]
    assert any(line.endswith("does not fit *") for line in report)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("option", "value"), [("--images", "0"), ("--warm-up", "-1"), ("--batch", "0")])
def test_a_profile_of_zero_images(option: str, value: str, tmp_path: Path) -> None:
    error = run(profile, tmp_path / "none.ssdedge", option, value).exception
    assert isinstance(error, InputError)
    assert str(error).startswith(f"{option} must be at least")
