"""fsck reports each problem once and repairs it where nothing is lost."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from helpers import store_standins

from device_runtime.store import fsck
from device_runtime.store.generations import Generations
from ssd_edge import files
from ssd_edge.errors import EnvironmentUnfitError, InputError

STORE = vars(store_standins)
install, learn, roll_back, prune = STORE["install"], STORE["learn"], STORE["roll_back"], STORE["prune"]
value, flip = STORE["value"], STORE["flip"]


@pytest.fixture(autouse=True)
def _skip_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def store(tmp_path):
    """Return an intact store with generations 1.0 → 2.0 → 3.0."""
    store = STORE["three"](tmp_path / "root")
    assert fsck.check(store) == []
    return store


def only(store: Generations, repair: bool = False) -> tuple[str, str, str, bool]:
    """Return the only finding."""
    (found,) = (fsck.repair if repair else fsck.check)(store)
    return found.path, found.severity, found.problem, found.repaired


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != ".lock"}


def test_empty_root(tmp_path):
    for repair in (False, True):
        with pytest.raises(InputError, match="no bundle is installed in"):
            (fsck.repair if repair else fsck.check)(Generations(tmp_path / "root"))
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("damage", [os.unlink, flip, lambda path: os.truncate(path, 3)], ids=["gone", "flip", "cut"])
def test_damaged_pointer_is_rewritten(store, damage):
    damage(store.root / "CURRENT")
    before = snapshot(store.root)
    expected = ("CURRENT", "damage", "it is missing or damaged, so another generation may be used; repair it")
    assert only(store) == (*expected, False)
    assert snapshot(store.root) == before
    assert only(store, repair=True) == (*expected, True)
    assert (store.current().number, store.current().fallback, fsck.check(store)) == (3, "", [])
    assert store.journal()[-1]["event"] == "repaired"


def test_repair_makes_the_fallback_current(store):
    flip(store.folder(3) / "learner.safetensors")
    found = {(one.path, one.severity, one.repaired) for one in fsck.repair(store)}
    assert found == {("CURRENT", "damage", True), ("generations/000003", "damage", False)}
    assert (store.current().number, store.current().fallback) == (2, "")
    path, severity, problem, repaired = only(store)
    assert (path, severity, repaired) == ("generations/000003", "damage", False)
    assert problem.endswith("; it cannot be restored and stays until it is pruned")
    assert store.folder(3).exists()  # repair does not delete a damaged generation


def test_only_repair_makes_a_newer_generation_current(store):
    roll_back(store, 1)
    shutil.rmtree(store.folder(1))
    expected = "it names generation 1, which is missing; repair it"
    assert only(store, repair=True) == ("CURRENT", "damage", expected, True)
    assert (value(store.current()), store.current().fallback) == (2.0, "")


def test_lost_pointer_and_journal(store):
    (store.root / "CURRENT").unlink()
    (store.root / "journal.jsonl").unlink()
    with pytest.raises(InputError, match="no bundle is installed"):
        store.current()
    repaired = {one.path: one.repaired for one in fsck.repair(store)}
    assert repaired.pop("CURRENT")
    assert sorted(repaired) == [f"generations/00000{number}" for number in (1, 2, 3)]
    assert value(store.current()) == 3.0


def test_repair_changes_nothing_if_no_generation_is_intact(store):
    for number in store.numbers():
        flip(store.folder(number) / "generation.json")
    before = snapshot(store.root)
    assert not any(one.repaired for one in fsck.repair(store))
    assert snapshot(store.root) == before


def test_leftovers_are_removed_and_unknown_files_kept(store):
    leftovers = [".tmp-a", "generations/.tmp-000004/x", "backbones/.tmp-b"]
    unknown = ["generations/000003/notes.txt", "generations/4", "backbones/README"]
    unused = f"backbones/{files.sha256(b'cut')}.onnx"
    for name in (*leftovers, *unknown):
        (store.root / name).parent.mkdir(exist_ok=True)
        (store.root / name).write_bytes(b"x")
    (store.root / unused).write_bytes(b"cut")
    names = {name.removesuffix("/x") for name in leftovers}
    expected = {(name, "leftover", True) for name in (*names, unused)} | {(name, "note", False) for name in unknown}
    assert {(one.path, one.severity, one.repaired) for one in fsck.repair(store)} == expected
    assert {one.path for one in fsck.check(store)} == set(unknown)


def test_unused_backbone_is_kept_while_a_generation_is_unreadable(store):
    install(store, 4.0, b"another")
    flip(store.folder(1) / "generation.json")
    flip(store.folder(2) / "generation.json")
    flip(store.folder(3) / "generation.json")
    fsck.repair(store)
    assert len(store.backbones()) == 2


@pytest.mark.parametrize("damage", [os.unlink, flip], ids=["gone", "flip"])
def test_damaged_backbone_error_names_the_fix(store, damage):
    damage(store.backbones()[0])
    path, severity, problem, repaired = only(store, repair=True)
    assert (path.split("/")[0], severity, repaired) == ("backbones", "damage", False)
    assert f"run: ssd-edge device install BUNDLE --root {store.root}; generations that need it: 1, 2, 3" in problem
    install(store, 4.0)
    assert fsck.check(store) == []


def test_truncated_journal(store):
    path = store.root / "journal.jsonl"
    os.truncate(path, path.stat().st_size - 5)
    found = [(one.severity, one.problem, one.repaired) for one in fsck.repair(store)]
    assert found[0] == ("leftover", "line 3 is incomplete after a crash", True)
    # generation 3 is current, but the journal has no event for it
    assert found[1] == ("leftover", "it lacks that generation 3 is current", True)
    assert [(event["seq"], event["event"]) for event in store.journal()][2:] == [(3, "recovered")]
    assert fsck.check(store) == []


def test_damaged_journal(store):
    path = store.root / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{" + lines[1] + lines[2])
    unknown, first, second = fsck.repair(store)
    assert (unknown.path, unknown.severity) == ("generations/000002", "note")
    unreadable = "cannot read line 2; states are not affected"
    assert (first.severity, first.problem, first.repaired) == ("damage", unreadable, True)
    lost = "events 2 to 2 are lost; states are not affected"
    assert (second.severity, second.problem, second.repaired) == ("note", lost, False)
    assert [one.problem for one in fsck.check(store)][1:] == [lost]
    path.write_bytes(lines[0] + lines[2] + lines[1])
    problems = [one.problem for one in fsck.check(store)]
    assert "event 2 comes after event 3: the file was edited" in problems


def test_crash_before_a_generation_became_current(store, monkeypatch):
    died = []

    def hook(step, path):
        if died or (step == "create" and path.name == "CURRENT"):
            died.append(step)  # also fails the cleanup
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "fault_hook", hook)
    with pytest.raises(KeyboardInterrupt):
        learn(store, 4.0)
    monkeypatch.undo()
    path, severity, problem, repaired = only(store, repair=True)
    assert (path, severity, repaired) == ("generations/000004", "note", False)
    assert problem.endswith("or a crash came before this became current")
    assert (store.current().number, value(store.get(4))) == (3, 4.0)


def test_engines_folder(store):
    folder = store.root / "engines"
    folder.mkdir(mode=0o700)
    assert fsck.check(store) == []
    for mode, severity in ((0o750, "note"), (0o770, "damage")):
        folder.chmod(mode)
        expected = f"its mode is {mode:o}, not 700; delete it: engines are built again"
        assert only(store, repair=True) == ("engines", severity, expected, False)
    folder.rmdir()
    folder.write_bytes(b"")
    assert only(store)[2] == "it is not a folder; delete it: engines are built again"


def test_repair_fails_while_another_process_writes(store):
    other = Generations(store.root)
    with store.writer():
        with pytest.raises(EnvironmentUnfitError, match="another process is writing"):
            fsck.repair(other)
        with pytest.raises(RuntimeError, match="repair outside of"):
            fsck.repair(store)
        assert fsck.check(other) == []
