"""Two threads of one `Device`: one looks for what others have committed while the other commits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from device_runtime.device import Device
from device_runtime.install.bundle import install
from device_runtime.store.record import Generation


def test_who_has_read_before_a_commit_does_not_go_back(tmp_path: Path, tiny_bundle) -> None:
    bundle = tmp_path / "tiny.ssdedge"
    bundle.write_bytes(tiny_bundle())
    install(tmp_path / "root", bundle)
    device = Device.open(tmp_path / "root")
    has_read, may_go_on = threading.Event(), threading.Event()
    read_current = device.store.read_current

    def slow(read: Callable[[Generation], object]) -> object:
        found = read_current(read)
        if threading.current_thread() is looking:
            has_read.set()
            may_go_on.wait(30)
        return found

    device.store.read_current = slow
    looking = threading.Thread(target=device.refresh)
    writing = threading.Thread(target=device.rename, args=("nut", "bolt"))
    looking.start()
    assert has_read.wait(30)
    writing.start()
    writing.join(1.0)  # without the lock it commits now, and what was read is the generation before
    may_go_on.set()
    looking.join(30)
    writing.join(30)
    assert device.generation.number == device.store.current().number == 2
    assert "bolt" in device.classes
