"""Tests of `--engine ray`: what is refused before a cluster starts, and real clusters (slow)."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ssd_edge import files

PROCESS = Path("/proc")


def test_a_missing_ray_is_one_sentence(
    refused: Callable[..., str], shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    error = refused("train", shapes, "backbone=tiny", "--engine", "ray", code=3)
    assert "pip install 'ssd-edge[ray]'" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--workers", "2"), "--workers 2 belongs to --engine ray"),
        (("--ray-address", "auto"), "--ray-address auto belongs to --engine ray"),
        (("--engine", "ray", "learner.name=ssd"), "--engine ray adds up sums, but learner.name=ssd needs all"),
        (("--engine", "ray", "learner.name=auto"), "--engine ray adds up sums, but learner.name=auto needs all"),
    ],
)
def test_what_a_cluster_cannot_do_is_refused_at_once(
    words: tuple[str, ...], sentence: str, refused: Callable[..., str], shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # it is not even imported
    assert sentence in refused("train", shapes, "backbone=tiny", *words, code=2)


def assert_same_run(local: Path, other: Path) -> None:
    """Check that two runs name every test image alike, and that their states agree within rounding."""
    first, second = (json.loads((run / "metrics.json").read_text()) for run in (local, other))
    assert first["accuracy_matrix"] == second["accuracy_matrix"]
    answered = [load_file(run / "answers.safetensors") for run in (local, other)]
    assert answered[0].keys() == answered[1].keys()
    for name, array in answered[0].items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(array, answered[1][name], rtol=1e-4, atol=1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(array, answered[1][name], err_msg=name)
    ours, theirs = (load_file(run / "learner.safetensors") for run in (local, other))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        scale = max(float(abs(array).max(initial=0)), 1e-12)
        assert float(abs(array - theirs[name]).max(initial=0)) <= 1e-4 * scale, name


def descends(process: int) -> bool:
    """Return True for a descendant of this process."""
    while process > 1 and process != os.getpid():
        process = int((PROCESS / str(process) / "stat").read_text().rpartition(")")[2].split()[1])
    return process == os.getpid()


def workers() -> list[int]:
    """Return the process ids of the workers that embed, among the descendants of this process."""
    found = []
    for folder in files.list_folder(PROCESS):
        try:
            if b"_Adder" in (folder / "cmdline").read_bytes() and descends(int(folder.name)):
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 3])
def test_a_cluster_gives_the_same_run(killed: int, cli: Callable[..., object], shapes: Path, tmp_path: Path) -> None:
    """Two workers, and with `killed` workers that are killed while they embed."""
    pytest.importorskip("ray")
    words = ("train", shapes, "backbone=tiny", "--no-panel")
    cli(*words, f"run.out={tmp_path / 'local'}", real=True)
    ended, done = threading.Event(), []

    def kill() -> None:
        while len(done) < killed and not ended.wait(0.5):
            for process in workers()[:1]:
                os.kill(process, signal.SIGKILL)
                done.append(process)
            time.sleep(2)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        cli(*words, "--engine", "ray", "--workers", "2", f"run.out={tmp_path / 'ray'}", real=True, timeout=600)
    finally:
        ended.set()
        thread.join()
    assert bool(done) == bool(killed)
    assert_same_run(tmp_path / "local" / "1", tmp_path / "ray" / "1")
