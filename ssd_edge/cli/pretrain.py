"""``ssd-edge pretrain``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ssd_edge.cli.options import CONFIG, OVERRIDES, echo, log, read_tree, said_once
from ssd_edge.system import ranks

if TYPE_CHECKING:
    from ssd_edge.backbones.ranks import Ranks
    from ssd_edge.config import PretrainConfig


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
    from ssd_edge.errors import InputError
    from ssd_edge.files import exists

    with said_once():
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
        if student and ranks()[1] > 1:
            raise InputError("pretrain --student works in one process; start it without torchrun")
        if student and not exists(package):
            raise InputError(f"{package} does not exist; --student needs an existing backbone package")
    from ssd_edge.backbones.ranks import joined

    with joined() as together:
        _pretrain(config, package, student, together)


def _pretrain(config: PretrainConfig, package: Path, student: bool, together: Ranks) -> None:
    """Train a package, or its keys alone, and write it; processes other than that of rank 0 only train."""
    from ssd_edge.backbones import checkpoint
    from ssd_edge.backbones import package as packages
    from ssd_edge.backbones.pretrain import pretrain_backbone, retrain_student
    from ssd_edge.backbones.ranks import CONTINUES
    from ssd_edge.backbones.supervised import train_backbone
    from ssd_edge.data import load
    from ssd_edge.errors import printable
    from ssd_edge.files import make_directory
    from ssd_edge.run.train import pick_device, set_threads

    set_threads(config.train.threads)
    device = together.start(pick_device(config.train.device))
    if together.rank > 0:
        train_backbone(None, None, config.train, device, lambda *_: None, together)
        return
    dataset = load(config.data, config.train.seed)
    command = printable(shlex.join(["ssd-edge", *sys.argv[1:]]))  # a file name in it may be any bytes
    if student:
        trained = retrain_student(packages.load(package), config, dataset, device, log)
        trained = packages.with_card(trained, student_command=command)
    else:
        make_directory(package)  # before the training, so that an unusable folder is reported at once
        try:
            trained = pretrain_backbone(config, dataset, device, command, package, log, together)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(CONTINUES if checkpoint.is_in(package) else "") from None
    size = packages.save(trained, package)
    if not student:
        checkpoint.remove(package)
    echo(f"{package}: {size / 1e6:.1f} MB, identity {trained.identity}")
    echo(f"next: ssd-edge train backbone=package:{package} data.path=…")
