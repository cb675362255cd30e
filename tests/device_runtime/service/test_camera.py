"""Cameras: what ffmpeg is asked, what happens when it ends, and a video that the real one decodes."""

from __future__ import annotations

import io
import json
import logging
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from device_runtime.service import camera as module
from device_runtime.service import logs
from device_runtime.service.camera import Camera, command, is_camera, shown
from ssd_edge.errors import EnvironmentUnfitError, InputError

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
        ("/srv/camera", False), ("/dev/video", False), ("folder", False), ("C:/photos", False), ("gst:v4l2src", True),
    ],
)  # fmt: skip
def test_what_is_a_camera(source: str, camera: bool) -> None:
    assert is_camera(source) == camera


def test_the_command_fits_the_source() -> None:
    assert command("/dev/video2")[:7] == ["ffmpeg", "-nostdin", "-loglevel", "error", "-f", "v4l2", "-i"]
    assert "-rtsp_transport tcp -i rtsp://h/1 " in " ".join(command("rtsp://h/1"))
    assert "rtsp" not in " ".join(command("http://h/1"))
    assert " -re -stream_loop -1 -i file:a: b.mp4 " in " ".join(command("a: b.mp4", looped=True))
    assert command("gst:v4l2src device='/dev/my camera' ! jpegenc") == [
        "gst-launch-1.0", "-q", "v4l2src", "device=/dev/my camera", "!", "jpegenc", "!", "fdsink", "fd=1",
    ]  # fmt: skip


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
    assert line["event"] == "rtsp://me:…@there/1 is gone (it ended without a message); trying again"


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Put a shell script in place of ffmpeg."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "ffmpeg").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin" / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")


def test_a_camera_that_complains_all_the_time_is_not_blocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "frame").write_bytes(jpeg(10))
    lines = "seq -f 'error while decoding MB %.0f' 20000 >&2"  # 600 KB, more than a pipe holds
    stand_in(monkeypatch, tmp_path, f"{lines}; cat {tmp_path / 'frame'}; {lines}; exit 1")
    lost: list[str] = []
    camera = Camera("rtsp://there/1", lambda seconds: camera.close(), lost=lost.append)
    assert list(camera.frames()) == [jpeg(10)]
    assert lost == ["error while decoding MB 20000"]


def test_a_camera_from_which_nothing_comes_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    (tmp_path / "frame").write_bytes(jpeg(10))
    stand_in(monkeypatch, tmp_path, f"cat {tmp_path / 'frame'}; exec sleep 60")
    lost: list[str] = []
    camera = Camera("rtsp://there/1", lambda seconds: None, lost=lost.append)
    frames = camera.frames()
    assert [next(frames), next(frames)] == [jpeg(10)] * 2
    assert lost == ["nothing came from it for 0.3 seconds"]
    camera.close()
    assert list(frames) == []


def test_a_pipeline_with_an_open_quote_is_refused() -> None:
    with pytest.raises(InputError, match=r"is no pipeline \(No closing quotation\); close its quotes"):
        Camera("gst:v4l2src device='/dev/video0 ! jpegenc")


def test_without_ffmpeg_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentUnfitError, match=r"ffmpeg, which is not installed; install it, e\.g\. apt install"):
        Camera("/dev/video0")
    with pytest.raises(EnvironmentUnfitError, match=r"gst-launch-1\.0, which .* apt install gstreamer1\.0-tools"):
        Camera("gst:v4l2src ! jpegenc")


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


@pytest.mark.skipif(shutil.which("gst-launch-1.0") is None, reason="GStreamer is not installed")
def test_the_frames_of_a_pipeline() -> None:
    camera = Camera("gst:videotestsrc num-buffers=2 ! video/x-raw,width=64,height=48 ! jpegenc", lambda wait: None)
    frames = camera.frames()
    found = [np.asarray(Image.open(io.BytesIO(next(frames)))) for _ in range(3)]  # the third: it was opened again
    camera.close()
    assert [frame.shape for frame in found] == [(48, 64, 3)] * 3


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_a_looped_video_goes_on(tmp_path: Path) -> None:
    video = tmp_path / "50% of: a loop.mp4"
    made = ["ffmpeg", "-loglevel", "error", "-f", "lavfi", "-i", "testsrc=s=64x48:d=0.4:r=10", f"file:{video}"]
    subprocess.run(made, check=True)
    camera = Camera(str(video), looped=True)
    frames = camera.frames()
    begun = time.monotonic()
    found = [next(frames) for _ in range(9)]
    camera.close()
    assert found[0] == found[4] == found[8] != found[1]
    assert time.monotonic() - begun > 0.5  # at its own speed
