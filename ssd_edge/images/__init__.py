"""Find, read and decode images into uint8 arrays, with limits on untrusted files (Pillow).

Pixels are RGB, 0..255. Only the formats in `FORMATS` and, with the package pillow-heif, HEIC are supported, to keep the
number of decoders small. A file that cannot be read raises an `InputError` that names it, whatever its bytes. All
functions are thread-safe.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ssd_edge.errors import BadFilesError, EnvironmentUnfitError, InputError, require
from ssd_edge.images.listing import (
    SUFFIXES,
    Found,
    Kind,
    find,
    image_files,
    is_image_name,
    kind_of,
    refusal,
    walk,
    walk_images,
)

__all__ = [
    "FORMATS",
    "SUFFIXES",
    "Found",
    "Kind",
    "Pixels",
    "Problems",
    "check_embedded",
    "decode",
    "find",
    "from_array",
    "header",
    "image_files",
    "is_image_name",
    "kind_of",
    "listed",
    "read",
    "refusal",
    "to_array",
    "usable",
    "walk",
    "walk_images",
]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
HEIF = "HEIF"  # of pillow-heif, registered when the first such file is read
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
MAX_BYTES = 64 * 2**20  # per file; the largest photos have about 40 MB
# Decompression bombs are refused before they are decoded. The limit is below the 89 million pixels at which Pillow
# warns: suppressing its warning would change the filters of the whole process.
MAX_PIXELS = 80_000_000
MAX_SIDE = 65_535  # the limit of JPEG; bounds the rows that are converted at a time
MAX_DECODED = 4 * MAX_PIXELS  # bytes; Pillow stores an RGB pixel in four
MAX_SCANS = 100  # of a progressive JPEG, usually ten. A scan of a few dozen bytes costs a pass over all pixels
PIXELS_VERSION = 2  # increase it when decoding changes: cached embeddings are then recomputed
MAX_EMBEDDED = 1e12  # largest value of an embedding: its squares, and sums of them, must not overflow float32
_BAND = 2**21  # pixels converted at a time: copies of the whole image would take five times its memory
_GAP = 3.0  # a large image is first reduced to about this multiple of its final size
_SUPPORT = 3  # pixels of the result on each side that the widest filter, Lanczos, looks at
_NEUTRAL = (124, 116, 104)  # mean colour of ImageNet, which normalisation maps to about zero
# EXIF orientation → transposition that makes the image upright. Pillow's `exif_transpose` also rewrites the EXIF data
# and fails on photos with slightly malformed entries.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE, _MAX_SAMPLE_VALUE = 258, 281  # tags of TIFF
_BITS = {bits: (1 << bits) - 1 for bits in (10, 12, 14)}  # largest values
_MIRRORED = (2, 3, 7, 8), (3, 4, 6, 7)  # orientations in which stored columns, and stored rows, are mirrored
_FILTERS = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

Number = TypeVar("Number", int, float)
Fit = Literal["crop", "squash", "pad"]
Interpolation = Literal["box", "bilinear", "hamming", "bicubic", "lanczos"]
LARGEST_INPUT = 4096  # pixels per side of a backbone's input: a bundle must not ask for more memory than any image


@dataclass(frozen=True)
class Pixels:
    """Description of how any image becomes the square input of a backbone: uint8 RGB ``(size, size, 3)``.

    Workstation, ONNX file, bundle and device share this description; the normalisation is in the graph.

    Attributes:
        size: Side of the input in pixels.
        fit: ``crop`` resizes the shorter side and cuts out the centre, as most networks were trained; ``squash``
            resizes the whole image without keeping its proportions; ``pad`` resizes it to fit inside, on a neutral
            background.
        resize: Shorter side in pixels before the centre crop; 0: `size`. Always 0 for the others.
        interpolation: Filter, always with antialiasing.

    Raises:
        InputError: A value is of the wrong type or out of range.
    """

    size: int
    fit: Fit = "squash"
    resize: int = 0
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        for key, kind in (("fit", Fit), ("interpolation", Interpolation)):
            if (value := getattr(self, key)) not in get_args(kind):
                raise InputError(f"{key} must be one of {', '.join(get_args(kind))}, but is {value!r:.50}")
        if type(self.size) is not int or not 1 <= self.size <= LARGEST_INPUT:
            raise InputError(f"size must be 1 to {LARGEST_INPUT} pixels, but is {self.size!r:.50}")
        if self.fit == "crop" and self.resize == 0:
            object.__setattr__(self, "resize", self.size)
        least, most = (self.size, LARGEST_INPUT) if self.fit == "crop" else (0, 0)
        if type(self.resize) is not int or not least <= self.resize <= most:
            allowed = f"{least} to {most} pixels" if most else "0"
            raise InputError(f"resize must be {allowed} with fit {self.fit}, but is {self.resize!r:.50}")

    @classmethod
    def cropped(cls, size: int, share: float, interpolation: Interpolation = "bicubic") -> Pixels:
        """Return a centre crop that keeps a share of the shorter side, 0..1 (timm's ``crop_pct``)."""
        return cls(size, "crop", math.floor(size / share), interpolation)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Pixels:
        """Restore what `to_dict` gave; nothing in `values` is believed.

        Args:
            values: May have other keys. Numbers may be texts, as in the metadata of an ONNX file. Missing keys have
                their defaults: what was written before they existed meant them.

        Raises:
            InputError: The size is missing, or a value is wrong.
        """
        if "size" not in values:
            raise InputError("size is missing")
        found: dict[str, Any] = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        for key in ("size", "resize"):
            if isinstance(text := found.get(key), str) and re.fullmatch("[0-9]{1,4}", text, re.ASCII):
                found[key] = int(text)
        return cls(**found)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height of the whole image before its centre is cut out or padded."""
        short, long = sorted((width, height))
        if self.fit == "squash":
            return self.size, self.size
        if self.fit == "crop":  # rounded as torchvision and timm do
            across, down = (self.resize if side == short else self.resize * side // short for side in (width, height))
        else:
            across, down = (max(1, round(self.size * side / long)) for side in (width, height))
        return across, down

    def to_dict(self) -> dict[str, int | str]:
        """Return the values as a JSON object."""
        return asdict(self)

    def describe(self) -> str:
        """Describe them in a line, e.g. ``224 × 224 pixels: shorter side to 256, centre crop, bicubic``."""
        how = {
            "crop": f"shorter side to {self.resize}, centre crop",
            "squash": "the whole image, without keeping its proportions",
            "pad": "the whole image, padded to a square",
        }
        return f"{self.size} × {self.size} pixels: {how[self.fit]}, {self.interpolation}"


def read(path: str | Path) -> bytes:
    """Return the content of an image file.

    Only regular files of at most `MAX_BYTES`, possibly behind a link, are read: pipes and devices may be endless.

    Raises:
        InputError: `path` is not such a file, or cannot be read.
    """
    name = str(path)
    try:
        _check_file(os.stat(path), name)  # before opening it, which has effects on some devices
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # O_NONBLOCK: do not wait for a pipe
        with open(handle, "rb") as stream:
            found = os.fstat(handle)
            _check_file(found, name)  # the path may have been replaced in the meantime
            return stream.read(found.st_size)
    except FileNotFoundError as error:
        raise InputError(f"{name} does not exist; check the path") from error
    except PermissionError as error:
        raise InputError(f"{name} cannot be read: permission denied") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name} cannot be read ({reason}); remove it or check the path") from error


def _check_file(found: os.stat_result, name: str) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise InputError(f"{name} is a folder, but a file is needed")
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(found.st_mode), "a device")
        raise InputError(f"{name} is {kind}, but a file is needed; remove it")
    if found.st_size > MAX_BYTES:
        raise InputError(
            f"{name} has {found.st_size:,} bytes, but an image may have at most {MAX_BYTES:,}; make it smaller"
        )


_TRIED = Pixels(32)  # to find damage: the smaller, the faster a JPEG is decoded


def decode(data: bytes | memoryview, name: str, pixels: Pixels) -> np.ndarray:
    """Decode an image; of an animation, the first frame, and of several pages, the first.

    Args:
        data: Content of the file.
        name: Name of the image for error messages.
        pixels: Size of the result, and how an image of another shape becomes it.

    Returns:
        uint8 RGB array of shape ``(size, size, 3)``.

    Raises:
        InputError: The data is empty, not in a supported format, corrupt, truncated, too large (see `to_array`), or a
            progressive JPEG with more than `MAX_SCANS` scans.
    """
    if not len(data):
        raise InputError(f"{name} is empty (0 bytes); remove it")
    with _opened(data, name) as image:
        _check_size(image, name)
        if "progressive" in image.info and (scans := bytes(data).count(b"\xff\xda")) > MAX_SCANS:
            raise InputError(f"{name} has {scans:,} scans, but a JPEG may have at most {MAX_SCANS}; save it again")
        stored = width, height = image.size
        across, down = pixels.resized(width, height)
        extent: tuple[float, float] = stored
        if image.format in ("JPEG", "MPO") and width >= 4 * across and height >= 4 * down:
            # decodes at a reduced scale; it modifies the image, hence not in to_array
            drafted = image.draft(None, (2 * across, 2 * down))
            # The last column and row are often partly empty. Cached embeddings of the whole image count them in full.
            extent = drafted[1][2:] if drafted and pixels.fit != "squash" else image.size
        return _to_array(image, name, pixels, stored, extent)


def header(data: bytes | memoryview, name: str) -> tuple[str, int, int]:
    """Return format, width and height of an image, as stored; raises an `InputError` as `decode` for a bad header."""
    with _opened(data, name) as image:
        return image.format or "", *image.size


@contextlib.contextmanager
def _opened(data: bytes | memoryview, name: str) -> Iterator[Image.Image]:
    """Open an image, and name it in what its decoder raises."""
    formats: tuple[str, ...] = FORMATS
    if bytes(data[4:8]) == b"ftyp" and bytes(data[8:12]) in _HEIF_BRANDS:
        formats = _with_heif(name)
    with _input_errors(name), Image.open(io.BytesIO(data), formats=formats) as image:
        yield image


def _with_heif(name: str) -> tuple[str, ...]:
    """Return the formats with HEIC, which Pillow reads once a package is registered."""
    try:
        _register_heif()
    except EnvironmentUnfitError as error:
        raise InputError(f"{name} is a HEIC photograph; convert it to JPEG, or: {error}") from error
    return (*FORMATS, HEIF)


@functools.cache
def _register_heif() -> None:
    require("pillow_heif", "heic", "read it").register_heif_opener()


def to_array(image: Image.Image, name: str, pixels: Pixels) -> np.ndarray:
    """Orient, convert and resize an open image to a uint8 RGB array of shape ``(size, size, 3)``.

    Greyscale is repeated over the three channels, greyscale of more than 8 bits is scaled to 8 (see `_white`), and
    transparent images are composited on white, as image viewers do.

    Raises:
        InputError: The image has no pixels, more than 80 million pixels (WebP: 20 million, progressive JPEG and TIFF
            in colour: 32 million, which need 320 MB), a side over 65,535, floating-point pixels, more than 8 bits of
            which nothing says how many are used, or is corrupt.
    """
    return _to_array(image, name, pixels, image.size, image.size)


def _to_array(
    image: Image.Image, name: str, pixels: Pixels, stored: tuple[int, int], extent: tuple[float, float]
) -> np.ndarray:
    """Do what `to_array` does for an image of the size `stored` that its decoder reduced to `extent`."""
    with _input_errors(name):
        _check_size(image, name)
        if image.mode == "F":
            raise InputError(f"{name} has floating-point pixels, but 8 bits are needed; convert it")
        deep = _is_deep(image)
        image.load()
        tag = image.getexif().get(ExifTags.Base.Orientation)  # after loading: Pillow itself turns TIFF
        orientation = tag if isinstance(tag, int) and tag in _UPRIGHT else 1
        white = _white(image, name) if deep else 255
        # What a reduced image has beyond its extent is at its right and lower edge until it is turned.
        beyond = [
            whole - part if orientation in mirrored else 0.0
            for whole, part, mirrored in zip(image.size, extent, _MIRRORED, strict=True)
        ]
        # The part of the image that is kept, and the size that it gets. Resizing this part alone gives the same pixels
        # as resizing everything and cutting it out, because Pillow also looks at what is around the box.
        spans, shape = [], []
        edges = zip(_turned(extent, orientation), _turned(beyond, orientation), strict=True)
        for (side, first), to in zip(edges, pixels.resized(*_turned(stored, orientation)), strict=True):
            start, kept = (round((to - pixels.size) / 2), pixels.size) if to > pixels.size else (0, to)
            spans.append((first + side * start / to, first + side * (start + kept) / to))
            shape.append(kept)
        small, box = _smaller(image, orientation, spans, shape, white)
        small = small.resize((shape[0], shape[1]), _FILTERS[pixels.interpolation], box)
        if min(shape) < pixels.size:
            whole = Image.new("RGB", (pixels.size, pixels.size), _NEUTRAL)
            whole.paste(small, ((pixels.size - shape[0]) // 2, (pixels.size - shape[1]) // 2))
            small = whole
        return np.array(small, dtype=np.uint8)  # a copy, because Pillow's memory is read-only


@contextlib.contextmanager
def _input_errors(name: str) -> Iterator[None]:
    """Replace exceptions of Pillow by an `InputError` that names the image."""
    try:
        yield
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not a JPEG, PNG, WebP, BMP, GIF or TIFF image; remove or convert it") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(f"{name} has more than {MAX_PIXELS:,} pixels; make it smaller") from error
    except MemoryError as error:
        raise InputError(f"{name} needs more memory than is available; make it smaller") from error
    except Exception as error:  # corrupt data: the decoders may raise exceptions of any type
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise InputError(f"{name} is corrupt and cannot be decoded ({reason}); remove it") from error


def _check_size(image: Image.Image, name: str) -> None:
    """Check from its header that an image is not too large to decode.

    Raises:
        InputError: It is too large, or has no pixels.
    """
    width, height = image.size
    held = 4  # bytes of memory per pixel
    if image.format == "WEBP":
        held = 16  # two canvases and two copies, animated or not
    elif image.format == HEIF:
        held = 6  # measured; phones take up to 50 million pixels
    elif image.format == "TIFF" and len(image.getbands()) > 1:
        held = 4 + len(image.getbands()) * (2 if _is_deep(image) else 1)  # all pixels may be in one strip
    elif "progressive" in image.info:
        held = 4 + 2 * len(image.getbands())  # all coefficients at once, whatever the scale of decoding
    most = min(MAX_PIXELS, MAX_DECODED // held)
    if min(width, height) < 1:
        raise InputError(f"{name} has {width} × {height} pixels, but must have at least one; remove it")
    if width * height > most:
        raise InputError(
            f"{name} has {width} × {height} pixels, but an image of this type may have at most {most:,}; "
            "make it smaller"
        )
    if max(width, height) > MAX_SIDE:
        raise InputError(
            f"{name} has {width} × {height} pixels, but a side may have at most {MAX_SIDE:,}; make it smaller"
        )


def _turned(pair: Sequence[Number], orientation: int) -> tuple[Number, Number]:
    """Return columns and rows of a stored image as those of the upright one."""
    first, second = pair
    return (second, first) if orientation >= 5 else (first, second)


def _smaller(
    image: Image.Image, orientation: int, spans: Sequence[tuple[float, float]], shape: Sequence[int], white: int
) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """Return an upright RGB copy of a part of an image, reduced to about three times its final size.

    What lies beyond the reach of the filter is neither converted nor copied. The image is converted in bands of rows,
    with the same result as for the whole image at once.

    Args:
        image: A loaded image.
        orientation: EXIF orientation.
        spans: First and last column, and first and last row, of the part in the upright image; may lie within a pixel.
        shape: Columns and rows of the final image.
        white: Value of white in greyscale of more than 8 bits.

    Returns:
        The copy, and the box of the part in it.
    """
    factors, area, box = [], [], []
    for side, (start, stop), to in zip(_turned(image.size, orientation), spans, shape, strict=True):
        factor = int((stop - start) / to / _GAP) or 1
        margin = 1 + math.ceil(_SUPPORT * max(1.0, (stop - start) / to / factor))
        first = max(0, math.floor(start / factor) - margin) * factor
        last = min(side, (math.ceil(stop / factor) + margin) * factor)
        factors.append(factor)
        area.append((first, last))
        box.append(((start - first) / factor, (stop - first) / factor))
    (across, down), ((left, right), (top, bottom)) = factors, area

    turn = _UPRIGHT.get(orientation)
    if image.mode == "RGB" and turn is None and "transparency" not in image.info:
        small = image.reduce((across, down), (left, top, right, bottom))
    else:
        small = Image.new("RGB", (-(-(right - left) // across), -(-(bottom - top) // down)))
        rows = max(1, _BAND // (right - left) // down) * down
        for row in range(top, bottom, rows):
            part = image.crop(_stored_box(image.size, orientation, (left, row, right, min(row + rows, bottom))))
            part = _to_rgb(part, white)
            part = part if turn is None else part.transpose(turn)
            small.paste(part.reduce((across, down)), (0, (row - top) // down))
    return small, (box[0][0], box[1][0], box[0][1], box[1][1])


def _stored_box(stored: tuple[int, int], orientation: int, box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Return where a box (left, top, right, bottom) of the upright image is in the stored one."""
    width, height = stored
    left, top, right, bottom = box
    if orientation >= 5:  # rows and columns are swapped
        left, top, right, bottom = top, left, bottom, right
    if orientation in _MIRRORED[0]:
        left, right = width - right, width - left
    if orientation in _MIRRORED[1]:
        top, bottom = height - bottom, height - top
    return left, top, right, bottom


def _is_deep(image: Image.Image) -> bool:
    """Return True if the channels of an image that is not loaded have more than 8 bits in its file."""
    if image.mode.startswith("I"):
        return True
    tiles = getattr(image, "tile", None) or ()  # of Pillow's file readers: (decoder, box, offset, arguments)
    stored = (tile[3] if isinstance(tile[3], str) else (tile[3] or ("",))[0] for tile in tiles)
    return any(isinstance(mode, str) and ";16" in mode for mode in stored)


def _white(image: Image.Image, name: str) -> int:
    """Return the value of white in a loaded image of more than 8 bits, from what the file says or its values show.

    Factory cameras store 10, 12 or 14 bits in 16 without saying so. Values over a quarter of the range need all 16
    bits; a maximum of exactly 10 or 14 bits is overexposure; a maximum between 10 and 12 bits has 12: in 16 bits all
    of it would be nearly black. Anything else is refused rather than guessed.

    Raises:
        InputError: The values do not show how many bits are used, or are more than 16 bits.
    """
    if not image.mode.startswith("I"):  # colour, of which Pillow keeps the upper 8 bits
        colours = sum(band != "A" for band in image.getbands())
        extrema = np.reshape(np.asarray(image.getextrema()), (-1, 2))
        top = int(extrema[:colours, 1].max())
        if 0 < top < 64:
            raise _unclear(name, top * 256 + 255)
        return 255
    tags = getattr(image, "tag_v2", {})  # of TIFF
    bits = (tags.get(_BITS_PER_SAMPLE) or (16,))[0]
    stated = (tags.get(_MAX_SAMPLE_VALUE) or ((1 << bits) - 1 if 8 < bits < 16 else 0,))[0]
    rows = max(1, _BAND // image.width)
    bands = [
        np.asarray(image.crop((0, y, image.width, min(y + rows, image.height)))) for y in range(0, image.height, rows)
    ]
    low, top = min(int(band.min()) for band in bands), max(int(band.max()) for band in bands)
    if low < 0 or top > 65535:
        raise InputError(f"{name} has values from {low} to {top}, but 16-bit grey has 0 to 65535; convert it to 8 bits")
    if 0 < top <= stated < 65535:
        return int(stated)
    if top == 0 or top > _BITS[14]:
        return 65535
    if top in (_BITS[10], _BITS[14]):
        return top
    if _BITS[10] < top <= _BITS[12]:
        return _BITS[12]
    raise _unclear(name, top)


def _unclear(name: str, top: int) -> InputError:
    return InputError(
        f"{name} has 16-bit pixels with values up to {top} of 65,535: it may be dark, or use fewer bits; "
        "save it with 8 bits, or scaled to 16"
    )


def _to_rgb(image: Image.Image, white: int) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would clip at 255
        deep = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((deep * 255 + white // 2) // white).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


def from_array(array: np.ndarray, pixels: Pixels, name: str = "the array") -> np.ndarray:
    """Convert an image array to uint8 RGB of shape ``(size, size, 3)``.

    An array with this height and width counts as the finished input of the backbone: nothing is cropped off.

    Args:
        array: uint8 array of shape ``(H, W)``, ``(H, W, 1)`` or ``(H, W, 3)`` (RGB).
        pixels: Size of the result, and how an image of another shape becomes it.
        name: Name of the image for error messages.

    Raises:
        InputError: The array has another dtype or shape, or is too large (see `to_array`).
    """
    array = np.asarray(array)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        raise InputError(
            f"{name}: an image array must be uint8 of shape (H, W), (H, W, 1) or (H, W, 3), "
            f"but is {array.dtype} of shape {array.shape}"
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim == 3 and array.shape[2] != 3:
        raise InputError(f"{name}: an image array must have 1 or 3 channels, but has {array.shape[2]}")
    height, width = array.shape[:2]
    if (height, width) == (pixels.size, pixels.size):
        return array if array.ndim == 3 else np.repeat(array[:, :, None], 3, axis=2)
    if width * height > MAX_PIXELS:  # before copying it: a broadcast array takes little memory until then
        raise InputError(
            f"{name} has {width} × {height} pixels, but an image may have at most {MAX_PIXELS:,}; make it smaller"
        )
    return to_array(Image.fromarray(array), name, pixels)


def check_embedded(embeddings: np.ndarray, names: Sequence[str]) -> None:
    """Check the embeddings of images: a backbone may give NaN for a single image, e.g. if it divides by its norm.

    Args:
        embeddings: Output of the backbone, one row per image.
        names: Names of the images for the error message.

    Raises:
        InputError: A value is NaN, infinite or over `MAX_EMBEDDED`; the message names the images.
    """
    # NaN is the largest and the smallest value of its row, and every comparison with it is False
    bad = np.flatnonzero(~((embeddings.max(1) <= MAX_EMBEDDED) & (embeddings.min(1) >= -MAX_EMBEDDED)))
    if not len(bad):
        return
    if len(bad) == len(names) > 1:
        raise InputError(f"the backbone gives NaN or infinity for all {len(bad):,} images; check its weights")
    some = ", ".join(names[index] for index in bad[:5]) + (f" and {len(bad) - 5:,} more images" if len(bad) > 5 else "")
    raise InputError(
        f"the backbone gives NaN or infinity for {some}; leave {'it' if len(bad) == 1 else 'them'} out, or use a "
        "backbone that does not divide by zero (for example by the norm of a black image)"
    )


class Problems:
    """Collects what is wrong with images, so that all bad ones are named at once and not only the first."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def __bool__(self) -> bool:
        """Return True if a problem was found."""
        return bool(self.found)

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Keep the message of an `InputError` and go on behind the ``with``."""
        try:
            yield
        except InputError as error:
            self.found.append(str(error))

    def check(self, total: int, lever: str = "--skip-bad") -> None:
        """Raise what was found.

        Args:
            total: Number of images that were looked at.
            lever: How to go on without the bad ones.

        Raises:
            BadFilesError: A problem was found.
        """
        if self.found:
            raise BadFilesError(self.found, total, lever)


def listed(sources: object) -> list[Any]:
    """Return several images as a list, and one (a path, a PIL image or an array ``(H, W[, C])``) as a list of one."""
    if isinstance(sources, str | Path | Image.Image):
        return [sources]
    if isinstance(sources, np.ndarray) and (sources.ndim == 2 or (sources.ndim == 3 and sources.shape[-1] in (1, 3))):
        return [sources]
    return list(sources) if isinstance(sources, Iterable) else [sources]


def usable(paths: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """Decode image files once, and return those that can be, and a sentence for each of the others."""
    good, problems = [], Problems()
    for path in paths:
        with problems.collect():
            decode(read(path), str(path), _TRIED)
            good.append(path)
    return good, problems.found
