"""Reader of image folders with one subfolder per class, on disk or in an archive.

Layouts: ``train/<class>/…`` with ``test/<class>/…`` (or ``val/``, ``valid/``), or only ``<class>/…``. Class folders may
contain subfolders. Hidden files, files without an image extension, and images outside a class folder are skipped. The
official formats of CIFAR, MNIST and Tiny-ImageNet are recognised by their files.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, cast

import numpy as np

from ssd_edge.classes import normalise_name
from ssd_edge.data import cifar, mnist, tiny_imagenet
from ssd_edge.data.arrays import MAX_BYTES, Images, Labelled, Source
from ssd_edge.errors import InputError
from ssd_edge.files import read_bytes
from ssd_edge.images import is_image_name, walk_images

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation")  # the first one present is the test split
MAX_MEMBERS = 1_000_000  # of a tar: a member takes 512 bytes, of which a megabyte of an .xz makes millions
LAYOUT = "expected train/<class>/… and test/<class>/…, or <class>/… alone"

# Parts of the path of an image → its file or bytes, and its name for error messages.
Tree = Mapping[tuple[str, ...], tuple[Path | bytes | memoryview, str]]


def _open_gzip(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path))


_OPENERS: dict[str, Callable[[Path], IO[bytes]]] = {
    ".tar": lambda path: path.open("rb"),
    ".tar.gz": _open_gzip,
    ".tgz": _open_gzip,
    ".tar.xz": lzma.open,
    ".txz": lzma.open,
    ".tar.bz2": bz2.open,
    ".tbz2": bz2.open,
}


def read_folder(folder: Path) -> Source:
    """Read a folder in an official format, or with one subfolder per class.

    Raises:
        InputError: The folder contains no classes or cannot be read.
    """
    if batches := cifar.find(folder):
        return cifar.read({name: read_bytes(batches / name) for name in cifar.names_in(batches)}, str(batches))
    if idx_files := mnist.files_in(folder):
        return mnist.read(idx_files, str(folder))
    official = tiny_imagenet.find(folder)
    root = official or folder
    tree: Tree = {path.relative_to(root).parts: (path, str(path)) for path in walk_images(root)}
    if official:
        table = official.joinpath(*tiny_imagenet.ANNOTATIONS)
        tree = tiny_imagenet.arrange(tree, read_bytes(table), str(table))
    return _by_class(tree, str(folder))


def read_archive(path: Path) -> Source:
    """Read an archive of such a folder into memory, without writing to the disk.

    A single top-level folder is stripped. Images remain encoded.

    Raises:
        InputError: The file is not an archive by its name, is damaged or truncated, exceeds 2 GiB, or contains a link
            or a path that leads outside.
    """
    ending = next((ending for ending in _OPENERS if path.name.lower().endswith(ending)), path.suffix.lower())
    if ending not in (*_OPENERS, ".zip"):
        known = ", ".join([*_OPENERS, ".zip", ".npz"])
        raise InputError(f"{path} is not a data set: neither a folder nor one of {known}")
    try:
        files = _read_zip(path) if ending == ".zip" else _read_tar(_read_all(path, _OPENERS[ending]), path)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # a damaged archive can raise anything; gzip and bz2 an OSError without a number
        advice = "" if getattr(error, "errno", None) else "; it is damaged or cut short: copy it again"
        raise InputError(f"{path} cannot be read ({str(error)[:200]}){advice}") from error
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
    """Return the entries in subfolders of the folder `top`."""
    return {parts[1:]: image for parts, image in tree.items() if parts[0] == top and len(parts) >= 3}


def _by_class(tree: Tree, where: str) -> Source:
    """Derive split and classes from the paths."""
    tops = _tops(tree)
    # a split contains folders; a folder of images named 'train' is a class
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
        raise InputError(f"{where} contains no class with images; {LAYOUT}")
    classes = tuple(sorted(set(class_of.values())))
    label_of = {folder: classes.index(name) for folder, name in class_of.items()}
    labelled = [_label(part, label_of) for part in trees]
    if len(labelled) == 1:
        return Source(classes, labelled[0], None)
    unused = ", ".join(f"{top}/" for top in tops if top not in (train, test))
    split = f"the data's own {train}/ and {test}/" + (f", not its {unused}" if unused else "")
    return Source(classes, labelled[0], labelled[1], split)


def _label(tree: Tree, label_of: Mapping[str, int]) -> Labelled:
    """Return the images, sorted by path, with the labels of their folders."""
    paths = sorted(tree)
    images = Images([tree[parts][0] for parts in paths], [tree[parts][1] for parts in paths])
    return Labelled(images, np.array([label_of[parts[0]] for parts in paths], dtype=np.int64))


def _too_large(path: Path) -> InputError:
    return InputError(f"{path} holds more than {MAX_BYTES:,} bytes; unpack it and name the folder instead")


def _parts(name: str, path: Path) -> tuple[str, ...]:
    """Return the parts of the path of a member; none if a part is hidden."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise InputError(f"{path} is refused: its member '{name}' has a path that leads outside")
    return () if any(part.startswith((".", "__MACOSX")) for part in pure.parts) else pure.parts


def _read_all(path: Path, opener: Callable[[Path], IO[bytes]]) -> bytes:
    """Decompress a whole file: tarfile alone accepts a stream that was truncated between two members."""
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
    """Return the files in an uncompressed tar as views."""
    files = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        count = 0
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps a kilobyte of each
            count += 1
            if count > MAX_MEMBERS:
                raise InputError(
                    f"{path} holds more than {MAX_MEMBERS:,} members; unpack it and name the folder instead"
                )
            if member.size < 0:  # possible in base 256; tarfile would go back, and read the same members for ever
                raise tarfile.ReadError(f"a member of {member.size:,} bytes at byte {member.offset:,}")
            parts = _parts(member.name, path)
            if not parts or member.isdir():
                continue
            if member.isfile() and not member.issparse():
                files[parts] = memoryview(data)[member.offset_data : member.offset_data + member.size]
            elif is_image_name(parts[-1]):
                raise InputError(f"{path}: '{member.name}' is a link or no plain file; unpack it first")
        # tarfile ends at a damaged header without an error; a real end is a block of zeros
        if data[archive.offset : archive.offset + tarfile.BLOCKSIZE] != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no valid header at byte {archive.offset:,}")
    return files


def _wanted(parts: tuple[str, ...]) -> bool:
    """Return True if a reader may need a file; others are not unpacked."""
    name = parts[-1]
    official = name in cifar.FILES or name in mnist.SPELLINGS or parts[-2:] == tiny_imagenet.ANNOTATIONS
    return official or is_image_name(name)


def _read_zip(path: Path) -> dict[tuple[str, ...], bytes]:
    """Return the images and possible files of official formats in a zip."""
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
