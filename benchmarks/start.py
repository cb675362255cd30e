"""Measure what one verb of a device takes from the start of its process to its end, with PyTorch out of reach.

Usage: python benchmarks/start.py BUNDLE IMAGE... [--runs N] [--json FILE]

The first IMAGE is predicted; `learn` teaches all of them, with PyTorch, for comparison. Each verb runs once to fill the
caches of the system, and then N times. This process stays small, because a child starts with the peak memory of its
parent.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BLOCKED = "import sys; sys.modules['torch'] = None; from ssd_edge.cli import main; main()"
FREE = "from ssd_edge.cli import main; main()"


def measure(code: str, words: list[str]) -> tuple[float, float, int]:
    """Return wall seconds, processor seconds and peak memory in bytes of one process."""
    started = time.monotonic()
    child = subprocess.Popen([sys.executable, "-c", code, "device", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{words[0]} ended with {child.returncode}")
    return time.monotonic() - started, usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss


def main() -> None:
    """Measure all verbs and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = ["--root", str(Path(folder) / "root")]
        measure(FREE, ["install", str(args.bundle), *root])
        told = subprocess.check_output([sys.executable, "-c", FREE, "device", "status", "--json", *root])
        status = json.loads(told)
        facts = {"classes": len(status["classes"]), "learner": status["learner"], "bundle": args.bundle.name}
        verbs: list[tuple[str, str, list[str]]] = [
            ("status", BLOCKED, []),
            ("history", BLOCKED, []),
            ("rename", BLOCKED, [status["classes"][0], "another name"]),
            ("rollback", BLOCKED, ["1"]),
            ("predict", BLOCKED, [str(args.images[0])]),
            ("learn", FREE, ["--force", "--max-forgetting", "1", "--label", "taught", *map(str, args.images)]),
        ]
        for verb, code, words in verbs:
            runs = []
            for number in range(args.runs + 1):
                if verb in ("rename", "learn") and number:
                    measure(BLOCKED, ["rollback", "1", *root])
                runs.append(measure(code, [verb, *words, *root]))
            wall, processor, peak = (statistics.median(values) for values in zip(*runs[1:], strict=True))
            rows.append({"verb": verb, "torch": code == FREE, "seconds": wall, "cpu": processor, "peak_bytes": peak})
            print(f"{verb:10} {wall:.2f} s, processor {processor:.2f} s, {peak / 2**20:.0f} MiB")
    if args.json:
        from ssd_edge.run.storage import environment  # imports PyTorch

        command = f"python benchmarks/start.py {args.bundle.name} IMAGES --runs {args.runs}"
        found = {"command": command, **environment(), "images": len(args.images), **facts, "rows": rows}
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
