"""``ssd-edge device receive``: the device's end of ``ssd-edge push``, started over ssh and not by people."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import click


@click.command(hidden=True)
@click.option("--root", type=click.Path(path_type=Path), envvar="SSD_EDGE_ROOT", help="The device's state.")
def receive(root: Path | None) -> None:
    """Take a bundle from ``ssd-edge push`` on standard input, check it, and install it."""
    from device_runtime.receive import receive as serve

    if root is None:
        from device_runtime.machine.board import default_root

        root = default_root()
    # The protocol has standard output for itself: what a driver prints there goes to standard error.
    sink = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    signal.signal(signal.SIGHUP, _hang_up)
    with open(0, "rb", buffering=0, closefd=False) as source, sink:
        code = serve(root, source, sink)
    sys.exit(code)


def _hang_up(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt("the connection was closed")
