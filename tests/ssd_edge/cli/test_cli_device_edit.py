"""Editing verbs of the device, and learning from a stream, as a user types them."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from device_runtime.install.bundle import install
from ssd_edge.cli import device


@pytest.fixture
def root(installed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(installed, tmp_path / "root"))


def run(root: Path, *words: str | Path) -> Result:
    done = CliRunner().invoke(device, [*map(str, words), "--root", str(root)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def test_forget_says_what_stays(root: Path) -> None:
    told = run(root, "forget", "circle", "--max-forgetting", "1").stdout
    assert "forgot 'circle', not exactly: its counts, mean and scores are gone" in told
    assert "undo with: ssd-edge device rollback" in told
    assert json.loads(run(root, "status", "--json").stdout)["classes"] == ["square", "cross", "stripes"]
    run(root, "rollback")
    assert "circle" in json.loads(run(root, "status", "--json").stdout)["classes"]


def test_forget_exactly_is_refused_where_it_cannot_be(root: Path, refused) -> None:
    told = refused("device", "forget", "circle", "--exactly", "--root", root, code=2)
    assert "learner.per_class=true" in told


def test_merge_labels_and_history(root: Path) -> None:
    told = run(root, "merge-labels", "circle", "square", "--into", "blob", "--max-forgetting", "1").stdout
    assert "circle, square are now 'blob'" in told
    assert "merge 'circle', 'square' into 'blob'" in run(root, "history").stdout
    edited = json.loads(run(root, "merge-labels", "cross", "--into", "blob", "--max-forgetting", "1", "--json").stdout)
    assert edited["classes"] == ["blob", "stripes"]


def test_a_merge_through_the_command_line(bundle: Path, root: Path, shapes: Path, tmp_path: Path) -> None:
    install(tmp_path / "other", bundle)
    run(tmp_path / "other", "learn", "--label", "triangle", shapes / "train" / "triangle", "--max-forgetting", "1")
    exported = run(tmp_path / "other", "export", tmp_path / "theirs.ssdedge").stdout
    assert "5 classes: " in exported
    assert exported.endswith("; not signed\n")
    told = run(root, "merge", tmp_path / "theirs.ssdedge", "--max-forgetting", "1").stdout
    assert "merged with installation" in told
    assert "triangle: 40 images, new" in told


def test_an_answer_can_be_asked_for_always(root: Path, shapes: Path) -> None:
    images = shapes / "test" / "triangle"
    asked = [json.loads(run(root, "predict", images, *more, "--json").stdout) for more in ((), ("--always-answer",))]
    rejecting, always = (one["predictions"] for one in asked)
    assert "unknown" in {one["label"] for one in rejecting}
    assert [one["label"] for one in always] == [one["nearest"] for one in rejecting]
    told = run(root, "predict", images).stdout
    assert "unknown (nearest: " in told


def test_status_tells_how_the_machine_is(root: Path) -> None:
    told = run(root, "status").stdout
    assert "MiB of memory free" in told
    assert "nothing yet; start with: ssd-edge device watch" in told
    found = json.loads(run(root, "status", "--json").stdout)
    assert found["machine"]["disk_free_mb"] > 0
    assert found["watched"] is None


def test_a_class_is_learned_from_a_stream(root: Path, shapes: Path) -> None:
    stream = io.BytesIO()
    for path in sorted((shapes / "train" / "triangle").iterdir())[:8]:
        Image.open(path).convert("RGB").save(stream, "JPEG")
        stream.write(b"\r\n--boundary\r\n")
    words = ["device", "learn", "--label", "triangle", "--frames", "6", "--every", "0", "--max-forgetting", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "ssd_edge", *words, "-", "--root", str(root), "--json"],
        input=stream.getvalue(),
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    learned = json.loads(done.stdout)
    assert (learned["images"], learned["classes"][-1]) == (6, "triangle")


@pytest.mark.parametrize("words", [("-",), ("--label", "gear", "-", "more")])
def test_a_stream_shows_one_class(root: Path, words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(device, ["learn", *words, "--root", str(root)])
    assert done.exit_code == 2
    assert "a stream (-) shows one class" in done.output
