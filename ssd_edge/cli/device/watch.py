"""``ssd-edge device watch``: names what a camera sees, until it is stopped."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import click

from ssd_edge.cli.options import ROOT, STRICT, raw_stdin


class _Stop:
    """Asked to stop by a signal. A second one interrupts at once: the loop may hang."""

    asked = False

    def listen(self) -> None:
        """From now on a signal asks; before, it interrupts."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@click.command()
@click.argument("source", type=click.Path(path_type=Path, allow_dash=True), metavar="FOLDER|-")
@click.option("--existing", is_flag=True, help="Name also the images that are in FOLDER already.")
@click.option(
    "--every",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="From one look at FOLDER to the next [default: 0.5], or from frame to frame [default: 0, each that can be].",
)
@STRICT
@ROOT
def watch(source: Path, existing: bool, every: float | None, strict: bool, root: Path | None) -> None:
    """Name every new image in FOLDER, or the JPEGs that come on standard input (-), as one JSON object a line.

    \b
    ssd-edge device watch /srv/camera
    ffmpeg -i CAMERA -f mjpeg - | ssd-edge device watch -

    It learns nothing, but takes over within a second what `ssd-edge device learn` commits meanwhile. Messages go to
    standard error, one JSON object a line. It ends with the stream, or on SIGTERM and Ctrl-C, with exit code 0.
    """
    import json

    from device_runtime.device import Device
    from device_runtime.service import logs
    from device_runtime.service.watch import watch as run

    if existing and str(source) == "-":
        raise click.UsageError("--existing is for a folder, but the source is a stream; leave it out")
    stop = _Stop()
    logs.log_json()
    with Device.open(root, strict) as device:
        feed = raw_stdin() if str(source) == "-" else source
        run(
            device,
            feed,
            lambda answer: click.echo(json.dumps(answer.to_dict(), allow_nan=False)),
            existing=existing,
            every=every,
            ready=stop.listen,
            stopped=lambda: stop.asked,
        )
