"""Power cuts at any moment, on a file system that keeps only what was synced.

The recorder follows the real files: fsync of a file makes its content durable, fsync of a folder its entries. From this
it derives the states that a power cut may leave: all unsynced changes are lost; all renames are durable but no unsynced
content is; the entries of only one folder are durable; or those of all folders but one. Open file descriptors pin the
inodes, so that an inode number is not reused.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import store_standins

from device_runtime.store import fsck
from device_runtime.store.generations import Generations
from ssd_edge import files
from ssd_edge.errors import InputError

STORE = vars(store_standins)
install, learn, roll_back, prune = STORE["install"], STORE["learn"], STORE["roll_back"], STORE["prune"]
contents = STORE["contents"]

Tree = dict[str, bytes | None]  # path → content, or None for a folder
ACTIONS: list[tuple[str, Callable[[Generations], object]]] = [
    ("install", lambda store: install(store, 1.0, b"an old backbone")),
    ("learn", lambda store: learn(store, 2.0)),
    ("learn", lambda store: learn(store, 3.0)),
    ("rollback", lambda store: roll_back(store, 1)),
    ("install", lambda store: install(store, 4.0)),
    ("learn", lambda store: learn(store, 5.0)),
    ("prune", lambda store: prune(store, keep=1)),
    ("learn", lambda store: learn(store, 6.0)),
    ("repair", lambda store: fsck.repair(store)),
]


class Recorder:
    """Model of the durable files below a folder."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.pins: dict[int, int] = {}
        self.contents: dict[int, bytes] = {}
        self.entries: dict[int, dict[str, int]] = {}
        self.kinds: dict[int, bool] = {}
        self._sync_folder(top)

    def synced(self, handle: int) -> None:
        """Record an fsync of an open file or folder."""
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.is_dir():
            self._sync_folder(path)
        else:
            self.contents[self._pin(path)] = path.read_bytes()

    def states(self) -> Iterator[Tree]:
        """Yield the trees that a power cut may leave now; in the first, all unsynced changes are lost."""
        live = {self._pin(path): path for path in (self.top, *self.top.rglob("*")) if path.is_dir()}
        now = {number: {p.name: self._pin(p) for p in path.iterdir()} for number, path in live.items()}
        yield self._tree(self.entries)
        yield self._tree(now)
        for number, arrived in now.items():
            if arrived != self.entries.get(number):
                yield self._tree({**self.entries, number: arrived})
                yield self._tree({**now, number: self.entries.get(number, {})})

    def close(self) -> None:
        for handle in self.pins.values():
            os.close(handle)

    def _pin(self, path: Path) -> int:
        about = path.lstat()
        if about.st_ino not in self.pins:
            self.pins[about.st_ino] = os.open(path, os.O_RDONLY)
            self.kinds[about.st_ino] = stat.S_ISDIR(about.st_mode)
        return about.st_ino

    def _sync_folder(self, path: Path) -> None:
        self.entries[self._pin(path)] = {member.name: self._pin(member) for member in path.iterdir()}

    def _tree(self, entries: dict[int, dict[str, int]]) -> Tree:
        tree: Tree = {}

        def walk(number: int, path: str) -> None:
            for name, member in entries.get(number, {}).items():
                inside = f"{path}{name}"
                tree[inside] = None if self.kinds[member] else self.contents.get(member, b"")
                walk(member, f"{inside}/")

        walk(self.top.stat().st_ino, "")
        return tree


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    """Record what is synced below ``tmp_path/disk``; `notice` is called around every change."""
    (tmp_path / "disk").mkdir()
    recorder = Recorder(tmp_path / "disk")
    recorder.notice = lambda: None
    real = {name: getattr(os, name) for name in ("fsync", "replace", "rename", "unlink", "rmdir")}

    def fsync(handle):
        recorder.notice()  # no real fsync is needed, because the model decides what is lost
        recorder.synced(handle)
        recorder.notice()

    def wrapped(name):
        def call(*args, **options):
            done = real[name](*args, **options)
            recorder.notice()
            return done

        return call

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("replace", "rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, wrapped(name))
    monkeypatch.setattr(files, "fault_hook", lambda step, path: recorder.notice())
    yield recorder
    recorder.close()


def write(tree: Tree, folder: Path) -> Path:
    folder.mkdir()
    for name, data in tree.items():
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)
    return folder


def test_any_state_after_a_power_cut_is_a_committed_generation(recorder, tmp_path):
    store = Generations(recorder.top / "root")
    seen: dict[tuple, Tree] = {}

    def notice() -> None:
        for tree in recorder.states():
            seen[tuple(sorted(tree.items()))] = tree

    recorder.notice = notice
    committed, total, opened_as = {}, 0, []
    former: int | None = None
    for name, action in ACTIONS:
        seen.clear()
        action(store)
        now = store.current()
        for number in store.numbers():
            committed[number] = contents(store.get(number))
        durable = next(recorder.states())
        opened_as.clear()
        hook, files.fault_hook, fsync, os.fsync = files.fault_hook, None, os.fsync, lambda handle: None
        try:
            for tree in [*seen.values(), durable]:
                total += 1
                survivor = Generations(write(tree, tmp_path / f"cut-{total}") / "root")
                try:
                    got = survivor.current()
                except InputError:
                    assert former is None, name  # no bundle was installed yet
                    opened_as.append(None)
                    install(survivor, 1.0, b"an old backbone")
                    continue
                assert got.fallback == "", name
                assert got.number in (former, now.number), name
                assert contents(got) == committed[got.number], name
                survivor.backbone_path(got.backbone)
                for number in survivor.numbers():
                    assert contents(survivor.get(number)) == committed[number], name
                opened_as.append(got.number)
                following = learn(survivor, 9.0)
                assert following.number > max(got.number, max(survivor.numbers()[:-1]))
                damage = [one for one in fsck.check(survivor) if one.severity != "note"]
                assert not [one for one in damage if "no generation uses" not in one.problem], name
        finally:
            files.fault_hook, os.fsync = hook, fsync
        assert opened_as[-1] == now.number, name  # a commit that has returned is durable
        assert set(opened_as) == {former, now.number}, name
        former = now.number
    assert total >= 150


def test_the_recorder_detects_a_missing_sync(recorder):
    """The recorder detects each of the three steps that are commonly left out."""
    folder = recorder.top / "folder"
    files.make_directory(folder)
    files.write_bytes(folder / "good", b"old")
    (folder / "unsynced").write_bytes(b"lost")
    (folder / "new").write_bytes(b"renamed, not synced")
    os.replace(folder / "new", folder / "good")
    states = list(recorder.states())
    assert states[0] == {"folder": None, "folder/good": b"old"}
    assert states[1] == {"folder": None, "folder/good": b"", "folder/unsynced": b""}
    files.fsync_directory(folder)
    assert next(recorder.states()) == states[1]
