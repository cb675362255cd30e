"""A run's folder: what is in it, and how a killed run is taken up again.

```
runs/<n>/config.yaml              the resolved configuration
         run.json                 argv, versions, threads, machine, git sha, seed, times, status
         backbone.json            which backbone, by digest
         classes.json             class registry by learner row
         progress.json            per system: accuracies so far, seconds, the checkpoint that goes with them
         checkpoints/             the newest state of each system that is not finished
         metrics.json report.html learner.safetensors statistics.safetensors
         standardisation.safetensors   mu, sigma of a user's ONNX backbone, from the first task
```
Each file is replaced atomically, and `progress.json` only after the checkpoint that it names, so a run that
was killed at any point loses at most its current task.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ssd_edge import files
from ssd_edge.config import TrainConfig, parse, read_yaml, to_tree
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError
from ssd_edge.system import VERSION


def new_folder(out: Path) -> Path:
    """Create the next numbered folder in `out`.

    Raises:
        EnvironmentUnfitError: the folder cannot be created.
    """
    files.make_directory(out)
    while True:
        numbers = [int(path.name) for path in out.iterdir() if path.name.isdecimal()]
        folder = out / str(max(numbers, default=0) + 1)
        try:
            folder.mkdir()
        except FileExistsError:  # another run was faster
            continue
        except OSError as error:
            raise EnvironmentUnfitError(f"cannot create {folder}: {error.strerror}") from error
        files.make_directory(folder / "checkpoints")
        return folder


def open_folder(folder: Path) -> TrainConfig:
    """The configuration of an existing run.

    Raises:
        InputError: not a run's folder.
        BundleRefusedError: its configuration is damaged.
    """
    missing = [name for name in ("config.yaml", "run.json") if not (folder / name).is_file()]
    if missing:
        what = "does not exist" if not folder.exists() else f"is not a run: {' and '.join(missing)} missing"
        raise InputError(f"{folder} {what}; runs are the numbered folders that `ssd-edge train` makes")
    try:
        return parse(TrainConfig, read_yaml(folder / "config.yaml"))
    except InputError as error:
        raise BundleRefusedError(f"{folder / 'config.yaml'} is damaged ({error}); restore it") from error


def write_config(folder: Path, config: TrainConfig) -> None:
    """Save the resolved configuration."""
    text = yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True)
    files.write_text(folder / "config.yaml", text)


def now() -> str:
    """The time in UTC, ISO 8601, whole seconds."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def environment() -> dict[str, Any]:
    """What a result depends on besides its configuration."""
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
    """The commit of SSD-Edge's own source; None where it was installed from a wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
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
    """How this environment differs from a run's: there, resumed weights may not be bit-identical."""
    present, differences = environment(), []
    for key in ("versions", "threads", "machine"):
        if before.get(key) != present[key]:
            differences.append(f"{key}: was {before.get(key)}, is {present[key]}")
    return differences


class Progress:
    """What of a run is done, system by system.

    Attributes:
        systems: name → {"rows": accuracies after each task, "seconds", "state_bytes", "done", "checkpoint"}.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "progress.json"
        self.systems: dict[str, dict[str, Any]] = files.read_json(self.path) if self.path.exists() else {}

    def entry(self, name: str) -> dict[str, Any]:
        """The record of one system, empty at first."""
        return self.systems.setdefault(name, {"rows": [], "seconds": 0.0, "done": False, "checkpoint": None})

    def checkpoint(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The state that goes with the recorded rows, or None at the start."""
        file = self.entry(name)["checkpoint"]
        return files.read_tensors(self.folder / "checkpoints" / file) if file else None

    def commit(self, name: str, state: tuple[dict[str, np.ndarray], dict[str, Any]] | None, **changes: Any) -> None:
        """Record a finished task: first its checkpoint, then the progress that names it, then the old one goes."""
        entry = self.entry(name)
        old = entry["checkpoint"]
        entry.update(changes)
        if state is not None:
            entry["checkpoint"] = f"{name}-{len(entry['rows'])}.safetensors"
            files.write_tensors(self.folder / "checkpoints" / entry["checkpoint"], *state)
        else:
            entry["checkpoint"] = None
        files.write_json(self.path, self.systems)
        if old and old != entry["checkpoint"]:
            (self.folder / "checkpoints" / old).unlink(missing_ok=True)
