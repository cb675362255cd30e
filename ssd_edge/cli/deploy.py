"""``ssd-edge deploy``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from ssd_edge.cli.options import JSON, log, print_json
from ssd_edge.cli.push import ALLOW_DOWNGRADE, PUSH_COMMAND, print_pushed, send


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--target", required=True, help="jetson, or a board; an unknown name lists them.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle, e.g. robot.ssdedge.")
@click.option(
    "--precision",
    default="",
    metavar="NAME",
    help="Precision of the backbone [default: the target's]; auto: the fastest that computes what the run computed.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Images to calibrate int8 with [default: training images of the run].",
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

    result = pack(run, Options(**asked, empty=classes == "none"), output, log)
    if push is not None:
        result["push"] = send(output, push, push_command, allow_downgrade)
    if as_json:
        print_json(result)
        return
    size, classes = f"{result['bytes'] / 1e6:.1f} MB", f"{len(result['classes'])} classes"
    what = f"{size}, {classes}, {result['precision']}, {result['target']}"
    signed = f"signed by {result['signed_by']}" if result["signed_by"] else "not signed"
    click.echo(f"{output}: {what}, release {result['release']}, {signed}")
    if push is not None:
        print_pushed(result["push"], push)
    else:
        path = shlex.quote(str(output))
        log(f"next: ssd-edge push {path} USER@HOST; or copy it, and on the device: ssd-edge device install {path}")
