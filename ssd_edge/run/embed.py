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


def embed(
    dataset: Dataset, embedder: Embedder, listener: Listener, use_cache: bool, second: bool = False
) -> dict[str, np.ndarray]:
    """Return the embeddings ``train`` ``(N, D)`` and ``test`` ``(M, D)`` of a data set.

    Args:
        dataset: Images.
        embedder: Backbone.
        listener: Receives progress events.
        use_cache: Read embeddings of the same backbone and data from the cache, and write them to it.
        second: Embed the second views of the training images too, as ``second`` ``(N, D)``.

    Raises:
        InputError: If an image cannot be decoded, or if the backbone gives NaN for one; the message names it.
    """

    key = {"backbone": embedder.identity, "data": dataset.fingerprint, "torch": torch.__version__}
    images = {"train": dataset.train, "test": dataset.test}
    found = cache.embeddings(key, lambda: _embed(dataset, images, embedder, listener), enabled=use_cache)
    if second:
        views = {"second": dataset.train}
        key["second view"] = str(MIDDLE)
        found |= cache.embeddings(key, lambda: _embed(dataset, views, embedder, listener, second_view), use_cache)
    return found


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
