"""One cell from its job to its file against an explicit loop, and resuming a killed cell."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ssd_edge import learners
from ssd_edge.data import Dataset, Images
from ssd_edge.errors import InputError
from ssd_edge.learners import Task
from ssd_edge.learners.gradient.sdmlp import SDMLPLearner
from ssd_edge.learners.priors import Priors
from ssd_edge.reproduction import cells, runner, work
from ssd_edge.reproduction.sources import Inputs, read_inputs, read_priors, write_inputs, write_priors
from ssd_edge.reproduction.work import Job

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES, DIM, TRAIN, TEST = 10, 12, 30, 7
SETTINGS = {"neurons": 40, "k": 4, "epochs": 4, "lr": 0.5, "pretrained": False}


def blobs(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ten Gaussian classes; test sets differ in size, so that means over tasks and over samples differ."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(CLASSES, DIM))
    labels = np.concatenate([np.full(count + (seed == 2) * label, label) for label in range(CLASSES)])
    return (centres[labels] + 0.5 * rng.normal(size=(len(labels), DIM))).astype(np.float32), labels


def inputs() -> Inputs:
    (train, train_labels), (test, test_labels) = blobs(TRAIN, 1), blobs(TEST, 2)
    empty, names = Images([], ()), tuple(str(label) for label in range(CLASSES))
    dataset = Dataset("blobs", names, empty, train_labels, empty, test_labels, "fingerprint", "", True)
    return Inputs(dataset, {"train": train, "test": test}, "identity", Priors())


def job(folder: Path, name: str, order: int = 3, trace: int = 0, **settings: object) -> Job:
    if name == "joint":
        learner = {**cells.known_settings("joint"), "neurons": 40, "epochs": 60, "min_steps": 0, "name": "joint"}
    else:
        learner = {"name": name, **dataclasses.asdict(learners.settings_class(name)(**settings))}
    setup = cells.Setup("cifar10", learner, order, (), trace)
    cell = cells.spec(setup, cells.Provenance("fingerprint", "identity"))
    folder.mkdir(exist_ok=True)
    return Job(
        cell=cell,
        inputs=write_inputs(folder, inputs()),
        priors=write_priors(folder, Priors()),
        notes=("a note",),
        explained=False,
        stand_in=False,
        result=folder / "out" / cells.file_name(cell),
        checkpoint=folder / "checkpoints" / "x.safetensors",
    )


@pytest.mark.parametrize("name", ["ncm", "sdmlp"])
def test_a_cell_equals_the_explicit_loop(name: str, tmp_path: Path) -> None:
    settings = SETTINGS if name == "sdmlp" else {}
    result = work.run(job(tmp_path, name, **settings))
    order = np.random.RandomState(3).choice(10, 10, replace=False)  # sdmlp-3
    assert order.tolist() == [5, 4, 1, 2, 9, 6, 7, 0, 3, 8]
    row_of = np.argsort(order)
    made = inputs()
    train, rows = torch.from_numpy(made.embedded["train"]), torch.from_numpy(row_of[made.dataset.train_labels])
    test, truth = torch.from_numpy(made.embedded["test"]), row_of[made.dataset.test_labels]
    learner = learners.build({"name": name, **settings}, DIM, Priors(), 3)
    learner.expect(10)
    matrix = []
    for task in range(5):
        index = torch.nonzero(rows // 2 == task)[:, 0]
        learner.learn(Task(train[index], rows[index]))
        answers = learner.predict(test).numpy()
        accuracy = [(answers[truth // 2 == t] == truth[truth // 2 == t]).mean() for t in range(task + 1)]
        matrix.append([*accuracy, *[None] * (4 - task)])
    assert result["learned"] == [0, 1, 2, 3, 4]
    for ours, wanted in zip(result["matrix"], matrix, strict=True):
        assert ours == pytest.approx(wanted)
    assert result["accuracy"] == pytest.approx((answers == truth).mean())
    assert result["accuracy"] != pytest.approx(np.mean(matrix[-1]), abs=1e-6)
    assert result["last_task_share"] == pytest.approx(np.isin(answers, [8, 9]).mean())
    assert result["samples"] == [(truth // 2 == t).sum() for t in range(5)]
    wanted = np.mean([matrix[4][t] - matrix[t][t] for t in range(4)])
    assert result["metrics"]["backward_transfer"] == pytest.approx(wanted)
    assert result["notes"] == ["a note"]
    assert result["environment"]["threads"] == 1
    stored = json.loads((tmp_path / "out" / cells.file_name(result["spec"])).read_text())
    assert stored == json.loads(json.dumps(cells.rounded(result)))


def test_joint_training_sees_all_classes_at_once(tmp_path: Path) -> None:
    result = work.run(job(tmp_path, "joint"))
    assert result["learned"] is None
    assert len(result["matrix"]) == 1
    assert result["accuracy"] > 0.5
    assert "metrics" not in result


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("name", "trace"), [("sdmlp", 2), ("ssd", 0)])
def test_a_killed_cell_resumes_from_its_checkpoint(name: str, trace: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(work, "CHECKPOINT_SECONDS", 0.0)
    uninterrupted = work.run(job(tmp_path / "whole", name, trace=trace, **SETTINGS))
    learned, learn = [], SDMLPLearner.learn

    def counted(self, task, progress=None):
        learned.append(len(self.seen))
        if len(learned) == 4:
            raise Killed
        return learn(self, task, progress)

    monkeypatch.setattr(SDMLPLearner, "learn", counted)
    cut = job(tmp_path / "cut", name, trace=trace, **SETTINGS)
    with pytest.raises(Killed):
        work.run(cut)
    assert cut.checkpoint.exists()
    assert not cut.result.exists()
    resumed = work.run(cut)
    assert learned == [0, 2, 4, 6, 6, 8]  # resumes at the fourth task, not the first
    assert not cut.checkpoint.exists()
    for one in (uninterrupted, resumed):
        del one["seconds"], one["environment"]
    assert resumed == uninterrupted


def test_an_unreadable_checkpoint_is_ignored(tmp_path: Path) -> None:
    one = job(tmp_path, "sdmlp", **SETTINGS)
    one.checkpoint.parent.mkdir()
    one.checkpoint.write_bytes(b"of another version")
    assert len(work.run(one)["matrix"]) == 5
    assert not one.checkpoint.exists()


def test_neuron_statistics_are_recorded_after_each_task(tmp_path: Path) -> None:
    result = work.run(job(tmp_path, "ssd", **SETTINGS))
    neurons, overall = result["neurons"], result["neurons_overall"]
    assert max(neurons["class_entropy"]) < np.log(2) + 1e-9  # each task has two classes
    assert overall["class_entropy"] > np.log(2)  # all tasks together have ten
    assert all(len(values) == 5 for values in neurons.values())
    bound = -(0.1 * np.log(0.1) + 0.9 * np.log(0.9))  # k/r = 4/40
    assert neurons["activation_entropy_bound"] == pytest.approx([bound] * 5)
    for name in ("subnetwork_cosine", "teacher_divergence", "top_n_jaccard"):
        assert neurons[name][0] is None  # there is no teacher yet
        assert all(0 <= value <= 1 for value in neurons[name][1:])
    assert min(neurons["subnetwork_cosine"][1:]) > 0.5


def test_a_trace_records_training(tmp_path: Path) -> None:
    result = work.run(job(tmp_path, "sdmlp", trace=2, **SETTINGS))
    assert [(point["task"], point["epoch"]) for point in result["trace"]] == [(t, e) for t in range(5) for e in (2, 4)]
    last = result["trace"][-1]
    assert last["test_accuracy"] == pytest.approx(result["matrix"][-1])  # all classes are learned: same argmax
    first, second = result["trace"][:2]
    assert len(set(first["top"])) == 4
    shared, every = set(first["top"]) & set(second["top"]), set(first["top"]) | set(second["top"])
    assert second["jaccard"] == pytest.approx(len(shared) / len(every))
    assert result["trace"][0]["jaccard"] is None
    untraced = work.run(job(tmp_path / "other", "sdmlp", **SETTINGS))
    assert untraced["matrix"] == result["matrix"]  # tracing does not change the result


def test_an_error_is_reported_and_not_raised(tmp_path: Path, monkeypatch) -> None:
    def diverge(self, task, progress=None):
        raise InputError("it diverged; lower learner.lr")

    bad = job(tmp_path, "sdmlp", **SETTINGS)
    monkeypatch.setattr(SDMLPLearner, "learn", diverge)
    outcome = runner.attempt(bad)
    assert (outcome.code, outcome.text) == (2, "it diverged; lower learner.lr")
    monkeypatch.setattr(SDMLPLearner, "learn", lambda self, task, progress: 1 / 0)
    outcome = runner.attempt(bad)
    assert outcome.code == 1
    assert "ZeroDivisionError" in outcome.text
    assert not bad.result.exists()


def test_workers_read_what_was_written(tmp_path: Path) -> None:
    made = inputs()
    read = read_inputs(write_inputs(tmp_path, made))
    for part in ("train", "test"):
        np.testing.assert_array_equal(read.embedded[part], made.embedded[part])
    np.testing.assert_array_equal(read.dataset.test_labels, made.dataset.test_labels)
    assert (read.dataset.classes, read.dataset.name) == (made.dataset.classes, "blobs")
    keys = np.eye(4, 3, dtype=np.float32)
    priors = Priors(count=7, keys=keys, counters=np.ones(4, np.float32), student={"k": 2, "shift": 0.5})
    again = read_priors(write_priors(tmp_path, priors))
    np.testing.assert_array_equal(again.keys, keys)
    assert (again.count, again.student, again.within_covariance) == (7, priors.student, None)
