"""Flipped bits and disk errors are detected and reported, and only committed states are ever served."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import re
import shutil
import subprocess
import warnings

import pytest
from helpers import store_standins

from device_runtime.store import fsck
from device_runtime.store.generations import SPARE, Generations
from ssd_edge import files
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError

STORE = vars(store_standins)
install, learn, roll_back, prune = STORE["install"], STORE["learn"], STORE["roll_back"], STORE["prune"]
flip, contents, state = STORE["flip"], STORE["contents"], STORE["state"]
REASONS = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EROFS: "the file system is read-only: ",
    errno.EMFILE: "too many open files: raise the limit",
}


@pytest.fixture(autouse=True)
def _skip_fsync(monkeypatch, request):
    if "small_disk" not in request.fixturenames:
        monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def store(tmp_path):
    """Return a store with generations 1 → 2 → 3."""
    return STORE["three"](tmp_path / "root")


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_flipped_bit_is_detected(store, count):
    committed = {n: contents(store.get(n)) for n in store.numbers()}
    backbone = store.backbones()[0]
    places = [*sorted(store.folder(3).iterdir()), store.root / "CURRENT", backbone]
    rng, flipped = random.Random(1), set()
    for path in [places[number % len(places)] for number in range(count)]:
        data = path.read_bytes()
        flip(path, rng.randrange(8 * len(data)))
        flipped.add(path.name)
        found = [one for one in fsck.check(store) if one.severity == "damage"]
        assert any(str(store.root / one.path) in (str(path), str(path.parent)) for one in found), path
        got = store.current()
        assert contents(got) == committed[got.number]
        if path == backbone:
            assert (got.number, got.fallback) == (3, "")
            fix = f"{path} is missing or damaged (.*); run: ssd-edge device install BUNDLE --root {store.root}"
            with pytest.raises(BundleRefusedError, match=fix):
                store.backbone_path(got.backbone)
        else:
            # Without CURRENT, the journal names generation 3.
            assert got.number == (3 if path.name == "CURRENT" else 2)
            assert str(path) in got.fallback
            assert got.fallback.endswith(f"; generation {got.number} is used instead")
        path.unlink()
        path.write_bytes(data)
    assert flipped == {"CURRENT", "classes.json", "generation.json", "learner.safetensors", backbone.name}
    assert (fsck.check(store), store.current().fallback) == ([], "")


ACTIONS = {
    "install": (lambda store: install(store, 4.0, b"another backbone"), 4),
    "learn": (lambda store: learn(store, 4.0), 4),
    "rollback": (lambda store: roll_back(store, 1), 1),
    "prune": (lambda store: prune(store, keep=1), 3),
    "repair": (lambda store: fsck.repair(store), 3),
}


EVERY = [(name, number) for number in REASONS for name in ACTIONS]
QUICK = [*EVERY[: len(ACTIONS)], ("rollback", errno.EROFS), ("prune", errno.EMFILE)]


@pytest.mark.parametrize(
    ("name", "number"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in EVERY]
)
def test_disk_error_at_any_step(store, tmp_path, name, number, caplog):
    """The action fails with an error and the old generation is served, or it succeeds and logs what is missing."""
    action, after = ACTIONS[name]
    if name == "prune":
        learn(store, 4.0)
        learn(store, 5.0)
        after = 5
    committed = {n: contents(store.get(n)) for n in store.numbers()}
    now, errors, done = store.current().number, [], 0
    os.truncate(store.root / "journal.jsonl", (store.root / "journal.jsonl").stat().st_size - 3)
    for at in itertools.count():
        root, steps = tmp_path / f"copy-{at}", itertools.count()
        shutil.copytree(store.root, root)

        def hook(step, path, steps=steps, at=at):
            if next(steps) == at:
                raise OSError(number, os.strerror(number))

        caplog.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "fault_hook", hook)
            try:
                action(Generations(root))
                expected = after
                done += 1
            except EnvironmentUnfitError as error:
                errors.append(str(error))
                expected = now
        if next(steps) <= at:
            break
        got = Generations(root).current()
        assert (got.number, got.fallback) == (expected, "")
        assert contents(got) == committed.get(got.number, state(4.0))
        if expected == after != now or name == "prune":
            assert "for now: cannot write" in caplog.text or "may take it back" in caplog.text or expected == now
        assert learn(Generations(root), 6.0).parent == got.number
        assert {one.severity for one in fsck.repair(Generations(root))} <= {"note", "leftover", "damage"}
        assert not [one for one in fsck.check(Generations(root)) if one.severity != "note"]
    assert at >= 4
    assert done >= 1
    assert errors
    assert all(re.search(f"^cannot write .*{re.escape(REASONS[number])}", error) for error in errors)


@pytest.fixture
def small_disk(tmp_path):
    """Mount a tmpfs of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        reason = mounted.stderr.strip() if mounted.returncode else ""
    except OSError as error:
        reason = str(error)
    if reason:
        warnings.warn(f"no real full disk was tested: {reason}", stacklevel=1)
        pytest.skip(f"mounting is not allowed here: {reason}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_tmpfs(small_disk):
    store = Generations(small_disk / "root")
    install(store, 1.0)

    def learn_forever() -> None:
        while True:
            learn(store, store.current().number + 1.0)

    with pytest.raises(EnvironmentUnfitError, match=r"needs \d+ bytes of free disk, twice its size, but .* has \d+;"):
        learn_forever()
    now = store.current().number
    assert 3 < now < 30
    assert (store.current().number, store.current().fallback) == (now, "")
    with contextlib.suppress(OSError), open(small_disk / "ballast", "wb") as stream:
        while True:
            stream.write(b"\0" * 4096)
            stream.flush()
    for call in (lambda: install(store, 50.0, b"b" * 9000), lambda: roll_back(store, 1)):
        with pytest.raises(EnvironmentUnfitError, match=r"the disk is full|bytes of free disk"):
            call()
    with store.writer():
        store.reserve()  # no room
    assert not (store.root / SPARE).exists()
    assert contents(store.current()) == state(float(now))
    assert not [one for one in fsck.check(store) if one.severity == "damage"]
    assert len(prune(store, keep=2).generations) == now - 3
    assert (store.current().number, len(store.numbers())) == (now, 3)
    assert learn(store, 60.0).number == now + 1
    with store.writer():
        store.reserve()
    (small_disk / "ballast").unlink()
    with contextlib.suppress(OSError), open(small_disk / "ballast", "wb") as stream:
        while True:
            stream.write(b"\0" * 4096)
            stream.flush()
    assert roll_back(store, 1).number == 1  # with the space of the spare file
    assert not (store.root / SPARE).exists()
    roll_back(store, now + 1)
    assert fsck.repair(store) == []
    assert subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=False).returncode == 0
    for call in (lambda: learn(store, 70.0), lambda: prune(store), lambda: fsck.repair(store)):
        with pytest.raises((EnvironmentUnfitError, InputError), match=r"[Rr]ead-only"):
            call()
    assert contents(store.current()) == state(60.0)
