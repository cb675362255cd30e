"""Two threads of one `Device`: one refreshes while the other commits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from device_runtime.device import Device
from device_runtime.install.bundle import install
from device_runtime.store.record import Generation


def test_refresh_does_not_overwrite_a_newer_commit(tmp_path: Path, tiny_bundle) -> None:
    bundle = tmp_path / "tiny.ssdedge"
    bundle.write_bytes(tiny_bundle())
    install(tmp_path / "root", bundle)
    device = Device.open(tmp_path / "root")
    has_read, may_continue = threading.Event(), threading.Event()
    read_current = device.store.read_current

    def slow_read(read: Callable[[Generation], object]) -> object:
        result = read_current(read)
        if threading.current_thread() is refreshing:
            has_read.set()
            may_continue.wait(30)
        return result

    device.store.read_current = slow_read
    refreshing = threading.Thread(target=device.refresh)
    writing = threading.Thread(target=device.rename, args=("nut", "bolt"))
    refreshing.start()
    assert has_read.wait(30)
    writing.start()
    writing.join(1.0)  # without the lock it would commit now, and the refresh would restore the previous generation
    may_continue.set()
    refreshing.join(30)
    writing.join(30)
    assert device.generation.number == device.store.current().number == 2
    assert "bolt" in device.classes
