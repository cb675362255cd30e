"""A committed generation, verified before it is used."""

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
from ssd_edge.files import Tree

VERSION = 1
RECORD = "generation.json"
# Only these errors are damage. After any other, such as missing permission, too many open files or a network share that
# does not respond, no other generation may replace the current one and nothing may be repaired.
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.EIO, errno.EBADMSG, errno.EUCLEAN)


@dataclasses.dataclass(frozen=True)
class Generation:
    """A committed generation, verified when it was opened; each file is verified again when it is read.

    Attributes:
        number: 1, 2, …; never reused in a root.
        parent: Number of the generation it was learned from; None for an installed one.
        origin: ``install`` or ``learn``.
        created_utc: Wall clock time of the commit; a device without a clock battery starts in 1970.
        backbone: SHA-256 of the backbone that computes its embeddings.
        info: What the caller of `Generations.commit` recorded.
        files: File name → {"size", "sha256"}.
        path: Its folder.
        tree: The files of the store.
        fallback: One sentence on why it replaces the current generation, to be shown to the user; usually empty.
    """

    number: int
    parent: int | None
    origin: str
    created_utc: str
    backbone: str
    info: dict[str, Any]
    files: dict[str, dict[str, Any]]
    path: Path
    tree: Tree = dataclasses.field(compare=False, repr=False)
    fallback: str = ""

    def read(self, name: str) -> bytes:
        """Return the bytes of a file of this generation.

        Raises:
            InputError: It has no file of that name.
            BundleRefusedError: The file is missing or differs from what was committed.
        """
        if name not in self.files:
            raise InputError(f"{self.path} has no file '{name}'; it has: {', '.join(sorted(self.files))}")
        path, stated = self.path / name, self.files[name]["sha256"]
        data = _read(self.tree, path)
        if (found := files.sha256(data)) != stated:
            raise BundleRefusedError(f"{path} is damaged: its sha256 is {found[:12]}…, not {stated[:12]}…")
        return data

    def tensors(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return arrays and metadata of a safetensors file; raises as `read`, also for NaN or infinity."""
        return files.parse_tensors(self.read(name), str(self.path / name))

    @property
    def registry(self) -> ClassRegistry:
        """The classes by row."""
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


def open_generation(tree: Tree, path: Path, number: int) -> Generation:
    """Read the generation in a folder and verify every file of it.

    Raises:
        BundleRefusedError: It is missing or damaged, has another number, or needs a newer version.
        EnvironmentUnfitError: See `check_damage`.
    """
    raw = _read(tree, path / RECORD)
    try:
        record = json.loads(raw)
        body = {key: value for key, value in record.items() if key != "digest"}
        if sealed(body) != raw:
            raise ValueError("it does not match its own digest")
        if (version := body.pop("version", None)) != VERSION:
            raise ValueError(f"it has version {version}, but this SSD-Edge reads {VERSION}; upgrade it")
        if body.get("number") != number:
            raise ValueError(f"it is of generation {body.get('number')}")
        generation = Generation(**body, path=path, tree=tree)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BundleRefusedError(f"{path / RECORD} is refused: {error}") from error
    for name in generation.files:
        generation.read(name)
    return generation


def sealed(body: Mapping[str, Any]) -> bytes:
    """Return the canonical bytes of a generation.json, with a digest that detects any flipped bit."""
    return files.json_bytes({**body, "digest": files.sha256(files.json_bytes(body))})


def check_damage(path: Path, error: OSError) -> None:
    """Raise if a read error is not damage, such as missing permission or too many open files.

    Raises:
        EnvironmentUnfitError: The file cannot be read by this process at the moment.
    """
    if error.errno not in _DAMAGE:
        raise EnvironmentUnfitError(
            f"{path} cannot be read: {error.strerror}; that does not mean damage: try again, as the user that "
            "installed it"
        ) from error


def _read(tree: Tree, path: Path) -> bytes:
    """Return the bytes of a file that must exist."""
    try:
        return tree.read(path)
    except OSError as error:
        check_damage(path, error)
        raise BundleRefusedError(f"{path} cannot be read: {error.strerror}") from error
