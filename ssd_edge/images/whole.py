"""A whole image, upright and with its proportions, e.g. to be shown or cut."""

from __future__ import annotations

import numpy as np
from PIL import ExifTags

from ssd_edge.images import _UPRIGHT, Pixels, _input_errors, _opened, _turned, decode


def whole(data: bytes | memoryview, name: str, longest: int) -> np.ndarray:
    """Decode an image without cutting or padding it.

    Args:
        data: Content of the file.
        name: Name of the image for error messages.
        longest: Most pixels of a side; a larger image is made smaller, a smaller one stays.

    Returns:
        uint8 RGB ``(H, W, 3)``.

    Raises:
        InputError: As `decode`.
    """
    with _opened(data, name) as image, _input_errors(name):
        size = image.size
        turned = 1 if image.format == "TIFF" else image.getexif().get(ExifTags.Base.Orientation)  # Pillow turns TIFF
    width, height = _turned(size, turned if isinstance(turned, int) and turned in _UPRIGHT else 1)
    pixels = Pixels(min(longest, max(width, height)), "pad", interpolation="bilinear")
    square = decode(data, name, pixels)
    across, down = pixels.resized(width, height)
    left, top = (pixels.size - across) // 2, (pixels.size - down) // 2
    return square[top : top + down, left : left + across]
