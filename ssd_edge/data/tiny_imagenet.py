"""Tiny-ImageNet's own layout, which names the classes of its test images in a table.

``train/<wnid>/images/*.JPEG``, ``val/images/*.JPEG`` with ``val/val_annotations.txt`` (a line per image: its file, its
class, its box), and ``test/images/*.JPEG`` without labels, which is of no use here. Classes are called by their
WordNet ids, which do not change; ``words.txt`` and the boxes are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from ssd_edge.errors import InputError

T = TypeVar("T")

ANNOTATIONS = ("val", "val_annotations.txt")
_FOLDER = "tiny-imagenet-200"  # as in the official archive


def find(folder: Path) -> Path | None:
    """The folder with this layout: `folder` itself or the official name in it, else None.

    Where the test images have been moved to folders of their classes, the table is of no use any more.
    """
    for place in (folder, folder / _FOLDER):
        if place.joinpath(*ANNOTATIONS).is_file() and (place / "val" / "images").is_dir():
            return place
    return None


def arrange(tree: Mapping[tuple[str, ...], T], table: bytes | memoryview, where: str) -> dict[tuple[str, ...], T]:
    """Move each test image to the folder of its class.

    Args:
        tree: what is to be moved, by the parts of its path in the data set.
        table: content of ``val_annotations.txt``.
        where: what to call that file in an error.

    Returns:
        The tree of ``train/<wnid>/…`` and ``val/<wnid>/…`` alone.

    Raises:
        InputError: an image without a line, a line without its image, a line of another form, or a class that no
            training image has.
    """
    arranged = {parts: item for parts, item in tree.items() if parts[0] == "train" and len(parts) >= 3}
    known = {parts[1] for parts in arranged}
    class_of = _parse(table, where)
    images = {parts[2]: item for parts, item in tree.items() if parts[:2] == ("val", "images") and len(parts) == 3}
    for file in sorted(set(class_of) ^ set(images)):
        if file in images:
            raise InputError(f"{where} does not say of which class val/images/{file} is; unpack the archive again")
        raise InputError(f"{where} names {file}, but there is no val/images/{file}; unpack the archive again")
    for file, wnid in class_of.items():
        if wnid not in known:
            raise InputError(f"{where} says that {file} is of the class '{wnid}', but there is no train/{wnid}/")
        arranged["val", wnid, file] = images[file]
    return arranged


def _parse(table: bytes | memoryview, where: str) -> dict[str, str]:
    """File → class."""
    class_of: dict[str, str] = {}
    for number, line in enumerate(bytes(table).decode("utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        file, *rest = line.split("\t")
        if not (file and rest and rest[0]) or file in class_of:
            raise InputError(
                f"{where}, line {number}, must give an image and its class, each image once, but is {line[:80]!r}"
            )
        class_of[file] = rest[0]
    return class_of
