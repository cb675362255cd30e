"""Frames of a camera, a network stream or a video file, which ffmpeg or GStreamer decodes and a pipe brings."""

from __future__ import annotations

import contextlib
import logging
import re
import select
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO
from urllib.parse import urlsplit

from device_runtime.service.frames import RateLimitedWarning, mjpeg
from ssd_edge.errors import EnvironmentUnfitError, InputError, printable, system_problem

log = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds before a camera that was lost is opened again
PATIENCE = 20.0  # seconds without a byte after which a camera counts as lost: a cable was pulled, a driver hangs
ENDING = 2.0  # seconds that the command gets to end once it has closed its output
SHOWN = 300  # characters of what the command said
KEPT = 4096  # bytes of it in memory
GSTREAMER = "gst:"
_OPTIONS = {"rtsp": ("-rtsp_transport", "tcp"), "rtsps": ("-rtsp_transport", "tcp")}  # UDP loses parts of frames
_PACKAGES = {
    "ffmpeg": "ffmpeg",
    "gst-launch-1.0": "gstreamer1.0-tools gstreamer1.0-plugins-good",
}


def is_camera(source: str) -> bool:
    """Return True for a camera device such as ``/dev/video0``, a URL such as ``rtsp://…``, or ``gst:PIPELINE``."""
    return bool(re.match(r"/dev/video\d+$|[a-z][a-z0-9+.-]*://|gst:", source, re.IGNORECASE))


def command(source: str, looped: bool = False) -> list[str]:
    """Return the command that writes the frames of a camera as JPEGs to its standard output.

    Args:
        source: What `is_camera` accepts, or the path of a video. A pipeline of GStreamer gives JPEGs, e.g.
            ``gst:v4l2src ! videoconvert ! jpegenc``.
        looped: Play a video at its own speed, and again when it ends.

    Raises:
        ValueError: The quotes of a pipeline do not match.
    """
    if source.startswith(GSTREAMER):
        return ["gst-launch-1.0", "-q", *shlex.split(source.removeprefix(GSTREAMER)), "!", "fdsink", "fd=1"]
    kind = ("-f", "v4l2") if source.startswith("/dev/") else _OPTIONS.get(urlsplit(source).scheme.lower(), ())
    if not is_camera(source):
        source = f"file:{source}"  # whatever colons are in its name
    play = ("-re", "-stream_loop", "-1") if looped else ()
    return [
        "ffmpeg",
        "-nostdin",
        "-loglevel",
        "error",
        *kind,
        *play,
        "-i",
        source,
        "-an",
        "-q:v",
        "3",
        "-f",
        "mjpeg",
        "-",
    ]


def shown(text: str) -> str:
    """Return text with the passwords of its URLs hidden."""
    return re.sub(r"(://[^/\s:@]*):[^/\s@]*@", r"\1:…@", text)


class Camera:
    """A camera that is opened again whenever its stream ends or nothing comes from it; a URL of a file ends once.

    Args:
        source: See `command`.
        sleep: Waits for some seconds.
        looped: See `command`.
        lost: Called with the reason each time that the camera is lost.

    Attributes:
        name: The source, without a password.

    Raises:
        EnvironmentUnfitError: ffmpeg or GStreamer is not installed.
        InputError: The quotes of a pipeline do not match.
    """

    def __init__(
        self,
        source: str,
        sleep: Callable[[float], object] = time.sleep,
        looped: bool = False,
        lost: Callable[[str], object] = lambda problem: None,
    ) -> None:
        self.name, self._sleep, self._lost = shown(source), sleep, lost
        try:
            self._command = command(source, looped)
        except ValueError as error:
            raise InputError(f"'{self.name}' is no pipeline ({error}); close its quotes") from error
        self._live = urlsplit(source).scheme.lower() != "file"
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        program = self._command[0]
        if shutil.which(program) is None:
            raise EnvironmentUnfitError(
                f"{self.name} is read with {program}, which is not installed; install it, e.g. apt install "
                f"{_PACKAGES[program]}, or write JPEGs to the standard input of: ssd-edge device watch -"
            )
        log.info("runs %s", shown(shlex.join(self._command)), extra={"code": "camera"})

    def frames(self) -> Iterator[bytes]:
        """Yield the bytes of one JPEG after another, until `close` is called."""
        wait, warning = FIRST_WAIT, RateLimitedWarning()
        while not self._closed:
            code, said = 0, ""
            try:
                # unbuffered: what `_Pipe` waits for must not be in a buffer already
                with subprocess.Popen(
                    self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
                ) as process:
                    self._process = process
                    if self._closed:  # meanwhile
                        process.terminate()
                    pipe, last_words = _Pipe(process, PATIENCE), _LastWords(process)
                    for frame in mjpeg(pipe):  # type: ignore[arg-type]  # it can be read, which is all that is needed
                        wait = FIRST_WAIT
                        yield frame
                    code, said = _end(process), pipe.problem or last_words.line()
            except OSError as error:  # it could not be started
                code, said = 1, f"{self._command[0]} cannot be started: {system_problem(error)}"
            if self._closed or not self._live:
                if code and not self._closed:
                    log.warning("%s cannot be read: %s", self.name, said, extra={"code": "camera_lost"})
                return
            warning.warn(f"{self.name} is gone ({said}); trying again", "camera_lost")
            self._lost(said)
            self._sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def close(self) -> None:
        """End the command."""
        self._closed = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()


class _Pipe:
    """Standard output of a process, which is killed if nothing comes for `patience` seconds."""

    def __init__(self, process: subprocess.Popen[bytes], patience: float) -> None:
        assert process.stdout is not None
        self._process, self._stream, self._patience = process, process.stdout, patience
        self._poll = select.poll()
        self._poll.register(self._stream, select.POLLIN)
        self.problem = ""

    def read(self, size: int) -> bytes:
        if not self._poll.poll(self._patience * 1000):
            self.problem = f"nothing came from it for {self._patience:g} seconds"
            self._process.kill()
            return b""
        return self._stream.read(size)


class _LastWords:
    """Last lines of a process's standard error, which is read all the time: a full pipe would block it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        self._kept = b""
        self._thread = threading.Thread(target=self._read, args=(process.stderr,), name="last words", daemon=True)
        self._thread.start()

    def _read(self, stream: IO[bytes]) -> None:
        with contextlib.suppress(OSError, ValueError):  # closed meanwhile
            while block := stream.read(KEPT):
                self._kept = (self._kept + block)[-KEPT:]

    def line(self) -> str:
        self._thread.join(ENDING)
        lines = self._kept.decode(errors="replace").strip().splitlines()
        return printable(shown(lines[-1][:SHOWN])) if lines else "it ended without a message"


def _end(process: subprocess.Popen[bytes]) -> int:
    """Wait until a process has ended, and return its exit code."""
    try:
        return process.wait(ENDING)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
