"""Evaluation of a finished run on images: its own test images, or another data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssd_edge import files
from ssd_edge.backbones.embedder import Embedder, open_backbone
from ssd_edge.classes import ClassRegistry
from ssd_edge.config import TrainConfig, parse, to_tree
from ssd_edge.data import Dataset, load
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.report.events import Listener, Message
from ssd_edge.report.results import Results
from ssd_edge.run import report, storage
from ssd_edge.run.embed import embed
from ssd_edge.run.results import Evaluation
from ssd_edge.run.train import pick_device, set_threads, with_absolute_paths


def with_data(config: TrainConfig, selection: Mapping[str, Any]) -> TrainConfig:
    """Return a run's configuration with other ``data`` settings.

    Args:
        config: Configuration of the run.
        selection: Settings of the section ``data``. With a ``path``, they replace the whole section: what the run
            selected from its own data does not apply to other data.

    Raises:
        InputError: If a setting is unknown or out of range.
    """
    tree = to_tree(config)
    tree["data"] = dict(selection) if "path" in selection else {**tree["data"], **selection}
    return parse(TrainConfig, tree)


def open_embedder(folder: Path, config: TrainConfig) -> Embedder:
    """Open the backbone of a run.

    Raises:
        InputError: If the backbone is not the one that the run used.
        BundleRefusedError: If the record of the run is damaged.
    """
    embedder = open_backbone(config.backbone, pick_device(config.run.device), folder)
    recorded = files.read_json(folder / "backbone.json")
    if not isinstance(recorded, dict) or "identity" not in recorded:
        raise BundleRefusedError(f"{folder / 'backbone.json'} has no backbone identity; restore it")
    if recorded["identity"] != embedder.identity:
        raise InputError(
            f"the run used the backbone {recorded['identity']}, but {embedder.identity} was found; "
            "restore that backbone or train again"
        )
    return embedder


def standardise(folder: Path, embedder: Embedder, embeddings: np.ndarray) -> np.ndarray:
    """Standardise the output of a run's embedder as the run did, float32 ``(N, D)``."""
    if not embedder.standardised:
        arrays, _ = files.read_tensors(folder / "standardisation.safetensors")
        embeddings = (embeddings - arrays["mu"]) / arrays["sigma"]
    return np.ascontiguousarray(embeddings, dtype=np.float32)


def rows_of(dataset: Dataset, names: Sequence[str], model: str) -> np.ndarray:
    """Return the rows of the labels of a data set, int64 ``(C,)``.

    Args:
        dataset: The data set.
        names: Class names of the model by row.
        model: What it is, for the error message.

    Raises:
        InputError: The data has a class that the model did not learn.
    """
    rows = {name: row for row, name in enumerate(names)}
    unknown = [name for name in dataset.classes if name not in rows]
    if unknown:
        raise InputError(
            f"the {model} did not learn {', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}; its classes are "
            f"{', '.join(names[:10])}{' …' if len(names) > 10 else ''}. Leave others out with "
            f"data.exclude={','.join(unknown[:5])}"
        )
    return np.array([rows[name] for name in dataset.classes], dtype=np.int64)


def evaluate(folder: Path, config: TrainConfig, listener: Listener) -> Evaluation:
    """Measure the accuracy of a finished run.

    Test images are scored if the data has a test split of its own or is the data of the run; otherwise all images are.

    Args:
        folder: Folder of the run.
        config: Configuration of the run, possibly with another ``data`` section.
        listener: Receives progress events.

    Raises:
        InputError: If the run is not finished, or the data has a class that it did not learn.
    """
    if not files.is_file(folder / "learner.safetensors"):
        raise InputError(f"{folder} is not finished; continue it with: ssd-edge train --resume {folder}")
    set_threads(config.run.threads)
    learner, rejector, track = report.restore(folder)
    entries = ClassRegistry.from_json(files.read_json(folder / "classes.json")).entries
    dataset = load(config.data, config.run.seed)
    for sentence in dataset.accounts.sentences():
        listener(Message(sentence))
    rows = rows_of(dataset, [entry.name for entry in entries], "run")
    embedder = open_embedder(folder, config)
    embedded = embed(dataset, embedder, listener, config.backbone.cache)
    started = storage.open_folder(folder).data
    present = with_absolute_paths(config).data
    own = dataset.own_split or present.path == started.path
    images, vectors, labels = dataset.test, embedded["test"], dataset.test_labels
    if not own:
        images = images.joined(dataset.train)
        vectors = np.concatenate([vectors, embedded["train"]])
        labels = np.concatenate([labels, dataset.train_labels])
    standard = torch.from_numpy(standardise(folder, embedder, vectors))
    answers = report.answer(learner, rejector, track, standard, torch.from_numpy(rows[labels]), images.names)
    if present == started:  # its own test images
        return Evaluation(str(folder), report.again(folder, answers, images))
    results = Results(
        model=learner.display,
        data=dataset.name,
        which=dataset.split if own else "all images",
        classes=tuple(entry.name for entry in entries),
        learned=tuple(entry.images for entry in entries),
        answers=answers,
        photographs=images,
        record={"run": str(folder), "backbone": config.backbone.name},
    )
    return Evaluation(str(folder), results)


def without_images(folder: Path, missing: str) -> Evaluation:
    """Return what a finished run has kept of its own test images, which are gone.

    Args:
        folder: Folder of the run.
        missing: Why they are.

    Raises:
        InputError: The run has kept nothing.
        BundleRefusedError: A file is damaged.
    """
    return Evaluation(str(folder), report.of_run(folder, *report.files_of(folder), None, missing))
