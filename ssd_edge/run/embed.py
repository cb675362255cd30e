"""Embedding of the images of a data set, with a cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ssd_edge.backbones.embedder import Embedder
from ssd_edge.data import Dataset, Images, cache
from ssd_edge.errors import InputError
from ssd_edge.images import check_embedded
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

    def compute() -> dict[str, np.ndarray]:
        total, done, parts = len(dataset.train) + len(dataset.test), 0, {}
        listener(Message(f"embedding {total:,} images"))
        with events.progress(listener, "embedding") as update:
            for part, images in (("train", dataset.train), ("test", dataset.test)):
                arrays = []
                for pixels in _batches(dataset, images, embedder):
                    arrays.append(embedder.embed(pixels))
                    done += len(pixels)
                    update(0, done / total, f"{done:,} images")
                parts[part] = np.concatenate(arrays)
                check_embedded(parts[part], images.names)
        return parts

    key = {"backbone": embedder.identity, "data": dataset.fingerprint, "torch": torch.__version__}
    return cache.embeddings(key, compute, enabled=use_cache)


def _batches(dataset: Dataset, images: Images, embedder: Embedder) -> Iterator[np.ndarray]:
    """Yield the decoded images; if one is bad, name every bad one of the data set."""
    try:
        yield from images.batches(embedder.pixels, EMBED_BATCH)
    except InputError:
        dataset.check()
        raise
