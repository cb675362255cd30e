"""Command ``ssd-edge evaluate``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ssd_edge.cli.options import JSON, OVERRIDES, echo, print_json


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@JSON
@OVERRIDES
def evaluate(run: Path, as_json: bool, overrides: tuple[str, ...]) -> None:
    """Evaluate a finished RUN.

    \b
    ssd-edge evaluate runs/1                        on its own test images
    ssd-edge evaluate runs/1 data.path=FOLDER       on other data
    """
    from ssd_edge.config import merge
    from ssd_edge.errors import InputError
    from ssd_edge.report.terminal import Console
    from ssd_edge.run import evaluate as evaluation
    from ssd_edge.run import storage

    for override in overrides:
        if not override.startswith("data."):
            raise InputError(f"'{override}': only settings of the section data can be changed here; leave it out")
    config = storage.open_folder(run)
    if overrides:
        config = evaluation.with_data(config, merge({}, overrides)["data"])
    result = evaluation.evaluate(run, config, Console(sys.stderr))
    if as_json:
        print_json(result.to_dict())
        return
    for name, accuracy in sorted(result.class_accuracy.items(), key=lambda item: item[1]):
        echo(f"{accuracy:7.3f}  {name}")
    echo(f"{result.accuracy:7.3f}  all {result.images:,} images of {result.data} ({result.which})")
