"""Evaluation of a finished run on images: its own test images, or another data set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssd_edge import files, learners
from ssd_edge.backbones.embedder import Embedder, open_backbone
from ssd_edge.classes import ClassRegistry
from ssd_edge.config import TrainConfig, parse, to_tree
from ssd_edge.data import load
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.report.events import Listener
from ssd_edge.run import storage
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
    learner = learners.restore(*files.read_tensors(folder / "learner.safetensors"))
    registry = ClassRegistry.from_json(files.read_json(folder / "classes.json"))
    dataset = load(config.data, config.run.seed)
    rows = {name: row for row, name in enumerate(registry.names)}
    unknown = [name for name in dataset.classes if name not in rows]
    if unknown:
        raise InputError(
            f"the run did not learn {', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}; its classes are "
            f"{', '.join(registry.names[:10])}. Leave others out with data.exclude={','.join(unknown[:5])}"
        )
    embedder = open_embedder(folder, config)
    embedded = embed(dataset, embedder, listener, config.backbone.cache)
    own = dataset.own_split or with_absolute_paths(config).data.path == storage.open_folder(folder).data.path
    vectors, labels = embedded["test"], dataset.test_labels
    if not own:
        vectors = np.concatenate([vectors, embedded["train"]])
        labels = np.concatenate([labels, dataset.train_labels])
    truth = torch.from_numpy(np.array([rows[name] for name in dataset.classes])[labels])
    predicted = learner.predict(torch.from_numpy(standardise(folder, embedder, vectors)))
    correct = (predicted == truth).double()
    return Evaluation(
        run=str(folder),
        data=dataset.name,
        images=len(correct),
        which=dataset.split if own else "all images",
        accuracy=float(correct.mean()),
        class_accuracy={
            name: float(correct[truth == rows[name]].mean()) for name in dataset.classes if (truth == rows[name]).any()
        },
    )
