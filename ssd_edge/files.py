"""Atomic, durable writes: temporary file → fsync → rename → fsync of the folder. All state is written through here.

A reader sees either the old or the new file, also after a power cut: a rename is durable once its folder has been
synced. Tests inject faults before each step through `fault_hook`.

To commit a whole folder, write its files into a temporary sibling and call `commit_directory`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError

# Called as fault_hook(step, path) before each step; tests raise or kill the process in it.
fault_hook: Callable[[str, Path], None] | None = None

TEMPORARY_PREFIX = ".tmp-"
# A learner has about ten tensors, a backbone about a hundred; each takes about a hundred bytes of the header.
MAX_TENSOR_HEADER, MAX_TENSORS = 2**20, 4096
MAX_TENSOR_SIDES, MAX_TENSOR_SIDE = 8, 2**31
# The types that NumPy supports without further packages.
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "U32": 4, "I32": 4, "F32": 4}
_ITEM_BYTES |= {"U64": 8, "I64": 8, "F64": 8}
_JSON_KEY = "json"  # one metadata key only: safetensors keeps several in an unspecified order


def _step(step: str, path: Path) -> None:
    if fault_hook is not None:
        fault_hook(step, path)


@contextlib.contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """Replace common errors of the operating system by an `EnvironmentUnfitError` with advice."""
    try:
        yield
    except OSError as error:
        reason = {
            errno.ENOSPC: "the disk is full: free some space",
            errno.EDQUOT: "the disk quota is used up: free some space",
            errno.EROFS: "the file system is read-only: remount it or choose another folder",
            errno.EACCES: "permission denied: choose a folder that you may write to",
            errno.EPERM: "permission denied: choose a folder that you may write to",
            errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
            errno.ENOTDIR: "a part of the path is a file, not a folder",
            errno.ENOENT: "its folder does not exist: create it first",
            errno.EISDIR: "a folder has this name: choose another",
            errno.EIO: "the disk reports an error: it may be failing",
        }.get(error.errno or 0)
        if reason is None:
            raise
        raise EnvironmentUnfitError(f"cannot write {path}: {reason}") from error


def fsync_directory(path: Path) -> None:
    """Sync a folder to the disk, which makes created and renamed entries durable."""
    _step("fsync_directory", path)
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(path: Path) -> None:
    """Create a folder and its parents durably; an existing folder is kept.

    Raises:
        InputError: `path` is a file.
        EnvironmentUnfitError: The folder cannot be created.
    """
    with _clear_errors(path):
        missing = []
        probe = path
        while not probe.exists():
            missing.append(probe)
            probe = probe.parent
        for folder in reversed(missing):
            _step("mkdir", folder)
            folder.mkdir(exist_ok=True)
            fsync_directory(folder.parent)
        if not path.is_dir():
            raise InputError(f"{path} is a file, but a folder is needed; remove it or choose another path")


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file atomically and durably.

    Raises:
        EnvironmentUnfitError: The disk is full or read-only, or permission is denied; the old file is unchanged.
    """
    path = Path(path)
    with _clear_errors(path):
        _step("create", path)
        handle, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as stream:
                _step("write", path)
                stream.write(data)
                stream.flush()
                _step("fsync", path)
                os.fsync(stream.fileno())
            temporary.chmod(0o644)
            _step("rename", path)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file by UTF-8 text; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def json_bytes(value: Any) -> bytes:
    """Encode a value as canonical JSON: sorted keys, indented by two spaces, one final newline, no NaN."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace a file by canonical JSON; see `write_bytes` and `json_bytes`."""
    write_bytes(path, json_bytes(value))


def append_line(path: Path, line: str) -> None:
    """Append one line to a file durably. A crash leaves at most one incomplete last line."""
    path = Path(path)
    with _clear_errors(path):
        existed = path.exists()
        _step("append", path)
        with open(path, "ab") as stream:
            stream.write(line.encode("utf-8") + b"\n")
            stream.flush()
            _step("fsync", path)
            os.fsync(stream.fileno())
        if not existed:
            fsync_directory(path.parent)


def commit_directory(temporary: Path, final: Path) -> None:
    """Rename a finished temporary folder to `final`, durably. `final` must not exist."""
    with _clear_errors(final):
        fsync_directory(temporary)
        _step("rename", final)
        os.rename(temporary, final)
        fsync_directory(final.parent)


def remove_directory(path: Path) -> None:
    """Remove a folder. It is renamed first, so that a crash never leaves a partial folder under its name."""
    with _clear_errors(path):
        doomed = path.with_name(f"{TEMPORARY_PREFIX}removed-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        _step("rename", path)
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def tensor_bytes(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any] | None = None) -> bytes:
    """Serialise named arrays as safetensors, with any JSON object as `metadata`.

    Raises:
        InputError: A tensor contains NaN or infinity, which `parse_tensors` would refuse.
    """
    from safetensors.numpy import save

    for name, tensor in tensors.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise InputError(f"the tensor '{name}' contains NaN or infinity; nothing was written")
    packed = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    return save(packed, metadata={_JSON_KEY: json.dumps(metadata or {}, sort_keys=True, allow_nan=False)})


def parse_tensors(data: bytes, what: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Parse the safetensors file that `tensor_bytes` made.

    The header is validated against the actual bytes before the safetensors library parses it.

    Args:
        data: Content of the file.
        what: Name of the file for the error message.

    Returns:
        The arrays by name, and the metadata.

    Raises:
        BundleRefusedError: The data is not safetensors, is truncated, exceeds a limit, or contains NaN or infinity.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        metadata = json.loads(_tensor_header(data).get("__metadata__", {}).get(_JSON_KEY, "{}"))
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleRefusedError(f"{what} is not a valid safetensors file ({error}); restore it") from error
    for name, tensor in tensors.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise BundleRefusedError(f"{what}: the tensor '{name}' contains NaN or infinity; restore the file")
    return tensors, metadata


def _tensor_header(data: bytes) -> dict[str, Any]:
    """Return the header of a safetensors file after checking it against the data.

    Raises:
        ValueError, KeyError, TypeError: The header is malformed or does not match the data.
    """
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(MAX_TENSOR_HEADER, len(data) - 8):
        raise ValueError(
            f"a header of {length} bytes in a file of {len(data)}, with at most {MAX_TENSOR_HEADER} allowed"
        )

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a duplicate name")
        return dict(pairs)

    header: dict[str, Any] = json.loads(data[8 : 8 + length], object_pairs_hook=without_duplicates)
    tensors = [value for name, value in header.items() if name != "__metadata__"]
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"{len(tensors)} tensors, but at most {MAX_TENSORS} are allowed")
    at = 0
    for tensor in sorted(tensors, key=lambda item: item["data_offsets"]):
        dtype, shape, (begin, end) = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
        if dtype not in _ITEM_BYTES:
            raise ValueError(f"unknown type {dtype!r:.20}; known: {', '.join(_ITEM_BYTES)}")
        size = _ITEM_BYTES[dtype]
        for side in shape:
            # even beside a zero: NumPy multiplies all sides in 64 bits
            if type(side) is not int or not 0 <= side <= MAX_TENSOR_SIDE or len(shape) > MAX_TENSOR_SIDES:
                raise ValueError(f"a shape of {len(shape)} dimensions with the size {side!r:.20}")
            size *= side
        if type(begin) is not int or begin != at or type(end) is not int or end != at + size:
            raise ValueError(
                f"a tensor at {begin!r:.20} to {end!r:.20}, but its shape needs {size:.3g} bytes from {at}"
            )
        if dtype == "BOOL" and data[8 + length + begin : 8 + length + end].strip(b"\0\1"):
            raise ValueError("a Boolean value that is neither 0 nor 1")
        at = end
    if 8 + length + at != len(data):
        raise ValueError(f"tensors of {at} bytes, but the file has {len(data) - 8 - length}")
    return header


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any] | None = None) -> None:
    """Replace a file by safetensors; see `write_bytes` and `tensor_bytes`."""
    write_bytes(path, tensor_bytes(tensors, metadata))


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a safetensors file.

    Returns:
        The arrays by name, and the metadata.

    Raises:
        InputError: The file does not exist or cannot be read.
        BundleRefusedError: The file is damaged.
    """
    return parse_tensors(read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        InputError: It does not exist, is a folder, or permission is denied.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; check the path") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder, but a file is needed") from error
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: permission denied") from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: The file does not exist or cannot be read.
        BundleRefusedError: The file is not valid JSON.
    """
    return parse_json(read_bytes(path), str(path))


def parse_json(data: bytes, what: str) -> Any:
    """Parse JSON.

    Args:
        data: Content of the file.
        what: Name of the file for the error message.

    Raises:
        BundleRefusedError: The data is not valid JSON.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleRefusedError(f"{what} is not valid JSON ({error}); restore it") from error


def sha256(data: bytes) -> str:
    """Return the SHA-256 digest of bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 digest of a file in hexadecimal, reading it in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
