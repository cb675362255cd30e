"""Rewrite results that were stored under the learners' names before version 0.1: run once, from the repository's root.

Usage: python docs/rename_learners.py FOLDER...      (docs/results, or the --out of `ssd-edge reproduce`)

`ssd-paper` became `ssd`, the former default `ssd` became `landmark`, and `rp_ridge` became `ranpac`. Numbers stay as
they are. A stored cell is named by a hash of its learner, so its file is renamed too. A second run would take today's
`ssd` for the former one: files that name `landmark` are refused.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from ssd_edge import files
from ssd_edge.reproduction import cells

NAMES = {"ssd": "landmark", "ssd-paper": "ssd", "rp_ridge": "ranpac"}


def renamed(value: Any) -> Any:
    """Any JSON value with today's names, also as keys and in ``name=…`` of a row's settings."""
    if isinstance(value, dict):
        new = {NAMES.get(key, key): renamed(item) for key, item in value.items()}
        if value.get("learner") == "ssd" and value.get("display") == "SSD":
            new["display"] = "landmark"
        return new
    if isinstance(value, list):
        return [renamed(item) for item in value]
    if isinstance(value, str):
        value = NAMES.get(value, value).replace("SSD (paper)", "SSD")
        return re.sub(r"^name=(ssd-paper|ssd)(?=,|$)", lambda match: f"name={NAMES[match[1]]}", value)
    return value


def main() -> None:
    """Rewrite every JSON file below the folders named on the command line."""
    for path in sorted(path for folder in sys.argv[1:] for path in Path(folder).rglob("*.json")):
        text = path.read_text(encoding="utf-8")
        if '"landmark"' in text:
            sys.exit(f"{path} has today's names already; nothing more was rewritten")
        found = json.loads(text)
        if isinstance(found, dict) and "spec" in found:
            found = renamed(found)
            new = path.parents[1] / cells.file_name(found["spec"])
            cells.write(new, found)
            if new != path:
                path.unlink()
        elif any(f'"{name}"' in text or f"name={name}" in text for name in NAMES) or "SSD (paper)" in text:
            indent = len(re.search(r"\n( *)", text)[1])
            escaped = text.isascii()
            files.write_text(path, json.dumps(renamed(found), indent=indent, ensure_ascii=escaped) + "\n")


if __name__ == "__main__":
    main()
