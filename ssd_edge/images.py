"""Images → uint8 arrays: find, read, decode, EXIF orientation, grey or colour, resize, with limits (Pillow).

Pixels are RGB, 0..255. Only JPEG, PNG, WebP and BMP are opened: fewer decoders, fewer surprises. What cannot be read is
refused in one sentence that names it, whatever its bytes: an image is a stranger's.
All of it may be called from several threads at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ssd_edge.errors import InputError, printable

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
MAX_BYTES = 64 * 2**20  # of a file; the largest photos have some 40 MB
# A decompression bomb is refused before it is decoded. Below the 89 million at which Pillow itself warns:
# its warning would have to be silenced, and warning filters belong to the process, not to a thread.
MAX_PIXELS = 80_000_000
MAX_SIDE = 65_535  # as JPEG has it; bounds the rows that are converted at a time
MAX_DECODED = 4 * MAX_PIXELS  # bytes; Pillow holds RGB in four
MAX_SCANS = 100  # of a progressive JPEG; usual are ten. Each takes a pass over all pixels, and a few dozen bytes
MAX_LINKED = 10_000  # folders reached by links: thirty folders with two links each to the next make a thousand million
PIXELS_VERSION = 1  # raise it when the same file gives other pixels: cached embeddings are then computed anew
_BAND = 2**21  # pixels that are converted at a time: the copies of a whole image would take five times its memory
_GAP = 3.0  # a large image is first averaged to about this many times its final size
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
        InputError: a folder may not be read, a link leads back to a folder that holds it, or links lead to more than
            `MAX_LINKED` folders.
    """
    linked = 0
    left: list[tuple[Path, tuple[tuple[int, int], ...], bool]] = [(Path(folder), (), True)]  # the last comes first
    while left:
        path, above, is_folder = left.pop()
        if not is_folder:
            yield path
            continue
        name = printable(str(path))
        try:
            found = os.stat(path)
            with os.scandir(path) as listing:
                entries = sorted(listing, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise InputError(f"the folder {name} cannot be read ({error.strerror})") from error
        own = (found.st_dev, found.st_ino)
        if own in above:
            raise InputError(f"{name} is a link to a folder that holds it; remove the link")
        linked += bool(above) and os.path.islink(path)
        if linked > MAX_LINKED:
            raise InputError(f"links lead to more than {MAX_LINKED:,} folders, the last is {name}; remove some of them")
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if os.path.isdir(path / entry.name):  # no error for links in a circle, unlike the entry's own is_dir
                left.append((path / entry.name, (*above, own), True))
            elif is_image_name(entry.name):
                left.append((path / entry.name, (), False))


def image_files(sources: Sequence[Path]) -> list[Path]:
    """The images in files and folders.

    Args:
        sources: files, taken whatever their name, and folders (see `walk_images`).

    Raises:
        InputError: one of them does not exist, or is a folder without images.
    """
    found: list[Path] = []
    for source in map(Path, sources):
        name = printable(str(source))
        if not os.path.exists(source):
            raise InputError(f"{name} does not exist; check the path")
        images = list(walk_images(source)) if os.path.isdir(source) else [source]
        if not images:
            raise InputError(f"the folder {name} holds no images ({', '.join(sorted(SUFFIXES))})")
        found += images
    return found


def read(path: str | Path) -> bytes:
    """The bytes of an image's file.

    Only a regular file of at most `MAX_BYTES` is read, also behind a link: a pipe would never end, and a device may be
    without bounds.

    Raises:
        InputError: it is no such file, or cannot be read; in a sentence that names it.
    """
    name = printable(str(path))
    try:
        _check_file(os.stat(path), name)  # before it is opened: some devices act on being opened
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # O_NONBLOCK: no pipe is waited for
        with open(handle, "rb") as stream:
            found = os.fstat(handle)
            _check_file(found, name)  # by now the path may lead to another one
            return stream.read(found.st_size)
    except FileNotFoundError as error:
        raise InputError(f"{name} does not exist; check the path") from error
    except PermissionError as error:
        raise InputError(f"{name} may not be read: permission denied") from error
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
            f"{name} has {found.st_size:,} bytes, but at most {MAX_BYTES:,} are read of an image; make it smaller"
        )


def decode(data: bytes | memoryview, name: str, size: int) -> np.ndarray:
    """Decode an encoded image; of an animation its first frame.

    Args:
        data: the file's bytes.
        name: what to call it in an error.
        size: side of the square result in pixels. Another shape is resized as a whole (bicubic with
            antialiasing), not cropped: nothing at the edge of the frame is lost.

    Returns:
        uint8 RGB, shape ``(size, size, 3)``.

    Raises:
        InputError: empty, not an image of the four formats, corrupt, cut short, or too large (see `to_array`; a
            progressive JPEG also by its scans).
    """
    if not len(data):
        raise InputError(f"{printable(name)} is empty (0 bytes); remove it")
    with _one_sentence(name), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_size(image, name)
        if "progressive" in image.info and (scans := bytes(data).count(b"\xff\xda")) > MAX_SCANS:
            raise InputError(f"{printable(name)} has {scans:,} scans, but at most {MAX_SCANS} are read; save it anew")
        if image.format in ("JPEG", "MPO") and min(image.size) >= 4 * size:
            image.draft(None, (2 * size, 2 * size))  # decodes at reduced scale; not in to_array: it changes the image
        return to_array(image, name, size)


def to_array(image: Image.Image, name: str, size: int) -> np.ndarray:
    """Orient, convert and resize an opened image to uint8 RGB ``(size, size, 3)``.

    Grey images are repeated over the three channels; 16-bit grey is scaled to 8 bits; transparency is
    put on white, as viewers do.

    Raises:
        InputError: no or over 80 million pixels, a side over 65,535, more memory needed than 320 MB (WebP has 20
            million pixels then, progressive JPEG 32), floating-point pixels, or corrupt.
    """
    with _one_sentence(name):
        _check_size(image, name)
        if image.mode == "F":
            raise InputError(f"{printable(name)} has floating-point pixels, but 8 bits are needed; convert it")
        small, box = _smaller(image, size)
        if small.size != (size, size):
            small = small.resize((size, size), Image.Resampling.BICUBIC, box)
        return np.array(small, dtype=np.uint8)  # a copy: Pillow's own memory is read-only


@contextlib.contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Turn what Pillow raises into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except UnidentifiedImageError as error:
        told = f"{printable(name)} is not a JPEG, PNG, WebP or BMP image; remove it or convert it"
        raise InputError(told) from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(f"{printable(name)} has more than {MAX_PIXELS:,} pixels; make it smaller") from error
    except MemoryError as error:
        raise InputError(f"{printable(name)} needs more memory than there is; make it smaller") from error
    except Exception as error:  # corrupt data: the decoders keep to no list of types, and the bytes choose among them
        reason = printable(" ".join(str(error).split()))[:100] or type(error).__name__
        raise InputError(f"{printable(name)} is corrupt and cannot be decoded ({reason}); remove it") from error


def _check_size(image: Image.Image, name: str) -> None:
    """Refuse what is too large to decode; what it claims to be is known from its header.

    Raises:
        InputError: it is.
    """
    width, height = image.size
    held = 4  # bytes of memory a pixel
    if image.format == "WEBP":
        held = 16  # two canvases and two copies, if it moves or not
    elif "progressive" in image.info:
        held = 4 + 2 * len(image.getbands())  # all coefficients at once, whatever the scale
    most = min(MAX_PIXELS, MAX_DECODED // held)
    if min(width, height) < 1:
        raise InputError(f"{printable(name)} has {width} × {height} pixels, but at least one is needed; remove it")
    if width * height > most:
        raise InputError(
            f"{printable(name)} has {width} × {height} pixels, but at most {most:,} are read of its kind; "
            "make it smaller"
        )
    if max(width, height) > MAX_SIDE:
        raise InputError(
            f"{printable(name)} has {width} × {height} pixels, but a side has at most {MAX_SIDE:,}; make it smaller"
        )


def _smaller(image: Image.Image, size: int) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """An image, upright and in RGB, averaged to some three times `size`; and its edges, which may lie within a pixel.

    The same pixels as when the whole image were converted and reduced, a band of rows at a time.
    """
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    image.load()
    width, height = image.size[:: -1 if turn is not None and orientation >= 5 else 1]
    across, down = (int(side / size / _GAP) or 1 for side in (width, height))
    plain = image.mode == "RGB" and turn is None and "transparency" not in image.info
    rows = height if plain else max(1, _BAND // width // down) * down

    def averaged(top: int, bottom: int) -> Image.Image:
        part = image
        if bottom - top < height:
            part = image.crop(_rows_of(image.size, orientation if turn is not None else 1, top, bottom))
        part = _to_rgb(part if turn is None else part.transpose(turn))
        return part if across == down == 1 else part.reduce((across, down))

    if rows >= height:
        small = averaged(0, height)
    else:
        small = Image.new("RGB", (-(-width // across), -(-height // down)))
        for top in range(0, height, rows):
            small.paste(averaged(top, min(top + rows, height)), (0, top // down))
    return small, (0.0, 0.0, width / across, height / down)


def _rows_of(stored: tuple[int, int], orientation: int, top: int, bottom: int) -> tuple[int, int, int, int]:
    """Where rows of the upright image are in the stored one, of size (width, height): left, top, right, bottom."""
    width, height = stored
    if orientation < 3:
        return 0, top, width, bottom
    if orientation < 5:  # upside down
        return 0, height - bottom, width, height - top
    if orientation < 7:  # rows are columns
        return top, 0, bottom, height
    return width - bottom, 0, width - top, height


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # of the four formats only 16-bit PNG; Pillow would clip at 255
        deep = np.asarray(image)
        if deep.min() < 0 or deep.max() > 65535:
            told = f"values from {deep.min()} to {deep.max()}, but 16-bit grey has 0 to 65535"
            raise ValueError(told)
        image = Image.fromarray(((deep.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


def from_array(pixels: np.ndarray, size: int, name: str = "the array") -> np.ndarray:
    """Bring one image array to uint8 RGB ``(size, size, 3)``; of that shape already, it is returned as it is.

    Args:
        pixels: uint8 ``(H, W)``, ``(H, W, 1)`` or ``(H, W, 3)``, RGB.
        size: side of the result in pixels.
        name: what to call it in an error.

    Raises:
        InputError: another dtype or shape, or too large (see `to_array`).
    """
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or 0 in pixels.shape:
        raise InputError(
            f"{printable(name)}: an image array must be uint8 of shape (H, W), (H, W, 1) or (H, W, 3), "
            f"but is {pixels.dtype} of shape {pixels.shape}"
        )
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim == 3 and pixels.shape[2] != 3:
        raise InputError(f"{printable(name)}: an image array must have 1 or 3 channels, but has {pixels.shape[2]}")
    if pixels.shape == (size, size, 3):
        return pixels
    height, width = pixels.shape[:2]
    if width * height > MAX_PIXELS:  # before it is copied: a broadcast array takes no memory until then
        raise InputError(
            f"{printable(name)} has {width} × {height} pixels, but at most {MAX_PIXELS:,} are read; make it smaller"
        )
    return to_array(Image.fromarray(pixels), name, size)
