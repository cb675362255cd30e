"""``ssd-edge deploy``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from ssd_edge.cli.options import JSON, echo, log, print_json
from ssd_edge.cli.push import ALLOW_DOWNGRADE, PUSH_COMMAND, print_pushed, send


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--target", required=True, help="jetson, or the name of a board; an unknown name lists all targets.")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Bundle to write, e.g. robot.ssdedge."
)
@click.option(
    "--precision",
    default="",
    metavar="NAME",
    help="Precision of the backbone [default: the target's]; auto: the fastest with the same results as the run.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Images for the calibration of int8 [default: training images of the run].",
)
@click.option("--head", is_flag=True, help="Include the learner as head.onnx, for hosts that only predict.")
@click.option(
    "--classes",
    type=click.Choice(["all", "none"]),
    default="all",
    show_default=True,
    help="none: without the learned classes; all classes are learned on the device.",
)
@click.option(
    "--sign",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Private key that signs the bundle (ssd-edge keys new).",
)
@click.option(
    "--release",
    type=int,
    metavar="N",
    help="Release number; devices refuse lower ones [default: the time when the run finished].",
)
@click.option(
    "--push", metavar="USER@HOST[:ROOT]", help="Send the bundle over ssh and install it there; see ssd-edge push."
)
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
    **options: Any,
) -> None:
    """Pack a finished RUN into a bundle for a device.

    Exports the backbone to ONNX and compares it with the run before the bundle is written.

    \b
    ssd-edge deploy --target jetson runs/1 -o robot.ssdedge
    ssd-edge deploy --target jetson-orin-nano --precision auto runs/1 -o robot.ssdedge --push user@camera-3
    """
    if push is not None:  # before the export, which takes minutes
        from exporters.push import parse_destination

        parse_destination(push)
    from exporters.deploy import Options
    from exporters.deploy import deploy as pack

    result = pack(run, Options(**options, empty=classes == "none"), output, log)
    pushed = None if push is None else send(output, push, push_command, allow_downgrade)
    if as_json:
        print_json({**result.to_dict(), **({} if pushed is None else {"push": pushed})})
        return
    summary = f"{result.bytes / 1e6:.1f} MB, {len(result.classes)} classes, {result.precision}, {result.target}"
    signed = f"signed by {result.signed_by}" if result.signed_by else "not signed"
    echo(f"{output}: {summary}, release {result.release}, {signed}")
    if push is not None and pushed is not None:
        print_pushed(pushed, push)
    else:
        path = shlex.quote(str(output))
        log(f"next: ssd-edge push {path} USER@HOST; or copy it, and on the device: ssd-edge device install {path}")
