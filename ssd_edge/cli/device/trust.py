"""``ssd-edge device trust``."""

from __future__ import annotations

from pathlib import Path

import click

from ssd_edge.cli.options import JSON, ROOT, print_json, root_or_default


@click.command()
@click.argument("key", required=False, type=click.Path(path_type=Path), metavar="[FILE.pub]")
@click.option("--remove", metavar="ID", help="Stop trusting the key with this id.")
@ROOT
@JSON
def trust(key: Path | None, remove: str | None, root: Path | None, as_json: bool) -> None:
    """Trust the public key FILE.pub, or list the trusted keys.

    Once a key is trusted, only bundles signed by a trusted key can be installed.
    """
    from device_runtime.install import trust as keyring

    root = root_or_default(root)
    if key is not None and remove is not None:
        raise click.UsageError("give either a key to trust or --remove ID, not both")
    if key is not None:
        keyring.trust(root, key)
    if remove is not None:
        keyring.distrust(root, remove)
    known = keyring.trusted(root)
    if as_json:
        print_json({"trusted": known, "root": str(root)})
    elif known:
        click.echo(f"{root} accepts only bundles signed by: {', '.join(known)}")
    else:
        click.echo(f"no key is trusted in {root}: every valid bundle is accepted, signed or not")
