"""``ssd-edge device watch``."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import click

from ssd_edge.cli.options import ROOT, STRICT, print_json, raw_stdin


class _Stop:
    """Records a request to stop. A second signal interrupts at once, in case the loop hangs."""

    requested = False

    def listen(self) -> None:
        """Handle SIGTERM and SIGINT from now on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@click.command()
@click.argument("source", metavar="FOLDER|CAMERA|-")
@click.option("--existing", is_flag=True, help="Also classify the images that are already in FOLDER.")
@click.option("--recursive", is_flag=True, help="Also watch the subfolders of FOLDER.")
@click.option(
    "--every",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Interval between scans of FOLDER [default: 0.5] or between frames [default: 0, as fast as possible].",
)
@STRICT
@ROOT
def watch(source: str, existing: bool, recursive: bool, every: float | None, strict: bool, root: Path | None) -> None:
    """Classify new images in FOLDER, of a CAMERA, or from a stream of JPEGs (-).

    Prints one JSON object per image. CAMERA is read with ffmpeg, or GStreamer if it is gst:PIPELINE, and
    opened again if it is lost.

    \b
    ssd-edge device watch /srv/camera
    ssd-edge device watch /dev/video0
    ssd-edge device watch rtsp://camera-3/stream

    Classes that `ssd-edge device learn` commits in the meantime are used within a second. Messages go to standard
    error, one JSON object per line. Ends with exit code 0 at the end of the stream, on SIGTERM and on Ctrl-C.
    """
    from device_runtime.device import Device
    from device_runtime.service import logs
    from device_runtime.service.camera import Camera, is_camera
    from device_runtime.service.watch import watch as run

    stream = source == "-" or is_camera(source)
    for given, option in ((existing, "--existing"), (recursive, "--recursive")):
        if given and stream:
            raise click.UsageError(f"{option} applies to a folder, but the source is a stream; leave it out")
    stop = _Stop()
    logs.log_json()
    with Device.open(root, strict) as device:
        feed = raw_stdin() if source == "-" else Camera(source) if stream else Path(source)
        run(
            device,
            feed,
            lambda answer: print_json(answer.to_dict()),
            existing=existing,
            recursive=recursive,
            every=every,
            ready=stop.listen,
            stopped=lambda: stop.requested,
        )
