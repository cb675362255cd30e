"""Cameras: what ffmpeg is asked, what happens when it ends, and a video that the real one decodes."""

from __future__ import annotations

import io
import json
import logging
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from device_runtime.service import logs
from device_runtime.service.camera import Camera, command, is_camera, shown
from ssd_edge.errors import EnvironmentUnfitError

FAKE = """#!/bin/sh
echo run >> {log}
[ $(wc -l < {log}) = 2 ] && {{ echo "rtsp://me:secret@there: Connection refused" >&2; exit 1; }}
cat {frames}
"""


def jpeg(grey: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), grey, np.uint8)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command in place of ffmpeg that writes two frames; its second call fails. Returns the list of its calls."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    (tmp_path / "frames").write_bytes(jpeg(10) + jpeg(200))
    (folder / "ffmpeg").write_text(FAKE.format(log=calls, frames=tmp_path / "frames"))
    (folder / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return calls


@pytest.mark.parametrize(
    ("source", "camera"),
    [
        ("/dev/video0", True), ("rtsp://h/1", True), ("RTSP://h", True), ("http://h/mjpg", True), ("-", False),
        ("/srv/camera", False), ("/dev/video", False), ("folder", False), ("C:/photos", False),
    ],
)  # fmt: skip
def test_what_is_a_camera(source: str, camera: bool) -> None:
    assert is_camera(source) == camera


def test_the_command_fits_the_source() -> None:
    assert command("/dev/video2")[:7] == ["ffmpeg", "-nostdin", "-loglevel", "error", "-f", "v4l2", "-i"]
    assert "-rtsp_transport tcp -i rtsp://h/1 " in " ".join(command("rtsp://h/1"))
    assert "rtsp" not in " ".join(command("http://h/1"))


def test_passwords_are_not_shown() -> None:
    assert shown("rtsp://me:pa:ss@there:554/1 http://a/b") == "rtsp://me:…@there:554/1 http://a/b"


def test_a_lost_camera_is_opened_again(ffmpeg: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    waits: list[float] = []
    camera = Camera("rtsp://me:secret@there/1", waits.append)
    found = []
    for frame in camera.frames():
        found.append(frame)
        if len(found) == 4:
            camera.close()
    assert found == [jpeg(10), jpeg(200)] * 2
    assert len(ffmpeg.read_text().splitlines()) == 3
    assert waits == [1.0, 2.0]  # longer after a failure than after a stream that ended
    assert [record.code for record in caplog.records] == ["camera", "camera_lost"]  # at most one warning a minute
    assert "runs ffmpeg -nostdin" in caplog.text
    assert "secret" not in caplog.text
    line = json.loads(logs.JsonLines().format(caplog.records[1]))
    assert line["code"] == "camera_lost"
    assert line["event"] == "rtsp://me:…@there/1 is gone (ffmpeg ended without a message); trying again"


def test_without_ffmpeg_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentUnfitError, match=r"ffmpeg, which is not installed; install it, e\.g\. apt install"):
        Camera("/dev/video0")


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_the_frames_of_a_video(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    video = tmp_path / "two colours.mkv"
    colours = "color=red:s=64x48:d=0.4:r=5[a];color=blue:s=64x48:d=0.4:r=5[b];[a][b]concat"
    made = ["ffmpeg", "-loglevel", "error", "-f", "lavfi", "-i", colours, "-c:v", "mjpeg", "-q:v", "2", str(video)]
    subprocess.run(made, check=True)
    frames = [np.asarray(Image.open(io.BytesIO(frame))) for frame in Camera(f"file://{video}").frames()]
    assert [frame.shape for frame in frames] == [(48, 64, 3)] * 4
    means = [frame.mean((0, 1)) for frame in frames]
    assert all(mean[0] > 200 > 60 > mean[2] for mean in means[:2])
    assert all(mean[2] > 200 > 60 > mean[0] for mean in means[2:])
    assert list(Camera(f"file://{tmp_path / 'none.mkv'}").frames()) == []  # a file does not come back
    assert "No such file" in caplog.text
