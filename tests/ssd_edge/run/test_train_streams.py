"""Runs on each kind of stream: output, files, online learning, and resuming."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from ssd_edge import files
from ssd_edge.cli.train import train
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.learners import Task
from ssd_edge.report import figures
from ssd_edge.report.compare import DISPLAY
from ssd_edge.run import storage
from ssd_edge.run import train as training
from ssd_edge.run.tasks import StreamData, accuracies

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = (
    "backbone=tiny",
    "run.panel=false",
    "run.baselines=false",
    "run.threads=1",
    "stream.tasks=3",
    "learner.name=ncm",
)
REPETITION = ("stream.kind=repetition", "stream.experiences=7")


def run(*arguments: str | Path) -> str:
    """Run `ssd-edge train` within this process and return its output."""
    done = CliRunner().invoke(train, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def read(folder: Path, name: str = "metrics.json") -> dict:
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def repeated(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run of NCM with repetition, and its output."""
    out = tmp_path_factory.mktemp("repeated")
    return out / "1", run(f"data.path={shapes}", *QUICK, *REPETITION, f"run.out={out}")


def test_a_run_with_repetition(repeated: tuple[Path, str]) -> None:
    folder, output = repeated
    metrics = read(folder)
    assert "5 classes in 3 tasks over 7 experiences, class-incremental with repetition, order seeded" in output
    assert re.search(r"^NCM on \S+: 5 classes in 3 tasks over 7 experiences, class-inc", output, re.MULTILINE)
    assert re.search(r"^experience 7/7 ", output, re.MULTILINE)
    assert re.search(r"^3  task 2: \w+, \w+ ", output, re.MULTILINE)
    assert metrics["stream"] == {"kind": "repetition", "online": False}
    assert metrics["introduced"] == [0, 2, 4]
    matrix = metrics["accuracy_matrix"]
    measured = [[value is not None for value in row] for row in matrix]
    assert measured == [[after >= first for first in (0, 2, 4)] for after in range(7)]
    assert metrics["average_accuracy"] == pytest.approx(sum(matrix[-1]) / 3)
    assert len(metrics["accuracy_curve"]) == 7
    assert metrics["accuracy_curve"][3] == pytest.approx(sum(matrix[3][:2]) / 2)
    gains = [matrix[-1][group] - matrix[first][group] for group, first in ((0, 0), (1, 2), (2, 4))]
    assert metrics["backward_transfer"] == pytest.approx(sum(gains) / 3)  # the last experience introduces none
    assert sum(part["train"] for part in metrics["experiences"]) == metrics["train_images"] == 200
    assert sum(task["train"] for task in metrics["tasks"]) == 200
    assert metrics["experiences"][0]["classes"] == metrics["tasks"][0]["classes"]


def test_report_of_a_run_with_repetition(repeated: tuple[Path, str]) -> None:
    source, metrics = (repeated[0] / "report.html").read_text(), read(repeated[0])
    assert "5 classes in 3 tasks over 7 experiences, class-incremental with repetition" in source
    assert "the state after one more experience" in source
    assert "experiences learned" in source
    cells = re.findall(r"after experience (\d), on task (\d) \(.+?\): ([\d.]+) %", source)
    matrix = metrics["accuracy_matrix"]
    assert cells == [
        (str(row + 1), str(column + 1), f"{100 * value:.1f}")
        for row, values in enumerate(matrix)
        for column, value in enumerate(values)
        if value is not None
    ]
    # the name of each task is beside the first cell of its column
    places = re.findall(r'<use [^>]*x="(\d+)"[^>]* y="(\d+)"><title>after experience \d, on task (\d)', source)
    names = re.findall(r'<text [^>]*x="(\d+)" y="([\d.]+)">[^<]*<title>task (\d):', source)
    assert [number for *_, number in names] == ["1", "2", "3"]
    wide, tall = 52, 32
    for x, y, number in names:
        centre, middle = next((int(a), int(b)) for a, b, task in places if task == number)
        assert int(x) == centre + wide / 2 + 8
        assert abs(float(y) - middle) < tall / 2


def test_blurry_and_online(shapes: Path, tmp_path: Path) -> None:
    settings = ("stream.kind=blurry", "stream.online=true", "learner.name=finetune", "learner.neurons=8")
    output = run(f"data.path={shapes}", *QUICK, *settings, f"run.out={tmp_path}")
    assert "5 classes in 3 tasks, blurry, online, order seeded" in output
    assert re.search(r"^task 3/3 ", output, re.MULTILINE)
    metrics = read(tmp_path / "1")
    assert metrics["stream"] == {"kind": "blurry", "online": True}
    assert metrics["introduced"] == [0, 1, 2]
    assert [[value is not None for value in row] for row in metrics["accuracy_matrix"]] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]
    assert len(metrics["experiences"][0]["classes"]) > len(metrics["tasks"][0]["classes"])
    assert "blurry, online" in (tmp_path / "1" / "report.html").read_text()
    _, state = files.read_tensors(tmp_path / "1" / "learner.safetensors")
    assert state["settings"]["epochs"] == 1


def test_class_means_do_not_depend_on_the_stream(repeated: tuple[Path, str], shapes: Path, tmp_path: Path) -> None:
    """NCM keeps only sums, so that every order of the same samples gives the same state."""
    for number, settings in enumerate(((), ("stream.kind=blurry", "stream.leakage=0.4")), 1):
        run(f"data.path={shapes}", *QUICK, *settings, f"run.out={tmp_path}")
        assert read(tmp_path / str(number))["accuracy_matrix"][-1] == read(repeated[0])["accuracy_matrix"][-1]
    assert read(tmp_path / "1")["experiences"] != read(tmp_path / "2")["experiences"]


def test_joint_training_has_the_configured_size(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "PANEL", ())
    monkeypatch.setattr(training, "JOINT", dataclasses.replace(training.JOINT, epochs=1))
    settings = ("run.panel=true", "learner.name=finetune", "learner.neurons=8", "learner.epochs=1")
    run(f"data.path={shapes}", *QUICK, *REPETITION, *settings, f"run.out={tmp_path}")
    metrics = read(tmp_path / "1")
    joint = metrics["panel_details"]["joint"]
    assert joint["state_bytes"] == metrics["state_bytes"] < 20_000
    assert 0 <= joint["average_accuracy"] <= 1
    assert joint["accuracy_matrix"] is joint["accuracy_curve"] is joint["forgetting"] is None


@pytest.mark.parametrize(
    ("options", "online", "expected"),
    [
        ({"name": "finetune"}, False, {}),
        ({"name": "finetune", "epochs": 7}, False, {"epochs": 7}),
        ({"name": "finetune"}, True, {"epochs": 1, "min_steps": 0}),
        ({"name": "sdmlp", "k": 5}, True, {"k": 5, "epochs": 1, "min_steps": 0}),
        ({"name": "ssd", "epochs": "1"}, True, {"epochs": 1, "min_steps": 0}),
        ({"name": "ncm"}, True, {}),
    ],
)
def test_online_learners_train_for_one_epoch(options: dict, online: bool, expected: dict) -> None:
    assert training.limit_epochs(options, online) == {"name": options["name"], **expected}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "finetune", "epochs": "3"}, r"^learner\.epochs is 3, but stream\.online=true gives each sample once"),
        ({"name": "finetune", "min_steps": 9}, r"^learner\.min_steps is 9, but stream\.online=true"),
        ({"name": "ncm", "epochs": 1}, r"^unknown key 'learner\.epochs'"),
        ({"name": "finetun"}, r"^unknown learner\.name 'finetun'\. Did you mean 'finetune'\?"),
    ],
)
def test_several_epochs_are_refused_online(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        training.limit_epochs(options, True)


def test_wrong_streams_leave_no_files(shapes: Path, tmp_path: Path) -> None:
    for settings, message in (
        (("stream.repetition=0.3",), "stream.repetition is 0.3, but it belongs to stream.kind=repetition"),
        (("stream.kind=blury",), "Did you mean 'blurry'?"),
        (("stream.leakage=1.5",), "stream.leakage must be at most 1, but is 1.5"),
        (("stream.online=true", "learner.name=sdmlp", "learner.epochs=2"), "learner.epochs is 2, but"),
        ((*REPETITION[:1], "stream.experiences=150", "stream.repetition=1"), "has no training image"),
    ):
        done = CliRunner().invoke(train, [f"data.path={shapes}", *QUICK, *settings, f"run.out={tmp_path / 'runs'}"])
        assert isinstance(done.exception, InputError)
        assert message in str(done.exception)
    assert not (tmp_path / "runs").exists()


def test_resuming_a_run_with_repetition(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = (f"data.path={shapes}", *QUICK, *REPETITION, "learner.name=finetune", "learner.neurons=8")
    settings += ("learner.epochs=2", f"run.out={tmp_path}")
    run(*settings)
    commit = storage.ProgressStore.commit

    def interrupted(self: storage.ProgressStore, name: str, progress: storage.LearnerProgress, state: object) -> None:
        commit(self, name, progress, state)
        if len(progress.rows) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(storage.ProgressStore, "commit", interrupted)
    done = CliRunner().invoke(train, list(map(str, settings)))
    assert done.exit_code != 0
    monkeypatch.undo()
    assert len(read(tmp_path / "2", "progress.json")["finetune"]["rows"]) == 4
    output = run("--resume", tmp_path / "2")
    assert re.findall(r"^experience (\d)/7", output, re.MULTILINE) == ["5", "6", "7"]
    complete, interrupted_run = tmp_path / "1", tmp_path / "2"
    assert read(interrupted_run)["accuracy_matrix"] == read(complete)["accuracy_matrix"]
    assert (interrupted_run / "learner.safetensors").read_bytes() == (complete / "learner.safetensors").read_bytes()


def test_resume_refuses_changed_experiences(repeated: tuple[Path, str], tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(repeated[0], tmp_path / "1"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["stream"]["repetition"] = 0.9  # leaves the tasks unchanged
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    done = CliRunner().invoke(train, ["--resume", str(folder)])
    assert "its experiences changed after it was started" in str(done.exception)


def test_a_run_of_an_older_version_is_resumed(shapes: Path, tmp_path: Path) -> None:
    run(f"data.path={shapes}", *QUICK, f"run.out={tmp_path}")
    folder = tmp_path / "1"
    matrix = read(folder)["accuracy_matrix"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["stream"] = {key: config["stream"][key] for key in ("tasks", "order")}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    record = read(folder, "run.json")
    del record["identity"]["experiences"]
    files.write_json(folder / "run.json", record)
    for name in ("metrics.json", "progress.json"):
        (folder / name).unlink()
    assert "task 3/3" in run("--resume", folder)
    assert read(folder)["accuracy_matrix"] == matrix


@pytest.mark.parametrize("content", [[], {"ncm": 3}, {"ncm": {"rows": None}}, {"ncm": {"rows": [], "other": 1}}])
def test_damaged_progress_is_refused(content: object, tmp_path: Path) -> None:
    files.write_json(tmp_path / "progress.json", content)
    with pytest.raises(BundleRefusedError, match=r"progress\.json is damaged"):
        storage.ProgressStore(tmp_path)


def test_progress_survives_being_written_and_read(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    state = ({"x": np.arange(3.0)}, {"learner": "ncm"})
    first = storage.LearnerProgress(rows=((0.5, None),), seconds=1.5, state_bytes=10, display="NCM")
    store = storage.ProgressStore(tmp_path)
    assert store.checkpoint("ncm") is None
    store.commit("ncm", first, state)
    restored = storage.ProgressStore(tmp_path)
    assert restored.entry("ncm") == dataclasses.replace(first, checkpoint="ncm-1.safetensors")
    arrays, metadata = restored.checkpoint("ncm")
    assert (arrays["x"].tolist(), metadata) == ([0.0, 1.0, 2.0], {"learner": "ncm"})
    last = dataclasses.replace(first, rows=((0.5, None), (0.5, 1.0)), done=True, class_accuracy={"a": 0.5})
    restored.commit("ncm", last, None)
    assert storage.ProgressStore(tmp_path).entry("ncm") == last
    assert list((tmp_path / "checkpoints").iterdir()) == []


class Constant:
    """A learner that always predicts row 0."""

    def predict(self, embeddings: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(embeddings), dtype=torch.int64)


def test_accuracies_and_tasks() -> None:
    data = StreamData(
        train=torch.arange(8.0).view(4, 2),
        train_rows=torch.tensor([0, 1, 0, 2]),
        test=torch.zeros(5, 2),
        test_rows=torch.tensor([0, 1, 0, 1, 2]),
        train_tasks=(torch.tensor([0]), torch.tensor([1, 2]), torch.tensor([3])),
        test_tasks=(torch.tensor([0, 1, 2, 3]), torch.tensor([4])),
        introduced=(0, 2),
        names=("a", "b", "c"),
        standardisation=None,
    )
    assert [accuracies(Constant(), data, after) for after in range(3)] == [
        [0.5, None],
        [0.5, None],
        [0.5, 0.0],
    ]
    task = data.task(1)
    assert isinstance(task, Task)
    assert task.labels.tolist() == [1, 0]
    assert np.array_equal(task.embeddings.numpy(), [[2, 3], [4, 5]])


def test_every_method_of_a_full_run_has_its_own_style() -> None:
    methods = 2 + len(training.BASELINES) + len(training.PANEL)  # with the learner and joint training
    styles = {figures.learner_style(name) for name in DISPLAY}
    assert methods <= len(styles) == len(DISPLAY)
    for part in ("colour", "dash", "marker"):
        assert len({getattr(style, part) for style in figures.STYLES}) == len(figures.STYLES)
