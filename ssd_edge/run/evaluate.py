"""Score a finished run on images: its own test images, or a data set that it has never seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ssd_edge import files, learners
from ssd_edge.backbones.embedder import open_backbone
from ssd_edge.classes import ClassRegistry
from ssd_edge.config import TrainConfig
from ssd_edge.data import Dataset, load
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.report.events import Listener
from ssd_edge.run import storage
from ssd_edge.run.embed import embed
from ssd_edge.run.results import Evaluation
from ssd_edge.run.train import pick_device, set_threads, with_absolute_paths


def embeddings_of(folder: Path, config: TrainConfig, dataset: Dataset, listener: Listener) -> dict[str, np.ndarray]:
    """Standardised embeddings of any data set with the backbone of a run.

    Raises:
        InputError: the backbone is not the one that the run used.
        BundleRefusedError: the run's record is damaged.
    """
    embedder = open_backbone(config.backbone, pick_device(config.run.device))
    recorded = files.read_json(folder / "backbone.json")
    if not isinstance(recorded, dict) or "identity" not in recorded:
        raise BundleRefusedError(f"{folder / 'backbone.json'} does not name a backbone; restore it")
    if recorded["identity"] != embedder.identity:
        raise InputError(
            f"the run was made with the backbone {recorded['identity']}, but the one here is {embedder.identity}; "
            "restore that backbone or train again"
        )
    embedded = embed(dataset, embedder, listener, config.backbone.cache)
    if not embedder.standardised:
        arrays, _ = files.read_tensors(folder / "standardisation.safetensors")
        embedded = {part: (array - arrays["mu"]) / arrays["sigma"] for part, array in embedded.items()}
    return embedded


def evaluate(folder: Path, config: TrainConfig, listener: Listener) -> Evaluation:
    """Score a finished run on data: the test images where the data brings a split of its own or is the run's,
    all images otherwise.

    Args:
        folder: the run.
        config: the run's configuration, with another ``data`` section perhaps.
        listener: Receives progress events.

    Raises:
        InputError: unfinished, or the data has a class that the run never learned.
    """
    if not (folder / "learner.safetensors").is_file():
        raise InputError(f"{folder} has not finished; continue it with: ssd-edge train --resume {folder}")
    set_threads(config.run.threads)
    learner = learners.restore(*files.read_tensors(folder / "learner.safetensors"))
    registry = ClassRegistry.from_json(files.read_json(folder / "classes.json"))
    dataset = load(config.data, config.run.seed)
    rows = {name: row for row, name in enumerate(registry.names)}
    unknown = [name for name in dataset.classes if name not in rows]
    if unknown:
        raise InputError(
            f"the run never learned {', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}; it knows "
            f"{', '.join(registry.names[:10])}. Leave them out with data.exclude={','.join(unknown[:5])}"
        )
    embedded = embeddings_of(folder, config, dataset, listener)
    own = dataset.own_split or with_absolute_paths(config).data.path == storage.open_folder(folder).data.path
    vectors, labels = embedded["test"], dataset.test_labels
    if not own:
        vectors = np.concatenate([vectors, embedded["train"]])
        labels = np.concatenate([labels, dataset.train_labels])
    truth = torch.from_numpy(np.array([rows[name] for name in dataset.classes])[labels])
    right = (learner.predict(torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32))) == truth).double()
    return Evaluation(
        run=str(folder),
        data=dataset.name,
        images=len(right),
        which=dataset.split if own else "all images",
        accuracy=float(right.mean()),
        class_accuracy={
            name: float(right[truth == rows[name]].mean()) for name in dataset.classes if (truth == rows[name]).any()
        },
    )
