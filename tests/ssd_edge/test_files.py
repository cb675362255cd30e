"""Atomic writes under faults at every step, JSON, hashes and tensor files."""

from __future__ import annotations

import errno
import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import unprivileged

from ssd_edge import files
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError

WRITE_STEPS = ["create", "write", "fsync", "rename", "fsync_directory"]


class Cut(BaseException):
    """Simulated power loss: no error handler runs."""


Watch = Callable[[Callable[[str, Path], None]], None]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return lambda hook: monkeypatch.setattr(files, "fault_hook", hook)


def fail_at(step: str, error: BaseException) -> Callable[[str, Path], None]:
    def hook(name: str, path: Path) -> None:
        if name == step:
            raise error

    return hook


def test_steps_of_a_write(tmp_path: Path, watch: Watch) -> None:
    steps: list[tuple[str, str]] = []
    watch(lambda step, path: steps.append((step, path.name)))
    files.write_bytes(tmp_path / "a", b"x")
    assert [step for step, _ in steps] == WRITE_STEPS
    assert [name for _, name in steps] == ["a"] * 4 + [tmp_path.name]


@pytest.mark.parametrize("step", WRITE_STEPS)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "bad sector"), Cut()])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_fault_leaves_the_old_or_the_new_content(
    step: str, error: BaseException, old: bytes | None, tmp_path: Path, watch: Watch
) -> None:
    path = tmp_path / "state"
    if old is not None:
        path.write_bytes(old)
    watch(fail_at(step, error))
    with pytest.raises((OSError, EnvironmentUnfitError, Cut)):
        files.write_bytes(path, b"new and longer")
    expected = b"new and longer" if step == "fsync_directory" else old  # after the rename the new content is in place
    assert (path.read_bytes() if path.exists() else None) == expected
    assert [entry.name for entry in tmp_path.iterdir()] == (["state"] if expected else [])


@pytest.mark.parametrize("step", WRITE_STEPS)
def test_a_kill_leaves_the_old_or_the_new_content(step: str, tmp_path: Path, watch: Watch) -> None:
    """As above for a process that is killed: at most a temporary file is left."""
    path = tmp_path / "state"
    path.write_bytes(b"old")

    def die(name: str, _: Path) -> None:
        if name == step:
            os._exit(9)

    child = os.fork()
    if child == 0:
        try:
            files.fault_hook = die
            files.write_bytes(path, b"new and longer")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert path.read_bytes() == (b"new and longer" if step == "fsync_directory" else b"old")
    others = [entry.name for entry in tmp_path.iterdir() if entry != path]
    assert all(name.startswith(files.TEMPORARY_PREFIX) for name in others)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, "the disk is full: free some space"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the file system is read-only: remount it or choose another folder"),
        (errno.EACCES, "permission denied: choose a folder that you may write to"),
        (errno.EPERM, "permission denied"),
        (errno.EMFILE, r"too many open files: raise the limit \(ulimit -n\)"),
    ],
)
def test_system_errors_are_reported(code: int, reason: str, tmp_path: Path, watch: Watch) -> None:
    path = tmp_path / "state"
    calls: list[tuple[str, Callable[[], None]]] = [
        ("write", lambda: files.write_bytes(path, b"x")),
        ("append", lambda: files.Tree(tmp_path).append(path, "x")),
        ("mkdir", lambda: files.make_directory(path)),
        ("rename", lambda: files.Tree(tmp_path).rename(tmp_path / "new", path)),
    ]
    (tmp_path / "new").mkdir()
    for step, call in calls:
        watch(fail_at(step, OSError(code, "x")))
        with pytest.raises(EnvironmentUnfitError, match=rf"^cannot write {path}: {reason}") as caught:
            call()
        assert caught.value.exit_code == 3
    assert not path.exists()


def test_a_path_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentUnfitError, match="a part of the path is a file, not a folder"):
        files.write_bytes(tmp_path / "file" / "x", b"")
    with pytest.raises(EnvironmentUnfitError, match="a part of the path is a file, not a folder"):
        files.make_directory(tmp_path / "file" / "x")
    with pytest.raises(InputError, match="is a file, but a folder is needed"):
        files.make_directory(tmp_path / "file")


def test_make_directory(tmp_path: Path, watch: Watch) -> None:
    synced: list[Path] = []
    watch(lambda step, path: synced.append(path) if step == "fsync_directory" else None)
    files.make_directory(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]  # each new entry is synced in its parent folder
    files.make_directory(tmp_path / "a" / "b")
    assert len(synced) == 2


@pytest.mark.parametrize("step", ["fsync_directory", "rename"])
def test_rename(step: str, tmp_path: Path, watch: Watch) -> None:
    tree, new, final = files.Tree(tmp_path), tmp_path / ".tmp-new", tmp_path / "final"
    tree.make(new)
    tree.write(new / "a", b"x")
    watch(fail_at(step, Cut()))
    with pytest.raises(Cut):
        tree.rename(new, final)
    assert final.exists() == (step == "fsync_directory")
    if step == "rename":
        watch(None)
        tree.rename(new, final)
    assert (final / "a").read_bytes() == b"x"
    assert not new.exists()


def test_rename_does_not_replace_a_folder(tmp_path: Path) -> None:
    for name in ("new", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    with pytest.raises(EnvironmentUnfitError, match="a folder that is not empty has this name already"):
        files.Tree(tmp_path).rename(tmp_path / "new", tmp_path / "final")
    assert (tmp_path / "final" / "final").exists()


def test_append(tmp_path: Path) -> None:
    for line in ("a", "ü"):
        files.Tree(tmp_path).append(tmp_path / "journal", line)
    assert (tmp_path / "journal").read_text(encoding="utf-8") == "a\nü\n"


def test_json(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a", {"b": 1, "a": ["ü"]})
    assert (tmp_path / "a").read_bytes() == '{\n  "a": [\n    "ü"\n  ],\n  "b": 1\n}\n'.encode()
    assert files.read_json(tmp_path / "a") == {"a": ["ü"], "b": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a", float("nan"))
    assert files.read_json(tmp_path / "a") == {"a": ["ü"], "b": 1}
    (tmp_path / "a").write_bytes(b'{"a": ')
    with pytest.raises(BundleRefusedError, match=r"a is not valid JSON \(.*\); restore it"):
        files.read_json(tmp_path / "a")


def test_reading_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="x does not exist; check the path"):
        files.read_bytes(tmp_path / "x")
    with pytest.raises(InputError, match="is a folder, but a file is needed"):
        files.read_bytes(tmp_path)


def test_hashes_agree(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000
    (tmp_path / "a").write_bytes(data)
    assert files.sha256_file(tmp_path / "a") == files.sha256(data)


def test_tensors_round_trip(tmp_path: Path) -> None:
    tensors = {
        "w": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32),
        "transposed": np.arange(6).reshape(2, 3).T,
        "empty": np.zeros((0, 3), np.float64),
        "counts": np.array([1, 2], np.uint32),
        "flags": np.array([True, False]),
    }
    files.write_tensors(tmp_path / "a", tensors, {"b": [1, "ü"], "a": None})
    read, metadata = files.read_tensors(tmp_path / "a")
    assert metadata == {"b": [1, "ü"], "a": None}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert (read[name] == tensor).all()
    assert files.tensor_bytes(tensors) == files.tensor_bytes(dict(reversed(tensors.items())))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_tensors_with_nan_or_infinity_are_refused(bad: float) -> None:
    data = files.tensor_bytes({"w": np.zeros(2, np.float32)})
    with pytest.raises(BundleRefusedError, match="state: the tensor 'w' contains NaN or infinity; restore"):
        files.parse_tensors(data[:-4] + np.float32(bad).tobytes(), "state")


def test_damaged_tensors() -> None:
    complete = files.tensor_bytes({"a": np.arange(20.0), "b": np.zeros((2, 2))}, {"x": 1})
    for cut in range(0, len(complete), 7):
        with pytest.raises(BundleRefusedError, match=r"state is not a valid safetensors file \(.+\)"):
            files.parse_tensors(complete[:cut], "state")
    with pytest.raises(BundleRefusedError):
        files.parse_tensors(complete + b"x", "state")
    length = int.from_bytes(complete[:8], "little")
    header = json.loads(complete[8 : 8 + length])
    header["__metadata__"]["json"] = "{"
    text = json.dumps(header).encode()
    with pytest.raises(BundleRefusedError):
        files.parse_tensors(len(text).to_bytes(8, "little") + text + complete[8 + length :], "state")
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(complete)
        data[rng.integers(8 + length)] ^= 1 + rng.integers(255)
        try:
            files.parse_tensors(bytes(data), "state")
        except BundleRefusedError:
            continue


def by_hand(header: object, data: bytes = b"") -> bytes:
    """Return a safetensors file with an arbitrary header, given as a JSON value or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype: str = "F32", shape: object = (2,), begin: object = 0, end: object = 8) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        ((2**63).to_bytes(8, "little") + b"{}", "a header of 9223372036854775808 bytes in a file of 10"),
        (by_hand(b" " * 2**20 + b"{}"), "a header of 1048578 bytes in a file of 1048586, with at most 1048576 allowed"),
        (by_hand([]), "has no attribute"),
        (by_hand({"__metadata__": []}), "has no attribute"),
        (by_hand(b'{"a": 1, "a": 1}'), "a duplicate name"),
        (by_hand(b'{"a": {"dtype": "U8", "dtype": "F32"}}'), "a duplicate name"),
        (by_hand({"a": 7}), "not subscriptable"),
        (by_hand({"a": {}}), "data_offsets"),
        (by_hand({"a": tensor("BF16", (2,), 0, 4)}, bytes(4)), "unknown type 'BF16'; known: BOOL, U8, "),
        (by_hand({"a": tensor("F8_E4M3", (2,), 0, 2)}, bytes(2)), "unknown type 'F8_E4M3'; known: "),
        (by_hand({"a": tensor(["F32"])}, bytes(8)), "unhashable"),
        (by_hand({"a": tensor(shape=(-2,))}, bytes(8)), "a shape of 1 dimensions with the size -2"),
        (by_hand({"a": tensor(shape=(2.0,))}, bytes(8)), "a shape of 1 dimensions with the size 2.0"),
        (by_hand({"a": tensor(shape=(True, 2))}, bytes(8)), "a shape of 2 dimensions with the size True"),
        (by_hand({"a": tensor(shape=(2**62, 0), end=0)}), "with the size 4611686018427387904"),
        (by_hand({"a": tensor(shape=(2**32 + 1, 2**32))}, bytes(8)), "with the size 4294967297"),
        (by_hand({"a": tensor(shape=(10**4000,))}, bytes(8)), "with the size 1000"),
        (by_hand({"a": tensor(shape=(1,) * 7 + (2,) * 2)}, bytes(16)), "a shape of 9 dimensions"),
        (by_hand({"a": tensor(shape=(2**31,) * 8)}, bytes(8)), "needs 1.81e+75 bytes"),
        (by_hand({"a": tensor(shape="2")}, bytes(8)), "with the size '2'"),
        (by_hand({"a": tensor(end=2**60)}, bytes(8)), "to 1152921504606846976, but its shape needs 8 bytes from 0"),
        (by_hand({"a": tensor(begin=False)}, bytes(8)), "a tensor at False to 8"),
        (by_hand({"a": tensor(begin=8, end=16)}, bytes(16)), "a tensor at 8 to 16, but its shape needs 8 bytes from 0"),
        (by_hand({"a": tensor(begin=4, end=8)}, bytes(8)), "a tensor at 4 to 8, but its shape needs 8 bytes from 0"),
        (by_hand({"a": tensor(), "b": tensor()}, bytes(8)), "a tensor at 0 to 8, but its shape needs 8 bytes from 8"),
        (
            by_hand({"a": tensor(), "b": tensor(begin=4, end=12)}, bytes(12)),
            "a tensor at 4 to 12, but its shape needs 8",
        ),
        (by_hand({"a": tensor()}, bytes(9)), "tensors of 8 bytes, but the file has 9"),
        (by_hand({"a": tensor()}, bytes(7)), "tensors of 8 bytes, but the file has 7"),
        (by_hand({f"{n}": tensor(shape=(0,), end=0) for n in range(4097)}), "4097 tensors, but at most 4096"),
        (by_hand({"a": tensor("BOOL", (2,), 0, 2)}, b"\1\2"), "a Boolean value that is neither 0 nor 1"),
        (by_hand(b"[" * 100_000), "recursion"),
        (by_hand({"__metadata__": {"json": "[" * 100_000}}), "recursion"),
    ],
)
def test_false_headers_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(BundleRefusedError, match=r"^state is not a valid safetensors file \(") as caught:
        files.parse_tensors(data, "state")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_unusual_but_valid_headers_are_accepted() -> None:
    header = {"b": tensor(shape=(), end=4), "a": tensor(begin=4, end=12), "z": tensor(shape=(0, 3), begin=12, end=12)}
    arrays, metadata = files.parse_tensors(by_hand(header, np.arange(3, dtype=np.float32).tobytes()), "state")
    assert {name: array.tolist() for name, array in arrays.items()} == {"b": 0.0, "a": [1.0, 2.0], "z": []}
    assert arrays["z"].shape == (0, 3)
    assert metadata == {}
    every = {t: np.ones(3, t) for t in "?bBhHeiIflqLQd" if np.dtype(t).itemsize}
    assert files.parse_tensors(files.tensor_bytes(every), "state")[0].keys() == every.keys()


def test_a_huge_declared_size_allocates_no_memory() -> None:
    tracemalloc.start()
    try:
        for header in ({"a": tensor(shape=(2**31, 2**9), end=2**42)}, {"a": tensor("U8", (2**40,), 0, 2**40)}):
            with pytest.raises(BundleRefusedError):
                files.parse_tensors(by_hand(header, bytes(100)), "state")
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.fixture
def hidden() -> Iterator[Path]:
    """Folder with a file that cannot be listed, inside one that cannot be entered."""
    with unprivileged.open_folder() as folder:
        (folder / "closed" / "unlistable").mkdir(parents=True)
        (folder / "closed" / "unlistable" / "file").touch()
        (folder / "closed" / "unlistable").chmod(0o311)
        (folder / "closed").chmod(0o600)
        yield folder / "closed" / "unlistable"


def test_what_cannot_be_read_is_an_error_and_not_nothing(hidden: Path) -> None:
    asked: list[Callable[[Path], object]] = [files.exists, files.is_file, files.is_folder, files.list_folder]
    tree = files.Tree(hidden.parent.parent)
    with unprivileged.unprivileged():
        for ask in [*asked, tree.status, tree.entries, tree.size, tree.exposure]:
            with pytest.raises(EnvironmentUnfitError, match=f"^cannot read {hidden}.*: permission denied"):
                ask(hidden)
        with pytest.raises(EnvironmentUnfitError, match="permission denied"):
            files.make_directory(hidden / "new")
    hidden.parent.chmod(0o755)
    with unprivileged.unprivileged():
        assert files.is_file(hidden / "file")
        assert tree.read(hidden / "file") == b""  # a folder that may be entered, but not listed
        for ask in (files.list_folder, tree.entries, tree.size):
            with pytest.raises(EnvironmentUnfitError, match=f"^cannot read {hidden}: permission denied"):
                ask(hidden)


def test_what_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "link").symlink_to("file")
    for path in (tmp_path / "none", tmp_path / "none" / "x", tmp_path / "file" / "x", tmp_path / ("x" * 300)):
        assert not files.exists(path)
        assert not files.is_file(path)
        assert not files.is_folder(path)
    assert files.list_folder(tmp_path / "none") == files.list_folder(tmp_path / "file" / "x") == []
    assert files.is_file(tmp_path / "link")
    assert files.list_folder(tmp_path) == [tmp_path / "dangling", tmp_path / "file", tmp_path / "link"]
    for ask in (files.exists, files.is_file, files.is_folder, files.list_folder, files.make_directory):
        with pytest.raises(InputError, match="dangling is a link to something that does not exist; remove"):
            ask(tmp_path / "dangling")
    with pytest.raises(InputError, match="is a file, but a folder is needed"):
        files.list_folder(tmp_path / "file")
    with pytest.raises(InputError, match="is not a path: "):
        files.exists(tmp_path / "a\0b")


def test_a_tree_removes_everything_and_follows_nothing(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    tree = files.Tree(tmp_path / "root")
    tree.make(tree.root / "a" / "b")
    tree.write(tree.root / "a" / "b" / "c", b"123")
    (tree.root / "a" / "link").symlink_to(tmp_path / "kept")
    (tree.root / "alias").symlink_to(tmp_path / "kept")
    assert tree.size(tree.root / "a" / "b") == 3
    for name in ("a", "alias", "none"):
        tree.remove(tree.root / name)
    assert tree.entries(tree.root) == []
    assert (tmp_path / "kept" / "file").exists()
    with pytest.raises(ValueError, match="not in the subpath"):
        tree.write(tmp_path / "kept" / "file", b"")
