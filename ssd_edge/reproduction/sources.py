"""Embeddings of data sets, and SDMLP keys pretrained for settings without shipped keys."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssd_edge import files
from ssd_edge.backbones.embedder import Embedder, open_backbone
from ssd_edge.backbones.keys import pretrain_student
from ssd_edge.config import BackboneConfig, DataConfig, StudentConfig
from ssd_edge.data import Dataset, Images, cache, load
from ssd_edge.images import Pixels
from ssd_edge.learners.priors import Priors
from ssd_edge.report import events
from ssd_edge.report.events import Listener
from ssd_edge.reproduction.specs import StreamSource
from ssd_edge.run.embed import embed

PRETRAINING = "tiny-imagenet32-jpg.tar.xz"
TINY_CLASSES = ("0:100",)  # classes to pretrain the backbone of Split Tiny-ImageNet on
SIDE, FRAME = 32, 2  # MNIST images of 28 × 28 pixels are read with a black border


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Embeddings of a data set.

    Attributes:
        dataset: Labels and class names; the images are dropped.
        embedded: ``train`` and ``test``, float32 ``(N, D)``, standardised.
        identity: Identity of the backbone; ``pixels`` if there is none.
        priors: Statistics of pretraining.
        notes: Notes for the page.
        stand_in: True if another data set replaces that of the stream, which was not found.
    """

    dataset: Dataset
    embedded: dict[str, np.ndarray]
    identity: str
    priors: Priors
    notes: tuple[str, ...] = ()
    stand_in: bool = False


def locate(name: str) -> Path | None:
    """Return a file or folder under ``$SSD_EDGE_DATA``, or None if it does not exist."""
    root = os.environ.get("SSD_EDGE_DATA")
    path = Path(root).expanduser() / name if root else None
    return path if path is not None and files.exists(path) else None


class Sources:
    """Data sets and backbones, each opened once.

    Args:
        device: Device to compute embeddings on.
        listener: Receives progress events.
        tiny_backbone: Folder of a package pretrained on the first half of Tiny-ImageNet; by default
            ``$SSD_EDGE_DATA/backbones/tiny-100``.
    """

    def __init__(self, device: torch.device, listener: Listener, tiny_backbone: Path | None = None) -> None:
        self.device, self.listener = device, listener
        self.tiny_backbone = tiny_backbone or locate("backbones/tiny-100")
        self._embedders: dict[str, Embedder] = {}
        self._datasets: dict[tuple[str, tuple[str, ...]], Dataset] = {}
        self._inputs: dict[tuple[Any, ...], Inputs] = {}

    def embedder(self, name: str) -> Embedder:
        """Return the backbone of that name."""
        if name not in self._embedders:
            backbone = "tiny" if name == "shipped" else f"package:{self.tiny_backbone}"
            self._embedders[name] = open_backbone(BackboneConfig(backbone), self.device)
        return self._embedders[name]

    def dataset(self, path: str, classes: tuple[str, ...]) -> Dataset:
        """Return a data set."""
        if (path, classes) not in self._datasets:
            self._datasets[path, classes] = load(DataConfig(path=path, classes=classes), 0)
        return self._datasets[path, classes]

    def inputs(self, stream: StreamSource, images: tuple[int, ...], may_stand_in: bool) -> Inputs:
        """Return the embeddings for a stream.

        Args:
            stream: The stream.
            images: Maximum number of training and test images per class; () for all.
            may_stand_in: Use the bundled digits if the data is missing.

        Raises:
            InputError: The data is missing or damaged.
        """
        absent = may_stand_in and locate(stream.data) is None
        path, classes = ("digits", ()) if absent else (stream.data, stream.classes)
        key = (path, classes, images, stream.pixels, stream.backbone)
        if key not in self._inputs:
            dataset = self.dataset(path, classes)
            if images:
                dataset = subset(dataset, *images)
            if stream.pixels:
                made, identity, priors = pixels(dataset), "pixels", Priors()
            else:
                embedder = self.embedder("shipped" if absent else stream.backbone)
                made = embed(dataset, embedder, self.listener, True)
                identity, priors = embedder.identity, embedder.priors
            empty = Images([], ())
            light = dataclasses.replace(dataset, train=empty, test=empty)
            self._inputs[key] = Inputs(light, made, identity, priors, (), absent)
        inputs = self._inputs[key]
        note = (f"digits in place of {stream.data}: data not found",) if absent else ()
        return dataclasses.replace(inputs, notes=note)

    def keys(
        self, inputs: Inputs, settings: Mapping[str, Any], stream: StreamSource, may_pretrain: bool
    ) -> tuple[Priors, dict[str, Any] | None, tuple[str, ...]]:
        """Return the priors for a learner, pretraining keys for its settings if necessary.

        Args:
            inputs: Embeddings of its stream.
            settings: Settings of the learner; without ``pretrained`` the priors are returned unchanged.
            stream: Stream of the learner.
            may_pretrain: Allow keys to be pretrained.

        Returns:
            Priors, the recipe of their keys (None for a learner without keys), and notes for the page.
        """
        priors = inputs.priors
        if not settings.get("pretrained", False):
            return priors, None, ()
        neurons, k, shift = settings["neurons"], settings["k"], float(settings["shift"])
        made = priors.student
        if priors.keys is not None and (len(priors.keys), made.get("k"), made.get("shift")) == (neurons, k, shift):
            return priors, {"source": "backbone", **_plain(made)}, ()
        if priors.keys is None or not may_pretrain or locate(PRETRAINING) is None or k >= neurons:
            fits = priors.keys is not None and len(priors.keys) == neurons
            kind = f"keys pretrained for k = {made.get('k')}, not {k}" if fits else "random keys"
            why = "pretraining data not found" if may_pretrain else "none are pretrained for this budget"
            return priors, {"source": "backbone" if fits else "random"}, (f"{kind}: {why}",)
        config = StudentConfig(neurons=neurons, k=k, shift=shift)
        classes = TINY_CLASSES if stream.backbone == "tiny-100" else ()
        dataset = self.dataset(PRETRAINING, classes)
        recipe = {**dataclasses.asdict(config), "data": dataset.fingerprint, "seed": 0}
        asked = {"student": recipe, "backbone": inputs.identity, "torch": torch.__version__}
        arrays = cache.embeddings(asked, lambda: self._pretrained(config, dataset, stream.backbone))
        switch = float(arrays["switch"][0])
        student = {**made, **dataclasses.asdict(config), "switch": switch}
        priors = dataclasses.replace(priors, keys=arrays["keys"], counters=arrays["counters"], student=student)
        description = f"r = {neurons:,}, k = {k}" + (f", s = {shift:g}" if shift else "")
        return priors, {"source": "pretrained here", **recipe}, (f"keys pretrained here for {description}",)

    def _pretrained(self, config: StudentConfig, dataset: Dataset, backbone: str) -> dict[str, np.ndarray]:
        vectors = torch.from_numpy(embed(dataset, self.embedder(backbone), self.listener, True)["train"])
        labels = torch.from_numpy(dataset.train_labels)
        title = f"pretraining {config.neurons:,} keys, k = {config.k}"
        with events.progress(self.listener, title, config.epochs, "epoch") as update:
            epochs = itertools.count()
            keys, counters, switch, _ = pretrain_student(
                vectors, labels, int(labels.max()) + 1, config, 0, lambda text: update(next(epochs), 1.0)
            )
        return {"keys": keys.numpy(), "counters": counters.numpy(), "switch": np.array([switch])}


def _plain(made: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that determine pretrained keys."""
    return {key: made[key] for key in ("neurons", "k", "shift", "epochs", "lr", "seed") if key in made}


def subset(dataset: Dataset, train: int, test: int) -> Dataset:
    """Return a seeded sample of at most `train` and `test` images of each class."""

    def pick(labels: np.ndarray, count: int) -> np.ndarray:
        parts = [
            np.random.default_rng([label, 0]).permutation(np.flatnonzero(labels == label))[:count]
            for label in range(len(dataset.classes))
        ]
        return np.sort(np.concatenate(parts))

    kept, held = pick(dataset.train_labels, train), pick(dataset.test_labels, test)
    digest = files.sha256(files.json_bytes([dataset.fingerprint, train, test]))
    return dataclasses.replace(
        dataset,
        train=dataset.train.take(kept),
        train_labels=dataset.train_labels[kept],
        test=dataset.test.take(held),
        test_labels=dataset.test_labels[held],
        fingerprint=digest,
    )


def pixels(dataset: Dataset) -> dict[str, np.ndarray]:
    """Return the first channel without the border, in 0..1: ``train`` and ``test``, ``(N, 784)``."""
    inner = slice(FRAME, SIDE - FRAME)
    arrays = {}
    for part, images in (("train", dataset.train), ("test", dataset.test)):
        batches = [batch[:, inner, inner, 0].reshape(len(batch), -1) for batch in images.batches(Pixels(SIDE))]
        arrays[part] = np.concatenate(batches).astype(np.float32) / 255
    return arrays


def write_inputs(folder: Path, inputs: Inputs) -> Path:
    """Write embeddings and labels for worker processes to a file named by a hash of the inputs."""
    dataset = inputs.dataset
    key = files.sha256(files.json_bytes([dataset.fingerprint, inputs.identity]))[:16]
    path = folder / f"inputs-{key}.safetensors"
    if not files.exists(path):
        arrays = {
            **inputs.embedded,
            "train_labels": dataset.train_labels,
            "test_labels": dataset.test_labels,
        }
        files.write_tensors(path, arrays, {"name": dataset.name, "classes": list(dataset.classes)})
    return path


def read_inputs(path: Path) -> Inputs:
    """Read a file of `write_inputs`; the priors are empty."""
    arrays, metadata = files.read_tensors(path)
    empty = Images([], ())
    dataset = Dataset(
        metadata["name"], tuple(metadata["classes"]), empty, arrays["train_labels"], empty, arrays["test_labels"],
        "", "", True,
    )  # fmt: skip
    return Inputs(dataset, {"train": arrays["train"], "test": arrays["test"]}, "", Priors())


PRIOR_ARRAYS = ("within_covariance", "keys", "counters")


def write_priors(folder: Path, priors: Priors) -> Path:
    """Write priors for worker processes to a file named by its hash."""
    arrays = {name: getattr(priors, name) for name in PRIOR_ARRAYS if getattr(priors, name) is not None}
    metadata: dict[str, Any] = {"count": priors.count, "student": priors.student}
    data = files.tensor_bytes(arrays, metadata)
    path = folder / f"priors-{files.sha256(data)[:16]}.safetensors"
    if not files.exists(path):
        files.write_bytes(path, data)
    return path


def read_priors(path: Path) -> Priors:
    """Read a file of `write_priors`."""
    arrays, metadata = files.read_tensors(path)
    return Priors(count=metadata["count"], student=metadata["student"], **arrays)
