"""``ssd-edge device …``: the group. Every module of this folder is a verb, named like its command."""

from __future__ import annotations

import importlib
import os
import pkgutil

import click


@click.group()
def device() -> None:
    """Install, predict, learn and undo on a device."""
    # Both are read by PyTorch when it is loaded. By default it uses one thread per core that the process may use, and
    # the last bits of a product depend on that number: a service bound to one core would give other scores than a
    # command that is not.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # By default idle threads spin, which makes a learn several times slower when other processes are running.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


for _module in pkgutil.iter_modules(__path__):
    device.add_command(getattr(importlib.import_module(f"{__name__}.{_module.name}"), _module.name))
