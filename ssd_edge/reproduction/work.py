"""One cell from its job to its stored result; a killed one goes on after its last task that took long."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
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
from ssd_edge.reproduction.traces import Watch, watch
from ssd_edge.run import metrics, storage
from ssd_edge.run.streams import Stream, make_stream
from ssd_edge.run.tasks import StreamData, prepare
from ssd_edge.run.train import JOINT_NAME

CHECKPOINT_SECONDS = 20.0  # of learning since the last one: below, doing it again is cheaper than keeping it


@dataclasses.dataclass(frozen=True)
class Job:
    """A cell and where its parts are; goes to a worker process.

    Attributes:
        cell: its spec.
        inputs: file of `sources.write_inputs`.
        priors: file of `sources.write_priors`.
        notes: sentences for the page.
        explained: whether they say already where the keys come from.
        stand_in: whether other data took the place of the stream's own.
        result: where to store it.
        checkpoint: where to keep its state meanwhile.
        device: where to compute.
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
    """The cell's stream; where other data stands in, with no more tasks than it has pairs of classes."""
    asked = job.cell["asked"]
    protocol = {key: value for key, value in asked["protocol"].items() if key not in ("classes", "pixels")}
    if job.stand_in:
        protocol["tasks"] = min(protocol["tasks"], len(names) // 2)
    config = StreamConfig(**protocol, order=f"sdmlp-{job.cell['order']}")
    return make_stream(names, config, job.cell["order"])


def run(job: Job) -> dict[str, Any]:
    """Learn the cell's stream, measure, and store the result.

    Returns:
        What was stored, before rounding.

    Raises:
        InputError: the learner diverged.
    """
    inputs, priors = _inputs(job.inputs), _priors(job.priors)
    prepared = prepare(inputs.dataset, stream_of(job, inputs.dataset.classes), inputs, inputs.embedded)
    if job.cell["asked"]["learner"]["name"] == JOINT_NAME:
        learned, learner = _joint(job, prepared)
    else:
        learned, learner = _stream(job, prepared, priors)
    result = {**learned, **_after(learner, prepared, job)}
    cells.write(job.result, result)
    job.checkpoint.unlink(missing_ok=True)
    return result


def _joint(job: Job, prepared: StreamData) -> tuple[dict[str, Any], FineTune]:
    """All tasks at once."""
    values = {key: value for key, value in job.cell["settings"].items() if key != "name"}
    dim, order = prepared.train.shape[1], job.cell["order"]
    learner = FineTune(dim, FineTuneSettings(**values), Priors(), order, job.device)
    began = time.monotonic()
    measured = learner.learn(learners.Task(prepared.train, prepared.train_rows))
    seconds = time.monotonic() - began
    row, _ = _accuracies(learner, prepared, len(prepared.train_tasks) - 1)
    return {"matrix": [row], "learned": None, "measured": _columns([measured]), "seconds": seconds}, learner


def _stream(job: Job, prepared: StreamData, priors: Priors) -> tuple[dict[str, Any], learners.Learner]:
    """One experience after the other, from the checkpoint on if there is one."""
    settings, points, count = job.cell["settings"], job.cell["asked"]["trace"], len(prepared.train_tasks)
    learner, done = _kept(job) or _new(job, prepared, priors)
    watched, kept = watch(learner), time.monotonic()
    for number in range(len(done["rows"]), count):
        task = prepared.task(number)
        if watched is not None:
            watched.begin(task, done["top"])
        look = _looker(watched, prepared, number, settings, points, done["trace"])
        began = time.monotonic()
        measured = learner.learn(task, look)
        done["seconds"] += time.monotonic() - began
        row, _ = _accuracies(learner, prepared, number)
        done["rows"].append(row)
        done["measured"].append({name: float(value) for name, value in measured.items()})
        if watched is not None:
            report, done["top"] = watched.end(len(prepared.names))
            done["neurons"].append(report)
        if time.monotonic() - kept > CHECKPOINT_SECONDS and number + 1 < count:
            arrays, metadata = learners.pack(learner)
            files.make_directory(job.checkpoint.parent)
            files.write_tensors(job.checkpoint, arrays, {"learner": metadata, "done": done})
            kept = time.monotonic()
    learned = list(prepared.introduced)
    result = {
        "matrix": done["rows"],
        "learned": learned,
        "metrics": _summary(done["rows"], learned),
        "measured": _columns(done["measured"]),
        "seconds": done["seconds"],
    }
    if watched is not None:
        result["neurons"] = _columns(done["neurons"])
        result["neurons_overall"] = watched.overall(prepared)
    if done["trace"]:
        result["trace"] = done["trace"]
    return result, learner


def _new(job: Job, prepared: StreamData, priors: Priors) -> tuple[learners.Learner, dict[str, Any]]:
    """A learner at its start, and what is done: nothing."""
    dim, order = prepared.train.shape[1], job.cell["order"]
    learner = learners.build(job.cell["settings"], dim, priors, order, job.device)
    learner.expect(len(prepared.names))
    lists: dict[str, Any] = {name: [] for name in ("rows", "measured", "neurons", "trace")}
    return learner, {**lists, "top": None, "seconds": 0.0, "note": learner.note}


def _kept(job: Job) -> tuple[learners.Learner, dict[str, Any]] | None:
    """The learner as the checkpoint has it, and what is done; None without one, or with one of another version."""
    if not job.checkpoint.exists():
        return None
    try:
        arrays, metadata = files.read_tensors(job.checkpoint)
        learner = learners.restore(arrays, metadata["learner"], job.device)
    except BundleRefusedError:
        return None
    learner.note = metadata["done"]["note"]  # a restored learner does not know how it began
    return learner, metadata["done"]


def _looker(
    watched: Watch | None, prepared: StreamData, number: int, settings: Mapping[str, Any], points: int, trace: list[Any]
) -> Callable[[float], None]:
    """Called once an epoch with the share done: adds a point to the trace every so many epochs."""
    if watched is None or not points:
        return lambda share: None
    epochs = settings["epochs"]
    every = max(1, epochs // points)

    def look(share: float) -> None:
        epoch = round(share * epochs)
        if epoch % every == 0:
            trace.append(watched.point(prepared, number, epoch, trace[-1] if trace else None))

    return look


def _summary(rows: list[Any], learned: list[int]) -> dict[str, Any]:
    found = metrics.summary(rows, learned).to_dict()
    return {name: value for name, value in found.items() if name != "accuracy_matrix"}


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Measurements by name, one entry a task; None where a task has none of that name."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _accuracies(learner: learners.Learner, prepared: StreamData, experience: int) -> tuple[list[float | None], Tensor]:
    """Accuracy on each group of classes that has been introduced, and the rows predicted for all test samples."""
    predicted = learner.predict(prepared.test)
    right = (predicted == prepared.test_rows).double()
    row = [
        float(right[index].mean()) if introduced <= experience else None
        for index, introduced in zip(prepared.test_tasks, prepared.introduced, strict=True)
    ]
    return row, predicted


def _after(learner: learners.Learner, prepared: StreamData, job: Job) -> dict[str, Any]:
    """What is measured once, at the end."""
    row, predicted = _accuracies(learner, prepared, len(prepared.train_tasks) - 1)
    samples = [len(index) for index in prepared.test_tasks]
    newest = prepared.test_rows[prepared.test_tasks[-1]].unique()
    notes = [*job.notes, *([learner.note] if learner.note and not job.explained else [])]
    return {
        "spec": job.cell,
        "stand_in": job.stand_in,
        "accuracy": metrics.weighted_average_accuracy([row], samples),
        "samples": samples,
        "last_task_share": float(representation.last_task_share(predicted, newest)),
        "state_bytes": learner.memory_bytes(),
        "notes": notes,
        "environment": {**storage.environment(), "device": job.device},
    }


def limit_threads() -> None:
    """One thread of PyTorch a process: cells run side by side, and results do not depend on the machine's cores."""
    torch.set_num_threads(1)
