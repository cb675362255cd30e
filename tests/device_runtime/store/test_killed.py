"""Kill every `Device` action with SIGKILL at any moment; the root must equal a committed generation, bit for bit.

Forking a process that has run threads is unsafe, because a lock held by one of them would never be released. The
children are therefore forked by a separate parent process (this file, run as a program), which has loaded the code and
opened a device but has no ONNX Runtime session and no thread pool; a child that needs ONNX Runtime loads it itself. A
child reports when it reaches the requested step. It then either waits there or continues for up to 2 ms, so that it is
also killed between steps.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import store_standins

from device_runtime.device import Device
from device_runtime.install import bundle
from device_runtime.learning.guard import Limits
from device_runtime.store import fsck
from device_runtime.store.generations import Generations
from device_runtime.store.journal import Journal
from ssd_edge import files
from ssd_edge.errors import InputError

STORE = vars(store_standins)
contents, leftovers, photos = STORE["contents"], STORE["leftovers"], STORE["photos"]
ANY = Limits(force=True)
INSIDE_OF_270 = 100  # minimum number of kills between the first write of a generation and its rename

ACTIONS: dict[str, Callable[[Path, Path], object]] = {  # arguments: the root and the folder with the bundles
    "learn": lambda root, folder: Device.open(root).learn_all(
        {"bolt": photos("bolt", 5), "cup": photos("cup", 2, seed=1)}, ANY
    ),
    "forget": lambda root, folder: Device.open(root).forget("nut", limits=ANY),
    "merge_labels": lambda root, folder: Device.open(root).merge_labels(["nut", "screw"], "fastener", ANY),
    "rename": lambda root, folder: Device.open(root).rename("cup", "mug"),
    "rollback": lambda root, folder: Device.open(root).rollback(),
    "install": lambda root, folder: bundle.install(root, folder / "third.ssdedge"),
    "merge": lambda root, folder: Device.open(root).merge(folder / "there.ssdedge", ANY),
}


# ── the parent of the children ───────────────────────────────────────────────────────────────────────
def serve(folder: Path) -> None:
    """Fork a child for each request read from standard input, and print the result.

    A request is one JSON object per line: action, root, at (a step or null) and delay (seconds or null). With neither a
    step nor a delay the child runs to completion, and the result lists its steps.
    """
    os.fsync = lambda handle: None  # writes survive a killed process; only a power cut needs fsync
    # a fixed installation id, so that installations compare equal
    secrets.token_hex = lambda count: "5a" * count
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    Device.open(folder / "template")
    for line in sys.stdin:
        assert len(os.listdir("/proc/self/task")) == 1, "cannot fork safely: this process has several threads"
        assert "onnxruntime" not in sys.modules
        print(json.dumps(fork_and_kill(folder, **json.loads(line))), file=answers, flush=True)


def fork_and_kill(folder: Path, action: str, root: str, at: int | None, delay: float | None) -> dict[str, Any]:
    """Return the signal that ended the child, whether it reached its step, how long it ran, and its steps."""
    (receiver, sender), steps = os.pipe(), []
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # end the child even if the parent has died

        def hook(name: str, path: Path) -> None:
            steps.append((name, str(path)))
            if at == len(steps) - 1:
                os.write(sender, b"!")
                if delay is None:
                    signal.pause()

        try:
            files.fault_hook = hook
            os.write(sender, b"!" if at is None else b"")
            ACTIONS[action](Path(root), folder)
            if at is None and delay is None:
                os.write(sender, json.dumps(steps).encode())
                os._exit(0)
            signal.pause()  # the action finished before the delay
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(sender)
    started, reached = time.monotonic(), os.read(receiver, 1)
    if reached and not (at is None and delay is None):
        time.sleep(delay or 0.0)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(receiver, "rb") as stream:
        rest = stream.read()
    status = os.waitpid(child, 0)[1]
    return {
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
        "reached": bool(reached),
        "seconds": time.monotonic() - started,
        "steps": json.loads(rest) if rest else None,
    }


# ── the root before and after each action ────────────────────────────────────────────────────────────
@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of an uninterrupted action.

    Attributes:
        number: current generation afterwards.
        contents: files of every generation.
        steps: name and path of each step.
        seconds: duration.
    """

    number: int
    contents: dict[int, dict[str, bytes]]
    steps: list[tuple[str, Path]]
    seconds: float

    def inside(self) -> list[int]:
        """Return the steps between the first write of a generation and its rename."""
        within = [
            number
            for number, (step, path) in enumerate(self.steps)
            if ".tmp-000011" in path.parts or (step, path.name) == ("rename", "000011")
        ]
        return [number for number in within if number > within[0] + 1]  # the first step creates the folder


class Parent:
    """Client of the process that forks and kills the children."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        single = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **single, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self.outcomes: dict[str, Outcome] = {}

    def ask(self, action: str, root: Path, at: int | None, delay: float | None) -> dict[str, Any]:
        request = {"action": action, "root": str(root), "at": at, "delay": delay}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def record_outcomes(self) -> None:
        for action in ACTIONS:
            root = self.folder / f"after-{action}"
            shutil.copytree(self.folder / "template", root)
            done = self.ask(action, root, None, None)
            assert done["steps"], f"{action} fails without being killed"
            store = Generations(root)
            found = {number: contents(store.get(number)) for number in store.numbers()}
            steps = [(step, Path(path)) for step, path in done["steps"]]
            self.outcomes[action] = Outcome(store.current().number, found, steps, done["seconds"])

    def close(self) -> None:
        self._process.kill()  # every child has been waited for, so none is left
        self._process.communicate()


@pytest.fixture(scope="module")
def parent(tiny_bundle):
    """Start the parent process with a root of ten generations from two installations.

    The next commit prunes the first generation and its backbone.
    """
    with STORE["scratch"]() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        for number, name in enumerate(("first", "second", "third"), 1):
            data = STORE["with_backbone"](tiny_bundle(release=number), number)
            (folder / f"{name}.ssdedge").write_bytes(data)
        bundle.install(folder / "template", folder / "first.ssdedge")
        for name in ("template", "there"):
            bundle.install(folder / name, folder / "second.ssdedge")
        there, here = Device.open(folder / "there"), Device.open(folder / "template")
        there.learn("gear", photos("gear", 5))
        there.export(folder / "there.ssdedge")
        for seed in range(8):
            here.learn("wedge", photos("wedge", 4, seed))
        assert here.store.numbers() == list(range(1, 11))
        parent = Parent(folder)
        try:
            parent.record_outcomes()
            yield parent
        finally:
            parent.close()


@pytest.fixture(autouse=True)
def _skip_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# ── kills ────────────────────────────────────────────────────────────────────────────────────────────
def examine(root: Path, before: dict[int, dict[str, bytes]], action: str, after: Outcome) -> tuple[bool, int]:
    """Check a root after its writer was killed.

    Returns:
        Whether a generation was being written, and the number of the current generation.
    """
    inside = any(any(folder.iterdir()) for folder in root.glob("generations/.tmp-0*"))
    committed = {**after.contents, **before}
    store, device = Generations(root), Device.open(root)
    now = device.generation
    assert now.fallback == ""
    assert now.number in (10, after.number), action
    assert not (inside and now.number != 10), action
    assert device.state.contents() == committed[now.number]  # as loaded and serialized again
    for number in store.numbers():
        generation = store.get(number)
        assert contents(generation) == committed[number], (action, number)
        store.backbone_path(generation.backbone)
    for path in store.backbones():
        assert files.sha256_file(path) == path.stem
    journal = Journal(root)
    events = [event for _, event in journal.lines()]
    assert None not in (events if journal.is_complete() else events[:-1])
    result = device.learn("wedge", photos("wedge", 4, seed=50), limits=ANY)  # the lock is free
    assert result.generation > max(now.number, 10)
    assert (device.generation.parent, Device.open(root).generation) == (now.number, device.generation)
    assert leftovers(root) == []
    assert journal.is_complete()
    assert None not in [event for _, event in journal.lines()]
    assert {one.severity for one in fsck.check(store)} <= {"note"}
    return inside, now.number


def plan(outcomes: dict[str, Outcome], count: int) -> Iterator[tuple[str, int | None, float | None]]:
    """Yield `count` kills as (action, step, delay), cycling through the actions.

    Of ten kills, six are inside a commit, one is at the write of CURRENT, one outside a commit, one shortly after a
    step and one at a random time.
    """
    rng, kinds = random.Random(0), itertools.cycle("iicbiioiir")
    pointer = itertools.cycle(("write", "rename", "fsync", "create", "fsync_directory"))
    for action in itertools.islice(itertools.cycle(outcomes), count):
        kind, outcome = next(kinds), outcomes[action]
        inside = outcome.inside()
        outside = [step for step in range(len(outcome.steps)) if step not in inside]
        if kind == "r":
            yield action, None, rng.uniform(0.0, 1.1 * outcome.seconds)
        elif kind == "c":
            first = next(number for number, (_, path) in enumerate(outcome.steps) if path.name == "CURRENT")
            expected_step = next(pointer)
            yield action, next(n for n in range(first, first + 5) if outcome.steps[n][0] == expected_step), None
        else:
            step = rng.choice(inside if kind == "i" and inside else outside)
            yield action, step, rng.uniform(0.0, 0.002) if kind == "b" else None


def kill_all(parent: Parent, kills: Iterator[tuple[str, int | None, float | None]]) -> Counter:
    """Run all kills and check the root after each.

    Returns:
        Number of kills per (action, current generation), and under "inside" those that interrupted a commit.
    """
    template, root, seen = Generations(parent.folder / "template"), parent.folder / "root", Counter()
    before = {number: contents(template.get(number)) for number in template.numbers()}
    for action, step, delay in kills:
        shutil.copytree(template.root, root)
        ended = parent.ask(action, root, step, delay)
        assert ended["reached"], f"{action} ended before step {step}"
        assert ended["signal"] == signal.SIGKILL
        inside, number = examine(root, before, action, parent.outcomes[action])
        seen["inside"] += inside
        seen[action, number] += 1
        shutil.rmtree(root)
    return seen


@pytest.mark.parametrize("count", [30, pytest.param(270, marks=pytest.mark.slow)])
def test_killed_at_any_moment(parent, count):
    seen = kill_all(parent, plan(parent.outcomes, count))
    inside = seen.pop("inside")
    print(f"{inside} of {count} kills between the first write and the rename; in all: {dict(seen)}")
    assert inside >= INSIDE_OF_270 * count / 270
    assert sum(seen.values()) == count
    if count > 100:
        assert {action for action, number in seen if number == 10} == set(ACTIONS)  # before the action …
        assert {action for action, number in seen if number != 10} == set(ACTIONS)  # … and after it


@pytest.mark.slow
def test_killed_at_each_step(parent):
    every = [(action, step, None) for action, outcome in parent.outcomes.items() for step in range(len(outcome.steps))]
    seen = kill_all(parent, iter(every))
    assert sum(seen.values()) == len(every) + seen["inside"]


def test_actions_commit_prune_and_remove_a_backbone(parent):
    """Killing an action is only a test if the action writes something."""
    for action, outcome in parent.outcomes.items():
        names = {path.name for _, path in outcome.steps}
        assert {"CURRENT", "journal.jsonl"} <= names
        if action == "rollback":
            assert (outcome.number, outcome.inside()) == (9, [])
            continue
        assert (outcome.number, min(outcome.contents)) == (11, 2)
        assert ".tmp-pruned-000001" in names
        assert len(outcome.inside()) > 40
        assert outcome.contents[11] != outcome.contents[10]


def test_first_install_killed(parent):
    steps = parent.outcomes["install"].steps
    for step in range(0, len(steps) - 8, 16):
        root = parent.folder / f"root-{step}"
        assert parent.ask("install", root, step, None)["signal"] == signal.SIGKILL
        if not (root / "CURRENT").exists():
            with pytest.raises(InputError, match="no bundle is installed"):
                Device.open(root)
            ACTIONS["install"](root, parent.folder)
        assert Device.open(root).learn("wedge", photos("wedge", 4), limits=ANY).classes[-1] == "wedge"
        assert leftovers(root) == []


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
