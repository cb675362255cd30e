"""Folders of images, one folder a class, on disk or in an archive.

Layouts: ``train/<class>/…`` with ``test/<class>/…`` (or ``val/``, ``valid/``), or just ``<class>/…``. Class
folders may hold folders. What is hidden, or no image by its name, is skipped; so are images outside a class.
A folder or archive in the official format of CIFAR, MNIST or Tiny-ImageNet is recognised by its files (see `cifar`,
`mnist`, `tiny_imagenet`).
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from ssd_edge.classes import normalise_name
from ssd_edge.data import cifar, mnist, tiny_imagenet
from ssd_edge.data.arrays import MAX_BYTES, Images, Labelled, Source
from ssd_edge.errors import InputError
from ssd_edge.files import read_bytes
from ssd_edge.images import is_image_name, walk_images

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation")  # the first one present is the test split
LAYOUT = "expected train/<class>/… and test/<class>/…, or <class>/… alone"

# By the parts of its path, an image: its file or its bytes, and what to call it in an error.
Tree = Mapping[tuple[str, ...], tuple[Path | bytes | memoryview, str]]

_OPENERS: dict[str, Callable[[Path], IO[bytes]]] = {
    ".tar": lambda path: path.open("rb"),
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.xz": lzma.open,
    ".txz": lzma.open,
    ".tar.bz2": bz2.open,
    ".tbz2": bz2.open,
}
# What reading a damaged archive raises; gzip and bz2 report damage as an OSError without a number.
_DAMAGE = (
    *(OSError, EOFError, ValueError, RuntimeError, zlib.error, lzma.LZMAError),
    *(tarfile.TarError, zipfile.BadZipFile),
)


def read_folder(folder: Path) -> Source:
    """Read a folder: one in an official format, or one with a folder for each class.

    Raises:
        InputError: it has no classes, or cannot be read.
    """
    if found := cifar.find(folder):
        return cifar.read({name: read_bytes(found / name) for name in cifar.names_in(found)}, str(found))
    if found := mnist.files_in(folder):
        return mnist.read(found, str(folder))
    official = tiny_imagenet.find(folder)
    root = official or folder
    tree: Tree = {path.relative_to(root).parts: (path, str(path)) for path in walk_images(root)}
    if official:
        table = official.joinpath(*tiny_imagenet.ANNOTATIONS)
        tree = tiny_imagenet.arrange(tree, read_bytes(table), str(table))
    return _by_class(tree, str(folder))


def read_archive(path: Path) -> Source:
    """Read an archive of such a folder into memory; nothing is written to the disk.

    A single folder around everything is stripped. The images stay encoded.

    Raises:
        InputError: no archive by its name, damaged, cut short, over 2 GiB, with a link, or with a path that
            leads outside.
    """
    ending = next((ending for ending in _OPENERS if path.name.lower().endswith(ending)), path.suffix.lower())
    if ending not in (*_OPENERS, ".zip"):
        known = ", ".join([*_OPENERS, ".zip", ".npz"])
        raise InputError(f"{path} is not a data set: neither a folder nor one of {known}")
    try:
        files = _read_zip(path) if ending == ".zip" else _read_tar(_read_all(path, _OPENERS[ending]), path)
    except _DAMAGE as error:
        advice = "" if getattr(error, "errno", None) else "; it is damaged or cut short: copy it again"
        raise InputError(f"{path} cannot be read ({error}){advice}") from error
    tree: Tree = {
        parts: (data, f"{path.name}: {'/'.join(parts)}") for parts, data in files.items() if is_image_name(parts[-1])
    }
    others = {parts[-1]: data for parts, data in files.items()}
    if not tree and cifar.recognised(others):
        return cifar.read(others, str(path))
    numbers = {name: data for name, data in others.items() if name in mnist.SPELLINGS}
    if not tree and numbers:
        return mnist.read(numbers, str(path))
    for table in files:
        top = table[:-2]
        if table[-2:] == tiny_imagenet.ANNOTATIONS and any(parts[:-1] == (*top, "val", "images") for parts in tree):
            inside = {parts[len(top) :]: image for parts, image in tree.items() if parts[: len(top)] == top}
            return _by_class(tiny_imagenet.arrange(inside, files[table], f"{path.name}: {'/'.join(table)}"), str(path))
    tops = _tops(tree)
    return _by_class((len(tops) == 1 and _below(tree, tops[0])) or tree, str(path))


def _tops(tree: Tree) -> list[str]:
    return sorted({parts[0] for parts in tree if len(parts) >= 2})


def _below(tree: Tree, top: str) -> Tree:
    """What lies in folders in the folder `top`."""
    return {parts[1:]: image for parts, image in tree.items() if parts[0] == top and len(parts) >= 3}


def _by_class(tree: Tree, where: str) -> Source:
    """Take split and classes from the paths."""
    tops = _tops(tree)
    # a split holds folders; a folder of images that is called 'train' is a class
    splits = {parts[0].lower(): parts[0] for parts in tree if len(parts) >= 3}
    train = next((splits[name] for name in TRAIN_NAMES if name in splits), None)
    test = next((splits[name] for name in TEST_NAMES if name in splits), None)
    if train and test:
        trees = [_below(tree, train), _below(tree, test)]
    elif train and tops == [train]:
        trees = [_below(tree, train)]
    else:
        trees = [{parts: image for parts, image in tree.items() if len(parts) >= 2}]
    class_of = {folder: normalise_name(folder) for part in trees for folder in _tops(part)}
    if not class_of:
        raise InputError(f"{where} holds no class with images; {LAYOUT}")
    classes = tuple(sorted(set(class_of.values())))
    label_of = {folder: classes.index(name) for folder, name in class_of.items()}
    labelled = [_label(part, label_of) for part in trees]
    if len(labelled) == 1:
        return Source(classes, labelled[0], None)
    unused = ", ".join(f"{top}/" for top in tops if top not in (train, test))
    split = f"the data's own {train}/ and {test}/" + (f", not its {unused}" if unused else "")
    return Source(classes, labelled[0], labelled[1], split)


def _label(tree: Tree, label_of: Mapping[str, int]) -> Labelled:
    """The images, sorted by path, with the label of the folder that each lies in."""
    paths = sorted(tree)
    images = Images([tree[parts][0] for parts in paths], [tree[parts][1] for parts in paths])
    return Labelled(images, np.array([label_of[parts[0]] for parts in paths], dtype=np.int64))


def _too_large(path: Path) -> InputError:
    return InputError(f"{path} holds more than {MAX_BYTES:,} bytes; unpack it and name the folder instead")


def _parts(name: str, path: Path) -> tuple[str, ...]:
    """The parts of a member's path; none if something in it is hidden."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise InputError(f"{path} is refused: its member '{name}' has a path that leads outside")
    return () if any(part.startswith((".", "__MACOSX")) for part in pure.parts) else pure.parts


def _read_all(path: Path, opener: Callable[[Path], IO[bytes]]) -> bytes:
    """Decompress as a whole: tarfile alone takes a stream that is cut between two members for complete."""
    blocks: list[bytes] = []
    total = 0
    with opener(path) as stream:
        while block := stream.read(1 << 20):
            blocks.append(block)
            total += len(block)
            if total > MAX_BYTES:
                raise _too_large(path)
    return b"".join(blocks)


def _read_tar(data: bytes, path: Path) -> dict[tuple[str, ...], memoryview]:
    """The files in an unpacked tar, as views of it."""
    files = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for member in archive:
            parts = _parts(member.name, path)
            if not parts or member.isdir():
                continue
            if member.isfile() and not member.issparse():
                files[parts] = memoryview(data)[member.offset_data : member.offset_data + member.size]
            elif is_image_name(parts[-1]):
                raise InputError(f"{path}: '{member.name}' is a link or no plain file; unpack it first")
        # tarfile takes a damaged header for the end; a real end is a block of zeros
        if data[archive.offset : archive.offset + tarfile.BLOCKSIZE] != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no valid header at byte {archive.offset:,}")
    return files


def _wanted(parts: tuple[str, ...]) -> bool:
    """Whether a reader may need a file; the others are not unpacked."""
    name = parts[-1]
    official = name in cifar.FILES or name in mnist.SPELLINGS or parts[-2:] == tiny_imagenet.ANNOTATIONS
    return official or is_image_name(name)


def _read_zip(path: Path) -> dict[tuple[str, ...], bytes]:
    """The images, and what may be a file of an official format, in a zip."""
    files = {}
    total = 0
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            parts = _parts(member.filename.replace("\\", "/"), path)
            if not parts or member.is_dir() or not _wanted(parts):
                continue
            total += member.file_size
            if total > MAX_BYTES:
                raise _too_large(path)
            files[parts] = archive.read(member)
    return files
