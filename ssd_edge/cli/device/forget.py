"""``ssd-edge device forget``."""

from __future__ import annotations

from pathlib import Path

import click

from ssd_edge.cli.options import JSON, MAX_FORGETTING, ROOT, echo, open_device, print_cost, print_json, print_warnings


@click.command()
@click.argument("label")
@click.option(
    "--exactly", is_flag=True, help="Fail if the class cannot be removed exactly, as if it had never been learned."
)
@MAX_FORGETTING
@ROOT
@JSON
def forget(label: str, exactly: bool, max_forgetting: float, root: Path | None, as_json: bool) -> None:
    """Remove the class LABEL.

    Reports whether anything of the class remains. Older generations keep it, so that `device rollback` can undo this,
    until ten newer generations exist.
    """
    from device_runtime.learning.guard import Limits

    result = open_device(root).forget(label, exactly, Limits(max_forgetting))
    if as_json:
        print_warnings(result.warnings)
        print_json(result.to_dict())
        return
    how = "exactly, as if it had never been learned" if result.exact else f"not exactly: {result.left}"
    echo(f"generation {result.generation}: forgot '{result.forgot}', {how}")
    print_warnings(result.warnings)
    print_cost(result.old_classes, "remaining classes")
