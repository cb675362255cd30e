"""Whether something exists is asked of `ssd_edge.files`, which raises an error where it cannot know.

`Path.glob`, `Path.exists` and their like answer "nothing there" without permission or for a dangling link, depending on
the version of Python, and what decides something must not do that.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SWALLOW = {"glob", "rglob", "iterdir", "exists", "is_file", "is_dir", "isfile", "isdir", "lexists", "walk", "fwalk"}
SWALLOW |= {"listdir", "scandir"}  # they raise OSError, which files.py makes a sentence
# module -> calls that decide nothing or raise
ALLOWED = {
    "ssd_edge/images/listing.py": {"scandir"},  # its errors are handled there
    "ssd_edge/targets/__init__.py": {"iterdir"},  # files of this package
    "ssd_edge/data/folders.py": {"is_dir", "isdir", "isfile"},  # members of an archive
    "device_runtime/service/frames.py": {"scandir", "is_file", "is_dir"},  # an image that cannot be read is tried again
}


def swallowing(path: Path) -> set[tuple[int, str]]:
    """Return line and name of the calls in a module that may swallow an error."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in SWALLOW:
            of = node.value.id if isinstance(node.value, ast.Name) else ""
            if of not in ("files", "ast"):
                found.add((node.lineno, node.attr))
    return found


@pytest.mark.parametrize("package", ["ssd_edge", "exporters", "device_runtime"])
def test_no_path_is_asked_whether_it_exists(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name != "ssd_edge/files.py":
            found = {(line, call) for line, call in swallowing(path) if call not in ALLOWED.get(name, ())}
            assert not found, f"{name}: use the functions of ssd_edge.files instead of {sorted(found)}"


def test_the_search_finds_them(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import os\nfor p in root.glob('*'):\n    p.exists() or os.path.isfile(p)\nfiles.exists(p)"
    )
    assert swallowing(tmp_path / "a.py") == {(2, "glob"), (3, "exists"), (3, "isfile")}
