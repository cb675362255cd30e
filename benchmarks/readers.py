"""Measure the latency of readers while ten learns run, and check every prediction.

Usage: python benchmarks/readers.py BUNDLE DATA [--readers 4] [--rate 5] [--rounds 2] [--json FILE]

BUNDLE of `ssd-edge deploy --target cpu`; DATA is what data.path accepts, with at least five classes that the bundle
does not know. A reader is a thread that predicts one test image, as an array, --rate times per second and sleeps in
between; all share one `Device`. They run first without a learn, then while five new classes are taught twice each,
back to back and with other images each time: either on a thread of the same process (nice 10, one PyTorch thread), or
by one process of `nice -n 10 ssd-edge device learn` each, while every reader calls `refresh` every five seconds. The
milliseconds are those of `predict` alone, while learns were running. Afterwards every generation is restored and
opened, and a single thread predicts every image again: label, score, margin and nearest class must be identical, bit
for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from shared import busy_seconds, wait_for_quiet

from device_runtime.device import Device, Prediction
from device_runtime.install.bundle import install
from device_runtime.learning.guard import Limits
from ssd_edge import bundle
from ssd_edge.config import DataConfig
from ssd_edge.data import Dataset, load
from ssd_edge.images import Pixels
from ssd_edge.run.storage import environment

REFRESH = 5.0  # seconds
NEW, ROUNDS, IMAGES = 5, 2, 10  # each round teaches every class once, with so many images
BASELINE = 15.0  # seconds without a learn
NICE = 10
POOL = 40  # number of different images to predict
LIMITS = Limits(force=True)  # speed is measured; images of one occasion after those of another may be refused


class Reader(threading.Thread):
    """Thread that predicts in a loop until `over` is set.

    Args:
        device: device shared by all readers.
        images: uint8 ``(N, H, W, 3)``.
        start: share of the images and of the period after which this reader starts.
        period: seconds from one prediction to the next.
        refreshes: whether to load commits of other processes.

    Attributes:
        answers: start time, duration, image index and prediction of each call.
        refreshing: seconds of each call of `refresh`.
        failure: exception that ended the thread, if any.
        over: event that ends the thread.
    """

    def __init__(self, device: Device, images: np.ndarray, start: float, period: float, refreshes: bool) -> None:
        super().__init__(daemon=True)
        self.device, self.images, self.start_at, self.period, self.refreshes = device, images, start, period, refreshes
        self.answers: list[tuple[float, float, int, Prediction]] = []
        self.refreshing: list[float] = []
        self.failure: BaseException | None = None
        self.over = threading.Event()

    def run(self) -> None:
        """Predict, record and sleep until `over` is set."""
        index = int(self.start_at * len(self.images))
        due = time.monotonic() + self.start_at * self.period
        refresh = due + self.start_at * REFRESH
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
                due = max(due + self.period, time.monotonic())  # missed frames are skipped
        except BaseException as error:  # reported by `read_while`
            self.failure = error


@dataclasses.dataclass(frozen=True)
class Load:
    """What is predicted: how many readers, seconds from one prediction of a reader to the next, and images."""

    readers: int
    period: float
    images: np.ndarray


def read_while(device: Device, asked: Load, refreshes: bool, work: Callable[[], None]) -> dict[str, Any]:
    """Run the readers during `work`, and return their latencies, failures and predictions."""
    starts = [number / asked.readers for number in range(asked.readers)]
    readers = [Reader(device, asked.images, start, asked.period, refreshes) for start in starts]
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
            keep(device.store.root, device.learn(label, list(images), LIMITS).generation, kept)

    learner = threading.Thread(target=work)
    learner.start()
    learner.join()


def by_command(root: Path, taught: Sequence[tuple[str, Path]], kept: Path) -> None:
    """Run each learn in its own process."""
    for label, folder in taught:
        learn = [sys.executable, "-m", "ssd_edge", "device", "learn", "--root", root, "--json", "--force"]
        command = [shutil.which("nice") or "nice", "-n", str(NICE), *map(str, [*learn, "--label", label, folder])]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        keep(root, json.loads(done.stdout)["generation"], kept)


def new_images(dataset: Dataset, label: str, form: Pixels) -> list[np.ndarray]:
    """Return training images of a class, as many for each round."""
    own = np.flatnonzero(dataset.train_labels == dataset.classes.index(label))
    return np.split(dataset.train.load(np.random.default_rng(0).permutation(own)[: ROUNDS * IMAGES], form), ROUNDS)


def write_images(folder: Path, images: np.ndarray) -> Path:
    """Write images as PNG files to a new folder, and return the folder."""
    folder.mkdir(parents=True)
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


def one_round(path: Path, scratch: Path, asked: Load, new: dict[str, list[np.ndarray]], kind: str) -> dict[str, Any]:
    """Measure without a learn, then with learns by ``thread`` or ``process``."""
    root, kept = scratch / "root", scratch / "kept"
    install(root, path)
    keep(root, 1, kept)
    batches = [(label, parts[number]) for number in range(ROUNDS) for label, parts in new.items()]
    by_files = kind == "process"
    written = [(label, write_images(scratch / str(n), some)) for n, (label, some) in enumerate(batches) if by_files]
    with Device.open(root) as device:
        device.predict([asked.images[0]])
        wait_for_quiet(20)
        load_before = os.getloadavg()[0]
        found = {"without": read_while(device, asked, by_files, lambda: time.sleep(BASELINE))}
        learn = (lambda: by_command(root, written, kept)) if by_files else (lambda: in_a_thread(device, batches, kept))
        found["learning"] = read_while(device, asked, by_files, learn)
    result: dict[str, Any] = {"load_average": round(load_before, 2)}
    for name, one in found.items():
        answers = one.pop("checked")
        result[name] = {**one, "wrong": count_wrong(root, kept, asked.images, answers), "compared": len(answers)}
    return {**result, "ratio": result["learning"]["p99"] / result["without"]["p99"]}


def main() -> None:
    """Print the table, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data")
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--rate", type=float, default=5, help="predictions of each reader per second")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dataset, opened = load(DataConfig(path=args.data), 0), bundle.read(args.bundle)
    form, known = Pixels.from_dict(opened.manifest["backbone"]), opened.registry.names
    images = dataset.test.load(np.random.default_rng(0).permutation(len(dataset.test))[:POOL], form)
    asked = Load(args.readers, 1 / args.rate, images)
    new = {name: new_images(dataset, name, form) for name in dataset.classes if name not in known}
    new = dict(list(new.items())[:NEW])
    rows = []
    for kind in ("thread", "process"):
        rounds = []
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as scratch:
                rounds.append(one_round(args.bundle, Path(scratch), asked, new, kind))
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
            "command": f"python benchmarks/readers.py BUNDLE {Path(args.data).name} (ssd-edge deploy --target cpu RUN)",
            **environment(),
            "features": opened.manifest["backbone"]["dim"],
            "readers": args.readers,
            "per_second": args.rate,
            "learns": ROUNDS * len(new),
            "images": IMAGES,
            "nice": NICE,
            "rows": rows,
        }
        args.json.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
