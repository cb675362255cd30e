"""Calls in a child process: what comes back, and what stops the child."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ssd_edge.errors import InputError
from ssd_edge.ort import apart
from ssd_edge.system import MIB

TESTS = Path(__file__).resolve().parents[2]


def call(name: str, memory: int = 1024 * MIB, **options: str) -> apart.Arrays:
    return apart.call(f"helpers.apart_functions:{name}", {"x": np.arange(3)}, options, 0, memory)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


def ended(pid: Path) -> bool:
    """Return True if the process that wrote its id has ended."""
    return not Path("/proc", pid.read_text()).exists()


def test_arrays_come_back_and_output_does_not_mix_with_them() -> None:
    assert call("twice")["x"].tolist() == [0, 2, 4]


def test_errors_come_back() -> None:
    with pytest.raises(InputError, match=r"^it has no end$"):
        call("refuse", what="no end")


def test_time_is_limited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(apart, "SECONDS", 2.0)
    with pytest.raises(apart.Stopped, match=r"^did not finish within 2\.00 s and was stopped$"):
        call("hang", pid=str(tmp_path / "pid"))
    assert ended(tmp_path / "pid")


def test_memory_is_limited() -> None:
    with pytest.raises(apart.Stopped, match=r"^needs more than 700 MiB of memory and was stopped$"):
        call("swell", memory=700 * MIB)


def test_a_crash_is_reported_with_the_last_output() -> None:
    with pytest.raises(apart.Stopped, match=r"^was stopped by SIGSEGV \(last output: something about a driver\)$"):
        call("crash")


def test_a_reply_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "REPLY", MIB)
    with pytest.raises(apart.Stopped, match=r"^gives more than 1 MiB and was stopped$"):
        call("babble")


def test_an_interrupt_stops_the_child_at_once(tmp_path: Path) -> None:
    pid = tmp_path / "pid"

    def interrupt() -> None:
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        call("hang", pid=str(pid))
    assert ended(pid)


def test_limit_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "usable_cores", lambda: 4)
    monkeypatch.setattr(apart, "available_memory", lambda: 8192 * MIB)
    assert apart.memory_limit() == 6144 * MIB
    assert apart.memory_limit(4096 * MIB) == 4096 * MIB
    monkeypatch.setattr(apart, "available_memory", lambda: 100 * MIB)
    assert apart.memory_limit() == 576 * MIB  # without it, no graph could be tried
