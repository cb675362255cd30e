"""Embedders of the workstation: uint8 images → embeddings, with the backbone that a configuration names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ssd_edge.backbones import package as packages
from ssd_edge.backbones.networks import ARCHITECTURES, EmbeddingNetwork
from ssd_edge.config import BackboneConfig
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.learners.priors import Priors


class Embedder(Protocol):
    """A backbone that runs.

    Attributes:
        identity: digest of everything that decides its output; part of the cache's key.
        size: side of its input in pixels.
        dim: D.
        standardised: whether it gives embeddings; else raw features, to be standardised by the first task.
        priors: what pretraining knows.
        provenance: for the model card.
    """

    identity: str
    size: int
    dim: int
    standardised: bool
    priors: Priors
    provenance: dict[str, Any]

    def embed(self, images: np.ndarray) -> np.ndarray:
        """uint8 RGB ``(N, size, size, 3)`` → float32 ``(N, D)``."""
        ...


def network(package: packages.BackbonePackage) -> EmbeddingNetwork:
    """The module of a package, in eval mode: uint8 ``(N, H, W, 3)`` → embeddings.

    Raises:
        BundleRefusedError: weights that do not fit the architecture.
    """
    arch = package.card["arch"]
    if arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise BundleRefusedError(f"unknown architecture '{arch}' in the backbone package; known: {known}")
    body = ARCHITECTURES[arch]()
    weights = {name: torch.from_numpy(tensor) for name, tensor in package.weights.items()}
    try:
        missing, unexpected = body.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise BundleRefusedError(f"the backbone's weights do not fit '{arch}' ({error})") from error
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise BundleRefusedError(f"the backbone's weights do not fit '{arch}': missing {missing}, unknown {unexpected}")
    return EmbeddingNetwork(body, torch.from_numpy(package.mu), torch.from_numpy(package.sigma)).eval()


def standardisation(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation ``(D,)`` of raw features ``(N, D)``, float64; a dead feature must not blow up."""
    mu, sigma = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    return mu, np.maximum(sigma, 1e-3 * max(float(sigma.max()), 1e-12))


class TorchEmbedder:
    """The backbone of a package, run by PyTorch."""

    def __init__(self, package: packages.BackbonePackage, device: torch.device) -> None:
        self.network = network(package).to(device)
        self.device = device
        self.identity = package.identity
        self.size, self.dim = package.card["size"], package.card["dim"]
        self.standardised = True
        self.priors = package.priors
        self.provenance = package.card

    @torch.inference_mode()
    def embed(self, images: np.ndarray) -> np.ndarray:
        parts = [self.network(torch.from_numpy(part).to(self.device)).cpu().numpy() for part in _parts(images, 500)]
        return np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)


def _parts(images: np.ndarray, batch: int) -> Iterable[np.ndarray]:
    return (np.ascontiguousarray(images[start : start + batch]) for start in range(0, len(images), batch))


def open_backbone(config: BackboneConfig, device: torch.device) -> Embedder:
    """The embedder that a configuration names: the shipped package, another one, or the user's ONNX.

    Raises:
        InputError: both a package and an ONNX file are named, or the file cannot be used.
        BundleRefusedError: a damaged package.
    """
    if config.onnx and config.path:
        raise InputError(f"backbone.path={config.path} and backbone.onnx={config.onnx} exclude each other; drop one")
    if config.onnx:
        from ssd_edge.backbones.onnx import OnnxEmbedder

        return OnnxEmbedder(config)
    return TorchEmbedder(packages.load(Path(config.path) if config.path else None), device)
