"""Who may import whom (docs/architecture.md), read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


WORKSTATION = (*("run", "reproduction", "data", "backbones", "report", "cli"),)
RULES = [
    ("device_runtime", ["exporters", *(f"ssd_edge.{name}" for name in WORKSTATION)]),
    ("ssd_edge/learners", ["exporters", "device_runtime", *(f"ssd_edge.{name}" for name in (*WORKSTATION, "bundle"))]),
    ("ssd_edge/data", ["exporters", "device_runtime", "ssd_edge.run", "ssd_edge.learners", "torch"]),
    (
        "ssd_edge/backbones",
        ["exporters", "device_runtime", "ssd_edge.run", "ssd_edge.learners.registry", "ssd_edge.cli"],
    ),
    ("ssd_edge/reproduction", ["exporters", "device_runtime", "ssd_edge.cli"]),
    ("exporters", ["ssd_edge.cli", "ssd_edge.reproduction"]),
]


@pytest.mark.parametrize(("package", "forbidden"), RULES, ids=[rule[0] for rule in RULES])
def test_imports_point_down(package: str, forbidden: list[str]) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        for module in imports(path):
            bad = [name for name in forbidden if module == name or module.startswith(name + ".")]
            assert not bad, f"{path.relative_to(ROOT)} imports {module}"


def test_no_pickle_outside_the_cifar_reader() -> None:
    for package in ("ssd_edge", "exporters", "device_runtime"):
        for path in (ROOT / package).rglob("*.py"):
            used = {module.split(".")[0] for module in imports(path)}
            if path.name != "cifar.py":
                assert not used & {"pickle", "dill", "joblib", "shelve", "marshal"}, path
            assert "torch.load" not in path.read_text(encoding="utf-8"), path


def test_the_device_needs_nothing_of_the_workstation() -> None:
    """Every device module imports with the workstation's packages blocked, in a fresh process."""
    code = """
import importlib, pkgutil, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"sklearn", "matplotlib", "rich", "onnx", "onnxscript", "exporters"}:
            raise ImportError(f"blocked: {name}")
sys.meta_path.insert(0, Block())
import device_runtime
for module in pkgutil.walk_packages(device_runtime.__path__, "device_runtime."):
    importlib.import_module(module.name)
import ssd_edge.cli
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "fine", done.stderr
