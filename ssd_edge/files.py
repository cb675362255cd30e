"""Atomic, durable writes: temporary file → fsync → rename → fsync of the folder. All state is written through here.

A reader sees either the old or the new file, also after a power cut: a rename is durable once its folder has been
synced. Tests inject faults before each step through `fault_hook`.

To commit a whole folder, write its files into a temporary sibling, sync that, and rename it (`Tree.sync`,
`Tree.rename`). Whether something exists is asked here as well: what cannot be read is an error, never "nothing there".
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError, system_problem
from ssd_edge.system import file_lock

# Called as fault_hook(step, path) before each step; tests raise or kill the process in it.
fault_hook: Callable[[str, Path], None] | None = None

TEMPORARY_PREFIX = ".tmp-"
_PASS = getattr(os, "O_PATH", os.O_RDONLY)  # opens a folder that may be entered, also if it cannot be listed
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
def _clear_errors(path: Path, action: str = "write") -> Iterator[None]:
    """Replace errors of the operating system by an `EnvironmentUnfitError` that says what to do."""
    try:
        yield
    except OSError as error:
        raise unfit(path, error, action) from error


def unfit(path: Path, error: OSError, action: str = "read") -> EnvironmentUnfitError:
    """Return the error that tells a user that a file cannot be read or written, and what to do."""
    missing = action == "write" and error.errno == errno.ENOENT
    reason = "its folder does not exist: create it first" if missing else system_problem(error)
    return EnvironmentUnfitError(f"cannot {action} {path}: {reason}")


class Tree:
    """The files below a root folder, such as a device's. The root may be a symbolic link; no link below it is followed.

    Otherwise anyone who can write into the root could direct a write, or a read, of another user to any file. Every
    folder is therefore opened relative to the one above it, and files must be regular ones.

    Attributes:
        root: The root folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @contextlib.contextmanager
    def folder(self, path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
        """Open a folder, the root or one below it, and yield its descriptor.

        Raises:
            OSError: It does not exist, is a file or a symbolic link, or cannot be opened.
        """
        parts = path.relative_to(self.root).parts
        handle = os.open(self.root, (_PASS if parts else flags) | os.O_DIRECTORY)
        try:
            for left, part in enumerate(parts, 1 - len(parts)):
                kind = (_PASS if left else flags) | os.O_DIRECTORY | os.O_NOFOLLOW
                outer, handle = handle, os.open(part, kind, dir_fd=handle)
                os.close(outer)
            yield handle
        finally:
            os.close(handle)

    def status(self, path: Path) -> os.stat_result | None:
        """Return the status of an entry, of a link itself, or None if it does not exist.

        Raises:
            EnvironmentUnfitError: It cannot be determined whether it exists.
        """
        try:
            if path == self.root:
                return status(path)
            with self.folder(path.parent, _PASS) as at:
                return _status_at(path.name, at)
        except FileNotFoundError:
            status(self.root)  # raises for a link to a missing folder, which is not an empty root
            return None
        except OSError as error:
            raise unfit(path, error) from error

    def entries(self, path: Path) -> Sequence[Path]:
        """Return the entries of a folder, sorted by name; none if it does not exist.

        Raises:
            EnvironmentUnfitError: It is not a folder or cannot be listed.
        """
        try:
            with self.folder(path) as at:
                return [path / name for name in sorted(os.listdir(at))]
        except FileNotFoundError:
            status(self.root)
            return []
        except OSError as error:
            raise unfit(path, error) from error

    def read(self, path: Path) -> bytes:
        """Read a regular file.

        Raises:
            OSError: It does not exist, is a symbolic link or not a regular file, or cannot be read.
        """
        with self._open(path) as stream:
            return stream.read()

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 digest of a regular file in hexadecimal; raises as `read`."""
        with self._open(path) as stream:
            return _digest(stream)

    def size(self, path: Path) -> int:
        """Return the size of a file, or of all files below a folder; 0 if it does not exist.

        Raises:
            EnvironmentUnfitError: A folder cannot be listed.
        """
        about = self.status(path)
        if about is None or not stat.S_ISDIR(about.st_mode):
            return about.st_size if about else 0
        return sum(map(self.size, self.entries(path)))

    def make(self, path: Path, mode: int = 0o777) -> None:
        """Create a folder, and those above it, durably; existing ones are kept.

        Args:
            path: The root or a folder below it.
            mode: Mode of the folders that are created, less the umask of the process.

        Raises:
            EnvironmentUnfitError: A part of the path is a file or a symbolic link, or a folder cannot be created.
        """
        if path == self.root:
            make_directory(path, mode)
            return
        if self.status(path.parent) is None:
            self.make(path.parent, mode)
        with _clear_errors(path):
            with self.folder(path.parent) as at:
                if _status_at(path.name, at) is None:
                    _step("mkdir", path)
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(path.name, mode, dir_fd=at)
                    _sync_folder(at, path.parent)
            with self.folder(path, _PASS):  # not a file or a link
                pass

    def write(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        """Replace a regular file atomically and durably; see `write_bytes`."""
        with _clear_errors(path), self.folder(path.parent) as at:
            if about := _status_at(path.name, at):
                _check_regular(about)
            _step("create", path)
            temporary = f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=at)
            try:
                with os.fdopen(handle, "wb") as stream:
                    _step("write", path)
                    stream.write(data)
                    stream.flush()
                    os.fchmod(handle, mode)
                    _step("fsync", path)
                    os.fsync(handle)
                _step("rename", path)
                os.replace(temporary, path.name, src_dir_fd=at, dst_dir_fd=at)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=at)
                raise
            _sync_folder(at, path.parent)

    def append(self, path: Path, line: str) -> None:
        """Append one line to a regular file durably; a file with a second name is copied first."""
        data = line.encode("utf-8") + b"\n"
        with _clear_errors(path), self.folder(path.parent) as at:
            _step("append", path)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            with os.fdopen(os.open(path.name, flags, 0o644, dir_fd=at), "ab") as stream:
                about = _check_regular(os.fstat(stream.fileno()))
                if about.st_nlink == 1:
                    stream.write(data)
                    stream.flush()
                    _step("fsync", path)
                    os.fsync(stream.fileno())
            if about.st_nlink != 1:  # it has another name, in a backup or somewhere else, where nothing may change
                self.write(path, self.read(path) + data)
            elif not about.st_size:
                _sync_folder(at, path.parent)

    def rename(self, path: Path, final: Path) -> None:
        """Rename an entry within its folder, durably; an existing folder is not replaced unless it is empty."""
        with _clear_errors(final), self.folder(final.parent) as at:
            _step("rename", final)
            os.rename(path.name, final.name, src_dir_fd=at, dst_dir_fd=at)
            _sync_folder(at, final.parent)

    def sync(self, path: Path) -> None:
        """Make the created and renamed entries of a folder durable."""
        with _clear_errors(path), self.folder(path) as at:
            _sync_folder(at, path)

    def remove(self, path: Path) -> None:
        """Delete a file, a link or a folder with everything in it; what does not exist is ignored.

        A crash may leave a part of a folder: rename it first to a name that begins with `TEMPORARY_PREFIX`.

        Raises:
            EnvironmentUnfitError: Something cannot be deleted.
        """
        with _clear_errors(path, "delete"), contextlib.suppress(FileNotFoundError), self.folder(path.parent) as at:
            _remove(path.name, at)

    def chmod(self, path: Path, mode: int) -> None:
        """Set the mode of a folder.

        Raises:
            EnvironmentUnfitError: It belongs to another user.
        """
        with _clear_errors(path), self.folder(path) as at:
            if stat.S_IMODE(os.fstat(at).st_mode) != mode:
                os.fchmod(at, mode)

    def exposure(self, path: Path, group: bool = True) -> str:
        """Return how users other than root and the owner of the root may change an entry, or an empty string.

        Args:
            path: The root or an entry below it.
            group: Also if only the members of its group may.

        Raises:
            EnvironmentUnfitError: It cannot be determined.
        """
        about, root = self.status(path), status(self.root)
        if about is None or root is None:
            return ""
        if stat.S_ISLNK(about.st_mode):
            return "it is a symbolic link, which is never followed below a root: replace it by what it points to"
        if about.st_uid not in (0, root.st_uid):
            return f"it belongs to user {about.st_uid}, but the root to user {root.st_uid}: chown it, or remove it"
        if about.st_mode & (0o022 if group else 0o002):
            who = "every user" if about.st_mode & 0o002 else "its group"
            return f"{who} may write to it (mode {stat.S_IMODE(about.st_mode):o}): run chmod go-w {path}"
        return ""

    @contextlib.contextmanager
    def lock(self, path: Path) -> Iterator[bool]:
        """Hold an exclusive lock on a file; see `system.file_lock`."""
        with contextlib.ExitStack() as stack:
            with _clear_errors(path, "lock"):
                at = stack.enter_context(self.folder(path.parent))
            yield stack.enter_context(file_lock(path, at))

    @contextlib.contextmanager
    def _open(self, path: Path) -> Iterator[BinaryIO]:
        with self.folder(path.parent, _PASS) as at:
            # O_NONBLOCK: do not wait for the writer of a pipe
            handle = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
        with os.fdopen(handle, "rb") as stream:
            _check_regular(os.fstat(handle))
            yield stream


def _status_at(name: str, at: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=at, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _check_regular(about: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(about.st_mode):
        number = {stat.S_IFDIR: errno.EISDIR, stat.S_IFLNK: errno.ELOOP}.get(stat.S_IFMT(about.st_mode), errno.ENXIO)
        raise OSError(number, "not a regular file")
    return about


def _sync_folder(handle: int, path: Path) -> None:
    _step("fsync_directory", path)
    os.fsync(handle)


def _remove(name: str, at: int) -> None:
    about = os.stat(name, dir_fd=at, follow_symlinks=False)
    if not stat.S_ISDIR(about.st_mode):
        os.unlink(name, dir_fd=at)
        return
    handle = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
    try:
        for inner in os.listdir(handle):
            _remove(inner, handle)
    finally:
        os.close(handle)
    os.rmdir(name, dir_fd=at)


def status(path: Path) -> os.stat_result | None:
    """Return the status of a file or folder, following links, or None if nothing has this name.

    Unlike `Path.exists` and its like, which answer no (depending on the version of Python) where they cannot know.

    Raises:
        InputError: It is a symbolic link to something that does not exist, or has a null character.
        EnvironmentUnfitError: It cannot be determined, e.g. for lack of permission.
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise InputError(f"{path} is a link to something that does not exist; remove the link or mend it") from None
        return None
    except ValueError as error:
        raise InputError(f"{str(path)!r} is not a path: {error}") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        raise unfit(path, error) from error


def exists(path: Path) -> bool:
    """Return True if a file or folder has this name; raises as `status`."""
    return status(path) is not None


def is_file(path: Path) -> bool:
    """Return True for a regular file or a link to one; raises as `status`."""
    about = status(path)
    return about is not None and stat.S_ISREG(about.st_mode)


def is_folder(path: Path) -> bool:
    """Return True for a folder or a link to one; raises as `status`."""
    about = status(path)
    return about is not None and stat.S_ISDIR(about.st_mode)


def list_folder(path: Path) -> Sequence[Path]:
    """Return the entries of a folder, sorted by name; none if it does not exist.

    Unlike `Path.glob`, which returns nothing for a folder that cannot be listed.

    Raises:
        InputError: It is a file, or a link to something that does not exist.
        EnvironmentUnfitError: It cannot be listed, e.g. for lack of permission.
    """
    try:
        return [path / name for name in sorted(os.listdir(path))]
    except (FileNotFoundError, NotADirectoryError) as error:
        if status(path) is None:
            return []
        raise InputError(f"{path} is a file, but a folder is needed") from error
    except OSError as error:
        raise unfit(path, error) from error


def check_output(path: Path) -> None:
    """Check that a file may be written: nothing has its name, or a regular file, which is replaced.

    Raises:
        InputError: It is a folder, a symbolic link, a device or another special file.
        EnvironmentUnfitError: It cannot be determined.
    """
    about = Tree(path.parent).status(path)
    if about and stat.S_ISDIR(about.st_mode):
        raise InputError(f"{path} is a folder, but a file is needed; add the name of the file")
    if about and not stat.S_ISREG(about.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(about.st_mode) else "a device or another special file"
        raise InputError(f"{path} is {kind}, and only a regular file is replaced; choose another path")


def fsync_directory(path: Path) -> None:
    """Sync a folder to the disk, which makes created and renamed entries durable."""
    Tree(path).sync(path)


def make_directory(path: Path, mode: int = 0o777) -> None:
    """Create a folder and its parents durably; an existing folder is kept.

    Args:
        path: The folder.
        mode: Mode of the folders that are created, less the umask of the process.

    Raises:
        InputError: `path` is a file.
        EnvironmentUnfitError: The folder cannot be created.
    """
    above = path
    while not exists(above):
        above = above.parent
    if above != path:
        Tree(above).make(path, mode)
    elif not is_folder(path):
        raise InputError(f"{path} is a file, but a folder is needed; remove it or choose another path")


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file atomically and durably. Only a regular file is replaced.

    Raises:
        EnvironmentUnfitError: The disk is full or read-only, permission is denied, or a link or a device has this
            name; the old file is unchanged.
    """
    path = Path(path)
    Tree(path.parent).write(path, data)


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
        EnvironmentUnfitError: It cannot be read for another reason.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; check the path") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder, but a file is needed") from error
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: permission denied") from error
    except OSError as error:
        raise unfit(path, error) from error


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
    with open(path, "rb") as stream:
        return _digest(stream)


def _digest(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
