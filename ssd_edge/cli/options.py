"""Options and helpers that several verbs share. Results go to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssd_edge.errors import BadFilesError, InputError, SSDEdgeError, printable
from ssd_edge.system import ranks

if TYPE_CHECKING:
    from device_runtime.device import Device
    from device_runtime.results import Retention

CONFIG = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="YAML file with settings; SECTION.KEY=VALUE arguments take precedence.",
)
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
ROOT = click.option(
    "--root",
    type=click.Path(path_type=Path),
    envvar="SSD_EDGE_ROOT",
    help="Folder of the device's state [default: $SSD_EDGE_ROOT, else a folder in the user's data directory].",
)
CLASSES = click.option("--classes", "list_classes", is_flag=True, help="List the classes.")
STRICT = click.option(
    "--strict", is_flag=True, help="Fail with exit code 6 if the backbone would run slower than its target allows."
)
SKIP_BAD = click.option(
    "--skip-bad", is_flag=True, help="Go on without files that cannot be used; without it, all of them are named."
)
ALLOW_CONTROL_FLOW = click.option(
    "--allow-control-flow",
    is_flag=True,
    help="Accept a backbone with loops or branches, which may never end, from a source that you trust.",
)

ENGINE = click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where the work is done: in this process and its children, or by workers on a Ray cluster.",
)
RAY_ADDRESS = click.option(
    "--ray-address",
    metavar="HOST:PORT",
    help="Ray cluster to use [default: one on this machine, which ends with the command and listens on loopback only].",
)

MAX_FORGETTING = click.option(
    "--max-forgetting",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Largest estimated loss of accuracy of the other classes; a change that would exceed it is refused.",
)


def read_tree(config_file: Path | None, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Return the plain values of a YAML file with overrides applied."""
    from ssd_edge.config import merge, read_yaml

    return merge(read_yaml(config_file) if config_file else {}, overrides)


def with_folder(words: tuple[str, ...]) -> tuple[str, ...]:
    """Return overrides in which a word that names a data set is ``data.path=WORD``.

    Raises:
        InputError: Two data sets are named, or a word is neither a setting nor the path of anything.
    """
    from ssd_edge.data import find

    settings = [word for word in words if re.match(r"[a-z_]+(\.\w+)?=", word)]
    folders = [word for word in words if word not in settings]
    for word in folders:
        try:
            _ = word == "digits" or find(word)
        except InputError as error:
            raise InputError(
                f"'{word}' is neither of the form section.key=value nor the path of images: {error}"
            ) from error
    named = [*folders, *(word.partition("=")[2] for word in settings if word.startswith("data.path="))]
    if folders and len(named) > 1:
        raise InputError(f"one data set is needed, but {len(named)} are named: {', '.join(named)}")
    return (*settings, *(f"data.path={word}" for word in folders))


def check_engine(engine: str, ray_address: str | None, workers: int | None = None) -> None:
    """Check that no option of a cluster is given for the engine ``local``.

    Raises:
        InputError: One is.
    """
    for name, value in (("--ray-address", ray_address), ("--workers", workers)):
        if engine != "ray" and value:
            raise InputError(f"{name} {value} belongs to --engine ray; add it, or leave out {name}")


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Let rank 0 alone say an error that all processes of torchrun have; the others end silently with its code."""
    try:
        yield
    except SSDEdgeError as error:
        if ranks()[0] == 0:
            raise
        wait_silently()
        raise SystemExit(error.exit_code) from None


def wait_silently() -> None:
    """Leave another process of torchrun the time to say what happened: all are ended once one has ended."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(2)


def echo(text: str = "", mark: str = "", colour: str | None = None) -> None:
    """Print one line of a result. Whatever a terminal shows goes through here or `log`: names may come from anywhere.

    Args:
        text: The line; see `printable` for what is replaced.
        mark: Start of the line, in colour on a terminal.
        colour: Colour of `mark`.
    """
    click.echo(click.style(printable(mark), fg=colour) + printable(text) if mark else printable(text))


def log(text: str) -> None:
    """Print a message for people on standard error; if that cannot be written, the work goes on."""
    with contextlib.suppress(OSError):
        click.echo(printable(text), err=True)


@dataclasses.dataclass
class Results:
    """Record of what a verb has printed.

    Attributes:
        printed: True once a result is on standard output as JSON.
    """

    printed: bool = False


def print_json(value: Any) -> None:
    """Print one JSON object on standard output, in ASCII: control codes and names that are not UTF-8 are escaped."""
    echo(json.dumps(value, allow_nan=False))
    context = click.get_current_context(silent=True)
    if context is not None and isinstance(context.obj, Results):
        context.obj.printed = True


def root_or_default(root: Path | None) -> Path:
    """Return the folder of the device's state: `root`, or the default one."""
    from device_runtime.machine.board import default_root

    return default_root() if root is None else root


def open_device(root: Path | None, strict: bool = False) -> Device:
    """Open the device in a root, with a warning if a damaged generation was replaced by an older one."""
    from device_runtime.device import Device

    device = Device.open(root, strict)
    if device.generation.fallback:
        log(f"warning: {device.generation.fallback}")
    return device


def describe_classes(names: Sequence[str]) -> str:
    """Return the number of classes for people."""
    if not names:
        return "no classes yet; learn one with: ssd-edge device learn"
    return "1 class" if len(names) == 1 else f"{len(names):,} classes"


def print_classes(names: Sequence[str]) -> None:
    """Print classes, one per line."""
    for name in names:
        echo(f"  {name}")


def choose_images(groups: Mapping[str, Sequence[Path]], skip_bad: bool) -> tuple[dict[str, list[Path]], list[str]]:
    """Return the images in files and folders by group, and a sentence for each file that is left out.

    Args:
        groups: Name → files and folders.
        skip_bad: Leave out what cannot be used, and log it.

    Raises:
        BadFilesError: A file cannot be used by its name or is missing, and is not to be left out, or nothing is left;
            all are named, also those that only decoding shows.
    """
    from ssd_edge.images import find, usable

    found = {name: find(sources) for name, sources in groups.items()}
    if not skip_bad and not any(problems for _, problems in found.values()):
        return {name: paths for name, (paths, _) in found.items()}, []  # decoding them shows the rest
    tried = {name: usable(paths) for name, (paths, _) in found.items()}
    bad = [problem for both in (found, tried) for _, problems in both.values() for problem in problems]
    good = {name: paths for name, (paths, _) in tried.items()}
    if bad and not (skip_bad and any(good.values())):
        raise BadFilesError(bad, sum(len(paths) + len(problems) for paths, problems in found.values()))
    for problem in bad:
        log(f"left out: {problem}")
    return good, bad


def raw_stdin() -> io.FileIO:
    """Return standard input without Python's buffer, whose lock would block the exit while a thread reads."""
    return io.FileIO(sys.stdin.fileno(), closefd=False)


def print_warnings(warnings: Iterable[str]) -> None:
    """Print the warnings of a learn or an edit on standard error."""
    for warning in warnings:
        log(f"warning: {warning}")


def print_cost(retention: Retention, others: str) -> None:
    """Print the estimated accuracy on the other classes before and after a change, and how to undo it."""
    if retention.accuracy_before is not None:
        estimate = f"{retention.accuracy_before:.3f} -> {retention.accuracy_after:.3f}"
        echo(f"  {others}: {estimate} (estimated, for those of the bundle); loss {retention.drop:.3f}")
    elif retention.worst is not None:
        echo(f"  {others}: accuracy {retention.kind}; estimated loss {retention.drop:.3f}")
    echo("  undo with: ssd-edge device rollback")


@contextlib.contextmanager
def progress_line() -> Iterator[Callable[[str, float, float | None], None] | None]:
    """Show the progress of a learn on one line of the terminal; yields None if standard error is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return

    def show(text: str) -> None:
        with contextlib.suppress(OSError):
            click.echo(f"\r\033[K{printable(text)}", nl=False, err=True)

    def update(stage: str, share: float, left: float | None) -> None:
        remaining = "" if left is None or left < 1 else f", about {left:.0f} s left"
        show(f"{stage} {share:.0%}{remaining}")

    try:
        yield update
    finally:
        show("")
