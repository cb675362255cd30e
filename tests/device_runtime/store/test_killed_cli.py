"""Kill the real command line; the root must open with the previous or the new generation, and nothing is lost.

Each verb runs in its own process, on a real disk. Loading PyTorch takes most of its time, so two of three kills wait
for the first change below the root; the third comes at any time.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import store_standins
from PIL import Image

from device_runtime.device import Device
from device_runtime.install import bundle
from device_runtime.store import fsck
from device_runtime.store.generations import Generations
from device_runtime.store.journal import Journal
from ssd_edge import files

STORE = vars(store_standins)
contents, leftovers, photos = STORE["contents"], STORE["leftovers"], STORE["photos"]
TIMEOUT = 120.0  # s; a process that has neither written nor ended by then hangs


class Box:
    """Root of ten generations, with the arguments of each verb and the state it leaves when not killed."""

    def __init__(self, folder: Path, tiny_bundle) -> None:
        self.folder, self.template = folder, folder / "template"
        for number, name in enumerate(("first", "second", "third"), 1):
            data = STORE["with_backbone"](tiny_bundle(release=number), number)
            (folder / f"{name}.ssdedge").write_bytes(data)
        (folder / "bolts").mkdir()
        for number, picture in enumerate(photos("bolt", 5)):
            Image.fromarray(picture).save(folder / "bolts" / f"{number}.png")
        for name in ("first", "second"):  # the next commit prunes the first generation and its backbone
            bundle.install(self.template, folder / f"{name}.ssdedge")
        device = Device.open(self.template)
        for seed in range(8):
            device.learn("wedge", photos("wedge", 4, seed))
        self.before = self._contents(self.template)
        self.verbs = {
            "learn": ("--label", "bolt", folder / "bolts"),
            "install": (folder / "third.ssdedge",),
            "forget": ("nut",),
            "rollback": (),
        }
        self.after = {verb: self._uninterrupted(verb) for verb in self.verbs}

    def _contents(self, root: Path) -> dict[int, dict[str, bytes]]:
        store = Generations(root)
        return {number: contents(store.get(number)) for number in store.numbers()}

    def _uninterrupted(self, verb: str) -> tuple[int, dict[int, dict[str, bytes]]]:
        root = self.folder / f"after-{verb}"
        shutil.copytree(self.template, root)
        self.act(verb, root)
        return Generations(root).current().number, self._contents(root)

    def act(self, verb: str, root: Path) -> None:
        """Run the action of a verb in this process."""
        if verb == "install":
            bundle.install(root, self.folder / "third.ssdedge")
            return
        with Device.open(root) as device:
            if verb == "learn":
                device.learn("bolt", sorted((self.folder / "bolts").iterdir()))
            elif verb == "forget":
                device.forget("nut")
            else:
                device.rollback()

    def start(self, verb: str, root: Path) -> subprocess.Popen:
        """Start the command of a verb in a new session."""
        command = [sys.executable, "-m", "ssd_edge", "device", verb, *map(str, self.verbs[verb]), "--root", str(root)]
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, **streams, cwd=self.folder, start_new_session=True, text=True)

    def examine(self, verb: str, root: Path) -> int:
        """Check a root after its writer was killed, and return the current generation."""
        number, committed = self.after[verb]
        store, now = Generations(root), Device.open(root).generation
        assert (now.fallback, now.number in (10, number)) == ("", True), verb
        for one in store.numbers():
            found, expected = contents(store.get(one)), {**committed, **self.before}[one]
            if verb == "install" and one == number:  # each installation has its own id
                found, expected = ({**state, "device.json": b""} for state in (found, expected))
            assert found == expected, (verb, one)
            store.backbone_path(store.get(one).backbone)
        for path in store.backbones():
            assert files.sha256_file(path) == path.stem
        return now.number

    def check_next_learn(self, root: Path, number: int) -> None:
        """Check that a learn works afterwards and removes what the killed process left behind."""
        device = Device.open(root)
        device.learn("wedge", photos("wedge", 4, seed=50))
        assert device.generation.parent == number
        assert Device.open(root).generation == device.generation
        assert leftovers(root) == []
        journal = Journal(root)
        assert journal.is_complete()
        assert None not in [event for _, event in journal.lines()]
        assert {one.severity for one in fsck.check(device.store)} <= {"note"}


@pytest.fixture(scope="module")
def box(tiny_bundle):
    with STORE["scratch"]() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield Box(folder, tiny_bundle)


def snapshot(root: Path) -> tuple:
    """Return a snapshot of everything that a writer changes, except its lock."""
    names = [name for folder in ("generations", "backbones") for name in sorted(os.listdir(root / folder))]
    hidden = sorted(name for name in os.listdir(root) if name.startswith(files.TEMPORARY_PREFIX))
    return names, hidden, (root / "CURRENT").stat().st_ino, (root / "journal.jsonl").stat().st_size


def end(process: subprocess.Popen, root: Path, number: int, wait: float | None, more: float) -> bool:
    """Send a signal `wait` seconds after the start, or after the first write if None, plus `more` seconds.

    Returns:
        Whether the process wrote anything.
    """
    before, until = snapshot(root), time.monotonic() + TIMEOUT
    if wait is None:
        while snapshot(root) == before and process.poll() is None and time.monotonic() < until:
            time.sleep(0.0002)
    time.sleep((wait or 0.0) + more)
    if process.poll() is None:
        os.killpg(process.pid, number)
    process.wait(TIMEOUT)
    return snapshot(root) != before


def end_all(box: Box, folder: Path, number: int, plan: list[tuple[str, float | None, float]]) -> list[tuple]:
    """Start a process for each (verb, wait, more) of the plan and end it with a signal.

    Returns:
        For each process: verb, root, whether it wrote, exit code, seconds and its standard error.
    """

    def one(place: int) -> tuple:
        verb, wait, more = plan[place]
        root = folder / f"root-{len(list(folder.iterdir()))}-{place}"
        shutil.copytree(box.template, root)
        started = time.monotonic()
        with box.start(verb, root) as process:
            wrote = end(process, root, number, wait, more)
            took = time.monotonic() - started
            return verb, root, wrote, process.returncode, took, process.stderr.read()

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(len(plan))))


@pytest.mark.parametrize("count", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_killed(box, tmp_path, count):
    rng, verbs = random.Random(0), itertools.cycle(box.verbs)
    writing = [(next(verbs), None, 0.2 * rng.random() ** 3) for _ in range(2 * count // 3)]
    ended = end_all(box, tmp_path, signal.SIGKILL, writing)
    duration = max(took for *_, took, _ in ended)
    anywhere = [(next(verbs), rng.uniform(0.0, 1.2 * duration), 0.0) for _ in range(count - len(writing))]
    ended += end_all(box, tmp_path, signal.SIGKILL, anywhere)
    outcomes = []
    for verb, root, wrote, code, *_ in ended:
        assert code in (0, -signal.SIGKILL), (verb, code)
        number = box.examine(verb, root)
        outcomes.append((verb, number, wrote, code))
        assert code != 0 or number == box.after[verb][0]
        box.check_next_learn(root, number)
    print(f"(verb, generation, whether it wrote, exit code): {outcomes}")
    assert len(outcomes) == count
    assert 2 * sum(wrote for _, _, wrote, _ in outcomes) >= count
    # a process may finish before it is killed, but most must not
    assert count < 30 or sum(code == -signal.SIGKILL for *_, code in outcomes) >= count // 2


@pytest.mark.slow
def test_sigterm(box, tmp_path):
    """After SIGTERM, as systemd sends it, the verb is interrupted or has finished, and leaves no temporary files."""
    rng, verbs, count = random.Random(1), itertools.cycle(box.verbs), 18
    plan = [(next(verbs), None, 0.1 * rng.random() ** 3) for _ in range(2 * count // 3)]
    starting = count - len(plan)  # these arrive while PyTorch is loading or before Python has started
    plan += [(next(verbs), rng.uniform(0.0, 2.0), 0.0) for _ in range(starting)]
    outcomes = []
    for verb, root, wrote, code, _, stderr in end_all(box, tmp_path, signal.SIGTERM, plan):
        number = box.examine(verb, root)
        outcomes.append((verb, number, code))
        if not wrote:  # Python was starting or loading PyTorch, whose native code may exit in any way
            assert (number, code != 0) == (10, True), (verb, code, stderr)
        elif code == -signal.SIGTERM:  # the verb has finished, and Python is shutting down
            assert number == box.after[verb][0], verb
        else:
            # If exec() (used by dataclasses) is interrupted, Python exits by SIGINT; a shell also reports 130.
            assert code in (0, 130, -signal.SIGINT), (verb, code, stderr)
            # the atexit handlers of PyTorch can be interrupted
            assert "Traceback" not in stderr or "atexit" in stderr, stderr
        assert code != 0 or number == box.after[verb][0]
        assert leftovers(root) == []
        assert not any("a crash came before" in one.problem for one in fsck.check(Generations(root)))
        box.check_next_learn(root, number)
    print(f"(verb, generation, exit code): {outcomes}")


@pytest.mark.parametrize(
    "verb", ["forget", "rollback", *(pytest.param(verb, marks=pytest.mark.slow) for verb in ("learn", "install"))]
)
def test_sigterm_at_any_step(box, tmp_path, monkeypatch, verb):
    """SIGTERM raises KeyboardInterrupt, so raise it at each write step, in this process."""
    outcomes = set()
    every_step = verb == "rollback"  # the first 48 steps of the other verbs write the files of the generation
    for at in itertools.count() if every_step else itertools.chain(range(0, 48, 8), itertools.count(48)):
        root, steps = tmp_path / f"root-{at}", itertools.count()
        shutil.copytree(box.template, root)

        def hook(step: str, path: Path, steps=steps, at=at) -> None:
            if next(steps) == at:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(files, "fault_hook", hook)
            try:
                box.act(verb, root)
            except KeyboardInterrupt:
                code = 130
            else:
                code = 0
        outcomes.add((box.examine(verb, root), code))
        assert leftovers(root) == [], at
        assert not any("a crash came before" in one.problem for one in fsck.check(Generations(root))), at
        shutil.rmtree(root)
        if next(steps) <= at:
            break
    after = box.after[verb][0]
    assert outcomes == {(10, 130), (after, 130), (after, 0)}
