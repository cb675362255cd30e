"""Ray, as an engine for work that one machine would do in a loop: a cluster of this machine's cores, or one that runs.

Nothing of it is imported, started or listened to before `cluster` is entered.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from ssd_edge.errors import EnvironmentUnfitError, first_line, require
from ssd_edge.system import usable_cores

WORKER, HELPER = 0.9, 0.1  # shares of a core that a worker and a step that adds up take, so that one fits beside it
STORE = 512 << 20  # bytes for what is between two workers; beyond, Ray uses the disk
# A cluster of this machine listens on the loopback interface only, and asks for a token that is drawn for it. Ray reads
# these variables as it is imported, and would otherwise keep a token in the home folder.
PRIVATE = {
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray would report its use to its makers
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}
TOKEN = "RAY_AUTH_TOKEN"
PURPOSE = "use --engine ray"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A cluster that runs.

    Attributes:
        ray: The package.
        workers: Number of workers.
        gpus: Number of GPUs in it.
    """

    ray: Any
    workers: int
    gpus: int


@contextlib.contextmanager
def cluster(address: str = "", workers: int = 0) -> Iterator[Cluster]:
    """Use Ray for the duration of a block.

    Args:
        address: ``HOST:PORT`` of a cluster that runs, or ``auto``; empty: start one on this machine, and end it.
        workers: Number of workers; 0: one per core of the cluster.

    Raises:
        EnvironmentUnfitError: Ray is missing, or the cluster cannot be started or reached.
    """
    if not address:
        _make_private()
    ray = require("ray", "ray", PURPOSE)
    require("ray.data", "ray", PURPOSE)
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    with contextlib.ExitStack() as ends:
        if address:
            options["address"] = address
        else:
            folder = ends.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
            options |= {
                "address": "local",
                "num_cpus": workers or usable_cores(),
                "include_dashboard": False,
                "object_store_memory": STORE,
                "_temp_dir": folder,
            }
        try:
            ray.init(**options)
        except Exception as error:  # Ray raises what its parts raise
            where = f"the Ray cluster at {address} cannot be reached" if address else "Ray cannot be started"
            raise EnvironmentUnfitError(f"{where} ({first_line(error)}); use --engine local") from error
        ends.callback(ray.shutdown)
        resources = ray.cluster_resources()
        cores = int(resources.get("CPU", 0))
        if not cores:
            raise EnvironmentUnfitError(f"the Ray cluster at {address} has no CPU; start a node that has one")
        try:
            yield Cluster(ray, workers or cores, int(resources.get("GPU", 0)))
        except ray.exceptions.RayError as error:
            raise EnvironmentUnfitError(
                f"Ray gave up ({first_line(error)}); if memory was short, use fewer --workers"
            ) from error


def _make_private() -> None:
    """Set what keeps a cluster on this machine from others, for this process and its children.

    Raises:
        EnvironmentUnfitError: Ray has been imported already, without it.
    """
    if sys.modules.get("ray") is not None and any(os.environ.get(name) != value for name, value in PRIVATE.items()):
        raise EnvironmentUnfitError(
            "Ray was imported before SSD-Edge could keep it to this machine; start `ssd-edge` as a program, or name a "
            "cluster"
        )
    os.environ.update(PRIVATE)
    os.environ.setdefault(TOKEN, secrets.token_hex(32))
