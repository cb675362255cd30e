"""Images → uint8 arrays: find, decode, EXIF orientation, grey or colour, resize, with limits (Pillow).

Pixels are RGB, 0..255. Only JPEG, PNG, WebP and BMP are opened: fewer decoders, fewer surprises.
All of it may be called from several threads at once.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ssd_edge.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
# A decompression bomb is refused before it is decoded. Below the 89 million at which Pillow itself warns:
# its warning would have to be silenced, and warning filters belong to the process, not to a thread.
MAX_PIXELS = 80_000_000
# What Pillow's decoders raise for corrupt data: the first three in tests, the others in its sources.
_CORRUPT = (OSError, SyntaxError, ValueError, LookupError, ArithmeticError, EOFError, struct.error)
PIXELS_VERSION = 1  # raise it when the same file gives other pixels: cached embeddings are then computed anew
# EXIF orientation → what makes it upright. Pillow's own `exif_transpose` also writes the EXIF data anew, and
# fails on photos whose other entries are slightly wrong.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def is_image_name(name: str) -> bool:
    """Whether a file name has an image's ending and is not hidden."""
    path = Path(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def walk_images(folder: Path) -> Iterator[Path]:
    """Images in a folder and its subfolders, sorted by path; what is hidden is skipped, links are followed.

    Raises:
        InputError: a folder may not be read, or a link leads back to a folder that holds it.
    """

    def visit(path: Path, above: tuple[str, ...]) -> Iterator[Path]:
        real = os.path.realpath(path)
        if real in above:
            raise InputError(f"{path} is a link to a folder that holds it; remove the link")
        try:
            with os.scandir(path) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"the folder {path} cannot be read ({error.strerror})") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from visit(path / entry.name, (*above, real))
            elif is_image_name(entry.name):
                yield path / entry.name

    return visit(Path(folder), ())


def image_files(sources: Sequence[Path]) -> list[Path]:
    """The images in files and folders.

    Args:
        sources: files, taken whatever their name, and folders (see `walk_images`).

    Raises:
        InputError: one of them does not exist, or is a folder without images.
    """
    found: list[Path] = []
    for source in map(Path, sources):
        if not os.path.exists(source):
            raise InputError(f"{source} does not exist; check the path")
        images = list(walk_images(source)) if source.is_dir() else [source]
        if not images:
            raise InputError(f"the folder {source} holds no images ({', '.join(sorted(SUFFIXES))})")
        found += images
    return found


def decode(data: bytes | memoryview, name: str, size: int) -> np.ndarray:
    """Decode an encoded image.

    Args:
        data: the file's bytes.
        name: what to call it in an error.
        size: side of the square result in pixels. Another shape is resized as a whole (bicubic with
            antialiasing), not cropped: nothing at the edge of the frame is lost.

    Returns:
        uint8 RGB, shape ``(size, size, 3)``.

    Raises:
        InputError: empty, not an image of the four formats, corrupt, cut short, or over 80 million pixels.
    """
    if not len(data):
        raise InputError(f"{name} is empty (0 bytes); remove it")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return to_array(image, name, size)
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not a JPEG, PNG, WebP or BMP image; remove it or convert it") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(f"{name} has more than {MAX_PIXELS:,} pixels; make it smaller") from error
    except _CORRUPT as error:
        raise InputError(f"{name} is corrupt and cannot be decoded ({error}); remove it") from error


def to_array(image: Image.Image, name: str, size: int) -> np.ndarray:
    """Orient, convert and resize an opened image to uint8 RGB ``(size, size, 3)``.

    Grey images are repeated over the three channels; 16-bit grey is scaled to 8 bits; transparency is
    put on white, as viewers do.

    Raises:
        InputError: over 80 million pixels.
    """
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name} has {width} × {height} pixels, but at most {MAX_PIXELS:,} are read; make it smaller"
        )
    if image.format in ("JPEG", "MPO") and min(width, height) >= 4 * size:  # MPO: a JPEG with a preview
        image.draft(None, (2 * size, 2 * size))  # decodes at reduced scale
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I"):  # of the four formats only 16-bit PNG; Pillow would clip at 255
        deep = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.array(image, dtype=np.uint8)  # a copy: Pillow's own memory is read-only


def from_array(pixels: np.ndarray, size: int) -> np.ndarray:
    """Bring one image array to uint8 RGB ``(size, size, 3)``; of that shape already, it is returned as it is.

    Args:
        pixels: uint8 ``(H, W)``, ``(H, W, 1)`` or ``(H, W, 3)``, RGB.
        size: side of the result in pixels.

    Raises:
        InputError: another dtype or shape.
    """
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or 0 in pixels.shape:
        raise InputError(
            f"an image array must be uint8 of shape (H, W), (H, W, 1) or (H, W, 3), "
            f"but is {pixels.dtype} of shape {pixels.shape}"
        )
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim == 3 and pixels.shape[2] != 3:
        raise InputError(f"an image array must have 1 or 3 channels, but has {pixels.shape[2]}")
    if pixels.shape == (size, size, 3):
        return pixels
    return to_array(Image.fromarray(pixels), "the array", size)
