"""``ssd-edge device …``: the group. Every module of this folder is a verb, named like its command."""

from __future__ import annotations

import importlib
import os
import pkgutil

import click


@click.group()
def device() -> None:
    """Install, predict, learn and undo on a device."""
    # Read by PyTorch when it is loaded. By default its idle threads spin, which makes a learn several times slower when
    # other processes are running.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


for _module in pkgutil.iter_modules(__path__):
    device.add_command(getattr(importlib.import_module(f"{__name__}.{_module.name}"), _module.name))
