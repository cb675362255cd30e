"""Compare the answers of many processes bit for bit, on a busy machine, and find what changes the bits of a product.

Usage: python benchmarks/repeat.py BUNDLE FOLDER [--pairs N] [--busy N] [--json FILE]

FOLDER has one folder of images per class. The bundle is installed in a temporary root; 100 images, or 7, are predicted,
two classes are learned and both learns rolled back (once in ten pairs), and the images are predicted again, in N pairs
of processes. Each process may run on all cores or on one only, has another hash seed, fills freed memory with another
byte, and competes with `--busy` processes that never sleep. Then products of the sizes that a learner uses are repeated
here with other numbers of threads and with operands at other addresses.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ssd_edge.images import image_files
from ssd_edge.run.storage import environment
from ssd_edge.system import usable_cores

IMAGES, LEARNED, ROUND = (100, 7), 20, 10
ROWS, INPUTS, OUTPUTS = (1, 2, 5, 7, 20, 64, 100), (256, 1280), (2, 10, 50, 256, 900)
THREADS, OFFSETS = (1, 2, 4, 8), (0, 4, 8, 16, 32, 48)  # bytes


def command(*arguments: str | Path, number: int = 0) -> dict[str, Any]:
    """Run a verb of ``ssd-edge device`` in a process of its own; return what it prints as JSON."""
    cores = os.sched_getaffinity(0)
    chosen = cores if number % 2 else {sorted(cores)[number // 2 % len(cores)]}
    given = {**os.environ, "PYTHONHASHSEED": str(number), "MALLOC_PERTURB_": str(number % 256)}
    done = subprocess.run(
        [sys.executable, "-m", "ssd_edge", "device", *map(str, arguments), "--json"],
        capture_output=True,
        check=True,
        env={name: value for name, value in given.items() if not name.startswith("OMP_")},
        preexec_fn=functools.partial(os.sched_setaffinity, 0, chosen),
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def pairs(root: Path, folder: Path, count: int) -> Iterator[float | None]:
    """Yield for each pair the largest difference of a score or margin; None if both answers are equal as JSON."""
    paths = image_files([folder])
    sets = [[paths[index * len(paths) // size] for index in range(size)] for size in IMAGES]
    before: list[Any] = []
    for number in range(1, count + 1):
        if number % ROUND == 1:
            before = [command("predict", *each, "--root", root, number=number + 1)["predictions"] for each in sets]
            for name in ("first", "second"):
                label = ("--label", name, "--max-forgetting", "1")
                command("learn", *label, *paths[:LEARNED], "--root", root, number=number)
            for _ in range(2):
                command("rollback", "--root", root, number=number)
        which = number // 2 % len(sets)
        after = command("predict", *sets[which], "--root", root, number=number)["predictions"]
        both = zip(before[which], after, strict=True)
        differences = [abs(a[key] - b[key]) for a, b in both for key in ("score", "margin")]
        yield None if before[which] == after else max(differences)


def placed(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """Return a copy that starts `offset` bytes after a multiple of 64."""
    size = tensor.numel() * tensor.element_size()
    copy = torch.zeros(size + 64, dtype=torch.uint8)[offset : offset + size].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def sensitivity() -> dict[str, Any]:
    """Return the share of products ``x @ w.T`` with other bits, by number of threads and by address."""
    torch.manual_seed(0)
    operands: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
    changed: dict[str, int] = {}
    shapes = list(itertools.product(ROWS, INPUTS, OUTPUTS))
    for rows, inputs, outputs in shapes:
        x, w = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        operands[rows, inputs, outputs] = x, w
    cases = {f"{count} threads": (count, 0) for count in THREADS}
    cases |= {f"{offset} bytes after a multiple of 64": (1, offset) for offset in OFFSETS}
    largest = 0.0
    for name, (count, offset) in cases.items():
        torch.set_num_threads(count)
        for shape in shapes:
            x, w = operands[shape]
            product = placed(x, offset) @ w.T
            torch.set_num_threads(1)
            expected = x @ w.T
            torch.set_num_threads(count)
            changed[name] = changed.get(name, 0) + (not torch.equal(product, expected))
            largest = max(largest, float((product - expected).abs().max() / expected.abs().max()))
    shares = {name: round(number / len(shapes), 3) for name, number in changed.items()}
    return {"products": len(shapes), "with other bits": shares, "largest relative difference": largest}


def main() -> None:
    """Print the results, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--busy", type=int, default=2 * usable_cores())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch) / "root"
            command("install", args.bundle, "--root", root)
            found = []
            for difference in pairs(root, args.folder, args.pairs):
                found.append(difference)
                print(f"pair {len(found)}: {'equal' if difference is None else difference}", flush=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    different = [difference for difference in found if difference is not None]
    result = {
        "command": f"python benchmarks/repeat.py BUNDLE FOLDER --pairs {args.pairs} --busy {args.busy}",
        **environment(),
        "pairs": args.pairs,
        "different": len(different),
        "largest_difference": max(different, default=0.0),
        "products": sensitivity(),
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
