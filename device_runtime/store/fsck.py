"""Check a store for damage, leftovers of a crash and foreign files, and repair it."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from device_runtime.store.generations import Generations
from device_runtime.store.journal import Journal
from device_runtime.store.record import Generation
from ssd_edge import files
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError

TRUSTED = "trusted"  # folder of the public keys that bundles must be signed with
DAMAGE, LEFTOVER, NOTE = "damage", "leftover", "note"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A problem in a store.

    Attributes:
        path: Path relative to the root.
        problem: Description, and what to do about it.
        severity: ``damage`` for lost or endangered data, ``leftover`` for useless remains of a crash, ``note`` for
            something harmless.
        repaired: True if `repair` has removed the problem.
    """

    path: str
    problem: str
    severity: str
    repaired: bool = False


def check(store: Generations) -> list[Finding]:
    """Verify every file of a store; nothing is changed.

    Raises:
        InputError: No bundle is installed.
        EnvironmentUnfitError: A file cannot be read by this process at the moment.
    """
    if not store.numbers() and not store.journal() and not store.tree.status(store.root / "CURRENT"):
        raise InputError(f"no bundle is installed in {store.root}; run: ssd-edge device install BUNDLE")
    opened: dict[int, Generation] = {}
    problems: dict[int, str] = {}
    for number in store.numbers():
        try:
            opened[number] = store.open(number)
        except BundleRefusedError as error:
            problems[number] = str(error)
    findings = [
        *_current(store, opened),
        *_generations(store, opened, problems),
        *_backbones(store, opened, problems),
        *_journal(store, Journal(store.root)),
        *_leftovers(store),
        *_engines(store, store.root / "engines"),
        *_access(store),
    ]
    return [dataclasses.replace(one, path=os.path.relpath(one.path, store.root)) for one in findings]


def repair(store: Generations) -> list[Finding]:
    """Verify a store and repair it.

    Removes leftovers of a crash, completes the journal, and sets CURRENT to the generation that replaces a damaged one,
    or to the next newer one if no older one is intact. Nothing intact is deleted.

    Returns:
        The findings before the repair; `Finding.repaired` says which of them are gone.

    Raises:
        InputError: No bundle is installed.
        EnvironmentUnfitError: Another process is writing, or the root is not writable.
    """
    if store.writing:
        raise RuntimeError("repair outside of 'with generations.writer():', which already repairs some of it")
    if not files.is_folder(store.root):
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
            store.remove(path)
        Journal(store.root).drop_unreadable()
        left = {(one.path, one.problem) for one in check(store)}
    return [dataclasses.replace(one, repaired=(one.path, one.problem) not in left) for one in before]


def _unused_backbones(store: Generations, opened: dict[int, Generation]) -> list[Path]:
    """Return backbones that no generation uses; empty if a damaged generation may use one of them."""
    if len(opened) < len(store.numbers()):
        return []
    needed = {generation.backbone for generation in opened.values()}
    return [path for path in store.backbones() if path.stem not in needed]


def _current(store: Generations, opened: dict[int, Generation]) -> Iterator[Finding]:
    path, number = str(store.root / "CURRENT"), store.pointer()
    if number is None:
        yield Finding(path, "it is missing or damaged, so another generation may be used; repair it", DAMAGE)
    elif number not in opened:
        kind = "damaged" if number in store.numbers() else "missing"
        yield Finding(path, f"it names generation {number}, which is {kind}; repair it", DAMAGE)


def _generations(store: Generations, opened: dict[int, Generation], problems: dict[int, str]) -> Iterator[Finding]:
    for number, problem in problems.items():
        message = f"{problem}; it cannot be restored and stays until it is pruned"
        yield Finding(str(store.folder(number)), message, DAMAGE)
    known = {event["generation"] for event in store.journal()} | {store.pointer()}
    for number, generation in opened.items():
        if number not in known:
            message = "it is intact, but not in the journal: that was lost, or a crash came before this became current"
            yield Finding(str(generation.path), message, NOTE)
        for path in store.tree.entries(generation.path):
            if path.name not in (*generation.files, "generation.json"):
                message = f"it does not belong to generation {number}; delete it if you do not need it"
                yield Finding(str(path), message, NOTE)
    for path in store.tree.entries(store.root / "generations"):
        if path not in map(store.folder, store.numbers()) and not path.name.startswith(files.TEMPORARY_PREFIX):
            yield Finding(str(path), "it is not a generation; delete it if you do not need it", NOTE)


def _backbones(store: Generations, opened: dict[int, Generation], problems: dict[int, str]) -> Iterator[Finding]:
    users: dict[str, list[int]] = {}
    for number, generation in opened.items():
        users.setdefault(generation.backbone, []).append(number)
    unused = _unused_backbones(store, opened)
    for digest in sorted({*users, *(path.stem for path in store.backbones())}):
        path = store.root / "backbones" / f"{digest}.onnx"
        if path in unused:
            yield Finding(str(path), "no generation uses it", LEFTOVER)
            continue
        try:
            store.backbone_path(digest)
        except BundleRefusedError as error:
            numbers = ", ".join(map(str, users.get(digest, sorted(problems))))
            yield Finding(str(path), f"{error}; generations that need it: {numbers}", DAMAGE)
    for path in store.tree.entries(store.root / "backbones"):
        if path not in store.backbones() and not path.name.startswith(files.TEMPORARY_PREFIX):
            yield Finding(str(path), "it is not a backbone; delete it if you do not need it", NOTE)


def _journal(store: Generations, journal: Journal) -> Iterator[Finding]:
    if problem := journal.problem():
        yield Finding(str(journal.path), f"{problem}; states are not affected", DAMAGE)
        return
    path, lines, events = str(journal.path), journal.lines(), journal.events()
    unreadable = [place for place, (_, event) in enumerate(lines, 1) if event is None]
    if not journal.is_complete():
        yield Finding(path, f"line {len(lines)} is incomplete after a crash", LEFTOVER)
        unreadable = [place for place in unreadable if place != len(lines)]
    if unreadable:
        yield Finding(path, f"cannot read line {', '.join(map(str, unreadable))}; states are not affected", DAMAGE)
    before = 0
    for seq in (event["seq"] for event in events):
        if seq > before + 1:
            yield Finding(path, f"events {before + 1} to {seq - 1} are lost; states are not affected", NOTE)
        elif seq <= before:
            yield Finding(path, f"event {seq} comes after event {before}: the file was edited", NOTE)
        before = seq
    number = store.pointer()
    if number and (not events or events[-1]["generation"] != number):
        yield Finding(path, f"it lacks that generation {number} is current", LEFTOVER)


def _leftovers(store: Generations) -> Iterator[Finding]:
    for folder in store.swept:
        for path in store.tree.entries(folder):
            if path.name.startswith(files.TEMPORARY_PREFIX):
                yield Finding(str(path), "it is left over from a crash, or being written now", LEFTOVER)


def _access(store: Generations) -> Iterator[Finding]:
    """Find links, and what other users may change."""
    tree, root = store.tree, store.root
    if problem := tree.exposure(root):
        yield Finding(str(root), problem, DAMAGE if tree.exposure(root, group=False) else NOTE)
    for path in tree.entries(root):
        if path.name != "engines" and (problem := tree.exposure(path)):  # see `_engines`
            yield Finding(str(path), problem, DAMAGE)
        elif path.name == TRUSTED:
            yield from _keys(tree, path)


def _keys(tree: files.Tree, folder: Path) -> Iterator[Finding]:
    try:
        for path in tree.entries(folder):
            if problem := tree.exposure(path):
                yield Finding(str(path), problem, DAMAGE)
    except EnvironmentUnfitError as error:
        yield Finding(str(folder), str(error), DAMAGE)


def _engines(store: Generations, folder: Path) -> Iterator[Finding]:
    about = store.tree.status(folder)
    if about is None:
        return
    advice = "; delete it: engines are built again"
    if not stat.S_ISDIR(about.st_mode):
        yield Finding(str(folder), f"it is not a folder{advice}", DAMAGE)
    elif about.st_uid != os.geteuid():
        yield Finding(
            str(folder), f"it belongs to user {about.st_uid}, but this is user {os.geteuid()}{advice}", DAMAGE
        )
    elif about.st_mode & 0o077:
        # Only write access is dangerous, because an engine is executable code.
        severity = DAMAGE if about.st_mode & 0o022 else NOTE
        yield Finding(str(folder), f"its mode is {stat.S_IMODE(about.st_mode):o}, not 700{advice}", severity)
