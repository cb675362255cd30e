"""``ssd-edge device rename``."""

from __future__ import annotations

from pathlib import Path

import click

from ssd_edge.cli.options import JSON, ROOT, echo, open_device, print_json


@click.command()
@click.argument("label")
@click.argument("new")
@ROOT
@JSON
def rename(label: str, new: str, root: Path | None, as_json: bool) -> None:
    """Rename the class LABEL to NEW."""
    result = open_device(root).rename(label, new)
    if as_json:
        print_json(result.to_dict())
    else:
        was, now = result.renamed
        echo(f"generation {result.generation}: '{was}' is now called '{now}'")
