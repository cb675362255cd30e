"""Nothing below a root is reached through a symbolic link, and no special or hard-linked file is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import store_standins

from device_runtime.store import fsck, watch_state
from device_runtime.store.generations import Generations
from ssd_edge.errors import EnvironmentUnfitError, SSDEdgeError
from ssd_edge.system import file_lock, lock_holder

STORE = vars(store_standins)
learn, install, contents, state = STORE["learn"], STORE["install"], STORE["contents"], STORE["state"]
SECRET = b"a line of another user's file\n" * 10


@pytest.fixture(autouse=True)
def _skip_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def store(tmp_path):
    """Return a store with generations 1 → 2 → 3."""
    return STORE["three"](tmp_path / "root")


@pytest.fixture
def victim(tmp_path) -> Path:
    """Folder of another user with a file."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_bytes(SECRET)
    return tmp_path / "victim"


def use(store: Generations) -> None:
    """Do everything that writes, as far as it goes."""
    calls: list[Callable[[], object]] = [
        lambda: learn(store, 5.0),
        lambda: install(store, 6.0, b"another backbone"),
        lambda: STORE["roll_back"](store, 2),
        lambda: STORE["prune"](store, keep=1),
        lambda: fsck.repair(store),
        lambda: watch_state.save(store.root, {"a": np.zeros(3)}, {"report": {}}, 0.0),
        lambda: learn(store, 7.0),
    ]
    for call in calls:
        assert "\n" not in STORE["refusal"](call)


NAMES = [".lock", "CURRENT", "journal.jsonl", "watch.safetensors", "generations/000003/generation.json"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["symbolic link", "hard link", "relative link"])
def test_no_file_is_written_through_a_link(store: Generations, victim: Path, name: str, kind: str) -> None:
    path = store.root / name
    path.unlink(missing_ok=True)
    if kind == "hard link":
        os.link(victim / "file", path)
    else:
        path.symlink_to(victim / "file" if kind == "symbolic link" else os.path.relpath(victim / "file", path.parent))
    use(store)
    assert (victim / "file").read_bytes() == SECRET
    assert [path.name for path in victim.iterdir()] == ["file"]
    assert SECRET.strip() not in str(store.journal()).encode()


@pytest.mark.parametrize("name", ["generations", "backbones", "generations/000003"])
def test_no_folder_is_entered_through_a_link(store: Generations, victim: Path, name: str) -> None:
    path = store.root / name
    shutil.rmtree(victim)
    path.rename(victim)
    path.symlink_to(victim)
    before = {path: path.read_bytes() for path in victim.rglob("*") if path.is_file()}
    use(store)
    assert {path: path.read_bytes() for path in victim.rglob("*") if path.is_file()} == before


def test_a_folder_swapped_during_a_write_is_not_followed(store: Generations, victim: Path, monkeypatch) -> None:
    """The folder is replaced by a link after it was looked at and before the file is created in it."""
    folder, create = store.root / "generations", os.open

    def swap(name, flags, *args, **options):
        if flags & os.O_CREAT and folder.is_dir() and not folder.is_symlink():
            folder.rename(store.root / "aside")
            folder.symlink_to(victim)
        return create(name, flags, *args, **options)

    with store.writer():
        monkeypatch.setattr(os, "open", swap)
        with pytest.raises(EnvironmentUnfitError):
            store.commit(state(4.0), {}, 3)
        monkeypatch.undo()
    assert [path.name for path in victim.iterdir()] == ["file"]


@pytest.mark.parametrize("name", [".lock", "CURRENT", "journal.jsonl"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_special_files_neither_block_nor_break(store: Generations, name: str, make: Callable[[Path], None]) -> None:
    (store.root / name).unlink()
    make(store.root / name)
    use(store)
    assert STORE["refusal"](store.current) == ""


def test_links_are_reported(store: Generations, victim: Path) -> None:
    for name in ("journal.jsonl", ".lock"):
        (store.root / name).unlink()
        (store.root / name).symlink_to(victim / "file")
    found = {one.path for one in fsck.check(store) if one.severity == fsck.DAMAGE}
    assert found == {"journal.jsonl", ".lock"}


def test_the_root_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "root").symlink_to("data")
    store = STORE["three"](tmp_path / "root")
    assert store.current().number == 3
    assert fsck.check(store) == []
    assert (tmp_path / "data" / "CURRENT").exists()


def test_a_link_to_nowhere_is_no_empty_root(tmp_path: Path) -> None:
    (tmp_path / "root").symlink_to("unmounted")
    for call in (Generations(tmp_path / "root").current, lambda: install(Generations(tmp_path / "root"), 1.0)):
        with pytest.raises(SSDEdgeError, match="is a link to something that does not exist"):
            call()


def test_a_hard_linked_journal_is_copied_first(store: Generations, tmp_path: Path) -> None:
    """As in a backup that was made with ``cp -al``."""
    backup = tmp_path / "backup"
    os.link(store.root / "journal.jsonl", backup)
    before = backup.read_bytes()
    learn(store, 4.0)
    assert backup.read_bytes() == before
    assert (store.root / "journal.jsonl").read_bytes().startswith(before)
    assert [event["generation"] for event in store.journal()] == [1, 2, 3, 4]


def test_a_lock_is_not_touched_before_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with file_lock(path) as first:
        written = path.read_bytes()
        with file_lock(path) as second:
            assert (first, second) == (True, False)
            assert path.read_bytes() == written
    path.unlink()
    path.symlink_to(tmp_path / "other")
    (tmp_path / "other").write_bytes(b"12345 secret")
    assert lock_holder(path) == "unknown"
