"""Checks of a whole store: what is damaged, what a cut left behind, what is odd. And their repair."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from device_runtime.store.generations import Generations, remove
from device_runtime.store.journal import Journal
from device_runtime.store.record import Generation
from ssd_edge import files
from ssd_edge.errors import BundleRefusedError, InputError

DAMAGE, LEFTOVER, NOTE = "damage", "leftover", "note"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        path: below the root.
        problem: what is wrong and, where there is something to do, what.
        severity: ``damage``: something that was stored is lost or in danger; ``leftover``: what a cut left, of no
            use; ``note``: harmless.
        repaired: whether it is gone after the repair.
    """

    path: str
    problem: str
    severity: str
    repaired: bool = False


def check(store: Generations) -> list[Finding]:
    """Read and verify every file of a store.

    Raises:
        InputError: nothing is installed.
        EnvironmentUnfitError: a file cannot be read for a reason that lies in this process.
    """
    if not store.numbers() and not store.journal() and not (store.root / "CURRENT").exists():
        raise InputError(f"no bundle is installed in {store.root}; run: ssd-edge device install BUNDLE")
    opened: dict[int, Generation] = {}
    problems: dict[int, str] = {}
    for number in store.numbers():
        try:
            opened[number] = store.open(number)
        except BundleRefusedError as error:
            problems[number] = str(error)
    found = [
        *_current(store, opened),
        *_generations(store, opened, problems),
        *_backbones(store, opened, problems),
        *_journal(store, Journal(store.root / "journal.jsonl")),
        *_leftovers(store.root),
        *_engines(store.root / "engines"),
    ]
    return [dataclasses.replace(one, path=os.path.relpath(one.path, store.root)) for one in found]


def repair(store: Generations) -> list[Finding]:
    """Verify a store, and repair what can be repaired.

    Remove what cuts left behind, complete the journal, and point CURRENT to the generation that stands in; where no
    older one is intact, to the next newer. Nothing that is intact is deleted.

    Raises:
        InputError: nothing is installed.
        EnvironmentUnfitError: someone else is writing, or the root is not writable.
    """
    if store.writing:
        raise RuntimeError("repair outside of 'with generations.writer():', which already repairs some of it")
    if not store.root.is_dir():
        store.check_installed()
    with store.writer(recover=False):
        before = check(store)
        store.recover()
        opened = store.intact()
        pointer = store.pointer()
        if pointer not in opened and opened:
            best = next((n for n in store.candidates(pointer) if n in opened), min(opened))
            store.switch(best, "repaired", info={"from": pointer})
        for path in _unused_backbones(store, opened):
            remove(path)
        Journal(store.root / "journal.jsonl").drop_unreadable()
        left = {(one.path, one.problem) for one in check(store)}
    return [dataclasses.replace(one, repaired=(one.path, one.problem) not in left) for one in before]


def _unused_backbones(store: Generations, opened: dict[int, Generation]) -> list[Path]:
    """Backbones that no generation refers to; none while a damaged generation may be the one that does."""
    if len(opened) < len(store.numbers()):
        return []
    needed = {generation.backbone for generation in opened.values()}
    return [path for path in store.backbones() if path.stem not in needed]


def _current(store: Generations, opened: dict[int, Generation]) -> Iterator[Finding]:
    path, number = str(store.root / "CURRENT"), store.pointer()
    if number is None:
        yield Finding(path, "it is missing or damaged, so that a stand-in is used; repair it", DAMAGE)
    elif number not in opened:
        kind = "damaged" if number in store.numbers() else "missing"
        yield Finding(path, f"it names generation {number}, which is {kind}; repair it", DAMAGE)


def _generations(store: Generations, opened: dict[int, Generation], problems: dict[int, str]) -> Iterator[Finding]:
    for number, problem in problems.items():
        told = f"{problem}; it cannot be restored and stays until it is pruned"
        yield Finding(str(store.folder(number)), told, DAMAGE)
    known = {event["generation"] for event in store.journal()} | {store.pointer()}
    for number, generation in opened.items():
        if number not in known:
            told = "it is intact, but not in the journal: that was lost, or a cut came before this became current"
            yield Finding(str(generation.path), told, NOTE)
        for path in sorted(generation.path.iterdir()):
            if path.name not in (*generation.files, "generation.json"):
                told = f"generation {number} has no such file; remove it if nobody needs it"
                yield Finding(str(path), told, NOTE)
    for path in sorted(store.root.glob("generations/*")):
        if path not in map(store.folder, store.numbers()) and not path.name.startswith(files.TEMPORARY_PREFIX):
            yield Finding(str(path), "it is no generation; remove it if nobody needs it", NOTE)


def _backbones(store: Generations, opened: dict[int, Generation], problems: dict[int, str]) -> Iterator[Finding]:
    users: dict[str, list[int]] = {}
    for number, generation in opened.items():
        users.setdefault(generation.backbone, []).append(number)
    unused = _unused_backbones(store, opened)
    for digest in sorted({*users, *(path.stem for path in store.backbones())}):
        path = store.root / "backbones" / f"{digest}.onnx"
        if path in unused:
            yield Finding(str(path), "no generation refers to it", LEFTOVER)
            continue
        try:
            store.backbone_path(digest)
        except BundleRefusedError as error:
            numbers = ", ".join(map(str, users.get(digest, sorted(problems))))
            yield Finding(str(path), f"{error}; generations that need it: {numbers}", DAMAGE)
    for path in sorted(store.root.glob("backbones/*")):
        if path not in store.backbones() and not path.name.startswith(files.TEMPORARY_PREFIX):
            yield Finding(str(path), "it is no backbone; remove it if nobody needs it", NOTE)


def _journal(store: Generations, journal: Journal) -> Iterator[Finding]:
    path, lines, events = str(journal.path), journal.lines(), journal.events()
    unreadable = [place for place, (_, event) in enumerate(lines, 1) if event is None]
    if not journal.is_whole():
        yield Finding(path, f"a cut has ended line {len(lines)} early", LEFTOVER)
        unreadable = [place for place in unreadable if place != len(lines)]
    if unreadable:
        yield Finding(path, f"cannot read line {', '.join(map(str, unreadable))}; states are not affected", DAMAGE)
    before = 0
    for seq in (event["seq"] for event in events):
        if seq > before + 1:
            yield Finding(path, f"events {before + 1} to {seq - 1} are lost; states are not affected", NOTE)
        elif seq <= before:
            yield Finding(path, f"event {seq} comes after event {before}: someone has changed the file", NOTE)
        before = seq
    number = store.pointer()
    if number and (not events or events[-1]["generation"] != number):
        yield Finding(path, f"it lacks that generation {number} is current", LEFTOVER)


def _leftovers(root: Path) -> Iterator[Finding]:
    for folder in (root, root / "generations", root / "backbones"):
        for path in sorted(folder.glob(f"{files.TEMPORARY_PREFIX}*")):
            yield Finding(str(path), "a cut has left it, or someone is writing it now", LEFTOVER)


def _engines(folder: Path) -> Iterator[Finding]:
    if not os.path.lexists(folder):
        return
    about = folder.lstat()
    told = "; remove it: engines are built again"
    if not stat.S_ISDIR(about.st_mode):
        yield Finding(str(folder), f"it is not a folder{told}", DAMAGE)
    elif about.st_uid != os.geteuid():
        yield Finding(str(folder), f"it belongs to user {about.st_uid}, but this is user {os.geteuid()}{told}", DAMAGE)
    elif about.st_mode & 0o077:
        # Only who else can write is a danger: an engine is a program.
        severity = DAMAGE if about.st_mode & 0o022 else NOTE
        yield Finding(str(folder), f"its mode is {stat.S_IMODE(about.st_mode):o}, not 700{told}", severity)
