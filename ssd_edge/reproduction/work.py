"""Run one cell and store its result; an interrupted cell resumes from its last checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssd_edge import files, learners
from ssd_edge.config import StreamConfig
from ssd_edge.errors import BundleRefusedError
from ssd_edge.learners.gradient import representation
from ssd_edge.learners.gradient.finetune import FineTune
from ssd_edge.learners.gradient.finetune import Settings as FineTuneSettings
from ssd_edge.learners.priors import Priors
from ssd_edge.reproduction import cells, sources
from ssd_edge.reproduction.cells import Result, TracePoint
from ssd_edge.reproduction.traces import Watch, watch
from ssd_edge.run import metrics, storage
from ssd_edge.run.streams import Stream, make_stream
from ssd_edge.run.tasks import StreamData, prepare
from ssd_edge.run.train import JOINT_NAME

CHECKPOINT_SECONDS = 20.0  # of learning between checkpoints: repeating less is cheaper than storing it


@dataclasses.dataclass
class _Progress:
    """State of an unfinished cell besides its learner; stored in the checkpoint."""

    rows: list[list[float | None]] = dataclasses.field(default_factory=list)
    measured: list[dict[str, float]] = dataclasses.field(default_factory=list)
    neurons: list[dict[str, float | None]] = dataclasses.field(default_factory=list)
    trace: list[TracePoint] = dataclasses.field(default_factory=list)
    top: list[int] | None = None
    seconds: float = 0.0
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Job:
    """A cell to run in a worker process.

    Attributes:
        cell: Spec of the cell.
        inputs: File written by `sources.write_inputs`.
        priors: File written by `sources.write_priors`.
        notes: Notes for the page.
        explained: True if the notes already say where the keys come from.
        stand_in: True if another data set replaces that of the stream.
        result: File for the result.
        checkpoint: File for the state of an unfinished cell.
        device: Device to compute on.
    """

    cell: dict[str, Any]
    inputs: Path
    priors: Path
    notes: tuple[str, ...]
    explained: bool
    stand_in: bool
    result: Path
    checkpoint: Path
    device: str = "cpu"


_inputs = functools.lru_cache(maxsize=2)(sources.read_inputs)
_priors = functools.lru_cache(maxsize=4)(sources.read_priors)


def stream_of(job: Job, names: tuple[str, ...]) -> Stream:
    """Return the stream of the cell; a stand-in data set gets at most one task per two classes."""
    asked = job.cell["asked"]
    protocol = {key: value for key, value in asked["protocol"].items() if key not in ("classes", "pixels")}
    if job.stand_in:
        protocol["tasks"] = min(protocol["tasks"], len(names) // 2)
    config = StreamConfig(**protocol, order=f"sdmlp-{job.cell['order']}")
    return make_stream(names, config, job.cell["order"])


def run(job: Job) -> Result:
    """Learn the cell's stream, measure, and store the result.

    Returns:
        The stored result, before rounding.

    Raises:
        InputError: The learner diverged.
    """
    inputs, priors = _inputs(job.inputs), _priors(job.priors)
    prepared = prepare(inputs.dataset, stream_of(job, inputs.dataset.classes), True, inputs.embedded)
    joint = job.cell["asked"]["learner"]["name"] == JOINT_NAME
    result, learner = _joint(job, prepared) if joint else _stream(job, prepared, priors)
    result.update(_evaluate(learner, prepared, job))
    cells.write(job.result, result)
    job.checkpoint.unlink(missing_ok=True)
    return result


def _joint(job: Job, prepared: StreamData) -> tuple[Result, learners.Learner]:
    """Learn all tasks at once."""
    values = {key: value for key, value in job.cell["settings"].items() if key != "name"}
    dim, order = prepared.train.shape[1], job.cell["order"]
    learner = FineTune(dim, FineTuneSettings(**values), Priors(), order, job.device)
    began = time.monotonic()
    measured = learner.learn(learners.Task(prepared.train, prepared.train_rows))
    seconds = time.monotonic() - began
    row, _ = _accuracies(learner, prepared, len(prepared.train_tasks) - 1)
    return {"matrix": [row], "learned": None, "measured": _columns([measured]), "seconds": seconds}, learner


def _stream(job: Job, prepared: StreamData, priors: Priors) -> tuple[Result, learners.Learner]:
    """Learn one experience after the other, starting from the checkpoint if there is one."""
    settings, points, count = job.cell["settings"], job.cell["asked"]["trace"], len(prepared.train_tasks)
    learner, done = _restore(job) or _build(job, prepared, priors)
    watched, saved = watch(learner), time.monotonic()
    for number in range(len(done.rows), count):
        task = prepared.task(number)
        if watched is not None:
            watched.begin(task, done.top)
        look = _looker(watched, prepared, number, settings, points, done.trace)
        began = time.monotonic()
        measured = learner.learn(task, look)
        done.seconds += time.monotonic() - began
        row, _ = _accuracies(learner, prepared, number)
        done.rows.append(row)
        done.measured.append({name: float(value) for name, value in measured.items()})
        if watched is not None:
            report, done.top = watched.end(len(prepared.names))
            done.neurons.append(report)
        if time.monotonic() - saved > CHECKPOINT_SECONDS and number + 1 < count:
            arrays, metadata = learners.pack(learner)
            files.make_directory(job.checkpoint.parent)
            files.write_tensors(job.checkpoint, arrays, {"learner": metadata, "done": dataclasses.asdict(done)})
            saved = time.monotonic()
    learned = list(prepared.introduced)
    summary = metrics.summary(done.rows, learned).to_dict()
    result: Result = {
        "matrix": done.rows,
        "learned": learned,
        "metrics": {name: value for name, value in summary.items() if name != "accuracy_matrix"},
        "measured": _columns(done.measured),
        "seconds": done.seconds,
    }
    if watched is not None:
        result["neurons"] = _columns(done.neurons)
        result["neurons_overall"] = watched.overall(prepared)
    if done.trace:
        result["trace"] = done.trace
    return result, learner


def _build(job: Job, prepared: StreamData, priors: Priors) -> tuple[learners.Learner, _Progress]:
    """Return a new learner and an empty state."""
    dim, order = prepared.train.shape[1], job.cell["order"]
    learner = learners.build(job.cell["settings"], dim, priors, order, job.device)
    learner.expect(len(prepared.names))
    return learner, _Progress(note=learner.note)


def _restore(job: Job) -> tuple[learners.Learner, _Progress] | None:
    """Return learner and state of the checkpoint; None if there is none, or only one of another version."""
    if not files.exists(job.checkpoint):
        return None
    try:
        arrays, metadata = files.read_tensors(job.checkpoint)
        learner, done = learners.restore(arrays, metadata["learner"], job.device), _Progress(**metadata["done"])
    except (BundleRefusedError, TypeError):
        return None
    learner.note = done.note  # is not part of the state of a learner
    return learner, done


def _looker(
    watched: Watch | None,
    prepared: StreamData,
    number: int,
    settings: Mapping[str, Any],
    points: int,
    trace: list[TracePoint],
) -> Callable[[float], None]:
    """Return a callback for the completed share of a task that adds `points` evenly spaced points to the trace."""
    if watched is None or not points:
        return lambda share: None
    epochs = settings["epochs"]
    every = max(1, epochs // points)

    def look(share: float) -> None:
        epoch = round(share * epochs)
        if epoch % every == 0:
            trace.append(watched.point(prepared, number, epoch, trace[-1] if trace else None))

    return look


def _columns(rows: Sequence[Mapping[str, float | None]]) -> dict[str, list[float | None]]:
    """Return measurements by name with one entry per task, which is None if the task lacks it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _accuracies(learner: learners.Learner, prepared: StreamData, experience: int) -> tuple[list[float | None], Tensor]:
    """Return accuracy on each group of classes introduced so far, and the predicted rows of all test samples."""
    predicted = learner.predict(prepared.test)
    right = (predicted == prepared.test_rows).double()
    row = [
        float(right[index].mean()) if introduced <= experience else None
        for index, introduced in zip(prepared.test_tasks, prepared.introduced, strict=True)
    ]
    return row, predicted


def _evaluate(learner: learners.Learner, prepared: StreamData, job: Job) -> Result:
    """Return the part of the result that is measured after the last task."""
    row, predicted = _accuracies(learner, prepared, len(prepared.train_tasks) - 1)
    samples = [len(index) for index in prepared.test_tasks]
    newest = torch.unique(prepared.test_rows[prepared.test_tasks[-1]])
    notes = [*job.notes, *([learner.note] if learner.note and not job.explained else [])]
    return {
        "spec": job.cell,
        "stand_in": job.stand_in,
        "accuracy": metrics.weighted_average_accuracy([row], samples),
        "accuracy_task_given": _task_given(learner, prepared),
        "samples": samples,
        "last_task_share": float(representation.last_task_share(predicted, newest)),
        "state_bytes": learner.memory_bytes(),
        "notes": notes,
        "environment": {**storage.environment(), "device": job.device},
    }


def _task_given(learner: learners.Learner, prepared: StreamData) -> float:
    """Return the accuracy on all test samples if each is only compared with the classes of its task."""
    right = 0
    for index in prepared.test_tasks:
        rows = torch.unique(prepared.test_rows[index])
        best = learner.scores(prepared.test[index])[:, rows].argmax(1)
        right += int((rows[best] == prepared.test_rows[index]).sum())
    return right / sum(len(index) for index in prepared.test_tasks)


def limit_threads() -> None:
    """Use one PyTorch thread: cells run in parallel, and results must not depend on the number of cores."""
    torch.set_num_threads(1)
