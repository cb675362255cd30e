"""What the verbs of a device print: counts before lists, the tree of generations, and errors as JSON."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from device_runtime.results import HistoryEntry
from ssd_edge.cli import cli, run
from ssd_edge.cli.device.history import tree


@pytest.fixture
def root(installed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(installed, tmp_path / "root"))


@pytest.fixture
def printed(root: Path) -> Callable[..., str]:
    """Return a function that runs a verb in this process and returns its standard output."""

    def call(*args: str | Path) -> str:
        done = CliRunner().invoke(cli, ["device", *map(str, args), "--root", str(root)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    return call


def entries(*parents: int | None) -> list[HistoryEntry]:
    """Return generations 1, 2, … with these parents."""
    return [HistoryEntry(number, False, True, "", parent) for number, parent in enumerate(parents, 1)]


@pytest.mark.parametrize(
    ("parents", "expected"),
    [
        ((None,), ["1"]),
        ((None, 1, 2), ["1", "2", "3"]),
        ((None, 1, 2, 1), ["1", "├─ 2", "│  3", "4"]),
        ((None, 1, 1, 3, 3, 1), ["1", "├─ 2", "├─ 3", "│  ├─ 4", "│  5", "6"]),
        ((None, 1, None, 3), ["1", "2", "3", "4"]),
        ((7, 1, 9), ["1", "2", "3"]),  # pruned parents
        ((None, 1, 2, 2, 1), ["1", "├─ 2", "│  ├─ 3", "│  4", "5"]),
    ],
)
def test_generations_stand_below_what_they_were_made_from(parents: tuple[int | None, ...], expected: list[str]) -> None:
    assert [branch for branch, _ in tree(entries(*parents))] == expected


def test_a_long_history_is_a_line() -> None:
    assert len(list(tree(entries(None, *range(1, 5000))))) == 5000


def test_history_shows_branches_and_rollbacks(printed: Callable[..., str]) -> None:
    printed("rename", "circle", "ring")
    printed("rollback", "1")
    printed("rename", "circle", "disc")
    first, second, third, back = printed("history").splitlines()
    assert first.split()[0] == "1"
    assert second.startswith("  ├─ 2  ")
    assert second.endswith("rename 'circle' to 'ring'")
    assert third.startswith("* 3     ")
    assert third.endswith("rename 'circle' to 'disc'")
    assert back.startswith("rolled back from 2 to 1  ")


def test_counts_come_before_lists(printed: Callable[..., str], bundle: Path) -> None:
    assert printed("install", bundle).strip().endswith(": 4 classes")
    listed = ["  circle", "  cross", "  square", "  stripes"]
    assert sorted(printed("install", bundle, "--classes").splitlines()[1:]) == listed
    status = printed("status")
    assert "classes     4 classes, 160 images (40 each)\n" in status
    assert "circle" not in status
    assert "learner     slda (" in status
    assert "answers with NumPy" in status
    assert ", CPUExecutionProvider, CPUExecutionProvider runs the backbone, slower than" in status
    assert sorted(printed("status", "--classes").splitlines()[-4:]) == [f"{name}: 40 images" for name in listed]
    printed("rename", "circle", "ring")
    assert sorted(printed("rollback", "--classes").splitlines()[1:]) == listed


def test_a_learn_of_many_classes_names_the_least_recognised(
    printed: Callable[..., str], shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape in ("circle", "cross", "square"):
        (tmp_path / "photos" / shape).mkdir(parents=True)
        for path in sorted((shapes / "test" / shape).iterdir())[:6]:
            shutil.copy(path, tmp_path / "photos" / shape)
    monkeypatch.setattr(importlib.import_module("ssd_edge.cli.device.learn"), "SHOWN", 2)
    lines = printed("learn", tmp_path / "photos").splitlines()
    assert "generation 2: 4 classes; learned 18 images in " in lines[0]
    assert lines[1] == "  taught 3 classes, 0 of them new; --classes lists them; least recognised:"
    shares = [float(line.split("; ")[1].split()[0]) for line in lines[2:4]]
    assert shares == sorted(shares)
    assert "undo with" in lines[-1]
    assert "learn 'circle' (6 images), 'cross' (6 images)" in printed("history")
    printed("rollback")
    assert sum("known before" in line for line in printed("learn", tmp_path / "photos", "--classes").splitlines()) == 3


@pytest.mark.parametrize(
    ("args", "code", "error"),
    [
        (["rollback", "77"], 2, "there is no generation 77; available generations: 1"),
        (["rollback", "x"], 2, "Invalid value for '[GENERATION]': 'x' is not a valid integer."),
        (["predict"], 2, "Missing argument 'IMAGE...'."),
        (["predict", "none.jpg"], 2, "none.jpg does not exist; check the path"),
        (["rename", "circle", "cross"], 2, "the class 'cross' exists already; choose another name. Known: "),
        (["prune"], 2, "give either --keep N or --all-but-current; --keep-installed needs the latter"),
    ],
)
def test_errors_are_json_as_well(
    args: list[str], code: int, error: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["ssd-edge", "device", *args, "--root", str(root), *more])
        assert run() == code
        said = capsys.readouterr()
        assert error in said.err
        if not more:
            assert said.out == ""
        else:
            found = json.loads(said.out)
            assert (found["error"][: len(error)], found["code"]) == (error, code)


def test_an_error_after_a_result_is_not_a_second_object(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "generations" / "000001" / "classes.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["ssd-edge", "device", "fsck", "--root", str(root), "--json"])
    assert run() == 5
    assert json.loads(capsys.readouterr().out)["findings"]


def test_a_bug_is_an_error_too(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("device_runtime.device.Device.status", lambda self: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["ssd-edge", "device", "status", "--root", str(root), "--json"])
    assert run() == 1
    found = json.loads(capsys.readouterr().out)
    assert found == {"error": "internal error: ZeroDivisionError: division by zero", "code": 1}
