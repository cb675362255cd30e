"""`ssd-edge device watch` as a process, from start to stop."""

from __future__ import annotations

import io
import itertools
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from device_runtime.device import Device
from device_runtime.install.bundle import install
from device_runtime.store.watch_state import last_report

COLOURS = {"cup": (220, 30, 30), "nut": (30, 220, 30), "wedge": (220, 220, 30)}
PATIENCE = 60  # seconds that a test waits for another process, which normally answers at once


def pixels(name: str, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng([seed, *name.encode()]).normal(0, 20, (8, 8, 3))
    return np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)


def picture(name: str, seed: int = 0, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels(name, seed)).save(out, kind, **options)
    return out.getvalue()


def put(folder: Path, name: str, data: bytes) -> None:
    (folder / f"{name}.part").write_bytes(data)
    (folder / f"{name}.part").rename(folder / name)


@pytest.fixture
def root(tiny_bundle, tmp_path: Path) -> Path:
    (tmp_path / "tiny.ssdedge").write_bytes(tiny_bundle())
    install(tmp_path / "root", tmp_path / "tiny.ssdedge")
    return tmp_path / "root"


@pytest.fixture
def camera(tmp_path: Path) -> Path:
    (tmp_path / "camera").mkdir()
    return tmp_path / "camera"


class Supervisor:
    """A socket that receives the process's messages to systemd."""

    def __init__(self, path: Path) -> None:
        self.said: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                self.said += self._socket.recv(8192).decode().split("\n")
            except OSError:
                return

    def close(self) -> None:
        self._socket.close()


class Running:
    """The running command."""

    def __init__(self, root: Path, source: str | Path, *words: str, **options: Any) -> None:
        self.supervisor = Supervisor(root.parent / "notify")
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        environment = {"NOTIFY_SOCKET": str(root.parent / "notify"), "WATCHDOG_USEC": "2000000"}
        command = [sys.executable, "-m", "ssd_edge", "device", "watch", str(source), "--root", str(root), *words]
        self.process = subprocess.Popen(command, **pipes, env={**os.environ, **environment}, **options)
        self.lines: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)

    def answer(self) -> dict[str, Any]:
        return json.loads(self.lines.get(timeout=PATIENCE))

    def wait_for(self, word: str) -> None:
        """Wait for this message, which may arrive after the process has ended."""
        for _ in range(PATIENCE * 20):
            if word in self.supervisor.said:
                return
            assert not self.process.poll(), self.process.stderr.read().decode()
            time.sleep(0.05)
        raise AssertionError(f"{word} was not said: {self.supervisor.said}")

    def stop(self, number: int) -> list[dict[str, Any]]:
        """Stop the process, check that its exit code is 0 and return its log."""
        self.process.send_signal(number)
        assert self.process.wait(PATIENCE) == 0, self.process.stderr.read().decode()
        return [json.loads(line) for line in self.process.stderr.read().splitlines()]


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(*words: Any, **options: Any) -> Running:
        started.append(Running(*words, **options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()
        one.supervisor.close()


def test_folder_service_from_start_to_stop(root: Path, camera: Path, running):
    put(camera, "old.png", picture("cup"))
    service = running(root, camera, "--every", "0.05")
    service.wait_for("READY=1")
    put(camera, "1.png", picture("nut"))
    first = service.answer()
    assert (first["image"], first["label"], first["generation"]) == (str(camera / "1.png"), "nut", 1)
    put(camera, "bad.png", b"")
    Device.open(root).learn("wedge", [pixels("wedge", seed) for seed in range(12)])
    for number in itertools.count(2):  # in use within a second
        put(camera, f"{number}.png", picture("wedge", 77))
        line = service.answer()
        if line["generation"] == 2:
            break
        assert line["label"] == "unknown"
    assert line["label"] == "wedge"
    service.wait_for("WATCHDOG=1")
    logged = service.stop(signal.SIGTERM)
    service.wait_for("STOPPING=1")
    assert "generation 2 is in use now, with 4 classes" in [line["event"] for line in logged]
    assert any(word.startswith("STATUS=") for word in service.supervisor.said)
    assert last_report(root)["images"] >= 1
    assert sorted(path.name for path in camera.iterdir())[-2:] == ["bad.png", "old.png"]


def test_stream_service_from_start_to_stop(root: Path, running):
    service = running(root, "-")
    for _ in range(3):  # one by one, because only the newest is answered
        service.process.stdin.write(picture("cup", 5, "JPEG", quality=95, subsampling=0))
        service.process.stdin.flush()
        line = service.answer()
    assert (line["frame"], line["label"], line["stable"]) == (3, "cup", "cup")
    service.stop(signal.SIGINT)  # while it waits for the next frame
