"""Embedding of the images of a data set, with a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch

from ssd_edge.backbones.embedder import Embedder
from ssd_edge.data import Dataset, Images, cache
from ssd_edge.errors import InputError
from ssd_edge.images import check_embedded
from ssd_edge.images.second import MIDDLE, second_view
from ssd_edge.report import events
from ssd_edge.report.events import Listener, Message

EMBED_BATCH = 512


def embed(dataset: Dataset, embedder: Embedder, listener: Listener, use_cache: bool) -> dict[str, np.ndarray]:
    """Return the embeddings ``train`` ``(N, D)`` and ``test`` ``(M, D)`` of a data set.

    Args:
        dataset: Images.
        embedder: Backbone.
        listener: Receives progress events.
        use_cache: Read embeddings of the same backbone and data from the cache, and write them to it.

    Raises:
        InputError: If an image cannot be decoded, or if the backbone gives NaN for one; the message names it.
    """
    images = {"train": dataset.train, "test": dataset.test}
    key = _key(dataset, embedder)
    return cache.embeddings(key, lambda: _embed(dataset, images, embedder, listener), enabled=use_cache)


def embed_second(dataset: Dataset, embedder: Embedder, listener: Listener, use_cache: bool) -> np.ndarray:
    """Return the embeddings of the second views of training images, ``(N, D)``.

    Args:
        dataset: Images.
        embedder: Backbone.
        listener: Receives progress events.
        use_cache: As for `embed`.

    Raises:
        InputError: As `embed`.
    """
    key = {**_key(dataset, embedder), "second view": str(MIDDLE)}
    views = {"second": dataset.train}
    return cache.embeddings(key, lambda: _embed(dataset, views, embedder, listener, second_view), use_cache)["second"]


def _key(dataset: Dataset, embedder: Embedder) -> dict[str, str]:
    return {"backbone": embedder.identity, "data": dataset.fingerprint, "torch": torch.__version__}


def _embed(
    dataset: Dataset,
    parts: Mapping[str, Images],
    embedder: Embedder,
    listener: Listener,
    view: Callable[[np.ndarray], np.ndarray] = lambda pixels: pixels,
) -> dict[str, np.ndarray]:
    """Return the embeddings of a view of the images of each part."""
    total, done, found = sum(map(len, parts.values())), 0, {}
    listener(Message(f"embedding {total:,} images"))
    with events.progress(listener, "embedding") as update:
        for part, images in parts.items():
            arrays = []
            for pixels in _batches(dataset, images, embedder):
                arrays.append(embedder.embed(view(pixels)))
                done += len(pixels)
                update(0, done / total, f"{done:,} images")
            found[part] = np.concatenate(arrays)
            check_embedded(found[part], images.names)
    return found


def _batches(dataset: Dataset, images: Images, embedder: Embedder) -> Iterator[np.ndarray]:
    """Yield the decoded images; if one is bad, name every bad one of the data set."""
    try:
        yield from images.batches(embedder.pixels, EMBED_BATCH)
    except InputError:
        dataset.check()
        raise
