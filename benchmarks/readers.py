"""Eight readers, a camera each, while twenty learns go on: every answer is checked, and how late the latest come.

Usage: SSD_EDGE_DATA=FOLDER python benchmarks/readers.py BUNDLE [--rounds N] [--json FILE]

BUNDLE as for benchmarks/field.py. A reader is a thread that predicts one image (an array of 32 × 32 pixels) ten times a
second and sleeps in between; all share one `Device`. First without a learn, then while five new classes are taught four
times each, 20 other images every time, back to back: on a thread of the same process (nice 10, one thread of PyTorch),
or by `nice -n 10 ssd-edge device learn`, a process each, where every reader calls `refresh` every five seconds.
Milliseconds are those of `predict` alone, while a learn was going on. Afterwards every generation is copied back,
opened, and asked every image again by a single thread: label, score, margin and nearest class must be the same, bit for
bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from field import COMMAND, IMAGES, NEW, SIDE, busy_seconds, datasets, measured, new_images, wait_for_quiet, write_images

from device_runtime.device import Device, Prediction
from device_runtime.install.bundle import install
from ssd_edge.run.storage import environment

READERS, PERIOD, REFRESH = 8, 0.1, 5.0  # seconds
ROUNDS = 4  # of learns: each class once in each
WITHOUT = 20.0  # seconds without a learn
NICE = 10
POOL = 100  # images that are asked


class Reader(threading.Thread):
    """Predicts in a closed loop until it is told to stop.

    Args:
        device: that all readers share.
        images: uint8 ``(N, H, W, 3)``.
        number: of this reader; it begins at another image and another moment than the others.
        refreshes: whether it looks for what another process has committed.

    Attributes:
        answers: when it was asked, how long it took, which image, and the answer.
        refreshing: seconds of each call of `refresh`.
        failure: what was raised, if anything.
    """

    def __init__(self, device: Device, images: np.ndarray, number: int, refreshes: bool) -> None:
        super().__init__(daemon=True)
        self.device, self.images, self.number, self.refreshes = device, images, number, refreshes
        self.answers: list[tuple[float, float, int, Prediction]] = []
        self.refreshing: list[float] = []
        self.failure: BaseException | None = None
        self.over = threading.Event()

    def run(self) -> None:
        """Predict, note, sleep."""
        which = self.number * len(self.images) // READERS
        due = time.monotonic() + self.number * PERIOD / READERS
        refresh = due + self.number * REFRESH / READERS
        try:
            while not self.over.wait(max(0.0, due - time.monotonic())):
                began = time.monotonic()
                (answer,) = self.device.predict([self.images[which]])
                now = time.monotonic()
                self.answers.append((began, now - began, which, answer))
                if self.refreshes and now >= refresh:
                    self.device.refresh()
                    self.refreshing.append(time.monotonic() - now)
                    refresh = now + REFRESH
                which = (which + 1) % len(self.images)
                due = max(due + PERIOD, time.monotonic())  # a frame that was missed is not made up for
        except BaseException as error:  # told by whoever joins
            self.failure = error


def read_while(device: Device, images: np.ndarray, refreshes: bool, work: Callable[[], None]) -> dict[str, Any]:
    """What the readers found while `work` was done."""
    readers = [Reader(device, images, number, refreshes) for number in range(READERS)]
    for reader in readers:
        reader.start()
    time.sleep(1.0)  # thread pools have started, and all readers are at it
    began, busy, own = time.monotonic(), busy_seconds(), own_seconds()
    work()
    ended = time.monotonic()
    company = (busy_seconds() - busy - (own_seconds() - own)) / (ended - began)
    for reader in readers:
        reader.over.set()
    for reader in readers:
        reader.join(60)
    answers = [answer for reader in readers for answer in reader.answers]
    refreshing = [seconds * 1000 for reader in readers for seconds in reader.refreshing]
    taken = np.array([seconds for asked, seconds, *_ in answers if began <= asked <= ended]) * 1000
    return {
        "seconds": round(ended - began, 1),
        "company": round(max(0.0, company), 2),
        "answers": len(taken),
        "p50": float(np.quantile(taken, 0.5)),
        "p99": float(np.quantile(taken, 0.99)),
        "max": float(taken.max()),
        "refresh_p99": float(np.quantile(refreshing, 0.99)) if refreshes else None,
        "generations": len({answer.generation for *_, answer in answers}),
        "failures": [repr(reader.failure) for reader in readers if reader.failure or reader.is_alive()],
        "checked": answers,
    }


def own_seconds() -> float:
    """CPU time of this process and of those that it has started and that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def keep(root: Path, number: int, kept: Path) -> None:
    """Link the files of a generation elsewhere: the device keeps the newest ten only."""
    folder = Path("generations") / f"{number:06d}"
    shutil.copytree(root / folder, kept / folder, copy_function=os.link)


def wrong(root: Path, kept: Path, images: np.ndarray, answers: Sequence[tuple[float, float, int, Prediction]]) -> int:
    """How many of the answers are not those that their generations give to a single thread."""
    for folder in (kept / "generations").iterdir():
        if not (root / "generations" / folder.name).exists():
            shutil.copytree(folder, root / "generations" / folder.name, copy_function=os.link)
    right: dict[tuple[int, int], Prediction] = {}
    with Device.open(root) as device:
        for number in sorted({answer.generation for *_, answer in answers}):
            device.rollback(number)
            right.update({(number, n): device.predict([pixels])[0] for n, pixels in enumerate(images)})
    return sum(answer != right[answer.generation, which] for *_, which, answer in answers)


def in_a_thread(device: Device, taught: Sequence[tuple[str, np.ndarray]], kept: Path) -> None:
    """All learns, one after the other, on a thread of this process; returns when it is done."""

    def work() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)  # on Linux of this thread alone
        torch.set_num_threads(1)  # of this thread, and of those that have not called PyTorch yet
        for label, images in taught:
            keep(device.store.root, device.learn(label, list(images)).generation, kept)

    learner = threading.Thread(target=work)
    learner.start()
    learner.join()


def by_command(root: Path, taught: Sequence[tuple[str, Path]], kept: Path) -> None:
    """All learns by processes of their own."""
    for label, folder in taught:
        learn = [COMMAND, "device", "learn", "--root", root, "--json", "--label", label, folder]
        _, lines = measured([shutil.which("nice") or "nice", "-n", str(NICE), *learn])
        keep(root, json.loads("".join(lines))["generation"], kept)


def one_round(bundle: Path, scratch: Path, images: np.ndarray, kind: str) -> dict[str, Any]:
    """Without a learn, then with learns of a kind: ``thread`` or ``process``."""
    root, kept = scratch / "root", scratch / "kept"
    install(root, bundle)
    keep(root, 1, kept)
    parts = {label: np.split(new_images(label, IMAGES * ROUNDS), ROUNDS) for label in NEW}
    lessons = [(label, parts[label][number]) for number in range(ROUNDS) for label in NEW]
    by_files = kind == "process"
    written = [(label, write_images(scratch / str(n), some)) for n, (label, some) in enumerate(lessons) if by_files]
    with Device.open(root) as device:
        device.predict([images[0]])
        wait_for_quiet(120)
        load_before = os.getloadavg()[0]
        found = {"without": read_while(device, images, by_files, lambda: time.sleep(WITHOUT))}
        learn = (lambda: by_command(root, written, kept)) if by_files else (lambda: in_a_thread(device, lessons, kept))
        found["learning"] = read_while(device, images, by_files, learn)
    result: dict[str, Any] = {"load_average": round(load_before, 2)}
    for name, one in found.items():
        answers = one.pop("checked")
        result[name] = {**one, "wrong": wrong(root, kept, images, answers), "compared": len(answers)}
    return {**result, "ratio": result["learning"]["p99"] / result["without"]["p99"]}


def main() -> None:
    """Print the table; write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    test = datasets()[10].test
    images = test.load(np.random.default_rng(0).permutation(len(test))[:POOL], SIDE)
    rows = []
    for kind in ("thread", "process"):
        rounds = []
        for _ in range(words.rounds):
            with tempfile.TemporaryDirectory() as scratch:
                rounds.append(one_round(words.bundle, Path(scratch), images, kind))
            for name in ("without", "learning"):
                one = rounds[-1][name]
                print(
                    f"{kind:>8} {name:>9}: {one['answers']:5} answers, p50 {one['p50']:6.1f} p99 {one['p99']:6.1f} max "
                    f"{one['max']:6.1f} ms; {one['wrong']} wrong, {len(one['failures'])} failed, "
                    f"{one['generations']} generations, {one['seconds']} s, others {one['company']} cores",
                    flush=True,
                )
        ratio = statistics.median(one["ratio"] for one in rounds)
        print(f"{kind:>8}: p99 {ratio:.2f} times that without a learn (median of {words.rounds})", flush=True)
        rows.append({"learner": kind, "ratio": ratio, "rounds": rounds})
    if words.json:
        written = {
            "command": "python benchmarks/readers.py robot.ssdedge (ssd-edge deploy --target cpu RUN -o robot.ssdedge)",
            **environment(),
            "readers": READERS,
            "frames_per_second": 1 / PERIOD,
            "learns": ROUNDS * len(NEW),
            "images": IMAGES,
            "nice": NICE,
            "rows": rows,
        }
        words.json.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
