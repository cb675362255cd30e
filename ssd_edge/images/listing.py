"""Find image files, and tell by their names what other files are: nothing is left out without being counted."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from ssd_edge import files
from ssd_edge.errors import BadFilesError, InputError

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif"}
)
VIDEOS = frozenset(
    {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".mts", ".m2ts"}
)
# Pictures that are not read: of raw converters, and of formats with a decoder more.
PICTURES = frozenset(
    {".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw"}
    | {".avif", ".jxl", ".jp2", ".j2k", ".psd", ".svg", ".exr", ".tga", ".ppm", ".pgm", ".pnm", ".ico", ".xcf"}
)
# What operating systems and network storage put beside files, besides names that start with a dot; in lower case.
JUNK = frozenset(
    {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin"}
    | {"system volume information", "lost+found"}
)
MAX_LINKED = 10_000  # folders behind links: thirty folders with two links each to the next make a billion paths

Kind = Literal["image", "video", "picture", "junk", "other"]


class Found(NamedTuple):
    """An entry of a folder; what is in a junk folder is not looked at."""

    path: Path
    kind: Kind | Literal["folder"]


def kind_of(name: str) -> Kind:
    """Return what a file is by its name; ``picture`` is one that is not read, ``junk`` is hidden or of the system."""
    path = Path(name)
    suffix = path.suffix.lower()
    if path.name.startswith(".") or path.name.lower() in JUNK:
        return "junk"
    kinds: tuple[tuple[Kind, frozenset[str]], ...] = (("image", SUFFIXES), ("video", VIDEOS), ("picture", PICTURES))
    return next((kind for kind, suffixes in kinds if suffix in suffixes), "other")


def is_image_name(name: str) -> bool:
    """Return True if a file name has the extension of an image and is not hidden."""
    return kind_of(name) == "image"


def refusal(name: str, kind: str) -> str | None:
    """Return why a file that a user may take for an image cannot be used, or None for any other kind."""
    if kind == "video":
        return f"{name} is a video; take images from it, e.g. two per second: ffmpeg -i VIDEO -vf fps=2 %04d.jpg"
    if kind == "picture":
        return (
            f"{name} is a picture of a kind that is not read ({Path(name).suffix.lower()}); convert it to JPEG or PNG"
        )
    return None


def walk(folder: Path) -> Iterator[Found]:
    """Yield everything in a folder and its subfolders, sorted by path. Links are followed.

    Raises:
        InputError: A folder cannot be read, a link points to one of its parents, or links lead to more than
            `MAX_LINKED` folders.
    """
    linked = 0
    left: list[tuple[Found, tuple[tuple[int, int], ...]]] = [(Found(Path(folder), "folder"), ())]  # a stack
    while left:
        (path, kind), above = left.pop()
        if kind != "folder":
            yield Found(path, kind)
            continue
        name = str(path)
        try:
            found = os.stat(path)
            with os.scandir(path) as listing:
                entries = sorted(listing, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise InputError(f"the folder {name} cannot be read ({error.strerror})") from error
        own = (found.st_dev, found.st_ino)
        if own in above:
            raise InputError(f"{name} is a link to a folder that contains it; remove the link")
        linked += bool(above) and os.path.islink(path)
        if linked > MAX_LINKED:
            raise InputError(f"links lead to more than {MAX_LINKED:,} folders, the last is {name}; remove some of them")
        if above:
            yield Found(path, "folder")
        for entry in entries:
            inner, by_name = path / entry.name, kind_of(entry.name)
            if by_name != "junk" and _is_folder(inner):
                left.append((Found(inner, "folder"), (*above, own)))
            else:
                left.append((Found(inner, by_name), ()))


def walk_images(folder: Path) -> Iterator[Path]:
    """Yield the images in a folder and its subfolders, sorted by path, without hidden entries; raises as `walk`."""
    return (path for path, kind in walk(folder) if kind == "image")


def find(sources: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return the images in files and folders, and a sentence for each source or file in a folder that is none.

    Args:
        sources: Files, accepted unless they are videos or the like, and folders (see `walk_images`).

    Raises:
        InputError: See `walk`.
    """
    found: list[Path] = []
    problems: list[str] = []
    for source in map(Path, sources):
        name = str(source)
        if not files.exists(source):
            problems.append(f"{name} does not exist; check the path")
        elif not files.is_folder(source):
            if sentence := refusal(name, kind_of(name)):
                problems.append(sentence)
            else:
                found.append(source)
        else:
            inside = list(walk(source))
            images = [path for path, kind in inside if kind == "image"]
            refused = [refusal(str(path), kind) for path, kind in inside if kind in ("video", "picture")]
            if not images:
                problems.append(f"the folder {name} contains no images ({', '.join(sorted(SUFFIXES))})")
            problems += filter(None, refused)
            found += images
    return found, problems


def image_files(sources: Sequence[Path]) -> list[Path]:
    """Return the images in files and folders, all of them; see `find`.

    Raises:
        InputError: A source does not exist or is a folder without images, or a file in a folder is a video or a picture
            of a kind that is not read; the message names all of them.
    """
    found, problems = find(sources)
    if len(problems) == 1:
        raise InputError(problems[0])
    if problems:
        raise BadFilesError(problems, len(found) + len(problems), "leave them out")
    return found


def _is_folder(path: Path) -> bool:
    """Return True for a folder or a link to one; a folder that cannot be entered is an error, not a file."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):  # a link to nothing, or a cycle of links
            return False
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
