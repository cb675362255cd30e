"""Commands ``ssd-edge train`` and ``ssd-edge compare``."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ssd_edge.cli.options import CONFIG, ENGINE, RAY_ADDRESS, check_engine, read_tree, with_folder

if TYPE_CHECKING:
    from ssd_edge.report.terminal import Console
    from ssd_edge.run.results import RunResult
    from ssd_edge.run.train import Run


@click.command()
@CONFIG
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Continue an interrupted run.")
@click.option("--skip-bad", is_flag=True, help="Go on without files that cannot be used, and list them.")
@click.option("--no-panel", is_flag=True, help="Train the model only; `ssd-edge compare` trains the others later.")
@ENGINE
@RAY_ADDRESS
@click.option("--workers", type=click.IntRange(1, 4096), help="Workers of --engine ray [default: one per core].")
@click.argument("words", nargs=-1, metavar="[FOLDER] [SECTION.KEY=VALUE]...")
def train(
    config_file: Path | None,
    resume: Path | None,
    skip_bad: bool,
    no_panel: bool,
    engine: str,
    ray_address: str | None,
    workers: int | None,
    words: tuple[str, ...],
) -> None:
    """Train a learner task by task on the images in FOLDER or an archive, then others to compare it with.

    The model can be deployed before the others are trained; Ctrl-C then stops the comparison only.

    \b
    ssd-edge train                                  digits of scikit-learn, no download
    ssd-edge train FOLDER                           FOLDER/<class>/*.jpg, or FOLDER/train and FOLDER/test
    ssd-edge train photos.zip --skip-bad            go on without damaged images and videos
    ssd-edge train --config F.yaml learner.name=sdmlp learner.k=10
    ssd-edge train learner.name=auto                choose a closed-form learner on held-out training images
    ssd-edge train --resume runs/3
    ssd-edge train FOLDER --engine ray              embed with many workers; the model is the same

    Writes runs/<n>/ with metrics.json and report.html. `ssd-edge config` lists every key.
    """
    from ssd_edge.config import TrainConfig, parse
    from ssd_edge.errors import InputError
    from ssd_edge.report.terminal import Console
    from ssd_edge.report.wording import percent

    console = Console()
    overrides = (*with_folder(words), *(["data.skip_bad=true"] if skip_bad else []))
    if resume is not None and (overrides or config_file):
        raise InputError("--resume keeps the configuration of the run; leave out --config and the other settings")
    check_engine(engine, ray_address, workers)
    tree = read_tree(config_file, overrides)
    config = parse(TrainConfig, tree)
    from ssd_edge.run import train

    argv = ["ssd-edge", *sys.argv[1:]]  # without the path of the script, because the record goes into bundles
    with contextlib.ExitStack() as ends:
        on_cluster = None
        if engine == "ray":
            from ssd_edge.run.cluster import cluster
            from ssd_edge.run.on_ray import Engine, check

            if resume is None:
                check(config.learner)  # before seconds are spent on starting a cluster
            on_cluster = Engine(ends.enter_context(cluster(ray_address or "", workers or 0)))
        run = train.resume(resume, console, on_cluster) if resume else train.start(config, argv, console, on_cluster)
        console.print(f"{run.folder}: {'resumed' if resume else 'started'}")
        try:
            trained = run.train_model()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"continue with: ssd-edge train --resume {run.folder}") from None
    settings = run.config.run
    if no_panel or engine == "ray" or not (settings.panel or settings.baselines):
        _conclude(run, trained, console)
        console.print(f"compare: ssd-edge compare {run.folder}")
        return
    console.print(
        f"the model is ready: {percent(trained.main.average_accuracy)} of the test images, averaged over the tasks; "
        f"deploy it now, in another terminal, with: {_deploying(run.folder)}"
    )
    _compare(run, console, settings.baselines, settings.panel)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def compare(run: Path) -> None:
    """Train other learners on the stream of a finished RUN, and add them to its report.

    It continues where an earlier comparison was stopped.
    """
    from ssd_edge.report.terminal import Console
    from ssd_edge.run import finished
    from ssd_edge.run import train as training

    console = Console()
    finished.read(run)
    _compare(training.resume(run, console), console)


def _compare(run: Run, console: Console, baselines: bool = True, panel: bool = True) -> None:
    """Train the learners to compare with, and print the tables."""
    console.print("comparing it with other learners; Ctrl-C stops that and keeps the model")
    try:
        result = run.compare(baselines, panel)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"the model in {run.folder} is complete; continue the comparison with: ssd-edge compare {run.folder}"
        ) from None
    _conclude(run, result, console)


def _conclude(run: Run, result: RunResult, console: Console) -> None:
    """Print the tables, what helps most if the result is poor, and what to do next."""
    from ssd_edge.report.findings import levers
    from ssd_edge.report.wording import percent
    from ssd_edge.run import report

    console.table(result.to_dict())
    found = report.of_run(run.folder, *report.files_of(run.folder), None)
    answers = found.answers
    console.print(f"{percent(answers.accuracy)} of the {len(answers.truth):,} test images are named correctly")
    for step in levers(found):
        console.print(f"- {step.do} {step.why}")
        if step.command:
            console.print(f"  {step.command}")
    console.print(f"report:  {run.folder / 'report.html'}, with mistakes and look-alikes as photographs")
    console.print(f"deploy:  {_deploying(run.folder)}")


def _deploying(folder: Path) -> str:
    """Return the command that deploys a run."""
    return f"ssd-edge deploy --target jetson {shlex.quote(str(folder))} -o robot.ssdedge"
