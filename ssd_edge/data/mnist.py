"""Reader of MNIST in the official idx format, and of Fashion-MNIST and KMNIST, which use the same four files.

An idx file is two zero bytes, a type (0x08: unsigned bytes), the number of dimensions, each dimension as a big-endian
32-bit number, and the values. All of this is checked against the length of the file.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, cast

import numpy as np

from ssd_edge.data.arrays import MAX_BYTES, Source, numbered, padded
from ssd_edge.errors import InputError
from ssd_edge.files import is_file

PARTS = ("train", "t10k")
FILES = tuple(f"{part}-{kind}-ubyte" for part in PARTS for kind in ("images-idx3", "labels-idx1"))
# names under which the files are published → official name
SPELLINGS = {
    f"{spelling}{ending}": name
    for name in FILES
    for spelling in (name, name.replace("-idx", ".idx"))
    for ending in ("", ".gz")
}
_BLOCK = 1 << 20  # bytes read at once: memory is allocated for data, not for what a header claims


def files_in(folder: Path) -> dict[str, Path]:
    """Return MNIST's files in a folder by name."""
    return {name: folder / name for name in SPELLINGS if is_file(folder / name)}


def read(files: Mapping[str, Path | bytes | memoryview], where: str) -> Source:
    """Read the four files; labels become class names, 28 × 28 pixels are padded to 32 × 32.

    Args:
        files: Path or content of the files by name. If a file occurs twice, the uncompressed one is used.
        where: Folder or archive, for error messages.

    Raises:
        InputError: A file is missing, damaged, over 2 GiB, or inconsistent with another.
    """
    chosen = {SPELLINGS[name]: name for name in sorted(files, key=lambda name: not name.endswith(".gz"))}
    missing = [name for name in FILES if name not in chosen]
    if missing:
        raise InputError(f"{where} lacks the file {missing[0]} of MNIST; download it again")
    read_parts = []
    for part in PARTS:
        images, labels = (chosen[f"{part}-{kind}-ubyte"] for kind in ("images-idx3", "labels-idx1"))
        pixels = _array(files[images], images, f"{where}: {images}", 3)
        numbers = _array(files[labels], labels, f"{where}: {labels}", 1)
        if len(pixels) != len(numbers):
            raise InputError(
                f"{where}: {images} holds {len(pixels):,} images, but {labels} {len(numbers):,} labels; "
                "take both from one data set"
            )
        read_parts.append((padded(pixels), numbers))
    return numbered(*read_parts)


def _array(data: Path | bytes | memoryview, name: str, what: str, dimensions: int) -> np.ndarray:
    """Return the uint8 array in a file."""
    try:
        file: IO[bytes] = data.open("rb") if isinstance(data, Path) else io.BytesIO(data)
        with file:
            stream = cast(IO[bytes], gzip.GzipFile(fileobj=file)) if name.endswith(".gz") else file
            return _parse(stream, what, dimensions)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{what} cannot be read ({error}); download it again") from error


def _parse(stream: IO[bytes], what: str, dimensions: int) -> np.ndarray:
    header = stream.read(4 + 4 * dimensions)
    magic = bytes([0, 0, 8, dimensions])
    if header[:4] != magic:
        raise InputError(
            f"{what} starts with {header[:4].hex() or 'nothing'}, but an idx file of unsigned bytes in "
            f"{dimensions} dimension{'s' * (dimensions > 1)} with {magic.hex()}; download it again"
        )
    if len(header) < 4 + 4 * dimensions:
        raise InputError(f"{what} ends after {len(header)} bytes, within its header; download it again")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    promised = math.prod(shape)
    if not promised or promised > MAX_BYTES:
        raise InputError(f"{what} says that its shape is {shape}, but 1 to {MAX_BYTES:,} bytes are read")
    values = bytearray()
    while block := stream.read(min(_BLOCK, promised + 1 - len(values))):
        values += block
    if len(values) != promised:
        found = f"{len(values):,}" if len(values) < promised else "more"
        raise InputError(
            f"{what} says that its shape is {shape}, which is {promised:,} bytes, but holds {found}; download it again"
        )
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)
