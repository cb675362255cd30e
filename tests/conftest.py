"""Fixtures shared by the tests of all packages; the session shares one run and one exported bundle."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import numpy as np
import pytest
from helpers.forked import READ_AT_START, Launcher, run_real
from helpers.shared import shared_folder
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from ssd_edge.backbones.package import BackbonePackage

# OpenMP threads spin while waiting, so two workers with all threads each slow each other down.
if _worker := os.environ.get("PYTEST_XDIST_WORKER"):
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_worker.removeprefix("gw")) % len(_cores)]})

# The same examples every time, however slow the machine is.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")

# The files that take longest, first: in the end, workers then wait for each other only as long as a short file takes.
LONGEST = (
    "test_api.py",
    "test_contract.py",
    "test_export.py",
    "test_kernels.py",
    "test_cli_train.py",
    "test_cli_device.py",
    "test_deploy.py",
    "test_every_learner.py",
    "test_console.py",
    "test_push.py",
    "test_wheel.py",
    "test_device.py",
    "test_cli_reproduce.py",
    "test_edit.py",
    "test_oracle.py",
    "test_remove_and_blank.py",
    "test_tensorrt_gate.py",
    "test_errno.py",
    "test_train_streams.py",
    "test_auto.py",
    "test_html.py",
    "test_killed_cli.py",
    "test_watch_process.py",
    "test_imports.py",
)

SHAPES = ("circle", "cross", "square", "stripes", "triangle")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort files; `make test` hands them out in this order."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session", autouse=True)
def _isolated(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep tests away from the user's caches, data and device state."""
    scratch = tmp_path_factory.mktemp("isolated")
    os.environ["SSD_EDGE_CACHE"] = str(scratch / "cache")
    os.environ["SSD_EDGE_ROOT"] = str(scratch / "device")
    os.environ["NO_COLOR"] = "1"
    os.environ.pop("SSD_EDGE_DATA", None)


def draw(shape: str, rng: np.random.Generator, size: int = 40) -> Image.Image:
    """Return a noisy picture of a shape of random colour, position and size."""
    low, high = rng.integers(0, 90, 3), rng.integers(150, 256, 3)
    image = Image.new("RGB", (size, size), tuple(int(v) for v in low))
    pen, ink = ImageDraw.Draw(image), tuple(int(v) for v in high)
    x, y = (int(v) for v in rng.integers(4, 10, 2))
    side = int(rng.integers(20, 27))
    box = (x, y, x + side, y + side)
    if shape == "circle":
        pen.ellipse(box, fill=ink)
    elif shape == "square":
        pen.rectangle(box, fill=ink)
    elif shape == "triangle":
        pen.polygon([(x, y + side), (x + side // 2, y), (x + side, y + side)], fill=ink)
    elif shape == "cross":
        pen.line((x, y, x + side, y + side), fill=ink, width=5)
        pen.line((x, y + side, x + side, y), fill=ink, width=5)
    else:
        for offset in range(0, side, 8):
            pen.line((x, y + offset, x + side, y + offset), fill=ink, width=4)
    noise = rng.normal(0, 6, (size, size, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def write_shapes(folder: Path, shapes: tuple[str, ...], count: int, seed: int) -> Path:
    """Write `count` PNG files per shape to ``folder/<shape>/``."""
    rng = np.random.default_rng(seed)
    for shape in shapes:
        (folder / shape).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            draw(shape, rng).save(folder / shape / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image folder of five shapes with 40 training and 15 test pictures each, in train/ and test/."""

    def draw_all(folder: Path) -> None:
        write_shapes(folder / "train", SHAPES, 40, seed=1)
        write_shapes(folder / "test", SHAPES, 15, seed=2)

    return shared_folder(tmp_path_factory, "shapes", draw_all)


Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """Launcher of this worker; its process starts with the first command."""
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def cli(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """Function that runs the command line in a separate process: ``cli("train", …, code=0)``.

    The process is forked from one that has imported PyTorch, unless ``real=True`` or the environment is read at start.
    """
    home = tmp_path_factory.mktemp("cwd")

    def run(
        *args: str | Path, code: int = 0, cwd: Path | None = None, timeout: float = 300, real: bool = False, **env: str
    ) -> subprocess.CompletedProcess[str]:
        start = run_real if real or any(name.startswith(READ_AT_START) for name in env) else launcher.run
        done = start([str(arg) for arg in args], cwd or home, {**os.environ, **env}, timeout)
        report = f"exit code {done.returncode}\n--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"
        assert done.returncode == code, report
        if code not in (0, 1):
            assert "Traceback" not in done.stderr, report
        return done

    return run


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Function that runs a failing command and returns its error output: ``refused("train", …, code=2)``.

    It calls `main` in this process: importing PyTorch again for every error case would take a minute.
    """
    from ssd_edge.cli import main

    monkeypatch.chdir(tmp_path)  # here: a test may replace `os.getcwd`, and this folder is restored by that name

    def run(*args: str | Path, code: int) -> str:
        before = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(logging, "lastResort", logging.lastResort)  # restored afterwards: `main` replaces both
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        monkeypatch.setattr(sys, "argv", ["ssd-edge", *map(str, args)])
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            signal.signal(signal.SIGTERM, before)
        report = capfd.readouterr()
        assert ended.value.code == code, report
        assert "Traceback" not in report.err
        return report.err

    return run


def run_here(*args: str | Path) -> None:
    """Run a command within this process, whose imports other tests use as well."""
    import torch

    from ssd_edge.cli import cli

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ssd-edge", *map(str, args)])
        cli(sys.argv[1:], standalone_mode=False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Limit PyTorch to one thread: for small tensors on busy cores, a second thread only adds waiting."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished run of the default learner on four of the five shapes, with all baselines and the panel."""
    from ssd_edge.run import train as training

    def train(out: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:  # joint training takes longer than all others together
            patch.setattr(training, "JOINT", dataclasses.replace(training.JOINT, **training.ONE_PASS))
            data = ("backbone=tiny", f"data.path={shapes}", "data.exclude=triangle")
            # the cost of a learn grows with their cube; docs/python.md and the README are run with the default
            run_here("train", *data, f"run.out={out}", "run.threads=1")

    return shared_folder(tmp_path_factory, "trained", train) / "1"


@pytest.fixture(scope="session")
def bundle(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle deployed from `trained`."""

    def deploy(folder: Path) -> None:
        with sharing_exports(tmp_path_factory):
            run_here("deploy", "--target", "jetson", trained, "-o", folder / "robot.ssdedge")

    return shared_folder(tmp_path_factory, "deployed", deploy) / "robot.ssdedge"


@contextlib.contextmanager
def sharing_exports(factory: pytest.TempPathFactory) -> Iterator[Callable[[BackbonePackage], bytes]]:
    """Let the deployments within this process share one export per backbone; yield the function that they call."""
    from exporters import deploy
    from exporters.export import export_package

    def export(package: BackbonePackage) -> bytes:
        name = f"export-{package.identity.replace(':', '-')}"
        folder = shared_folder(factory, name, lambda at: (at / "graph.onnx").write_bytes(export_package(package)))
        return (folder / "graph.onnx").read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deploy, "export_package", export)
        yield export


@pytest.fixture
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let the deployments within this process share one export per backbone."""
    with sharing_exports(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def export_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[BackbonePackage], bytes]]:
    """Function that exports a backbone package unless a test of this session has; so do this module's deployments."""
    with sharing_exports(tmp_path_factory) as export:
        yield export


@pytest.fixture(scope="session")
def installed(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Device root with the bundle of the session installed; copy it before changing it."""
    from device_runtime.install.bundle import install

    return shared_folder(tmp_path_factory, "installed", lambda folder: install(folder / "root", bundle)) / "root"
