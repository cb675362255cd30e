"""Command ``ssd-edge train``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ssd_edge.cli.options import CONFIG, read_tree, with_folder


@click.command()
@CONFIG
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Continue an interrupted run.")
@click.option("--skip-bad", is_flag=True, help="Go on without files that cannot be used, and list them.")
@click.argument("words", nargs=-1, metavar="[FOLDER] [SECTION.KEY=VALUE]...")
def train(config_file: Path | None, resume: Path | None, skip_bad: bool, words: tuple[str, ...]) -> None:
    """Train a learner task by task, on the images in FOLDER or an archive.

    The baselines and the panel learn the same stream.

    \b
    ssd-edge train                                  digits of scikit-learn, no download
    ssd-edge train FOLDER                           FOLDER/<class>/*.jpg, or FOLDER/train and FOLDER/test
    ssd-edge train photos.zip --skip-bad            go on without damaged images and videos
    ssd-edge train --config F.yaml learner.name=sdmlp learner.k=10
    ssd-edge train learner.name=auto                choose a closed-form learner on held-out training images
    ssd-edge train --resume runs/3

    Writes runs/<n>/ with metrics.json and report.html. `ssd-edge config` lists every key.
    """
    from ssd_edge.config import TrainConfig, parse
    from ssd_edge.errors import InputError
    from ssd_edge.report.terminal import Console

    console = Console()
    overrides = (*with_folder(words), *(["data.skip_bad=true"] if skip_bad else []))
    if resume is not None and (overrides or config_file):
        raise InputError("--resume keeps the configuration of the run; leave out --config and the other settings")
    tree = read_tree(config_file, overrides)
    config = parse(TrainConfig, tree)
    from ssd_edge.run import train

    argv = ["ssd-edge", *sys.argv[1:]]  # without the path of the script, because the record goes into bundles
    run = train.resume(resume, console) if resume else train.start(config, argv, console)
    console.print(f"{run.folder}: {'resumed' if resume else 'started'}")
    try:
        result = run.execute()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"continue with: ssd-edge train --resume {run.folder}") from None
    console.table(result.to_dict())
    console.print(f"report: {run.folder / 'report.html'}")
    console.print(f"next:   ssd-edge deploy --target jetson {run.folder} -o robot.ssdedge")
