"""The bundle format: pack, write, read, verify. The specification, with reasons, is docs/bundle.md.

A bundle has exactly one valid byte form. The reader does not look for the hundred ways in which a ZIP can be
odd: it takes names and data out, packs them again and compares. Whatever differs is refused. That is why
there is a small writer here instead of `zipfile`, whose output varies with the version of Python.

Law: ``read(p).entries == {**entries, "manifest.json": ...}`` after ``write(p, pack(manifest, entries))``.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from reprlib import repr as short  # a message stays one sentence, whatever the file holds
from typing import Any, BinaryIO

import numpy as np

from ssd_edge import files
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import BundleRefusedError, InputError

FORMAT = "ssd-edge-bundle"
VERSION = 1
MANIFEST = "manifest.json"
ROLES = {  # role -> the name of its entry
    "backbone": "backbone.onnx",
    "learner": "learner.safetensors",
    "statistics": "statistics.safetensors",
    "top_n": "top_n.safetensors",
    "classes": "classes.json",
    "card": "MODEL_CARD.md",
}
OPTIONAL_ROLES = frozenset({"top_n"})

# The reason of each limit is in docs/bundle.md.
MAX_ENTRIES = 64
MAX_BYTES = 2**31
MAX_JSON_BYTES = 4 * 2**20
MAX_NAME_LENGTH = 128
MAX_TITLE_LENGTH = 64

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_CREATED = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
_COMMENT = f"{FORMAT}/{VERSION} sha256:".encode()
_HEX_LENGTH = 64
_BLOCK = 1 << 20
_MAX_REASON = 400  # characters
_OTHER_TOOL = "it does not have the one byte form of docs/bundle.md; another tool may have packed it"

_LOCAL, _CENTRAL, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_LOCAL_LENGTH = 30
_VERSION_NEEDED = 10  # 1.0: stored files
_MADE_BY = 3 << 8 | _VERSION_NEEDED  # 3 is UNIX: the attributes are a file mode
_ATTRIBUTES = 0o100644 << 16
_DATE = 1 << 5 | 1  # 1980-01-01

_SCHEMA = {
    "format": str,
    "version": int,
    "name": str,
    "created": str,
    "producer": {"ssd_edge": str, "git": str, "packages": dict},
    "backbone": {"file": str, "sha256": str, "size": int, "dim": int, "precision": str, "id": str},
    "learner": {"name": str, "settings": dict},
    "classes": [str],
    "files": [{"path": str, "role": str, "size": int, "sha256": str}],
    "metrics": dict,
    "parity": dict,
}


@dataclass(frozen=True)
class Bundle:
    """A bundle that passed every check of docs/bundle.md; only `read` makes one.

    Attributes:
        manifest: the parsed manifest.json.
        entries: name → data, of all entries.
        sha256: digest of the whole file, what ``sha256sum`` prints.
    """

    manifest: dict[str, Any]
    entries: dict[str, bytes]
    sha256: str

    @property
    def roles(self) -> dict[str, str]:
        """Role → name of its entry, for what this bundle has."""
        return {item["role"]: item["path"] for item in self.manifest["files"]}

    def read(self, role: str) -> bytes:
        """The data of the entry with this role.

        Raises:
            InputError: this bundle has none; of the roles in `ROLES`, only ``top_n`` can be missing.
        """
        if role not in self.roles:
            raise InputError(f"this bundle has no entry for '{role}'; it has: {', '.join(self.roles)}")
        return self.entries[self.roles[role]]

    def tensors(self, role: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays and metadata of a safetensors entry; raises like `read`."""
        return files.parse_tensors(self.read(role), self.roles[role])

    @property
    def registry(self) -> ClassRegistry:
        """The classes, in the order of the learner's rows."""
        return ClassRegistry.from_json(json.loads(self.read("classes")))


def pack(manifest: Mapping[str, Any], entries: Mapping[str, tuple[str, bytes]]) -> bytes:
    """The bytes of a bundle: a function of its arguments only, whatever their order.

    Args:
        manifest: that of docs/bundle.md without ``format``, ``version`` and ``files``, which are added.
        entries: name → (role, data), of everything but the manifest.

    Raises:
        BundleRefusedError: `read` would refuse the result, e.g. because of a NaN in a weight.

    Example:
        >>> bundle.write("robot.ssdedge", bundle.pack(manifest, {"backbone.onnx": ("backbone", onnx), ...}))
    """
    listed = [
        {"path": path, "role": role, "size": len(data), "sha256": files.sha256(data)}
        for path, (role, data) in sorted(entries.items())
    ]
    contents = {path: data for path, (_, data) in entries.items()}
    contents[MANIFEST] = files.json_bytes({**manifest, "format": FORMAT, "version": VERSION, "files": listed})
    _check_size(sum(map(len, contents.values())))  # before sizes are put into 32 bits
    _check_names(contents)
    _check_contents(contents)
    data = b"".join(_canonical(contents))
    _check_size(len(data))
    return data


def write(path: str | Path, data: bytes) -> None:
    """Write what `pack` returned, atomically; the folder is made when it is missing.

    Raises:
        InputError: `path` is a folder.
        EnvironmentUnfitError: the disk is full, read-only or forbidden.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder, but a file is needed, e.g. {path / 'robot.ssdedge'}")
    files.make_directory(path.parent)
    files.write_bytes(path, data)


def read(path: str | Path) -> Bundle:
    """Read a bundle and verify all of it.

    Raises:
        InputError: no such file, a folder, or it cannot be read.
        BundleRefusedError: damaged, not a bundle, or of a newer version; in one sentence.

    Example:
        >>> bundle.read("robot.ssdedge").registry.names
        ['cup', 'screw']
    """
    try:
        with open(path, "rb") as stream:
            return _read(stream)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"the bundle {path} cannot be read: {reason}; check the path") from error
    except BundleRefusedError as error:
        # Whoever made the file chose the names in it: no line breaks or escape codes from there, and no end.
        reason = "".join(c if c.isprintable() else "?" for c in str(error))[:_MAX_REASON]
        raise BundleRefusedError(f"{path} is refused: {reason}") from error


def _read(stream: BinaryIO) -> Bundle:
    size = stream.seek(0, 2)
    _check_size(size)
    digest = _check_digest(stream, size)
    try:
        entries = _split(stream, size)
        _check_names(entries)
        # The file may change while it is read: compared, checked and used is what is in memory.
        stream.seek(0)
        if not all(stream.read(len(block)) == block for block in _canonical(entries)) or stream.read(1):
            raise BundleRefusedError(f"it is complete, but {_OTHER_TOOL}")
        return Bundle(_check_contents(entries), entries, digest)
    except RecursionError as error:
        raise BundleRefusedError("its JSON is nested too deeply") from error
    except BundleRefusedError as error:
        raise BundleRefusedError(f"{error} (a new one is built by: ssd-edge deploy)") from error


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise BundleRefusedError(f"it has {size} bytes, but a bundle has at most {MAX_BYTES}")


def _check_digest(stream: BinaryIO, size: int) -> str:
    """Compare the digest in the archive comment with the bytes before it; returns that of the whole file."""
    stream.seek(max(0, size - len(_COMMENT) - _HEX_LENGTH))
    comment = stream.read()
    if version := re.match(rf"{FORMAT}/([0-9]{{1,4}}) ".encode(), comment):
        _check_version(int(version[1]))
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


def _check_version(version: int) -> None:
    if version != VERSION:
        advice = "; upgrade SSD-Edge on this machine" if version > VERSION else ""
        raise BundleRefusedError(f"it has format version {version}; this SSD-Edge reads {VERSION}{advice}")


def _split(stream: BinaryIO, size: int) -> dict[str, bytes]:
    """Name → data by the local headers. Only lengths and names are read; `_read` compares the rest."""
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


def _canonical(entries: Mapping[str, bytes]) -> Iterator[bytes]:
    """The one byte form of these entries, in blocks."""
    digest = hashlib.sha256()
    for block in _body(entries):
        digest.update(block)
        yield block
    yield digest.hexdigest().encode()


def _body(entries: Mapping[str, bytes]) -> Iterator[bytes]:
    """All of it before the digest's hex digits."""
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


def _check_names(entries: Mapping[str, bytes]) -> None:
    if len(entries) > MAX_ENTRIES:
        raise BundleRefusedError(f"it has {len(entries)} entries, but a bundle has at most {MAX_ENTRIES}")
    folded = {name.lower(): name for name in entries}
    for name in entries:
        if len(name) > MAX_NAME_LENGTH or not _NAME.fullmatch(name):
            raise BundleRefusedError(
                f"the name of its entry {short(name)} is not allowed: it is absolute, hidden, goes up, "
                f"is longer than {MAX_NAME_LENGTH} or has other characters than A-Z a-z 0-9 . _ - /"
            )
        other = folded[name.lower()]
        if other != name:
            raise BundleRefusedError(f"its entries {short(name)} and {short(other)} differ only in case")
        for folder in PurePosixPath(name.lower()).parents:
            if str(folder) in folded:
                raise BundleRefusedError(f"its entry {short(name)} lies in another entry, not in a folder")


def _check_contents(entries: Mapping[str, bytes]) -> dict[str, Any]:
    """Check the manifest, and every entry against it; returns the manifest."""
    if MANIFEST not in entries:
        raise BundleRefusedError(f"it has no {MANIFEST}")
    parsed = {path: _parse_json(path, data) for path, data in entries.items() if path.endswith(".json")}
    manifest = parsed[MANIFEST]
    _check_manifest(manifest)
    _check_files(manifest, entries)
    _check_roles(manifest, entries)
    for path, data in entries.items():
        if path.endswith(".safetensors"):
            files.parse_tensors(data, f"its {path}")
    names, stated = ClassRegistry.from_json(parsed[ROLES["classes"]]).names, manifest["classes"]
    if names != stated:
        raise BundleRefusedError(f"its classes are {short(names)}, but {MANIFEST} says {short(stated)}")
    return manifest


def _parse_json(path: str, data: bytes) -> Any:
    if len(data) > MAX_JSON_BYTES:
        raise BundleRefusedError(f"its {path} has {len(data)} bytes, but may have {MAX_JSON_BYTES}")
    try:
        value = json.loads(data)
        canonical = files.json_bytes(value)
    except ValueError as error:  # also not UTF-8, NaN, or half a surrogate pair
        raise BundleRefusedError(f"its {path} is not valid JSON ({error})") from error
    if canonical != data:
        raise BundleRefusedError(f"its {path} is not canonical JSON (sorted keys, two spaces, no key twice)")
    return value


def _check_manifest(manifest: Any) -> None:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleRefusedError(f"its {MANIFEST} does not say that its format is '{FORMAT}'")
    if type(manifest.get("version")) is int:
        _check_version(manifest["version"])
    _check_types(manifest, _SCHEMA, MANIFEST)
    name, created = manifest["name"], manifest["created"]
    if not (0 < len(name) <= MAX_TITLE_LENGTH and name.isprintable()):
        raise BundleRefusedError(f"its name {short(name)} needs 1 to {MAX_TITLE_LENGTH} printable characters")
    if not _CREATED.fullmatch(created):
        raise BundleRefusedError(f"its time {short(created)} is not of the form 2026-11-21T04:33:00Z")
    size, dim = manifest["backbone"]["size"], manifest["backbone"]["dim"]
    if min(size, dim) < 1:
        raise BundleRefusedError(f"its backbone has size {size} and dim {dim}, but both must be at least 1")


def _check_types(value: Any, schema: Any, where: str) -> None:
    kind = schema if isinstance(schema, type) else type(schema)
    if type(value) is not kind:  # not isinstance: True is no number here
        raise BundleRefusedError(f"its {where} has type {type(value).__name__}, not {kind.__name__}")
    if isinstance(schema, dict):
        for key, inner in schema.items():
            if key not in value:
                raise BundleRefusedError(f"its {where} lacks the key '{key}'")
            _check_types(value[key], inner, f"{where}: {key}")
    elif isinstance(schema, list):
        for index, item in enumerate(value):
            _check_types(item, schema[0], f"{where}[{index}]")


def _check_files(manifest: Mapping[str, Any], entries: Mapping[str, bytes]) -> None:
    """``files`` lists every entry but the manifest, in order, with its size and digest."""
    listed = [item["path"] for item in manifest["files"]]
    present = sorted(set(entries) - {MANIFEST})
    for path in sorted(set(listed) - set(present)):
        raise BundleRefusedError(f"its {MANIFEST} lists {short(path)}, but there is no such entry")
    for path in sorted(set(present) - set(listed)):
        raise BundleRefusedError(f"its entry {short(path)} is not listed in {MANIFEST}")
    if listed != present:
        raise BundleRefusedError(f"its {MANIFEST} lists a file twice or out of order: {short(listed)}")
    for item in manifest["files"]:
        path, stated = item["path"], (item["size"], item["sha256"])
        found = (len(entries[path]), files.sha256(entries[path]))
        if found != stated:
            raise BundleRefusedError(f"its {path} is {short(found)}, but listed as {short(stated)}")


def _check_roles(manifest: Mapping[str, Any], entries: Mapping[str, bytes]) -> None:
    """Every role is there once, under its name; the manifest means the backbone that is there."""
    by_role: dict[str, str] = {}
    for item in manifest["files"]:
        role, path = item["role"], item["path"]
        if role in by_role:
            raise BundleRefusedError(f"its entries {by_role[role]} and {path} have one role, {short(role)}")
        if ROLES.get(role, path) != path:
            raise BundleRefusedError(f"its entry {path} has the role '{role}', but that is of {ROLES[role]}")
        by_role[role] = path
    for role in sorted(ROLES.keys() - OPTIONAL_ROLES - by_role.keys()):
        raise BundleRefusedError(f"it has no entry with the role '{role}' ({ROLES[role]})")
    path, stated = ROLES["backbone"], manifest["backbone"]
    if stated["file"] != path or stated["sha256"] != files.sha256(entries[path]):
        raise BundleRefusedError(f"its {path} is not the backbone that {MANIFEST} names (file, sha256)")
