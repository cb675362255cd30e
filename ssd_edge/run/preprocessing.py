"""Does a backbone get its pixels as it was trained? A wrong mean or standard deviation is silent, and costs points.

A few training images are embedded with the mean and the standard deviation in use, and with the usual others. If with
another pair they lie clearly nearer to the means of their own classes, compared with other classes, the pair in use
looks wrong. Nothing else shows it: normalised pixels look plausible with any of them, and exporters fold the batch
normalisation that would know better into convolutions.

Pairs that hardly differ in accuracy are not told apart (docs/backbone.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from ssd_edge.backbones.embedder import Embedder, level_standardisation
from ssd_edge.backbones.onnx import OnnxEmbedder
from ssd_edge.backbones.wheels import IMAGENET_MEAN, IMAGENET_STD
from ssd_edge.config import BackboneConfig
from ssd_edge.data import Dataset, cache
from ssd_edge.errors import InputError

CLASSES, PER_CLASS, FEWEST = 32, 6, 32
CERTAIN = 3.0  # standard errors of the mean difference
USUAL = {
    "those of ImageNet": (IMAGENET_MEAN, IMAGENET_STD),
    "0.5 and 0.5 (pixels from -1 to 1)": ((0.5,) * 3, (0.5,) * 3),
    "0 and 1 (pixels from 0 to 1)": ((0.0,) * 3, (1.0,) * 3),
    "0 and 1/255 (pixels from 0 to 255)": ((0.0,) * 3, (1 / 255,) * 3),
}


def stated(config: BackboneConfig) -> bool:
    """Return True if the source of a backbone says how it was trained, and the configuration does not change it."""
    return not (config.name.startswith("onnx:") or config.mean or config.std)


def doubt(dataset: Dataset, embedder: Embedder, use_cache: bool, say: Callable[[str], None]) -> str | None:
    """Return a sentence if the mean and the standard deviation of a backbone look wrong, or None.

    Args:
        dataset: Training images and labels.
        embedder: The backbone; a package, which states them itself, is not doubted.
        use_cache: Keep the result for the same backbone and data.
        say: Told before the work begins.
    """
    graph = embedder.graph
    chosen = _choose(dataset.train_labels)
    if graph is None or len(chosen) < FEWEST:
        return None
    labels = dataset.train_labels[chosen]
    others = {name: pair for name, pair in USUAL.items() if not np.allclose(pair, (graph.mean, graph.std), rtol=0.05)}

    def compute() -> dict[str, np.ndarray]:
        say(f"comparing the usual means and standard deviations of pixels on {len(chosen)} training images")
        images = dataset.train.load(chosen, embedder.pixels)
        own = _nearness(embedder, images, labels)
        found = []
        for mean, std in others.values():
            try:
                other = _nearness(OnnxEmbedder(dataclasses.replace(graph, mean=mean, std=std)), images, labels)
            except InputError:  # its graph overflows with such pixels
                other = np.full(len(own), -1.0)
            found.append(other - own)
        return {"differences": np.stack(found)}

    key = {"preprocessing": embedder.identity, "data": dataset.fingerprint, "version": 1}
    differences = cache.embeddings(key, compute, use_cache)["differences"]
    errors = differences.std(1) / np.sqrt(differences.shape[1])
    certainty = differences.mean(1) / np.maximum(errors, 1e-12)
    best = int(differences.mean(1).argmax())
    if certainty[best] < CERTAIN:
        return None
    name = list(others)[best]
    mean, std = (",".join(f"{value:.4g}" for value in values) for values in others[name])
    return (
        f"backbone.mean and backbone.std look wrong: with {name}, {len(chosen)} training images lie nearer to their "
        f"classes than with mean {_shown(graph.mean)} and std {_shown(graph.std)}, by {certainty[best]:.1f} standard "
        f"errors; try: backbone.mean={mean} backbone.std={std}"
    )


def _shown(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.3g}" for value in dict.fromkeys(values))


def _choose(labels: np.ndarray) -> np.ndarray:
    """Return the positions of the first images of a few classes; the choice is the same for every backbone."""
    rng = np.random.default_rng(0)
    counts = np.bincount(labels)
    classes = rng.permutation(np.flatnonzero(counts > 1))[:CLASSES]
    each = max(PER_CLASS, CLASSES * PER_CLASS // max(len(classes), 1))
    parts = [rng.permutation(np.flatnonzero(labels == label))[:each] for label in classes.tolist()]
    return np.sort(np.concatenate(parts)) if len(parts) > 1 else np.zeros(0, np.int64)


def _nearness(embedder: Embedder, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return how much nearer each image is to the others of its class than to the nearest other class, -1..1."""
    raw = embedder.embed(images).astype(np.float64)
    if not np.isfinite(raw).all():
        return np.full(len(labels), -1.0)
    mu, sigma = level_standardisation(raw, embedder.widths)
    features = (raw - mu) / sigma
    _, rows, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), features.shape[1]))
    np.add.at(sums, rows, features)
    away = np.stack([((features - mean) ** 2).sum(1) for mean in sums / counts[:, None]], axis=1)
    without = (sums[rows] - features) / (counts[rows] - 1)[:, None]
    own = ((features - without) ** 2).sum(1)
    away[np.arange(len(rows)), rows] = np.inf
    other = away.min(1)
    nearness: np.ndarray = (other - own) / np.maximum(other + own, 1e-12)
    return nearness
