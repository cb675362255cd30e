"""Store of a device: every state that was ever committed, one of them current; a crash at any point loses nothing.

::

    ROOT/backbones/<sha256>.onnx   shared by generations; written once
    ROOT/generations/000001/       generation.json and the files that it lists; never changed
    ROOT/CURRENT                   "000001", a space, a checksum of it, and a newline
    ROOT/journal.jsonl             one event per line: install, learn, rollback, pruned, recovered, repaired
    ROOT/spare                     space that a rollback uses when the disk is full
    ROOT/.lock                     held by the only writer; readers do not lock

A commit writes a temporary folder, renames it, then replaces CURRENT: that atomic rename is the commit. A crash before
it leaves the old generation current (and possibly a complete folder that was never current), a crash after it the new
one. The journal is written last; the next writer adds what a crash has left out. No state is read from the journal: it
is for people, prevents numbers from being reused, and gives the order in which to look for a replacement of a damaged
generation. Generations are kept until `Generations.prune` deletes old ones. Nothing depends on the clock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from device_runtime.store import watch_state
from device_runtime.store.journal import MAX_NUMBER, Journal
from device_runtime.store.record import (
    RECORD,
    VERSION,
    Generation,
    GenerationSummary,
    check_damage,
    open_generation,
    sealed,
)
from ssd_edge import files
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError
from ssd_edge.system import MIB, disk_free, lock_holder, utc_now

KEEP = 10  # generations kept by `tidy` unless $SSD_EDGE_KEEP is set; those in use and the last installed one stay
EVENTS = 1000  # journal events kept by `tidy`: a year of three learns a day; installations always stay
_BLOCK = 4096  # bytes
_TRIES = 5  # of a reader; for each retry, another process must commit ten times during one read
_NUMBER = re.compile(r"[0-9]{6}|[1-9][0-9]{6,11}")  # more than `journal.MAX_NUMBER` has
LARGEST = 10**12  # that many digits
_BACKBONE = re.compile(r"[0-9a-f]{64}\.onnx")
_TRACES = (watch_state.NAME, "incoming")  # uploads of ssd-edge push
SPARE, SPARE_BYTES = "spare", 2**16  # enough for CURRENT, a line of the journal and the blocks of their folder
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Pruned:
    """Result of `Generations.prune`.

    Attributes:
        generations: Numbers of the deleted generations.
        backbones: SHA-256 of the deleted backbones.
        freed_bytes: Size of the deleted files.
        left_bytes: Size of the remaining generations and backbones.
    """

    generations: tuple[int, ...]
    backbones: tuple[str, ...]
    freed_bytes: int
    left_bytes: int


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Paths to delete, in this order: generations, oldest first, then backbones."""

    pointer: int
    pruned: Pruned
    paths: tuple[Path, ...]


class Generations:
    """The generations below a root folder. Every call reads the disk; only writing needs `writer`.

    Attributes:
        root: The root folder.
        tree: Its files.

    Example:
        >>> store = Generations("/data/ssd-edge")
        >>> with store.writer():  # from reading to committing, so that no other process commits in between
        ...     current = store.current()
        ...     store.commit(learn(current), {"classes": ["cup"]}, parent=current.number)
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.tree = files.Tree(self.root)
        self._writing = False
        self._journal = Journal(self.root)
        self._install = f"ssd-edge device install BUNDLE --root {root}"

    def current(self) -> Generation:
        """Return the current generation after verifying every file of it.

        If it is damaged, the nearest intact ancestor replaces it, or else the newest intact generation with a lower
        number. `Generation.fallback` then says so, and a warning is logged. A newer generation never replaces it,
        because a rollback may have left it on purpose.

        Raises:
            InputError: No bundle is installed.
            BundleRefusedError: Neither it nor an older generation is intact.
            EnvironmentUnfitError: Other processes kept replacing it while it was read.
        """
        return self.read_current(lambda generation: generation)

    def read_current(self, read: Callable[[Generation], T]) -> T:
        """Return what `read` returns for `current`, from one generation even if other processes commit meanwhile.

        A reader does not lock, so the generation named in CURRENT may be pruned before its files are read. That is not
        damage: reading starts again whenever CURRENT has changed.

        Raises:
            InputError: No bundle is installed.
            BundleRefusedError: Neither the current generation nor an older one is intact, or raised by `read`.
            EnvironmentUnfitError: CURRENT changed on every attempt.
        """
        self.check_installed()
        for _ in range(_TRIES):
            number = self.pointer()
            try:
                generation = self._first_intact(number)
                result = read(generation)
            except BundleRefusedError:
                if self.pointer() == number:
                    raise
                continue
            if generation.fallback and self.pointer() != number:
                continue
            if generation.fallback:
                log.warning(generation.fallback)
            return result
        raise EnvironmentUnfitError(
            f"the generation in {self.root} was replaced {_TRIES} times while it was read; another process is writing "
            "there all the time: try again when it is done"
        )

    def _first_intact(self, number: int | None) -> Generation:
        """Return the generation in CURRENT, or the one that replaces it; see `current`."""
        problem = "" if number else f"{self.root / 'CURRENT'} is missing or damaged"
        for candidate in self.candidates(number):
            try:
                generation = self.open(candidate)
            except BundleRefusedError as error:
                problem = problem or str(error)
                continue
            return dataclasses.replace(
                generation, fallback=problem and f"{problem}; generation {candidate} is used instead"
            )
        raise BundleRefusedError(
            f"{problem}, and no older generation is intact (newer: {self._intact_numbers()}); choose one with "
            f"ssd-edge device rollback, or run: {self._install}"
        )

    def mark(self) -> tuple[int, ...]:
        """Return a value that changes with every commit and rollback, at the cost of asking for one file's status."""
        try:
            about = (self.root / "CURRENT").stat()
        except OSError:
            return ()
        return about.st_ino, about.st_mtime_ns, about.st_ctime_ns

    def get(self, number: int) -> Generation:
        """Return one generation after verifying it.

        Raises:
            InputError: It does not exist or is damaged; the message lists those that are intact.
        """
        self.check_installed()
        try:
            return self.open(number)
        except BundleRefusedError as error:
            pruned = [event.get("generations") for event in self.journal() if event.get("event") == "pruned"]
            was_pruned = any(number in numbers for numbers in pruned if isinstance(numbers, list))
            was_pruned |= any(type(highest) is int and number <= highest for highest in self._highest())
            missing = f"generation {number} was pruned" if was_pruned else f"there is no generation {number}"
            problem = error if number in self.numbers() else missing
            raise InputError(f"{problem}; available generations: {self._intact_numbers()}") from error

    def list(self) -> Sequence[GenerationSummary]:
        """Return a summary of each generation, damaged ones included.

        Raises:
            InputError: No bundle is installed.
        """
        self.check_installed()
        summaries = []
        for number in self.numbers():
            current = number == self.pointer()
            try:
                found = self.open(number)
            except BundleRefusedError as error:
                if self.tree.status(self.folder(number)):  # otherwise it was pruned meanwhile
                    summaries.append(GenerationSummary(number, current, False, str(error)))
                continue
            origin = (found.parent, found.origin, found.created_utc, found.backbone, found.info)
            summaries.append(GenerationSummary(number, current, True, "", *origin))
        return summaries

    def journal(self) -> Sequence[dict[str, Any]]:
        """Return the events in order, without unreadable lines (cut short or damaged)."""
        return self._journal.events()

    def backbone_path(self, sha256: str) -> Path:
        """Return the file of a backbone after comparing its bytes with its name.

        Raises:
            BundleRefusedError: It is missing or damaged.
        """
        path = self.root / "backbones" / f"{sha256}.onnx"
        found: str | None
        try:
            found = self.tree.sha256(path)
        except OSError as error:
            check_damage(path, error)
            found = error.strerror
        if found != sha256:
            raise BundleRefusedError(f"{path} is missing or damaged ({found}); run: {self._install}")
        return path

    @property
    def swept(self) -> Sequence[Path]:
        """The folders in which a crash may leave temporary files."""
        return (self.root, self.root / "generations", self.root / "backbones")

    @property
    def writing(self) -> bool:
        """True inside `writer` of this object."""
        return self._writing

    @contextlib.contextmanager
    def writer(self, recover: bool = True) -> Iterator[None]:
        """Lock the root for writing and repair what a crash has left; cannot be nested.

        Args:
            recover: False if the caller calls `recover` later, as `fsck.repair` does.

        Raises:
            EnvironmentUnfitError: Another process is writing, or the root is not writable.
        """
        with self._locked():
            if recover:
                self.recover()
            self._writing = True
            try:
                yield
            except BaseException:
                with contextlib.suppress(OSError, EnvironmentUnfitError):
                    self._sweep()  # an interrupt may come at any point, even during a cleanup
                raise
            finally:
                self._writing = False

    def add_backbone(self, data: bytes) -> str:
        """Store a backbone unless an intact copy exists; return its SHA-256."""
        self._check_writing()
        digest = files.sha256(data)
        try:
            self.backbone_path(digest)
        except BundleRefusedError:
            self.tree.write(self.root / "backbones" / f"{digest}.onnx", data)
        return digest

    def commit(
        self, contents: Mapping[str, bytes], info: Mapping[str, Any], parent: int | None, backbone: str | None = None
    ) -> Generation:
        """Write a new generation and make it current. If this raises before that, the old one stays current.

        Args:
            contents: File name → bytes.
            info: Any JSON object, for people: what was learned or installed.
            parent: Number of the generation it was learned from; None for an installed one.
            backbone: Returned by `add_backbone`; only for an installed one, a learned one uses that of its parent.

        Raises:
            BundleRefusedError: The parent or the backbone is missing or damaged.
            EnvironmentUnfitError: The disk is read-only, or has less free space than twice the size of the generation.
        """
        self._check_writing()
        if bad := [name for name in contents if not _FILE_NAME.fullmatch(name) or name == RECORD]:
            raise ValueError(f"not names for files of a generation: {bad}")
        if backbone is not None and parent is None:
            self.backbone_path(backbone)
        elif parent is not None and backbone is None:
            backbone = self.open(parent).backbone
        else:
            raise ValueError("either a parent or a backbone is needed")
        number = max([self.pointer() or 0, *self.numbers(), *self._journalled()]) + 1
        origin = "install" if parent is None else "learn"
        body = {
            "version": VERSION,
            "number": number,
            "parent": parent,
            "origin": origin,
            "created_utc": utc_now(),
            "backbone": backbone,
            "info": info,
            "files": {n: {"size": len(data), "sha256": files.sha256(data)} for n, data in contents.items()},
        }
        self._check_room([*map(len, contents.values()), len(sealed(body))])
        final = self.folder(number)
        temporary = final.with_name(files.TEMPORARY_PREFIX + final.name)
        try:
            self.tree.make(temporary)
            for name, data in contents.items():
                self.tree.write(temporary / name, data)
            self.tree.write(temporary / RECORD, sealed(body))
            self.tree.sync(temporary)
            self.tree.rename(temporary, final)
            self.switch(number, origin, parent=parent, info=info)
        except BaseException:  # also an interrupt; free the space of a failed commit
            with contextlib.suppress(EnvironmentUnfitError, OSError):
                self.tree.remove(temporary)
                if self.pointer() != number and self.tree.status(final):  # it was never current
                    self.remove(final)
            raise
        return self.open(number)

    def set_current(self, number: int, event: str = "rollback", info: Mapping[str, Any] | None = None) -> Generation:
        """Make an existing generation the current one.

        Raises:
            InputError: It does not exist or is damaged; the message lists those that are intact.
        """
        self._check_writing()
        generation = self.get(number)
        self._even_if_full(lambda: self.switch(number, event, info=info or {}))
        return generation

    def prune(self, keep: int = 5, budget_bytes: int | None = None) -> Pruned:
        """Delete old generations, oldest first, and backbones that no remaining generation uses.

        The generation in use, its replacement if it were damaged, the last installed one and the one with the highest
        number always stay. A folder is renamed, durably, before the first of its files is deleted, so that after a
        crash every folder with the name of a generation is complete. Call this after a commit: before it, the backbone
        of a new installation is not in use yet.

        Args:
            keep: Number of the newest intact generations that stay; damaged ones between them stay too.
            budget_bytes: Limit on the size of generations and backbones. More than `keep` alone requires are deleted to
                stay below it. A warning is logged if what must stay exceeds it.

        Raises:
            InputError: No bundle is installed, or `keep` or the budget is out of range.
            BundleRefusedError: No generation is usable; nothing is deleted.
            EnvironmentUnfitError: The disk is read-only; what was deleted before the error is in the journal.
        """
        self._check_writing()
        plan = self._plan(keep, budget_bytes)
        self._delete(plan)
        if budget_bytes is not None and plan.pruned.left_bytes > budget_bytes:
            message = "what must stay in %s takes %d bytes, more than the budget of %d"
            log.warning(message, self.root, plan.pruned.left_bytes, budget_bytes)
        return plan.pruned

    def keep_only_current(self, keep_installed: bool = False) -> Pruned:
        """Delete every other generation and what else tells what was learned: a difference of two reveals embeddings.

        Of the journal, only installations stay, because the highest installed release is derived from them. Uploads and
        the counts of ``watch`` are deleted as well. There is no rollback afterwards, and no replacement if the current
        generation is damaged.

        Args:
            keep_installed: Keep the newest installed generation, which merges need.

        Raises:
            InputError: No bundle is installed.
            BundleRefusedError: The current generation is damaged; nothing is deleted.
            EnvironmentUnfitError: Something cannot be deleted; call this again.
        """
        self._check_writing()
        current = self.current()
        if current.fallback:
            raise BundleRefusedError(
                f"{current.fallback}; nothing was deleted: first run ssd-edge device fsck --repair"
            )
        intact = self.intact()
        installed = [n for n, generation in intact.items() if generation.parent is None]
        stays = {current.number, *(installed[-1:] if keep_installed else ())}
        plan = self._planned(current.number, [n for n in self.numbers() if n in stays], intact)
        self._delete(plan)
        for path in (self.root / name for name in _TRACES):
            self.tree.remove(path)
        self.tree.sync(self.root)
        for folder in self.swept:  # unlike `_sweep`, with an error if something cannot be deleted
            for path in self.tree.entries(folder):
                if path.name.startswith(files.TEMPORARY_PREFIX):
                    self.tree.remove(path)
        gone = plan.pruned
        highest = max([current.number, *gone.generations, *self._journalled()])  # keeps numbers from being reused
        numbers, backbones = list(gone.generations), list(gone.backbones)
        fields = {"generations": numbers, "backbones": backbones, "highest": highest}
        self._journal.replace("install", "pruned", current.number, **fields)
        return gone

    def tidy(self) -> None:
        """Prune generations and shorten the journal after a commit.

        The newest ``$SSD_EDGE_KEEP`` generations stay (`KEEP` by default), or fewer if ``$SSD_EDGE_DISK_MB`` is set and
        too small for them.
        """
        self._check_writing()
        keep, budget = _positive_number("SSD_EDGE_KEEP"), _positive_number("SSD_EDGE_DISK_MB")
        try:
            self.prune(keep or KEEP, budget and budget * MIB)
            self._journal.shorten(EVENTS)
        except EnvironmentUnfitError as error:  # the commit has happened; the next one tries again
            log.warning("old generations were not deleted: %s", error)
        self.reserve()

    def reserve(self) -> None:
        """Write the spare file if it is missing and there is room."""
        self._check_writing()
        with contextlib.suppress(EnvironmentUnfitError):
            if self.tree.status(self.root / SPARE) is None:
                # random bytes, which no file system compresses or leaves out
                self.tree.write(self.root / SPARE, os.urandom(SPARE_BYTES))

    def _even_if_full(self, act: Callable[[], None]) -> None:
        """Do something that needs little space; if the disk is full, delete the spare file and do it again."""
        try:
            act()
        except EnvironmentUnfitError as error:
            full = isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT)
            if not full or self.tree.status(self.root / SPARE) is None:
                raise
            self.tree.remove(self.root / SPARE)
            self.tree.sync(self.root)
            log.warning(
                "the disk is full, so the spare space of %s is used; free some: ssd-edge device prune", self.root
            )
            act()

    def intact(self) -> dict[int, Generation]:
        """Return the intact generations by number, ascending."""
        found = {}
        for number in self.numbers():
            try:
                found[number] = self.open(number)
            except BundleRefusedError:
                continue
        return found

    def numbers(self) -> Sequence[int]:
        """Return the numbers of all generations that have a folder, ascending."""
        folder = self.root / "generations"
        return sorted(int(path.name) for path in self.tree.entries(folder) if _NUMBER.fullmatch(path.name))

    def folder(self, number: int) -> Path:
        """Return the folder of a generation."""
        return self.root / "generations" / f"{number:06d}"

    def backbones(self) -> Sequence[Path]:
        """Return the files of all backbones."""
        return [path for path in self.tree.entries(self.root / "backbones") if _BACKBONE.fullmatch(path.name)]

    def pointer(self) -> int | None:
        """Return the number in CURRENT, or None if the file is missing or damaged."""
        path = self.root / "CURRENT"
        try:
            content = self.tree.read(path)
        except OSError as error:
            check_damage(path, error)
            return None
        digits = content.partition(b" ")[0].decode("ascii", "replace")
        number = int(digits) if _NUMBER.fullmatch(digits) else 0
        return number if content == _pointer_bytes(number) else None

    def candidates(self, number: int | None) -> Sequence[int]:
        """Return `number` and the generations that may replace it, best first; see `current`."""
        events = self.journal()
        if not number:
            number = events[-1]["generation"] if events else max(self.numbers(), default=0)
        parents = {e["generation"]: e["parent"] for e in events if type(e.get("parent")) is int}
        order = [number]
        while parents.get(order[-1], order[-1]) < order[-1]:  # "<" ends cycles in a damaged journal
            order.append(parents[order[-1]])
        return order + [n for n in reversed(self.numbers()) if n < number and n not in order]

    def open(self, number: int) -> Generation:
        """Read and verify a generation; raises as `open_generation`."""
        if number >= LARGEST:  # its folder could have a name that is too long for any file system
            raise BundleRefusedError(f"the number of a generation has at most {len(str(LARGEST)) - 1} digits")
        return open_generation(self.tree, self.folder(number), number)

    def check_installed(self) -> None:
        """Raise an InputError if no bundle is installed."""
        # A first install that crashed may have left a generation, but neither of these files.
        if not self.tree.status(self.root / "CURRENT") and not self.journal():
            raise InputError(f"no bundle is installed in {self.root}; run: {self._install}")

    def recover(self) -> None:
        """Remove what a crash has left behind and complete the journal; call it while the root is locked."""
        self._sweep()
        events, pointer = self.journal(), self.pointer()
        if pointer and (not events or events[-1]["generation"] != pointer):
            self._record(f"generation {pointer} is current", "recovered", pointer)

    def switch(self, number: int, event: str, **fields: Any) -> None:
        """Replace CURRENT, which is the commit, and journal it; the caller has verified the generation.

        Once CURRENT is replaced the commit has happened, so a later failure is only logged.
        """
        self._check_writing()
        json.dumps(fields, allow_nan=False)  # fail before the commit if the fields cannot be journalled
        try:
            self.tree.write(self.root / "CURRENT", _pointer_bytes(number))
        except (EnvironmentUnfitError, OSError) as error:
            if self.pointer() != number:
                raise
            log.warning("generation %d is current, but a power cut now may take it back: %s", number, error)
        self._record(f"generation {number} is current", event, number, **fields)

    def remove(self, path: Path) -> None:
        """Delete the folder of a generation, or a backbone.

        Raises:
            EnvironmentUnfitError: The disk is read-only or the files may not be deleted.
        """
        if path.suffix == ".onnx":
            self.tree.remove(path)
            self.tree.sync(path.parent)
            return
        gone = path.with_name(f"{files.TEMPORARY_PREFIX}pruned-{path.name}")
        self.tree.sync(path)
        self.tree.rename(path, gone)
        with contextlib.suppress(EnvironmentUnfitError):  # the next writer removes what is left
            self.tree.remove(gone)

    def _plan(self, keep: int, budget_bytes: int | None) -> _Plan:
        """Return what `prune` would delete now; arguments and errors as `prune`."""
        if keep < 1 or (budget_bytes is not None and budget_bytes < 0):
            raise InputError(f"keep must be at least 1 and the budget at least 0, not {keep} and {budget_bytes}")
        in_use = self.current().number
        pointer = self.pointer() or in_use
        numbers, intact = self.numbers(), self.intact()
        installed = [n for n, generation in intact.items() if generation.parent is None]
        replacement = next((n for n in self.candidates(in_use)[1:] if n in intact), in_use)
        # The highest number stays so that it is never reused.
        required = {in_use, pointer, replacement, numbers[-1], *installed[-1:]}
        oldest_kept = list(intact)[-keep:][0]
        stays = [n for n in numbers if n in required or n >= oldest_kept]
        plan = self._planned(pointer, stays, intact)
        for number in [n for n in stays if n not in required]:
            if budget_bytes is not None and plan.pruned.left_bytes > budget_bytes:
                stays.remove(number)
                plan = self._planned(pointer, stays, intact)
        return plan

    def _planned(self, pointer: int, stays: Sequence[int], intact: Mapping[int, Generation]) -> _Plan:
        """Return the deletion of every generation but those in `stays`, and of backbones that none of them needs."""
        numbers, backbones = self.numbers(), self.backbones()
        needed = {intact[n].backbone for n in stays if n in intact}
        unknown = not set(stays) <= set(intact)  # a damaged generation may need any backbone
        left = {*map(self.folder, stays), *(path for path in backbones if unknown or path.stem in needed)}
        sizes = {path: self.tree.size(path) for path in (*map(self.folder, numbers), *backbones)}
        paths = tuple(path for path in sizes if path not in left)
        return _Plan(
            pointer,
            Pruned(
                tuple(n for n in numbers if n not in stays),
                tuple(path.stem for path in paths if path.suffix == ".onnx"),
                sum(sizes[path] for path in paths),
                sum(sizes[path] for path in left),
            ),
            paths,
        )

    def _delete(self, plan: _Plan) -> None:
        """Delete the paths of a plan and journal what was deleted, also if an error ends it."""
        gone: list[Path] = []
        try:
            for path in plan.paths:
                self.remove(path)
                gone.append(path)
        finally:
            if gone:
                numbers = [int(path.name) for path in gone if path.parent.name == "generations"]
                backbones = [path.stem for path in gone if path.parent.name == "backbones"]
                pruned = f"generations {', '.join(map(str, numbers)) or 'none'} are pruned"
                self._record(pruned, "pruned", plan.pointer, generations=numbers, backbones=backbones)

    def _highest(self) -> Sequence[Any]:
        """Return the highest numbers that were used before everything but one generation was deleted."""
        return [event.get("highest") for event in self.journal() if event.get("event") == "pruned"]

    def _journalled(self) -> Sequence[int]:
        """Return the numbers that the journal says were used."""
        numbers = [event["generation"] for event in self.journal()] + [*self._highest()]
        return [number for number in numbers if type(number) is int and number <= MAX_NUMBER]

    def _intact_numbers(self) -> str:
        return ", ".join(str(summary.number) for summary in self.list() if summary.intact) or "none"

    def _check_writing(self) -> None:
        if not self._writing:
            raise RuntimeError("call this inside 'with generations.writer():'")

    def _check_room(self, sizes: Sequence[int]) -> None:
        """Check that twice the size of a generation is free; `sizes` are those of its files in bytes."""
        # Each file takes whole blocks; so do the folder, CURRENT and the next line of the journal.
        needed = 2 * (sum(-(-size // _BLOCK) for size in sizes) + 3) * _BLOCK
        try:
            free = disk_free(self.root)
        except OSError as error:
            raise files.unfit(self.root, error) from error
        if free < needed:
            raise EnvironmentUnfitError(
                f"a new generation needs {needed} bytes of free disk, twice its size, but {self.root} has {free}; free "
                "some space; nothing was written"
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        for folder in ("generations", "backbones"):
            self.tree.make(self.root / folder, 0o755)
        path = self.root / ".lock"
        with self.tree.lock(path) as locked:
            if not locked:
                raise EnvironmentUnfitError(
                    f"another process is writing {self.root}, pid {lock_holder(path)}; try again when it is done"
                )
            yield

    def _sweep(self) -> None:
        """Remove temporary files and folders; while the root is locked no process uses them."""
        for folder in self.swept:
            for path in self.tree.entries(folder):
                if path.name.startswith(files.TEMPORARY_PREFIX):
                    with contextlib.suppress(EnvironmentUnfitError):
                        self.tree.remove(path)

    def _record(self, message: str, event: str, number: int, **fields: Any) -> None:
        """Append an event to the journal; if that fails, log `message` and continue."""
        try:
            self._journal.append(event, number, **fields)
        except (EnvironmentUnfitError, OSError) as error:
            log.warning("%s, but the journal lacks it for now: %s", message, error)


def _positive_number(variable: str) -> int | None:
    """Return a positive integer from the environment, or None if it is not set or invalid (logged)."""
    text = os.environ.get(variable, "")
    if not text:
        return None
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    log.warning("%s is %r, but must be a whole number above 0; it is ignored", variable, text)
    return None


def _pointer_bytes(number: int) -> bytes:
    """Return the content of CURRENT; its checksum keeps a flipped bit from naming another generation."""
    digits = f"{number:06d}".encode()
    return digits + b" " + files.sha256(digits)[:16].encode() + b"\n"
