"""``ssd-edge data …``: look at images before any work."""

from __future__ import annotations

import io
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ssd_edge.cli.options import JSON, echo, print_json
from ssd_edge.errors import BadFilesError, InputError

if TYPE_CHECKING:
    from ssd_edge.data.check import Checked, DataCheck

THUMBNAIL = 96  # pixels


@click.group()
def data() -> None:
    """Look at images before any work."""


@data.command()
@click.argument("folder", metavar="FOLDER")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page of pictures, in one file.")
@JSON
def check(folder: str, html: Path | None, as_json: bool) -> None:
    """Check the images in FOLDER or an archive, as `train` would read them.

    Says what classes there are and how many images they have, which files cannot be used, which images are the same or
    nearly so, and which of them are in training and test alike. Exit code 2 if `train` would refuse the data.
    """
    from ssd_edge.data.check import check as run

    checked = run(folder)
    found = checked.result
    if html is not None:
        _write_page(html, checked)
    if as_json:
        print_json(found.to_dict())
    else:
        _print(found, folder, html)
    if found.problems:
        total = len(found.problems) + sum(found.formats.values())
        raise BadFilesError(found.problems, total, "ssd-edge train --skip-bad")
    if found.obstacle is not None:
        raise InputError(found.obstacle)


def _write_page(path: Path, checked: Checked) -> None:
    from PIL import Image

    from ssd_edge import files
    from ssd_edge.images import Pixels
    from ssd_edge.report.pictures import render

    def thumbnail(name: str) -> bytes:
        stream = io.BytesIO()
        pixels = checked.thumbnail(name, Pixels(THUMBNAIL, "pad"))
        Image.fromarray(pixels).save(stream, "JPEG", quality=60)
        return stream.getvalue()

    files.write_text(path, render(checked.result.to_dict(), checked.by_class, thumbnail))


def _print(found: DataCheck, folder: str, html: Path | None) -> None:
    total = sum(found.formats.values())
    echo(f"{found.name}: {total:,} images of {len(found.classes):,} classes{f'; {found.split}' if found.split else ''}")
    echo(f"  formats  {', '.join(f'{kind} {count:,}' for kind, count in found.formats.items())}")
    least, median, most = (f"{width} × {height}" for width, height in found.sizes or ((0, 0),) * 3)
    echo(f"  sizes    {least} to {most} pixels, median {median}")
    if ignored := found.accounts.ignored():
        echo(f"  besides  {ignored}")
    width = max(len("class"), *(len(one.name) for one in found.classes))
    echo(f"  {'class'.ljust(width)}  {'train':>6}  {'test':>6}")
    for one in found.classes:
        echo(f"  {one.name.ljust(width)}  {one.train:>6,}  {one.test:>6,}")
    for warning in found.warnings():
        echo(f" {warning}", "warning:", "yellow")
    if html is not None:
        echo(f"pictures: {html}")
    if found.obstacle is None:
        skip = " --skip-bad" if found.problems else ""
        echo(f"next:     ssd-edge train {shlex.quote(folder)}{skip}")
