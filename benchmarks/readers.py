"""Measure the latency of eight readers while twenty learns run, and check every prediction.

Usage: SSD_EDGE_DATA=FOLDER python benchmarks/readers.py BUNDLE [--rounds N] [--json FILE]

BUNDLE of `ssd-edge deploy --target cpu`. A reader is a thread that predicts one image (32 × 32 pixels) ten times
per second and sleeps in between; all share one `Device`. They run first without a learn, then while five new classes
are taught four times each, back to back and with 20 new images each time: either on a thread of the same process
(nice 10, one PyTorch thread), or by one process of `nice -n 10 ssd-edge device learn` each, while every reader calls
`refresh` every five seconds. The milliseconds are those of `predict` alone, while learns were running. Afterwards every
generation is restored and opened, and a single thread predicts every image again: label, score, margin and nearest
class must be identical, bit for bit.
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
from ssd_edge.images import Pixels
from ssd_edge.run.storage import environment

READERS, PERIOD, REFRESH = 8, 0.1, 5.0  # seconds
ROUNDS = 4  # each teaches every class once
BASELINE = 20.0  # seconds without a learn
NICE = 10
POOL = 100  # number of different images to predict


class Reader(threading.Thread):
    """Thread that predicts in a loop until `over` is set.

    Args:
        device: device shared by all readers.
        images: uint8 ``(N, H, W, 3)``.
        number: index of this reader, which determines its first image and its start time.
        refreshes: whether to load commits of other processes.

    Attributes:
        answers: start time, duration, image index and prediction of each call.
        refreshing: seconds of each call of `refresh`.
        failure: exception that ended the thread, if any.
        over: event that ends the thread.
    """

    def __init__(self, device: Device, images: np.ndarray, number: int, refreshes: bool) -> None:
        super().__init__(daemon=True)
        self.device, self.images, self.number, self.refreshes = device, images, number, refreshes
        self.answers: list[tuple[float, float, int, Prediction]] = []
        self.refreshing: list[float] = []
        self.failure: BaseException | None = None
        self.over = threading.Event()

    def run(self) -> None:
        """Predict, record and sleep until `over` is set."""
        index = self.number * len(self.images) // READERS
        due = time.monotonic() + self.number * PERIOD / READERS
        refresh = due + self.number * REFRESH / READERS
        try:
            while not self.over.wait(max(0.0, due - time.monotonic())):
                began = time.monotonic()
                (answer,) = self.device.predict([self.images[index]])
                now = time.monotonic()
                self.answers.append((began, now - began, index, answer))
                if self.refreshes and now >= refresh:
                    self.device.refresh()
                    self.refreshing.append(time.monotonic() - now)
                    refresh = now + REFRESH
                index = (index + 1) % len(self.images)
                due = max(due + PERIOD, time.monotonic())  # missed frames are skipped
        except BaseException as error:  # reported by `read_while`
            self.failure = error


def read_while(device: Device, images: np.ndarray, refreshes: bool, work: Callable[[], None]) -> dict[str, Any]:
    """Run the readers during `work`, and return their latencies, failures and predictions."""
    readers = [Reader(device, images, number, refreshes) for number in range(READERS)]
    for reader in readers:
        reader.start()
    time.sleep(1.0)  # let thread pools and all readers start
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
    """Return the CPU seconds of this process and its finished children."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def keep(root: Path, number: int, kept: Path) -> None:
    """Save the files of a generation as hard links, because the device keeps only the newest ten."""
    folder = Path("generations") / f"{number:06d}"
    shutil.copytree(root / folder, kept / folder, copy_function=os.link)


def count_wrong(
    root: Path, kept: Path, images: np.ndarray, answers: Sequence[tuple[float, float, int, Prediction]]
) -> int:
    """Count the predictions that differ from those of the same generation in a single thread."""
    for folder in (kept / "generations").iterdir():
        if not (root / "generations" / folder.name).exists():
            shutil.copytree(folder, root / "generations" / folder.name, copy_function=os.link)
    expected: dict[tuple[int, int], Prediction] = {}
    with Device.open(root) as device:
        for number in sorted({answer.generation for *_, answer in answers}):
            device.rollback(number)
            expected.update({(number, n): device.predict([pixels])[0] for n, pixels in enumerate(images)})
    return sum(answer != expected[answer.generation, index] for *_, index, answer in answers)


def in_a_thread(device: Device, taught: Sequence[tuple[str, np.ndarray]], kept: Path) -> None:
    """Run all learns in sequence on a thread of this process, and wait for it."""

    def work() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)  # on Linux, for this thread only
        torch.set_num_threads(1)  # for this thread and those that have not used PyTorch yet
        for label, images in taught:
            keep(device.store.root, device.learn(label, list(images)).generation, kept)

    learner = threading.Thread(target=work)
    learner.start()
    learner.join()


def by_command(root: Path, taught: Sequence[tuple[str, Path]], kept: Path) -> None:
    """Run each learn in its own process."""
    for label, folder in taught:
        learn = [COMMAND, "device", "learn", "--root", root, "--json", "--label", label, folder]
        _, lines = measured([shutil.which("nice") or "nice", "-n", str(NICE), *learn])
        keep(root, json.loads("".join(lines))["generation"], kept)


def one_round(bundle: Path, scratch: Path, images: np.ndarray, kind: str) -> dict[str, Any]:
    """Measure without a learn, then with learns by ``thread`` or ``process``."""
    root, kept = scratch / "root", scratch / "kept"
    install(root, bundle)
    keep(root, 1, kept)
    parts = {label: np.split(new_images(label, IMAGES * ROUNDS), ROUNDS) for label in NEW}
    batches = [(label, parts[label][number]) for number in range(ROUNDS) for label in NEW]
    by_files = kind == "process"
    written = [(label, write_images(scratch / str(n), some)) for n, (label, some) in enumerate(batches) if by_files]
    with Device.open(root) as device:
        device.predict([images[0]])
        wait_for_quiet(120)
        load_before = os.getloadavg()[0]
        found = {"without": read_while(device, images, by_files, lambda: time.sleep(BASELINE))}
        learn = (lambda: by_command(root, written, kept)) if by_files else (lambda: in_a_thread(device, batches, kept))
        found["learning"] = read_while(device, images, by_files, learn)
    result: dict[str, Any] = {"load_average": round(load_before, 2)}
    for name, one in found.items():
        answers = one.pop("checked")
        result[name] = {**one, "wrong": count_wrong(root, kept, images, answers), "compared": len(answers)}
    return {**result, "ratio": result["learning"]["p99"] / result["without"]["p99"]}


def main() -> None:
    """Print the table, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    test = datasets()[10].test
    images = test.load(np.random.default_rng(0).permutation(len(test))[:POOL], Pixels(SIDE))
    rows = []
    for kind in ("thread", "process"):
        rounds = []
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as scratch:
                rounds.append(one_round(args.bundle, Path(scratch), images, kind))
            for name in ("without", "learning"):
                one = rounds[-1][name]
                print(
                    f"{kind:>8} {name:>9}: {one['answers']:5} answers, p50 {one['p50']:6.1f} p99 {one['p99']:6.1f} max "
                    f"{one['max']:6.1f} ms; {one['wrong']} wrong, {len(one['failures'])} failed, "
                    f"{one['generations']} generations, {one['seconds']} s, others {one['company']} cores",
                    flush=True,
                )
        ratio = statistics.median(one["ratio"] for one in rounds)
        print(f"{kind:>8}: p99 {ratio:.2f} times that without a learn (median of {args.rounds})", flush=True)
        rows.append({"learner": kind, "ratio": ratio, "rounds": rounds})
    if args.json:
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
        args.json.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
