"""``ssd-edge device trust``."""

from __future__ import annotations

from pathlib import Path

import click

from ssd_edge.cli.options import JSON, ROOT, echo, print_json, root_or_default


@click.command()
@click.argument("key", required=False, type=click.Path(path_type=Path), metavar="[FILE.pub]")
@click.option("--remove", metavar="ID", help="Stop trusting the key with this id.")
@click.option(
    "--accept-unsigned", is_flag=True, help="Remove every trusted key, and accept unsigned bundles from now on."
)
@ROOT
@JSON
def trust(key: Path | None, remove: str | None, accept_unsigned: bool, root: Path | None, as_json: bool) -> None:
    """Trust the public key FILE.pub, or list the trusted keys.

    Once a key is trusted, only bundles signed by a trusted key can be installed. That stays so if the last key is
    removed or lost, until --accept-unsigned.
    """
    from device_runtime.install import trust as keyring

    root = root_or_default(root)
    if (key is not None) + (remove is not None) + accept_unsigned > 1:
        raise click.UsageError("give a key to trust, --remove ID or --accept-unsigned, only one of them")
    if key is not None:
        keyring.trust(root, key)
    if remove is not None:
        keyring.distrust(root, remove)
    if accept_unsigned:
        keyring.accept_unsigned(root)
    known = keyring.trusted(root)
    if as_json:
        print_json({"trusted": list(known or ()), "required": known is not None, "root": str(root)})
    elif known:
        echo(f"{root} accepts only bundles signed by: {', '.join(known)}")
    elif known is not None:
        echo(f"{root} accepts only signed bundles, but no key is trusted, so none at all; {keyring.BACK}")
    else:
        echo(f"no key is trusted in {root}: every valid bundle is accepted, signed or not")
