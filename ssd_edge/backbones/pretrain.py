"""Pretrain a backbone package (`ssd-edge pretrain`): backbone, statistics and SDMLP keys."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssd_edge.backbones import package as packages
from ssd_edge.backbones.checkpoint import Checkpoint
from ssd_edge.backbones.embedder import TorchEmbedder, standardisation
from ssd_edge.backbones.keys import with_student
from ssd_edge.backbones.networks import FEATURES
from ssd_edge.backbones.package import BackbonePackage
from ssd_edge.backbones.ranks import Ranks
from ssd_edge.backbones.supervised import ALONE, normalise, top1, train_backbone
from ssd_edge.config import PretrainConfig, PretrainingConfig, to_tree
from ssd_edge.data import Dataset
from ssd_edge.errors import InputError
from ssd_edge.images import Pixels, check_embedded
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.priors import Priors

Log = Callable[[str], None]
NO_EFFECT = ("device", "threads", "terms")  # settings that do not change the weights, except for rounding


def as_tensor(images: np.ndarray) -> torch.Tensor:
    """Convert uint8 images ``(N, H, W, 3)`` to a contiguous uint8 tensor ``(N, 3, H, W)``."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


@torch.inference_mode()
def features_of(body: torch.nn.Module, images: torch.Tensor, device: torch.device) -> np.ndarray:
    """Return the raw features, float32 ``(N, D)``, of uint8 images ``(N, 3, H, W)``."""
    body = body.to(device).eval()
    parts = [body(normalise(part.to(device))).float().cpu().numpy() for part in torch.split(images, 1000)]
    return np.concatenate(parts)


def within_covariance(embeddings: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the pooled covariance ``(D, D)`` around the class means, divided by N − C."""
    statistics = ClassStatistics(embeddings.shape[1])
    statistics.add(torch.from_numpy(embeddings), torch.from_numpy(labels))
    return statistics.within_covariance().numpy()


def pretrain_backbone(
    config: PretrainConfig,
    dataset: Dataset,
    device: torch.device,
    command: str,
    folder: Path,
    log: Log,
    ranks: Ranks = ALONE,
) -> BackbonePackage:
    """Train a backbone, measure its statistics, and pretrain the keys of SDMLP.

    The statistics are measured with the stored weights (fp16) and without augmentation. Of several processes, the one
    of rank 0 calls this, and the others `train_backbone` without images.

    Args:
        config: Configuration.
        dataset: Images.
        device: Training device.
        command: What was typed, for the card.
        folder: Existing folder of the checkpoint, from which a training that was interrupted is continued.
        log: Receives progress messages.
        ranks: The processes that train together.

    Raises:
        InputError: There are fewer than two classes, the loss is not finite, or the checkpoint in the folder belongs to
            another training.
        BundleRefusedError: The checkpoint is damaged.
    """
    if len(dataset.classes) < 2:
        raise InputError(f"pretraining needs at least two classes, but {dataset.name} has {len(dataset.classes)}")
    pixels = Pixels(config.train.size)
    log(f"decoding {len(dataset.train_labels):,} training images to {pixels.size}×{pixels.size}")
    train = as_tensor(dataset.train.load(np.arange(len(dataset.train)), pixels))
    labels = torch.from_numpy(dataset.train_labels)

    def report(epoch: int, epochs: int, loss: float, seconds: float) -> None:
        left = seconds / epoch * (epochs - epoch)
        rate = epoch * len(train) / seconds
        log(f"epoch {epoch}/{epochs}  loss {loss:.3f}  {rate:,.0f} images/s  {left / 60:.1f} min left")

    checkpoint = Checkpoint(folder, about(config.train, train, labels), log)
    body, head = train_backbone(train, labels, config.train, device, report, ranks, checkpoint)
    test = as_tensor(dataset.test.load(np.arange(len(dataset.test)), pixels))
    accuracy = top1(body, head, test, torch.from_numpy(dataset.test_labels), device)
    log(f"top-1 on {len(test):,} test images of {len(dataset.classes)} classes: {accuracy:.3f}")
    weights = {name: tensor.detach().cpu().numpy() for name, tensor in body.state_dict().items()}
    stored = {name: torch.from_numpy(t.astype(np.float32)) for name, t in packages.compact(weights).items()}
    body.load_state_dict(stored, strict=False)
    features = features_of(body, train, device)
    mu, sigma = standardisation(features)
    embeddings = ((features - mu) / sigma).astype(np.float32)
    card = {
        "arch": config.train.arch,
        "size": pixels.size,
        "dim": FEATURES,
        "data": f"{dataset.name}: {len(train):,} images of {len(dataset.classes)} classes ({dataset.split})",
        "terms": config.train.terms,
        "command": command,
        "config": to_tree(config)["train"],
        "seed": config.train.seed,
        "accuracy": {"top1": round(accuracy, 4), "on": f"{len(test):,} held-out images of the same classes"},
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }
    priors = Priors(count=len(train), within_covariance=within_covariance(embeddings, dataset.train_labels))
    package = BackbonePackage(weights, mu.astype(np.float32), sigma.astype(np.float32), priors, card)
    return with_student(package, embeddings, dataset.train_labels, config.student, config.train.seed, log)


def about(config: PretrainingConfig, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Return what determines the weights that a training gives: settings, and a digest of its images and labels."""
    settings = {f"train.{name}": value for name, value in dataclasses.asdict(config).items() if name not in NO_EFFECT}
    data = hashlib.sha256(str(tuple(images.shape)).encode())
    data.update(images.numpy().data)
    data.update(labels.numpy().data)
    return {**settings, "the digest of the images": data.hexdigest()[:16]}


def retrain_student(
    package: BackbonePackage, config: PretrainConfig, dataset: Dataset, device: torch.device, log: Log
) -> BackbonePackage:
    """Make new keys, e.g. with another r or k, for an unchanged backbone (``--student``).

    Args:
        package: Package with the backbone.
        config: Configuration, of which `student` is used.
        dataset: Images that the backbone was trained on.
        device: Device for embedding the images.
        log: Receives progress messages.
    """
    embedder = TorchEmbedder(package, device)
    log(f"embedding {len(dataset.train):,} images")
    embeddings = np.concatenate([embedder.embed(part) for part in dataset.train.batches(embedder.pixels)])
    check_embedded(embeddings, dataset.train.names)
    return with_student(package, embeddings, dataset.train_labels, config.student, config.train.seed, log)
