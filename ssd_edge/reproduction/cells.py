"""Cells: one learner on one stream in one class order, its name, and where its result is kept.

What a cell asks (its setup) is known from YAML alone, so the page needs no data. Its file is named by a hash of
the setup without the order and of what answers it: data, backbone and keys. A cell whose file exists is not run
again. Of the learner's settings only those that are not defaults are hashed, so that a setting that comes later
changes nothing; all of them are stored, and a stored cell whose settings are not today's is run anew.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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

SCHEDULE = ("epochs", "lr", "min_steps")  # last in a file's name


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a cell asks.

    Attributes:
        stream: name in streams.yaml.
        learner: ``name`` and every setting.
        order: a number of `ORDERS`; also the learner's seed.
        images: training and test images a class at most; () all.
        trace: points a task at which training is looked into; 0: none.
    """

    stream: str
    learner: Mapping[str, Any]
    order: int
    images: tuple[int, ...] = ()
    trace: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The setup as JSON, without its order: equal for all orders."""
        source = streams()[self.stream]
        return {
            "stream": self.stream,
            "protocol": {**source.stream, "classes": list(source.classes), "pixels": source.pixels},
            "learner": deviations(self.learner),
            "images": list(self.images),
            "trace": self.trace,
        }

    def key(self) -> str:
        """Names the setup with its order."""
        return _digest({"asked": self.to_dict(), "order": self.order})


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What a setup is answered with, besides the program.

    Attributes:
        data: fingerprint of the data set.
        backbone: identity of the backbone; ``pixels`` without one.
        keys: how the SDMLP keys were pretrained; None where the learner takes none.
    """

    data: str
    backbone: str
    keys: Mapping[str, Any] | None = None


def spec(setup: Setup, provenance: Provenance) -> dict[str, Any]:
    """All that a result depends on besides the program, as JSON."""
    return {
        "asked": setup.to_dict(),
        "order": setup.order,
        "settings": dict(setup.learner),
        "data": provenance.data,
        "backbone": provenance.backbone,
        "keys": None if provenance.keys is None else dict(provenance.keys),
    }


def file_name(cell: Mapping[str, Any]) -> str:
    """``<stream>/<readable>-<hash>-<order>.json`` of a spec."""
    asked = cell["asked"]
    digest = _digest({key: cell[key] for key in ("asked", "data", "backbone", "keys")})[:8]
    named = {key: value for key, value in asked["learner"].items() if key not in ("name", *SCHEDULE)}
    schedule = {key: asked["learner"][key] for key in SCHEDULE if key in asked["learner"]}
    words = [asked["learner"]["name"], *(f"{key}{_plain(value)}" for key, value in {**named, **schedule}.items())]
    words += ["trace"] if asked["trace"] else []
    words += ["few"] if asked["images"] else []
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(words))[:56].strip("-")
    return f"{asked['stream']}/{readable}-{digest}-{cell['order']}.json"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _digest(value: Any) -> str:
    return files.sha256(files.json_bytes(value))


def rounded(value: Any) -> Any:
    """Floats to six decimals, all the way down: enough for any table, and files stay small."""
    if isinstance(value, float):
        return round(value, 6) + 0.0  # no −0.0
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Store a result: canonical JSON, one line an entry, for a matrix of 50 tasks would be 2,500 lines else."""
    files.make_directory(path.parent)
    compact = {
        key: json.dumps(rounded(value), sort_keys=True, ensure_ascii=False, allow_nan=False)
        for key, value in result.items()
    }
    lines = ",\n".join(f"{json.dumps(key)}: {text}" for key, text in sorted(compact.items()))
    files.write_text(path, "{\n" + lines + "\n}\n")


class Store:
    """The results under a folder, by setup.

    Attributes:
        folder: ``…/results/reproduce``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[str, list[dict[str, Any]]] = {}
        for path in sorted(folder.glob("*/*.json")):
            self._add(files.read_json(path), path)

    def _add(self, result: dict[str, Any], path: Path) -> None:
        try:
            asked, order = result["spec"]["asked"], result["spec"]["order"]
        except (KeyError, TypeError) as error:
            raise BundleRefusedError(f"{path} is not a stored result: it lacks {error}; remove it") from error
        self._found.setdefault(_digest({"asked": asked, "order": order}), []).append(result)

    def find(self, setup: Setup) -> dict[str, Any] | None:
        """The result of a setup, whatever answered it; real data before stand-ins; None where there is none."""
        fitting = [
            result
            for result in self._found.get(setup.key(), [])
            if same_settings(result["spec"]["settings"], setup.learner)
        ]
        fitting.sort(key=lambda result: (result["stand_in"], result["spec"]["data"]))
        return fitting[0] if fitting else None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (result for results in self._found.values() for result in results)


def same_settings(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether two sets of settings agree on the keys that both know."""
    return all(wanted[key] == value for key, value in stored.items() if key in wanted)


def is_stored(folder: Path, cell: Mapping[str, Any]) -> bool:
    """Whether the result of a spec is in the folder, made with today's settings."""
    path = folder / file_name(cell)
    return path.is_file() and same_settings(files.read_json(path)["spec"]["settings"], cell["settings"])


def upper_bound(setup: Setup) -> Setup:
    """Joint training on the same embeddings with as many neurons: what a row is measured against."""
    neurons = setup.learner.get("neurons", known_settings(JOINT_NAME)["neurons"])
    learner = {**known_settings(JOINT_NAME), "name": JOINT_NAME, "neurons": neurons}
    for key, limit in budgets()["smoke"].most.items() if setup.images else ():
        if key in learner:
            learner[key] = min(learner[key], limit)
    return Setup(setup.stream, learner, setup.order, setup.images)


def setups(experiment: Experiment, system: System, stream: str, budget: str, orders: int | None = None) -> list[Setup]:
    """The setups of one row, one for each class order.

    Args:
        experiment: the table.
        system: the row.
        stream: name in streams.yaml.
        budget: smoke, reduced or full.
        orders: how many class orders; None: the budget's, or the experiment's where it has fewer.
    """
    count = orders or budgets()[budget].orders
    if experiment.orders:
        count = min(count, experiment.orders)
    learner = options(experiment, system, stream, budget)
    images = budgets()[budget].images
    return [Setup(stream, learner, order, images, experiment.trace) for order in ORDERS[:count]]
