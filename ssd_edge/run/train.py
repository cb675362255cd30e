"""A run: images → embeddings → stream → learners → metrics, resumable experience by experience.

The learner, its baselines and the panel's heads go through the same loop on the same embeddings. Joint
training, the upper bound, is the one that is given all tasks at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssd_edge import files, learners
from ssd_edge.backbones.embedder import open_backbone
from ssd_edge.classes import ClassRegistry
from ssd_edge.config import TrainConfig, to_tree
from ssd_edge.data import load
from ssd_edge.errors import EnvironmentUnfitError, InputError
from ssd_edge.learners import auto
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.gradient.finetune import JOINT, FineTune
from ssd_edge.learners.gradient.penalties import PenaltySettings
from ssd_edge.report import events
from ssd_edge.report.compare import DISPLAY
from ssd_edge.report.events import Listener, Message, TaskLearned
from ssd_edge.report.html import render
from ssd_edge.report.wording import extent, step_name, stream_name
from ssd_edge.run import metrics, storage
from ssd_edge.run.embed import embed
from ssd_edge.run.streams import make_stream
from ssd_edge.run.tasks import StreamData, accuracies, prepare

BASELINES = ("ssd", "sdmlp", "finetune")
PANEL = ("ncm", "slda", "ridge", "ranpac", "fecam", "flymodel")
JOINT_NAME = "joint"
ONE_PASS = {"epochs": 1, "min_steps": 0}  # settings with which a learner sees each sample of a task once


def pick_device(name: str) -> torch.device:
    """The device to compute on; ``auto`` takes CUDA only where a kernel really runs on it.

    Raises:
        EnvironmentUnfitError: CUDA was asked for and does not run.
    """
    if name == "cpu":
        return torch.device("cpu")
    try:
        (torch.zeros(8, device="cuda") + 1).topk(2).values.sum().item()
        return torch.device("cuda")
    except (RuntimeError, AssertionError) as error:
        if name == "cuda":
            raise EnvironmentUnfitError(f"run.device=cuda, but no CUDA kernel runs here ({error}); use cpu") from error
        return torch.device("cpu")


def set_threads(count: int) -> None:
    """PyTorch's threads; 0: one per core that this process may use."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(count or available)


def options_for(name: str, main: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a baseline: those of the main learner where both are trained by gradients, but no penalty."""
    if main["name"] not in BASELINES:
        return {"name": name}
    known = {field.name for field in dataclasses.fields(learners.LEARNERS[name].Settings)}
    known -= {field.name for field in dataclasses.fields(PenaltySettings)}
    return {"name": name, **{key: value for key, value in main.items() if key in known}}


def once(options: Mapping[str, Any], online: bool) -> dict[str, Any]:
    """A learner's settings, with a single epoch where the stream is online and the learner makes epochs.

    Raises:
        InputError: the stream is online, but more passes were asked for; or a wrong setting.
    """
    given = learners.settings_of(options)
    fixed = {key: value for key, value in ONE_PASS.items() if online and hasattr(given, key)}
    for key, value in fixed.items():
        if key in options and getattr(given, key) != value:
            raise InputError(
                f"learner.{key} is {getattr(given, key)}, but stream.online=true gives each sample once; "
                "leave one of the two out"
            )
    return {**options, **fixed}


class Run:
    """One run in its folder. `execute` goes from wherever the last one stopped to the end."""

    def __init__(self, config: TrainConfig, listener: Listener) -> None:
        self.config, self.listener = config, listener
        self.prepared: StreamData | None = None
        undecided = auto.wanted(config.learner)
        self.device = pick_device(config.run.device)
        self.dataset = load(config.data, config.run.seed)
        self.embedder = open_backbone(config.backbone, self.device)
        self.settings = None if undecided else self._settings()  # fails on a wrong one before any work is done
        self.stream = make_stream(self.dataset.classes, config.stream, config.run.seed)
        self.experiences = self.stream.experiences(self.dataset.train_labels)

    def _settings(self) -> Any:
        config, embedder = self.config, self.embedder
        options = once(config.learner, config.stream.online)
        return learners.build(options, embedder.dim, embedder.priors, config.run.seed).settings

    def choose(self) -> auto.Choice:
        """Settle ``learner.name=auto`` by the training images: from here on the configuration names a learner."""
        self._prepare()
        data, listener = self.prepared, self.listener
        with events.progress(listener, "choosing a learner") as update:
            choice = auto.choose(
                data.train,
                data.train_rows,
                self.embedder.priors,
                self.config.run.seed,
                self.device,
                lambda share, name: update(0, share, name),
            )
        listener(Message(f"learner.name={learners.AUTO} takes {choice.sentence}"))
        self.config = dataclasses.replace(self.config, learner={"name": choice.name})
        self.settings = self._settings()
        return choice

    def attach(self, folder: Path) -> Run:
        """Work in this folder, from whatever progress it holds."""
        self.folder, self.progress = folder, storage.Progress(folder)
        return self

    def identity(self) -> dict[str, Any]:
        """What must be the same when the run is taken up again."""
        samples = [indices.tolist() for indices in self.experiences]
        return {
            "data": self.dataset.fingerprint,
            "backbone": self.embedder.identity,
            "tasks": [list(task) for task in self.stream.tasks],
            "experiences": hashlib.sha256(files.json_bytes(samples)).hexdigest(),
        }

    def _prepare(self) -> None:
        if self.prepared is None:
            started = time.monotonic()
            embedded = embed(self.dataset, self.embedder, self.listener, self.config.backbone.cache)
            self.prepared = prepare(self.dataset, self.stream, self.embedder, embedded)
            self.embed_seconds = time.monotonic() - started

    def execute(self) -> dict[str, Any]:
        """Run every system, write all results, and return the metrics."""
        config, listener = self.config, self.listener
        self._prepare()
        prepared = self.prepared
        main = config.learner["name"]
        listener(
            Message(
                f"{self.dataset.name}: {len(prepared.train):,} training and {len(prepared.test):,} test images, "
                f"{extent(len(prepared.names), len(prepared.test_tasks), len(prepared.train_tasks))}, "
                f"{stream_name(config.stream.kind, config.stream.online)}, order {config.stream.order}"
            )
        )
        results = {main: self._stream(config.learner, announce=True)}
        others = [*(BASELINES if config.run.baselines else ()), *(PANEL if config.run.panel else ())]
        for name in others:
            if name not in results:
                results[name] = self._stream(options_for(name, config.learner), announce=False)
        if config.run.panel:
            results[JOINT_NAME] = self._joint()
        return self._finish(results)

    def _stream(self, options: Mapping[str, Any], announce: bool) -> dict[str, Any]:
        """Take one learner through the experiences, from its last checkpoint on."""
        prepared, config, listener = self.prepared, self.config, self.listener
        options = once(options, config.stream.online)
        name, tasks = options["name"], len(prepared.train_tasks)
        step = step_name(len(prepared.test_tasks), tasks)
        entry = self.progress.entry(name)
        if not entry["done"]:
            checkpoint = self.progress.checkpoint(name)
            if checkpoint is None:
                learner = learners.build(options, self.embedder.dim, self.embedder.priors, config.run.seed, self.device)
                learner.expect(len(prepared.names))
                if learner.note:
                    listener(Message(f"{learner.display}: {learner.note}"))
            else:
                learner = learners.restore(*checkpoint, device=self.device)
            with events.progress(listener, learner.display, tasks, step) as update:
                for number in range(len(entry["rows"]), tasks):
                    began, task = time.monotonic(), prepared.task(number)
                    learner.learn(task, lambda share, n=number: update(n, share))
                    seconds = time.monotonic() - began
                    row = accuracies(learner, prepared, number)
                    last = number + 1 == tasks
                    state = learners.pack(learner)
                    if last and announce:
                        self._keep(learner, state)
                    self.progress.commit(
                        name,
                        None if last else state,
                        rows=[*entry["rows"], row],
                        seconds=entry["seconds"] + seconds,
                        state_bytes=learner.memory_bytes(),
                        display=learner.display,
                        done=last,
                        **({"class_accuracy": self._class_accuracy(learner)} if last and announce else {}),
                    )
                    if announce:
                        seen = [accuracy for accuracy in row if accuracy is not None]
                        classes = tuple(prepared.names[r] for r in task.rows.tolist())
                        mean = sum(seen) / len(seen)
                        listener(TaskLearned(number, tasks, classes, mean, tuple(seen), seconds, step))
            if not announce:
                result = self._result(name)
                listener(Message(f"{result['display']}: average accuracy {result['average_accuracy']:.3f}"))
        return self._result(name)

    def _result(self, name: str) -> dict[str, Any]:
        rows = self.progress.entry(name)["rows"]
        return {**metrics.summary(rows, self.prepared.introduced), **self._cost(name)}

    def _cost(self, name: str) -> dict[str, Any]:
        entry = self.progress.entry(name)
        display = entry.get("display", DISPLAY[name])  # of a learner with a penalty: SDMLP+EWC
        return {"display": display, "seconds": entry["seconds"], "state_bytes": entry["state_bytes"]}

    def _class_accuracy(self, learner: learners.Learner) -> dict[str, float]:
        right = (learner.predict(self.prepared.test) == self.prepared.test_rows).double()
        return {
            name: float(right[self.prepared.test_rows == row].mean()) for row, name in enumerate(self.prepared.names)
        }

    def _joint(self) -> dict[str, Any]:
        """All tasks at once: what a network of this size can know of these embeddings."""
        entry, prepared = self.progress.entry(JOINT_NAME), self.prepared
        if not entry["done"]:
            neurons = self.settings.neurons if "neurons" in self.config.learner else JOINT.neurons
            settings = dataclasses.replace(JOINT, neurons=neurons)
            learner = FineTune(self.embedder.dim, settings, self.embedder.priors, self.config.run.seed, self.device)
            began = time.monotonic()
            with events.progress(self.listener, JOINT_NAME) as update:
                task = learners.Task(prepared.train, prepared.train_rows)
                learner.learn(task, lambda share: update(0, share))
            row = accuracies(learner, prepared, len(prepared.train_tasks) - 1)
            seconds, size = time.monotonic() - began, learner.memory_bytes()
            self.progress.commit(JOINT_NAME, None, rows=[row], seconds=seconds, state_bytes=size, done=True)
            self.listener(Message(f"{JOINT_NAME}: average accuracy {sum(row) / len(row):.3f}"))
        row = entry["rows"][0]
        none = dict.fromkeys(metrics.summary([[0.0]]))  # there was no stream to measure
        return {**none, "average_accuracy": sum(row) / len(row), **self._cost(JOINT_NAME)}

    def _keep(self, learner: learners.Learner, state: tuple[dict[str, np.ndarray], dict[str, Any]]) -> None:
        """Write what a deployment and an evaluation need."""
        prepared, folder = self.prepared, self.folder
        files.write_tensors(folder / "learner.safetensors", *state)
        statistics = ClassStatistics(prepared.train.shape[1])
        statistics.add(prepared.train, prepared.train_rows)
        arrays = {name: tensor.numpy() for name, tensor in statistics.state().items()}
        files.write_tensors(folder / "statistics.safetensors", arrays)
        registry = ClassRegistry()
        for row, name in enumerate(prepared.names):
            registry = registry.add(name, "base", int((prepared.train_rows == row).sum()))
        files.write_json(folder / "classes.json", registry.to_json())
        if prepared.standardisation is not None:
            mu, sigma = prepared.standardisation
            files.write_tensors(folder / "standardisation.safetensors", {"mu": mu, "sigma": sigma})

    def _finish(self, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Metrics, report and the run's record, in this order: a run is finished when its record says so."""
        prepared, name = self.prepared, self.config.learner["name"]
        main, groups = results[name], self.stream.groups(self.dataset.train_labels)
        panel = {other: results[other] for other in (*PANEL, JOINT_NAME) if other in results and other != name}
        result = {
            **main,
            "learner": name,
            "data": self.dataset.name,
            "split": self.dataset.split,
            "classes": list(prepared.names),
            "tasks": [
                {"classes": [self.dataset.classes[label] for label in task], "train": len(train), "test": len(test)}
                for task, train, test in zip(self.stream.tasks, groups, prepared.test_tasks, strict=True)
            ],
            "stream": {"kind": self.config.stream.kind, "online": self.config.stream.online},
            "introduced": list(prepared.introduced),
            "experiences": [
                {"classes": [prepared.names[row] for row in rows.unique().tolist()], "train": len(rows)}
                for rows in (prepared.train_rows[index] for index in prepared.train_tasks)
            ],
            "train_images": len(prepared.train),
            "test_images": len(prepared.test),
            "class_accuracy": self.progress.entry(name)["class_accuracy"],
            "embed_seconds": self.embed_seconds,
            "baselines": {other: results[other] for other in BASELINES if other in results and other != name},
            "panel": {other: values["average_accuracy"] for other, values in panel.items()},
            "panel_details": panel,
        }
        record = files.read_json(self.folder / "run.json")
        if "choice" in record:
            result["choice"] = record["choice"]
        files.write_json(self.folder / "metrics.json", result)
        record.update(status="finished", finished=record.get("finished") or storage.now())
        files.write_text(self.folder / "report.html", render(result, record))
        files.write_json(self.folder / "run.json", record)
        return result


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Paths as they are from anywhere: a run may be resumed or deployed from another folder or environment."""

    def absolute(path: str) -> str:
        for found in (Path(path), Path(os.environ.get("SSD_EDGE_DATA", "")) / path):
            if path and found.exists():
                return str(found.absolute())
        return path

    backbone = dataclasses.replace(
        config.backbone, path=absolute(config.backbone.path), onnx=absolute(config.backbone.onnx)
    )
    path = config.data.path
    data = dataclasses.replace(config.data, path=path if path == "digits" else absolute(path))
    return dataclasses.replace(config, backbone=backbone, data=data)


def start(config: TrainConfig, argv: list[str], listener: Listener) -> Run:
    """A new run; its folder is made only when configuration, data and backbone have proved usable.

    Raises:
        InputError: bad configuration or data.
    """
    set_threads(config.run.threads)
    config = with_absolute_paths(config)
    run = Run(config, listener)
    choice = {"choice": run.choose().to_json()} if auto.wanted(config.learner) else {}
    config = run.config
    folder = storage.new_folder(Path(config.run.out))
    storage.write_config(folder, config)
    files.write_json(
        folder / "backbone.json",
        {
            "kind": "onnx" if config.backbone.onnx else "package",
            "path": config.backbone.onnx or config.backbone.path,
            "identity": run.embedder.identity,
            "size": run.embedder.size,
            "dim": run.embedder.dim,
            "standardised": run.embedder.standardised,
            "provenance": run.embedder.provenance,
        },
    )
    record = {
        "argv": argv,
        "seed": config.run.seed,
        "started": storage.now(),
        "status": "running",
        "identity": run.identity(),
        "config": to_tree(config),
        "backbone": {"identity": run.embedder.identity, "provenance": run.embedder.provenance},
        **choice,
        **storage.environment(),
    }
    files.write_json(folder / "run.json", record)
    return run.attach(folder)


def resume(folder: Path, listener: Listener) -> Run:
    """A run that was interrupted, to be continued.

    Raises:
        InputError: not a run, or its data or backbone have changed.
    """
    config = storage.open_folder(folder)
    record = files.read_json(folder / "run.json")
    set_threads(config.run.threads or int(record.get("threads", 0)))
    for difference in storage.changed_environment(record):
        listener(Message(f"warning: {difference}; the resumed weights may differ in their last bits"))
    run = Run(config, listener).attach(folder)
    present = run.identity()
    for key, value in record.get("identity", {}).items():
        if present[key] != value:
            raise InputError(f"{folder} cannot be resumed: its {key} has changed since it was started; start a new run")
    return run
