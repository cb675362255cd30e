"""``ssd-edge push``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ssd_edge.cli.options import ALLOW_CONTROL_FLOW, JSON, echo, log, print_json

PUSH_COMMAND = click.option(
    "--push-command",
    default="ssd-edge",
    metavar="COMMAND",
    show_default=True,
    help="Command that starts ssd-edge on the device, e.g. /opt/ssd-edge/bin/ssd-edge.",
)
ALLOW_DOWNGRADE = click.option("--allow-downgrade", is_flag=True, help="Let the device install an older release.")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("destination", metavar="USER@HOST[:ROOT]")
@PUSH_COMMAND
@ALLOW_DOWNGRADE
@ALLOW_CONTROL_FLOW
@JSON
def push(
    bundle: Path, destination: str, push_command: str, allow_downgrade: bool, allow_control_flow: bool, as_json: bool
) -> None:
    """Send BUNDLE to a device over ssh and install it.

    The device verifies the bundle, tests it, and only then switches to it. An interrupted upload is resumed.
    $SSD_EDGE_SSH replaces the ssh command, e.g. "ssh -p 2222".
    """
    result = send(bundle, destination, push_command, allow_downgrade, allow_control_flow)
    if as_json:
        print_json(result)
    else:
        print_pushed(result, destination)


def send(
    bundle: Path, destination: str, command: str, allow_downgrade: bool, allow_control_flow: bool = False
) -> dict[str, Any]:
    """Push a bundle and return the result as JSON values."""
    from exporters.push import parse_destination
    from exporters.push import push as run

    result = run(
        bundle,
        parse_destination(destination),
        log,
        command=command,
        allow_downgrade=allow_downgrade,
        allow_control_flow=allow_control_flow,
    )
    return result.to_dict()


def print_pushed(result: dict[str, Any], destination: str) -> None:
    """Print the result of a push for people."""
    echo(f"{destination}: generation {result['generation']}, {result['sent_bytes'] / 1e6:.1f} MB sent")
