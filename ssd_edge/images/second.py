"""The second view of an image: its middle, enlarged and mirrored."""

from __future__ import annotations

import numpy as np
from PIL import Image

MIDDLE = 0.8  # of each side; docs/slda.md has what it is worth


def second_view(images: np.ndarray) -> np.ndarray:
    """Return the second view of each image, uint8 ``(N, size, size, 3)``.

    Args:
        images: uint8 ``(N, size, size, 3)``.
    """
    size = images.shape[1]
    inner = max(1, round(MIDDLE * size))
    start = (size - inner) // 2
    views = np.empty_like(images)
    for view, image in zip(views, images, strict=True):
        middle = Image.fromarray(image[start : start + inner, start : start + inner][:, ::-1].copy())
        view[:] = np.asarray(middle.resize((size, size), Image.Resampling.BICUBIC))
    return views
