"""``ssd-edge device merge``."""

from __future__ import annotations

from pathlib import Path

import click

from ssd_edge.cli.options import JSON, MAX_FORGETTING, ROOT, echo, open_device, print_cost, print_json, print_warnings


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@MAX_FORGETTING
@ROOT
@JSON
def merge(bundle: Path, max_forgetting: float, root: Path | None, as_json: bool) -> None:
    """Add what another device has learned.

    BUNDLE is the file that the other device has exported. Both devices must have started from the same bundle. Classes
    of the same name become one. To continue on both devices from the merged state, export it here and install it on
    both.
    """
    from device_runtime.learning.guard import Limits

    result = open_device(root).merge(bundle, Limits(max_forgetting))
    if as_json:
        print_warnings(result.warnings)
        print_json(result.to_dict())
        return
    echo(f"generation {result.generation}: merged with installation {result.merged}")
    for taught in result.taught:
        echo(f"  {taught.label}: {taught.images} images, {'new' if taught.new else 'known before'}")
    print_warnings(result.warnings)
    print_cost(result.old_classes, "remaining classes")
