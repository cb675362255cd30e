"""Generations: after interrupted writes, flipped bits or missing files, the store opens with a committed state."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import store_standins

from device_runtime.store.generations import Generations
from ssd_edge import files
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError

STORE = vars(store_standins)
BACKBONE, state, install, learn = STORE["BACKBONE"], STORE["state"], STORE["install"], STORE["learn"]
roll_back, value, flip = STORE["roll_back"], STORE["value"], STORE["flip"]


@pytest.fixture(autouse=True)
def _skip_fsync(monkeypatch):
    """Skip fsync: writes survive a killed process, and only a power cut needs it."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def root(tmp_path):
    """Return a root with three generations, 0.0 → 1.0 → 2.0."""
    store = Generations(tmp_path / "root")
    install(store)
    learn(store, 1.0)
    learn(store, 2.0)
    return store.root


def test_empty_root_error_names_the_install_command(tmp_path):
    store = Generations(tmp_path / "root")
    for call in (store.current, store.list, lambda: store.get(1)):
        with pytest.raises(InputError) as caught:
            call()
        assert str(caught.value) == (
            f"no bundle is installed in {store.root}; run: ssd-edge device install BUNDLE --root {store.root}"
        )
    assert not store.root.exists()


def test_layout(root):
    members = ("classes.json", "generation.json", "learner.safetensors")
    assert {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} == {
        *(".lock", "CURRENT", "journal.jsonl", f"backbones/{files.sha256(BACKBONE)}.onnx"),
        *(f"generations/00000{number}/{name}" for number in (1, 2, 3) for name in members),
    }
    assert (root / "CURRENT").read_bytes() == b"000003 86e0fa410d1c284b\n"


def test_commit_round_trip(root):
    store = Generations(root)
    now = store.current()
    assert (now.number, now.parent, now.origin, now.info, now.fallback) == (3, 2, "learn", {"value": 2.0}, "")
    assert {name: now.read(name) for name in now.files} == state(2.0)
    assert now.tensors("learner.safetensors")[1] == {"name": "slda"}
    assert now.registry.names == ["cup"]
    assert store.backbone_path(now.backbone).read_bytes() == BACKBONE
    assert (store.get(1).parent, store.get(1).origin) == (None, "install")
    with pytest.raises(InputError, match=r"has no file 'probe\.safetensors'; it has: classes\.json, lear"):
        now.read("probe.safetensors")
    flip(now.path / "learner.safetensors")
    with pytest.raises(BundleRefusedError, match=r" is damaged: its sha256 is \w{12}…, not \w{12}…"):
        now.tensors("learner.safetensors")


def test_list_and_journal(root):
    store = Generations(root)
    flip(root / "generations/000002/learner.safetensors")
    got = [[item.number, item.current, item.intact, item.parent] for item in store.list()]
    assert got == [[1, False, True, None], [2, False, False, None], [3, True, True, 2]]
    assert "000002/learner.safetensors is damaged: its sha256 is " in store.list()[1].problem
    got = [(event["seq"], event["event"], event["generation"]) for event in store.journal()]
    assert got == [(1, "install", 1), (2, "learn", 2), (3, "learn", 3)]
    assert set(store.journal()[2]) == {"seq", "untrusted_time", "event", "generation", "parent", "info"}


def test_rollback_and_numbers_are_never_reused(root):
    store = Generations(root)
    assert roll_back(store, 1).number == 1
    assert value(store.current()) == 0.0
    assert (store.journal()[-1]["event"], store.journal()[-1]["generation"]) == ("rollback", 1)
    learned = learn(store, 9.0)
    assert (learned.number, learned.parent) == (4, 1)
    shutil.rmtree(root / "generations/000004")
    roll_back(store, 1)
    assert learn(store, 9.0).number == 5  # the folder is gone, but the journal still has the number


def test_rollback_error_lists_available_generations(root):
    store = Generations(root)
    flip(root / "generations/000002/classes.json")
    for number, problem in ((2, "classes.json is damaged: "), (7, "^there is no generation 7")):
        with pytest.raises(InputError, match=f"{problem}.*; available generations: 1, 3$"):
            roll_back(store, number)
    assert store.current().number == 3


def test_any_flipped_bit_is_detected(root):
    store, rng = Generations(root), random.Random(0)
    for path in (root / "generations/000003").iterdir():
        data = path.read_bytes()
        for position in range(0, len(data), 1 if path.name == "generation.json" else 7):
            flip(path, 8 * position + rng.randrange(8))
            got = store.current()
            assert (got.number, value(got)) == (2, 1.0)
            assert str(path) in got.fallback
            path.unlink()
            path.write_bytes(data)
    assert store.current().number == 3


@pytest.mark.parametrize("name", ["learner.safetensors", "generation.json"])
@pytest.mark.parametrize("damage", [os.unlink, lambda path: os.truncate(path, 10)], ids=["missing", "cut"])
def test_missing_or_truncated_file_is_detected(root, caplog, name, damage):
    damage(root / "generations/000003" / name)
    got = Generations(root).current()
    assert (got.number, value(got)) == (2, 1.0)
    assert f"000003/{name}" in got.fallback
    assert got.fallback.endswith("; generation 2 is used instead")
    assert caplog.messages == [got.fallback]


def test_fallback_is_an_ancestor(root):
    store = Generations(root)
    roll_back(store, 1)
    learn(store, 9.0)  # generation 4, learned from 1; the user rolled back from 2 and 3
    shutil.rmtree(root / "generations/000004")
    assert store.current().number == 1
    flip(root / "generations/000001/classes.json")
    assert store.current().number == 3  # no ancestor is intact, so the newest older generation is used


def test_fallback_is_never_a_newer_generation(root):
    store = Generations(root)
    roll_back(store, 1)
    flip(root / "generations/000001/learner.safetensors")
    expected = r"no older generation is intact \(newer: 2, 3\); choose one with ssd-edge device rollback, or "
    with pytest.raises(BundleRefusedError, match=expected):
        store.current()
    roll_back(store, 2)
    assert value(store.current()) == 1.0


def pointer(number):
    digits = f"{number:06d}".encode()
    return digits + b" " + hashlib.sha256(digits).hexdigest()[:16].encode() + b"\n"


POINTER_3, POINTER_9 = pointer(3), pointer(9)
POINTER_2_FLIPPED = POINTER_3.replace(b"000003", b"000002")  # one flipped bit names another intact generation


@pytest.mark.parametrize(
    "content",
    [None, b"", b"000003", b"3\n", b"000003\n", POINTER_3 * 2, POINTER_2_FLIPPED, POINTER_9, b"\xff" * 7],
)
def test_damaged_pointer(root, content):
    (root / "CURRENT").unlink()
    if content is not None:
        (root / "CURRENT").write_bytes(content)
    store = Generations(root)
    got = store.current()
    assert (got.number, value(got)) == (3, 2.0)
    lost = content == POINTER_9
    assert ("000009/generation.json cannot be read" if lost else "CURRENT is missing or dam") in got.fallback
    assert learn(store, 3.0).number == (10 if lost else 4)
    assert store.current().fallback == ""


def test_copied_or_newer_record_is_refused(root):
    store = Generations(root)
    shutil.rmtree(root / "generations/000003")
    shutil.copytree(root / "generations/000002", root / "generations/000003")
    assert "000003/generation.json is refused: it is of generation 2" in store.current().fallback
    path = root / "generations/000002/generation.json"
    record = json.loads(path.read_bytes())
    body = {key: value for key, value in record.items() if key != "digest"} | {"version": 2}
    path.write_bytes(files.json_bytes({**body, "digest": files.sha256(files.json_bytes(body))}))
    with pytest.raises(InputError, match="it has version 2, but this SSD-Edge reads 1; upgrade it"):
        store.get(2)


def test_backbones_are_shared_verified_and_repaired(root):
    store = Generations(root)
    path = store.backbone_path(files.sha256(BACKBONE))
    before = path.stat()
    install(store)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    flip(path)
    with pytest.raises(BundleRefusedError, match=r"\.onnx is missing or damaged \(\w{64}\); run: ssd-edge"):
        store.backbone_path(path.stem)
    install(store)
    assert store.backbone_path(path.stem).read_bytes() == BACKBONE
    for absent in ("0" * 64, "../CURRENT"):
        with pytest.raises(BundleRefusedError, match=r"missing or damaged \(No such file or directory\)"):
            store.backbone_path(absent)


def test_only_one_writer(root):
    store = Generations(root)
    (receiver, sender), child = os.pipe(), os.fork()
    if child == 0:
        with store.writer():
            os.write(sender, b"!")
            signal.alarm(10)  # ends the child if this test fails
            signal.pause()
    assert os.read(receiver, 1) == b"!"
    with pytest.raises(EnvironmentUnfitError) as caught:
        learn(store, 3.0)
    assert str(caught.value) == f"another process is writing {root}, pid {child}; try again when it is done"
    assert store.current().number == 3  # readers do not wait
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert learn(store, 3.0).number == 4


def test_commit_refuses_invalid_arguments(root):
    store = Generations(root)
    with pytest.raises(RuntimeError, match=r"call this inside 'with generations\.writer\(\):'"):
        store.commit({}, {}, 3)
    with store.writer():
        for name in ("../x", "a/b", ".x", "", "generation.json"):
            with pytest.raises(ValueError, match="not names for files of a generation"):
                store.commit({name: b""}, {}, 3)
        with pytest.raises(ValueError, match="either a parent or a backbone is needed"):
            store.commit({}, {}, None)
        with pytest.raises(BundleRefusedError, match="missing or damaged"):
            store.commit({}, {}, None, "0" * 64)
        with pytest.raises(BundleRefusedError, match=r"generation\.json cannot be read: No such"):
            store.commit({}, {}, 9)
        for call in (lambda: store.commit({}, {"x": b""}, 3), lambda: store.set_current(1, info={"x": b""})):
            with pytest.raises(TypeError, match="JSON"):
                call()
    assert store.current().number == 3
    assert len(os.listdir(root / "generations")) == 3


def test_truncated_journal_is_repaired(root):
    path = root / "journal.jsonl"
    complete = path.read_bytes()
    for length in range(complete.index(b'{"seq": 3'), len(complete)):
        path.unlink()
        path.write_bytes(complete[:length])
        store = Generations(root)
        assert store.current().number == 3
        roll_back(store, 3)
        assert path.read_bytes().endswith(b"}\n")
        assert [event["seq"] for event in store.journal()] == [1, 2, 3, 4]
        assert [event["generation"] for event in store.journal()] == [1, 2, 3, 3]
        assert store.journal()[2]["event"] in ("learn", "recovered")


def no_room_for(name: str) -> Callable[[str, Path], None]:
    """Return a hook that raises ENOSPC whenever a file of this name is written."""

    def hook(step, path):
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return hook


def test_full_disk_after_the_commit_keeps_it(root, caplog, monkeypatch):
    store = Generations(root)
    monkeypatch.setattr(files, "fault_hook", no_room_for("journal.jsonl"))
    assert learn(store, 3.0).number == 4
    monkeypatch.setattr(files, "fault_hook", None)
    assert "generation 4 is current, but the journal lacks it for now: cannot write " in caplog.text
    assert learn(store, 5.0).number == 5
    got = [(event["event"], event["generation"]) for event in store.journal()]
    assert got[3:] == [("recovered", 4), ("learn", 5)]


def test_full_disk_before_the_commit_leaves_nothing(root, monkeypatch):
    monkeypatch.setattr(files, "fault_hook", no_room_for("generation.json"))
    with pytest.raises(EnvironmentUnfitError, match="the disk is full: free some space"):
        learn(Generations(root), 3.0)
    assert sorted(os.listdir(root / "generations")) == ["000001", "000002", "000003"]
    assert Generations(root).current().number == 3


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupted(action: Callable[[], object], number: int, end: Callable[[], None] = interrupt) -> bool:
    """Interrupt `action` before its step `number`; return False if it has no such step."""
    steps = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "fault_hook", lambda step, path: end() if next(steps) == number else None)
        try:
            action()
        except KeyboardInterrupt:
            return True
    return False


def killed(action: Callable[[], object], number: int) -> bool:
    """Like `interrupted`, but with a real SIGKILL in a child process."""
    child = os.fork()
    if child == 0:
        try:
            interrupted(action, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        finally:
            os._exit(0)  # do not return to pytest
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def interrupted_copies(
    action: Callable[[Generations], object], template: Path, how=interrupted
) -> Iterator[Generations]:
    """Yield, for each step of `action`, a copy of the root `template` on which it was interrupted before that step."""
    for number in itertools.count():
        root = template.with_name(f"{template.name}-{number}")
        if template.exists():
            shutil.copytree(template, root)
        store = Generations(root)
        if not how(lambda store=store: action(store), number):
            assert number > 5
            return
        yield store
        assert not list(root.rglob(f"{files.TEMPORARY_PREFIX}*"))  # the test has written to the store again


@pytest.mark.parametrize("how", [interrupted, killed])
def test_commit_interrupted_at_any_step(tmp_path, how):
    """The store holds exactly the old or the new state, and the next commit works."""
    install(Generations(tmp_path / "root"))
    outcomes = []
    for store in interrupted_copies(lambda store: learn(store, 1.0), tmp_path / "root", how):
        got = store.current()
        assert got.fallback == ""
        assert {name: got.read(name) for name in got.files} == state(got.number - 1.0)
        outcomes.append(got.number)
        following = learn(store, 2.0)
        assert following == store.current()
        assert following.parent == got.number < following.number
        assert value(following) == 2.0
        assert [event["seq"] for event in store.journal()] == list(range(1, len(store.journal()) + 1))
        assert {event["generation"] for event in store.journal()} >= {1, got.number, following.number}
    assert outcomes == sorted(outcomes)  # after the switch to the new generation there is no way back
    assert set(outcomes) == {1, 2}


def test_first_install_interrupted_at_any_step(tmp_path):
    outcomes = []
    for store in interrupted_copies(install, tmp_path / "root"):
        installed = (store.root / "CURRENT").exists()
        outcomes.append(installed)
        with contextlib.nullcontext() if installed else pytest.raises(InputError, match="no bundle is inst"):
            assert value(store.current()) == 0.0
        install(store, 1.0)
        assert value(store.current()) == 1.0
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {False, True}


def test_rollback_interrupted_at_any_step(root):
    for store in interrupted_copies(lambda store: roll_back(store, 1), root):
        assert store.current().number in (1, 3)
        assert roll_back(store, 1) == store.current()
