"""The first run of a bundle's backbone: hostile ones are stopped, and the writer's lock is not held meanwhile."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import hostile_graphs as hostile

from device_runtime.backbone import trial
from device_runtime.install.bundle import install
from device_runtime.store.generations import Generations
from ssd_edge import bundle
from ssd_edge.errors import BundleRefusedError
from ssd_edge.ort import apart


@pytest.fixture
def made(tiny_bundle, tmp_path: Path):
    """Function that writes a bundle with a backbone."""

    def make(backbone: bytes) -> Path:
        path = tmp_path / "hostile.ssdedge"
        path.write_bytes(tiny_bundle(backbone=backbone))
        return path

    return make


def test_control_flow_is_refused(made, tmp_path: Path) -> None:
    path = made(hostile.endless())
    with pytest.raises(BundleRefusedError, match=r"control flow \(Loop\), which may never end; .*--allow-control-flow"):
        install(tmp_path / "root", path)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("backbone", "sentence"),
    [
        (hostile.endless(), "did not finish within 3.00 s and was stopped when it was tried on the 4 probe images"),
        (hostile.slow(), "did not finish within"),
        (hostile.huge(), "needs more than 2,048 MiB of memory and was stopped"),
        (hostile.huge(gigabytes=30), "needs more than 2,048 MiB of memory and was stopped"),
    ],
    ids=["endless", "slow", "4 TB", "30 GB"],
)
def test_a_harmful_backbone_is_stopped(
    made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: bytes, sentence: str
) -> None:
    monkeypatch.setattr(apart, "SECONDS", 3.0)
    with pytest.raises(BundleRefusedError) as refused:
        install(tmp_path / "root", made(backbone), allow_control_flow=True)
    assert f"the bundle's backbone.onnx {sentence}" in str(refused.value)
    assert not (tmp_path / "root").exists()


def test_the_device_can_be_changed_while_a_bundle_is_tried(
    made, tiny_bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "good.ssdedge").write_bytes(tiny_bundle())
    install(tmp_path / "root", tmp_path / "good.ssdedge")
    path, started, errors = made(hostile.endless()), threading.Event(), []
    monkeypatch.setattr(apart, "SECONDS", 3.0)
    call = apart.call
    monkeypatch.setattr(apart, "call", lambda *args: (started.set(), call(*args))[1])

    def run() -> None:
        try:
            install(tmp_path / "root", path, allow_control_flow=True)
        except BundleRefusedError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(10)
    with Generations(tmp_path / "root").writer():
        assert not errors
    thread.join()
    assert errors


def test_a_backbone_is_tried_once_per_process(made, tiny_bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    call = apart.call
    monkeypatch.setattr(trial, "_passed", {})
    monkeypatch.setattr(apart, "call", lambda *args: (calls.append(1), call(*args))[1])
    for made_with in ({}, {"release": 2}, {"shift": 0.5}):
        trial.run(bundle.parse(tiny_bundle(**made_with)))
    assert len(calls) == 2  # the last one has other values in its probe


def test_verify_can_be_interrupted(made) -> None:
    command = [sys.executable, "-m", "ssd_edge", "verify", "--allow-control-flow", str(made(hostile.endless()))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while not children.read_text().strip() and time.monotonic() < deadline:
        time.sleep(0.05)
    child = children.read_text().strip()
    time.sleep(1)  # so that it runs the graph
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output.strip()) == (130, "interrupted")
    assert time.monotonic() - began < 5
    assert child
    assert not Path("/proc", child).exists()
