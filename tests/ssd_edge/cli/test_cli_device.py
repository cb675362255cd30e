"""`ssd-edge device` through the real command line, as the README shows it."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ssd_edge.cli.device import device
from ssd_edge.cli.device.learn import _class_folders


@pytest.fixture(scope="module")
def root(bundle: Path, cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("device") / "root"
    answer = json.loads(cli("device", "install", bundle, "--root", path, "--json").stdout)
    assert answer["generation"] == 1
    assert len(answer["classes"]) == 4
    return path


def test_the_readme_example(root: Path, shapes: Path, cli) -> None:
    pictures = sorted((shapes / "test" / "triangle").iterdir())
    at = ("--root", root)

    def predict() -> dict:
        return json.loads(cli("device", "predict", *pictures, *at, "--json").stdout)

    before = predict()
    assert before["generation"] == 1
    assert [p["image"] for p in before["predictions"]] == [str(path) for path in pictures]
    known = {"circle", "cross", "square", "stripes"}
    assert {p["nearest"] for p in before["predictions"]} <= known
    assert {p["label"] for p in before["predictions"]} <= {*known, "unknown"}
    assert before["seconds"] > 0
    learned = json.loads(
        cli("device", "learn", "--label", "triangle", shapes / "train" / "triangle", *at, "--json").stdout
    )
    assert learned["generation"] == 2
    assert learned["classes"][-1] == "triangle"
    assert 0 <= learned["held_out"]["accuracy"] <= 1
    assert learned["old_classes"]["kind"].startswith("estimate")
    after = predict()
    assert sum(p["label"] == "triangle" for p in after["predictions"]) >= 10
    result = cli("device", "learn", "--strict", "--label", "more", shapes / "test" / "triangle", *at, code=6)
    assert "slower than TensorRT, which the target jetson expects" in result.stderr
    status = json.loads(cli("device", "status", *at, "--json").stdout)
    assert (status["generation"], status["classes"][-1]) == (2, "triangle")
    rolled = json.loads(cli("device", "rollback", *at, "--json").stdout)
    assert (rolled["generation"], len(rolled["classes"])) == (1, 4)
    assert predict()["predictions"] == before["predictions"]  # all scores are bit-identical
    history = json.loads(cli("device", "history", *at, "--json").stdout)
    assert [event["event"] for event in history["events"]] == ["install", "learn", "rollback"]
    for verb in ("status", "history"):
        assert cli("device", verb, *at).stdout.strip()
    assert "circle" in cli("device", "predict", shapes / "test" / "circle", *at).stdout


def test_one_thread_unless_the_user_says_otherwise(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given, used in ((None, "1"), ("3", "3")):
        monkeypatch.setenv("OMP_NUM_THREADS", given or "")
        if given is None:
            monkeypatch.delenv("OMP_NUM_THREADS")
        assert CliRunner().invoke(device, ["fsck", "--root", str(root)]).exit_code == 0
        assert os.environ["OMP_NUM_THREADS"] == used


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize("count", [1, 5, 7, 15])
def test_predictions_do_not_depend_on_the_number_of_cores(root: Path, shapes: Path, count: int) -> None:
    pictures = sorted((shapes / "test" / "triangle").iterdir())[:count]
    command = [sys.executable, "-m", "ssd_edge", "device", "predict", *pictures, "--root", root, "--json"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    answers = []
    for cores in (os.sched_getaffinity(0), {min(os.sched_getaffinity(0))}):
        bound = functools.partial(os.sched_setaffinity, 0, cores)
        done = subprocess.run(command, capture_output=True, check=True, env=environment, preexec_fn=bound)
        answers.append(json.loads(done.stdout)["predictions"])
    assert answers[0] == answers[1]


def test_fsck_reports_what_is_damaged(root: Path, refused, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    sound = CliRunner().invoke(device, ["fsck", "--root", str(copy)])
    assert (sound.exit_code, sound.output) == (0, f"{copy} is sound\n")
    (copy / "generations" / "000001" / "classes.json").write_text("{}")
    found = json.loads(CliRunner().invoke(device, ["fsck", "--json", "--root", str(copy)]).output)["findings"]
    assert any("classes.json" in finding["problem"] or "classes.json" in finding["path"] for finding in found)
    assert "damaged parts in" in refused("device", "fsck", "--root", copy, code=5)


def test_bad_files_are_named_at_once_or_left_out(root: Path, shapes: Path, refused, tmp_path: Path) -> None:
    own = Path(shutil.copytree(root, tmp_path / "root"))
    photos = tmp_path / "photos"
    for shape in ("circle", "triangle"):
        (photos / shape).mkdir(parents=True)
        for path in sorted((shapes / "train" / shape).iterdir())[:6]:
            (photos / shape / path.name).write_bytes(path.read_bytes())
        (photos / shape / "empty.jpg").touch()
        (photos / shape / "clip.mp4").touch()
    said = [f"{photos / shape / name} is" for shape in ("circle", "triangle") for name in ("empty.jpg", "clip.mp4")]
    at = ["--root", str(own)]
    for verb in (["predict", str(photos)], ["learn", str(photos)]):
        error = refused("device", *verb, *at, code=2)
        assert all(text in error for text in said)
        assert error.endswith("error: 4 of 16 files cannot be used. To go on without them: --skip-bad\n")
        done = CliRunner().invoke(device, [*verb, *at, "--skip-bad", "--json"], catch_exceptions=False)
        values = json.loads(done.stdout)
        assert all(any(text in problem for problem in values["skipped"]) for text in said)
        assert done.stderr.count("left out: ") == 4
        assert len(values["predictions"]) == 12 if verb[0] == "predict" else values["images"] == 12
    error = refused("device", "predict", tmp_path / "a.jpg", photos / "circle" / "clip.mp4", *at, "--skip-bad", code=2)
    assert "2 of 2 files cannot be used: " in error
    assert f"{tmp_path / 'a.jpg'} does not exist" in error


def test_folders_with_the_same_name_are_one_class(tmp_path: Path) -> None:
    for place in ("one/gear", "one/nut", "two/gear"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "one" / "note.txt").write_text("no folder")
    found = _class_folders((tmp_path / "one", tmp_path / "two"))
    assert found == {"gear": [tmp_path / "one/gear", tmp_path / "two/gear"], "nut": [tmp_path / "one/nut"]}


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["predict", "none.jpg"], 2, "none.jpg"),
        (["predict", "EMPTY"], 2, "EMPTY"),
        (["learn", "--label", "unknown", "EMPTY"], 2, "is reserved"),
        (["learn", "--label", "new", "EMPTY"], 2, "EMPTY"),
        (["learn", "--label", "new", "MIXED"], 2, "note.jpg"),
        (["learn", "EMPTY"], 2, "has no subfolders to take as classes"),
        (["rename", "none", "new"], 2, "no class 'none' is known"),
        (["rename", "circle", "cross"], 2, "the class 'cross' exists already"),
        (["rollback", "9"], 2, "available generations: 1"),
        (["rollback", "x"], 2, "x"),
        (["install", "none.ssdedge"], 2, "none.ssdedge"),
    ],
)
def test_bad_input(args: list[str], code: int, message: str, root: Path, shapes: Path, refused, tmp_path: Path) -> None:
    empty, mixed = tmp_path / "EMPTY", tmp_path / "MIXED"
    empty.mkdir()
    mixed.mkdir()
    for number, path in enumerate(sorted((shapes / "test" / "triangle").iterdir())[:5]):
        (mixed / f"{number}.png").write_bytes(path.read_bytes())
    (mixed / "note.jpg").write_text("no image")
    args = [str(tmp_path / arg) if arg in ("EMPTY", "MIXED") else arg for arg in args]
    before = sorted(str(path) for path in root.rglob("*"))
    assert message in refused("device", *args, "--root", root, code=code)
    assert sorted(str(path) for path in root.rglob("*")) == before


def test_no_installed_device(cli, tmp_path: Path) -> None:
    done = cli("device", "status", "--root", tmp_path / "none", code=2)
    assert "no bundle is installed" in done.stderr
    assert not (tmp_path / "none").exists()


def test_damaged_bundles(bundle: Path, cli, tmp_path: Path) -> None:
    data, chance = bundle.read_bytes(), random.Random(0)
    flipped = bytearray(data)
    flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    damaged = {"flipped": bytes(flipped), "cut": data[: len(data) // 2], "random": chance.randbytes(999)}
    for name, content in damaged.items():
        path = tmp_path / f"{name}.ssdedge"
        path.write_bytes(content)
        done = cli("device", "install", path, "--root", tmp_path / "root", code=5)
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "root" / "CURRENT").exists()


@pytest.mark.parametrize(("missing", "extra"), [("torch", "device"), ("onnxruntime", "device")])
def test_a_missing_package_is_reported_in_one_sentence(missing: str, extra: str, bundle: Path, tmp_path: Path) -> None:
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "{missing}":
            raise ModuleNotFoundError("blocked", name="{missing}")
sys.meta_path.insert(0, Block())
sys.argv = ["ssd-edge", "device", "install", {str(bundle)!r}, "--root", {str(tmp_path / "root")!r}]
from ssd_edge.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert f"ssd-edge[{extra}]" in done.stderr
