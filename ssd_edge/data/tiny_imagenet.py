"""Reader of the official layout of Tiny-ImageNet, which lists the classes of its test images in a table.

``train/<wnid>/images/*.JPEG``, ``val/images/*.JPEG`` with ``val/val_annotations.txt`` (per line: file, class,
box), and ``test/images/*.JPEG`` without labels, which is ignored. Classes are named by their WordNet ids; ``words.txt``
and the boxes are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from ssd_edge.errors import InputError
from ssd_edge.files import is_file, is_folder

T = TypeVar("T")

ANNOTATIONS = ("val", "val_annotations.txt")
_FOLDER = "tiny-imagenet-200"  # name in the official archive


def find(folder: Path) -> Path | None:
    """Return the folder with this layout: `folder`, or the subfolder with the official name, or None.

    A folder whose test images have been moved to class folders does not have this layout.
    """
    for place in (folder, folder / _FOLDER):
        if is_file(place.joinpath(*ANNOTATIONS)) and is_folder(place / "val" / "images"):
            return place
    return None


def arrange(tree: Mapping[tuple[str, ...], T], table: bytes | memoryview, where: str) -> dict[tuple[str, ...], T]:
    """Move each test image to the folder of its class.

    Args:
        tree: Images by the parts of their paths in the data set.
        table: Content of ``val_annotations.txt``.
        where: Name of that file for error messages.

    Returns:
        The images in ``train/<wnid>/…`` and ``val/<wnid>/…``.

    Raises:
        InputError: An image has no line, a line has no image or another form, or a class has no training images.
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
    """Return the class of each file."""
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
