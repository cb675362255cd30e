"""Reader of image folders with one subfolder per class, on disk or in an archive.

Layouts: ``train/<class>/…`` with ``test/<class>/…`` (or ``val/``, ``valid/``), or only ``<class>/…``, also inside of
outer folders. Class folders may contain subfolders. Every other file is accounted for (`accounts`). The official
formats of CIFAR, MNIST and Tiny-ImageNet are recognised by their files.
"""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import io
import lzma
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, cast

import numpy as np

from ssd_edge.classes import normalise_name
from ssd_edge.data import cifar, mnist, tiny_imagenet
from ssd_edge.data.accounts import Accounts
from ssd_edge.data.arrays import MAX_BYTES, Images, Labelled, Source
from ssd_edge.errors import InputError
from ssd_edge.files import read_bytes
from ssd_edge.images import Kind, is_image_name, kind_of, refusal, walk

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation")  # the first one present is the test split
MAX_MEMBERS = 1_000_000  # of a tar: a member takes 512 bytes, of which a megabyte of an .xz makes millions
LAYOUT = "expected train/<class>/… and test/<class>/…, or <class>/… alone"

Parts = tuple[str, ...]  # of a path in the data set
# Parts of the path of an image → its file or bytes, and its name for error messages.
Tree = Mapping[Parts, tuple[Path | bytes | memoryview, str]]


@dataclasses.dataclass
class _Contents:
    """Everything in a folder or an archive.

    Attributes:
        where: The folder or archive, for error messages.
        tree: The images.
        official: Content of what may be files of an official format, by path; of archives only.
        folders: Folders.
        refused: A sentence for each video, and for each picture of a kind that is not read.
        repeated: Names of members of an archive that a later one of the same name replaced.
        others: Files of other kinds.
        junk: Number of hidden files and files of operating systems.
    """

    where: str
    tree: dict[Parts, tuple[Path | bytes | memoryview, str]] = dataclasses.field(default_factory=dict)
    official: dict[Parts, bytes | memoryview] = dataclasses.field(default_factory=dict)
    folders: set[Parts] = dataclasses.field(default_factory=set)
    refused: list[str] = dataclasses.field(default_factory=list)
    repeated: list[str] = dataclasses.field(default_factory=list)
    others: list[Parts] = dataclasses.field(default_factory=list)
    junk: int = 0

    def add_folder(self, parts: Parts) -> None:
        """Account for a member of an archive that is a folder."""
        if parts and _kind_in(parts) != "junk":
            self.folders.add(parts)

    def add_other(self, parts: Parts, kind: Kind, name: str) -> None:
        """Account for a file that is not used."""
        if kind == "junk":
            self.junk += 1
        elif (sentence := refusal(name, kind)) is not None:
            self.refused.append(sentence)
        else:
            self.others.append(parts)

    def add_image(self, parts: Parts, item: Path | bytes | memoryview, name: str) -> None:
        """Account for an image; a second one of the same path replaces the first, as when an archive is unpacked."""
        if parts in self.tree:
            self.repeated.append(name)
        self.tree[parts] = (item, name)


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
    contents = _Contents(str(folder))
    for path, kind in walk(root):
        parts = path.relative_to(root).parts
        if kind == "folder":
            contents.folders.add(parts)
        elif kind == "image":
            contents.add_image(parts, path, str(path))
        else:
            contents.add_other(parts, kind, str(path))
    if official:
        table = official.joinpath(*tiny_imagenet.ANNOTATIONS)
        contents = _Contents(str(folder), tiny_imagenet.arrange(contents.tree, read_bytes(table), str(table)))
    return _by_class(contents)


def read_archive(path: Path) -> Source:
    """Read an archive of such a folder into memory, without writing to the disk.

    Images remain encoded.

    Raises:
        InputError: The file is not an archive by its name, is damaged or truncated, exceeds 2 GiB, or contains a link
            or a path that leads outside.
    """
    ending = next((ending for ending in _OPENERS if path.name.lower().endswith(ending)), path.suffix.lower())
    if ending not in (*_OPENERS, ".zip"):
        known = ", ".join([*_OPENERS, ".zip", ".npz"])
        raise InputError(f"{path} is not a data set: neither a folder nor one of {known}{_advice(path)}")
    try:
        contents = _read_zip(path) if ending == ".zip" else _read_tar(_read_all(path, _OPENERS[ending]), path)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # a damaged archive can raise anything; gzip and bz2 an OSError without a number
        advice = "" if getattr(error, "errno", None) else "; it is damaged or cut short: copy it again"
        raise InputError(f"{path} cannot be read ({str(error)[:200]}){advice}") from error
    tree = contents.tree
    others = {parts[-1]: data for parts, data in contents.official.items()}
    if not tree and cifar.recognised(others):
        return cifar.read(others, str(path))
    numbers = {name: data for name, data in others.items() if name in mnist.SPELLINGS}
    if not tree and numbers:
        return mnist.read(numbers, str(path))
    for table in contents.official:
        top = table[:-2]
        if table[-2:] == tiny_imagenet.ANNOTATIONS and any(parts[:-1] == (*top, "val", "images") for parts in tree):
            inside = {parts[len(top) :]: image for parts, image in tree.items() if parts[: len(top)] == top}
            name = f"{path.name}: {'/'.join(table)}"
            return _by_class(_Contents(str(path), tiny_imagenet.arrange(inside, contents.official[table], name)))
    return _by_class(contents)


def _advice(path: Path) -> str:
    """Return what a user who names a file of another kind may want."""
    suffix = path.suffix.lower()
    if is_image_name(path.name):
        return "; name the folder that contains a folder of images for each class"
    if suffix in (".yaml", ".yml"):
        return f"; settings are read with: --config {path}"
    if suffix in (".rar", ".7z", ".gz", ".xz", ".bz2", ".zst"):
        return "; unpack it and name the folder"
    return ""


def _tops(tree: Tree) -> list[str]:
    return sorted({parts[0] for parts in tree if len(parts) >= 2})


def _below(tree: Tree, top: str) -> Tree:
    """Return the entries in subfolders of the folder `top`."""
    return {parts[1:]: image for parts, image in tree.items() if parts[0] == top and len(parts) >= 3}


def _outer(tree: Tree) -> int:
    """Return the number of folders around those of the classes or of the split, each the only one."""
    depth = 0
    while len(tops := {parts[depth] for parts in tree if len(parts) >= depth + 2}) == 1:
        depth += 1
    return depth if tops else 0


def _by_class(contents: _Contents) -> Source:
    """Derive split and classes from the paths."""
    _refuse_boxes(contents)
    depth = _outer(contents.tree)
    tree = {parts[depth:]: image for parts, image in contents.tree.items() if len(parts) > depth}
    tops = _tops(tree)
    # a split contains folders; a folder of images named 'train' is a class
    splits = {parts[0].lower(): parts[0] for parts in tree if len(parts) >= 3}
    train = next((splits[name] for name in TRAIN_NAMES if name in splits), None)
    test = next((splits[name] for name in TEST_NAMES if name in splits), None)
    if train and test:
        places: list[Parts] = [(train,), (test,)]
        trees = [_below(tree, train), _below(tree, test)]
    else:
        places = [()]
        trees = [{parts: image for parts, image in tree.items() if len(parts) >= 2}]
    class_of = {folder: normalise_name(folder) for part in trees for folder in _tops(part)}
    if not class_of:
        raise InputError(f"{contents.where} contains no class with images; {LAYOUT}{_found(contents)}")
    classes = tuple(sorted(set(class_of.values())))
    label_of = {folder: classes.index(name) for folder, name in class_of.items()}
    labelled = [_label(part, label_of) for part in trees]
    unused = [top for top in tops if train and test and top not in (train, test)]
    accounts = _accounts(contents, depth, places, set(class_of), labelled, unused)
    refused = tuple(contents.refused)
    if len(labelled) == 1:
        return Source(classes, labelled[0], None, accounts=accounts, refused=refused)
    names = ", ".join(f"{top}/" for top in unused)
    split = f"the data's own {train}/ and {test}/" + (f", not its {names}" if names else "")
    return Source(classes, labelled[0], labelled[1], split, accounts, refused)


def _found(contents: _Contents) -> str:
    """Return what was found in place of classes, to end a sentence."""
    found = [
        f"{len(contents.tree):,} images in no folder" if contents.tree else "",
        f"{len(contents.refused):,} file{'s' * (len(contents.refused) > 1)} of kinds that are not read"
        if contents.refused
        else "",
    ]
    return f" ({'; '.join(filter(None, found))})" if any(found) else ""


def _accounts(
    contents: _Contents,
    depth: int,
    places: list[Parts],
    with_images: set[str],
    labelled: list[Labelled],
    unused: list[str],
) -> Accounts:
    """Account for what is not used.

    Args:
        contents: Everything.
        depth: See `_outer`.
        places: Folders that contain the class folders.
        with_images: Names of the class folders.
        labelled: The images that are used.
        unused: Folders beside the split that are not used.
    """
    used = {name for part in labelled for name in part.images.names}
    outside = sorted(
        name
        for parts, (_, name) in contents.tree.items()
        if name not in used and parts[depth : depth + 1] not in [(top,) for top in unused]
    )
    empty = {
        parts[-1]
        for folder in contents.folders
        for place in places
        if len(parts := folder[depth:]) == len(place) + 1 and parts[:-1] == place and parts[-1] not in with_images
    }
    endings = Counter(PurePosixPath(parts[-1]).suffix.lower() for parts in contents.others)
    return Accounts(
        outside=tuple(outside),
        empty=tuple(sorted(empty)),
        repeated=tuple(contents.repeated),
        others=tuple(sorted(endings.items(), key=lambda item: (-item[1], item[0]))),
        junk=contents.junk,
    )


def _refuse_boxes(contents: _Contents) -> None:
    """Refuse YOLO's layout, images/ beside labels/, in which a text file lists the boxes of each image.

    Raises:
        InputError: The data set has this layout.
    """
    texts = {(*parts[:-1], PurePosixPath(parts[-1]).stem) for parts in contents.others if parts[-1].endswith(".txt")}
    for parts in contents.tree:
        for at, part in enumerate(parts[:-1]):
            label = (*parts[:at], "labels", *parts[at + 1 : -1], PurePosixPath(parts[-1]).stem)
            if part == "images" and label in texts:
                raise InputError(
                    f"{contents.where} has YOLO's layout of boxes: {'/'.join(parts)} with {'/'.join(label)}.txt. Here, "
                    "whole images are learned, in one folder per class: cut out the boxes, e.g. with "
                    "'yolo predict … save_crop=True', or move images of one object into a folder named after it"
                )


def _label(tree: Tree, label_of: Mapping[str, int]) -> Labelled:
    """Return the images, sorted by path, with the labels of their folders."""
    paths = sorted(tree)
    images = Images([tree[parts][0] for parts in paths], [tree[parts][1] for parts in paths])
    return Labelled(images, np.array([label_of[parts[0]] for parts in paths], dtype=np.int64))


def _too_large(path: Path) -> InputError:
    return InputError(f"{path} holds more than {MAX_BYTES:,} bytes; unpack it and name the folder instead")


def _parts(name: str, path: Path) -> Parts:
    """Return the parts of the path of a member."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise InputError(f"{path} is refused: its member '{name}' has a path that leads outside")
    return pure.parts


def _kind_in(parts: Parts) -> Kind:
    """Return the kind of a member; all that is below a hidden folder or one of the system is junk."""
    return "junk" if any(kind_of(part) == "junk" for part in parts) else kind_of(parts[-1])


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


def _read_tar(data: bytes, path: Path) -> _Contents:
    """Return what is in an uncompressed tar, files as views."""
    contents = _Contents(str(path))
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
                contents.add_folder(parts)
                continue
            kind, name = _kind_in(parts), f"{path.name}: {'/'.join(parts)}"
            plain = member.isfile() and not member.issparse()
            if kind == "image" and not plain:
                raise InputError(f"{path}: '{member.name}' is a link or no plain file; unpack it first")
            view = memoryview(data)[member.offset_data : member.offset_data + member.size]
            if kind == "image":
                contents.add_image(parts, view, name)
            elif kind == "other" and plain and _official(parts):
                contents.official[parts] = view
            else:
                contents.add_other(parts, kind, name)
        # tarfile ends at a damaged header without an error; a real end is a block of zeros
        if data[archive.offset : archive.offset + tarfile.BLOCKSIZE] != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no valid header at byte {archive.offset:,}")
    return contents


def _official(parts: Parts) -> bool:
    """Return True if a file may belong to an official format."""
    name = parts[-1]
    return name in cifar.FILES or name in mnist.SPELLINGS or parts[-2:] == tiny_imagenet.ANNOTATIONS


def _read_zip(path: Path) -> _Contents:
    """Return what is in a zip; only images and what may be files of official formats are unpacked."""
    contents = _Contents(str(path))
    total = 0
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            parts = _parts(member.filename.replace("\\", "/"), path)
            if not parts or member.is_dir():
                contents.add_folder(parts)
                continue
            kind, name = _kind_in(parts), f"{path.name}: {'/'.join(parts)}"
            official = kind == "other" and _official(parts)
            if kind != "image" and not official:
                contents.add_other(parts, kind, name)
                continue
            total += member.file_size
            if total > MAX_BYTES:
                raise _too_large(path)
            if official:
                contents.official[parts] = archive.read(member)
            else:
                contents.add_image(parts, archive.read(member), name)
    return contents
