"""Time and memory limits of a learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from device_runtime import Device
from device_runtime.install.bundle import install
from device_runtime.learning import budget
from device_runtime.learning.budget import Budget, Meter
from device_runtime.learning.guard import Limits
from ssd_edge import system
from ssd_edge.errors import GateRefusedError, InputError


class Clock:
    """Clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def device(tiny_bundle, tmp_path: Path) -> Device:
    (tmp_path / "tiny.ssdedge").write_bytes(tiny_bundle())
    install(tmp_path / "root", tmp_path / "tiny.ssdedge")
    return Device.open(tmp_path / "root")


def photos(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return list(np.clip(np.array([220, 220, 30]) + rng.normal(0, 20, (count, 8, 8, 3)), 0, 255).astype(np.uint8))


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_limits_must_be_positive_and_finite(value):
    with pytest.raises(InputError, match="above 0"):
        Budget(seconds=value)
    with pytest.raises(InputError, match="above 0"):
        Budget(mb=value)


def test_a_stage_ends_at_its_share_of_the_time_left():
    clock = Clock()
    meter = Meter(Budget(seconds=10), clock=clock)
    clock.now = 2.0
    meter.stage("trying", 0.5)
    clock.now = 5.9
    assert not meter.tick(0.5)
    assert not meter.stopped
    clock.now = 6.0  # 2 s + half of the remaining 8 s
    assert meter.tick(0.6)
    meter.stage("learning", 0.5)
    assert meter.stopped
    assert "stopped early" in meter.warnings()[0]
    clock.now = 7.9
    assert not meter.tick(0.1)


def test_a_finished_stage_is_not_reported_as_stopped():
    clock = Clock()
    meter = Meter(Budget(seconds=1), clock=clock)
    meter.stage("learning")
    clock.now = 3.0
    assert not meter.tick(1.0)
    assert not meter.stopped
    assert meter.warnings() == ["it took 3.0 s, longer than the budget of 1 s: it could not be stopped"]


def test_a_stage_that_continues_to_its_end_is_not_reported_as_stopped():
    clock = Clock()
    meter = Meter(Budget(seconds=1), clock=clock)
    meter.stage("learning")
    clock.now = 2.0
    assert meter.tick(0.9)
    assert not meter.tick(1.0)  # a closed-form learner ignores the request to stop
    assert "stopped early" not in " ".join(meter.warnings())


def test_gradient_training_stops_early(tiny_bundle, tmp_path):
    (tmp_path / "tuned.ssdedge").write_bytes(tiny_bundle(learner="finetune"))
    install(tmp_path / "root", tmp_path / "tuned.ssdedge")
    device = Device.open(tmp_path / "root")
    no_limit = Limits(max_forgetting=1)
    unlimited = device.learn("wedge", photos(10), limits=no_limit)
    device.rollback()
    limited = device.learn("wedge", photos(10), limits=no_limit, budget=Budget(seconds=1e-3))
    assert limited.measured["epochs"] == 1 < unlimited.measured["epochs"]
    assert any("stopped early" in warning for warning in limited.warnings)
    assert not any("stopped early" in warning for warning in unlimited.warnings)


def test_no_limit_never_stops():
    clock = Clock()
    meter = Meter(clock=clock)
    meter.stage("learning")
    clock.now = 1e9
    assert not meter.tick(0.01)
    assert meter.warnings() == []


def test_watcher_gets_the_remaining_time_at_a_limited_rate():
    clock, calls = Clock(), []
    meter = Meter(watcher=lambda *args: calls.append(args), clock=clock)
    meter.stage("embedding")
    meter.tick(0.0)
    clock.now = 0.1
    meter.tick(0.1)  # too soon after the previous call
    clock.now = 4.0
    meter.tick(0.25)
    meter.tick(1.0)
    assert calls == [("embedding", 0.0, None), ("embedding", 0.25, 12.0), ("embedding", 1.0, 0.0)]


def test_slow_embedding_is_refused_early():
    clock = Clock()
    meter = Meter(Budget(seconds=10), clock=clock)
    meter.stage("embedding")
    clock.now = 0.5
    meter.check_embedding(0.01)  # 50 s at this rate, but it is too early to estimate
    clock.now = 2.0
    with pytest.raises(GateRefusedError, match=r"takes about 20.0 s here, but the budget is 10 s"):
        meter.check_embedding(0.1)


def test_memory_over_the_budget_is_refused(device):
    with pytest.raises(GateRefusedError, match=r"holds \d+ MiB.*budget is 1 MiB"):
        device.learn("wedge", photos(5), budget=Budget(mb=1))
    assert device.generation.number == 1
    assert Device.open(device.store.root).generation.number == 1


def test_memory_still_needed_is_included(monkeypatch):
    monkeypatch.setattr(budget, "resident", lambda: 100 * 2**20)
    meter = Meter(Budget(mb=150))
    meter.check_memory(49 * 2**20)
    with pytest.raises(GateRefusedError, match="holds 100 MiB, and 51 more are needed"):
        meter.check_memory(51 * 2**20)


def test_result_and_history_contain_time_and_peak_memory(device):
    stages: list[str] = []
    result = device.learn("wedge", photos(5), watcher=lambda stage, share, left: stages.append(stage))
    assert result.seconds > 0
    assert result.peak_mb is None or 50 < result.peak_mb < 10_000
    assert list(dict.fromkeys(stages)) == ["embedding", "learning", "trying", "checking"]
    info = device.history().generations[-1].info
    assert (info["seconds"], info["peak_mb"]) == (result.seconds, result.peak_mb)


def test_peak_memory_is_zero_without_system_support(tmp_path):
    assert system.resident("VmHWM", tmp_path) == 0
    assert not system.reset_peak(tmp_path / "nothing")
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t  204800 kB\n")
    assert system.resident("VmHWM", tmp_path) == 200 * 2**20
