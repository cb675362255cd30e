"""Nothing phones home: every verb runs in a network namespace that records packets, with a home that must stay empty.

A package that sends usage data or keeps files in the home folder is noticed by whatever verb loads it: these tests need
no list of packages. The verbs are those of the command line; a verb without a scenario is an error.
"""

from __future__ import annotations

import ast
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from helpers import trap
from PIL import Image

from ssd_edge.cli import cli as command_line
from ssd_edge.system import NO_TELEMETRY

ROOT = Path(__file__).resolve().parent.parent
SEND_AFTER = 25  # seconds; ONNX Runtime asks for its maker's address 10 s after it was loaded
# Runs several verbs in one process: importing PyTorch for each would take most of the time.
SEVERAL = (
    "import json, sys; from ssd_edge.cli import cli\nfor v in json.loads(sys.argv[1]): cli(v, standalone_mode=False)"
)
IMPORTERS = ("import_module", "require", "importorskip", "__import__")
SSH = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
shift 2
exec sh -c "$*"
"""
SFTP = """import shlex, shutil, sys
_, local, remote = shlex.split(sys.stdin.read())
shutil.copyfile(local, remote)
"""


def verbs(command: click.Command = command_line, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield every verb of the command line."""
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from verbs(inner, (*path, name))
    else:
        yield " ".join(path)


class Ground:
    """What a scenario uses: everything but the home is outside the home.

    Attributes:
        home: Empty folder.
        work: Folder for results, also the current one.
        shapes, run, bundle: See the fixtures; the last two may not exist yet.
        root: Root of a device.
        photos: Images.
    """

    def __init__(self, folder: Path, shapes: Path) -> None:
        self.home, self.work = folder / "home", folder / "work"
        for path in (self.home, self.work / "tmp"):
            path.mkdir(parents=True)
        self.shapes, self.run, self.bundle = shapes, self.work / "runs" / "1", self.work / "new.ssdedge"
        self.root = folder / "root"
        self.photos = [str(path) for path in sorted((shapes / "train" / "triangle").iterdir())[:12]]

    def trapped(self, *command: str | Path, **env: str) -> str:
        """Run a command in the trap, check what it leaves and sends, and return its output."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "OMP_NUM_THREADS") if name in os.environ}
        own = {
            "HOME": str(self.home),
            "TMPDIR": str(self.work / "tmp"),
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "SSD_EDGE_CACHE": str(self.work / "cache"),
        }
        done = trap.run([str(part) for part in command], {**kept, **own, **env}, self.work, 560)
        assert done.code == 0, done.output
        assert not done.packets, done.output
        left = [str(path.relative_to(self.home)) for path in sorted(self.home.rglob("*"))]
        assert not left, done.output
        return done.output

    def ssd_edge(self, *args: str | Path, **env: str) -> str:
        """Run one verb in the trap."""
        return self.trapped(sys.executable, "-m", "ssd_edge", *args, **env)

    def device(self, verb: str, *args: str | Path) -> str:
        """Run a verb of the device in the trap."""
        return self.ssd_edge("device", verb, "--root", self.root, *args)


def _learned(at: Ground) -> None:
    at.device("learn", "--label", "triangle", *at.photos)


def _rollback(at: Ground) -> None:
    _learned(at)
    at.device("rollback")


def _merge(at: Ground) -> None:
    _learned(at)
    at.device("export", at.work / "other.ssdedge")
    at.root = at.work / "own"
    at.device("install", at.bundle)
    at.device("merge", at.work / "other.ssdedge")


def _fleet(at: Ground) -> None:
    _learned(at)
    at.device("export", at.work / "other.ssdedge")
    ledger = ("--ledger", at.work / "ledger", "-o", at.work / "fleet.ssdedge", "--max-forgetting", "1")
    at.ssd_edge("fleet", at.bundle, at.work / "other.ssdedge", *ledger)


def _watch(at: Ground) -> None:
    """Watch a stream for as long as ONNX Runtime waits before it sends."""
    jpeg = at.work / "photo.jpg"
    Image.open(at.photos[0]).save(jpeg)
    watch = shlex.join([sys.executable, "-m", "ssd_edge", "device", "watch", "--root", str(at.root), "-"])
    printed = at.trapped("sh", "-c", f"(cat {jpeg}; sleep {SEND_AFTER}; cat {jpeg}) | {watch}")
    assert printed.count('"label"') == 2


def _serve(at: Ground) -> None:
    """Serve for as long as ONNX Runtime waits before it sends, and end by a signal."""
    serve = shlex.join([sys.executable, "-m", "ssd_edge", "device", "serve", "--root", str(at.root), "--port", "0"])
    printed = at.trapped("sh", "-c", f"{serve} & pid=$!; sleep {SEND_AFTER}; kill -TERM $pid; wait $pid")
    assert "http://127.0.0.1:" in printed


def _push(at: Ground) -> None:
    ssh, sftp = at.work / "ssh", at.work / "sftp.py"
    ssh.write_text(SSH)
    ssh.chmod(0o755)
    sftp.write_text(SFTP)
    command = shlex.join([sys.executable, "-m", "ssd_edge"])
    variables = {"SSD_EDGE_SSH": str(ssh), "SSD_EDGE_SFTP": f"{sys.executable} {sftp}"}
    at.ssd_edge("push", at.bundle, f"me@there:{at.root}", "--push-command", command, **variables)


def _key(at: Ground) -> Path:
    at.ssd_edge("keys", "new", "lab", "--folder", at.work)
    return at.work / "lab.pub"


TINY = ("train.epochs=1", "train.batch=32", "student.neurons=64", "student.epochs=1")
SCENARIOS: dict[str, Callable[[Ground], object]] = {
    "train": lambda at: at.ssd_edge("train", "backbone=tiny", f"data.path={at.shapes}", f"run.out={at.work / 'runs'}"),
    "compare": lambda at: at.ssd_edge("compare", at.run),
    "evaluate": lambda at: at.ssd_edge("evaluate", at.run),
    "deploy": lambda at: at.ssd_edge("deploy", "--target", "cpu", at.run, "-o", at.work / "its.ssdedge", "--head"),
    "push": _push,
    "fleet": _fleet,
    "device export": lambda at: at.device("export", at.work / "out.ssdedge"),
    "device forget": lambda at: at.device("forget", "circle", "--max-forgetting", "1"),
    "device fsck": lambda at: at.device("fsck"),
    "device history": lambda at: at.device("history"),
    "device install": lambda at: at.device("install", at.bundle),
    "device learn": _learned,
    "device merge": _merge,
    "device merge-labels": lambda at: at.device(
        "merge-labels", "circle", "square", "--into", "round", "--max-forgetting", "1"
    ),
    "device predict": lambda at: at.device("predict", *at.photos),
    "device prune": lambda at: at.device("prune", "--all-but-current"),
    "device rename": lambda at: at.device("rename", "circle", "ring"),
    "device rollback": _rollback,
    "device serve": _serve,
    "device status": lambda at: at.device("status"),
    "device trust": lambda at: at.device("trust", _key(at)),
    "device watch": _watch,
    "inspect": lambda at: at.ssd_edge("inspect", at.bundle),
    "verify": lambda at: at.ssd_edge("verify", at.bundle),
    "profile": lambda at: at.ssd_edge("profile", at.bundle, "--root", at.root),
    "bench": lambda at: at.ssd_edge("bench"),
    "doctor": lambda at: at.ssd_edge("doctor", at.bundle, "--root", at.root),
    "keys new": _key,
    "keys show": lambda at: at.ssd_edge("keys", "show", _key(at)),
    "pretrain": lambda at: at.ssd_edge("pretrain", at.work / "package", f"data.path={at.shapes}", *TINY),
    "distill": lambda at: at.ssd_edge(
        "distill", at.shapes, "--teacher", "tiny", "--size", "16", "--epochs", "1", "-o", at.work / "student"
    ),
    "reproduce": lambda at: at.ssd_edge("reproduce", "t1", "--budget", "smoke", "--workers", "1", "--out", at.work),
    "data check": lambda at: at.ssd_edge("data", "check", at.shapes, "--html", at.work / "pictures.html"),
    "config": lambda at: at.ssd_edge("config"),
}


@pytest.fixture
def ground(tmp_path: Path, shapes: Path) -> Ground:
    if reason := trap.unavailable():
        pytest.skip(f"nothing can be said about packets: {reason}")
    return Ground(tmp_path, shapes)


def test_every_verb_has_a_scenario() -> None:
    assert set(SCENARIOS) == set(verbs())


def test_install_and_predict_send_and_leave_nothing(ground: Ground, bundle: Path) -> None:
    several = [
        ["device", "install", str(bundle), "--root", str(ground.root)],
        ["device", "predict", *ground.photos, "--root", str(ground.root)],
    ]
    assert ground.trapped(sys.executable, "-c", SEVERAL, json.dumps(several)).count(".png") == len(ground.photos)


@pytest.mark.slow
def test_train_deploy_install_and_predict_send_and_leave_nothing(ground: Ground) -> None:
    data = [f"data.path={ground.shapes}", "data.classes=circle,cross", "learner.name=ncm", "backbone=tiny"]
    several = [
        ["train", *data, f"run.out={ground.run.parent}", "run.baselines=false", "run.panel=false"],
        ["deploy", "--target", "cpu", str(ground.run), "-o", str(ground.bundle)],
        ["device", "install", str(ground.bundle), "--root", str(ground.root)],
        ["device", "predict", *ground.photos, "--root", str(ground.root)],
    ]
    assert ground.trapped(sys.executable, "-c", SEVERAL, json.dumps(several)).count(".png") == len(ground.photos)


@pytest.mark.slow
@pytest.mark.parametrize("verb", SCENARIOS)
def test_a_verb_sends_and_leaves_nothing(
    ground: Ground, trained: Path, bundle: Path, installed: Path, verb: str
) -> None:
    ground.run, ground.bundle = trained, bundle
    shutil.copytree(installed, ground.root)
    SCENARIOS[verb](ground)


@pytest.mark.parametrize("package", ["ssd_edge", "exporters", "device_runtime"])
def test_importing_a_package_sets_what_is_not_set(package: str) -> None:
    code = f"import os, {package}; print({{name: os.environ.get(name) for name in {list(NO_TELEMETRY)}}})"
    kept = {name: value for name, value in os.environ.items() if name not in NO_TELEMETRY}
    for own in ({}, {"DO_NOT_TRACK": "0"}):
        environment = {**kept, **own, "PYTHONPATH": str(ROOT)}
        printed = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True)
        assert ast.literal_eval(printed.stdout.decode()) == {**NO_TELEMETRY, **own}


def test_onnx_runtime_is_imported_in_one_place() -> None:
    found = []
    for folder in ("ssd_edge", "exporters", "device_runtime", "benchmarks", "examples", "docs", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            found += [f"{path.relative_to(ROOT)}:{line}" for line in _imports_of("onnxruntime", path)]
    assert [place.rpartition(":")[0] for place in found] == ["ssd_edge/ort/__init__.py"], found


def _imports_of(package: str, path: Path) -> Iterator[int]:
    """Yield the lines that import a package when they run, also by a call such as ``require("package", …)``."""
    source = path.read_text(encoding="utf-8")
    if package not in source:  # parsing every file takes seconds
        return
    tree = ast.parse(source)
    conditional = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    for_types = [node for node in conditional if ast.unparse(node.test) == "TYPE_CHECKING"]
    left_out = {id(inner) for node in for_types for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        names: list[str | None] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in IMPORTERS and node.args:
            names = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
        yield from (node.lineno for name in names if name and str(name).split(".")[0] == package)
