"""The container of a bundle: a ZIP archive with exactly one valid byte form. Specification: docs/bundle.md.

The reader does not check for the many irregularities that a ZIP archive can have: it extracts names and data, packs
them again and refuses the file if any byte differs. This needs a writer whose output, unlike that of `zipfile`, does
not depend on the Python version.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from reprlib import repr as short  # limits the length of messages about untrusted files
from typing import BinaryIO

from ssd_edge.errors import BundleRefusedError

FORMAT = "ssd-edge-bundle"
VERSION = 1

# docs/bundle.md gives the reason for each limit.
MAX_ENTRIES = 64
MAX_BYTES = 2**31
MAX_NAME_LENGTH = 128
SUFFIXES = frozenset({".csv", ".html", ".json", ".md", ".onnx", ".png", ".safetensors", ".txt"})
SIGNATURE = "manifest.sig"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_COMMENT = f"{FORMAT}/{VERSION} sha256:".encode()
_HEX_LENGTH = 64
_BLOCK = 1 << 20
_OTHER_TOOL = "it does not have the byte form of docs/bundle.md; another tool may have packed it"

_LOCAL, _CENTRAL, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_LOCAL_LENGTH = 30
_VERSION_NEEDED = 10  # 1.0: stored files
_MADE_BY = 3 << 8 | _VERSION_NEEDED  # 3 is Unix: the attributes are a file mode
_ATTRIBUTES = 0o100644 << 16
_DATE = 1 << 5 | 1  # 1980-01-01


def check_digest(stream: BinaryIO) -> str:
    """Check the digest in the archive comment, and return the digest of the whole file.

    Raises:
        BundleRefusedError: The file is too large, not a bundle, of another version, truncated or damaged.
    """
    size = stream.seek(0, 2)
    check_size(size)
    return _check_digest(stream, size)


def unpack(stream: BinaryIO) -> dict[str, bytes]:
    """Return the entries of an archive, without checking their contents.

    Raises:
        BundleRefusedError: The byte form, or a name, a size or the number of entries, is not allowed.
    """
    entries = _split(stream, stream.seek(0, 2))
    check_names(entries)
    # The file may change while it is read, so only the copy in memory is checked and used.
    stream.seek(0)
    if not all(stream.read(len(block)) == block for block in blocks(entries)) or stream.read(1):
        raise BundleRefusedError(f"it is complete, but {_OTHER_TOOL}")
    return entries


def check_size(size: int) -> None:
    """Check that a bundle is not too large."""
    if size > MAX_BYTES:
        raise BundleRefusedError(f"it has {size} bytes, but a bundle has at most {MAX_BYTES}")


def _check_digest(stream: BinaryIO, size: int) -> str:
    stream.seek(max(0, size - len(_COMMENT) - _HEX_LENGTH))
    comment = stream.read()
    if version := re.match(rf"{FORMAT}/([0-9]{{1,4}}) ".encode(), comment):
        check_version(int(version[1]))
    if not comment.startswith(_COMMENT):
        what = "it is empty" if size == 0 else "it is not a bundle, or was cut short or appended to"
        raise BundleRefusedError(f"{what} (no '{_COMMENT.decode()}…' at its end); copy or build it again")
    stated = comment[len(_COMMENT) :]
    digest = hashlib.sha256()
    stream.seek(0)
    left = size - _HEX_LENGTH
    while left > 0 and (block := stream.read(min(_BLOCK, left))):
        digest.update(block)
        left -= len(block)
    found = digest.hexdigest().encode()
    if stated != found:
        raise BundleRefusedError(
            f"it is damaged (it states sha256 {stated[:12].decode('ascii', 'replace')}…, "
            f"but its bytes give {found[:12].decode()}…); copy or build it again"
        )
    digest.update(stated)
    return digest.hexdigest()


def check_version(version: int) -> None:
    """Check that the format version is the one that this reader supports."""
    if version != VERSION:
        advice = "; upgrade SSD-Edge on this machine" if version > VERSION else ""
        raise BundleRefusedError(f"it has format version {version}; this SSD-Edge reads {VERSION}{advice}")


def _split(stream: BinaryIO, size: int) -> dict[str, bytes]:
    """Split an archive by its local headers. Only lengths and names are used; `unpack` compares the rest."""
    entries: dict[str, bytes] = {}
    stream.seek(0)
    while True:
        header = stream.read(_LOCAL_LENGTH)
        if header[:4] in (_CENTRAL, _END):
            return entries
        if header[:4] != _LOCAL or len(header) < _LOCAL_LENGTH:
            raise BundleRefusedError(f"no entry begins at byte {stream.tell() - len(header)}: {_OTHER_TOOL}")
        data_length, _, name_length = struct.unpack_from("<IIH", header, 18)
        name = stream.read(name_length).decode("ascii", "backslashreplace")
        if len(entries) == MAX_ENTRIES:
            raise BundleRefusedError(f"it has more than {MAX_ENTRIES} entries")
        if data_length > size - stream.tell():
            raise BundleRefusedError(f"its entry {short(name)} is longer than the file")
        if name in entries:
            raise BundleRefusedError(f"its entry {short(name)} is there twice")
        entries[name] = stream.read(data_length)


def blocks(entries: Mapping[str, bytes]) -> Iterator[bytes]:
    """Yield the archive of these entries in blocks."""
    digest = hashlib.sha256()
    for block in _body(entries):
        digest.update(block)
        yield block
    yield digest.hexdigest().encode()


def _body(entries: Mapping[str, bytes]) -> Iterator[bytes]:
    """Yield everything before the hexadecimal digest."""
    directory, offset = [], 0
    for path in sorted(entries):
        name, data = path.encode("ascii"), entries[path]
        common = struct.pack(
            "<HHHHHIIIHH",
            *(_VERSION_NEEDED, 0, 0, 0, _DATE),  # flags, method "stored" and time are zero
            *(zlib.crc32(data), len(data), len(data), len(name), 0),
        )
        yield _LOCAL + common + name
        for start in range(0, len(data), _BLOCK):
            yield data[start : start + _BLOCK]
        place = struct.pack("<HHHII", 0, 0, 0, _ATTRIBUTES, offset)
        directory.append(_CENTRAL + struct.pack("<H", _MADE_BY) + common + place + name)
        offset += _LOCAL_LENGTH + len(name) + len(data)
    central = b"".join(directory)
    yield central
    count, comment_length = len(directory), len(_COMMENT) + _HEX_LENGTH
    end = struct.pack("<HHHHIIH", 0, 0, count, count, len(central), offset, comment_length)
    yield _END + end + _COMMENT


def check_names(entries: Mapping[str, bytes]) -> None:
    """Check that no name leaves the archive, collides with another, or has a suffix that is not allowed."""
    if len(entries) > MAX_ENTRIES:
        raise BundleRefusedError(f"it has {len(entries)} entries, but a bundle has at most {MAX_ENTRIES}")
    folded = {name.lower(): name for name in entries}
    for name in entries:
        if len(name) > MAX_NAME_LENGTH or not _NAME.fullmatch(name):
            raise BundleRefusedError(
                f"the name of its entry {short(name)} is not allowed: it is absolute, hidden, contains .., "
                f"is longer than {MAX_NAME_LENGTH} or has characters other than A-Z a-z 0-9 . _ - /"
            )
        other = folded[name.lower()]
        if other != name:
            raise BundleRefusedError(f"its entries {short(name)} and {short(other)} differ only in case")
        for folder in PurePosixPath(name.lower()).parents:
            if str(folder) in folded:
                raise BundleRefusedError(f"its entry {short(name)} is inside another entry, not in a folder")
        if name != SIGNATURE and PurePosixPath(name).suffix not in SUFFIXES:
            kinds = " ".join(sorted(SUFFIXES))
            raise BundleRefusedError(
                f"its entry {short(name)} has a suffix that is not allowed in a bundle; allowed are {kinds}"
            )
