"""Cameras of the service: real videos, folders, and stand-ins that fail, vanish and come back."""

from __future__ import annotations

import io
import json
import logging
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_photos import COLOURS, picture, pixels
from helpers.waiting import PATIENCE, until
from PIL import Image

from device_runtime.device import Device
from device_runtime.serve import cameras as module
from device_runtime.serve.cameras import CameraFeed, Cameras
from device_runtime.serve.events import Events
from device_runtime.serve.frame import Frame, as_jpeg
from device_runtime.serve.tray import Tray
from device_runtime.service import camera, drift, logs
from device_runtime.store.watch_state import last_report
from ssd_edge.cli import run
from ssd_edge.errors import InputError

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")


def jpeg(name: str, seed: int = 0) -> bytes:
    return as_jpeg(picture(name, seed), name)


class Service:
    """Running cameras, and the events that they have published."""

    def __init__(self, device: Device, sources: list[str], every: float) -> None:
        self.device, self.events, self.seen = device, Events(), []
        self.tray = Tray()
        self.subscription = self.events.subscribe(100_000)
        self.cameras = Cameras(device, sources, self.events, self.tray, every)
        self.cameras.start()

    def all(self, kind: str) -> list[dict[str, Any]]:
        while (event := self.subscription.get(0)) is not None:
            self.seen.append(event)
        return [dict(event.fields) for event in self.seen if event.kind == kind]

    def wait(self, kind: str, true: Callable[[list[dict[str, Any]]], Any]) -> Any:
        return until(lambda: true(self.all(kind)))


Serve = Callable[..., Service]


@pytest.fixture
def serve(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Return a function that starts cameras."""
    monkeypatch.setattr(drift, "SAMPLES", 2000)
    started: list[Service] = []

    def start(*sources: str | Path, every: float = 0.01, device: Device | None = None) -> Service:
        started.append(Service(device or Device.open(root), [str(source) for source in sources], every))
        return started[-1]

    yield start
    for service in started:
        service.cameras.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "camera").mkdir()
    return tmp_path / "camera"


def put(folder: Path, name: str, data: bytes) -> None:
    (folder / f"{name}.part").write_bytes(data)
    (folder / f"{name}.part").rename(folder / name)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that puts a script in place of ffmpeg; in it, $1 is the first word of the source."""
    monkeypatch.setattr(camera, "FIRST_WAIT", 0.05)

    def put(script: str, **frames: bytes) -> Path:
        (tmp_path / "bin").mkdir(exist_ok=True)
        for name, data in frames.items():
            (tmp_path / name).write_bytes(data)
        text = f'#!/bin/sh\ncd {tmp_path}\nwhile [ "$1" != -i ]; do shift; done; shift\n{script}\n'
        (tmp_path / "bin" / "ffmpeg").write_text(text)
        (tmp_path / "bin" / "ffmpeg").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        return tmp_path

    return put


def video(path: Path, *names: str) -> Path:
    """Write a video of classes, half a second each."""
    colours = (f"color=#{bytes(COLOURS[name]).hex()}:s=64x48:d=0.5:r=20[{name}]" for name in names)
    graph = f"{';'.join(colours)};{''.join(f'[{name}]' for name in names)}concat=n={len(names)}"
    made = ["ffmpeg", "-loglevel", "error", "-f", "lavfi", "-i", graph, "-c:v", "mjpeg", "-q:v", "2", str(path)]
    subprocess.run(made, check=True)
    return path


@needs_ffmpeg
def test_a_network_camera_that_is_switched_off_and_on(serve: Serve, tmp_path: Path, monkeypatch) -> None:
    """The real ffmpeg reads what another one sends over HTTP, as network cameras do."""
    monkeypatch.setattr(camera, "FIRST_WAIT", 0.2)
    shop = video(tmp_path / "shop.mkv", "cup")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/mjpeg"
    service = serve(url)
    service.wait("camera", lambda found: found and found[0]["state"] == "lost" and "refused" in found[0]["problem"])
    send = [
        "ffmpeg",
        "-loglevel",
        "quiet",
        "-re",
        "-stream_loop",
        "-1",
        "-i",
        shop,
        "-f",
        "mpjpeg",
        "-listen",
        "1",
        url,
    ]
    for _ in range(2):
        with subprocess.Popen(send) as sender:
            service.wait("camera", lambda found: found[-1]["state"] == "running")
            answered = len(service.all("answer"))
            until(lambda more=answered + 2: service.all("answer")[more:])
            sender.kill()
        service.wait("camera", lambda found: found[-1]["state"] == "lost")
    assert {answer["label"] for answer in service.all("answer")} == {"cup"}


@needs_ffmpeg
def test_a_video_is_played_again_and_again(serve: Serve, tmp_path: Path) -> None:
    service = serve(f"door={video(tmp_path / 'shop.mkv', 'cup', 'nut')}")
    answers = service.wait("answer", lambda found: found if found and found[-1]["frame"] > 45 else None)
    stable = [answer["stable"] for answer in answers if answer["stable"]]
    changes = [one for number, one in enumerate(stable) if number == 0 or stable[number - 1] != one]
    assert changes[:4] == ["cup", "nut", "cup", "nut"]
    assert answers[5].keys() == {
        "camera", "frame", "label", "nearest", "score", "stable", "generation", "latency_ms",
    }  # fmt: skip
    assert 0 < answers[5]["latency_ms"] < 1000 * PATIENCE
    (feed,) = service.cameras.list()
    assert service.cameras.get("door") is feed
    told = feed.to_dict()
    assert (told["id"], told["source"], told["state"], told["problem"]) == (
        "door",
        str(tmp_path / "shop.mkv"),
        "running",
        "",
    )
    assert told["frames"] >= 45
    assert 5 < told["fps"] < 60
    assert told["answer"]["camera"] == "door"
    assert service.all("camera") == [{"id": "door", "state": "running", "problem": ""}]
    recent = feed.recent(3)
    assert [frame.camera for frame in recent] == ["door"] * 3
    assert recent[0].number < recent[1].number < recent[2].number <= feed.newest().number
    assert recent[0].jpeg.startswith(b"\xff\xd8")


def test_a_camera_that_is_not_there_and_one_that_vanishes(serve: Serve, stand_in, caplog) -> None:
    caplog.set_level(logging.INFO)
    stand_in(
        "echo run >> calls; n=$(wc -l < calls)\n"
        '[ $n = 1 ] && { echo "rtsp://me:secret@h: No route to host" >&2; exit 1; }\n'
        "for i in 1 2 3; do cat cup; sleep 0.02; done; [ $n = 2 ] && exit 1; exec sleep 60",
        cup=jpeg("cup"),
    )
    service = serve("rtsp://me:secret@h/1")
    states = service.wait("camera", lambda found: found if len(found) == 4 else None)
    assert states == [
        {"id": "1", "state": "lost", "problem": "rtsp://me:…@h: No route to host"},
        {"id": "1", "state": "running", "problem": ""},
        {"id": "1", "state": "lost", "problem": "it ended without a message"},
        {"id": "1", "state": "running", "problem": ""},
    ]
    service.wait("answer", lambda found: [one["frame"] for one in found][-1:] == [6])
    assert "secret" not in caplog.text + str(service.cameras.list()[0].to_dict())


def test_every_image_of_a_folder_is_answered(serve: Serve, folder: Path) -> None:
    put(folder, "old.png", picture("screw"))
    service = serve(folder, every=5.0)
    until(service.cameras.drift)  # what comes before is answered, but not counted
    service.wait("camera", lambda found: found[-1:] == [{"id": "1", "state": "running", "problem": ""}])
    for number, name in enumerate(("cup", "nut", "cup", "nut")):
        put(folder, f"{number}.png", picture(name))
    answers = service.wait("answer", lambda found: found if len(found) == 4 else None)
    assert [(one["label"], one["stable"]) for one in answers] == [(name, name) for name in ("cup", "nut") * 2]
    service.cameras.close()
    told = last_report(service.device.store.root)
    assert (told["named"], told["images"]) == (4, 4)


def test_a_folder_that_is_lost_and_comes_back(serve: Serve, folder: Path) -> None:
    service = serve(folder)
    folder.rename(folder.with_name("away"))
    service.wait(
        "camera", lambda found: found[-1:] == [{"id": "1", "state": "lost", "problem": "No such file or directory"}]
    )
    folder.with_name("away").rename(folder)
    put(folder, "1.png", picture("cup"))
    service.wait("answer", len)
    assert service.cameras.list()[0].state == "running"


def test_cameras_take_turns(serve: Serve, stand_in, monkeypatch) -> None:
    stand_in("while :; do cat cup; sleep 0.001; done", cup=jpeg("cup"))
    observe = Device.observe

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(0.01)
        return observe(*args, **options)

    monkeypatch.setattr(Device, "observe", slow)
    service = serve("fast=rtsp://a", "other=rtsp://b", "third=rtsp://c", every=0.0)
    answers = service.wait("answer", lambda found: found if len(found) > 90 else None)[30:]
    counts = [sum(answer["camera"] == name for answer in answers) for name in ("fast", "other", "third")]
    assert min(counts) > 15, counts
    assert answers[-1]["frame"] > len(answers) / 3  # the newest, not the next


def test_answers_are_not_more_frequent_than_asked_for(serve: Serve, stand_in) -> None:
    stand_in("while :; do cat cup; sleep 0.005; done", cup=jpeg("cup"))
    service = serve("rtsp://a", every=0.1)
    service.wait("answer", len)
    begun, before = time.monotonic(), len(service.all("answer"))
    time.sleep(0.5)
    count = len(service.all("answer")) - before
    assert 2 <= count <= 1 + (time.monotonic() - begun) / 0.1
    assert service.cameras.list()[0].newest().number > 2 * count


def test_whoever_listens_gets_frames_also_without_a_class(serve: Serve, empty: Path, stand_in, caplog) -> None:
    stand_in("while :; do cat cup; sleep 0.01; done", cup=jpeg("cup"))
    service = serve("rtsp://a", device=Device.open(empty))
    heard: list[tuple[Frame, np.ndarray, np.ndarray]] = []
    (feed,) = service.cameras.list()
    feed.listen(lambda *frame: 1 / 0)
    stop = feed.listen(lambda *frame: heard.append(frame))
    frame, seen, embedding = until(lambda: heard[2:])[0]
    stop()
    assert frame.jpeg == jpeg("cup")
    assert (seen.shape, embedding.shape) == ((8, 8, 3), (6,))
    answer = service.all("answer")[-1]
    assert [answer[key] for key in ("label", "nearest", "score", "stable", "generation")] == [None, None, None, None, 1]
    count = len(heard)
    service.wait("answer", lambda found: found[-1]["frame"] > frame.number + 10)
    assert len(heard) <= count + 1
    assert "a listener to camera 1 failed" in caplog.text


def test_a_generation_of_another_thread_answers_the_next_frame(serve: Serve, stand_in, monkeypatch) -> None:
    monkeypatch.setattr(module, "LOOK", 0.05)
    stand_in("while :; do cat wedge; sleep 0.01; done", wedge=jpeg("wedge"))
    service = serve("rtsp://a")
    service.wait("answer", lambda found: found and found[-1]["stable"] == "unknown")
    until(lambda: service.tray.list())
    service.device.learn("wedge", [pixels("wedge", seed) for seed in range(12)])
    answer = service.wait("answer", lambda found: found[-1] if found[-1]["stable"] == "wedge" else None)
    assert answer["generation"] == 2
    until(lambda: service.cameras.drift() is not None and service.cameras._counts._number == 2)


def test_damaged_frames_and_failures_do_not_end_a_camera(serve: Serve, stand_in, monkeypatch, caplog) -> None:
    broken = b"\xff\xd8\xff\xda\x00\x02-\xff\xd9"
    stand_in("while :; do cat bad; sleep 0.01; cat cup; sleep 0.01; done", bad=broken, cup=jpeg("cup"))
    observe, calls = Device.observe, []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(0)
        if len(calls) == 2:
            raise ZeroDivisionError("a bug")
        return observe(*args, **options)

    monkeypatch.setattr(Device, "observe", failing)
    service = serve("rtsp://a")
    service.wait("answer", lambda found: len(found) > 5)
    assert "frame 1 of camera 1 is" in caplog.text
    assert "has no answer: ZeroDivisionError: a bug" in caplog.text
    assert caplog.text.count("Traceback") == 1


@pytest.mark.parametrize(
    ("sources", "problem"),
    [
        (["a=rtsp://x", "a=rtsp://y"], "two cameras have the name 'a'; name them --camera NAME=SOURCE"),
        (["rtsp://x", "1=rtsp://y"], "two cameras have the name '1'"),
        (["nowhere.mp4"], "the camera 'nowhere.mp4' is no URL, folder or video; check the path"),
        (["{folder}/1.png"], "1.png is one image, but a camera needs a video or a folder; name its folder"),
    ],
)
def test_what_is_no_camera_is_refused(sources: list[str], problem: str, root: Path, folder: Path, stand_in) -> None:
    stand_in("exec sleep 60")
    put(folder, "1.png", picture("cup"))
    named = [source.format(folder=folder) for source in sources]
    with pytest.raises(InputError, match=problem):
        Cameras(Device.open(root), named, Events(), Tray())


def test_recent_frames_are_bounded(stand_in) -> None:
    stand_in("exec sleep 60")
    feed = CameraFeed("1", "rtsp://a", threading.Condition(), lambda feed: None, 0.0)
    for number in range(100):
        feed.answered(Frame("1", number, 0.0, bytes(1000)), {"latency_ms": 1.0})
    assert [frame.number for frame in feed.recent(1000)] == list(range(36, 100))
    for number in range(100, 150):
        feed.answered(Frame("1", number, 0.0, bytes(2**20)), {"latency_ms": 1.0})
    assert [frame.number for frame in feed.recent(1000)] == list(range(118, 150))
    assert feed.recent(0) == []


def test_without_a_camera_the_thread_waits_and_ends(serve: Serve) -> None:
    service = serve()
    until(lambda: service.cameras.drift() is not None)
    assert not service.cameras.hangs(0.0)
    begun = time.monotonic()
    service.cameras.close()
    assert time.monotonic() - begun < 5
    assert not any(thread.is_alive() for thread in service.cameras._threads)


def test_the_command_serves_cameras(root: Path, folder: Path, tmp_path: Path) -> None:
    verb = ["device", "serve", "--root", str(root), "--port", "0", "--camera", f"shelf={folder}"]
    with subprocess.Popen([sys.executable, "-m", "ssd_edge", *verb], stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().strip()
        put(folder, "1.png", picture("nut"))

        def answered() -> Any:
            with urllib.request.urlopen(f"{address}/v1/cameras") as answer:
                (told,) = json.load(answer)["cameras"]
            return told if told["answer"] else None

        told = until(answered)
        with urllib.request.urlopen(f"{address}/v1/cameras/shelf/frame.jpg") as answer:
            assert answer.headers["content-type"] == "image/jpeg"
            assert answer.read() == jpeg("nut")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    assert (told["id"], told["state"], told["answer"]["label"], told["answer"]["stable"]) == (
        "shelf", "running", "nut", "nut",
    )  # fmt: skip
    assert last_report(root)["named"] == 1


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--camera", "nowhere"], "the camera 'nowhere' is no URL, folder or video; check the path"),
        (["--mqtt-commands"], "--mqtt-commands need --mqtt; name the broker"),
        (["--mqtt", "mqtt://me:secret@h"], "every user of this machine can read a password in --mqtt"),
    ],
)
def test_the_command_refuses_what_it_cannot_use(
    words: list[str], problem: str, root: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(logs, "log_json", lambda: None)  # it would outlast the test, with the captured standard error
    monkeypatch.setattr(sys, "argv", ["ssd-edge", "device", "serve", "--root", str(root), "--port", "0", *words])
    assert run() == 2
    said = capsys.readouterr().err
    assert problem in " ".join(said.split())
    assert "secret" not in said


@pytest.mark.slow
def test_memory_is_flat(serve: Serve, stand_in) -> None:
    """Two cameras with thousands of different frames in doubt, 100 KB each: rings and tray are full after seconds."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 150, 200, 3), np.uint8)
    frames = {f"frame{number}": as_jpeg(png(one), "a") for number, one in enumerate(noise)}
    stand_in("while :; do for f in frame*; do cat $f; sleep 0.002; done; done", **frames)
    service = serve("rtsp://a", "rtsp://b", every=0.0)
    used: list[int] = []
    for _ in range(8):
        time.sleep(5)
        service.all("answer")
        service.seen.clear()
        used.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20)
    assert service.cameras.list()[0].to_dict()["frames"] > 1000
    assert used[-1] - used[2] < 10, used


def png(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()
