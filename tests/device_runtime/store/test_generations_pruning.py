"""Pruning keeps what the device needs, deletes the rest, and may be interrupted at any step."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import time

import pytest
from helpers import store_standins

from device_runtime.store import fsck
from device_runtime.store.generations import Generations
from ssd_edge import files
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError

STORE = vars(store_standins)
install, learn, roll_back, prune = STORE["install"], STORE["learn"], STORE["roll_back"], STORE["prune"]
state, value, flip, contents = STORE["state"], STORE["value"], STORE["flip"], STORE["contents"]


@pytest.fixture(autouse=True)
def _skip_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def store(tmp_path):
    """Return a store: 1 installed with its own backbone, 2 installed with another, 3 … 8 learned in sequence."""
    store = Generations(tmp_path / "root")
    install(store, 1.0, b"an old backbone")
    install(store, 2.0)
    for number in range(3, 9):
        learn(store, float(number))
    return store


def test_newest_and_installed_generations_are_kept(store):
    pruned = prune(store, keep=3)
    assert (pruned.generations, pruned.backbones) == ((1, 3, 4, 5), (files.sha256(b"an old backbone"),))
    assert store.numbers() == [2, 6, 7, 8]
    assert [path.stem for path in store.backbones()] == [store.current().backbone]
    assert {n: value(store.get(n)) for n in store.numbers()} == {n: float(n) for n in store.numbers()}
    left = sum(p.stat().st_size for folder in ("generations", "backbones") for p in store.root.rglob(f"{folder}/**/*")
               if p.is_file())  # fmt: skip
    assert pruned.left_bytes == left
    assert pruned.freed_bytes > 4 * sum(map(len, state(0.0).values()))
    event = store.journal()[-1]
    assert (event["event"], event["generation"], event["generations"]) == ("pruned", 8, [1, 3, 4, 5])
    assert event["backbones"] == list(pruned.backbones)
    again = prune(store, keep=3)
    assert (again.generations, again.freed_bytes, store.journal()[-1]) == ((), 0, event)


def test_current_generation_and_its_fallback_are_kept(store):
    roll_back(store, 4)
    assert prune(store, keep=1).generations == (1, 5, 6, 7)
    assert store.numbers() == [2, 3, 4, 8]
    flip(store.folder(4) / "learner.safetensors")
    assert value(store.current()) == 3.0
    # Generation 3 is the fallback and 2 the next one; 4 is damaged but kept because CURRENT names it.
    assert prune(store, keep=1).generations == ()
    learned = learn(store, 9.0)
    assert (learned.number, learned.parent) == (9, 3)
    assert prune(store, keep=1).generations == (4, 8)


def test_generation_with_pruned_parents_stays_usable(store):
    prune(store, keep=2)
    assert store.numbers() == [2, 7, 8]
    assert roll_back(store, 7).parent == 6
    learned = learn(store, 9.0)
    assert (learned.number, learned.parent) == (9, 7)
    shutil.rmtree(store.folder(9))
    shutil.rmtree(store.folder(7))
    assert store.current().number == 2  # the ancestor by the journal (9 → 7 → 6 → … → 2), not the newer 8
    with pytest.raises(InputError, match=r"^generation 6 was pruned; available generations: 2, 8$"):
        roll_back(store, 6)
    assert learn(store, 9.0).number == 10


def test_budget_overrides_keep_but_not_safety(store, caplog):
    size = 10 + prune(store, keep=5).left_bytes // 6  # 2, 4 … 8
    assert prune(store, keep=5, budget=4 * size).generations == (4, 5)
    assert prune(store, keep=5, budget=0).generations == (6,)
    assert store.numbers() == [2, 7, 8]  # installed, fallback, current
    assert caplog.messages[-1].endswith("bytes, more than the budget of 0")
    with pytest.raises(InputError, match="keep must be at least 1 and the budget at least 0, not 0 and None"):
        prune(store, keep=0)
    with pytest.raises(RuntimeError, match="call this inside"):
        store.prune()


def test_damaged_generations_do_not_count_and_keep_their_backbone(store):
    flip(store.folder(8) / "generation.json")
    flip(store.folder(5) / "generation.json")
    pruned = prune(store, keep=3)  # the newest intact ones are 4, 6 and 7
    assert (pruned.generations, pruned.backbones) == ((1, 3), ())  # 5 and 8 are unreadable and may need any backbone
    assert prune(store, keep=1).generations == (4, 5)
    for number in (2, 6, 7):
        flip(store.folder(number) / "generation.json")
    with pytest.raises(BundleRefusedError, match="no older generation is intact"):
        prune(store, keep=1)
    assert store.numbers() == [2, 6, 7, 8]


def test_prune_interrupted_at_any_step(store, tmp_path):
    before = {n: contents(store.get(n)) for n in store.numbers()}
    for number in itertools.count():
        shutil.copytree(store.root, tmp_path / "cut")
        steps, cut = itertools.count(), Generations(tmp_path / "cut")

        def hook(step, path, steps=steps, number=number):
            if next(steps) == number:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "fault_hook", hook)
            try:
                prune(cut)
                break
            except KeyboardInterrupt:
                pass
        assert {n: contents(cut.get(n)) for n in cut.numbers()} == {n: before[n] for n in cut.numbers()}
        assert {2, 7, 8} <= set(cut.numbers())
        assert (cut.current().number, cut.current().fallback) == (8, "")
        prune(cut)
        assert (cut.numbers(), len(cut.backbones())) == ([2, 7, 8], 1)
        assert not list(cut.root.rglob(f"{files.TEMPORARY_PREFIX}*"))
        shutil.rmtree(tmp_path / "cut")
    assert number == 5 * 3 + 1 + 2  # five folders, a backbone, the journal


def test_pruning_works_on_a_full_disk(store, monkeypatch, caplog):
    def hook(step, path):
        if step in ("create", "write", "append", "mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = store.root / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-10])  # the journal needs repair as well
    monkeypatch.setattr(files, "fault_hook", hook)
    assert prune(store).generations == (1, 3, 4, 5, 6)
    assert "generations 1, 3, 4, 5, 6 are pruned, but the journal lacks it for now: cannot write" in caplog.text
    assert value(store.current()) == 8.0


def test_commit_needs_twice_its_size_of_free_disk(store, monkeypatch):
    real = shutil.disk_usage(store.root)
    needed = 2 * (3 + 3) * 4096  # two files and the record; the folder, CURRENT and the journal: one block each
    before = sorted(store.root.rglob("*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=needed - 1))
    with pytest.raises(EnvironmentUnfitError) as caught:
        learn(store, 9.0)
    assert f"needs {needed} bytes of free disk, twice its size, but {store.root} has {needed - 1}" in str(caught.value)
    assert sorted(store.root.rglob("*")) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=needed))
    assert learn(store, 9.0).number == 9


def test_order_does_not_depend_on_the_clock(tmp_path, monkeypatch):
    """The clock may start in 1970 after a power cut, be set by NTP, or be set back by a user."""
    clock, gmtime = itertools.cycle([2e9, 0.0, 86400.0, 1.8e9, 1.0]), time.gmtime
    monkeypatch.setattr(time, "gmtime", lambda *seconds: gmtime(next(clock)))
    monkeypatch.setattr(time, "time", lambda: next(clock))
    store = Generations(tmp_path / "root")
    install(store, 1.0)
    for number in range(2, 9):
        assert learn(store, float(number)).number == number
        stamp = next(clock)
        for path in store.folder(number).rglob("*"):
            os.utime(path, (stamp, stamp))
    assert prune(store, keep=3).generations == (2, 3, 4, 5)
    flip(store.folder(8) / "classes.json")
    assert store.current().number == 7
    assert [event["seq"] for event in store.journal()] == list(range(1, 10))
    assert len({event["untrusted_time"] for event in store.journal()}) > 2
    assert {json.loads((store.folder(n) / "generation.json").read_bytes())["created_utc"][:4] for n in (6, 7, 8)} > {
        "1970"
    }


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES])
@pytest.mark.parametrize("name", ["CURRENT", "learner.safetensors"])
def test_read_errors_are_not_reported_as_damage(store, monkeypatch, name, number):
    read = files.Tree.read

    def refuse(tree, path):
        if path.name == name:
            raise OSError(number, os.strerror(number))
        return read(tree, path)

    monkeypatch.setattr(files.Tree, "read", refuse)
    for call in (store.current, lambda: prune(store), lambda: fsck.repair(store), lambda: learn(store, 9.0)):
        with pytest.raises(EnvironmentUnfitError, match=f"{name} cannot be read: .*; that does not mean damage"):
            call()
    monkeypatch.undo()
    assert store.numbers() == list(range(1, 9))
    assert (store.current().number, store.current().fallback) == (8, "")


def everything(root) -> bytes:
    return b"\0".join(str(path).encode() + path.read_bytes() for path in root.rglob("*") if path.is_file())


@pytest.fixture
def traces(store):
    """Return a store with an upload, drift counts, remains of a crash, and a current generation 5 of 8."""
    for place in ("incoming/abc/robot.ssdedge", "watch.safetensors", "generations/.tmp-pruned-000009/learner"):
        path = store.root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"secret")
    roll_back(store, 5)
    return store


def test_only_the_current_generation_is_left(traces):
    before = {name: traces.get(5).read(name) for name in traces.get(5).files}
    with traces.writer():
        pruned = traces.keep_only_current()
    assert (traces.numbers(), traces.current().number) == ([5], 5)
    assert {name: traces.current().read(name) for name in before} == before
    assert pruned.generations == (1, 2, 3, 4, 6, 7, 8)
    assert [path.stem for path in traces.backbones()] == [traces.current().backbone]
    assert b"secret" not in everything(traces.root)
    assert sorted(os.listdir(traces.root)) == [".lock", "CURRENT", "backbones", "generations", "journal.jsonl"]
    assert [event["event"] for event in traces.journal()] == ["install", "install", "pruned"]
    assert not [one for one in fsck.check(traces) if one.severity != "note"]
    with pytest.raises(InputError, match=r"^generation 4 was pruned; available generations: 5$"):
        roll_back(traces, 4)
    with traces.writer():
        assert traces.keep_only_current().generations == ()
    with pytest.raises(InputError, match=r"^generation 4 was pruned; available generations: 5$"):
        roll_back(traces, 4)
    assert learn(traces, 9.0).number == 9  # 6 to 8 are not used again


def test_the_installed_generation_can_be_kept(traces):
    with traces.writer():
        assert traces.keep_only_current(keep_installed=True).generations == (1, 3, 4, 6, 7, 8)
    assert traces.numbers() == [2, 5]


def test_nothing_is_deleted_beside_a_damaged_current_generation(traces):
    flip(traces.folder(5) / "learner.safetensors")
    with traces.writer():
        before = everything(traces.root)
        with pytest.raises(BundleRefusedError, match=r"nothing was deleted: first run .* fsck --repair"):
            traces.keep_only_current()
        assert everything(traces.root) == before


@pytest.mark.parametrize("step", range(1, 50, 2))
def test_an_interrupted_deletion_is_finished_by_the_next_call(traces, step, monkeypatch):
    count = itertools.count(1)

    def fail(name, path):
        if next(count) == step:
            raise OSError(errno.EIO, "failed")

    with traces.writer():
        monkeypatch.setattr(files, "fault_hook", fail)
        with contextlib.suppress(EnvironmentUnfitError):
            traces.keep_only_current()
        monkeypatch.setattr(files, "fault_hook", None)
    assert value(traces.current()) == 5.0
    with traces.writer():
        traces.keep_only_current()
    assert (traces.numbers(), b"secret" in everything(traces.root)) == ([5], False)
    assert learn(traces, 9.0).number == 9
