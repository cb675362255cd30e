"""``ssd-edge device history``."""

from __future__ import annotations

from pathlib import Path

import click

from ssd_edge.cli.options import JSON, ROOT, echo, open_device, print_json


@click.command()
@ROOT
@JSON
def history(root: Path | None, as_json: bool) -> None:
    """List all generations with what made them."""
    result = open_device(root).history()
    if as_json:
        print_json(result.to_dict())
        return
    for entry in result.generations:
        mark = "*" if entry.current else " "
        note = "" if entry.intact else f"  DAMAGED: {entry.problem}"
        echo(f"{mark} {entry.number:3}  {entry.created_utc}  {entry.what}{note}")
