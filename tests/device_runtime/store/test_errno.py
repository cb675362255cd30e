"""Every error of the operating system at every call of a commit: one sentence, an intact store, and a later success."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import store_standins, unprivileged

from device_runtime.store import fsck
from device_runtime.store.generations import Generations
from ssd_edge import files
from ssd_edge.errors import EnvironmentUnfitError

STORE = vars(store_standins)
install, learn, roll_back, prune = STORE["install"], STORE["learn"], STORE["roll_back"], STORE["prune"]
contents, state = STORE["contents"], STORE["state"]
NUMBERS = [
    *(errno.EINVAL, errno.ESTALE, errno.EOPNOTSUPP, errno.ETIMEDOUT, errno.EFBIG, errno.EMFILE, errno.ENFILE),
    *(errno.EIO, errno.EROFS, errno.EDQUOT, errno.ENOSPC, errno.EACCES, errno.ENOMEM, errno.ECONNRESET),
]
CALLS = ("fsync", "replace", "rename", "open", "mkdir", "fchmod", "unlink", "listdir", "stat")
ACTIONS: dict[str, Callable[[Generations], object]] = {
    "install": lambda store: install(store, 4.0, b"another backbone"),
    "learn": lambda store: learn(store, 4.0),
    "rollback": lambda store: roll_back(store, 1),
    "prune": lambda store: prune(store, keep=1),
}
QUICK = {(call, "learn") for call in CALLS} | {("open", "learn"), ("open", "rollback")} | {("fsync", "rollback")}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Root with generations 1 to 5."""
    root = tmp_path_factory.mktemp("errno") / "root"
    store = STORE["three"](root)
    learn(store, 4.0)
    learn(store, 5.0)
    return root


EVERY = [  # by default two errors, at every eighth of the about 80 calls of `open`
    pytest.param(call, action, numbers, stride, marks=pytest.mark.slow if full or (call, action) not in QUICK else [])
    for call in CALLS
    for action in ACTIONS
    for full, numbers, stride in ((False, NUMBERS[::7], 8 if call == "open" else 1), (True, NUMBERS, 1))
]


@pytest.mark.parametrize(("call", "action", "numbers", "stride"), EVERY)
def test_any_error_at_any_call(
    root: Path, tmp_path: Path, monkeypatch, call: str, action: str, numbers, stride
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    committed = {n: contents(Generations(root).get(n)) for n in Generations(root).numbers()}
    real, failed = getattr(os, call), 0
    for number in numbers:
        for at in itertools.count(number % stride, stride):
            copy, count = tmp_path / f"{number}-{at}", itertools.count()
            shutil.copytree(root, copy)

            def fail(*args, count=count, at=at, number=number, **options):
                if next(count) == at:
                    raise OSError(number, os.strerror(number))
                return real(*args, **options)

            store = Generations(copy)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, call, fail)
                refused = STORE["refusal"](lambda store=store: ACTIONS[action](store))
            failed += bool(refused)
            assert not refused or (str(copy) in refused and "\n" not in refused), refused
            got = store.current()
            assert (got.fallback, contents(got)) == ("", committed.get(got.number, state(4.0)))
            assert learn(store, 6.0).parent == got.number
            fsck.repair(store)
            assert not [one for one in fsck.check(store) if one.severity != fsck.NOTE]
            shutil.rmtree(copy)
            if next(count) <= at:
                break
    assert failed or call in ("mkdir", "unlink", "rename", "fchmod")


@pytest.mark.parametrize("number", NUMBERS)
def test_every_error_has_a_sentence(tmp_path: Path, monkeypatch, number: int) -> None:
    def fail(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(EnvironmentUnfitError, match=rf"^cannot write {tmp_path}/x: .{{8,}}: .{{5,}}$|ulimit -f"):
        files.write_bytes(tmp_path / "x", b"")


@pytest.mark.parametrize("left", [0, 1, 2, 3])
def test_few_free_descriptors(root: Path, tmp_path: Path, left: int) -> None:
    store = Generations(shutil.copytree(root, tmp_path / "root"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = itertools.islice((n for n in itertools.count() if not _is_open(n)), left, None)
    calls = (store.current, lambda: learn(store, 9.0), lambda: fsck.check(store))
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(free), limits[1]))
    try:
        refused = [STORE["refusal"](call) for call in calls]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert all("too many open files" in text.lower() for text in refused if text), refused
    assert any(refused) or left > 2
    assert (store.current().number, store.current().fallback) in ((5, ""), (6, ""))


def _is_open(handle: int) -> bool:
    try:
        os.fstat(handle)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("name", ["generations", "backbones", "."])
def test_an_unlistable_folder_is_no_empty_one(root: Path, name: str) -> None:
    with unprivileged.open_folder() as folder:
        store = Generations(shutil.copytree(root, folder / "root"))
        (store.root / name).chmod(0o000)
        with unprivileged.unprivileged():
            for call in (store.numbers, store.list, store.current, lambda: fsck.check(store)):
                if name == "backbones" and call != store.list:
                    continue
                if (name, call) == ("backbones", store.list):
                    call = store.backbones
                with pytest.raises(EnvironmentUnfitError, match=r"cannot (be )?read|permission denied"):
                    call()


FORGED = [
    '{"seq": 1, "generation": 999999}',
    '{"seq": 1, "generation": 999998}',
    '{"seq": 1, "generation": 1000000}',
    '{"seq": 1, "generation": 999999999999}',
    '{"seq": 999999999999, "generation": 5}',
    '{"seq": 1, "generation": 0}',
    '{"seq": 1, "generation": -5}',
    '{"seq": -1, "generation": 5}',
    f'{{"seq": 1, "generation": {"9" * 100}}}',
    f'{{"seq": {"9" * 4000}, "generation": 5}}',
    '{"seq": 9, "generation": 5, "parent": 5}',
    '{"seq": 9, "generation": 5, "parent": -1}',
    '{"seq": 9, "generation": 5, "info": NaN}',
    '{"seq": 9, "generation": 5, "info": 1e999}',
    '{"seq": 9, "generation": 5, "event": "pruned", "generations": {"a": 1}}',
    '{"seq": 9, "generation": 5, "event": "install", "info": {"release": "x", "signed_by": 3}}',
    "[" * 100_000,
    '{"seq": true, "generation": true}',
    "[]",
    "\x00",
]


@pytest.mark.parametrize("line", FORGED, ids=range(len(FORGED)))
@pytest.mark.parametrize("times", [1, 30])
def test_no_line_of_the_journal_makes_a_store_unusable(root: Path, tmp_path: Path, monkeypatch, line, times) -> None:
    import json

    monkeypatch.setattr(os, "fsync", lambda handle: None)
    store = Generations(shutil.copytree(root, tmp_path / "root"))
    for _ in range(times):
        with open(store.root / "journal.jsonl", "a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        if times < 5 or _ % 10 == 0:
            number = learn(store, 7.0).number
    got = store.current()
    assert (got.number, got.fallback, contents(got)) == (number, "", state(7.0))
    json.dumps(list(store.journal()), allow_nan=False)
    roll_back(store, 2)
    prune(store, keep=1)
    fsck.check(store)
    fsck.repair(store)
    assert not [one for one in fsck.check(store) if one.severity != fsck.NOTE]
    assert learn(store, 8.0).fallback == ""
    (store.root / "CURRENT").unlink()
    refused = STORE["refusal"](store.current)
    assert not refused or "choose one with ssd-edge device rollback" in refused  # the last line names no older one
