"""One committed state of a device: read, and verified before anything of it is used."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ssd_edge import files
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError

VERSION = 1
RECORD = "generation.json"
# Reading fails for want of these, not because anything is damaged: nothing may stand in or be repaired for it.
_NOT_DAMAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM)


@dataclasses.dataclass(frozen=True)
class Generation:
    """One committed state, verified when it was opened; a file is verified again when it is read.

    Attributes:
        number: 1, 2, …; never used twice in a root.
        parent: the generation it was learned from; None for an installed one.
        origin: ``install`` or ``learn``.
        created_utc: the wall clock at the commit; a device without a clock battery starts in 1970.
        backbone: sha256 of the backbone whose embeddings it understands.
        info: what the caller of `Generations.commit` gave.
        files: name → {"size", "sha256"}.
        path: its folder.
        fallback: empty, or one sentence: why this one stands in for the current one. Show it.
    """

    number: int
    parent: int | None
    origin: str
    created_utc: str
    backbone: str
    info: dict[str, Any]
    files: dict[str, dict[str, Any]]
    path: Path
    fallback: str = ""

    def read(self, name: str) -> bytes:
        """The bytes of a file of this generation.

        Raises:
            InputError: it has no file of that name.
            BundleRefusedError: the file is missing or not what was committed.
        """
        if name not in self.files:
            raise InputError(f"{self.path} has no file '{name}'; it has: {', '.join(sorted(self.files))}")
        path, stated = self.path / name, self.files[name]["sha256"]
        data = _read(path)
        if (found := files.sha256(data)) != stated:
            raise BundleRefusedError(f"{path} is damaged: its sha256 is {found[:12]}…, not {stated[:12]}…")
        return data

    def tensors(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays and metadata of a safetensors file; raises like `read`, also on NaN or infinity."""
        return files.parse_tensors(self.read(name), str(self.path / name))

    @property
    def registry(self) -> ClassRegistry:
        """The classes, in the order of the learner's rows."""
        return ClassRegistry.from_json(json.loads(self.read("classes.json")))


@dataclasses.dataclass(frozen=True)
class GenerationSummary:
    """A generation in `Generations.list`.

    Attributes:
        number: Its number.
        current: True if it is the current one.
        intact: False if it is damaged.
        problem: Description of the damage; empty if it is intact.
        parent: The generation that it was learned from; None for an installed one.
        origin: ``install`` or ``learn``; this and what follows are None if it is damaged.
        created_utc: Wall clock time of the commit.
        backbone: SHA-256 of its backbone.
        info: What the caller of `Generations.commit` recorded.
    """

    number: int
    current: bool
    intact: bool
    problem: str
    parent: int | None = None
    origin: str | None = None
    created_utc: str | None = None
    backbone: str | None = None
    info: Mapping[str, Any] | None = None


def open_generation(path: Path, number: int) -> Generation:
    """Read and verify the generation in a folder, every file of it.

    Raises:
        BundleRefusedError: it is missing, damaged, of another number, or of a newer version.
        EnvironmentUnfitError: see `check_damage`.
    """
    raw = _read(path / RECORD)
    try:
        record = json.loads(raw)
        body = {key: value for key, value in record.items() if key != "digest"}
        if sealed(body) != raw:
            raise ValueError("it does not match its own digest")
        if (version := body.pop("version", None)) != VERSION:
            raise ValueError(f"it has version {version}, but this SSD-Edge reads {VERSION}; upgrade it")
        if body.get("number") != number:
            raise ValueError(f"it is of generation {body.get('number')}")
        generation = Generation(**body, path=path)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BundleRefusedError(f"{path / RECORD} is refused: {error}") from error
    for name in generation.files:
        generation.read(name)
    return generation


def sealed(body: Mapping[str, Any]) -> bytes:
    """The one byte form of a generation.json: any flipped bit makes it another one."""
    return files.json_bytes({**body, "digest": files.sha256(files.json_bytes(body))})


def check_damage(path: Path, error: OSError) -> None:
    """Tell what is damaged from what this process cannot read now, or may not.

    Raises:
        EnvironmentUnfitError: the latter.
    """
    if error.errno in _NOT_DAMAGE:
        raise EnvironmentUnfitError(
            f"{path} cannot be read: {error.strerror}; that does not mean damage: try again, as the user that "
            "installed it"
        ) from error


def _read(path: Path) -> bytes:
    """A file that must be there: that it cannot be read is damage, not a user's mistake."""
    try:
        return path.read_bytes()
    except OSError as error:
        check_damage(path, error)
        raise BundleRefusedError(f"{path} cannot be read: {error.strerror}") from error
