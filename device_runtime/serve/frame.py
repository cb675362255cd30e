"""A frame of a camera, as it is shown, kept in memory and learned from."""

from __future__ import annotations

import dataclasses
import io

from PIL import Image

from ssd_edge import images
from ssd_edge.images.whole import whole

LONGEST = 1920  # pixels per side of an image that is no JPEG and becomes one
QUALITY = 95
_TRIED = images.Pixels(32)  # to find damage: the smaller, the faster a JPEG is decoded


@dataclasses.dataclass(frozen=True)
class Frame:
    """A frame of a camera.

    Attributes:
        camera: Id of the camera.
        number: Number of the frame in its stream, from 1.
        at: When it arrived, monotonic seconds.
        jpeg: Its bytes.
    """

    camera: str
    number: int
    at: float
    jpeg: bytes


def as_jpeg(data: bytes, name: str) -> bytes:
    """Return an image as a JPEG: itself if it is one already.

    Args:
        data: Content of the file.
        name: Name of the image for error messages.

    Raises:
        InputError: It is not a valid image.
    """
    if images.header(data, name)[0] == "JPEG":
        images.decode(data, name, _TRIED)
        return data
    out = io.BytesIO()
    Image.fromarray(whole(data, name, LONGEST)).save(out, "JPEG", quality=QUALITY, subsampling=0)
    return out.getvalue()
