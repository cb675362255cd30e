"""``ssd-edge device merge-labels``."""

from __future__ import annotations

from pathlib import Path

import click

from ssd_edge.cli.options import JSON, MAX_FORGETTING, ROOT, echo, open_device, print_cost, print_json, print_warnings


@click.command("merge-labels")
@click.argument("labels", nargs=-1, required=True, metavar="LABEL...")
@click.option(
    "--into", required=True, metavar="NAME", help="Name of the merged class: one of the LABELs or a new name."
)
@MAX_FORGETTING
@ROOT
@JSON
def merge_labels(labels: tuple[str, ...], into: str, max_forgetting: float, root: Path | None, as_json: bool) -> None:
    """Merge several classes into one.

    The result is as if all images had been learned under one name.
    """
    from device_runtime.learning.guard import Limits

    result = open_device(root).merge_labels(labels, into, Limits(max_forgetting))
    if as_json:
        print_warnings(result.warnings)
        print_json(result.to_dict())
        return
    echo(f"generation {result.generation}: {', '.join(result.merged_labels)} are now '{result.into}'")
    print_warnings(result.warnings)
    print_cost(result.old_classes, "remaining classes")
