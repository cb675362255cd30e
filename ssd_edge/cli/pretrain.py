"""``ssd-edge pretrain``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from ssd_edge.cli.options import CONFIG, OVERRIDES, echo, log, read_tree


@click.command()
@click.argument("package", type=click.Path(path_type=Path))
@CONFIG
@click.option("--student", is_flag=True, help="Keep the backbone of PACKAGE and retrain only its keys.")
@click.option("--classes", metavar="A:B", help="Classes to use, e.g. 0:100; short for data.classes.")
@OVERRIDES
def pretrain(
    package: Path, config_file: Path | None, student: bool, classes: str | None, overrides: tuple[str, ...]
) -> None:
    """Train a backbone package on labelled images.

    The package is written to the folder PACKAGE.

    \b
    ssd-edge pretrain my-backbone data.path=FOLDER train.epochs=24
    ssd-edge pretrain my-backbone data.path=FOLDER train.arch=convmixer train.epochs=60   (a GPU job)
    ssd-edge pretrain my-backbone --student data.path=FOLDER student.neurons=2000

    Then: ssd-edge train backbone=package:my-backbone data.path=…

    On one half of Tiny-ImageNet, with the other half as the stream:

    \b
    ssd-edge pretrain half --classes 0:100 data.path=tiny-imagenet-200.zip
    ssd-edge train backbone=package:half data.path=tiny-imagenet-200.zip data.classes=100:200
    """
    from ssd_edge.config import PretrainConfig, merge, parse
    from ssd_edge.errors import InputError, printable

    tree = read_tree(config_file, overrides)
    if classes is not None:
        configured = parse(PretrainConfig, tree).data.classes
        if configured:
            raise InputError(
                f"--classes is {classes}, but data.classes is {','.join(configured)}; leave one of them out"
            )
        tree = merge(tree, [f"data.classes={classes}"])
    config = parse(PretrainConfig, tree)
    if not config.data.path:
        raise InputError("pretrain needs images: set data.path=FOLDER (for its layout see ssd-edge train --help)")
    from ssd_edge.files import exists, make_directory

    if student and not exists(package):
        raise InputError(f"{package} does not exist; --student needs an existing backbone package")
    from ssd_edge.backbones import package as packages
    from ssd_edge.backbones.pretrain import pretrain_backbone, retrain_student
    from ssd_edge.data import load
    from ssd_edge.run.train import pick_device, set_threads

    set_threads(config.train.threads)
    device = pick_device(config.train.device)
    dataset = load(config.data, config.train.seed)
    command = printable(shlex.join(["ssd-edge", *sys.argv[1:]]))  # a file name in it may be any bytes
    if student:
        trained = retrain_student(packages.load(package), config, dataset, device, log)
        trained = packages.with_card(trained, student_command=command)
    else:
        make_directory(package)  # before the training, so that an unusable folder is reported at once
        trained = pretrain_backbone(config, dataset, device, command, log)
    size = packages.save(trained, package)
    echo(f"{package}: {size / 1e6:.1f} MB, identity {trained.identity}")
    echo(f"next: ssd-edge train backbone=package:{package} data.path=…")
