"""Cells: one learner on one stream in one class order, with the name and the storage of its result.

The setup of a cell follows from the YAML files alone, so the page can be written without data. The file name of a
result contains a hash of the setup without its class order, and of the data, backbone and keys used. A cell is not run
again if its file exists. Only learner settings that differ from the defaults are hashed, so that adding a setting
later keeps the names; all settings are stored, and a cell is run again if they differ from today's.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

from ssd_edge import files
from ssd_edge.errors import BundleRefusedError
from ssd_edge.reproduction.specs import (
    ORDERS,
    Experiment,
    System,
    budgets,
    deviations,
    known_settings,
    options,
    streams,
)
from ssd_edge.run.train import JOINT_NAME

SCHEDULE = ("epochs", "lr", "min_steps")  # settings that come last in a file name


class TracePoint(TypedDict):
    """State of training at one point of a trace, as stored; None where there is nothing to compare with yet."""

    task: int
    epoch: int
    train_accuracy: float
    test_accuracy: list[float]
    top: list[int]
    jaccard: float | None
    subnetwork_cosine: float | None
    teacher_divergence: float | None


class Result(TypedDict, total=False):
    """Result of a cell, as stored; joint training has no `metrics`, and only traced cells have a `trace`."""

    spec: dict[str, Any]
    stand_in: bool
    accuracy: float
    accuracy_task_given: float
    samples: list[int]
    last_task_share: float
    state_bytes: int
    notes: list[str]
    environment: dict[str, Any]
    matrix: list[list[float | None]]
    learned: list[int] | None
    metrics: dict[str, Any]
    measured: dict[str, list[float | None]]
    seconds: float
    neurons: dict[str, list[float | None]]
    neurons_overall: dict[str, float]
    trace: list[TracePoint]


@dataclasses.dataclass(frozen=True)
class Setup:
    """Configuration of a cell.

    Attributes:
        stream: Name in streams.yaml.
        learner: ``name`` and all settings.
        order: One of `ORDERS`; also the seed of the learner.
        images: Maximum number of training and test images per class; () for all.
        trace: Trace points per task; 0 for no trace.
    """

    stream: str
    learner: Mapping[str, Any]
    order: int
    images: tuple[int, ...] = ()
    trace: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the setup as JSON without the class order."""
        source = streams()[self.stream]
        return {
            "stream": self.stream,
            "protocol": {**source.stream, "classes": list(source.classes), "pixels": source.pixels},
            "learner": deviations(self.learner),
            "images": list(self.images),
            "trace": self.trace,
        }

    def key(self) -> str:
        """Return a hash of the setup and its class order."""
        return _digest({"asked": self.to_dict(), "order": self.order})


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Inputs that a result depends on.

    Attributes:
        data: Fingerprint of the data set.
        backbone: Identity of the backbone; ``pixels`` if there is none.
        keys: Pretraining recipe of the SDMLP keys; None for learners without keys.
    """

    data: str
    backbone: str
    keys: Mapping[str, Any] | None = None


def spec(setup: Setup, provenance: Provenance) -> dict[str, Any]:
    """Return everything a result depends on, except the program, as JSON."""
    return {
        "asked": setup.to_dict(),
        "order": setup.order,
        "settings": dict(setup.learner),
        "data": provenance.data,
        "backbone": provenance.backbone,
        "keys": None if provenance.keys is None else dict(provenance.keys),
    }


def file_name(cell: Mapping[str, Any]) -> str:
    """Return the file name of a result: ``<stream>/<readable>-<hash>-<order>.json``."""
    asked = cell["asked"]
    digest = _digest({key: cell[key] for key in ("asked", "data", "backbone", "keys")})[:8]
    named = {key: value for key, value in asked["learner"].items() if key not in ("name", *SCHEDULE)}
    schedule = {key: asked["learner"][key] for key in SCHEDULE if key in asked["learner"]}
    parts = [asked["learner"]["name"], *(f"{key}{_plain(value)}" for key, value in {**named, **schedule}.items())]
    parts += ["trace"] if asked["trace"] else []
    parts += ["few"] if asked["images"] else []
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(parts))[:56].strip("-")
    return f"{asked['stream']}/{readable}-{digest}-{cell['order']}.json"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _digest(value: Any) -> str:
    return files.sha256(files.json_bytes(value))


def rounded(value: Any) -> Any:
    """Round all floats in a JSON value to six decimals, which is enough for any table."""
    if isinstance(value, float):
        return round(value, 6) + 0.0  # avoids −0.0
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result as canonical JSON with one line per key; indented, a matrix of 50 tasks would take 2,500."""
    files.make_directory(path.parent)
    compact = {
        key: json.dumps(rounded(value), sort_keys=True, ensure_ascii=False, allow_nan=False)
        for key, value in result.items()
    }
    lines = ",\n".join(f"{json.dumps(key)}: {text}" for key, text in sorted(compact.items()))
    files.write_text(path, "{\n" + lines + "\n}\n")


class Store:
    """Stored results of a folder, indexed by setup.

    Args:
        folder: Folder ``results/reproduce``.

    Raises:
        BundleRefusedError: A file is not a stored result.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._results: dict[str, list[Result]] = {}
        for experiment in filter(files.is_folder, files.list_folder(folder)):
            for path in files.list_folder(experiment):
                if path.suffix == ".json":
                    self._add(files.read_json(path), path)

    def _add(self, result: Result, path: Path) -> None:
        try:
            asked, order = result["spec"]["asked"], result["spec"]["order"]
        except (KeyError, TypeError) as error:
            raise BundleRefusedError(f"{path} is not a stored result: {error} is missing; delete the file") from error
        self._results.setdefault(_digest({"asked": asked, "order": order}), []).append(result)

    def find(self, setup: Setup) -> Result | None:
        """Return the result of a setup for any provenance, preferring real data over stand-ins, or None."""
        fitting = [
            result
            for result in self._results.get(setup.key(), [])
            if same_settings(result["spec"]["settings"], setup.learner)
        ]
        fitting.sort(key=lambda result: (result["stand_in"], result["spec"]["data"]))
        return fitting[0] if fitting else None

    def __iter__(self) -> Iterator[Result]:
        return (result for results in self._results.values() for result in results)


def same_settings(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return True if two sets of settings agree on all keys that both contain."""
    return all(wanted[key] == value for key, value in stored.items() if key in wanted)


def is_stored(folder: Path, cell: Mapping[str, Any]) -> bool:
    """Return True if the folder contains the result of a spec, computed with today's settings."""
    path = folder / file_name(cell)
    return files.is_file(path) and same_settings(files.read_json(path)["spec"]["settings"], cell["settings"])


def upper_bound(setup: Setup) -> Setup:
    """Return the setup of joint training on the same embeddings with as many neurons, but at most the default.

    Dense training takes ten times as long with ten times the neurons.
    """
    most = known_settings(JOINT_NAME)["neurons"]
    neurons = min(setup.learner.get("neurons", most), most)
    learner = {**known_settings(JOINT_NAME), "name": JOINT_NAME, "neurons": neurons}
    for key, limit in budgets()["smoke"].most.items() if setup.images else ():
        if key in learner:
            learner[key] = min(learner[key], limit)
    return Setup(setup.stream, learner, setup.order, setup.images)


def setups(experiment: Experiment, system: System, stream: str, budget: str, orders: int | None = None) -> list[Setup]:
    """Return the setups of one row of a table, one per class order.

    Args:
        experiment: Experiment that defines the table.
        system: System in that row.
        stream: Name in streams.yaml.
        budget: smoke, reduced or full.
        orders: Number of class orders; by default that of the budget. The experiment may limit it.
    """
    count = orders or budgets()[budget].orders
    if experiment.orders:
        count = min(count, experiment.orders)
    learner = options(experiment, system, stream, budget)
    images = budgets()[budget].images
    return [Setup(stream, learner, order, images, experiment.trace) for order in ORDERS[:count]]


def counts(experiment: Experiment, budget: str, store: Store) -> tuple[int, int]:
    """Return the number of stored cells of an experiment and the number of all its cells."""
    distinct = {
        setup.key(): setup
        for stream in experiment.streams
        for system in experiment.systems
        for setup in setups(experiment, system, stream, budget)
    }
    return sum(store.find(setup) is not None for setup in distinct.values()), len(distinct)
