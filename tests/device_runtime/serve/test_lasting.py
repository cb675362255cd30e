"""What outlasts a service: committed generations, whenever it is killed; nothing of an image, whatever it has seen."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_photos import picture, pixels

from device_runtime.install.bundle import install
from device_runtime.serve.frame import as_jpeg
from device_runtime.store import fsck
from device_runtime.store.generations import Generations

ROOT = Path(__file__).resolve().parents[3]
NAMES = ("cup", "nut", "screw", "wedge")
SLICE = 48  # bytes of pixels that count as a piece of an image


class Service:
    """A process that serves a root.

    Args:
        root: The root.
        options: Further options of the command.
    """

    def __init__(self, root: Path, *options: str) -> None:
        command = [sys.executable, "-m", "ssd_edge", "device", "serve", "--port", "0", "--root", str(root), *options]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(root.parent), "HOME": str(root.parent / "home")}
        self.log = root.parent / "log"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
        self.address = self.process.stdout.readline().strip()
        assert self.address, self.log.read_text()

    def ask(self, path: str, body: bytes | None = None, kind: str = "application/json") -> Any:
        request = urllib.request.Request(self.address + path, body, {"Content-Type": kind} if body else {})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def send(self, path: str, images: list[bytes], **fields: str) -> Any:
        """Send a form with images."""
        mark = b"a3f1c0d2e4"
        parts = [(f'name="{name}"', value.encode()) for name, value in fields.items()]
        parts += [(f'name="image"; filename="{number}.png"', image) for number, image in enumerate(images)]
        body = b"".join(
            b"--" + mark + f"\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + value + b"\r\n"
            for head, value in parts
        )
        return self.ask(path, body + b"--" + mark + b"--\r\n", f"multipart/form-data; boundary={mark.decode()}")

    def learn(self, label: str, images: list[bytes]) -> dict[str, Any]:
        """Teach a class and wait for the end of the job."""
        return self.finished(self.send("/v1/learn", images, label=label))

    def finished(self, job: dict[str, Any]) -> dict[str, Any]:
        while job["state"] in ("waiting", "running"):
            time.sleep(0.02)
            job = self.ask(f"/v1/jobs/{job['id']}")
        return job

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        self.process.stdout.close()
        return self.process.wait(60)


@pytest.fixture
def root(tiny_bundle, tmp_path: Path) -> Path:
    (tmp_path / "tiny.ssdedge").write_bytes(tiny_bundle())
    install(tmp_path / "root", tmp_path / "tiny.ssdedge")
    (tmp_path / "tiny.ssdedge").unlink()
    return tmp_path / "root"


def pictures(name: str, seed: int, count: int = 12) -> list[bytes]:
    return [picture(name, 100 * seed + number) for number in range(count)]


@pytest.mark.parametrize("count", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_during_a_learn(root: Path, count: int) -> None:
    """After each kill the committed generation answers, whether it is the one before the learn or the one after it."""
    rng, ends = random.Random(count), Counter[str]()
    service = Service(root)
    began = time.monotonic()
    assert service.learn("wedge", pictures("wedge", 0))["state"] == "done"
    longest = time.monotonic() - began  # with PyTorch, which is loaded by the first learn of a process
    committed = 2
    for number in range(1, count + 1):
        job = service.send("/v1/learn", pictures("wedge", number), label="wedge")
        delay = rng.uniform(0, 1.2 * longest)
        answered: list[int] = []

        def predict(service: Service = service, answered: list[int] = answered) -> None:
            try:
                while True:
                    answered.append(service.send("/v1/predict", pictures("nut", 0, 1))["generation"])
            except (OSError, http.client.HTTPException):
                pass

        asking = threading.Thread(target=predict)
        asking.start()
        time.sleep(delay)
        assert service.end(signal.SIGKILL) == -signal.SIGKILL
        asking.join()

        service = Service(root)
        generation = service.ask("/v1/status")["generation"]
        assert generation in (committed, committed + 1), job
        assert set(answered) <= {committed, generation}  # nothing was answered with what is not there any more
        ends["after the commit" if generation > committed else "before it"] += 1
        found = service.send("/v1/predict", [picture("wedge", 7), picture("cup", 7)])
        assert [one["label"] for one in found["predictions"]] == ["wedge", "cup"]
        assert found["generation"] == generation
        committed = generation
    assert service.end() == 0
    print(dict(ends))
    assert sum(ends.values()) == count
    if count > 10:
        assert len(ends) == 2
    found = [one for one in fsck.check(Generations(root)) if one.severity != fsck.LEFTOVER]  # of a kill within a commit
    assert [one.problem for one in found if "a crash came before" not in one.problem] == []


def contents(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield path, path.read_bytes()


def traces(folder: Path, images: list[bytes], arrays: list[np.ndarray]) -> list[str]:
    """Return what is left of images below a folder: their files, pieces of their pixels, any picture, embeddings."""
    found = []
    for path, data in contents(folder):
        for magic in (b"\xff\xd8\xff\xe0", b"\xff\xd8\xff\xdb", b"\x89PNG\r\n", b"RIFF"):
            if magic in data:
                found.append(f"{path}: a picture")
        for image in images:
            if image[-40:] in data or image[40:80] in data:
                found.append(f"{path}: a file")
        for array in arrays:
            raw = array.tobytes()
            pieces = [raw[at : at + SLICE] for at in range(0, len(raw) - SLICE + 1, SLICE)] or [raw]
            if any(piece in data for piece in pieces):
                found.append(f"{path}: pixels or an embedding")
    return found


def test_a_day_leaves_nothing_of_an_image(root: Path, tmp_path: Path) -> None:
    """Answers, frames of a camera, a tray, captures and learns leave the sums of embeddings, and no image."""
    from device_runtime.device import Device

    camera, everything = tmp_path.parent / f"{tmp_path.name}-camera", []
    camera.mkdir()
    service = Service(root, "--camera", f"shelf={camera}", "--every", "0")
    try:
        for number in range(40):
            name = NAMES[number % 4]
            sent = [picture(name, 1000 + number), picture("cup", 2000 + number)]
            everything += sent
            service.send("/v1/predict", sent)
            frame = as_jpeg(picture(name, 3000 + number), name)
            everything.append(frame)
            (camera / f"{number}.part").write_bytes(frame)
            (camera / f"{number}.part").rename(camera / f"{number}.jpg")
        for _ in range(500):
            (feed,) = service.ask("/v1/cameras")["cameras"]
            if feed["frames"] >= 40 and service.ask("/v1/tray")["tray"]:
                break
            time.sleep(0.02)
        else:
            raise AssertionError(feed)
        taught = pictures("wedge", 5)
        everything += taught
        capture = service.ask("/v1/captures", json.dumps({"label": "cheese"}).encode())
        service.send(f"/v1/captures/{capture['id']}/images", taught)
        job = service.finished(service.ask(f"/v1/captures/{capture['id']}/learn", b"{}"))
        assert job["state"] == "done", job
        again = pictures("wedge", 6)
        everything += again
        assert service.learn("cheese", again)["state"] == "done"
        left = service.ask("/v1/captures", json.dumps({"label": "dropped"}).encode())
        service.send(f"/v1/captures/{left['id']}/images", taught[:3])
        during = traces(tmp_path, everything, [])
    finally:
        code = service.end()
    assert code == 0, service.log.read_text()
    shutil.rmtree(camera)
    with Device.open(root) as device:
        images = [pixels(NAMES[number % 4], 1000 + number) for number in range(40)]
        images += [pixels("wedge", 100 * seed + number) for seed in (5, 6) for number in range(12)]
        arrays = [*images, *device.embed(images).numpy()]
    assert during == []
    assert traces(tmp_path, everything, arrays) == []


def test_traces_are_found(tmp_path: Path) -> None:
    """The scan above would see each kind of trace."""
    image, array = picture("cup", 1), pixels("cup", 1)
    for name, data in {"file": b"x" + image, "piece": image[30:90], "pixels": b"abc" + array.tobytes()}.items():
        (tmp_path / name).write_bytes(data)
        assert traces(tmp_path, [image], [array]), name
        (tmp_path / name).unlink()
    embedding = np.random.default_rng(0).standard_normal(6).astype(np.float32)
    (tmp_path / "embedding").write_bytes(b"ab" + embedding.tobytes())
    assert traces(tmp_path, [], [embedding])
