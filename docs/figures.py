"""Regenerate the figures of README.md and docs/method.md from docs/results/: a terminal picture and tables.

Usage: python docs/figures.py [--check]

Each result file says which command wrote it. With --check nothing is written; exit code 1 where one is stale.
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
ROWS = ("device", "values", "shift", "budget", "epoch")


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


def settings_table(rows: list[dict]) -> str:
    """What settings of the gradient-trained learners are worth, two learners side by side where both were run."""
    lines = [
        "| setting | accuracy | backward transfer | just learned |",
        "|---|---|---|---|",
    ]
    for row in rows:
        name, _, settings = row["settings"].removeprefix("name=").partition(",")
        settings = ", ".join(part for part in settings.split(",") if not part.startswith("keys_shift"))
        lines.append(
            f"| `{name}` {settings} | {row['average_accuracy']:.3f} | {row['backward_transfer']:+.3f} | "
            f"{row['learning_accuracy']:.3f} |"
        )
    return "\n".join(lines)


def values_table(rows: list[dict]) -> str:
    """Closed-form values: accuracy over all classes / share of the new class recognised."""
    lines = ["| images of the new class | ridge | discriminant | unbiased (`ssd`) |", "|---|---|---|---|"]
    for row in rows:
        found = (row[name] for name in ("ridge", "discriminant", "unbiased"))
        cells = [f"{one['accuracy']:.3f} / {one['recall']:.3f}" for one in found]
        lines.append(f"| {row['shots']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def epoch_table(rows: list[dict]) -> str:
    """One epoch, dense autograd against touched rows."""
    lines = ["| neurons | threads | dense autograd | touched rows | ratio |", "|---|---|---|---|---|"]
    for row in rows:
        dense, touched = row["dense_seconds"], row["touched_seconds"]
        seconds = f"{dense:.2f} s | {touched:.2f} s"
        lines.append(f"| {row['neurons']:,} | {row['threads']} | {seconds} | {row['ratio']:.1f}× |")
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
    read = {name: json.loads((DOCS / "results" / f"{name}.json").read_text())["rows"] for name in ROWS}
    tables = {
        README: {"table": comparison_table(results), "device": device_table(read["device"])},
        DOCS / "method.md": {
            "values": values_table(read["values"]),
            "shift": settings_table(read["shift"]),
            "budget": settings_table(read["budget"]),
            "epoch": epoch_table(read["epoch"]),
        },
    }
    stale = []
    for path, filling in tables.items():
        old = new = path.read_text(encoding="utf-8")
        for name, content in filling.items():
            new = filled(new, name, content)
        if new != old:
            stale.append(path.name)
        if not check:
            path.write_text(new, encoding="utf-8")
    if check:
        sys.exit(f"{', '.join(stale)}: stale; run python docs/figures.py" if stale else 0)
    export_svg(results["CIFAR-10, 9 classes"], DOCS / "train.svg")


if __name__ == "__main__":
    main()
