"""Deployment targets: one YAML file per board, with its limits and supported features.

The engine is built on the device; the target determines the precision of the graph and allows unsupported bundles to be
refused before they are sent. The figures are from NVIDIA's support matrices of JetPack and TensorRT.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

import yaml

from ssd_edge.errors import InputError, did_you_mean

KINDS = ("jetson", "cuda", "cpu")
SHARE_OF_MEMORY = 0.5  # on a Jetson, GPU, system and camera share the memory

Range = tuple[str | None, str | None]


@dataclasses.dataclass(frozen=True)
class Target:
    """A deployment target.

    Versions are dotted numbers; ranges are (oldest, newest), with None for no limit.

    Attributes:
        name: Name of the YAML file.
        title: Description.
        kind: One of `KINDS`.
        aliases: Further names.
        board: Text in ``/proc/device-tree/model``. Empty: any.
        jetpack: Range of JetPack versions. None if not a Jetson.
        l4t: Range of Jetson Linux releases.
        python: Range of Python versions.
        tensorrt: Range of TensorRT versions, which may end with an unreleased one. None without a GPU.
        compute_capability: Compute capabilities of the GPUs. Empty: any.
        opset: Newest opset that the parser supports.
        memory_mb: Memory of the smallest module, MiB.
        precisions: Supported precisions, fastest first.
        default_precision: One of `precisions`.
    """

    name: str
    title: str
    kind: str
    python: Range
    opset: int
    memory_mb: int
    precisions: tuple[str, ...]
    default_precision: str
    aliases: tuple[str, ...] = ()
    board: str = ""
    jetpack: Range | None = None
    l4t: Range | None = None
    tensorrt: Range | None = None
    compute_capability: tuple[str, ...] = ()

    @property
    def budget_mb(self) -> int:
        """Memory that SSD-Edge may use, MiB."""
        return int(self.memory_mb * SHARE_OF_MEMORY)


@functools.cache
def targets() -> Mapping[str, Target]:
    """Return all targets by name, sorted by kind and name."""
    found: dict[str, Target] = {}
    for file in sorted(resources.files(__name__).iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            found[file.name[:-5]] = _target(file.name[:-5], yaml.safe_load(file.read_text("utf-8")))
    return {name: found[name] for name in sorted(found, key=lambda name: (KINDS.index(found[name].kind), name))}


def _target(name: str, raw: dict[str, Any]) -> Target:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
    target = Target(name=name, **fields)
    consistent = (
        target.kind in KINDS
        and target.default_precision in target.precisions
        and (target.kind == "cpu") == (target.tensorrt is None)
        and (target.kind == "jetson") == (target.jetpack is not None)
    )
    if not consistent:
        raise ValueError(f"the target {name} contradicts itself: {target}")
    return target


def get(name: str) -> Target:
    """Return the target with a name or alias.

    Raises:
        InputError: The target is unknown. The message suggests similar names.
    """
    known = targets()
    for target in known.values():
        if name in (target.name, *target.aliases):
            return target
    names = [*known, *(alias for target in known.values() for alias in target.aliases)]
    raise InputError(f"unknown target '{name}'.{did_you_mean(name, names)} Known: {', '.join(known)}")


def check_precision(target: Target, precision: str) -> None:
    """Check that a target supports a precision.

    Raises:
        InputError: It does not.
    """
    if precision not in target.precisions:
        reason = ", because ONNX Runtime has no kernels for it on a CPU" if target.kind == "cpu" else ""
        raise InputError(
            f"the target {target.name} does not support {precision}{reason}; "
            f"choose one of: {', '.join(target.precisions)}"
        )


def check_opset(target: Target, opset: int) -> None:
    """Check that a target's parser supports an opset.

    Raises:
        InputError: It does not.
    """
    if opset > target.opset:
        raise InputError(
            f"the backbone has opset {opset}, but the target {target.name} supports up to {target.opset}; "
            "export it again with opset 18"
        )


def within(version: str, bounds: Range | None) -> bool:
    """Return True if a dotted version is in a range; the newest version includes its patch releases.

    Example:
        >>> within("10.3.0.30", ("10.3", "10.16"))
        True
    """
    if bounds is None:
        return True
    oldest, newest = bounds
    found = numbers(version)
    low = oldest is None or found >= numbers(oldest)
    return low and (newest is None or found[: len(numbers(newest))] <= numbers(newest))


def numbers(version: str) -> tuple[int, ...]:
    """Parse the leading numbers of a version, e.g. ``10.3.0+cu12`` → ``(10, 3, 0)``."""
    match = re.match(r"\d+(\.\d+)*", version.strip())
    return tuple(int(part) for part in match[0].split(".")) if match else ()
