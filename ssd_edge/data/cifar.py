"""Reader of CIFAR-10 and CIFAR-100 in the official Python format, which consists of pickles.

Unpickling calls the functions that a file names, and a few bytes can make it allocate gigabytes or never end. So no
file is unpickled: `pickletools` splits it into operations, and this module interprets the few of them that tables of
arrays, whole numbers and texts need. Time and memory are proportional to the size of the file.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ssd_edge.classes import normalise_name
from ssd_edge.data.arrays import Labelled, Source, labelled_array
from ssd_edge.errors import InputError
from ssd_edge.files import is_file

_TRAIN_10 = tuple(f"data_batch_{number}" for number in range(1, 6))
# files of the training set, of the test set, of the class names; keys of the labels and of the class names
_CIFAR_10 = (_TRAIN_10, ("test_batch",), "batches.meta", b"labels", b"label_names")
_CIFAR_100 = (("train",), ("test",), "meta", b"fine_labels", b"fine_label_names")
_FOLDERS = ("cifar-10-batches-py", "cifar-100-python")  # names in the official archives
FILES = frozenset({*_TRAIN_10, "test_batch", "batches.meta", "train", "test", "meta"})

_RECONSTRUCT, _NDARRAY, _DTYPE, _ENCODE, _MARK = (object() for _ in range(5))
_PERMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _DTYPE,
    ("_codecs", "encode"): _ENCODE,  # with which Python 3 writes bytes in old protocols
}
_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"}
_OLD_TEXTS = {"STRING", "BINSTRING", "SHORT_BINSTRING"}  # of Python 2: bytes
_TEXTS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Dtype:
    """Stands for the data type uint8."""


class _Array:
    """An array of uint8, empty until its state is set."""

    pixels: np.ndarray | None = None


class _Reader:
    """Stack and memory of one file."""

    def __init__(self, size: int) -> None:
        self._stack: list[Any] = []
        self._memory: dict[int, Any] = {}
        self._left = size  # characters that may still be encoded: each text of a file is encoded once

    def read(self, data: bytes | memoryview) -> Any:
        """Return the value of a file; a damaged one raises anything."""
        for operation, argument, _ in pickletools.genops(io.BytesIO(data)):
            self._apply(operation.name, argument)
        return self._stack.pop()

    def _apply(self, name: str, argument: Any) -> None:
        stack, memory = self._stack, self._memory
        if name in _NUMBERS or name in _TEXTS:
            stack.append(argument)
        elif name in _OLD_TEXTS:
            stack.append(argument.encode("latin1"))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memory[argument] = stack[-1]
        elif name == "MEMOIZE":
            memory[len(memory)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memory[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(self._pop_to_mark()))
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name == "LIST":
            stack.append(self._pop_to_mark())
        elif name == "DICT":
            items = self._pop_to_mark()
            stack.append({})
            self._set(items)
        elif name in ("APPEND", "APPENDS"):
            items = self._pop(1) if name == "APPEND" else self._pop_to_mark()
            _of_type(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            self._set(self._pop(2) if name == "SETITEM" else self._pop_to_mark())
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            wanted = argument.split(" ", 1) if name == "GLOBAL" else self._pop(2)
            module, attribute = (_of_type(part, str) for part in wanted)
            if (module, attribute) not in _PERMITTED:
                raise ValueError(f"it asks for {module}.{attribute}, which CIFAR does not need")
            stack.append(_PERMITTED[module, attribute])
        elif name == "REDUCE":
            called, arguments = self._pop(2)
            stack.append(self._made(called, _of_type(arguments, tuple)))
        elif name == "BUILD":
            (state,) = self._pop(1)
            if type(stack[-1]) is not _Dtype:  # whose byte order does not affect uint8
                _, shape, dtype, by_column, values = _of_type(state, tuple)
                _of_type(dtype, _Dtype)
                sides = [_of_type(side, int) for side in _of_type(shape, tuple)[:4]]
                flat = np.frombuffer(_of_type(values, bytes), dtype=np.uint8)
                _of_type(stack[-1], _Array).pixels = flat.reshape(sides, order="F" if by_column else "C")
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"it has the operation {name}, which CIFAR does not need")

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise ValueError("it takes a value that is not there")
        items = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return items

    def _pop_to_mark(self) -> list[Any]:
        items = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _set(self, items: list[Any]) -> None:
        """Set keys and values of the table on top of the stack."""
        for key in items[::2]:  # only texts: the hash of nested tuples takes exponential time
            _of_type(key, bytes, str)
        _of_type(self._stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))

    def _made(self, called: object, arguments: tuple[Any, ...]) -> Any:
        """Return what a permitted function returns."""
        if called is _RECONSTRUCT and arguments[0] is _NDARRAY:
            return _Array()
        if called is _DTYPE:
            code = _of_type(arguments[0], str, bytes)
            if code not in ("u1", b"u1"):
                raise ValueError(f"an array of type {code!r:.20} instead of uint8")
            return _Dtype()
        if called is _ENCODE and arguments[1:] in (("latin1",), (b"latin1",)):
            text = _of_type(arguments[0], str)
            self._left -= len(text)
            if self._left < 0:
                raise ValueError("it encodes more text than it contains")
            return text.encode("latin1")
        raise ValueError("it calls something that CIFAR does not need")


def _of_type(value: Any, *kinds: type) -> Any:
    """Return a value of exactly one of these types; nothing else is done with it before."""
    if type(value) not in kinds:
        raise ValueError(f"it has {type(value).__name__} where {kinds[0].__name__} belongs")
    return value


def _table(data: bytes | memoryview, what: str) -> dict[bytes, Any]:
    """Read one of CIFAR's files.

    Raises:
        InputError: The file is damaged, or contains anything but a table of uint8 arrays, numbers and texts.
    """
    try:
        value = _Reader(len(data)).read(data)
    except MemoryError:
        raise
    except Exception as error:  # damaged data can raise anything
        raise InputError(f"{what} is refused: {str(error)[:200]}; download the official archive again") from error
    if type(value) is not dict:
        raise InputError(f"{what} does not contain a table of arrays; download the official archive again")
    return value


def names_in(folder: Path) -> list[str]:
    """Return the names of CIFAR's files in a folder."""
    return sorted(name for name in FILES if is_file(folder / name))


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
    listed = _table(files[meta], f"{where}: {meta}").get(name_key)
    if type(listed) is not list or not all(type(name) is bytes for name in listed):
        raise InputError(f"{where}: {meta} holds no class names; download the official archive again")
    names = tuple(normalise_name(name.decode("utf-8", "surrogateescape")) for name in listed)

    def part(members: tuple[str, ...], kind: str) -> Labelled:
        batches = [_batch(files[name], f"{where}: {name}", label_key, len(names)) for name in members]
        pixels, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        return labelled_array(pixels, labels, kind)

    return Source(names, part(train, "train"), part(test, "test"))


def _batch(data: bytes | memoryview, what: str, label_key: bytes, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels ``(N, 32, 32, 3)`` and labels ``(N,)`` of one file."""
    table = _table(data, what)
    array, labels = table.get(b"data"), table.get(label_key)
    if type(array) is not _Array or array.pixels is None or array.pixels.size % 3072 or type(labels) is not list:
        raise InputError(f"{what} is not a batch of CIFAR; download the official archive again")
    pixels = array.pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # stored plane by plane
    if not all(type(label) is int for label in labels):
        raise InputError(f"{what} has labels that are not whole numbers; download the official archive again")
    if len(labels) != len(pixels):
        raise InputError(f"{what}: {len(pixels)} images, but {len(labels)} labels; download the official archive again")
    if min(labels, default=0) < 0 or max(labels, default=0) >= classes:
        raise InputError(f"{what} has labels {min(labels)}..{max(labels)}, but there are {classes} classes")
    return pixels, np.array(labels, dtype=np.int64)
