"""Reader of CIFAR-10 and CIFAR-100 in the official Python format, which consists of pickles.

This is the only module that reads pickles. Unpickling calls the functions that the file names. This reader allows five
names and replaces each by an inert stand-in, so that not even NumPy's own unpickling code runs; all others are refused.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ssd_edge.data.arrays import Labelled, Source, labelled_array
from ssd_edge.errors import InputError

_TRAIN_10 = tuple(f"data_batch_{number}" for number in range(1, 6))
# files of the training set, of the test set, of the class names; keys of the labels and of the class names
_CIFAR_10 = (_TRAIN_10, ("test_batch",), "batches.meta", b"labels", b"label_names")
_CIFAR_100 = (("train",), ("test",), "meta", b"fine_labels", b"fine_label_names")
_FOLDERS = ("cifar-10-batches-py", "cifar-100-python")  # names in the official archives
FILES = frozenset({*_TRAIN_10, "test_batch", "batches.meta", "train", "test", "meta"})


class _Dtype:
    """Stand-in for numpy.dtype; only ``uint8`` is accepted."""

    def __init__(self, code: bytes | str, *_: Any) -> None:
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"an array of type {code!r} instead of uint8")

    def __setstate__(self, state: object) -> None:
        """Ignore the byte order and other state, which does not affect uint8."""


class _Array:
    """Stand-in for numpy.ndarray; `pixels` is the array."""

    pixels: np.ndarray

    def __init__(self, *_: Any) -> None:
        """Accept the arguments with which NumPy creates an empty array before setting its state."""

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _, shape, _, by_column, data = state
        self.pixels = np.frombuffer(data, dtype=np.uint8).reshape(shape, order="F" if by_column else "C")


def _encode(text: str, encoding: str) -> bytes:
    """Stand-in for _codecs.encode, with which Python 3 writes bytes in old pickle protocols."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


_PERMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    """Unpickler that resolves only the stand-ins."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _PERMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which CIFAR does not need") from None


def _unpickle(data: bytes | memoryview, what: str) -> dict[bytes, Any]:
    """Read one of CIFAR's files.

    Raises:
        InputError: The file is damaged, or names anything but a uint8 array; nothing was executed.
    """
    try:
        value = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(f"{what} is refused: {error}; download the official archive again") from error
    if not isinstance(value, dict):
        raise InputError(f"{what} does not contain a table of arrays; download the official archive again")
    return value


def names_in(folder: Path) -> list[str]:
    """Return the names of CIFAR's files in a folder."""
    return sorted(name for name in FILES if os.path.isfile(folder / name))


def recognised(names: Collection[str]) -> bool:
    """Return True if file names are those of CIFAR-10 or CIFAR-100, even if some are missing."""
    return "data_batch_1" in names or "batches.meta" in names or {"train", "meta"} <= set(names)


def find(folder: Path) -> Path | None:
    """Return the folder with CIFAR's files: `folder`, or a subfolder with an official name, or None.

    Raises:
        InputError: The folder contains both data sets.
    """
    places = [folder, *(folder / name for name in _FOLDERS)]
    found = [place for place in places if recognised(names_in(place))]
    if len(found) > 1:
        raise InputError(f"{folder} holds more than one CIFAR; name one of {', '.join(map(str, found))}")
    return found[0] if found else None


def read(files: Mapping[str, bytes | memoryview], where: str) -> Source:
    """Read CIFAR-10 or CIFAR-100 (its fine labels).

    Args:
        files: Content of the files by name.
        where: Folder or archive, for error messages.

    Raises:
        InputError: A file is missing, damaged, or names anything that a data set does not need.
    """
    train, test, meta, label_key, name_key = _CIFAR_100 if "meta" in files else _CIFAR_10
    missing = [name for name in (*train, *test, meta) if name not in files]
    if missing:
        raise InputError(f"{where} lacks the file {missing[0]} of CIFAR; unpack the official archive again")
    try:
        names = tuple(name.decode() for name in _unpickle(files[meta], f"{where}: {meta}")[name_key])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{where}: {meta} holds no class names ({error!r})") from error

    def part(members: tuple[str, ...], kind: str) -> Labelled:
        batches = [_batch(files[name], f"{where}: {name}", label_key, len(names)) for name in members]
        pixels, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        return labelled_array(pixels, labels, kind)

    return Source(names, part(train, "train"), part(test, "test"))


def _batch(data: bytes | memoryview, what: str, label_key: bytes, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels ``(N, 32, 32, 3)`` and labels ``(N,)`` of one file."""
    table = _unpickle(data, what)
    try:
        pixels = table[b"data"].pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # stored plane by plane
        labels = np.array(table[label_key])
    except (KeyError, AttributeError, ValueError) as error:
        raise InputError(f"{what} is not a batch of CIFAR ({error!r})") from error
    if labels.shape != pixels.shape[:1] or labels.dtype.kind != "i":
        raise InputError(f"{what}: {len(pixels)} images, but labels of shape {labels.shape} ({labels.dtype})")
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= classes:
        raise InputError(f"{what} has labels {labels.min()}..{labels.max()}, but there are {classes} classes")
    return pixels, labels
