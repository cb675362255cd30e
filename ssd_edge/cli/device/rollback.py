"""``ssd-edge device rollback``."""

from __future__ import annotations

from pathlib import Path

import click

from ssd_edge.cli.options import CLASSES, JSON, ROOT, describe_classes, echo, open_device, print_classes, print_json


@click.command()
@click.argument("generation", required=False, type=int)
@CLASSES
@ROOT
@JSON
def rollback(generation: int | None, list_classes: bool, root: Path | None, as_json: bool) -> None:
    """Return to the previous generation, or to GENERATION."""
    result = open_device(root).rollback(generation)
    if as_json:
        print_json(result.to_dict())
    else:
        was = f"generation {result.generation} (was {result.previous})"
        echo(f"{was}: {describe_classes(result.classes)}")
        print_classes(result.classes if list_classes else [])
