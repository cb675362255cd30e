"""The import rules of docs/architecture.md, checked against the source.

Both tables are allow-lists: a module that is not listed may not be imported.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ssd_edge", "exporters", "device_runtime")

# Everything of the workstation package that runs on a device. A new module is closed to the device until it is listed.
DEVICE_MAY_IMPORT = {
    "ssd_edge.answers.graph",
    "ssd_edge.answers.head",
    "ssd_edge.bundle",
    "ssd_edge.bundle.card",
    "ssd_edge.bundle.signing",
    "ssd_edge.classes",
    "ssd_edge.errors",
    "ssd_edge.files",
    "ssd_edge.images",
    "ssd_edge.images.second",
    "ssd_edge.images.whole",
    "ssd_edge.learners",
    "ssd_edge.learners.base",
    "ssd_edge.learners.calibration",
    "ssd_edge.learners.closed_form.linear",
    "ssd_edge.learners.closed_form.sums",
    "ssd_edge.learners.retention",
    "ssd_edge.learners.unknown",
    "ssd_edge.learners.whitening",
    "ssd_edge.ort",
    "ssd_edge.ort.apart",
    "ssd_edge.system",
    "ssd_edge.targets",
}
GROUND = {
    "ssd_edge.classes",
    "ssd_edge.config",
    "ssd_edge.errors",
    "ssd_edge.files",
    "ssd_edge.images",
    "ssd_edge.ort",
    "ssd_edge.system",
}
# Room -> the rooms it may import besides the ground. `ssd_edge.api` and `ssd_edge.cli` are at the top: nobody is listed
# with them but the entry points.
ROOMS_MAY_IMPORT = {
    "ssd_edge": {"ssd_edge.api"},
    "ssd_edge.__main__": {"ssd_edge.cli"},
    "ssd_edge.api": {
        "exporters",
        "ssd_edge.backbones",
        "ssd_edge.data",
        "ssd_edge.learners",
        "ssd_edge.report",
        "ssd_edge.run",
    },
    "ssd_edge.cli": {
        "device_runtime",
        "exporters",
        "ssd_edge.backbones",
        "ssd_edge.bundle",
        "ssd_edge.data",
        "ssd_edge.learners",
        "ssd_edge.report",
        "ssd_edge.reproduction",
        "ssd_edge.run",
        "ssd_edge.targets",
    },
    "exporters": {
        "ssd_edge.answers",
        "device_runtime",  # the engine builder, the self-test and the estimate of memory
        "ssd_edge.backbones",
        "ssd_edge.bundle",
        "ssd_edge.data",
        "ssd_edge.learners",
        "ssd_edge.run",
        "ssd_edge.targets",
    },
    "ssd_edge.reproduction": {
        "ssd_edge.backbones",
        "ssd_edge.data",
        "ssd_edge.learners",
        "ssd_edge.report",
        "ssd_edge.run",
    },
    "ssd_edge.run": {"ssd_edge.backbones", "ssd_edge.bundle", "ssd_edge.data", "ssd_edge.learners", "ssd_edge.report"},
    "ssd_edge.report": {"ssd_edge.learners"},
    "ssd_edge.adaptation": {"ssd_edge.backbones"},
    "ssd_edge.backbones": {"ssd_edge.data", "ssd_edge.learners"},
    "ssd_edge.bundle": {"ssd_edge.learners", "ssd_edge.targets"},
    "ssd_edge.data": set(),
    "ssd_edge.learners": {"ssd_edge.answers"},
    "ssd_edge.answers": set(),
    "ssd_edge.targets": set(),
    "ssd_edge.classes": set(),
    "ssd_edge.config": set(),
    "ssd_edge.errors": set(),
    "ssd_edge.files": set(),
    "ssd_edge.images": set(),
    "ssd_edge.ort": set(),
    "ssd_edge.system": set(),
}


def modules() -> dict[str, Path]:
    """Return every module of the three packages by dotted name."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported_names(path: Path) -> Iterator[str]:
    """Yield every imported name of a file, also those imported inside functions and for type checking."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(module: str) -> set[str]:
    """Return the modules of the three packages that a module imports."""
    found = set()
    for name in imported_names(MODULES[module]):
        owner = name if name in MODULES else name.rpartition(".")[0]
        if owner in MODULES and owner != module:
            found.add(owner)
    return found


def room(module: str) -> str:
    """Return the room of a module: its package, for `ssd_edge` with the next level."""
    return ".".join(module.split(".")[: 2 if module.startswith("ssd_edge") else 1])


@pytest.mark.parametrize("name", sorted({room(module) for module in MODULES} - {"device_runtime"}))
def test_rooms_import_only_what_is_below_them(name: str) -> None:
    assert name in ROOMS_MAY_IMPORT, f"list {name} with the rooms that it may import"
    allowed = ROOMS_MAY_IMPORT[name] | GROUND
    for module in MODULES:
        if room(module) == name:
            found = {room(other) for other in own_imports(module)} - {name}
            assert found <= allowed, f"{module} imports {sorted(found - allowed)}"


def test_the_device_imports_only_what_is_listed() -> None:
    used = set()
    for module in MODULES:
        if room(module) == "device_runtime":
            found = {other for other in own_imports(module) if room(other) != "device_runtime"}
            assert found <= DEVICE_MAY_IMPORT, f"{module} imports {sorted(found - DEVICE_MAY_IMPORT)}"
            used |= found
    assert used == DEVICE_MAY_IMPORT, f"listed, but not imported any more: {sorted(DEVICE_MAY_IMPORT - used)}"


def test_no_import_circles() -> None:
    """Lazy imports and imports for type checking count."""
    graph = {module: own_imports(module) for module in MODULES}
    while leaves := {module for module, needs in graph.items() if not needs & set(graph)}:
        graph = {module: needs for module, needs in graph.items() if module not in leaves}
    # What is left is in a circle or above one; trim from the other side to name the circle alone.
    while roots := set(graph) - {need for needs in graph.values() for need in needs}:
        graph = {module: needs for module, needs in graph.items() if module not in roots}
    assert not graph, f"import circle through {sorted(graph)}"


def test_nothing_is_unpickled() -> None:
    for path in MODULES.values():
        used = {name.split(".")[0] for name in imported_names(path)}
        assert not used & {"pickle", "dill", "joblib", "shelve", "marshal"}, path
        for call in path.read_text(encoding="utf-8").split("torch.load(")[1:]:
            assert path.name == "weights.py", path
            assert "weights_only=True" in call.partition("\n")[0], path


def test_roots_stay_small() -> None:
    """Modules go to the room of their purpose, not to the root of a package."""
    for package in ("ssd_edge", "device_runtime"):
        files = [path.name for path in (ROOT / package).iterdir() if path.is_file()]
        assert len(files) <= 10, f"{package} has {len(files)} files in its root: {sorted(files)}"


def test_the_device_runs_without_the_workstation() -> None:
    """Import every device module in a fresh process in which the workstation's packages are blocked."""
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
