"""The store of a device: every state it ever committed, one of them current; safe against a cut at any point.

::

    ROOT/backbones/<sha256>.onnx   shared by generations; written once
    ROOT/generations/000001/       generation.json and the files that it lists; never changed
    ROOT/CURRENT                   "000001", a space, a check sum of it, and a newline
    ROOT/journal.jsonl             one event a line: install, learn, rollback, recovered
    ROOT/.lock                     held by the one writer; readers take no lock

A commit writes a temporary folder, gives it its name, then replaces CURRENT: that rename is the commit.
A cut before it leaves the old generation current (and perhaps a complete folder that never was), after it the
new one. The journal comes last; what a cut took from it, the next writer adds. No state is read from it: it
is for people, keeps its numbers from being used again, and says where to look first for a stand-in.
All generations are kept; what will delete old ones must spare CURRENT.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssd_edge import files
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError

VERSION = 1
RECORD = "generation.json"
_UTC = "%Y-%m-%dT%H:%M:%SZ"
_NUMBER = re.compile(r"[0-9]{6}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

log = logging.getLogger(__name__)


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
        data = _read_member(path)
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
        self._install = f"ssd-edge device install BUNDLE --root {root}"

    def current(self) -> Generation:
        """The current generation, every file of it verified.

        When it is damaged, the nearest intact one that it was learned from stands in, else the newest intact
        older one; `Generation.fallback` then says so, and a warning is logged. A newer one never stands in: a
        rollback may have left it on purpose.

        Raises:
            InputError: nothing is installed.
            BundleRefusedError: neither it nor an older one is intact.
        """
        self._check_installed()
        number = self._pointer()
        problem = "" if number else f"{self.root / 'CURRENT'} is missing or damaged"
        for candidate in self._candidates(number):
            try:
                generation = self._open(candidate)
            except BundleRefusedError as error:
                problem = problem or str(error)
                continue
            if problem:
                problem += f"; generation {candidate} is used instead"
                log.warning(problem)
            return dataclasses.replace(generation, fallback=problem)
        raise BundleRefusedError(
            f"{problem}, and no older generation is intact (newer: {self._intact()}); choose one with "
            f"ssd-edge device rollback, or run: {self._install}"
        )

    def get(self, number: int) -> Generation:
        """One generation, verified.

        Raises:
            InputError: it does not exist or is damaged; lists those that are intact.
        """
        self._check_installed()
        try:
            return self._open(number)
        except BundleRefusedError as error:
            raise InputError(f"{error}; available generations: {self._intact()}") from error

    def list(self) -> Sequence[dict[str, Any]]:
        """A summary of each generation (a damaged one: ``intact`` False, ``problem``); raises like `get`."""
        self._check_installed()
        summaries = []
        for number in self._numbers():
            summary = {"number": number, "current": number == self._pointer(), "intact": True, "problem": ""}
            summary |= dict.fromkeys(("parent", "origin", "created_utc", "backbone", "info"))
            try:
                generation = self._open(number)
                summary |= {key: getattr(generation, key) for key in summary if hasattr(generation, key)}
            except BundleRefusedError as error:
                summary |= {"intact": False, "problem": str(error)}
            summaries.append(summary)
        return summaries

    def journal(self) -> Sequence[dict[str, Any]]:
        """The events, in order; a line that cannot be read (cut short, damaged) is left out."""
        events = []
        for line in self._journal_bytes().splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                event = json.loads(line)
                if type(event["seq"]) is int and type(event["generation"]) is int:
                    events.append(event)
        return events

    def backbone_path(self, sha256: str) -> Path:
        """The file of a backbone, after its bytes have been compared with its name.

        Raises:
            BundleRefusedError: missing or damaged.
        """
        path = self.root / "backbones" / f"{sha256}.onnx"
        try:
            found = files.sha256_file(path)
        except OSError as error:
            found = error.strerror
        if found != sha256:
            raise BundleRefusedError(f"{path} is missing or damaged ({found}); run: {self._install}")
        return path

    @contextlib.contextmanager
    def writer(self) -> Iterator[None]:
        """Hold the root for writing; not to be nested. First repairs what a cut has left behind.

        Raises:
            EnvironmentUnfitError: someone else is writing, or the root is not writable.
        """
        for folder in ("generations", "backbones"):
            files.make_directory(self.root / folder)
        lock = self._lock()
        try:
            self._recover()
            self._writing = True
            yield
        finally:
            self._writing = False
            # Closing alone would not release it while a child that was forked meanwhile has it open.
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)

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
            EnvironmentUnfitError: the disk is full, read-only or forbidden.
        """
        self._check_writing()
        if bad := [name for name in contents if not _FILE_NAME.fullmatch(name) or name == RECORD]:
            raise ValueError(f"not names for files of a generation: {bad}")
        if (parent is None) == (backbone is None):
            raise ValueError("either a parent or a backbone is needed")
        if backbone is not None:
            self.backbone_path(backbone)
        journalled = [event["generation"] for event in self.journal()]  # also CURRENT's: see _recover
        number = max([0, *self._numbers(), *journalled]) + 1
        body = {
            "version": VERSION,
            "number": number,
            "parent": parent,
            "origin": "install" if parent is None else "learn",
            "created_utc": time.strftime(_UTC, time.gmtime()),
            "backbone": backbone or self._open(parent).backbone,
            "info": info,
            "files": {n: {"size": len(data), "sha256": files.sha256(data)} for n, data in contents.items()},
        }
        final = self.root / "generations" / f"{number:06d}"
        temporary = final.with_name(files.TEMPORARY_PREFIX + final.name)
        try:
            files.make_directory(temporary)
            for name, data in contents.items():
                files.write_bytes(temporary / name, data)
            files.write_bytes(temporary / RECORD, _sealed(body))
            files.commit_directory(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # after a failure: a full disk must not stay full
        self._switch(number, body["origin"], parent=parent, info=info)
        return self._open(number)

    def set_current(self, number: int, event: str = "rollback", info: dict | None = None) -> Generation:
        """Make an existing generation the current one.

        Raises:
            InputError: it does not exist or is damaged; lists those that are intact.
        """
        self._check_writing()
        generation = self.get(number)
        self._switch(number, event, info=info or {})
        return generation

    def _numbers(self) -> Sequence[int]:
        return sorted(int(p.name) for p in self.root.glob("generations/*") if _NUMBER.fullmatch(p.name))

    def _intact(self) -> str:
        return ", ".join(str(item["number"]) for item in self.list() if item["intact"]) or "none"

    def _journal_bytes(self) -> bytes:
        path = self.root / "journal.jsonl"
        return files.read_bytes(path) if path.exists() else b""

    def _check_installed(self) -> None:
        # A first install that was cut may have left a generation, but neither of these.
        if not (self.root / "CURRENT").exists() and not self.journal():
            raise InputError(f"no bundle is installed in {self.root}; run: {self._install}")

    def _check_writing(self) -> None:
        if not self._writing:
            raise RuntimeError("call this inside 'with generations.writer():'")

    def _pointer(self) -> int | None:
        """The number in CURRENT, or None when the file is missing or damaged."""
        with contextlib.suppress(OSError):
            content = (self.root / "CURRENT").read_bytes()
            number = int(content[:6]) if _NUMBER.fullmatch(content[:6].decode("ascii", "replace")) else 0
            return number if content == _pointer_bytes(number) else None
        return None

    def _candidates(self, number: int | None) -> Sequence[int]:
        """`number`, then what may stand in for it, best first: see `current`."""
        events = self.journal()
        if not number:
            number = events[-1]["generation"] if events else max(self._numbers(), default=0)
        parents = {e["generation"]: e["parent"] for e in events if type(e.get("parent")) is int}
        order = [number]
        while parents.get(order[-1], order[-1]) < order[-1]:  # "<": no cycle, whatever the journal says
            order.append(parents[order[-1]])
        return order + [n for n in reversed(self._numbers()) if n < number and n not in order]

    def _open(self, number: int) -> Generation:
        """Read and verify a generation; refused is what is missing, damaged, or of a newer version."""
        path = self.root / "generations" / f"{number:06d}"
        raw = _read_member(path / RECORD)
        try:
            record = json.loads(raw)
            body = {key: value for key, value in record.items() if key != "digest"}
            if _sealed(body) != raw:
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

    def _lock(self) -> int:
        path = self.root / ".lock"
        try:
            # Not through files.py: a replaced file would be another lock. It holds no state.
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.pread(handle, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(handle)
            reason = f"another process is writing {self.root}, pid {pid}; try again when it is done"
            raise EnvironmentUnfitError(reason) from error
        except OSError as error:  # also a network file system without locks
            raise EnvironmentUnfitError(f"cannot lock {path}: {error.strerror}; name another root") from error
        with contextlib.suppress(OSError):  # a full disk: the pid is only for the message above
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        return handle

    def _recover(self) -> None:
        """Clear what a cut has left behind, and complete the journal."""
        for folder in (self.root, self.root / "generations", self.root / "backbones"):
            for path in folder.glob(f"{files.TEMPORARY_PREFIX}*"):
                if path.is_dir() and not path.is_symlink():
                    files.remove_directory(path)
                else:
                    path.unlink()
        events, pointer = self.journal(), self._pointer()
        if pointer and (not events or events[-1]["generation"] != pointer):
            self._append("recovered", pointer)

    def _switch(self, number: int, event: str, **fields: Any) -> None:
        """The commit. Once CURRENT has been replaced it has happened, so a later failure must not deny it."""
        json.dumps(fields, allow_nan=False)  # what cannot be journalled is found before, not after
        files.write_bytes(self.root / "CURRENT", _pointer_bytes(number))
        try:
            self._append(event, number, **fields)
        except (EnvironmentUnfitError, OSError) as error:
            log.warning("generation %d is current, but the journal lacks it for now: %s", number, error)

    def _append(self, event: str, number: int, **fields: Any) -> None:
        path = self.root / "journal.jsonl"
        if not (self._journal_bytes() or b"\n").endswith(b"\n"):
            files.append_line(path, "")  # ends the line that a cut left incomplete
        seq = max((earlier["seq"] for earlier in self.journal()), default=0) + 1
        now = time.strftime(_UTC, time.gmtime())
        line = {"seq": seq, "untrusted_time": now, "event": event, "generation": number, **fields}
        files.append_line(path, json.dumps(line, allow_nan=False))


def _pointer_bytes(number: int) -> bytes:
    """The content of CURRENT. The check sum is there so that a flipped bit cannot name another generation."""
    digits = f"{number:06d}".encode()
    return digits + b" " + files.sha256(digits)[:16].encode() + b"\n"


def _sealed(body: Mapping[str, Any]) -> bytes:
    """The one byte form of a generation.json: any flipped bit makes it another one."""
    return files.json_bytes({**body, "digest": files.sha256(files.json_bytes(body))})


def _read_member(path: Path) -> bytes:
    """A file that must be there: that it cannot be read is damage, not a user's mistake."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleRefusedError(f"{path} cannot be read: {error.strerror}") from error
