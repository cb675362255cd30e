"""``ssd-edge device export``."""

from __future__ import annotations

from pathlib import Path

import click

from ssd_edge.cli.options import JSON, ROOT, describe_classes, echo, open_device, print_json


@click.command()
@click.argument("output", type=click.Path(path_type=Path), metavar="FILE")
@click.option(
    "--sign", "key", type=click.Path(path_type=Path), help="Private key that signs the bundle (ssd-edge keys new)."
)
@click.option("--no-history", is_flag=True, help="Do not list in the model card what was learned on the device.")
@ROOT
@JSON
def export(output: Path, key: Path | None, no_history: bool, root: Path | None, as_json: bool) -> None:
    """Write the current generation as a bundle.

    The bundle can be installed on another device, merged there (`device merge`), or kept as a backup.
    """
    result = open_device(root).export(output, key, history=not no_history)
    if as_json:
        print_json(result.to_dict())
        return
    signed = f"signed by {result.signed_by}" if result.signed_by else "not signed"
    echo(f"{output}: {result.bytes / 1e6:.1f} MB, {describe_classes(result.classes)}; {signed}")
