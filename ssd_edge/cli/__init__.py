"""The command line, with one module per verb. Verbs import PyTorch inside, so that ``--help`` is fast.

Results go to standard output, everything else to standard error. Exit codes: docs/cli.md.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import traceback
import warnings
from typing import Any, NoReturn

import click

from ssd_edge.cli.bench import bench
from ssd_edge.cli.config import config
from ssd_edge.cli.data import data
from ssd_edge.cli.deploy import deploy
from ssd_edge.cli.device import device
from ssd_edge.cli.distill import distill
from ssd_edge.cli.doctor import doctor
from ssd_edge.cli.evaluate import evaluate
from ssd_edge.cli.fleet import fleet
from ssd_edge.cli.inspect import inspect
from ssd_edge.cli.keys import keys
from ssd_edge.cli.options import Results, log, print_json, said_once
from ssd_edge.cli.pretrain import pretrain
from ssd_edge.cli.profile import profile
from ssd_edge.cli.push import push
from ssd_edge.cli.reproduce import reproduce
from ssd_edge.cli.train import compare, train
from ssd_edge.cli.verify import verify
from ssd_edge.errors import (
    BadFilesError,
    EnvironmentUnfitError,
    InputError,
    SSDEdgeError,
    meaning_of,
    printable,
    system_problem,
)
from ssd_edge.system import VERSION, ranks

INTERRUPTED = 130
TOGETHER = ("pretrain",)  # verbs that several processes of torchrun work on together
WRITERS = ("click.utils", "rich.console")  # modules that write to standard output
OPTIONAL = {
    **dict.fromkeys(("torch", "onnxruntime", "cryptography"), "device"),
    "onnx": "export",
    "sklearn": "train",
    "rich": "train",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="ssd-edge")
@click.pass_context
def cli(context: click.Context) -> None:
    """Continual learning for edge devices: train, deploy, learn on the device, undo.

    \b
    On a workstation:  ssd-edge data check FOLDER
                       ssd-edge train FOLDER
                       ssd-edge deploy --target jetson runs/1 -o robot.ssdedge
                       ssd-edge push robot.ssdedge user@camera-3
    On the device:     ssd-edge device install robot.ssdedge
                       ssd-edge device learn --label gear photos/
                       ssd-edge device predict frame.jpg
                       ssd-edge device rollback
    """
    with said_once():
        if ranks()[1] > 1 and (verb := context.invoked_subcommand) not in TOGETHER:
            raise InputError(
                f"{verb} works in one process, but torchrun has started {ranks()[1]}, which would overwrite each "
                f"other's results; start it without torchrun (WORLD_SIZE is set; verbs for it: {', '.join(TOGETHER)})"
            )


for command in (
    *(data, train, compare, evaluate, deploy, push, device, fleet, inspect, verify, profile, bench, doctor, keys),
    *(pretrain, distill, reproduce, config),
):
    cli.add_command(command)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _comes_from_interrupt(error: BaseException | None) -> bool:
    """Return True if an interrupt caused an exception: while a library is imported, it may become an ImportError."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _missing_package(error: Exception) -> SSDEdgeError | None:
    if not isinstance(error, ModuleNotFoundError) or error.name not in OPTIONAL:
        return None
    return EnvironmentUnfitError(
        f"the package '{error.name}' is needed and not installed; on a PC: pip install "
        f"'ssd-edge[{OPTIONAL[error.name]}]', on a Jetson use the one from JetPack"
    )


class _LogLines(logging.Handler):
    """Handler that prints the messages of log records; they may contain names from a bundle."""

    def emit(self, record: logging.LogRecord) -> None:
        log(record.getMessage())
        if record.exc_info:
            for line in logging.Formatter().formatException(record.exc_info).splitlines():
                log(line)


def main() -> NoReturn:
    """Run the command line and exit; only a bug ends in a traceback."""
    signal.signal(signal.SIGTERM, _interrupt)
    logging.lastResort = _LogLines(logging.WARNING)
    warnings.showwarning = lambda message, category, *_: log(f"warning: {message} ({category.__name__})")
    code = run()
    if (error := _flush()) and code == 0:
        code = _refuse(error)
    sys.exit(code)


def run() -> int:
    """Run the command line and return the exit code, after a sentence on standard error if it is not 0.

    With ``--json`` it is on standard output as well, as an object with ``error`` and ``code``, unless a result is.
    """
    results = Results()
    try:
        try:
            cli.main(standalone_mode=False, obj=results)
        except Exception as error:
            if not isinstance(error, click.Abort) and _comes_from_interrupt(error):
                raise KeyboardInterrupt from None
            raise
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        for line in shown.getvalue().splitlines():
            log(line)
        return _failed(error.format_message(), InputError.exit_code, results)
    except (KeyboardInterrupt, click.Abort) as error:
        hint = str(error.__cause__ or error)  # click replaces KeyboardInterrupt by Abort without its text
        log(said := f"interrupted{': ' + hint if hint else ''}")
        return _failed(said, INTERRUPTED, results)
    except BrokenPipeError:  # `ssd-edge … | head`
        return 1
    except Exception as error:
        meaning = _missing_package(error) or meaning_of(error) or _of_system(error)
        if meaning is None:
            return _failed(f"internal error: {type(error).__name__}: {error}", _report_bug(), results)
        return _failed(str(meaning), _refuse(meaning), results)
    return 0


def _failed(message: str, code: int, results: Results) -> int:
    """Print what went wrong as JSON if that was asked for, and return the exit code."""
    if "--json" in sys.argv and not results.printed:
        with contextlib.suppress(OSError):
            print_json({"error": printable(message), "code": code})
    return code


def _refuse(error: SSDEdgeError) -> int:
    if isinstance(error, BadFilesError) and len(error.problems) > error.SHOWN:
        for problem in error.problems:
            log(f"  {problem}")
        log(f"error: {error.summary}")
        return error.exit_code
    log(f"error: {error}")
    return error.exit_code


def _report_bug() -> int:
    for line in traceback.format_exc().splitlines():
        log(line)
    log("internal error: this is a bug in ssd-edge; please report it with the lines above")
    return SSDEdgeError.exit_code


def _of_system(error: Exception) -> EnvironmentUnfitError | None:
    """Return the meaning of an error of the operating system, None for any other exception."""
    if not isinstance(error, OSError):
        return None
    if any(frame.f_globals.get("__name__") in WRITERS for frame, _ in traceback.walk_tb(error.__traceback__)):
        return _cannot_print(error)
    place = f"{error.filename}: " if error.filename is not None else ""
    return EnvironmentUnfitError(f"{place}{system_problem(error)}")


def _cannot_print(error: OSError) -> EnvironmentUnfitError:
    reason = system_problem(error)
    return EnvironmentUnfitError(
        f"cannot write the result to standard output: {reason}; what was changed stays changed"
    )


def _flush() -> EnvironmentUnfitError | None:
    """Flush standard output; if that fails, drop what is left, which Python would write again, and return the error."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, sys.stdout.fileno())
            os.close(nothing)
        if not isinstance(error, BrokenPipeError):
            return _cannot_print(error)
    return None
