"""``ssd-edge device forget``."""

from __future__ import annotations

from pathlib import Path

import click

from ssd_edge.cli.options import JSON, MAX_FORGETTING, ROOT, open_device, print_json, tell_cost, warn


@click.command()
@click.argument("label")
@click.option("--exactly", is_flag=True, help="Refuse where it cannot be as if it had never been taught.")
@MAX_FORGETTING
@ROOT
@JSON
def forget(label: str, exactly: bool, max_forgetting: float, root: Path | None, as_json: bool) -> None:
    """Take the class LABEL out; says whether something of it stays.

    Older generations still know it, so that `rollback` can undo this, until ten newer ones have been made.
    """
    from device_runtime.learning.guard import Limits

    result = open_device(root).forget(label, exactly, Limits(max_forgetting))
    if as_json:
        warn(result.warnings)
        print_json(result.to_dict())
        return
    how = "as if it had never been taught" if result.exact else f"not exactly: {result.left}"
    click.echo(f"generation {result.generation}: forgot '{result.forgot}', {how}")
    warn(result.warnings)
    tell_cost(result.old_classes, "classes that stay")
