"""``ssd-edge distill``."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

import click

from ssd_edge.cli.options import CONFIG, JSON, OVERRIDES, SKIP_BAD, echo, log, print_json, read_tree


@click.command()
@click.argument("photographs", metavar="PHOTOS")
@click.option(
    "--teacher", "teachers", multiple=True, required=True, metavar="NAME", help="Backbone or run; may be repeated."
)
@click.option(
    "--specialist", "specialists", multiple=True, metavar="RUN", help="Run of classes that the teachers confuse."
)
@click.option("--student", metavar="NAME", help="Network to train [default: resnet9]; short for train.student.")
@click.option("--size", type=int, help="Side of its input in pixels; short for train.size.")
@click.option("--epochs", type=int, help="Passes over the photographs; short for train.epochs.")
@click.option("--minutes", type=float, help="Time to train, instead of --epochs; short for train.minutes.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the student; must not exist."
)
@SKIP_BAD
@JSON
@CONFIG
@OVERRIDES
def distill(
    photographs: str,
    teachers: tuple[str, ...],
    specialists: tuple[str, ...],
    student: str | None,
    size: int | None,
    epochs: int | None,
    minutes: float | None,
    output: Path,
    skip_bad: bool,
    as_json: bool,
    config_file: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Train a small backbone to see PHOTOS as larger ones do; the photographs need no labels.

    A teacher is a backbone by name, or the folder of a finished run, which adds its classes. Several are an ensemble.

    \b
    ssd-edge distill photos/ --teacher lite0 --student resnet9 --size 64 -o small
    ssd-edge distill photos/ --teacher lite0 --teacher lite2 --minutes 20 -o small
    ssd-edge distill photos/ --teacher runs/1 --specialist runs/2 --student lite0 --size 128 -o small

    Then: ssd-edge train FOLDER backbone=package:small
    """
    from ssd_edge.config import DistillConfig, merge, parse
    from ssd_edge.errors import InputError
    from ssd_edge.files import exists, is_folder, list_folder, make_directory

    given = {"student": student, "size": size, "epochs": epochs, "minutes": minutes}
    short = [f"train.{name}={value}" for name, value in given.items() if value is not None]
    config = parse(DistillConfig, merge(read_tree(config_file, overrides), short)).train
    if epochs is not None and minutes is not None:
        raise InputError(f"--epochs is {epochs} and --minutes is {minutes:g}; leave one of them out")
    if exists(output) and not (is_folder(output) and not list_folder(output)):
        raise InputError(f"{output} exists already and is not replaced; choose another folder, or remove it")
    from ssd_edge import data
    from ssd_edge.backbones.distilled import FEWEST, distil, open_student
    from ssd_edge.backbones.embedder import write_backbone
    from ssd_edge.backbones.onnx import OnnxEmbedder
    from ssd_edge.report.events import Message
    from ssd_edge.report.terminal import Console
    from ssd_edge.run.teachers import ask
    from ssd_edge.run.train import pick_device, set_threads

    console = Console(sys.stderr)

    def say(text: str) -> None:
        console(Message(text))

    def report(epoch: int, of: int, loss: float, seconds: float) -> None:
        say(f"epoch {epoch}/{of}  loss {loss:.3f}  {seconds / epoch * (of - epoch) / 60:.1f} min left")

    began = time.monotonic()
    set_threads(config.threads)
    device = pick_device(config.device)
    network = open_student(config, say)
    name, images, skipped = data.photographs(photographs, skip_bad)
    for sentence in skipped:
        log(f"left out: {sentence}")
    if len(images) < FEWEST:
        raise InputError(f"{name} has {len(images)} photographs, but at least {FEWEST} are needed; add some")
    make_directory(output)  # before the training, so that an unusable folder is reported at once
    answers = ask(teachers, specialists, images, device, console)
    say(f"training {config.student} on {len(images):,} photographs at {network.pixels.describe()}")
    made = distil(network, images, answers, config, device, say, report)
    embedder = OnnxEmbedder(made.graph)
    write_backbone(output, f"package:{output.resolve().name}", embedder)
    result = {
        "folder": str(output),
        "identity": embedder.identity,
        "photographs": len(images),
        "size": network.pixels.size,
        "dim": embedder.dim,
        "bytes": len(made.graph.model),
        "epochs": made.epochs,
        "loss": made.loss,
        "seconds": round(time.monotonic() - began, 1),
        "terms": made.graph.card["terms"],
    }
    if as_json:
        print_json(result)
        return
    echo(f"{output}: {len(made.graph.model) / 1e6:.1f} MB, {embedder.dim:,} features, identity {embedder.identity}")
    echo(f"licence: {made.graph.card['terms']}")
    echo(f"next: ssd-edge train FOLDER backbone=package:{shlex.quote(str(output))}")
