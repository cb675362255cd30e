"""Command ``ssd-edge evaluate``."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ssd_edge.cli.options import JSON, echo, log, print_json, progress_line, with_folder

if TYPE_CHECKING:
    from device_runtime.device import Observation
    from ssd_edge.config import DataConfig
    from ssd_edge.run.results import Evaluation

BATCH = 64  # images that are decoded and embedded at a time on a device


@click.command()
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL")
@click.option(
    "--report", type=click.Path(path_type=Path), metavar="FILE", help="Write an HTML report with photographs."
)
@JSON
@click.argument("words", nargs=-1, metavar="[FOLDER] [DATA.KEY=VALUE]...")
def evaluate(model: Path, report: Path | None, as_json: bool, words: tuple[str, ...]) -> None:
    """Evaluate MODEL: the folder of a finished run, a bundle, or the root of a device.

    \b
    ssd-edge evaluate runs/1                        on its own test images
    ssd-edge evaluate runs/1 FOLDER                 on FOLDER/test, or FOLDER/<class>/*.jpg
    ssd-edge evaluate robot.ssdedge FOLDER --report report.html
    ssd-edge evaluate /data/ssd-edge FOLDER         what the device would answer; it is not changed
    """
    from ssd_edge.errors import InputError
    from ssd_edge.files import exists, is_file, write_text

    overrides = with_folder(words)
    for override in overrides:
        if not override.startswith("data."):
            raise InputError(f"'{override}': only settings of the section data can be changed here; leave it out")
    if is_file(model) or exists(model / "CURRENT"):
        result = _deployed(model, overrides)
    else:
        result = _run(model, overrides, report is not None)
    if report is not None:
        from ssd_edge.report.html import render

        write_text(report, render(result.results))
    if as_json:
        print_json(result.to_dict())
        return
    answers, known = result.results.answers, dict(enumerate(result.results.classes))
    counts = {name: (answers.truth == row).sum() for row, name in known.items()}
    for name, accuracy in sorted(result.class_accuracy.items(), key=lambda item: item[1]):
        echo(f"{100 * accuracy:5.1f} %  {name} ({counts[name]} {'image' if counts[name] == 1 else 'images'})")
    echo(f"{100 * result.accuracy:5.1f} %  all {result.images:,} images of {result.data} ({result.which})")
    if report is not None:
        echo(f"report: {report}")


def _run(folder: Path, overrides: tuple[str, ...], reported: bool) -> Evaluation:
    """Evaluate a finished run; a report on its own images can do without them."""
    from ssd_edge.config import merge
    from ssd_edge.errors import InputError
    from ssd_edge.files import exists
    from ssd_edge.report.terminal import Console
    from ssd_edge.run import evaluate as evaluation
    from ssd_edge.run import report, storage

    config = storage.open_folder(folder)
    if overrides:
        config = evaluation.with_data(config, merge({}, overrides)["data"])
    try:
        return evaluation.evaluate(folder, config, Console(sys.stderr))
    except InputError as error:
        if overrides or not reported or not exists(folder / report.FILE):
            raise
        log(f"warning: {error}; the report shows what the run has kept")
        return evaluation.without_images(folder, str(error))


def _deployed(model: Path, overrides: tuple[str, ...]) -> Evaluation:
    """Evaluate a device, or a bundle as the device would be on which it is installed."""
    from ssd_edge.config import DataConfig, merge, parse_section
    from ssd_edge.errors import InputError
    from ssd_edge.files import is_file

    data = parse_section(DataConfig, merge({}, overrides).get("data", {}), "data")
    if not any(override.startswith("data.path=") for override in overrides):
        raise InputError(f"{model} has no images of its own; name a folder of test images: FOLDER/<class>/*.jpg")
    if not is_file(model):
        return _on_device(model, model, data)
    from device_runtime.install.bundle import install

    with tempfile.TemporaryDirectory(prefix="ssd-edge-") as root:
        install(root, model, say=log)
        return _on_device(Path(root), model, data)


def _on_device(root: Path, model: Path, data: DataConfig) -> Evaluation:
    """Return what a device answers to the test images of a data set, or to all if it has no test split."""
    import numpy as np

    from device_runtime.device import Device
    from ssd_edge.data.datasets import arrange, read_source
    from ssd_edge.report.results import Answers, Results
    from ssd_edge.run.evaluate import rows_of
    from ssd_edge.run.results import Evaluation

    name, source = read_source(data.path)
    if source.test is None:
        source = dataclasses.replace(source, test=source.train, split="all images")
    dataset = arrange(name, source, data, seed=0)
    with Device.open(root) as device:
        entries = device.registry.entries
        truth = rows_of(dataset, device.classes, "device")[dataset.test_labels]
        seen: list[Observation] = []
        with progress_line() as watcher:
            for batch in dataset.test.batches(device.bundle.pixels, BATCH):
                done = BATCH * len(seen)
                seen.append(device.observe(list(batch), names=dataset.test.names[done : done + len(batch)]))
                if watcher is not None:
                    watcher("answering", (done + len(batch)) / len(truth), None)
        snapshot = device.snapshot
        vectors = np.concatenate([part.embeddings for part in seen])
        sure = [prediction.score for part in seen for prediction in part.predictions]
        answers = Answers.of(
            dataset.test.names,
            truth,
            snapshot.scores(vectors),
            None if None in sure else np.array(sure),
            lambda rows: snapshot.unknown.margins(vectors, rows),
        )
        results = Results(
            model=f"{device.bundle.name}, generation {device.generation.number}",
            data=dataset.name,
            which=dataset.split,
            classes=tuple(entry.name for entry in entries),
            learned=tuple(entry.images for entry in entries),
            answers=answers,
            photographs=dataset.test,
            record={
                "bundle": device.bundle.name,
                "release": device.bundle.release,
                "precision": device.bundle.precision,
                "generation": device.generation.number,
                "evaluated": str(model),
            },
        )
    return Evaluation(str(model), results)
