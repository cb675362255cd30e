"""Regenerate the figures of README.md from docs/results/: the terminal picture and the two tables.

Usage: python docs/figures.py [--check]

Each result file says which command wrote it. With --check nothing is written; exit code 1 where README is stale.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from ssd_edge.comparison import ranked, size
from ssd_edge.console import export_svg

DOCS = Path(__file__).resolve().parent
README = DOCS.parent / "README.md"


def comparison_table(results: dict[str, dict]) -> str:
    """Average accuracy after the last task of every method on each stream, and its state."""
    lines = [
        "| average accuracy after the last task | " + " | ".join(results) + " | state |",
        "|---|" + "---|" * (len(results) + 1),
    ]
    names = [method.display for method in ranked(next(iter(results.values())))]
    by_name = {data: {m.display: m for m in ranked(metrics)} for data, metrics in results.items()}
    for name in names:
        found = [by_name[data][name].values for data in results]
        cells = [f"{100 * values['average_accuracy']:.1f} %" for values in found]
        shown = f"**{name}**" if name == "SSD" else name
        lines.append(f"| {shown} | {' | '.join(cells)} | {size(found[0]['state_bytes'])} |")
    return "\n".join(lines)


def device_table(rows: list[dict]) -> str:
    """What a learn on the device gave."""
    lines = [
        "| images of the new class | new class | old classes | the device's own estimate for them | seconds |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        estimate, old = row["estimate"], row["old_accuracy"]
        lines.append(
            f"| {row['images']} | {100 * row['new_accuracy']:.1f} % | {100 * old['before']:.1f} % → "
            f"{100 * old['after']:.1f} % | {100 * estimate['accuracy_before']:.1f} % → "
            f"{100 * estimate['accuracy_after']:.1f} % | {row['seconds']:.1f} |"
        )
    return "\n".join(lines)


def filled(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers of `name` replaced."""
    pattern = rf"(<!-- figures:{name} -->\n).*?(<!-- /figures:{name} -->)"
    return re.sub(pattern, lambda match: match[1] + content + "\n" + match[2], text, flags=re.DOTALL)


def main() -> None:
    """Write the picture and the tables, or check that they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    results = {
        "CIFAR-10, 9 classes": json.loads((DOCS / "results" / "cifar10-nine.json").read_text()),
        "digits, 10 classes": json.loads((DOCS / "results" / "digits.json").read_text()),
    }
    old = README.read_text(encoding="utf-8")
    new = filled(old, "table", comparison_table(results))
    new = filled(new, "device", device_table(json.loads((DOCS / "results" / "device.json").read_text())["rows"]))
    if check:
        sys.exit(0 if new == old else "README.md is stale: run python docs/figures.py")
    README.write_text(new, encoding="utf-8")
    export_svg(results["CIFAR-10, 9 classes"], DOCS / "train.svg")


if __name__ == "__main__":
    main()
