"""Invalid use of ``ssd-edge device watch``; its behaviour is tested in tests/device_runtime/test_watch.py."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from ssd_edge.cli.device.watch import _Stop, watch
from ssd_edge.errors import InputError


@pytest.fixture(autouse=True)
def _restore_handlers() -> Iterator[None]:
    """Restore log handlers and signal handlers, which belong to the process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for handler in handlers:  # otherwise they would be closed
        root.removeHandler(handler)
    yield
    root.handlers[:], root.level = handlers, level
    for number, handler in signals.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Missing argument 'FOLDER|CAMERA|-'"),
        (["FOLDER", "--every", "-1"], "-1.0 is not in the range"),
        (["FOLDER", "--every", "soon"], "'soon' is not a valid float"),
        (["-", "--existing"], "--existing applies to a folder"),
        (["rtsp://camera/1", "--recursive"], "--recursive applies to a folder"),
    ],
)
def test_bad_arguments(args: list[str], message: str, tmp_path: Path) -> None:
    args = [str(tmp_path) if arg == "FOLDER" else arg for arg in args]
    done = CliRunner().invoke(watch, [*args, "--root", str(tmp_path / "none")])
    assert done.exit_code == 2
    assert message in done.output


def test_no_installed_device(tmp_path: Path) -> None:
    done = CliRunner().invoke(watch, [str(tmp_path), "--root", str(tmp_path / "none")])
    assert isinstance(done.exception, InputError)
    assert "no bundle is installed" in str(done.exception)
    assert not (tmp_path / "none").exists()


def test_the_first_signal_requests_a_stop_and_the_second_interrupts() -> None:
    stop = _Stop()
    stop.listen()
    assert not stop.requested
    signal.raise_signal(signal.SIGTERM)
    assert stop.requested
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
