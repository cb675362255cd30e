"""Editing commands of the device and learning from a stream, through the command line."""

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


def run(root: Path, *args: str | Path) -> Result:
    done = CliRunner().invoke(device, [*map(str, args), "--root", str(root)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def test_forget_reports_an_approximate_removal(root: Path) -> None:
    output = run(root, "forget", "circle", "--max-forgetting", "1").stdout
    assert "forgot 'circle', not exactly: its counts, mean and scores are gone" in output
    assert "undo with: ssd-edge device rollback" in output
    assert json.loads(run(root, "status", "--json").stdout)["classes"] == ["square", "cross", "stripes"]
    run(root, "rollback")
    assert "circle" in json.loads(run(root, "status", "--json").stdout)["classes"]


def test_forget_exactly_is_refused_where_it_is_impossible(root: Path, refused) -> None:
    output = refused("device", "forget", "circle", "--exactly", "--root", root, code=2)
    assert "learner.per_class=true" in output


def test_merge_labels_and_history(root: Path) -> None:
    output = run(root, "merge-labels", "circle", "square", "--into", "blob", "--max-forgetting", "1").stdout
    assert "circle, square are now 'blob'" in output
    assert "merge 'circle', 'square' into 'blob'" in run(root, "history").stdout
    edited = json.loads(run(root, "merge-labels", "cross", "--into", "blob", "--max-forgetting", "1", "--json").stdout)
    assert edited["classes"] == ["blob", "stripes"]


def test_prune(root: Path, refused) -> None:
    for new in ("one", "two", "three"):
        run(root, "rename", json.loads(run(root, "status", "--json").stdout)["classes"][0], new)
    assert run(root, "prune", "--keep", "1").stdout.startswith("deleted generations: 2 (")
    output = run(root, "prune", "--all-but-current").stdout
    assert "deleted generations: 1, 3 (" in output
    assert "left: 4 (" in output
    assert "no longer possible: rollback and merge" in output
    again = json.loads(run(root, "prune", "--all-but-current", "--json").stdout)
    assert (again["generations"], again["left"]) == ([], [4])
    assert "generation 3 was pruned" in refused("device", "rollback", "--root", root, code=2)
    assert b"'one'" not in b"".join(path.read_bytes() for path in root.rglob("*") if path.is_file())
    assert "either --keep N or --all-but-current" in refused("device", "prune", "--root", root, code=2)


def test_merge(bundle: Path, root: Path, shapes: Path, tmp_path: Path) -> None:
    install(tmp_path / "other", bundle)
    run(tmp_path / "other", "learn", "--label", "triangle", shapes / "train" / "triangle", "--max-forgetting", "1")
    exported = run(tmp_path / "other", "export", tmp_path / "theirs.ssdedge").stdout
    assert "5 classes; not signed" in exported
    assert exported.endswith("; not signed\n")
    output = run(root, "merge", tmp_path / "theirs.ssdedge", "--max-forgetting", "1").stdout
    assert "merged with installation" in output
    assert "triangle: 40 images, new" in output


def test_predict_can_always_return_a_class(root: Path, shapes: Path) -> None:
    images = shapes / "test" / "triangle"
    asked = [json.loads(run(root, "predict", images, *more, "--json").stdout) for more in ((), ("--always-answer",))]
    rejecting, always = (one["predictions"] for one in asked)
    assert "unknown" in {one["label"] for one in rejecting}
    assert [one["label"] for one in always] == [one["nearest"] for one in rejecting]
    output = run(root, "predict", images).stdout
    assert "unknown (nearest: " in output


def test_status_shows_the_state_of_the_machine(root: Path) -> None:
    output = run(root, "status").stdout
    assert "MiB of memory free" in output
    assert "nothing yet; start with: ssd-edge device watch" in output
    status = json.loads(run(root, "status", "--json").stdout)
    assert status["machine"]["disk_free_mb"] > 0
    assert status["watched"] is None


def test_learning_a_class_from_a_stream(root: Path, shapes: Path) -> None:
    stream = io.BytesIO()
    for path in sorted((shapes / "train" / "triangle").iterdir())[:8]:
        Image.open(path).convert("RGB").save(stream, "JPEG")
        stream.write(b"\r\n--boundary\r\n")
    args = ["device", "learn", "--label", "triangle", "--frames", "6", "--every", "0", "--max-forgetting", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "ssd_edge", *args, "-", "--root", str(root), "--json"],
        input=stream.getvalue(),
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    learned = json.loads(done.stdout)
    assert (learned["images"], learned["classes"][-1]) == (6, "triangle")


@pytest.mark.parametrize("args", [("-",), ("--label", "gear", "-", "more")])
def test_learning_from_a_stream_needs_exactly_one_label(root: Path, args: tuple[str, ...]) -> None:
    done = CliRunner().invoke(device, ["learn", *args, "--root", str(root)])
    assert done.exit_code == 2
    assert "a stream (-) shows one class" in done.output
