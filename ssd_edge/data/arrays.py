"""Lazily decoded images, the `Source` that every reader returns, and the readers of plain arrays.

The other readers are in `folders`, `cifar` and `mnist`; `data.load` selects classes from a source and splits it.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from ssd_edge import images
from ssd_edge.data.accounts import Accounts
from ssd_edge.errors import InputError, require
from ssd_edge.images import Pixels, decode, from_array
from ssd_edge.system import usable_cores

# Of images in a process: paths of files, encoded images, or the shape of arrays.
Kind: TypeAlias = Literal["files", "encoded"] | tuple[int, ...]
MAX_BYTES = 2 << 30  # limit of what is read into memory at once: an archive or an .npz
_TRIED = Pixels(32)  # the smaller, the faster a JPEG is decoded
_CHUNK = 16  # images per unit of work: few, so that one batch uses many cores


def _in_threads(work: Callable[[int], None], count: int) -> None:
    """Call ``work(0)``, …, ``work(count - 1)`` on all cores, and raise the first error in this order."""

    def run(start: int) -> None:
        for index in range(start, min(start + _CHUNK, count)):
            work(index)

    starts = range(0, count, _CHUNK)
    workers = min(usable_cores(), len(starts))
    if workers < 2:
        for start in starts:
            run(start)
        return
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(run, starts):
            pass


class Images:
    """A sequence of images that are decoded on access.

    Args:
        items: uint8 array ``(N, H, W)`` or ``(N, H, W, 3)``, or a list of encoded images, each as bytes or as the path
            of a file.
        names: Name of each image for error messages.
    """

    def __init__(self, items: np.ndarray | Sequence[bytes | memoryview | Path], names: Sequence[str]) -> None:
        self._items = items
        self.names = names

    def __len__(self) -> int:
        return len(self._items)

    def load(self, indices: Sequence[int] | np.ndarray, form: Pixels) -> np.ndarray:
        """Decode images on all cores (Pillow releases the GIL).

        Args:
            indices: Positions of the images, in the order of the result.
            form: Size of the result, and how images of another shape become it (see `images.decode`).

        Returns:
            uint8 RGB, shape ``(len(indices), size, size, 3)``.

        Raises:
            InputError: An image is corrupt or its file does not exist; the message names it.
        """
        indices = np.asarray(indices, dtype=np.int64)
        pixels = np.empty((len(indices), form.size, form.size, 3), dtype=np.uint8)
        if isinstance(self._items, np.ndarray) and self._items.shape[1:3] == (form.size, form.size):
            chosen = self._items[indices]
            pixels[:] = chosen if chosen.ndim == 4 else chosen[..., None]  # greyscale: the same value in each channel
            return pixels

        def decode_one(row: int) -> None:
            pixels[row] = self._decode(int(indices[row]), form)

        _in_threads(decode_one, len(indices))
        return pixels

    def batches(self, form: Pixels, batch: int = 256) -> Iterator[np.ndarray]:
        """Yield all images in order as uint8 RGB ``(batch, size, size, 3)``; the last batch may be smaller.

        Raises:
            InputError: See `load`.
        """
        for start in range(0, len(self), batch):
            yield self.load(range(start, min(start + batch, len(self))), form)

    def take(self, indices: np.ndarray) -> Images:
        """Return the images at the given positions without decoding them."""
        if np.array_equal(indices, np.arange(len(self))):
            return self  # avoids a copy of the array
        names = [self.names[index] for index in indices]
        if isinstance(self._items, np.ndarray):
            return Images(self._items[indices], names)
        return Images([self._items[index] for index in indices], names)

    @property
    def kind(self) -> Kind:
        """What `packed` returns for each image."""
        if isinstance(self._items, np.ndarray):
            return self._items.shape[1:]
        return "files" if len(self) and isinstance(self._items[0], Path) else "encoded"

    def packed(self, indices: Sequence[int] | np.ndarray) -> list[bytes]:
        """Return images as bytes, from which `unpacked` restores them in another process; files by their paths.

        Args:
            indices: Positions of the images, in the order of the result.
        """
        if isinstance(self._items, np.ndarray):
            return [self._items[index].tobytes() for index in indices]
        chosen = (self._items[index] for index in indices)
        return [os.fsencode(item) if isinstance(item, Path) else bytes(item) for item in chosen]

    @classmethod
    def unpacked(cls, kind: Kind, packed: Sequence[bytes], names: Sequence[str]) -> Images:
        """Restore images from `packed`.

        Args:
            kind: `Images.kind`.
            packed: The images.
            names: Their names; ignored for files, which are named by their paths.
        """
        if kind == "files":
            paths = [Path(os.fsdecode(item)) for item in packed]
            return cls(paths, list(map(str, paths)))
        if kind == "encoded":
            return cls(packed, names)
        return cls(np.frombuffer(b"".join(packed), np.uint8).reshape(len(packed), *kind), names)

    def joined(self, other: Images) -> Images:
        """Return these images followed by others of the same kind."""
        names = [*self.names, *other.names]
        if isinstance(self._items, np.ndarray) and isinstance(other._items, np.ndarray):
            return Images(np.concatenate([self._items, other._items]), names)
        return Images([*self._items, *other._items], names)

    def digest(self, digests: Sequence[bytes] = ()) -> bytes:
        """Return the SHA-256 digest of all images in order. Files are read, but not decoded.

        Args:
            digests: What `digests` returned, if it was called.

        Raises:
            InputError: A file does not exist or cannot be read.
        """
        if isinstance(self._items, np.ndarray):
            digest = hashlib.sha256(f"{self._items.dtype.str} {self._items.shape}".encode())
            digest.update(np.ascontiguousarray(self._items).data)
            return digest.digest()
        return hashlib.sha256(b"".join(digests or self.digests())).digest()

    def digests(self) -> list[bytes]:
        """Return the SHA-256 digest of each encoded image; of images that are arrays, none.

        Raises:
            InputError: A file does not exist or cannot be read.
        """
        if isinstance(self._items, np.ndarray):
            return []
        parts = [b""] * len(self)

        def hash_one(index: int) -> None:
            parts[index] = hashlib.sha256(self._encoded(index)).digest()

        _in_threads(hash_one, len(self))
        return parts

    def problems(self) -> list[str | None]:
        """Decode every image, and return what is wrong with each, or None."""
        return self.each(lambda index, pixels: None, _TRIED)

    def each(self, see: Callable[[int, np.ndarray], object], form: Pixels) -> list[str | None]:
        """Decode every image that can be, on all cores.

        Args:
            see: Called with the position of an image and its pixels.
            form: What the pixels are.

        Returns:
            What is wrong with each image, or None.
        """
        found: list[str | None] = [None] * len(self)

        def try_one(index: int) -> None:
            try:
                see(index, self._decode(index, form))
            except InputError as error:
                found[index] = str(error)

        _in_threads(try_one, len(self))
        return found

    def header(self, index: int) -> tuple[str, int, int]:
        """Return format, width and height of an image.

        Raises:
            InputError: It cannot be read.
        """
        if isinstance(self._items, np.ndarray):
            height, width = self._items.shape[1:3]
            return "array", int(width), int(height)
        return images.header(self._encoded(index), self.names[index])

    def _encoded(self, index: int) -> bytes | memoryview:
        item = self._items[index]
        return images.read(item) if isinstance(item, Path) else item

    def _decode(self, index: int, form: Pixels) -> np.ndarray:
        if isinstance(self._items, np.ndarray):
            return from_array(self._items[index], form)
        return decode(self._encoded(index), self.names[index], form)


@dataclass(frozen=True)
class Labelled:
    """Images and their labels, int64 ``(N,)``."""

    images: Images
    labels: np.ndarray

    def take(self, indices: np.ndarray) -> Labelled:
        """Return the images at the given positions with their labels."""
        return Labelled(self.images.take(indices), self.labels[indices])


@dataclass(frozen=True)
class Source:
    """A data set as read: `classes` maps labels to names; `test` is None if the data has no split."""

    classes: tuple[str, ...]
    train: Labelled
    test: Labelled | None
    split: str = "official train/test split"
    accounts: Accounts = field(default_factory=Accounts)
    refused: tuple[str, ...] = ()  # a sentence for each file that a user may take for an image, but is none


def labelled_array(pixels: np.ndarray, labels: np.ndarray, kind: str) -> Labelled:
    """Label an array of images; errors name image 17 "`kind` image 17"."""
    names = [f"{kind} image {index}" for index in range(len(pixels))]
    return Labelled(Images(pixels, names), np.asarray(labels, dtype=np.int64))


def padded(pixels: np.ndarray) -> np.ndarray:
    """Pad greyscale images ``(N, 28, 28)`` with black to ``(N, 32, 32)``; return others unchanged."""
    # 32 × 32 is the input of the shipped backbone, so that resizing does not blur
    return np.pad(pixels, ((0, 0), (2, 2), (2, 2))) if pixels.shape[1:] == (28, 28) else pixels


def numbered(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> Source:
    """Return a source from pairs (pixels, labels), with the labels as class names."""
    numbers = np.unique(np.concatenate([train[1], test[1]]))

    def labelled(part: tuple[np.ndarray, np.ndarray], kind: str) -> Labelled:
        return labelled_array(part[0], np.searchsorted(numbers, part[1]), kind)

    return Source(tuple(str(number) for number in numbers), labelled(train, "train"), labelled(test, "test"))


def read_digits() -> Source:
    """Read the 1,797 digits of scikit-learn: 8 × 8 pixels, greyscale, without a split.

    Raises:
        EnvironmentUnfitError: scikit-learn is not installed.
    """
    digits = require("sklearn.datasets", "train", "read the data set 'digits'").load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
    names = tuple(str(name) for name in digits.target_names)
    return Source(names, labelled_array(pixels, digits.target, "digits"), None)


def _read_part(arrays: Mapping[str, np.ndarray], part: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the validated pixels and labels of ``train`` or ``test``."""
    for key in (f"x_{part}", f"y_{part}"):
        if key not in arrays:
            found = ", ".join(arrays) or "nothing"
            raise InputError(f"{path} must hold x_train, y_train, x_test and y_test, but holds {found}")
    pixels, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
    shape_fits = pixels.ndim == 3 or (pixels.ndim == 4 and pixels.shape[3] == 3)
    if pixels.dtype != np.uint8 or not shape_fits or 0 in pixels.shape:
        raise InputError(
            f"{path}: x_{part} must be uint8 of shape (N, H, W) or (N, H, W, 3), "
            f"but is {pixels.dtype} of shape {pixels.shape}"
        )
    if labels.dtype.kind not in "iu" or labels.shape != pixels.shape[:1]:
        raise InputError(
            f"{path}: y_{part} must be whole numbers of shape ({len(pixels)},), one for each image, "
            f"but is {labels.dtype} of shape {labels.shape}"
        )
    return padded(pixels), labels


def read_npz(path: Path) -> Source:
    """Read an .npz file with the arrays `x_train`, `y_train`, `x_test` and `y_test`, such as MNIST.

    Labels become class names. Images of 28 × 28 pixels are padded to 32 × 32 with black.

    Raises:
        InputError: The file is not an .npz, is damaged, exceeds 2 GiB, or lacks one of these arrays.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(member.file_size for member in archive.infolist())
        if total > MAX_BYTES:
            raise InputError(f"{path} holds {total:,} bytes, but at most {MAX_BYTES:,} are read; split it")
        with np.load(path, allow_pickle=False) as arrays:
            train, test = (_read_part(arrays, part, path) for part in ("train", "test"))
    except InputError:
        raise
    except Exception as error:  # damaged data can raise anything; MemoryError if a header claims more than the memory
        raise InputError(f"{path} cannot be read as an .npz file ({str(error)[:200]}); is it one?") from error
    return numbered(train, test)
