"""``ssd-edge keys …``: keys for signing bundles."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from ssd_edge.cli.options import JSON, echo, print_json


@click.group()
def keys() -> None:
    """Create and show keys for signing bundles."""


@keys.command()
@click.argument("name")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path(),
    help="Folder for the two files [default: the current one].",
)
@JSON
def new(name: str, folder: Path, as_json: bool) -> None:
    """Create NAME.key, the private key that signs, and NAME.pub, the public key that devices trust."""
    from ssd_edge.bundle import signing

    private, public = signing.new_key(folder, name)
    identity = signing.key_id(signing.load_public(public))
    if as_json:
        print_json({"id": identity, "private": str(private), "public": str(public)})
        return
    echo(f"key {identity}")
    echo(f"  private  {private} (not encrypted: anyone who has it can sign; keep a backup in a safe place)")
    echo(f"  public   {public}")
    echo(f"next, here:          ssd-edge deploy … --sign {shlex.quote(str(private))}")
    echo(f"next, on the device: ssd-edge device trust {shlex.quote(public.name)}")


@keys.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.pub|FILE.key")
@JSON
def show(file: Path, as_json: bool) -> None:
    """Print the id of a key."""
    from ssd_edge import files
    from ssd_edge.bundle import signing

    private = b"PRIVATE KEY-----" in files.read_bytes(file)
    public = signing.load_private(file).public_key() if private else signing.load_public(file)
    identity = signing.key_id(public)
    if as_json:
        print_json({"id": identity, "kind": "private" if private else "public"})
    else:
        echo(identity)
