"""``ssd-edge deploy`` and ``ssd-edge push``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from ssd_edge.cli.options import JSON, print_json

PUSH_COMMAND = click.option(
    "--push-command",
    default="ssd-edge",
    metavar="COMMAND",
    show_default=True,
    help="What starts ssd-edge on the device, e.g. /opt/ssd-edge/bin/ssd-edge.",
)
ALLOW_DOWNGRADE = click.option("--allow-downgrade", is_flag=True, help="Let the device take an older release.")


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--target", required=True, help="jetson, or a board; an unknown name lists them.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle, e.g. robot.ssdedge.")
@click.option(
    "--precision",
    default="",
    metavar="fp32|fp16|int8|auto",
    help="Of the backbone [default: the target's]; auto: the fastest that computes what the run computed.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Images for int8 [default: training images of the run].",
)
@click.option("--head", is_flag=True, help="Add the learner as head.onnx, for hosts that only predict.")
@click.option(
    "--classes",
    type=click.Choice(["all", "none"]),
    default="all",
    show_default=True,
    help="none: leave out what was learned; every class is taught on the device.",
)
@click.option("--sign", type=click.Path(path_type=Path), metavar="FILE", help="Private key (ssd-edge keys new).")
@click.option("--release", type=int, metavar="N", help="A device refuses a lower one [default: when the run finished].")
@click.option("--push", metavar="USER@HOST[:ROOT]", help="Send it over ssh, check it there, and switch over.")
@PUSH_COMMAND
@ALLOW_DOWNGRADE
@JSON
def deploy(
    run: Path,
    output: Path,
    classes: str,
    push: str | None,
    push_command: str,
    allow_downgrade: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Export a finished RUN's backbone to ONNX, check it, and pack a bundle for a device.

    \b
    ssd-edge deploy --target jetson runs/1 -o robot.ssdedge
    ssd-edge deploy --target jetson-orin-nano --precision auto runs/1 -o robot.ssdedge --push user@camera-3
    """
    if push is not None:  # before minutes of work
        from exporters.push import parse_destination

        parse_destination(push)
    from exporters.deploy import Options
    from exporters.deploy import deploy as pack

    result = pack(run, Options(**asked, empty=classes == "none"), output, _say)
    if push is not None:
        result["push"] = _push(output, push, push_command, allow_downgrade)
    if as_json:
        print_json(result)
        return
    size, classes = f"{result['bytes'] / 1e6:.1f} MB", f"{len(result['classes'])} classes"
    what = f"{size}, {classes}, {result['precision']}, {result['target']}"
    signed = f"signed by {result['signed_by']}" if result["signed_by"] else "not signed"
    click.echo(f"{output}: {what}, release {result['release']}, {signed}")
    if push is not None:
        _tell_pushed(result["push"], push)
    else:
        path = shlex.quote(str(output))
        _say(f"next: ssd-edge push {path} USER@HOST; or copy it, and on the device: ssd-edge device install {path}")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("destination", metavar="USER@HOST[:ROOT]")
@PUSH_COMMAND
@ALLOW_DOWNGRADE
@JSON
def push(bundle: Path, destination: str, push_command: str, allow_downgrade: bool, as_json: bool) -> None:
    """Send BUNDLE to a device over ssh; it checks it, tests itself, and only then switches over.

    What a broken connection has brought over is not sent again; nor is what the device has. $SSD_EDGE_SSH is used in
    place of ssh, e.g. "ssh -p 2222".
    """
    result = _push(bundle, destination, push_command, allow_downgrade)
    if as_json:
        print_json(result)
    else:
        _tell_pushed(result, destination)


def _say(text: str) -> None:
    click.echo(text, err=True)


def _push(bundle: Path, destination: str, command: str, allow_downgrade: bool) -> dict[str, Any]:
    from exporters.push import parse_destination
    from exporters.push import push as send

    return send(bundle, parse_destination(destination), _say, command=command, allow_downgrade=allow_downgrade)


def _tell_pushed(result: dict[str, Any], destination: str) -> None:
    click.echo(f"{destination}: generation {result['generation']}, {result['sent_bytes'] / 1e6:.1f} MB sent")
