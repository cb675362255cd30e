"""Loading and checking of a finished run. Its files may be damaged or belong to different runs."""

from __future__ import annotations

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssd_edge import bundle, files, learners
from ssd_edge.classes import ClassRegistry
from ssd_edge.config import TrainConfig
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.images import Pixels
from ssd_edge.learners.base import TensorSpec, check_state
from ssd_edge.learners.closed_form.linear import restore_statistics
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.priors import Priors
from ssd_edge.learners.retention import TrackRecord
from ssd_edge.learners.unknown import Rejector
from ssd_edge.run import storage

STATES = ("learner", "unknown", "record")  # roles of the state files; of some learners also "statistics"
STANDARDISATION = {
    "mu": TensorSpec(("D",), "float32", "mean of the first task"),
    "sigma": TensorSpec(("D",), "float32", "deviation of the first task", least=float(np.finfo(np.float32).tiny)),
}
# Keys that are read from the files of a run, with their types.
_BACKBONE = {"name": str, "identity": str, "size": int, "dim": int, "provenance": dict}
TIME = "%Y-%m-%dT%H:%M:%SZ"  # format of the times in run.json, in UTC
RECORD = {"argv": list, "seed": int, "threads": int, "machine": str, "versions": dict}
METRICS = {
    "data": str,
    "split": str,
    "train_images": int,
    "test_images": int,
    "class_accuracy": dict,
    "average_accuracy": float,
    "average_incremental_accuracy": float,
    "backward_transfer": float,
    "forgetting": float,
    "panel": dict,
}


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A finished run, checked.

    Attributes:
        folder: Folder of the run.
        config: Resolved configuration.
        record: Content of run.json.
        metrics: Content of metrics.json.
        backbone: Content of backbone.json.
        registry: Class registry.
        learner: Learner after the last task.
        states: Content of the state files by their role in a bundle.
        statistics: Statistics of the embeddings of each class.
    """

    folder: Path
    config: TrainConfig
    record: dict[str, Any]
    metrics: dict[str, Any]
    backbone: dict[str, Any]
    registry: ClassRegistry
    learner: learners.Learner
    states: dict[str, bytes]
    statistics: ClassStatistics

    @property
    def pixels(self) -> Pixels:
        """Description of how images become the backbone's input."""
        return Pixels.from_dict(self.backbone)

    def standardisation(self, dim: int) -> tuple[np.ndarray, np.ndarray]:
        """Return μ and σ ``(dim,)``, float32, measured for a user's own backbone. Raises the same errors as `read`."""
        path = self.folder / "standardisation.safetensors"
        arrays, _ = files.read_tensors(path)
        check_state(
            {name: torch.from_numpy(array) for name, array in arrays.items()}, STANDARDISATION, {"D": dim}, str(path)
        )
        return arrays["mu"], arrays["sigma"]


def emptied(run: FinishedRun, priors: Priors) -> FinishedRun:
    """Return the run as it was before its first task: the same backbone, and a new learner without classes."""
    _, metadata = learners.pack(run.learner)
    options = {"name": metadata["learner"], **metadata["settings"]}
    learner = learners.build(options, run.learner.dim, priors, metadata["seed"])
    rejector = Rejector.from_state(files.parse_tensors(run.states["unknown"], "unknown.safetensors")[0])
    rows = range(len(run.registry))
    record = TrackRecord.from_state(files.parse_tensors(run.states["record"], "record.safetensors")[0])
    states = {
        "learner": files.tensor_bytes(*learners.pack(learner)),
        "unknown": files.tensor_bytes(rejector.without_rows(rows).state()),  # keeps what all classes have in common
        "record": files.tensor_bytes(record.without_rows(rows).state()),
    }
    statistics = learner.class_statistics()
    if statistics is None:
        statistics = ClassStatistics(learner.dim)
        states["statistics"] = files.tensor_bytes({name: t.numpy() for name, t in statistics.state().items()})
    return dataclasses.replace(run, registry=ClassRegistry(), learner=learner, states=states, statistics=statistics)


def read(folder: Path) -> FinishedRun:
    """Load a finished run.

    Raises:
        InputError: If the folder is not a run, the run is not finished, or a file is missing.
        BundleRefusedError: If a file is damaged or belongs to another run.
    """
    config = storage.open_folder(folder)
    record = _read_object(folder / "run.json", {"status": str})
    if record["status"] != "finished":
        raise InputError(
            f"{folder} is not finished; continue it with: ssd-edge train --resume {shlex.quote(str(folder))}"
        )
    _check_complete(folder, ["metrics.json", "backbone.json", "classes.json", *(bundle.ROLES[role] for role in STATES)])
    states = {role: files.read_bytes(folder / bundle.ROLES[role]) for role in STATES}
    record = _read_object(folder / "run.json", {**RECORD, "finished": str})
    try:
        time.strptime(record["finished"], TIME)
    except ValueError as error:
        raise BundleRefusedError(f"{folder / 'run.json'} is damaged: 'finished' {error}; restore it") from error
    backbone = _read_object(folder / "backbone.json", _BACKBONE)
    try:
        Pixels.from_dict(backbone)
    except InputError as error:
        raise BundleRefusedError(f"{folder / 'backbone.json'} is damaged: {error}; restore it") from error
    path = folder / bundle.ROLES["learner"]
    learner = learners.restore(*files.parse_tensors(states["learner"], str(path)), dim=backbone["dim"])
    statistics = learner.class_statistics()
    if statistics is None:
        path = folder / bundle.ROLES["statistics"]
        _check_complete(folder, [path.name])
        states["statistics"] = files.read_bytes(path)
        arrays, _ = files.parse_tensors(states["statistics"], str(path))
        statistics = restore_statistics(arrays, backbone["dim"], str(path))
    state = FinishedRun(
        folder=folder,
        config=config,
        record=record,
        metrics=_read_object(folder / "metrics.json", {**METRICS, "baselines": dict, "tasks": list}),
        backbone=backbone,
        registry=ClassRegistry.from_json(files.read_json(folder / "classes.json")),
        learner=learner,
        states=states,
        statistics=statistics,
    )
    _check_together(state)
    return state


def _check_complete(folder: Path, needed: list[str]) -> None:
    """Check that files of a run are there.

    Raises:
        InputError: One is missing.
    """
    missing = [name for name in needed if not files.is_file(folder / name)]
    if missing:
        raise InputError(f"{folder} is not a complete run: {', '.join(missing)} missing; restore them or train again")


def _read_object(path: Path, kinds: dict[str, type]) -> dict[str, Any]:
    """Read a JSON object with these keys; integers are accepted as floats.

    Raises:
        BundleRefusedError: If a key is missing or its value has another type.
    """
    content = files.read_json(path)
    values: dict[str, Any] = content if isinstance(content, dict) else {}
    for key, kind in kinds.items():
        value = values.get(key)
        if not isinstance(value, (int, float) if kind is float else kind):
            raise BundleRefusedError(f"{path} is damaged: '{key}' is {value!r}, not {kind.__name__}; restore it")
    return values


def _check_together(state: FinishedRun) -> None:
    """Check that learner, statistics, classes and backbone belong to the same run."""
    classes, dim, learner = len(state.registry), state.backbone["dim"], state.learner
    if (len(learner.seen), learner.dim) != (classes, dim):
        raise BundleRefusedError(
            f"{state.folder}: the learner has {len(learner.seen)} classes and embeddings of {learner.dim}, but "
            f"classes.json and backbone.json have {classes} and {dim}; restore the files of one run"
        )
    counts, images = state.statistics.counts.tolist(), [entry.images for entry in state.registry.entries]
    if counts != images:
        path = state.folder / bundle.ROLES["statistics" if "statistics" in state.states else "learner"]
        raise BundleRefusedError(
            f"{path} counts {counts[:10]} images, but classes.json {images[:10]}; restore the files of one run"
        )
