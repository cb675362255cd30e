"""Images as callers give them: paths, PIL images and arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ssd_edge import images as image_files
from ssd_edge.errors import InputError

ImageSource = str | Path | np.ndarray | Image.Image


def image_name(source: ImageSource, number: int) -> str:
    """Return the path of an image, or ``image NUMBER`` for one without a path."""
    return str(source) if isinstance(source, str | Path) else f"image {number}"


def decode(source: ImageSource, name: str, pixels: image_files.Pixels) -> np.ndarray:
    """Return an image as uint8 RGB ``(size, size, 3)``.

    Args:
        source: The image.
        name: Name in error messages for an image without a path.
        pixels: How it becomes the input of the backbone.

    Raises:
        InputError: The image cannot be read or has an unsupported type.
    """
    if isinstance(source, np.ndarray):
        return image_files.from_array(source, pixels, name)
    if isinstance(source, Image.Image):
        return image_files.to_array(source, name, pixels)
    if not isinstance(source, str | Path):
        raise InputError(f"{name} is a {type(source).__name__}, but a path, a PIL image or a uint8 array is needed")
    return image_files.decode(image_files.read(source), str(source), pixels)


def refuse_bad(sources: Sequence[ImageSource], names: Sequence[str], pixels: image_files.Pixels) -> None:
    """Decode all images again, after one of them could not be, to name every bad one.

    Raises:
        BadFilesError: There is one.
    """
    problems = image_files.Problems()
    for source, name in zip(sources, names, strict=True):
        with problems.collect():
            decode(source, name, pixels)
    problems.check(len(sources))
