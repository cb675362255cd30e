"""The wheel: it contains exactly the three packages with their data and works outside the source tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ssd_edge.system import VERSION

ROOT = Path(__file__).resolve().parent.parent
# In one process, which imports PyTorch once.
SEVERAL = """
import json, sys
import device_runtime, exporters, ssd_edge.cli
for command in json.loads(sys.argv[1]):
    ssd_edge.cli.cli(command, standalone_mode=False)
print(ssd_edge.__file__, exporters.__file__, device_runtime.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: building leaves files next to the sources
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout: cannot tell the project's files from others")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_contains_only_the_three_packages(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"ssd_edge", "exporters", "device_runtime"}
    shipped = "ssd_edge/backbones/shipped/"
    assert {shipped + name for name in ("backbone.safetensors", "priors.safetensors", "card.json")} <= set(names)
    for package in ("ssd_edge", "exporters", "device_runtime"):
        assert f"{package}/py.typed" in names
        for suffix in (".py", ".yaml", ".html", ".css", ".js"):
            present = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob(f"*{suffix}")}
            assert {name for name in names if name.startswith(f"{package}/") and name.endswith(suffix)} == present
    assert wheel.name == f"ssd_edge-{VERSION}-py3-none-any.whl"
    assert sum(info.file_size for info in zipfile.ZipFile(wheel).infolist()) < 12_000_000


@pytest.mark.parametrize("deploy", [False, pytest.param(True, marks=pytest.mark.slow)])  # its export takes longest
def test_train_deploy_and_predict_outside_the_source_tree(
    wheel: Path, shapes: Path, bundle: Path, tmp_path: Path, deploy: bool
) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)

    env = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    small = ("backbone=tiny", "learner.name=ncm", "data.classes=circle,stripes")
    picture = sorted((shapes / "test" / "stripes").iterdir())[0]
    commands = [
        ("train", f"data.path={shapes}", *small, "run.panel=false", "run.baselines=false"),
        *([("deploy", "--target", "cpu", "runs/1", "-o", "robot.ssdedge")] if deploy else []),
        ("device", "install", "robot.ssdedge" if deploy else str(bundle), "--root", "root"),
        ("device", "predict", str(picture), "--root", "root", "--json"),
    ]
    arguments = [sys.executable, "-c", SEVERAL, json.dumps(commands)]
    done = subprocess.run(arguments, cwd=work, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, printed, files = done.stdout.splitlines()
    assert all(path.startswith(str(site)) for path in files.split())
    answer = json.loads(printed)
    known = {"circle", "stripes"} if deploy else {"circle", "cross", "square", "stripes", "unknown"}
    assert answer["predictions"][0]["label"] in known
