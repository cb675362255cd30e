"""``ssd-edge device …``: verbs that run on the device, one module each."""

from __future__ import annotations

import os

import click

from ssd_edge.cli.device.export import export
from ssd_edge.cli.device.forget import forget
from ssd_edge.cli.device.fsck import fsck
from ssd_edge.cli.device.history import history
from ssd_edge.cli.device.install import install
from ssd_edge.cli.device.learn import learn
from ssd_edge.cli.device.merge import merge
from ssd_edge.cli.device.merge_labels import merge_labels
from ssd_edge.cli.device.predict import predict
from ssd_edge.cli.device.rename import rename
from ssd_edge.cli.device.rollback import rollback
from ssd_edge.cli.device.status import status
from ssd_edge.cli.device.trust import trust
from ssd_edge.cli.device.watch import watch


@click.group()
def device() -> None:
    """Install, predict, learn and undo on a device."""
    # Read by PyTorch when it is loaded. By default its idle threads spin, which makes a learn several times slower when
    # other processes are running.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


device.add_command(install)
device.add_command(trust)
device.add_command(predict)
device.add_command(learn)
device.add_command(rollback)
device.add_command(status)
device.add_command(history)
device.add_command(fsck)
device.add_command(rename)
device.add_command(forget)
device.add_command(merge_labels)
device.add_command(export)
device.add_command(merge)
device.add_command(watch)
