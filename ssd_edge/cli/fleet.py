"""``ssd-edge fleet``."""

from __future__ import annotations

from pathlib import Path

import click

from ssd_edge.cli.options import JSON, MAX_FORGETTING, echo, print_json


@click.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("exported", nargs=-1, type=click.Path(path_type=Path), metavar="[FILE]...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Bundle to write.")
@click.option(
    "--ledger",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="What each device has sent so far; created if it does not exist.",
)
@click.option(
    "--sign", "key", type=click.Path(path_type=Path), metavar="KEY", help="Private key that signs the bundle."
)
@click.option(
    "--issued",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A bundle that this fleet has issued before, if a device has started from it; repeatable.",
)
@click.option("--without", multiple=True, metavar="ID", help="Take this device out, for good; repeatable.")
@MAX_FORGETTING
@JSON
def fleet(
    base: Path,
    exported: tuple[Path, ...],
    output: Path,
    ledger: Path,
    key: Path | None,
    issued: tuple[Path, ...],
    without: tuple[str, ...],
    max_forgetting: float,
    as_json: bool,
) -> None:
    """Add what many devices have learned, and write one bundle for all of them.

    BASE is the bundle that the devices had installed, FILE what each of them has exported since (device export). Their
    sums are added to those of earlier rounds in the ledger; a device that is named again replaces what it sent before.

    \b
    ssd-edge fleet shop.ssdedge from-devices/*.ssdedge --ledger ledger -o shop-2.ssdedge --sign fleet.key
    """
    from device_runtime.learning.guard import Limits
    from device_runtime.learning.state import DeviceState
    from exporters.fleet import gateway
    from ssd_edge import bundle as bundles
    from ssd_edge.errors import SSDEdgeError

    common = bundles.read(base, allow_control_flow=True)  # no backbone is run
    at = gateway.Gateway(ledger, common)
    for installation in without:
        at.leave_out(installation)
    states = {common.sha256: at.state}
    for path in issued:
        opened = bundles.read(path, allow_control_flow=True)
        states[opened.sha256] = DeviceState.of_bundle(opened)

    def reply(path: Path) -> gateway.Reply:
        try:
            part = gateway.exported(path, states)
        except SSDEdgeError as error:
            return gateway.Reply(str(path), problem=str(error))
        return gateway.Reply(str(path), part.to_arrays(), part.about())

    found = at.gather(map(reply, exported))
    if not as_json:
        for line in found.lines():
            echo(line)
    written = at.issue(output, key, Limits(max_forgetting))
    if as_json:
        print_json({"round": found.to_dict(), "issued": written.to_dict()})
        return
    for line in written.lines():
        echo(line)
