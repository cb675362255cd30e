"""Frames of a camera, a network stream or a video file, which ffmpeg decodes and a pipe brings."""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import IO
from urllib.parse import urlsplit

from device_runtime.service.frames import RateLimitedWarning, mjpeg
from ssd_edge.errors import EnvironmentUnfitError

log = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds before a camera that was lost is opened again
SHOWN = 300  # characters of what ffmpeg said
_OPTIONS = {"rtsp": ("-rtsp_transport", "tcp"), "rtsps": ("-rtsp_transport", "tcp")}  # UDP loses parts of frames


def is_camera(source: str) -> bool:
    """Return True for a camera device such as ``/dev/video0`` or a URL such as ``rtsp://…``."""
    return bool(re.match(r"/dev/video\d+$|[a-z][a-z0-9+.-]*://", source, re.IGNORECASE))


def command(source: str) -> list[str]:
    """Return the command that writes the frames of a camera as JPEGs to its standard output."""
    kind = ("-f", "v4l2") if source.startswith("/dev/") else _OPTIONS.get(urlsplit(source).scheme.lower(), ())
    return ["ffmpeg", "-nostdin", "-loglevel", "error", *kind, "-i", source, "-an", "-q:v", "3", "-f", "mjpeg", "-"]


def shown(text: str) -> str:
    """Return text with the passwords of its URLs hidden."""
    return re.sub(r"(://[^/\s:@]*):[^/\s@]*@", r"\1:…@", text)


class Camera:
    """A camera that is opened again whenever its stream ends; a URL of a file ends once.

    Args:
        source: What `is_camera` accepts.
        sleep: Waits for some seconds.

    Attributes:
        name: The source, without a password.

    Raises:
        EnvironmentUnfitError: ffmpeg is not installed.
    """

    def __init__(self, source: str, sleep: Callable[[float], object] = time.sleep) -> None:
        self.name, self._command, self._sleep = shown(source), command(source), sleep
        self._live = urlsplit(source).scheme.lower() != "file"
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        if shutil.which(self._command[0]) is None:
            raise EnvironmentUnfitError(
                f"{self.name} is read with ffmpeg, which is not installed; install it, e.g. apt install ffmpeg, or "
                "write JPEGs to the standard input of: ssd-edge device watch -"
            )
        log.info("runs %s", shown(shlex.join(self._command)), extra={"code": "camera"})

    def frames(self) -> Iterator[bytes]:
        """Yield the bytes of one JPEG after another, until `close` is called."""
        wait, lost = FIRST_WAIT, RateLimitedWarning()
        while not self._closed:
            with subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
                self._process = process
                assert process.stdout is not None
                assert process.stderr is not None
                for frame in mjpeg(process.stdout):  # type: ignore[arg-type]  # it is a BufferedReader
                    wait = FIRST_WAIT
                    yield frame
                said = _last_line(process.stderr)
            if self._closed or not self._live:
                if process.returncode and not self._closed:
                    log.warning("%s cannot be read: %s", self.name, said, extra={"code": "camera_lost"})
                return
            lost.warn(f"{self.name} is gone ({said}); trying again", "camera_lost")
            self._sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def close(self) -> None:
        """End ffmpeg."""
        self._closed = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()


def _last_line(stream: IO[bytes]) -> str:
    lines = stream.read().decode(errors="replace").strip().splitlines()
    return shown(lines[-1][:SHOWN]) if lines else "ffmpeg ended without a message"
