"""``ssd-edge device learn``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssd_edge.cli.options import (
    CLASSES,
    JSON,
    MAX_FORGETTING,
    ROOT,
    SKIP_BAD,
    STRICT,
    choose_images,
    describe_classes,
    echo,
    open_device,
    print_cost,
    print_json,
    print_warnings,
    progress_line,
    raw_stdin,
)
from ssd_edge.errors import InputError

if TYPE_CHECKING:
    from device_runtime.results import TaughtClass

SHOWN = 5  # classes that are printed


@click.command()
@click.option("--label", help="Name of the class, new or known [default: each subfolder of a FOLDER is a class].")
@click.argument(
    "sources", nargs=-1, required=True, type=click.Path(path_type=Path, allow_dash=True), metavar="FOLDER..."
)
@click.option(
    "--frames",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    help="Number of frames to take from a stream (-).",
)
@click.option("--every", type=click.FloatRange(0), default=0.2, show_default=True, help="Seconds between two frames.")
@MAX_FORGETTING
@click.option(
    "--force",
    is_flag=True,
    help="Learn even if old classes would suffer, the new images would not be recognised, a known class gets fewer "
    "than three, or the same were taught before.",
)
@click.option("--budget-seconds", type=float, help="Time limit; gradient learners stop early to meet it.")
@click.option(
    "--budget-mb",
    type=float,
    help="Memory limit in MiB for the whole process; a learn that would exceed it is refused.",
)
@SKIP_BAD
@STRICT
@CLASSES
@ROOT
@JSON
def learn(
    label: str | None,
    sources: tuple[Path, ...],
    frames: int,
    every: float,
    max_forgetting: float,
    force: bool,
    budget_seconds: float | None,
    budget_mb: float | None,
    skip_bad: bool,
    strict: bool,
    list_classes: bool,
    root: Path | None,
    as_json: bool,
) -> None:
    """Learn classes from folders of images.

    No earlier image is needed. Single files are accepted, too.

    \b
    ssd-edge device learn --label gear photos/       one class, from all images in photos/
    ssd-edge device learn photos/                    one class per folder: photos/gear/, photos/nut/, …
    ffmpeg -i CAMERA -f mjpeg - | ssd-edge device learn --label gear -    frames of a stream of JPEGs
    """
    from device_runtime.learning.budget import Budget
    from device_runtime.learning.guard import Limits
    from ssd_edge.classes import normalise_name

    budget = Budget(budget_seconds, budget_mb)

    opened = open_device(root, strict)
    images: dict[str, Any]
    skipped: list[str] = []
    if "-" in map(str, sources):
        if label is None or len(sources) > 1:
            raise click.UsageError(
                "a stream (-) shows one class and must be the only source; name the class with --label NAME"
            )
        from device_runtime.service.frames import take

        images = {normalise_name(label): take(raw_stdin(), frames, every, opened.bundle.pixels)}
    elif label is not None:
        images, skipped = choose_images({normalise_name(label): sources}, skip_bad)
    else:
        images, skipped = choose_images(_class_folders(sources), skip_bad)
    with progress_line() as watcher:
        result = opened.learn_all(images, Limits(max_forgetting, force=force), budget, watcher)
    print_warnings(result.warnings)
    if as_json:
        print_json({**result.to_dict(), "skipped": skipped})
        return
    memory = "" if result.peak_mb is None else f", {result.peak_mb} MiB of memory at most"
    took = f"{result.seconds:.1f} s{memory}"
    now = describe_classes(result.classes)
    echo(f"generation {result.generation}: {now}; learned {result.images:,} images in {took}")
    taught = result.taught
    if len(taught) > SHOWN and not list_classes:
        new, tested = sum(one.new for one in taught), [one for one in taught if _accuracy(one) is not None]
        taught = sorted(tested, key=lambda one: _accuracy(one) or 0.0)[:SHOWN]
        echo(f"  taught {len(result.taught)} classes, {new} of them new; --classes lists them; least recognised:")
    for one in taught:
        held, accuracy = one.held_out, ""
        if held is not None and held.accuracy is not None:
            accuracy = f"; {held.accuracy:.3f} of {held.images} held out recognised"
        echo(f"  {one.label}: {one.images} images, {'new' if one.new else 'known before'}{accuracy}")
    print_cost(result.old_classes, "old classes")


def _accuracy(taught: TaughtClass) -> float | None:
    return None if taught.held_out is None else taught.held_out.accuracy


def _class_folders(sources: tuple[Path, ...]) -> dict[str, list[Path]]:
    """Return the subfolders of all sources by class name."""
    from ssd_edge.classes import normalise_name
    from ssd_edge.files import is_folder, list_folder

    found: dict[str, list[Path]] = {}
    for source in sources:
        folders = [path for path in list_folder(source) if is_folder(path)] if is_folder(source) else []
        if not folders:
            raise InputError(f"{source} has no subfolders to take as classes; name the class with --label NAME")
        for folder in folders:
            found.setdefault(normalise_name(folder.name), []).append(folder)
    return found
