"""`ssd-edge train` and `evaluate`: output, files and exit codes of the real process."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from ssd_edge import files
from ssd_edge.cli import cli as command_line
from ssd_edge.learners.closed_form.ranpac import RanPAC
from ssd_edge.run import train as training

QUICK = ("backbone=tiny", "run.panel=false", "run.baselines=false", "stream.order=sorted")


def read(run: Path, name: str = "metrics.json") -> dict:
    return json.loads((run / name).read_text())


def test_files_of_a_run(trained: Path, shapes: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"config.yaml", "run.json", "metrics.json", "report.html", "learner.safetensors", "classes.json"} <= names
    metrics, record = read(trained), read(trained, "run.json")
    assert metrics["learner"] == "slda"
    assert set(metrics["baselines"]) == {"ssd", "sdmlp", "finetune"}
    assert set(metrics["panel"]) == {"ncm", "ridge", "ranpac", "klda", "fecam", "flymodel", "joint"}
    assert set(metrics["classes"]) == {"circle", "cross", "square", "stripes"}
    matrix = metrics["accuracy_matrix"]
    assert [len(row) for row in matrix] == [2, 2]
    assert matrix[0][1] is None
    assert metrics["average_accuracy"] == pytest.approx(sum(matrix[-1]) / 2)
    assert metrics["backward_transfer"] == pytest.approx(matrix[1][0] - matrix[0][0])
    assert metrics["state_bytes"] > 0
    assert metrics["average_accuracy"] > 0.6  # chance is 0.25
    assert record["status"] == "finished"
    assert record["seed"] == 0
    assert record["threads"] >= 1
    assert record["argv"][:2] == ["ssd-edge", "train"]  # without the path of the script
    assert record["versions"]["torch"]
    report = (trained / "report.html").read_text()
    assert f"{metrics['average_accuracy']:.3f}"[:4] in report or f"{metrics['average_accuracy']:.1%}" in report


def test_train_prints_tasks_and_tables(shapes: Path, cli, tmp_path: Path) -> None:
    done = cli("train", f"data.path={shapes}", *QUICK, f"run.out={tmp_path}")
    output = done.stdout + done.stderr
    assert "2 tasks" in output
    assert "\x1b[" not in output  # no colours in a pipe
    for word in ("after task", "accuracy", "on the way", "drop", "task 1/2", "task 2/2"):
        assert word in output
    assert "ssd-edge deploy --target jetson" in output
    cli("train", f"data.path={shapes}", *QUICK, f"run.out={tmp_path}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]  # every run gets a new folder
    assert read(tmp_path / "1")["accuracy_matrix"] == read(tmp_path / "2")["accuracy_matrix"]


def test_a_folder_with_bad_files(shapes: Path, cli, tmp_path: Path) -> None:
    folder = tmp_path / "my photos"
    for shape in ("circle", "square"):
        (folder / shape).mkdir(parents=True)
        for source in sorted((shapes / "train" / shape).iterdir())[:5]:
            (folder / shape / source.name).write_bytes(source.read_bytes())
        (folder / shape / "clip.mp4").touch()
        (folder / shape / "empty.jpg").touch()
    quick, out = (*QUICK, f"run.out={tmp_path / 'runs'}"), tmp_path / "runs" / "1"
    error = cli("train", folder, *quick, code=2).stderr
    assert all(
        f"  {folder / shape / name}" in error for shape in ("circle", "square") for name in ("clip.mp4", "empty.jpg")
    )
    last = "error: 4 of 14 files cannot be used. To go on without them: --skip-bad (data.skip_bad=true)"
    assert error.strip().splitlines()[-1] == last
    assert not out.exists()
    done = cli("train", *quick, folder, "--skip-bad")
    assert "warning: 4 files left out, as they cannot be used: " in done.stdout + done.stderr
    assert len(read(out, "run.json")["accounts"]["skipped"]) == 4
    assert read(out)["train_images"] + read(out)["test_images"] == 10
    report = (out / "report.html").read_text()
    assert "4 files left out" in report
    assert report.count("clip.mp4 is a video") == 4  # in the sentence and in the list
    evaluated = cli("evaluate", out, "--json")
    assert json.loads(evaluated.stdout)["images"] == 2  # without them, too
    assert "warning: 4 files left out" in evaluated.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b"], "one data set is needed, but 2 are named: a, b"),
        (["a", "data.path=b"], "one data set is needed, but 2 are named: a, b"),
        (["c"], "'c' is neither of the form section.key=value nor the path of images: there is no data set at"),
        (["learner.name"], "'learner.name' is neither of the form section.key=value nor"),
        (["--resume", "a", "b"], "--resume keeps the configuration of the run"),
    ],
)
def test_bad_words(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from ssd_edge.cli.train import train

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert message in str(CliRunner().invoke(train, words).exception)


def test_evaluate(trained: Path, shapes: Path, cli) -> None:
    own = json.loads(cli("evaluate", trained, "--json").stdout)
    metrics = read(trained)
    assert own["class_accuracy"] == metrics["class_accuracy"]
    other = json.loads(
        cli("evaluate", trained, "--json", f"data.path={shapes / 'test'}", "data.exclude=triangle").stdout
    )
    assert (other["images"], other["which"]) == (60, "all images")
    assert other["accuracy"] == pytest.approx(own["accuracy"])  # the same images in a folder without a split
    done = cli("evaluate", trained, f"data.path={shapes}", code=2)
    assert "the run did not learn triangle" in done.stderr


def start(arguments: list[str], cwd: Path) -> subprocess.Popen:
    """Start the command line without waiting for it."""
    command = [sys.executable, "-m", "ssd_edge", *arguments]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_first_task(run: Path, process: subprocess.Popen) -> None:
    """Wait until the first task is recorded."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        try:
            if files.read_json(run / "progress.json").get("ssd", {}).get("rows"):
                return
        except Exception:  # the file does not exist yet
            pass
        time.sleep(0.01)
    raise AssertionError("no task finished within two minutes")


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_identical_weights(how: signal.Signals, shapes: Path, cli, tmp_path: Path) -> None:
    arguments = ["train", f"data.path={shapes}", *QUICK, "learner.name=ssd", "learner.epochs=60", "stream.tasks=5"]
    complete, cut = tmp_path / "complete", tmp_path / "cut"
    cli(*arguments, f"run.out={complete}")
    process = start([*arguments, f"run.out={cut}"], tmp_path)
    wait_for_first_task(cut / "1", process)
    process.send_signal(how)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), output
    assert "Traceback" not in output
    if how == signal.SIGINT:
        assert f"continue with: ssd-edge train --resume {cut / '1'}" in output
    assert read(cut / "1", "run.json")["status"] == "running"
    done_before = len(read(cut / "1", "progress.json")["ssd"]["rows"])
    assert 1 <= done_before < 5
    cli("deploy", "--target", "jetson", cut / "1", "-o", tmp_path / "x.ssdedge", code=2)
    cli("evaluate", cut / "1", code=2)
    cli("train", "--resume", cut / "1")
    assert read(cut / "1")["accuracy_matrix"] == read(complete / "1")["accuracy_matrix"]
    for name in ("learner.safetensors", "statistics.safetensors"):
        assert (cut / "1" / name).read_bytes() == (complete / "1" / name).read_bytes()
    assert os.listdir(cut / "1" / "checkpoints") == []


def test_the_model_is_complete_before_the_comparison(shapes: Path, tmp_path: Path, monkeypatch, cli) -> None:
    """An interrupted comparison leaves a run that can be deployed and evaluated, and continues where it stopped."""
    learn, learned = RanPAC._learn, []

    def interrupted(self: RanPAC, *args: object) -> dict:
        learned.append(self.name)
        if len(learned) == 2:  # in its second task
            raise KeyboardInterrupt
        return learn(self, *args)

    folder = tmp_path / "1"
    monkeypatch.setattr(training, "JOINT", dataclasses.replace(training.JOINT, **training.ONE_PASS))
    with monkeypatch.context() as patch:
        patch.setattr(RanPAC, "_learn", interrupted)
        words = ["train", *QUICK, f"data.path={shapes}", f"run.out={tmp_path}", "run.panel=true"]
        done = CliRunner().invoke(command_line, words, standalone_mode=False)
    assert isinstance(done.exception, click.Abort)
    said = str(done.exception.__cause__ or done.exception.__context__)
    assert said.endswith(f"is complete; continue the comparison with: ssd-edge compare {folder}")
    assert "deploy it now, in another terminal, with: ssd-edge deploy --target jetson" in done.output
    assert set(read(folder)["panel"]) == {"ncm", "ridge"}
    accuracy = json.loads(cli("evaluate", folder, "--json").stdout)["accuracy"]
    state = (folder / "learner.safetensors").read_bytes()

    done = CliRunner().invoke(command_line, ["compare", str(folder)], catch_exceptions=False)
    assert "NCM: average accuracy" not in done.output  # not again
    metrics = read(folder)
    assert set(metrics["panel"]) == {"ncm", "ridge", "ranpac", "klda", "fecam", "flymodel", "joint"}
    assert set(metrics["baselines"]) == {"ssd", "sdmlp", "finetune"}  # compare trains all
    assert accuracy == pytest.approx(np.mean(list(metrics["class_accuracy"].values())))
    assert (folder / "learner.safetensors").read_bytes() == state
    assert "RanPAC" in (folder / "report.html").read_text()


@pytest.mark.parametrize("words", [[], ["learner.second_view=true"]], ids=" ".join)
def test_no_panel_trains_the_model_only(words: list[str], shapes: Path, tmp_path: Path, cli) -> None:
    printed = cli("train", "--no-panel", "backbone=tiny", f"data.path={shapes}", f"run.out={tmp_path}", *words).stdout
    assert f"compare: ssd-edge compare {tmp_path / '1'}" in printed
    assert f"deploy:  ssd-edge deploy --target jetson {tmp_path / '1'} -o robot.ssdedge" in printed
    metrics = read(tmp_path / "1")
    assert (metrics["panel"], metrics["baselines"]) == ({}, {})
    assert ("apart" in files.read_tensors(tmp_path / "1" / "learner.safetensors")[0]) == bool(words)


def test_compare_refuses_an_unfinished_run(tmp_path: Path, cli) -> None:
    assert "does not exist" in cli("compare", tmp_path / "1", code=2).stderr


def test_resume_of_a_finished_run_changes_nothing(trained: Path, cli) -> None:
    before = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    cli("train", "--resume", trained)
    after = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    assert before["learner.safetensors"] == after["learner.safetensors"]
    assert json.loads(before["run.json"]) == json.loads(after["run.json"])


def test_resume_refuses_changed_data(shapes: Path, cli, tmp_path: Path) -> None:
    import shutil

    data = Path(shutil.copytree(shapes, tmp_path / "data"))
    cli("train", f"data.path={data}", *QUICK, "learner.name=ncm", f"run.out={tmp_path / 'runs'}")
    (data / "train" / "circle" / "000.png").unlink()
    done = cli("train", "--resume", tmp_path / "runs" / "1", code=2)
    assert "its data changed after it was started" in done.stderr


def broken(tmp_path: Path, shapes: Path, defect: str) -> Path:
    """Return an image folder with one defect."""
    folder = tmp_path / defect
    for shape in ("circle", "square"):
        (folder / shape).mkdir(parents=True)
        for source in sorted((shapes / "train" / shape).iterdir())[:4]:
            (folder / shape / source.name).write_bytes(source.read_bytes())
    if defect == "corrupt":
        victim = folder / "circle" / "000.png"
        victim.write_bytes(victim.read_bytes()[:200])
    elif defect == "text":
        (folder / "circle" / "note.jpg").write_text("not an image")
    elif defect == "one-class":
        for path in (folder / "square").iterdir():
            path.unlink()
        (folder / "square").rmdir()
    elif defect == "empty":
        for path in folder.rglob("*.png"):
            path.unlink()
    elif defect == "reserved":
        (folder / "circle").rename(folder / "unknown")
    return folder


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("corrupt", "000.png is corrupt"),
        ("text", "note.jpg is not a JPEG, PNG, WebP, BMP, GIF or TIFF image"),
        ("one-class", "at least two classes"),
        ("empty", "empty"),
        ("reserved", "is reserved"),
    ],
)
def test_bad_data(defect: str, message: str, shapes: Path, refused, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    error = refused("train", f"data.path={broken(tmp_path, shapes, defect)}", *QUICK, f"run.out={out}", code=2)
    assert message in error
    assert len(error.strip().splitlines()[-1]) < 500
    assert not (out / "1" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["learner.budget=3"], "unknown key 'learner.budget'. Did you mean 'budget_mb'?"),
        (["lerner.k=3"], "unknown section 'lerner'. Did you mean 'learner'?"),
        (["learner.budget_classes=1"], "learner.budget_classes must be at least 2, but is 1"),
        (["learner.budget_classes=many"], "learner.budget_classes must be a whole number, but is 'many'"),
        (["learner.budget_mb=0.0001"], "is too small for two features"),
        (["learner.name=ssdd"], "Did you mean 'ssd'?"),
        (["learner.name=sdmlp", "learner.k=2000"], "learner.k must be at most learner.neurons, but is 2000 of 1000"),
        (["learner.name=ssd", "learner.top_n=5"], "must give at least learner.k = 10"),
        (
            ["learner.name=ridge", "learner.penalty=ewc"],
            "requires a learner that is trained by gradient descent, but 'ridge' is not",
        ),
        (["stream.tasks=9"], "stream.tasks is 9, but there are only 5 classes"),
        (["run.seed=-1"], "run.seed must be at least 0"),
        (["data.classes=circle,squore"], "squore"),
        (["data.path=/does/not/exist"], "/does/not/exist"),
        (["backbone=package:/does/not/exist"], "is not a backbone package"),
        (["backbone=onnx:/does/not/exist.onnx"], "/does/not/exist.onnx"),
        (["justaword"], "section.key=value"),
        (["--config", "/does/not/exist.yaml"], "/does/not/exist.yaml"),
        (["--resume", "/does/not/exist"], "/does/not/exist"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_usage(arguments: list[str], message: str, shapes: Path, refused, tmp_path: Path) -> None:
    extra = [] if "--resume" in arguments else ["backbone=tiny", f"run.out={tmp_path / 'runs'}"]
    if "--resume" not in arguments and not any(argument.startswith("data.path") for argument in arguments):
        extra.append(f"data.path={shapes}")
    assert message in refused("train", *extra, *arguments, code=2)
    assert not (tmp_path / "runs").exists()  # no folder is created


def test_deploy_and_evaluate_refuse_other_folders(cli, tmp_path: Path, trained: Path) -> None:
    assert "does not exist" in cli("evaluate", tmp_path / "none", code=2).stderr
    assert "is not a run" in cli("evaluate", tmp_path, code=2).stderr
    out = tmp_path / "x.ssdedge"
    cli("deploy", "--target", "jetson", tmp_path, "-o", out, code=2)
    done = cli("deploy", "--target", "jetsn", trained, "-o", out, code=2)
    assert "Did you mean 'jetson'?" in done.stderr
    assert not out.exists()


def test_a_damaged_checkpoint_is_refused(trained: Path, cli, tmp_path: Path) -> None:
    import shutil

    run = Path(shutil.copytree(trained, tmp_path / "1"))
    arrays, metadata = files.read_tensors(run / "learner.safetensors")
    arrays["values"][0, 0] = np.nan
    from safetensors.numpy import save

    (run / "learner.safetensors").write_bytes(save(arrays, {"json": json.dumps(metadata)}))
    done = cli("evaluate", run, code=5)
    assert "'values' contains NaN" in done.stderr


def test_help_is_fast_and_the_printed_config_works(cli, shapes: Path, tmp_path: Path) -> None:
    assert "Usage" in cli("--help").stdout
    code = "import sys; sys.argv = ['ssd-edge']; import ssd_edge.cli; print('torch' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "False"  # importing PyTorch takes seconds
    for name in ("slda", "ssd", "finetune"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(cli("config", "--learner", name).stdout)
    own = (f"data.path={shapes}", f"run.out={tmp_path / 'runs'}")
    cli("train", "--config", tmp_path / "slda.yaml", *QUICK, *own)
    assert read(tmp_path / "runs" / "1")["learner"] == "slda"
