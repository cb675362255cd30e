"""Folder of a run, its files, and the progress from which an interrupted run is resumed.

```
runs/<n>/config.yaml              resolved configuration
         run.json                 argv, versions, threads, machine, git sha, seed, times, status
         backbone.json            backbone with its digest
         backbone.onnx            its network, unless it is a package
         classes.json             class registry by learner row
         progress.json            for each learner: accuracies so far, seconds, name of the matching checkpoint
         checkpoints/             latest state of each unfinished learner
         answers.safetensors      answers to the test images, for the report
         metrics.json report.html learner.safetensors unknown.safetensors record.safetensors
         statistics.safetensors   of the embeddings of each class, unless they are part of the learner's state
         standardisation.safetensors   mean and deviation of the first task, unless the backbone is a package
```
Each file is replaced atomically, and `progress.json` is written after the checkpoint that it names. A crash loses at
most the current task.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import yaml

from ssd_edge import files
from ssd_edge.config import TrainConfig, parse, read_yaml, to_tree
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError
from ssd_edge.system import VERSION

State: TypeAlias = tuple[dict[str, np.ndarray], dict[str, Any]]  # arrays and metadata of a learner, as `learners.pack`


def new_folder(out: Path) -> Path:
    """Create the next numbered folder in `out`.

    Raises:
        EnvironmentUnfitError: If the folder cannot be created.
    """
    files.make_directory(out)
    while True:
        numbers = [int(path.name) for path in files.list_folder(out) if path.name.isdecimal()]
        folder = out / str(max(numbers, default=0) + 1)
        try:
            folder.mkdir()
        except FileExistsError:  # another process created it first
            continue
        except OSError as error:
            raise EnvironmentUnfitError(f"cannot create {folder}: {error.strerror}") from error
        files.make_directory(folder / "checkpoints")
        return folder


def open_folder(folder: Path) -> TrainConfig:
    """Load the configuration of a run.

    Raises:
        InputError: If the folder is not a run.
        BundleRefusedError: If the configuration is damaged.
    """
    missing = [name for name in ("config.yaml", "run.json") if not files.is_file(folder / name)]
    if missing:
        reason = "does not exist" if not files.exists(folder) else f"is not a run: {' and '.join(missing)} missing"
        raise InputError(f"{folder} {reason}; give one of the numbered folders that `ssd-edge train` creates")
    try:
        return parse(TrainConfig, read_yaml(folder / "config.yaml"))
    except InputError as error:
        raise BundleRefusedError(f"{folder / 'config.yaml'} is damaged ({error}); restore it") from error


def write_config(folder: Path, config: TrainConfig) -> None:
    """Save the resolved configuration."""
    text = yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True)
    files.write_text(folder / "config.yaml", text)


def environment() -> dict[str, Any]:
    """Return versions, threads and machine, which a result depends on besides its configuration."""
    return {
        "versions": {
            "ssd_edge": VERSION,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "threads": torch.get_num_threads(),
        "machine": _machine(),
        "git_sha": _git_sha(),
    }


def _machine() -> str:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    gpu = f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""
    return f"{platform.system()} {platform.machine()}, {name}, {os.cpu_count()} cores{gpu}"


def _git_sha() -> str | None:
    """Return the commit of the SSD-Edge source tree, or None if it was installed from a wheel."""
    root = Path(__file__).resolve().parents[2]
    if not files.exists(root / ".git"):
        return None
    try:
        run = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except OSError:
        return None
    return run.stdout.strip() or None


def changed_environment(before: dict[str, Any]) -> list[str]:
    """Return how this environment differs from a recorded one; resumed weights may then differ in their last bits."""
    present, differences = environment(), []
    for key in ("versions", "threads", "machine"):
        if before.get(key) != present[key]:
            differences.append(f"{key}: was {before.get(key)}, is {present[key]}")
    return differences


@dataclasses.dataclass(frozen=True)
class LearnerProgress:
    """Progress of one learner, as ``progress.json`` records it.

    Attributes:
        rows: Accuracies after each finished task; None where a group of classes comes later.
        seconds: Training time so far.
        done: True after the last task.
        checkpoint: File in ``checkpoints/`` with the state after the last finished task; None before the first task and
            after the last.
        state_bytes: Size of the learned state.
        display: Name of the learner for people; None to use the default name.
        class_accuracy: Final test accuracy by class name, for the main learner.
    """

    rows: tuple[tuple[float | None, ...], ...] = ()
    seconds: float = 0.0
    done: bool = False
    checkpoint: str | None = None
    state_bytes: int = 0
    display: str | None = None
    class_accuracy: Mapping[str, float] | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LearnerProgress:
        """Build from a value of ``progress.json``."""
        return cls(**{**values, "rows": tuple(map(tuple, values["rows"]))})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without the optional ones that are None."""
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if value is not None or key == "checkpoint"}


class ProgressStore:
    """Progress and checkpoints of all learners in the folder of a run.

    Raises:
        BundleRefusedError: If ``progress.json`` is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "progress.json"
        self.checkpoints = folder / "checkpoints"
        stored = files.read_json(self.path) if files.exists(self.path) else {}
        try:
            self.learners = {name: LearnerProgress.from_dict(values) for name, values in stored.items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise BundleRefusedError(f"{self.path} is damaged ({error!r}); restore it or train again") from error

    def entry(self, name: str) -> LearnerProgress:
        """Return the progress of one learner, which is empty at first."""
        return self.learners.get(name, LearnerProgress())

    def checkpoint(self, name: str) -> State | None:
        """Return the state that belongs to the recorded rows, or None before the first task."""
        file = self.entry(name).checkpoint
        return files.read_tensors(self.checkpoints / file) if file else None

    def commit(self, name: str, progress: LearnerProgress, state: State | None) -> None:
        """Record a finished task.

        The new checkpoint is written before the progress file that names it, and the old one is removed last, so that a
        crash at any point leaves a consistent pair.

        Args:
            name: Name of the learner.
            progress: Its progress; `checkpoint` is set here.
            state: Arrays and metadata to resume from; None if the learner is done.
        """
        old = self.entry(name).checkpoint
        file = None if state is None else f"{name}-{len(progress.rows)}.safetensors"
        if state is not None and file is not None:
            files.write_tensors(self.checkpoints / file, *state)
        self.learners[name] = dataclasses.replace(progress, checkpoint=file)
        files.write_json(self.path, {key: value.to_dict() for key, value in self.learners.items()})
        if old and old != file:
            (self.checkpoints / old).unlink(missing_ok=True)
