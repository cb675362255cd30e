"""Backbone packages: folders with weights and with the statistics from pretraining that learners need.

```
backbone.safetensors   weights of the body; matrices fp16, vectors fp32
priors.safetensors     mu, sigma (D,), count, within_covariance (D, D) of the standardised embeddings,
                       keys (r, D) and counters (r,) of a pretrained SDMLP,
card.json              provenance: data and terms, command, seed, accuracy
```
A user's own ONNX backbone has no package: its μ and σ are measured on the first task and then fixed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssd_edge import files
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.images import Pixels
from ssd_edge.learners.base import LARGEST_COUNT, TensorSpec, check_state, check_unit
from ssd_edge.learners.closed_form.sums import check_covariance
from ssd_edge.learners.priors import Priors

ROUNDING = 2e-3  # of the length of keys in float16
SCHEMA = {  # of priors.safetensors; everything but mu and sigma is optional
    "mu": TensorSpec(("D",), "float32", "mean of the raw features"),
    "sigma": TensorSpec(
        ("D",), "float32", "standard deviation of the raw features", least=float(np.finfo(np.float32).tiny)
    ),
    "within_covariance": TensorSpec(("D", "D"), "float32", "within-class covariance"),
    "keys": TensorSpec(("k", "D"), "float16", "keys of an SDMLP", least=0),
    "counters": TensorSpec(("k",), "float32", "activations of each neuron", least=0, most=LARGEST_COUNT),
}

WEIGHTS, PRIORS, CARD = "backbone.safetensors", "priors.safetensors", "card.json"
SHIPPED = Path(__file__).parent / "shipped"


@dataclass(frozen=True)
class BackbonePackage:
    """A trained backbone as NumPy arrays.

    Attributes:
        weights: State dict of the body (`networks.ARCHITECTURES[card["arch"]]`).
        mu: Mean of the raw features over the pretraining data, ``(D,)``.
        sigma: Standard deviation of the raw features, ``(D,)``.
        priors: Statistics for the learners.
        card: Provenance, with at least ``arch``, ``size``, ``dim``, ``data`` and ``terms``.
    """

    weights: dict[str, np.ndarray]
    mu: np.ndarray
    sigma: np.ndarray
    priors: Priors
    card: dict[str, Any]

    @property
    def identity(self) -> str:
        """Short digest of everything that determines the embedding; excludes the keys."""
        metadata: dict[str, Any] = {
            key: self.card[key] for key in ("arch", "size", "fit", "resize", "interpolation") if key in self.card
        }
        data = files.tensor_bytes({**compact(self.weights), "mu": self.mu, "sigma": self.sigma}, metadata)
        return files.sha256(data)[:16]


def compact(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert matrices to fp16 and vectors (biases, normalisation) to fp32, and drop the counters of batch norm."""
    return {
        name: tensor.astype(np.float16 if tensor.ndim >= 2 else np.float32)
        for name, tensor in weights.items()
        if not name.endswith("num_batches_tracked")
    }


def _unit_rows(keys: np.ndarray | None) -> np.ndarray | None:
    """Normalise rows in fp32, which undoes the effect of rounding to fp16 on their length."""
    if keys is None:
        return None
    wide = keys.astype(np.float32)
    unit: np.ndarray = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    return unit


def save(package: BackbonePackage, folder: Path) -> int:
    """Write a package and return its size in bytes."""
    folder = Path(folder)
    files.make_directory(folder)
    priors: dict[str, np.ndarray] = {"mu": package.mu.astype(np.float32), "sigma": package.sigma.astype(np.float32)}
    if package.priors.within_covariance is not None:
        priors["within_covariance"] = package.priors.within_covariance.astype(np.float32)
    if package.priors.keys is not None and package.priors.counters is not None:
        priors["keys"] = package.priors.keys.astype(np.float16)
        priors["counters"] = package.priors.counters.astype(np.float32)
    files.write_tensors(folder / WEIGHTS, compact(package.weights))
    metadata = {"count": package.priors.count, "student": package.priors.student}
    files.write_tensors(folder / PRIORS, priors, metadata)
    files.write_json(folder / CARD, package.card)
    return sum(files.Tree(folder).size(folder / name) for name in (WEIGHTS, PRIORS, CARD))


def load(folder: Path | None = None) -> BackbonePackage:
    """Load a package; without a folder, the one that ships with SSD-Edge.

    Raises:
        InputError: The folder is not a backbone package.
        BundleRefusedError: A file is damaged.
    """
    folder = SHIPPED if folder is None else Path(folder)
    missing = [name for name in (WEIGHTS, PRIORS, CARD) if not files.is_file(folder / name)]
    if missing:
        raise InputError(
            f"{folder} is not a backbone package: {', '.join(missing)} missing. "
            f"Make one with: ssd-edge pretrain {folder} data.path=IMAGES"
        )
    weights, _ = files.read_tensors(folder / WEIGHTS)
    priors, metadata = files.read_tensors(folder / PRIORS)
    card = files.read_json(folder / CARD)
    try:
        card = {**card, "arch": str(card["arch"]), "size": int(card["size"]), "dim": int(card["dim"])}
        Pixels.from_dict(card)
        _check_priors(priors, card["dim"], folder / PRIORS)
        return BackbonePackage(
            weights={name: tensor.astype(np.float32) for name, tensor in weights.items()},
            mu=priors["mu"],
            sigma=priors["sigma"],
            priors=Priors(
                count=int(metadata["count"]),
                within_covariance=priors.get("within_covariance"),
                keys=_unit_rows(priors.get("keys")),
                counters=priors.get("counters"),
                student=dict(metadata.get("student", {})),
            ),
            card=card,
        )
    except (KeyError, TypeError, ValueError, InputError) as error:
        raise BundleRefusedError(
            f"the backbone package {folder} has a missing or wrong entry ({error}); restore it"
        ) from error


def _check_priors(arrays: dict[str, np.ndarray], dim: int, path: Path) -> None:
    """Check shapes and values of the statistics, and that those which belong together are all there.

    Raises:
        BundleRefusedError: A tensor is missing, unknown or wrong.
    """
    groups: list[Iterable[str]] = [("within_covariance",), ("keys", "counters")]
    needed = {"mu", "sigma"}.union(*(group for group in groups if arrays.keys() & set(group)))
    schema = {name: spec for name, spec in SCHEMA.items() if name in needed}
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    check_state(state, schema, {"D": dim}, str(path))
    if "within_covariance" in state:
        check_covariance(state["within_covariance"], f"{path}: the within-class covariance")
    if "keys" in state:
        check_unit(state["keys"], ROUNDING, f"{path}: the keys")


def with_card(package: BackbonePackage, **changes: Any) -> BackbonePackage:
    """Return the package with changed card entries."""
    return dataclasses.replace(package, card={**package.card, **changes})
