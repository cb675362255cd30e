"""Answers of a finished run: what the report is made of, and that it can be made again without the images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ssd_edge import files, learners
from ssd_edge.errors import BundleRefusedError
from ssd_edge.learners import Task
from ssd_edge.learners.priors import Priors
from ssd_edge.report.html import render
from ssd_edge.run import report


def blobs(each: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings of four classes around the corners of a square, and their rows."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    rows = torch.arange(4).repeat_interleave(each)
    return centres[rows] + spread * torch.randn(len(rows), 2, generator=generator), rows


def test_learning_from_fewer_images_uses_at_most_so_many_per_class() -> None:
    train, rows = blobs(30, 0.6, 0)
    test, test_rows = blobs(200, 0.6, 1)
    seen: list[torch.Tensor] = []

    def build() -> learners.Learner:
        learner = learners.build({"name": "ncm"}, 2, Priors())
        learn = learner.learn

        def recorded(task: learners.Task, *rest: object) -> object:
            seen.append(task.labels.bincount(minlength=4))
            return learn(task, *rest)  # type: ignore[arg-type]

        learner.learn = recorded  # type: ignore[method-assign]
        return learner

    found = report.from_fewer(build, Task(train, rows), report.places(rows, 0), test, test_rows)
    assert [point.images for point in found] == [3, 6, 12, 25]
    assert [counts.tolist() for counts in seen] == [[3] * 4, [6] * 4, [12] * 4, [25] * 4]
    for point in found:
        assert sum(point.right) == pytest.approx(point.accuracy * len(test))
        assert 0.5 < point.accuracy < 1


def test_answers_of_a_run(trained: Path) -> None:
    metrics, record = files.read_json(trained / "metrics.json"), files.read_json(trained / "run.json")
    results = report.of_run(trained, metrics, record, None, "the folder is gone")
    found = results.answers
    assert found.by_class(results.classes) == metrics["class_accuracy"]
    assert len(found.truth) == metrics["test_images"]
    assert sum(results.learned) == metrics["train_images"]
    assert (found.unseen[found.right] <= found.margin[found.right] + 2).all()
    assert np.isfinite(found.sure).all()
    assert found.names[0].partition("/")[0] == results.classes[found.truth[0]]
    assert results.fewer[-1].accuracy == found.accuracy
    assert "Without photographs: the folder is gone" in render(results)


def test_a_class_is_never_answered_as_unseen_with_itself(trained: Path) -> None:
    learner, rejector, record = report.restore(trained)
    statistics = learner.class_statistics()
    means = statistics.means.float()
    rows = torch.arange(len(means))
    found = report.answer(learner, rejector, record, means, rows, [f"{row}" for row in rows])
    assert found.right.all()
    assert (found.margin > 0).all()  # the mean of a class is its most typical image
    assert (found.unseen < found.margin).all()


def test_the_report_shows_photographs(trained: Path) -> None:
    source = (trained / "report.html").read_text()
    assert source.count("<image ") >= 4
    assert "data:image/jpeg;base64," in source


def test_damaged_answers_are_named(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    arrays, metadata = files.read_tensors(run / report.FILE)
    arrays.pop("given")
    files.write_tensors(run / report.FILE, arrays, metadata)
    metrics = json.loads((run / "metrics.json").read_text())
    with pytest.raises(BundleRefusedError, match=r"answers\.safetensors is damaged"):
        report.of_run(run, metrics, {}, None)
