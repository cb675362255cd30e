"""``ssd-edge device predict``."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import click

from ssd_edge.cli.options import JSON, ROOT, SKIP_BAD, STRICT, choose_images, echo, open_device, print_json


@click.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE...")
@click.option("--always-answer", is_flag=True, help="Predict the nearest class for every image, never 'unknown'.")
@SKIP_BAD
@STRICT
@ROOT
@JSON
def predict(
    sources: tuple[Path, ...], always_answer: bool, skip_bad: bool, strict: bool, root: Path | None, as_json: bool
) -> None:
    """Predict the class of each IMAGE, or 'unknown'.

    An IMAGE is a file or a folder of images.
    """
    chosen, skipped = choose_images({"": sources}, skip_bad)
    paths = chosen[""]
    opened = open_device(root, strict)
    started = time.monotonic()
    predictions = opened.predict(paths, reject=not always_answer)
    seconds = time.monotonic() - started
    if as_json:
        rows = [dataclasses.asdict(p) for p in predictions]
        print_json(
            {"generation": opened.generation.number, "predictions": rows, "skipped": skipped, "seconds": seconds}
        )
        return
    for p in predictions:
        nearest = "" if p.label == p.nearest else f" (nearest: {p.nearest})"
        score = "     –" if p.score is None else f"{p.score:6.3f}"
        echo(f"{score}  {p.label}{nearest}  {p.image}")
