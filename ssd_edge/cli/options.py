"""Options and helpers that several verbs share."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssd_edge.errors import printable

if TYPE_CHECKING:
    from device_runtime.results import Retention

CONFIG = click.option("--config", "config_file", type=click.Path(path_type=Path), help="A YAML file; words win.")
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
ROOT = click.option(
    "--root",
    type=click.Path(path_type=Path),
    envvar="SSD_EDGE_ROOT",
    help="The device's state [default: $SSD_EDGE_ROOT, else a folder in the user's data directory].",
)
STRICT = click.option(
    "--strict", is_flag=True, help="Refuse to run the backbone on something slower than its target is prepared for."
)

MAX_FORGETTING = click.option(
    "--max-forgetting",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Refuse what would lower the other classes' accuracy by more, as estimated; a share.",
)


def read_tree(config_file: Path | None, overrides: tuple[str, ...]) -> dict[str, Any]:
    """The plain values of a YAML file with words over it."""
    from ssd_edge.config import merge, read_yaml

    return merge(read_yaml(config_file) if config_file else {}, overrides)


def log(text: str) -> None:
    """Print a message for people on standard error."""
    click.echo(text, err=True)


def print_json(value: Any) -> None:
    """One JSON object on standard output; what UTF-8 cannot say (a file's name may be any bytes) as JSON escapes."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    click.echo(text.encode("utf-8", "backslashreplace").decode())


def root_or_default(root: Path | None) -> Path:
    """Return the folder of the device's state: `root`, or the default one."""
    from device_runtime.machine.board import default_root

    return default_root() if root is None else root


def open_device(root: Path | None, strict: bool = False) -> Any:
    """The device in a root; a generation that stands in for a damaged one is said."""
    from device_runtime.device import Device

    opened = Device.open(root, strict)
    if opened.generation.fallback:
        click.echo(f"warning: {opened.generation.fallback}", err=True)
    return opened


def listed(names: Sequence[str]) -> str:
    """What classes a device knows, for people."""
    return f"{len(names)} classes: {', '.join(names)}" if names else "no classes yet; teach one: ssd-edge device learn"


def raw_stdin() -> io.FileIO:
    """Standard input without a buffer of Python's, which cannot end while a thread holds it."""
    return io.FileIO(sys.stdin.fileno(), closefd=False)


def warn(warnings: Iterable[str]) -> None:
    """Print the warnings of a learn or an edit on standard error."""
    for warning in warnings:
        click.echo(f"warning: {printable(warning)}", err=True)


def tell_cost(retention: Retention, which: str) -> None:
    """Print the estimated accuracy on the other classes before and after a change, and how to undo it."""
    if retention.accuracy_before is not None:
        estimate = f"{retention.accuracy_before:.3f} -> {retention.accuracy_after:.3f}"
        click.echo(f"  {which}: {estimate} (an estimate from class statistics)")
    click.echo("  undo with: ssd-edge device rollback")


@contextlib.contextmanager
def progress_line() -> Iterator[Callable[[str, float, float | None], None] | None]:
    """One line on a terminal that says how far a learn is, and is gone afterwards; None where nobody watches."""
    if not sys.stderr.isatty():
        yield None
        return

    def tell(stage: str, share: float, left: float | None) -> None:
        remaining = "" if left is None or left < 1 else f", about {left:.0f} s left"
        click.echo(f"\r\033[K{stage} {share:.0%}{remaining}", nl=False, err=True)

    try:
        yield tell
    finally:
        click.echo("\r\033[K", nl=False, err=True)
