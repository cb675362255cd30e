"""Embedders of the workstation, which run a backbone on uint8 images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ssd_edge import files
from ssd_edge.backbones import graph, names
from ssd_edge.backbones import package as packages
from ssd_edge.backbones.levels import scales
from ssd_edge.backbones.networks import ARCHITECTURES, EmbeddingNetwork
from ssd_edge.backbones.onnx import OnnxEmbedder
from ssd_edge.config import BackboneConfig
from ssd_edge.errors import BundleRefusedError
from ssd_edge.images import Pixels
from ssd_edge.learners.priors import Priors


class Embedder(Protocol):
    """A backbone that can be run.

    Attributes:
        identity: Digest of everything that determines the output; part of the cache key.
        pixels: How images become its input.
        dim: Embedding size D.
        widths: Widths of the levels that an embedding joins; they add up to D.
        standardised: True if the output is standardised; False for raw features, which the first task standardises.
        priors: Statistics from pretraining.
        provenance: Entries for the model card.
        graph: The network that a run keeps in its folder; None for a package, which the run only names.
    """

    identity: str
    pixels: Pixels
    dim: int
    widths: tuple[int, ...]
    standardised: bool
    priors: Priors
    provenance: dict[str, Any]
    graph: graph.NetworkGraph | None

    def embed(self, images: np.ndarray) -> np.ndarray:
        """Embed images, uint8 RGB ``(N, size, size, 3)``, and return float32 ``(N, D)``."""
        ...


def network(package: packages.BackbonePackage) -> EmbeddingNetwork:
    """Return the network of a package in eval mode, from uint8 ``(N, H, W, 3)`` to embeddings.

    Raises:
        BundleRefusedError: The weights do not match the architecture.
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
    """Return mean and standard deviation ``(D,)`` of features ``(N, D)``, float64.

    The standard deviation has a lower bound, so that constant features stay finite.
    """
    mu, sigma = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    return mu, np.maximum(sigma, 1e-3 * max(float(sigma.max()), 1e-12))


def level_standardisation(features: np.ndarray, widths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return what standardises the features of a network by level: a mean and a scale of each, ``(D,)``, float64.

    All features of a level have one scale: the images of a first task, often a few dozen, do not say which features
    vary little. Dividing each by its own deviation costs up to two points of accuracy (docs/slda.md). The scale is
    divided by the level's factor in `levels.scales`.

    Args:
        features: Raw features, ``(N, D)``.
        widths: Widths of the levels in them, which add up to D.
    """
    return features.mean(0, dtype=np.float64), level_scales(features.std(0, dtype=np.float64), widths)


def level_scales(deviations: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    """Return the scale of each feature in `level_standardisation` from the standard deviations, ``(D,)``."""
    parts = zip(np.split(deviations, np.cumsum(widths)[:-1]), scales(widths), strict=True)
    sigma = [np.full(len(part), max(float(np.sqrt(np.mean(part**2))), 1e-12) / scale) for part, scale in parts]
    return np.concatenate(sigma)


class TorchEmbedder:
    """Embedder that runs the backbone of a package with PyTorch."""

    def __init__(self, package: packages.BackbonePackage, device: torch.device) -> None:
        self.network = network(package).to(device)
        self.device = device
        self.identity = package.identity
        self.pixels, self.dim = Pixels.from_dict(package.card), package.card["dim"]
        self.widths: tuple[int, ...] = (self.dim,)
        self.standardised = True
        self.priors = package.priors
        self.provenance = package.card
        self.graph: graph.NetworkGraph | None = None

    @torch.inference_mode()
    def embed(self, images: np.ndarray) -> np.ndarray:
        """Embed images, uint8 RGB ``(N, size, size, 3)``, and return float32 ``(N, D)``."""
        parts = [self.network(torch.from_numpy(part).to(self.device)).cpu().numpy() for part in _parts(images, 500)]
        return np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)


def _parts(images: np.ndarray, batch: int) -> Iterable[np.ndarray]:
    """Yield contiguous batches."""
    return (np.ascontiguousarray(images[start : start + batch]) for start in range(0, len(images), batch))


def open_backbone(
    config: BackboneConfig, device: torch.device, folder: Path | None = None, say: names.Say = lambda text: None
) -> Embedder:
    """Open the backbone of a configuration.

    Args:
        config: Configuration.
        device: Where a package is run; graphs run on the CPU.
        folder: Folder of a run: its backbone is opened as the run kept it, without library and network.
        say: Receives what takes long, such as a download.

    Raises:
        InputError: The name is unknown, or a file cannot be used.
        BundleRefusedError: The package or the run is damaged.
        EnvironmentUnfitError: A package is missing, or a download fails.
    """
    kept = folder is not None and files.is_file(folder / graph.MODEL)
    if not kept and (package := names.package_folder(config)) is not None:
        return TorchEmbedder(packages.load(package), device)
    return OnnxEmbedder(names.resolve(config, say) if folder is None else graph.load(folder))


def write_backbone(folder: Path, name: str, embedder: Embedder) -> None:
    """Write backbone.json and, before it, the graph if there is one: what follows needs no library for it."""
    network = embedder.graph
    if network is not None:
        files.write_bytes(folder / graph.MODEL, network.model)
    files.write_json(
        folder / graph.DESCRIPTION,
        {
            "name": name,
            "identity": embedder.identity,
            **embedder.pixels.to_dict(),
            "dim": embedder.dim,
            "standardised": embedder.standardised,
            "provenance": embedder.provenance,
            "graph": network and network.to_dict(),
        },
    )
