"""Messages to systemd, and the unit file of the examples."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_runtime.service import systemd

UNIT = Path(__file__).parents[3] / "examples" / "ssd-edge.service"
# Keys of systemd 245, the oldest supported version.
KNOWN = {
    "Unit": "Description Documentation After StartLimitIntervalSec",
    "Service": "Type NotifyAccess ExecStart TimeoutStartSec TimeoutStopSec WatchdogSec Restart RestartSec User Group "
    "SupplementaryGroups StateDirectory StateDirectoryMode CacheDirectory UMask Environment MemoryMax OOMPolicy "
    "TasksMax Nice IOSchedulingClass IOSchedulingPriority LogRateLimitIntervalSec LogRateLimitBurst LimitCORE "
    "ProtectSystem ProtectHome PrivateTmp NoNewPrivileges CapabilityBoundingSet AmbientCapabilities RestrictSUIDSGID "
    "LockPersonality RestrictRealtime RestrictNamespaces ProtectKernelTunables ProtectKernelModules ProtectKernelLogs "
    "ProtectControlGroups ProtectClock ProtectHostname SystemCallArchitectures RestrictAddressFamilies IPAddressDeny",
    "Install": "WantedBy",
}


@pytest.fixture(params=["path", "abstract"])
def supervisor(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch) -> Iterator[socket.socket]:
    """Yield a socket that receives the messages, like that of systemd."""
    name = str(tmp_path / "notify") if request.param == "path" else f"\0ssd-edge-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name)
        listener.settimeout(2)
        monkeypatch.setenv("NOTIFY_SOCKET", name.replace("\0", "@"))
        yield listener


def test_messages_arrive(supervisor: socket.socket):
    assert systemd.notify("READY=1", "watching grün")
    assert supervisor.recv(4096).decode() == "READY=1\nSTATUS=watching grün"
    assert systemd.notify("", "alone")
    assert supervisor.recv(4096) == b"STATUS=alone"


def test_status_cannot_add_an_assignment(supervisor: socket.socket):
    assert systemd.notify("WATCHDOG=1", "bad\nSTOPPING=1\x1b[2J\udcff.jpg")
    said = supervisor.recv(4096).decode().split("\n")
    assert said == ["WATCHDOG=1", "STATUS=bad STOPPING=1?[2J?.jpg"]


@pytest.mark.parametrize("address", ["/nowhere/notify", "@nobody-listens-here", "vsock:2:1234", "/" + "x" * 200])
def test_missing_supervisor_is_logged(address: str, monkeypatch, caplog):
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not systemd.notify("READY=1")
    assert len(caplog.records) == 1


def test_without_systemd_nothing_is_sent(monkeypatch, caplog):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not systemd.notify("READY=1")
    assert not caplog.records


def test_supervisor_that_does_not_read_does_not_block(tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr(systemd, "SEND_TIMEOUT", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "full"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "full"))
        told = [systemd.notify("WATCHDOG=1") for _ in range(5000) if not caplog.records]
    assert told[0]
    assert not told[-1]


@pytest.mark.parametrize(
    ("microseconds", "process", "expected"),
    [
        ("120000000", "own", 120.0),
        ("120000000", "", 120.0),
        ("500000", None, 0.5),
        ("120000000", "1", None),
        ("0", "own", None),
        ("-5", "own", None),
        ("soon", "own", None),
        ("5", "me", None),
        (None, "own", None),
    ],
)
def test_watchdog_time(microseconds: str | None, process: str | None, expected: float | None, monkeypatch):
    values = {"WATCHDOG_USEC": microseconds, "WATCHDOG_PID": str(os.getpid()) if process == "own" else process}
    for name, value in values.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert systemd.watchdog_seconds() == expected


def test_heartbeats_are_sent_when_due(monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "40000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    said: list[float] = []
    now = [100.0]
    monkeypatch.setattr(systemd, "notify", lambda state: said.append(now[0]) is None)
    heart = systemd.Heartbeat(clock=lambda: now[0])
    for _ in range(61):
        heart.beat()
        now[0] += 0.5
    assert said == [100.0, 110.0, 120.0, 130.0]
    assert heart.pause(60.0) == pytest.approx(9.5)
    assert heart.pause(2.0) == 2.0
    now[0] += 100
    assert heart.pause(2.0) == 0.0


def test_no_heartbeats_without_a_watchdog(monkeypatch):
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    monkeypatch.setattr(systemd, "notify", lambda state: pytest.fail("said something"))
    heart = systemd.Heartbeat()
    assert not heart.beat()
    assert heart.pause(60.0) == 60.0


def unit_settings() -> dict[str, list[tuple[str, str]]]:
    """Parse the unit file strictly; return the (key, value) pairs of each section in order."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in UNIT.read_text(encoding="ascii").splitlines():
        if line.startswith("["):
            section = line[1:-1]
            assert line.endswith("]")
            assert section not in found, f"[{section}] twice"
            found[section] = []
        elif line and not line.startswith("#"):
            key, equals, value = line.partition("=")
            assert equals, line
            assert key == key.strip(), line
            found[section].append((key, value))
    return found


def test_unit_has_only_known_keys_once():
    sections = unit_settings()
    assert list(sections) == ["Unit", "Service", "Install"]
    for section, settings in sections.items():
        keys = [key for key, _ in settings]
        assert set(keys) - set(KNOWN[section].split()) == set()
        assert {key for key in keys if keys.count(key) > 1} <= {"Environment"}


def test_unit_has_the_settings_that_the_code_requires():
    settings = dict(unit_settings()["Service"])
    assert settings["Type"] == "notify"
    assert settings["Restart"] == "on-failure"
    assert settings["ProtectSystem"] == "strict"
    assert int(settings["WatchdogSec"]) >= 60  # longer than learning takes
    assert settings["ExecStart"].split()[1:3] == ["device", "watch"]
    environment = " ".join(value for key, value in unit_settings()["Service"] if key == "Environment")
    assert f"SSD_EDGE_ROOT=%S/{settings['StateDirectory']} " in environment
    assert "AF_UNIX" in settings["RestrictAddressFamilies"]  # for READY=1
    assert not {"MemoryDenyWriteExecute", "PrivateDevices", "DeviceAllow"} & set(settings)  # they disable the GPU
    assert settings["ProtectClock"] == "no"


def test_systemd_accepts_the_unit(tmp_path: Path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: the unit was checked against the list of known keys only")
    unit = tmp_path / "ssd-edge.service"
    unit.write_text(UNIT.read_text().replace("/opt/ssd-edge/bin/ssd-edge", sys.executable))

    def verify() -> str:
        command = ["systemd-analyze", "verify", "--man=no", unit]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        own = [line for line in (done.stdout + done.stderr).splitlines() if "ssd-edge" in line]
        return "\n".join(own)  # without messages about other units of this machine

    assert verify() == ""
    unit.write_text(unit.read_text().replace("WatchdogSec=120", "WatchdogSec=often\nWatchdogs=1"))
    assert "Watchdogs" in verify()
