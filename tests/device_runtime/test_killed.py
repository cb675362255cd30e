"""kill -9 at any moment: the store equals a committed generation, bit for bit.

Children are forked from this process, which has the code loaded and runs no threads of its own for it. A child tells
when it has come to its step, and waits there, or goes on for the blink of an eye: so it also dies between steps.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import runpy
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from device_runtime.generations import Generations
from ssd_edge import files
from ssd_edge.errors import InputError

STORE = runpy.run_path(str(Path(__file__).with_name("store_standins.py")))
learn, roll_back, prune, contents = STORE["learn"], STORE["roll_back"], STORE["prune"], STORE["contents"]
FILES = {f"part-{number}.bin": bytes([number]) * 20_000 for number in range(9)}
NEW = {**STORE["state"](7.0), **FILES}


def install(store: Generations) -> None:
    with store.writer():
        store.commit(NEW, {}, None, store.add_backbone(b"another backbone"))


def learned(store: Generations) -> None:
    with store.writer():
        store.commit(NEW, {}, store.current().number)


ACTIONS: dict[str, Callable[[Generations], object]] = {
    "install": install,
    "learn": learned,
    "rollback": lambda store: roll_back(store, 2),
    "prune": lambda store: prune(store, keep=1),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """What is written outlives a killed process; only a power cut needs fsync."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def template(tmp_path):
    """Five generations."""
    store = Generations(tmp_path / "template")
    STORE["install"](store, 1.0)
    for number in range(2, 6):
        learn(store, float(number))
    return store


def steps(action: Callable[[Generations], object], template: Generations) -> list[bool]:
    """The steps of an action; True for those from the first write of a generation to its rename."""
    root, seen = template.root.with_name("counted"), []
    shutil.copytree(template.root, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "fault_hook", lambda step, path: seen.append((step, path)))
        action(Generations(root))
    shutil.rmtree(root)
    inside = [".tmp-000006" in path.parts or (step, path.name) == ("rename", "000006") for step, path in seen]
    first = inside.index(True) + 1 if True in inside else len(inside)  # after the folder is made
    return [within and place >= first for place, within in enumerate(inside)]


def kill(action: Callable[[Generations], object], store: Generations, step: int, delay: float | None) -> None:
    """Run `action` in a child and kill it at a step, or `delay` seconds later."""
    (hear, tell), counted = os.pipe(), itertools.count()
    child = os.fork()
    if child == 0:

        def hook(name: str, path: Path) -> None:
            if next(counted) == step:
                os.write(tell, b"!")
                if delay is None:
                    signal.pause()

        try:
            files.fault_hook = hook
            action(store)
            signal.pause()  # it was faster than the delay
        finally:
            os._exit(1)  # never back into pytest
    os.close(tell)
    assert os.read(hear, 1) == b"!", f"the child ended before step {step}"
    os.close(hear)
    time.sleep(delay or 0.0)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def plan(template: Generations, count: int) -> Iterator[tuple[str, int, float | None, bool]]:
    """`count` kills: every step in turn, and, from the second round on, also between them."""
    rng, places = random.Random(0), []
    for name, action in ACTIONS.items():
        places += [(name, step, inside) for step, inside in enumerate(steps(action, template))]
    rng.shuffle(places)
    places.sort(key=lambda place: place[1] != 5)  # a sixth step of each action comes first: so few kills reach each
    for number, (name, step, inside) in zip(range(count), itertools.cycle(places), strict=False):
        delay = None if number < len(places) else rng.uniform(0.0, 0.002)
        yield name, step, delay, inside and delay is None


@pytest.mark.parametrize("count", [30, pytest.param(270, marks=pytest.mark.slow)])
def test_killed_at_any_moment(template, tmp_path, count):
    committed = {n: contents(template.get(n)) for n in template.numbers()}
    inside_commit, outcomes = 0, set()
    for name, step, delay, inside in plan(template, count):
        root = tmp_path / "root"
        shutil.copytree(template.root, root)
        store = Generations(root)
        kill(ACTIONS[name], store, step, delay)
        inside_commit += inside
        got = store.current()
        assert got.fallback == ""
        assert contents(got) == ({**committed, 6: NEW})[got.number]
        expected = {"install": 6, "learn": 6, "rollback": 2, "prune": 5}[name]
        assert got.number in (5, expected), (name, step)
        outcomes.add((name, got.number))
        if inside and delay is None:
            assert got.number == 5
        for number in store.numbers():
            assert contents(store.get(number)) == ({**committed, 6: NEW})[number]
        store.backbone_path(got.backbone)
        following = learn(store, 9.0)  # and the lock is free
        assert following.number > got.number
        assert (following.parent, following.fallback) == (got.number, "")
        assert not list(root.rglob(f"{files.TEMPORARY_PREFIX}*"))
        assert {one.severity for one in store.fsck(repair=True)} <= {"note", "leftover"}
        shutil.rmtree(root)
    assert {name for name, _ in outcomes} == set(ACTIONS)
    if count > 100:
        assert inside_commit >= 100
        assert len(outcomes) == 7  # each action both denied and done; prune changes nothing of what is current


def test_a_first_install_killed(tmp_path):
    for step in range(0, 60, 8):
        store = Generations(tmp_path / f"root-{step}")
        kill(install, store, step, None)
        installed = (store.root / "CURRENT").exists()
        with contextlib.nullcontext() if installed else pytest.raises(InputError, match="no bundle is installed"):
            assert contents(store.current()) == NEW
        install(store)
        assert contents(store.current()) == NEW
