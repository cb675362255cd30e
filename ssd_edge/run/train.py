"""Training runs: embed the images, train the learners on the stream, and write metrics and a report.

The main learner, the baselines and the panel go through the same loop on the same embeddings. Joint training, an upper
bound, sees all tasks at once. A run can be resumed after any finished task.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ssd_edge import files, learners
from ssd_edge.backbones import names
from ssd_edge.backbones.embedder import open_backbone, write_backbone
from ssd_edge.classes import ClassRegistry
from ssd_edge.config import TrainConfig, parse, to_tree
from ssd_edge.data import load
from ssd_edge.errors import EnvironmentUnfitError, InputError, printable
from ssd_edge.learners import auto
from ssd_edge.learners.gradient.finetune import JOINT, FineTune
from ssd_edge.learners.gradient.penalties import PenaltySettings
from ssd_edge.learners.registry import BASELINES, PANEL
from ssd_edge.learners.retention import TrackRecord
from ssd_edge.learners.unknown import Rejector, held_out_parts
from ssd_edge.report import events
from ssd_edge.report.compare import DISPLAY
from ssd_edge.report.events import Listener, Message, TaskLearned
from ssd_edge.report.html import render
from ssd_edge.report.wording import extent, percent, step_name, stream_name
from ssd_edge.run import metrics, preprocessing, report, storage
from ssd_edge.run.embed import embed, embed_second
from ssd_edge.run.metrics import Summary
from ssd_edge.run.on_ray import Engine, check
from ssd_edge.run.results import LearnerResult, RunResult, TaskInfo
from ssd_edge.run.storage import LearnerProgress
from ssd_edge.run.streams import make_stream
from ssd_edge.run.tasks import StreamData, accuracies, prepare
from ssd_edge.system import usable_cores, utc_now

JOINT_NAME = "joint"
JOINT_STEPS = 700  # at least; on photographs and 2,064 features, 2,000 take three times as long for 0.7 points more
ONE_PASS = {"epochs": 1, "min_steps": 0}  # settings for a single pass over the samples of a task


def pick_device(name: str) -> torch.device:
    """Return the device to compute on; ``auto`` selects CUDA only if a kernel runs on it.

    Raises:
        EnvironmentUnfitError: If `name` is ``cuda`` and no kernel runs on it.
    """
    if name == "cpu":
        return torch.device("cpu")
    try:
        (torch.zeros(8, device="cuda") + 1).topk(2).values.sum().item()
        return torch.device("cuda")
    except (RuntimeError, AssertionError) as error:
        if name == "cuda":
            raise EnvironmentUnfitError(f"run.device=cuda, but no CUDA kernel runs ({error}); use cpu") from error
        return torch.device("cpu")


def set_threads(count: int) -> None:
    """Set the number of PyTorch threads; 0 for one per core that this process may use."""
    torch.set_num_threads(count or usable_cores())


def options_for(name: str, main: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a comparison learner.

    A baseline takes over the settings that it shares with a main learner trained by gradients, except penalties.
    """
    if main["name"] not in BASELINES:
        return {"name": name}
    known = {field.name for field in dataclasses.fields(learners.LEARNERS[name].Settings)}
    known -= {field.name for field in dataclasses.fields(PenaltySettings)}
    return {"name": name, **{key: value for key, value in main.items() if key in known}}


def limit_epochs(options: Mapping[str, Any], online: bool) -> dict[str, Any]:
    """Return a learner's settings, limited to a single epoch if the stream is online.

    Raises:
        InputError: If the stream is online but several epochs are set, or if a setting is wrong.
    """
    given = learners.settings_of(options)
    fixed = {key: value for key, value in ONE_PASS.items() if online and hasattr(given, key)}
    for key, value in fixed.items():
        if key in options and getattr(given, key) != value:
            raise InputError(
                f"learner.{key} is {getattr(given, key)}, but stream.online=true gives each sample once; "
                f"leave out learner.{key} or stream.online"
            )
    return {**options, **fixed}


class Setup:
    """Data set, backbone and stream of a configuration, checked before the run's folder is created.

    Args:
        config: Configuration of the run.
        listener: Receives progress events.
        folder: Folder of a run that is resumed, which has its backbone; None for a new run.
        engine: Cluster that embeds and adds up; None for this process.

    Raises:
        InputError: If a setting, the data or the backbone cannot be used.
    """

    def __init__(
        self, config: TrainConfig, listener: Listener, folder: Path | None = None, engine: Engine | None = None
    ) -> None:
        self.config, self.listener, self.engine = config, listener, engine
        undecided = auto.wanted(config.learner)
        if engine is not None:
            check(config.learner)
        self.device = pick_device(config.run.device)
        self.dataset = load(config.data, config.run.seed) if engine is None else engine.load(config, listener)
        for sentence in self.dataset.accounts.sentences():
            listener(Message(sentence))
        self.embedder = open_backbone(config.backbone, self.device, folder, lambda text: listener(Message(text)))
        if not undecided:
            self._check_learner()
        self.stream = make_stream(self.dataset.classes, config.stream, config.run.seed)
        self.experiences = self.stream.experiences(self.dataset.train_labels)

    def _check_learner(self) -> None:
        options = limit_epochs(self.config.learner, self.config.stream.online)
        learners.build(options, self.embedder.dim, self.embedder.priors, self.config.run.seed)

    @functools.cached_property
    def data(self) -> StreamData:
        """Embeddings and tasks of the stream; computed on first use."""
        started, config = time.monotonic(), self.config.backbone
        if not preprocessing.stated(config):

            def say(text: str) -> None:
                self.listener(Message(text))

            if (doubt := preprocessing.doubt(self.dataset, self.embedder, config.cache, say)) is not None:
                say(f"warning: {doubt}")
        if self.engine is not None:
            return self.engine.data(self.config, self.dataset, self.stream, self.embedder, self.listener)
        embedded = embed(self.dataset, self.embedder, self.listener, config.cache)
        if not auto.wanted(self.config.learner) and learners.wants_second_view(self.config.learner):
            embedded["second"] = embed_second(self.dataset, self.embedder, self.listener, config.cache)
        data = prepare(self.dataset, self.stream, self.embedder.standardised, embedded, self.embedder.widths)
        return dataclasses.replace(data, embed_seconds=time.monotonic() - started)

    def choose_learner(self) -> auto.Choice:
        """Settle ``learner.name=auto`` on the training images; afterwards the configuration names a learner."""
        data = self.data
        with events.progress(self.listener, "choosing a learner") as update:
            choice = auto.choose(
                data.train,
                data.train_rows,
                self.embedder.priors,
                self.config.run.seed,
                self.device,
                functools.partial(update, 0),
            )
        self.listener(Message(f"learner.name={learners.AUTO} takes {choice.sentence}"))
        self.config = dataclasses.replace(self.config, learner={"name": choice.name})
        self._check_learner()
        return choice

    def identity(self) -> dict[str, Any]:
        """Return what must be unchanged when the run is resumed."""
        samples = [indices.tolist() for indices in self.experiences]
        return {
            "data": self.dataset.fingerprint,
            "backbone": self.embedder.identity,
            "tasks": [list(task) for task in self.stream.tasks],
            "experiences": hashlib.sha256(files.json_bytes(samples)).hexdigest(),
        }


class Run:
    """A training run in its folder. `execute` continues after the last finished task."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup, self.folder = setup, folder
        self.config, self.listener = setup.config, setup.listener
        self.progress = storage.ProgressStore(folder)

    def execute(self) -> RunResult:
        """Train the learner and then those that it is compared with; return all results."""
        self.train_model()
        run = self.config.run
        return self.compare(run.baselines, run.panel)

    def train_model(self) -> RunResult:
        """Train the learner, and write all that a deployment needs; return its results."""
        config, data = self.config, self.setup.data
        self.listener(
            Message(
                f"{self.setup.dataset.name}: {len(data.train_rows):,} training and {len(data.test):,} test images, "
                f"{extent(len(data.names), len(data.test_tasks), len(data.train_tasks))}, "
                f"{stream_name(config.stream.kind, config.stream.online)}, order {config.stream.order}"
            )
        )
        self._train(config.learner, is_main=True)
        return self._finish()

    def compare(self, baselines: bool = True, panel: bool = True) -> RunResult:
        """Train other learners on the same stream, after `train_model`; return all results.

        If it is interrupted, the run has the results of those that finished, and another call continues.

        Args:
            baselines: Train the baselines.
            panel: Train the heads of the panel, and joint training.
        """
        main = self.config.learner["name"]
        others = [name for name in (*(BASELINES if baselines else ()), *(PANEL if panel else ())) if name != main]
        try:
            for name in dict.fromkeys(others):
                self._train(options_for(name, self.config.learner), is_main=False)
            if panel:
                self._train_joint()
        finally:
            result = self._finish()
        return result

    def _train(self, options: Mapping[str, Any], is_main: bool) -> None:
        """Train one learner on the remaining experiences."""
        options = limit_epochs(options, self.config.stream.online)
        name, data = options["name"], self.setup.data
        if not self.progress.entry(name).done:
            learner = self._start_or_restore(name, options)
            steps = len(data.train_tasks)
            noun = step_name(len(data.test_tasks), steps)
            with events.progress(self.listener, learner.display, steps, noun) as update:
                for step in range(len(self.progress.entry(name).rows), steps):
                    began = time.monotonic()
                    data.learn(learner, step, functools.partial(update, step))
                    seconds = time.monotonic() - began
                    row = tuple(accuracies(learner, data, step))
                    self._commit(learner, row, seconds, is_last=step + 1 == steps, is_main=is_main)
                    if is_main:
                        seen = tuple(accuracy for accuracy in row if accuracy is not None)
                        classes = tuple(data.names[class_row] for class_row in data.rows_of(step).tolist())
                        mean = sum(seen) / len(seen)
                        self.listener(TaskLearned(step, steps, classes, mean, seen, seconds, noun))
            if not is_main:
                result = self._result(name)
                self.listener(Message(f"{result.display}: average accuracy {percent(result.average_accuracy)}"))

    def _start_or_restore(self, name: str, options: Mapping[str, Any]) -> learners.Learner:
        """Build a learner, or restore it from its last checkpoint."""
        checkpoint, setup = self.progress.checkpoint(name), self.setup
        if checkpoint is not None:
            return learners.restore(*checkpoint, device=setup.device, dim=setup.embedder.dim)
        priors, seed = setup.embedder.priors, self.config.run.seed
        learner = learners.build(options, setup.embedder.dim, priors, seed, setup.device)
        learner.expect(len(setup.data.names))
        if learner.note:
            self.listener(Message(f"{learner.display}: {learner.note}"))
        return learner

    def _commit(
        self, learner: learners.Learner, row: tuple[float | None, ...], seconds: float, is_last: bool, is_main: bool
    ) -> None:
        """Record a finished task, and write the final state of the main learner."""
        entry, state = self.progress.entry(learner.name), learners.pack(learner)
        final = is_last and is_main
        if final:
            self._write_state(learner, state)
        progress = LearnerProgress(
            rows=(*entry.rows, row),
            seconds=entry.seconds + seconds,
            done=is_last,
            state_bytes=learner.memory_bytes(),
            display=learner.display,
            class_accuracy=self._class_accuracy(learner) if final else None,
        )
        self.progress.commit(learner.name, progress, None if is_last else state)

    def _result(self, name: str) -> LearnerResult:
        entry = self.progress.entry(name)
        if name == JOINT_NAME:  # trained once, so that there is no accuracy curve
            final = [accuracy for accuracy in entry.rows[0] if accuracy is not None]
            summary = Summary(average_accuracy=sum(final) / len(final))
        else:
            summary = metrics.summary(entry.rows, self.setup.data.introduced)
        return LearnerResult(summary, entry.display or DISPLAY[name], entry.seconds, entry.state_bytes)

    def _class_accuracy(self, learner: learners.Learner) -> dict[str, float]:
        data = self.setup.data
        right = (learner.predict(data.test) == data.test_rows).double()
        return {name: float(right[data.test_rows == row].mean()) for row, name in enumerate(data.names)}

    def _train_joint(self) -> None:
        """Train a network on all tasks at once, as an upper bound."""
        if not self.progress.entry(JOINT_NAME).done:
            setup, data = self.setup, self.setup.data
            settings = dataclasses.replace(JOINT, min_steps=min(JOINT.min_steps, JOINT_STEPS))
            if "neurons" in self.config.learner:
                settings = dataclasses.replace(settings, neurons=learners.settings_of(self.config.learner).neurons)
            learner = FineTune(setup.embedder.dim, settings, setup.embedder.priors, self.config.run.seed, setup.device)
            began = time.monotonic()
            with events.progress(self.listener, JOINT_NAME) as update:
                learner.learn(data.whole, functools.partial(update, 0))
            row = tuple(accuracies(learner, data, len(data.train_tasks) - 1))
            seconds, size = time.monotonic() - began, learner.memory_bytes()
            progress = LearnerProgress(rows=(row,), seconds=seconds, done=True, state_bytes=size)
            self.progress.commit(JOINT_NAME, progress, None)
            result = self._result(JOINT_NAME)
            self.listener(Message(f"{JOINT_NAME}: average accuracy {percent(result.average_accuracy)}"))

    def _write_state(self, learner: learners.Learner, state: storage.State) -> None:
        """Write the files that a deployment and an evaluation need."""
        data, folder = self.setup.data, self.folder
        files.write_tensors(folder / "learner.safetensors", *state)
        statistics = learner.class_statistics()
        if statistics is None:
            statistics = data.statistics()
            arrays = {name: tensor.numpy() for name, tensor in statistics.state().items()}
            files.write_tensors(folder / "statistics.safetensors", arrays)
        part = data.of_kept(held_out_parts(data.train_rows, len(data.names)))
        rows = data.of_kept(data.train_rows)
        rejector = Rejector.calibrate(statistics, data.train, rows, data.test, data.test_rows, part=part)
        files.write_tensors(folder / "unknown.safetensors", rejector.state())
        record = TrackRecord.tested_on(learner, statistics, rejector, data.test, data.test_rows)
        files.write_tensors(folder / "record.safetensors", record.state())
        registry = ClassRegistry()
        for row, name in enumerate(data.names):
            registry = registry.add(name, "base", int((data.train_rows == row).sum()))
        files.write_json(folder / "classes.json", registry.to_json())
        if data.standardisation is not None:
            mu, sigma = data.standardisation
            files.write_tensors(folder / "standardisation.safetensors", {"mu": mu, "sigma": sigma})

    def _finish(self) -> RunResult:
        """Write metrics, report and record, in this order: the record marks the run as finished."""
        record = files.read_json(self.folder / "run.json")
        done = [name for name in self.progress.learners if self.progress.entry(name).done]
        result = self._collect({name: self._result(name) for name in done}, record.get("choice"))
        files.write_json(self.folder / "metrics.json", result.to_dict())
        record.update(status="finished", finished=record.get("finished") or utc_now())
        self._keep_answers()
        results = report.of_run(self.folder, result.to_dict(), record, self.setup.dataset.test)
        files.write_text(self.folder / "report.html", render(results))
        files.write_json(self.folder / "run.json", record)
        return result

    def _keep_answers(self) -> None:
        """Write the answers to the test images, and the accuracy after learning from fewer images, for the report."""
        if files.exists(self.folder / report.FILE):
            return
        setup, data = self.setup, self.setup.data
        learner, rejector, record = report.restore(self.folder)
        found = report.answer(learner, rejector, record, data.test, data.test_rows, setup.dataset.test.names)
        fewer = []
        seconds = self.progress.entry(learner.name).seconds / len(data.train_tasks)
        if learner.family == "closed form" and seconds <= report.LONGEST:
            self.listener(Message("learning again from fewer images, for the report"))
            build = functools.partial(
                learners.build,
                self.config.learner,
                setup.embedder.dim,
                setup.embedder.priors,
                self.config.run.seed,
                setup.device,
            )
            place = data.of_kept(report.places(data.train_rows, self.config.run.seed))
            fewer = report.from_fewer(build, data.whole, place, data.test, data.test_rows)
        report.write(self.folder, found, fewer)

    def _collect(self, results: Mapping[str, LearnerResult], choice: Mapping[str, Any] | None) -> RunResult:
        config, data, dataset, stream = self.config, self.setup.data, self.setup.dataset, self.setup.stream
        name = config.learner["name"]
        train_groups = stream.groups(dataset.train_labels)
        return RunResult(
            learner=name,
            main=results[name],
            baselines={other: results[other] for other in BASELINES if other in results and other != name},
            panel={other: results[other] for other in (*PANEL, JOINT_NAME) if other in results and other != name},
            data=dataset.name,
            split=dataset.split,
            classes=data.names,
            tasks=tuple(
                TaskInfo(tuple(dataset.classes[label] for label in task), len(train), len(test))
                for task, train, test in zip(stream.tasks, train_groups, data.test_tasks, strict=True)
            ),
            experiences=tuple(
                TaskInfo(tuple(data.names[row] for row in data.rows_of(step).tolist()), len(samples))
                for step, samples in enumerate(data.train_tasks)
            ),
            introduced=data.introduced,
            kind=config.stream.kind,
            online=config.stream.online,
            train_images=len(data.train_rows),
            test_images=len(data.test),
            class_accuracy=self.progress.entry(name).class_accuracy or {},
            embed_seconds=data.embed_seconds,
            choice=choice,
        )


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return a configuration with absolute paths, so that a run can be resumed or deployed from another folder.

    Raises:
        InputError: A path is not valid UTF-8, as the record of a run must be.
    """

    def absolute(path: str) -> str:
        for candidate in (Path(path), Path(os.environ.get("SSD_EDGE_DATA", "")) / path):
            if path and files.exists(candidate):
                return str(candidate.absolute())
        return path

    backbone = names.with_paths(config.backbone, absolute)
    path = config.data.path
    data = dataclasses.replace(config.data, path=path if path == "digits" else absolute(path))
    return parse(TrainConfig, to_tree(dataclasses.replace(config, backbone=backbone, data=data)))


def start(config: TrainConfig, argv: list[str], listener: Listener, engine: Engine | None = None) -> Run:
    """Start a new run. Its folder is created only after configuration, data and backbone have been checked.

    Args:
        config: Configuration of the run.
        argv: Command to record with the run.
        listener: Receives progress events.
        engine: Cluster that embeds and adds up; None for this process.

    Raises:
        InputError: If the configuration or the data cannot be used.
    """
    set_threads(config.run.threads)
    config = with_absolute_paths(config)
    setup = Setup(config, listener, engine=engine)
    choice = {"choice": setup.choose_learner().to_json()} if auto.wanted(config.learner) else {}
    config, embedder = setup.config, setup.embedder
    folder = storage.new_folder(Path(config.run.out))
    storage.write_config(folder, config)
    write_backbone(folder, config.backbone.name, embedder)
    terms = embedder.provenance.get("terms") or "not stated; ask its author"
    levels = embedder.provenance.get("levels")
    shown = f"levels {levels}, " if len(embedder.widths) > 1 else f"{levels}, " if levels else ""
    listener(Message(f"backbone {config.backbone.name}, {shown}{embedder.pixels.describe()}; licence: {terms}"))
    record = {
        "argv": list(map(printable, argv)),  # a file name in it may be any bytes
        "seed": config.run.seed,
        "started": utc_now(),
        "status": "running",
        "identity": setup.identity(),
        "config": to_tree(config),
        "backbone": {"identity": embedder.identity, "provenance": embedder.provenance},
        "accounts": setup.dataset.accounts.to_dict(),
        **choice,
        **storage.environment(),
    }
    files.write_json(folder / "run.json", record)
    return Run(setup, folder)


def resume(folder: Path, listener: Listener, engine: Engine | None = None) -> Run:
    """Open an interrupted run to continue it.

    Args:
        folder: Folder of the run.
        listener: Receives progress events.
        engine: Cluster that embeds and adds up; None for this process.

    Raises:
        InputError: If the folder is not a run, or if its data or backbone have changed.
    """
    config = storage.open_folder(folder)
    record = files.read_json(folder / "run.json")
    set_threads(config.run.threads or int(record.get("threads", 0)))
    for difference in storage.changed_environment(record):
        listener(Message(f"warning: {difference}; the resumed weights may differ in their last bits"))
    setup = Setup(config, listener, folder, engine)
    present = setup.identity()
    for key, value in record.get("identity", {}).items():
        if present[key] != value:
            raise InputError(f"{folder} cannot be resumed: its {key} changed after it was started; start a new run")
    return Run(setup, folder)
