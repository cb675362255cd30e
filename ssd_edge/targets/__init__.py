"""What a bundle can be prepared for: one small YAML file a target, with what that board has and takes.

The engine is built on the device, where the device is known; a target decides the precision in the graph, and what
can be refused before anything is sent there. Figures are NVIDIA's (support matrices of JetPack and TensorRT); memory is
that of the smallest module of the name.
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
SHARE_OF_MEMORY = 0.5  # a Jetson's memory is shared with the GPU, the system and the camera

Range = tuple[str | None, str | None]


@dataclasses.dataclass(frozen=True)
class Target:
    """One target; versions are dotted numbers, ranges (oldest, newest), None where there is no limit.

    Attributes:
        name: of the file.
        title: in words.
        kind: one of `KINDS`.
        aliases: further names.
        board: what ``/proc/device-tree/model`` says of it; empty where it does not matter.
        jetpack: range; None except for a Jetson.
        l4t: range of the Jetson Linux release.
        python: range.
        tensorrt: range; a newer minor version than the last that was released is no mistake. None without a GPU.
        compute_capability: of the GPUs; empty: any.
        opset: newest that its parser takes.
        memory_mb: of the smallest module, MiB.
        precisions: that it can run, fastest first.
        default_precision: one of them.
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
        """What SSD-Edge may take of its memory, MiB."""
        return int(self.memory_mb * SHARE_OF_MEMORY)


@functools.cache
def targets() -> Mapping[str, Target]:
    """Name → target, the plainest first."""
    found = {}
    for file in sorted(resources.files(__name__).iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            found[file.name[:-5]] = _target(file.name[:-5], yaml.safe_load(file.read_text("utf-8")))
    return {name: found[name] for name in sorted(found, key=lambda name: (KINDS.index(found[name].kind), name))}


def _target(name: str, raw: dict[str, Any]) -> Target:
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
    target = Target(name=name, **fields)
    right = (
        target.kind in KINDS
        and target.default_precision in target.precisions
        and (target.kind == "cpu") == (target.tensorrt is None)
        and (target.kind == "jetson") == (target.jetpack is not None)
    )
    if not right:
        raise ValueError(f"the target {name} contradicts itself: {target}")
    return target


def get(name: str) -> Target:
    """The target of this name or alias.

    Raises:
        InputError: there is none; names the nearest.
    """
    known = targets()
    for target in known.values():
        if name in (target.name, *target.aliases):
            return target
    names = [*known, *(alias for target in known.values() for alias in target.aliases)]
    raise InputError(f"unknown target '{name}'.{did_you_mean(name, names)} Known: {', '.join(known)}")


def check_precision(target: Target, precision: str) -> None:
    """Refuse a precision that this target does not run.

    Raises:
        InputError: with what it runs.
    """
    if precision not in target.precisions:
        reason = ", because ONNX Runtime has no kernels for it on a CPU" if target.kind == "cpu" else ""
        raise InputError(
            f"the target {target.name} does not run {precision}{reason}; choose one of: {', '.join(target.precisions)}"
        )


def check_opset(target: Target, opset: int) -> None:
    """Refuse a graph that the target's parser may not know.

    Raises:
        InputError: with both opsets.
    """
    if opset > target.opset:
        raise InputError(
            f"the backbone has opset {opset}, but the target {target.name} takes up to {target.opset}; "
            f"export it again with opset 18"
        )


def within(version: str, bounds: Range | None) -> bool:
    """Whether a dotted version lies in a range; the end covers all of its patch releases.

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
    """The leading numbers of a version: ``10.3.0+cu12`` → ``(10, 3, 0)``."""
    match = re.match(r"\d+(\.\d+)*", version.strip())
    return tuple(int(part) for part in match[0].split(".")) if match else ()
