"""``ssd-edge device merge``."""

from __future__ import annotations

from pathlib import Path

import click

from ssd_edge.cli.options import JSON, MAX_FORGETTING, ROOT, open_device, print_json, tell_cost, warn


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@MAX_FORGETTING
@ROOT
@JSON
def merge(bundle: Path, max_forgetting: float, root: Path | None, as_json: bool) -> None:
    """Also learn what another device has learned, from the BUNDLE that it has exported.

    Both must have started from one bundle. Classes of one name become one. To go on from the merged state on both
    devices, export it here and install it on both.
    """
    from device_runtime.learning.guard import Limits

    result = open_device(root).merge(bundle, Limits(max_forgetting))
    if as_json:
        warn(result.warnings)
        print_json(result.to_dict())
        return
    click.echo(f"generation {result.generation}: merged with installation {result.merged}")
    for one in result.taught:
        click.echo(f"  {one.label}: {one.images} images, {'new' if one.new else 'known before'}")
    warn(result.warnings)
    tell_cost(result.old_classes, "classes that stay")
