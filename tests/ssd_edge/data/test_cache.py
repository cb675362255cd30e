"""The embedding cache: hits, eviction, damaged entries and I/O errors."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from ssd_edge import files
from ssd_edge.data import cache
from ssd_edge.errors import InputError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSD_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SSD_EDGE_CACHE_MB", raising=False)
    return tmp_path / "cache" / "embeddings"


class Counted:
    """Compute function that counts its calls."""

    def __init__(self, megabytes: int = 0) -> None:
        self.calls = 0
        self.size = (megabytes << 18) or 6

    def __call__(self) -> dict[str, np.ndarray]:
        self.calls += 1
        return {"train": np.arange(self.size, dtype=np.float32), "labels": np.array([[1], [2]])}


def test_computed_once_per_key(home: Path) -> None:
    compute = Counted()
    first = cache.embeddings({"data": "a", "size": 32}, compute)
    again = cache.embeddings({"size": 32, "data": "a"}, compute)  # the order of the parts of a key does not matter
    assert compute.calls == 1
    assert first.keys() == again.keys()
    for name, array in first.items():
        assert array.dtype == again[name].dtype
        assert (array == again[name]).all()
        assert again[name].flags.writeable
    cache.embeddings({"data": "a", "size": 64}, compute)
    assert compute.calls == 2
    assert len(list(home.iterdir())) == 2
    path = home / f"{files.sha256(files.json_bytes({'data': 'a', 'size': 32}))}.safetensors"
    assert files.read_tensors(path)[1] == {"key": {"data": "a", "size": 32}}


def test_disabled(home: Path) -> None:
    compute = Counted()
    for _ in range(2):
        cache.embeddings({"a": 1}, compute, enabled=False)
    assert compute.calls == 2
    assert not home.exists()


@pytest.mark.parametrize("damage", [b"", b"text", None])
def test_damage_is_repaired(damage: bytes | None, home: Path, caplog: pytest.LogCaptureFixture) -> None:
    compute = Counted()
    cache.embeddings({"a": 1}, compute)
    [path] = home.iterdir()
    original = path.read_bytes()
    path.write_bytes(original[:-1] if damage is None else damage)
    assert (cache.embeddings({"a": 1}, compute)["train"] == np.arange(6)).all()
    assert compute.calls == 2
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "a damaged cache file is removed, its embeddings are recomputed" in caplog.text
    assert str(path) in caplog.text
    assert path.read_bytes() == original


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("step", ["mkdir", "create", "write", "rename"])
def test_an_unwritable_cache_is_a_warning(
    step: str, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(name: str, path: Path) -> None:
        if name == step:
            raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(files, "fault_hook", fault)
    assert (cache.embeddings({"a": 1}, Counted())["train"] == np.arange(6)).all()
    assert len(caplog.records) == 1
    assert "the embeddings are not cached for the next run: " in caplog.text


def test_a_file_in_place_of_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SSD_EDGE_CACHE", str(tmp_path / "file"))
    assert cache.embeddings({"a": 1}, Counted()).keys() == {"train", "labels"}
    assert "are not cached for the next run" in caplog.text
    assert cache.clear() == 0


def test_an_error_while_computing_stores_nothing(home: Path) -> None:
    def compute() -> dict[str, np.ndarray]:
        raise InputError("a.jpg is corrupt")

    with pytest.raises(InputError, match=r"a\.jpg is corrupt"):
        cache.embeddings({"a": 1}, compute)
    assert not home.exists()


def test_the_least_recently_used_entries_are_evicted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSD_EDGE_CACHE_MB", "3")
    computes = {key: Counted(megabytes=1) for key in "abc"}
    paths = {}
    for age, key in enumerate("ab"):
        cache.embeddings({"key": key}, computes[key])
        [paths[key]] = set(home.iterdir()) - set(paths.values())
        os.utime(paths[key], (1000 + age, 1000 + age))
    leftover = home / f"{files.TEMPORARY_PREFIX}killed"
    leftover.write_bytes(bytes(1 << 20))
    os.utime(leftover, (10, 10))
    cache.embeddings({"key": "a"}, computes["a"])  # now b is the least recently used
    cache.embeddings({"key": "c"}, computes["c"])
    assert not leftover.exists()
    assert not paths["b"].exists()
    assert paths["a"].exists()
    assert sum(path.stat().st_size for path in home.iterdir()) <= 3 << 20
    cache.embeddings({"key": "c"}, computes["c"])
    assert [compute.calls for compute in computes.values()] == [1, 1, 1]


@pytest.mark.parametrize("text", ["much", "-1", "1.5"])
def test_invalid_size_limits_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSD_EDGE_CACHE_MB", text)
    with pytest.raises(InputError, match=rf"SSD_EDGE_CACHE_MB must be a whole number .*, but is '{text}'"):
        cache.embeddings({"a": 1}, Counted())


def test_clear_deletes_only_cache_entries(home: Path) -> None:
    assert cache.clear() == 0
    for key in range(3):
        cache.embeddings({"key": key}, Counted())
    other = home.parent / "mine.safetensors"
    other.touch()
    size = sum(path.stat().st_size for path in home.iterdir())
    assert cache.clear() == size > 0
    assert list(home.iterdir()) == []
    assert other.exists()


def test_location_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SSD_EDGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg/ssd-edge/embeddings"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache/ssd-edge/embeddings"
