"""Which generations and backbones of a store can go, and how they go.

Nothing is deleted that the device uses or would fall back to now. A folder loses its name, durably, before the first
of its files goes: whenever the power is cut, what has a name is whole.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ssd_edge import files
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError

if TYPE_CHECKING:
    from device_runtime.store.generations import Generation, Generations

KEEP = 10  # generations, unless $SSD_EDGE_KEEP says otherwise; those in use and the last installed one stay anyway
MIB = 2**20
EVENTS = 1000  # of the journal: a year of three learns a day; its installations stay whatever their age

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Pruned:
    """What `Generations.prune` deleted.

    Attributes:
        generations: their numbers.
        backbones: sha256 of those that no generation needs any more.
        freed_bytes: of their files.
        left_bytes: of the generations and backbones that stay.
    """

    generations: tuple[int, ...]
    backbones: tuple[str, ...]
    freed_bytes: int
    left_bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to go, in this order: generations, oldest first, then backbones."""

    pointer: int
    pruned: Pruned
    paths: tuple[Path, ...]


def tidy(store: Generations) -> None:
    """Delete old generations and events after a commit; with the root held for writing.

    The newest ``$SSD_EDGE_KEEP`` generations stay (`KEEP`), as many of them as ``$SSD_EDGE_DISK_MB`` has room for.
    """
    keep, budget = _number("SSD_EDGE_KEEP"), _number("SSD_EDGE_DISK_MB")
    try:
        store.prune(keep or KEEP, budget and budget * MIB)
        store.shorten_journal(EVENTS)
    except EnvironmentUnfitError as error:  # the commit has happened, and the next one tries again
        log.warning("old generations were not deleted: %s", error)


def _number(name: str) -> int | None:
    """A whole number above 0 from the environment; what is none is said and left out, as the commit has happened."""
    text = os.environ.get(name, "")
    if not text:
        return None
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    log.warning("%s is %r, but must be a whole number above 0; it is left out", name, text)
    return None


def plan(store: Generations, keep: int, budget_bytes: int | None) -> Plan:
    """What `Generations.prune` would delete now; changes nothing.

    Raises:
        InputError: nothing is installed, or `keep` or the budget is out of range.
        BundleRefusedError: no generation is fit for use; all may be needed to find a way out.
    """
    if keep < 1 or (budget_bytes is not None and budget_bytes < 0):
        raise InputError(f"keep must be at least 1 and the budget at least 0, not {keep} and {budget_bytes}")
    in_use = store.current().number
    pointer = store.pointer() or in_use
    numbers, intact = store.numbers(), opened(store)
    installed = [n for n, generation in intact.items() if generation.parent is None]
    stand_in = next((n for n in store.candidates(in_use)[1:] if n in intact), in_use)
    # The last one of all keeps its number from being given again.
    bound = {in_use, pointer, stand_in, numbers[-1], *installed[-1:]}
    sizes = {path: _size(path) for path in (*map(store.folder, numbers), *store.backbones())}

    def kept(stays: Iterable[int]) -> list[Path]:
        stays = set(stays)
        needed = {intact[n].backbone for n in stays if n in intact}
        unknown = not stays <= set(intact)  # nobody can say which backbone a damaged one needs
        folders = [store.folder(n) for n in numbers if n in stays]
        return folders + [path for path in store.backbones() if unknown or path.stem in needed]

    oldest_kept = list(intact)[-keep:][0]
    stays = [n for n in numbers if n in bound or n >= oldest_kept]
    for number in [n for n in stays if n not in bound]:
        if budget_bytes is not None and sum(sizes[path] for path in kept(stays)) > budget_bytes:
            stays.remove(number)
    left = kept(stays)
    paths = tuple(path for path in sizes if path not in left)
    return Plan(
        pointer,
        Pruned(
            tuple(n for n in numbers if n not in stays),
            tuple(path.stem for path in paths if path.suffix == ".onnx"),
            sum(sizes[path] for path in paths),
            sum(sizes[path] for path in left),
        ),
        paths,
    )


def remove(path: Path) -> None:
    """Delete a generation's folder, or a backbone.

    Raises:
        EnvironmentUnfitError: the disk is read-only or forbidden, or what it holds does not let itself be deleted.
    """
    try:
        if path.suffix == ".onnx":
            path.unlink()
            files.fsync_directory(path.parent)
            return
        gone = path.with_name(f"{files.TEMPORARY_PREFIX}pruned-{path.name}")
        files.commit_directory(path, gone)  # `files.remove_directory` does not wait for the rename to be durable
        shutil.rmtree(gone, ignore_errors=True)  # what stays of it, the next writer removes
    except OSError as error:
        raise EnvironmentUnfitError(f"cannot delete {path}: {error.strerror}; run: ssd-edge doctor") from error


def opened(store: Generations) -> dict[int, Generation]:
    """The intact generations by their numbers, ascending."""
    found = {}
    for number in store.numbers():
        try:
            found[number] = store.open(number)
        except BundleRefusedError:
            continue
    return found


def _size(path: Path) -> int:
    members = [path] if path.is_file() else path.rglob("*")
    return sum(member.lstat().st_size for member in members if member.is_file())
