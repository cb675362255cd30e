"""Teach a device five new classes in sequence, and measure time, memory, accuracy and forgetting.

Usage: SSD_EDGE_DATA=FOLDER python benchmarks/field.py BUNDLE [--repeats N] [--json FILE]

BUNDLE knows nine classes of CIFAR-10 (ssd-edge deploy --target cpu RUN, RUN from examples/cifar10.yaml). The five new
classes were chosen by name before anything was measured, to resemble neither the nine nor each other. Each is taught
with 20 training images, PNG files of 32 × 32 pixels, in one new process; seconds are counted from the files to the
commit. The same classes are then taught by one `ssd-edge device learn` each; these seconds are those of the whole
command, with its files in the page cache. Each process and command waits up to 20 s for the machine to be idle, and
everything is repeated; the number of cores used by other processes meanwhile is recorded. Memory is the peak resident
size reported by the kernel. Accuracy is measured afterwards, on all test images, by rolling back to each generation.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from device_runtime.device import Device
from device_runtime.install.bundle import install
from ssd_edge.config import DataConfig
from ssd_edge.data import Dataset, load
from ssd_edge.images import Pixels
from ssd_edge.run.storage import environment
from ssd_edge.system import usable_cores

# class → number of classes of its CIFAR data set
NEW = {"truck": 10, "wardrobe": 100, "orange": 100, "mountain": 100, "keyboard": 100}
IMAGES = 20
SIDE = 32
COMMAND = Path(sys.executable).with_name("ssd-edge")
TEACH = """
import json, sys, time
from pathlib import Path
from device_runtime import Device

device = Device.open(sys.argv[1])
for folder in map(Path, sys.argv[2:]):
    began = time.monotonic()
    report = device.learn(folder.name, sorted(folder.iterdir()))
    print(json.dumps({**report.to_dict(), "wall": time.monotonic() - began}))
"""
# The peak memory of a child starts at that of its parent, so the parent is kept small.
LAUNCH = """
import json, os, sys, time
began = time.monotonic()
_, status, used = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0)
cpu = used.ru_utime + used.ru_stime
facts = {"seconds": time.monotonic() - began, "cpu_seconds": cpu, "peak_mb": used.ru_maxrss // 1024}
print(json.dumps(facts), file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def busy_seconds() -> float:
    """Return the CPU seconds used by all processes since the machine started."""
    ticks = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # without idle and iowait


def wait_for_quiet(timeout: float = 20.0) -> None:
    """Wait until other processes are idle for two seconds, for at most `timeout` seconds."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        before = busy_seconds()
        time.sleep(2.0)
        if busy_seconds() - before < 0.2:
            return


def measured(command: Sequence[str | Path]) -> tuple[dict[str, float], list[str]]:
    """Run a command in a new process and measure it.

    Returns:
        Its seconds, peak memory (`peak_mb`) and `company`, and its lines of standard output. `company` is the number of
        cores that other processes used meanwhile; if it is large, the times are unreliable.

    Raises:
        SystemExit: The command failed.
    """
    launcher = [sys.executable, "-S", "-c", LAUNCH, *map(str, command)]
    before = busy_seconds()
    done = subprocess.run(launcher, capture_output=True, text=True, check=False)
    busy = busy_seconds() - before
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command[:4]))} … ended with {done.returncode}: {done.stderr.strip()}")
    facts = json.loads(done.stderr.splitlines()[-1])
    facts["company"] = round(max(0.0, busy - facts.pop("cpu_seconds")) / facts["seconds"], 2)
    return facts, done.stdout.splitlines()


def new_images(label: str, count: int) -> np.ndarray:
    """Return training images of a new class, uint8 ``(count, 32, 32, 3)``."""
    dataset = datasets()[NEW[label]]
    own = np.flatnonzero(dataset.train_labels == dataset.classes.index(label))
    return dataset.train.load(np.random.default_rng(0).permutation(own)[:count], Pixels(SIDE))


def write_images(folder: Path, images: np.ndarray) -> Path:
    """Write images as PNG files to a new folder, and return the folder."""
    folder.mkdir(parents=True)
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


@functools.cache
def datasets() -> dict[int, Dataset]:
    """Load CIFAR-10 and CIFAR-100, by their number of classes."""
    return {size: load(DataConfig(path=f"cifar{size}-jpg.tar.xz"), 0) for size in (10, 100)}


def accuracies(root: Path, generations: int) -> list[dict[str, dict[str, float]]]:
    """Measure every generation on the test images of its classes.

    Returns:
        For each generation and class, the share of test images that are predicted correctly (`right`), predicted
        correctly and accepted (`right_and_near`), and rejected (`unknown`).
    """
    with Device.open(root) as device:
        device.rollback(generations)
        names, vectors = device.classes, {}
        for name in names:
            dataset = datasets()[NEW.get(name, 10)]
            own = np.flatnonzero(dataset.test_labels == dataset.classes.index(name))
            vectors[name] = device.embed(list(dataset.test.load(own, Pixels(SIDE))))
        found = []
        for number in range(1, generations + 1):
            device.rollback(number)
            state = device.state
            row: dict[str, dict[str, float]] = {}
            for truth, name in enumerate(device.classes):
                answered = state.learner.predict(vectors[name])
                near, _ = state.rejector.accepts(vectors[name], answered)
                shares = {"right": answered == truth, "right_and_near": (answered == truth) & near, "unknown": ~near}
                row[name] = {key: float(share.double().mean()) for key, share in shares.items()}
            found.append(row)
    return found


def mean(row: dict[str, dict[str, float]], names: Sequence[str], key: str) -> float:
    """Return the mean of a figure over classes."""
    return statistics.fmean(row[name][key] for name in names)


def rows_of(
    learns: Sequence[Sequence[dict[str, Any]]],
    commands: Sequence[Sequence[dict[str, float]]],
    found: Sequence[dict[str, dict[str, float]]],
) -> list[dict[str, Any]]:
    """Return one row per new class.

    Args:
        learns: result of each learn in process, by repeat and class.
        commands: measurements of each command, by repeat and class.
        found: accuracies by generation and class.
    """
    nine = list(found[0])
    rows = []
    for number, label in enumerate(NEW):
        before, after = found[number], found[number + 1]
        known = list(before)
        taught = [repeat[number] for repeat in learns]
        by_command = [repeat[number] for repeat in commands]
        rows.append(
            {
                "label": label,
                "data": f"CIFAR-{NEW[label]}",
                "images": IMAGES,
                "seconds": [round(one["wall"], 3) for one in taught],
                "peak_mb": [one["peak_mb"] for one in taught],
                "command_seconds": [round(one["seconds"], 3) for one in by_command],
                "command_peak_mb": [one["peak_mb"] for one in by_command],
                "command_company": [one["company"] for one in by_command],
                "own": {"then": after[label], "at_last": found[-1][label]},
                "nine": {key: [mean(row, nine, key) for row in (before, after)] for key in ("right", "unknown")},
                "known_before": [mean(row, known, "right") for row in (before, after)],
                "estimate": taught[0]["old_classes"],
                "held_out": taught[0]["held_out"],
                "warnings": taught[0]["warnings"],
            }
        )
    return rows


def main() -> None:
    """Print the table, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    load_before = os.getloadavg()[0]
    learns, commands, processes = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        photos = [write_images(Path(scratch) / "photos" / label, new_images(label, IMAGES)) for label in NEW]
        for repeat in range(args.repeats):
            root = Path(scratch) / f"root-{repeat}"
            install(root, args.bundle)
            wait_for_quiet()
            used, lines = measured([sys.executable, "-c", TEACH, root, *photos])
            learns.append([json.loads(line) for line in lines])
            processes.append(used)
            install(other := Path(scratch) / f"other-{repeat}", args.bundle)
            learn = [COMMAND, "device", "learn", "--root", other, "--json", "--label"]
            commands.append([])
            for folder in photos:
                wait_for_quiet()
                commands[-1].append(measured([*learn, folder.name, folder])[0])
        # time for all imports of a command, and for PyTorch alone
        imports = {
            name: statistics.median(measured([sys.executable, "-c", code])[0]["seconds"] for _ in range(args.repeats))
            for name, code in {
                "everything": "import ssd_edge.cli, device_runtime.device, onnxruntime",
                "torch": "import torch",
            }.items()
        }
        load_after = os.getloadavg()[0]
        found = accuracies(Path(scratch) / "root-0", len(NEW) + 1)
    rows = rows_of(learns, commands, found)
    print(
        f"{'class':>9} {'s':>6} {'s (cli)':>8} {'MiB (cli)':>9} {'own':>6} {'unknown':>8} {'nine':>16} {'estimate':>9}"
    )
    for row in rows:
        own, (old, new) = row["own"]["then"], row["nine"]["right"]
        print(
            f"{row['label']:>9} {max(row['seconds']):6.2f} {max(row['command_seconds']):8.2f} "
            f"{max(row['command_peak_mb']):9} {own['right']:6.3f} {own['unknown']:8.3f} {old:7.4f} -> {new:.4f} "
            f"{row['estimate']['drop']:9.4f}"
        )
    first, last = (mean(row, list(found[0]), "right") for row in (found[0], found[-1]))
    memory = max(used["peak_mb"] for used in processes)
    print(
        f"peak memory of the process that learned all five: {memory} MiB; the nine, in total: {first:.4f} -> {last:.4f}"
    )
    print(f"imports: {imports}; cores used by other processes: {[used['company'] for used in processes]}")
    if args.json:
        written = {
            "command": "python benchmarks/field.py robot.ssdedge (ssd-edge deploy --target cpu RUN -o robot.ssdedge)",
            **environment(),
            "load_average": {"before": round(load_before, 2), "after": round(load_after, 2)},
            "repeats": args.repeats,
            "processes": processes,
            "import_seconds": {name: round(seconds, 3) for name, seconds in imports.items()},
            "nine_in_all": [first, last],
            "rows": rows,
        }
        args.json.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(usable_cores())
    main()
