"""The store of a device: every state it ever committed, one of them current; safe against a cut at any point.

::

    ROOT/backbones/<sha256>.onnx   shared by generations; written once
    ROOT/generations/000001/       generation.json and the files that it lists; never changed
    ROOT/CURRENT                   "000001", a space, a check sum of it, and a newline
    ROOT/journal.jsonl             one event a line: install, learn, rollback, pruned, recovered, repaired
    ROOT/.lock                     held by the one writer; readers take no lock

A commit writes a temporary folder, gives it its name, then replaces CURRENT: that rename is the commit.
A cut before it leaves the old generation current (and perhaps a complete folder that never was), after it the
new one. The journal comes last; what a cut took from it, the next writer adds. No state is read from it: it
is for people, keeps its numbers from being used again, and says where to look first for a stand-in.
Generations are kept until `Generations.prune` deletes old ones. Nothing depends on the clock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from device_runtime.store.journal import Journal
from device_runtime.store.record import RECORD, VERSION, Generation, check_damage, open_generation, sealed
from ssd_edge import files
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError
from ssd_edge.system import MIB, disk_free, file_lock, lock_holder, utc_now

KEEP = 10  # generations, unless $SSD_EDGE_KEEP says otherwise; those in use and the last installed one stay anyway
EVENTS = 1000  # of the journal: a year of three learns a day; its installations stay whatever their age
_BLOCK = 4096  # bytes
_TRIES = 5  # of a reader; each but the last needs ten commits of another process while one generation is read
_NUMBER = re.compile(r"[0-9]{6}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

T = TypeVar("T")

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
class _Plan:
    """What is to go, in this order: generations, oldest first, then backbones."""

    pointer: int
    pruned: Pruned
    paths: tuple[Path, ...]


class Generations:
    """The generations below a root folder. Every call reads the disk; only writing needs `writer`.

    Example:
        >>> store = Generations("/data/ssd-edge")
        >>> with store.writer():  # from reading to committing, so that nobody commits in between
        ...     now = store.current()
        ...     store.commit(learn(now), {"classes": ["cup"]}, parent=now.number)
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._writing = False
        self._journal = Journal(self.root / "journal.jsonl")
        self._install = f"ssd-edge device install BUNDLE --root {root}"

    def current(self) -> Generation:
        """The current generation, every file of it verified.

        When it is damaged, the nearest intact one that it was learned from stands in, else the newest intact
        older one; `Generation.fallback` then says so, and a warning is logged. A newer one never stands in: a
        rollback may have left it on purpose.

        Raises:
            InputError: nothing is installed.
            BundleRefusedError: neither it nor an older one is intact.
            EnvironmentUnfitError: other processes replaced it again and again while it was read.
        """
        return self.read_current(lambda generation: generation)

    def read_current(self, read: Callable[[Generation], T]) -> T:
        """What `read` makes of `current`, of one generation whatever other processes commit meanwhile.

        A reader takes no lock: what it has found in CURRENT can be pruned before it has read the files. That is no
        damage, so it begins again wherever CURRENT has moved on.

        Raises:
            InputError: nothing is installed.
            BundleRefusedError: neither the current one nor an older one is intact; or what `read` raises.
            EnvironmentUnfitError: CURRENT moved on every time.
        """
        self.check_installed()
        for _ in range(_TRIES):
            number = self.pointer()
            try:
                generation = self._standing_in(number)
                found = read(generation)
            except BundleRefusedError:
                if self.pointer() == number:
                    raise
                continue
            if generation.fallback and self.pointer() != number:
                continue
            if generation.fallback:
                log.warning(generation.fallback)
            return found
        raise EnvironmentUnfitError(
            f"the generation in {self.root} was replaced {_TRIES} times while it was read; another process writes "
            "there without a pause: try again when it is done"
        )

    def _standing_in(self, number: int | None) -> Generation:
        """The generation in CURRENT, or the one in its place; see `current`."""
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

    def get(self, number: int) -> Generation:
        """One generation, verified.

        Raises:
            InputError: it does not exist or is damaged; lists those that are intact.
        """
        self.check_installed()
        try:
            return self.open(number)
        except BundleRefusedError as error:
            pruned = [event.get("generations") for event in self.journal() if event.get("event") == "pruned"]
            gone = any(number in numbers for numbers in pruned if isinstance(numbers, list))
            told = f"generation {number} was pruned" if gone and number not in self.numbers() else error
            raise InputError(f"{told}; available generations: {self._intact_numbers()}") from error

    def list(self) -> Sequence[dict[str, Any]]:
        """A summary of each generation (a damaged one: ``intact`` False, ``problem``); raises like `get`."""
        self.check_installed()
        summaries = []
        for number in self.numbers():
            summary = {"number": number, "current": number == self.pointer(), "intact": True, "problem": ""}
            summary |= dict.fromkeys(("parent", "origin", "created_utc", "backbone", "info"))
            try:
                generation = self.open(number)
                summary |= {key: getattr(generation, key) for key in summary if hasattr(generation, key)}
            except BundleRefusedError as error:
                if not self.folder(number).exists():  # it has been pruned meanwhile
                    continue
                summary |= {"intact": False, "problem": str(error)}
            summaries.append(summary)
        return summaries

    def journal(self) -> Sequence[dict[str, Any]]:
        """The events, in order; a line that cannot be read (cut short, damaged) is left out."""
        return self._journal.events()

    def backbone_path(self, sha256: str) -> Path:
        """The file of a backbone, after its bytes have been compared with its name.

        Raises:
            BundleRefusedError: missing or damaged.
        """
        path = self.root / "backbones" / f"{sha256}.onnx"
        try:
            found = files.sha256_file(path)
        except OSError as error:
            check_damage(path, error)
            found = error.strerror
        if found != sha256:
            raise BundleRefusedError(f"{path} is missing or damaged ({found}); run: {self._install}")
        return path

    @property
    def writing(self) -> bool:
        """Whether this object is inside of `writer`."""
        return self._writing

    @contextlib.contextmanager
    def writer(self, recover: bool = True) -> Iterator[None]:
        """Hold the root for writing; not to be nested. First repairs what a cut has left behind.

        Args:
            recover: False: the caller calls `recover` later, as `fsck.repair` does.

        Raises:
            EnvironmentUnfitError: someone else is writing, or the root is not writable.
        """
        with self._locked():
            if recover:
                self.recover()
            self._writing = True
            try:
                yield
            except BaseException:
                with contextlib.suppress(OSError):
                    self._sweep()  # an interrupt may come anywhere, also while something is tidied up
                raise
            finally:
                self._writing = False

    def add_backbone(self, data: bytes) -> str:
        """Store a backbone unless it is there, intact; returns its sha256."""
        self._check_writing()
        digest = files.sha256(data)
        try:
            self.backbone_path(digest)
        except BundleRefusedError:
            files.write_bytes(self.root / "backbones" / f"{digest}.onnx", data)
        return digest

    def commit(
        self, contents: Mapping[str, bytes], info: dict, parent: int | None, backbone: str | None = None
    ) -> Generation:
        """Make a new generation and make it current. When this raises before that, the old one stays current.

        Args:
            contents: file name → bytes.
            info: any JSON object, for people: what was learned or installed.
            parent: the generation it was learned from, or None for an installed one.
            backbone: what `add_backbone` returned; only for an installed one, a learned one has its parent's.

        Raises:
            BundleRefusedError: the parent or the backbone is missing or damaged.
            EnvironmentUnfitError: the disk is read-only or forbidden, or has less free than twice the generation.
        """
        self._check_writing()
        if bad := [name for name in contents if not _FILE_NAME.fullmatch(name) or name == RECORD]:
            raise ValueError(f"not names for files of a generation: {bad}")
        if (parent is None) == (backbone is None):
            raise ValueError("either a parent or a backbone is needed")
        if backbone is not None:
            self.backbone_path(backbone)
        journalled = [event["generation"] for event in self.journal()]
        number = max([self.pointer() or 0, *self.numbers(), *journalled]) + 1
        body = {
            "version": VERSION,
            "number": number,
            "parent": parent,
            "origin": "install" if parent is None else "learn",
            "created_utc": utc_now(),
            "backbone": backbone or self.open(parent).backbone,
            "info": info,
            "files": {n: {"size": len(data), "sha256": files.sha256(data)} for n, data in contents.items()},
        }
        self._check_room([*map(len, contents.values()), len(sealed(body))])
        final = self.folder(number)
        temporary = final.with_name(files.TEMPORARY_PREFIX + final.name)
        try:
            files.make_directory(temporary)
            for name, data in contents.items():
                files.write_bytes(temporary / name, data)
            files.write_bytes(temporary / RECORD, sealed(body))
            files.commit_directory(temporary, final)
            self.switch(number, body["origin"], parent=parent, info=info)
        except BaseException:  # also an interrupt; after a failure: a full disk must not stay full
            with contextlib.suppress(EnvironmentUnfitError, OSError):
                shutil.rmtree(temporary, ignore_errors=True)
                if self.pointer() != number and final.exists():  # it has never been current
                    remove(final)
            raise
        return self.open(number)

    def set_current(self, number: int, event: str = "rollback", info: dict | None = None) -> Generation:
        """Make an existing generation the current one.

        Raises:
            InputError: it does not exist or is damaged; lists those that are intact.
        """
        self._check_writing()
        generation = self.get(number)
        self.switch(number, event, info=info or {})
        return generation

    def prune(self, keep: int = 5, budget_bytes: int | None = None) -> Pruned:
        """Delete old generations, oldest first, and the backbones that no generation refers to any more.

        What is used now, what would stand in for it, the last installed one and the one with the highest number
        always stay. Call it after a commit: before, the backbone of an installation would be one that nobody needs.

        Args:
            keep: so many of the newest intact ones stay, and damaged ones between them.
            budget_bytes: of generations and backbones; above it, more are deleted than `keep` alone asks for.
                Where even what must stay is larger, a warning is logged.

        Raises:
            InputError: nothing is installed, or `keep` or the budget is out of range.
            BundleRefusedError: no generation is fit for use; nothing is deleted.
            EnvironmentUnfitError: the disk is read-only or forbidden; what is deleted by then is journalled.
        """
        self._check_writing()
        plan = self._plan(keep, budget_bytes)
        gone: list[Path] = []
        try:
            for path in plan.paths:
                remove(path)
                gone.append(path)
        finally:
            if gone:
                numbers = [int(path.name) for path in gone if path.parent.name == "generations"]
                backbones = [path.stem for path in gone if path.parent.name == "backbones"]
                told = f"generations {', '.join(map(str, numbers)) or 'none'} are pruned"
                self._tell(told, "pruned", plan.pointer, generations=numbers, backbones=backbones)
        if budget_bytes is not None and plan.pruned.left_bytes > budget_bytes:
            told = "what must stay in %s takes %d bytes, more than the budget of %d"
            log.warning(told, self.root, plan.pruned.left_bytes, budget_bytes)
        return plan.pruned

    def tidy(self) -> None:
        """Delete old generations and events after a commit; with the root held for writing.

        The newest ``$SSD_EDGE_KEEP`` generations stay (`KEEP`), as many of them as ``$SSD_EDGE_DISK_MB`` has room for.
        """
        keep, budget = _number("SSD_EDGE_KEEP"), _number("SSD_EDGE_DISK_MB")
        self._check_writing()
        try:
            self.prune(keep or KEEP, budget and budget * MIB)
            self._journal.shorten(EVENTS)
        except EnvironmentUnfitError as error:  # the commit has happened, and the next one tries again
            log.warning("old generations were not deleted: %s", error)

    def intact(self) -> dict[int, Generation]:
        """The intact generations by their numbers, ascending."""
        found = {}
        for number in self.numbers():
            try:
                found[number] = self.open(number)
            except BundleRefusedError:
                continue
        return found

    def numbers(self) -> Sequence[int]:
        """The numbers of the generations that have a folder, whatever is in it; ascending."""
        return sorted(int(p.name) for p in self.root.glob("generations/*") if _NUMBER.fullmatch(p.name))

    def folder(self, number: int) -> Path:
        """The folder of a generation."""
        return self.root / "generations" / f"{number:06d}"

    def backbones(self) -> Sequence[Path]:
        """The files of all backbones."""
        return sorted(p for p in self.root.glob("backbones/*.onnx") if _DIGEST.fullmatch(p.stem))

    def _intact_numbers(self) -> str:
        return ", ".join(str(item["number"]) for item in self.list() if item["intact"]) or "none"

    def check_installed(self) -> None:
        # A first install that was cut may have left a generation, but neither of these.
        if not (self.root / "CURRENT").exists() and not self.journal():
            raise InputError(f"no bundle is installed in {self.root}; run: {self._install}")

    def _check_writing(self) -> None:
        if not self._writing:
            raise RuntimeError("call this inside 'with generations.writer():'")

    def _check_room(self, sizes: Sequence[int]) -> None:
        """Refuse a generation with files of these sizes, bytes, unless twice that is free."""
        # Every file takes whole blocks; so do its folder, CURRENT and the next line of the journal.
        needed = 2 * (sum(-(-size // _BLOCK) for size in sizes) + 3) * _BLOCK
        if (free := disk_free(self.root)) < needed:
            raise EnvironmentUnfitError(
                f"a new generation needs {needed} bytes of free disk, twice its size, but {self.root} has {free}; free "
                "some space; nothing was written"
            )

    def pointer(self) -> int | None:
        """The number in CURRENT, or None when the file is missing or damaged."""
        path = self.root / "CURRENT"
        try:
            content = path.read_bytes()
        except OSError as error:
            check_damage(path, error)
            return None
        number = int(content[:6]) if _NUMBER.fullmatch(content[:6].decode("ascii", "replace")) else 0
        return number if content == _pointer_bytes(number) else None

    def candidates(self, number: int | None) -> Sequence[int]:
        """`number`, then what may stand in for it, best first: see `current`."""
        events = self.journal()
        if not number:
            number = events[-1]["generation"] if events else max(self.numbers(), default=0)
        parents = {e["generation"]: e["parent"] for e in events if type(e.get("parent")) is int}
        order = [number]
        while parents.get(order[-1], order[-1]) < order[-1]:  # "<": no cycle, whatever the journal says
            order.append(parents[order[-1]])
        return order + [n for n in reversed(self.numbers()) if n < number and n not in order]

    def open(self, number: int) -> Generation:
        """Read and verify a generation; raises like `open_generation`."""
        return open_generation(self.folder(number), number)

    def _plan(self, keep: int, budget_bytes: int | None) -> _Plan:
        """What `Generations.prune` would delete now; changes nothing.

        Raises:
            InputError: nothing is installed, or `keep` or the budget is out of range.
            BundleRefusedError: no generation is fit for use; all may be needed to find a way out.
        """
        if keep < 1 or (budget_bytes is not None and budget_bytes < 0):
            raise InputError(f"keep must be at least 1 and the budget at least 0, not {keep} and {budget_bytes}")
        in_use = self.current().number
        pointer = self.pointer() or in_use
        numbers, intact = self.numbers(), self.intact()
        installed = [n for n, generation in intact.items() if generation.parent is None]
        stand_in = next((n for n in self.candidates(in_use)[1:] if n in intact), in_use)
        # The last one of all keeps its number from being given again.
        bound = {in_use, pointer, stand_in, numbers[-1], *installed[-1:]}
        sizes = {path: _size(path) for path in (*map(self.folder, numbers), *self.backbones())}

        def kept(stays: Iterable[int]) -> list[Path]:
            stays = set(stays)
            needed = {intact[n].backbone for n in stays if n in intact}
            unknown = not stays <= set(intact)  # nobody can say which backbone a damaged one needs
            folders = [self.folder(n) for n in numbers if n in stays]
            return folders + [path for path in self.backbones() if unknown or path.stem in needed]

        oldest_kept = list(intact)[-keep:][0]
        stays = [n for n in numbers if n in bound or n >= oldest_kept]
        for number in [n for n in stays if n not in bound]:
            if budget_bytes is not None and sum(sizes[path] for path in kept(stays)) > budget_bytes:
                stays.remove(number)
        left = kept(stays)
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

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        for folder in ("generations", "backbones"):
            files.make_directory(self.root / folder)
        path = self.root / ".lock"
        with file_lock(path) as locked:
            if not locked:
                raise EnvironmentUnfitError(
                    f"another process is writing {self.root}, pid {lock_holder(path)}; try again when it is done"
                )
            yield

    def _sweep(self) -> None:
        """Remove temporary files and folders; with the root locked, they are nobody's."""
        for folder in (self.root, self.root / "generations", self.root / "backbones"):
            for path in folder.glob(f"{files.TEMPORARY_PREFIX}*"):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        path.unlink()

    def recover(self) -> None:
        """Clear what a cut has left behind, and complete the journal."""
        self._sweep()
        events, pointer = self.journal(), self.pointer()
        if pointer and (not events or events[-1]["generation"] != pointer):
            self._tell(f"generation {pointer} is current", "recovered", pointer)

    def switch(self, number: int, event: str, **fields: Any) -> None:
        """The commit. Once CURRENT has been replaced it has happened, so a later failure must not deny it."""
        json.dumps(fields, allow_nan=False)  # what cannot be journalled is found before, not after
        try:
            files.write_bytes(self.root / "CURRENT", _pointer_bytes(number))
        except (EnvironmentUnfitError, OSError) as error:
            if self.pointer() != number:
                raise
            log.warning("generation %d is current, but a power cut now may take it back: %s", number, error)
        self._tell(f"generation {number} is current", event, number, **fields)

    def _tell(self, what: str, event: str, number: int, **fields: Any) -> None:
        try:
            self._journal.append(event, number, **fields)
        except (EnvironmentUnfitError, OSError) as error:
            log.warning("%s, but the journal lacks it for now: %s", what, error)


def _pointer_bytes(number: int) -> bytes:
    """The content of CURRENT. The check sum is there so that a flipped bit cannot name another generation."""
    digits = f"{number:06d}".encode()
    return digits + b" " + files.sha256(digits)[:16].encode() + b"\n"


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


def _number(name: str) -> int | None:
    """A whole number above 0 from the environment; what is none is said and left out, as the commit has happened."""
    text = os.environ.get(name, "")
    if not text:
        return None
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    log.warning("%s is %r, but must be a whole number above 0; it is left out", name, text)
    return None


def _size(path: Path) -> int:
    members = [path] if path.is_file() else path.rglob("*")
    return sum(member.lstat().st_size for member in members if member.is_file())
