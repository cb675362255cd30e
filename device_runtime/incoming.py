"""What a push has brought so far: the folder ``ROOT/incoming`` of a device.

::

    ROOT/incoming/<sha256>          an entry of a bundle; its bytes decide its name, the sender does not
    ROOT/incoming/<sha256>.part     the first bytes of one
    ROOT/incoming/NAME.ssdedge      the bundle, put together: of its entries there is one byte form only
    ROOT/incoming/.lock             held by the one receiver

When a connection breaks, what has come stays, and the next push goes on there. After an installation or a refusal
nothing of the bundle stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ssd_edge import files
from ssd_edge.bundle import container
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError

SYNC_EVERY = 8 << 20  # bytes that a power cut can take at most
KEEP = 7 * 24 * 3600  # seconds

_SHA256 = re.compile(r"[0-9a-f]{64}")
_ODD = re.compile(r"[^A-Za-z0-9._-]")


@dataclass(frozen=True)
class Offer:
    """What the sender announces; checked, but not to be believed.

    Attributes:
        sha256: of the bundle.
        size: of the bundle, bytes.
        name: a file name for the bundle.
        paths: name of an entry → its sha256.
        sizes: sha256 → bytes, of every different entry.
        retry: the connection broke in this same push, maybe after the installation.
        allow_downgrade: take a lower release.
    """

    sha256: str
    size: int
    name: str
    paths: dict[str, str]
    sizes: dict[str, int]
    retry: bool
    allow_downgrade: bool


def parse_offer(line: bytes) -> Offer:
    """Read and check an offer, before anything is written.

    Raises:
        BundleRefusedError: it is no offer, or goes beyond a limit of docs/bundle.md.
    """
    try:
        value = json.loads(line)
        paths = {item["path"]: item["sha256"] for item in value["entries"]}
        sizes = {item["sha256"]: item["size"] for item in value["entries"]}
        container.check_names(dict.fromkeys(paths, b""))
        right = (
            len(value["entries"]) == len(paths)
            and all(item["size"] == sizes[item["sha256"]] for item in value["entries"])
            and all(_SHA256.fullmatch(digest) for digest in (value["bundle"], *sizes))
            and all(type(size) is int and size >= 0 for size in (value["size"], *sizes.values()))
        )
        if not right:
            raise ValueError("two entries with one name, a size or a sha256 that is none")
        if value["size"] > container.MAX_BYTES or sum(sizes[digest] for digest in paths.values()) > value["size"]:
            raise ValueError(
                f"the bundle is to have {value['size']} bytes, but must have at least those of its entries and at "
                f"most {container.MAX_BYTES}"
            )
        name = _ODD.sub("_", str(value["name"]).removesuffix(".ssdedge"))[: container.MAX_NAME_LENGTH]
        return Offer(
            value["bundle"],
            value["size"],
            f"{name.lstrip('.-') or 'pushed'}.ssdedge",
            paths,
            sizes,
            value.get("retry") is True,
            value.get("allow_downgrade") is True,
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
        raise BundleRefusedError(f"the offer of the sender is refused ({reason[:200]}); push it again") from error


class Incoming:
    """The folder ``ROOT/incoming``: entries by their digest, complete and verified, or partial."""

    def __init__(self, root: Path) -> None:
        self.folder, self._root = root / "incoming", root
        files.make_directory(self.folder)

    @contextlib.contextmanager
    def lock(self, patience: float) -> Iterator[None]:
        """Hold the folder; for up to `patience` seconds, wait for whoever does.

        Raises:
            EnvironmentUnfitError: someone else holds it, or the file system has no locks.
        """
        path, end = self.folder / ".lock", time.monotonic() + patience
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise EnvironmentUnfitError(f"cannot open {path}: {error.strerror}; name another root") from error
        try:
            while not _try_lock(handle, path):
                if time.monotonic() >= end:
                    raise EnvironmentUnfitError(f"another push to {path.parent.parent} is going on; try again later")
                time.sleep(0.1)
            try:
                yield
            finally:
                fcntl.flock(handle, fcntl.LOCK_UN)  # closing alone does not, while a forked child has it open
        finally:
            os.close(handle)

    def find(self, digest: str, size: int) -> Path | None:
        """Where an entry is already, complete and undamaged: here, or installed."""
        installed = (self._root / "backbones" / f"{digest}.onnx", *self._root.glob("generations/*/*"))
        for path in (self.folder / digest, *installed):
            with contextlib.suppress(OSError):
                if path.stat().st_size == size and files.sha256_file(path) == digest:
                    return path
        return None

    def partial(self, digest: str, size: int) -> int:
        """How many bytes of an entry are here. One with too many is of no use and removed."""
        path = self.folder / f"{digest}.part"
        have = path.stat().st_size if path.exists() else 0
        if have > size:
            path.unlink()
        return have if have <= size else 0

    def take(self, read: Callable[[int], bytes], digest: str, size: int) -> None:
        """Read the rest of an entry; `read` gives one to so many bytes. When it raises, what has come stays.

        Raises:
            BundleRefusedError: the bytes are not those that were announced.
            EnvironmentUnfitError: the disk is full or not writable.
        """
        part, sha256 = self.folder / f"{digest}.part", hashlib.sha256()
        # Not through files.py: half an entry is no state, and is used only after its digest has been compared.
        with _clear_errors(part), open(part, "ab") as stream:
            have = synced = stream.tell()
            with open(part, "rb") as earlier:
                while block := earlier.read(1 << 20):
                    sha256.update(block)
            try:
                while have < size:
                    block = read(size - have)
                    stream.write(block)
                    sha256.update(block)
                    have += len(block)
                    if have - synced >= SYNC_EVERY:
                        _sync(stream)
                        synced = have
            finally:
                _sync(stream)
        if sha256.hexdigest() != digest:
            raise BundleRefusedError(
                f"an entry came with sha256 {sha256.hexdigest()[:12]}…, but {digest[:12]}… was announced; push again"
            )
        with _clear_errors(part):
            os.replace(part, self.folder / digest)
            files.fsync_directory(self.folder)

    def assemble(self, offer: Offer) -> Path:
        """Put the bundle together from its entries, all of which are here.

        Raises:
            BundleRefusedError: it is not the one that was announced.
        """
        data = io.BytesIO()
        for block in container.blocks(_Entries(self, offer)):
            data.write(block)
        if (found := files.sha256(data.getbuffer())) != offer.sha256:
            raise BundleRefusedError(
                f"the entries give a bundle with sha256 {found[:12]}…, but {offer.sha256[:12]}… was announced; both "
                "machines need the same version of SSD-Edge"
            )
        files.write_bytes(self.folder / offer.name, data.getbuffer())
        return self.folder / offer.name

    def discard(self, offer: Offer) -> None:
        """Remove what is here of a bundle."""
        for name in (offer.name, *offer.sizes, *(f"{digest}.part" for digest in offer.sizes)):
            with contextlib.suppress(OSError):
                (self.folder / name).unlink(missing_ok=True)

    def tidy(self, offer: Offer) -> None:
        """Remove leftovers of other pushes: those older than a week, and the oldest above twice this bundle's size."""
        needed = {*offer.sizes, *(f"{digest}.part" for digest in offer.sizes), ".lock"}
        total = 0
        with _clear_errors(self.folder):
            rest = [(path.stat(), path) for path in self.folder.iterdir() if path.name not in needed]
            for about, path in sorted(rest, key=lambda item: item[0].st_mtime, reverse=True):
                known = _SHA256.fullmatch(path.name.removesuffix(".part"))  # else a bundle that a cut left
                total += about.st_size if known else 0
                if not known or time.time() - about.st_mtime > KEEP or total > 2 * offer.size:
                    path.unlink()

    def empty(self) -> None:
        """Remove everything but the lock."""
        for path in self.folder.iterdir():
            if path.name != ".lock":
                with contextlib.suppress(OSError):
                    path.unlink()


class _Entries(Mapping[str, bytes]):
    """The entries of a bundle, each read when it is asked for: a device has little memory."""

    def __init__(self, incoming: Incoming, offer: Offer) -> None:
        self._incoming, self._offer = incoming, offer

    def __getitem__(self, path: str) -> bytes:
        digest = self._offer.paths[path]
        found = self._incoming.find(digest, self._offer.sizes[digest])
        if found is None:
            raise BundleRefusedError(f"the entry {path} was damaged on the device's disk; push again")
        return files.read_bytes(found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._offer.paths)

    def __len__(self) -> int:
        return len(self._offer.paths)


def _try_lock(handle: int, path: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a network file system without locks
        raise EnvironmentUnfitError(f"cannot lock {path}: {error.strerror}; name another root") from error
    return True


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


@contextlib.contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise EnvironmentUnfitError(f"cannot write {path}: {reason}; free some space or name another root") from error
