"""``ssd-edge evaluate``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ssd_edge.cli.options import JSON, OVERRIDES, print_json


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@JSON
@OVERRIDES
def evaluate(run: Path, as_json: bool, overrides: tuple[str, ...]) -> None:
    """Score a finished RUN, on its own test images or on other data.

    \b
    ssd-edge evaluate runs/1
    ssd-edge evaluate runs/1 data.path=FOLDER
    """
    from ssd_edge.config import TrainConfig, merge, parse, to_tree
    from ssd_edge.errors import InputError
    from ssd_edge.report.terminal import Console
    from ssd_edge.run import storage

    for word in overrides:
        if not word.startswith("data."):
            raise InputError(f"'{word}': only keys of the section data can be set here; the run's own settings stay")
    config = storage.open_folder(run)
    if overrides:
        tree = to_tree(config)
        if any(word.startswith("data.path=") for word in overrides):
            tree["data"] = {}  # other data: what the run selected from its own does not apply
        config = parse(TrainConfig, merge(tree, overrides))
    from ssd_edge.run.evaluate import evaluate as score

    result = score(run, config, Console(sys.stderr))
    if as_json:
        print_json(result.to_dict())
        return
    for name, accuracy in sorted(result.class_accuracy.items(), key=lambda item: item[1]):
        click.echo(f"{accuracy:7.3f}  {name}")
    click.echo(f"{result.accuracy:7.3f}  all {result.images:,} images of {result.data} ({result.which})")
