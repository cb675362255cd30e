"""``ssd-edge deploy``."""

from __future__ import annotations

from pathlib import Path

import click

from ssd_edge.cli.options import JSON, print_json


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--target", required=True, help="jetson, or a board; an unknown name lists them.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle, e.g. robot.ssdedge.")
@JSON
def deploy(run: Path, target: str, output: Path, as_json: bool) -> None:
    """Export a finished RUN's backbone to ONNX, check it, and pack a bundle for a device.

    \b
    ssd-edge deploy --target jetson runs/1 -o robot.ssdedge
    """
    from exporters.packing import deploy as pack

    result = pack(run, target, output, lambda text: click.echo(text, err=True))
    if as_json:
        print_json(result)
    else:
        click.echo(f"{output}: {result['bytes'] / 1e6:.1f} MB, {len(result['classes'])} classes, {result['target']}")
