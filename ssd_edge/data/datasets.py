"""Labelled images from folders, archives, CIFAR, MNIST, Tiny-ImageNet and the digits of scikit-learn.

`load` is all that a run needs: ``dataset = load(config.data, seed)``, then
``for pixels in dataset.train.batches(size): …``. Images are decoded on access.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ssd_edge.classes import normalise_name
from ssd_edge.config import DataConfig
from ssd_edge.data import folders
from ssd_edge.data.accounts import Accounts
from ssd_edge.data.arrays import Images, Labelled, Source, read_digits, read_npz
from ssd_edge.errors import BadFilesError, InputError, did_you_mean, printable
from ssd_edge.files import exists, is_folder, json_bytes, list_folder
from ssd_edge.images import PIXELS_VERSION, is_image_name
from ssd_edge.images import find as find_images


@dataclass(frozen=True)
class Dataset:
    """Training and test images of the same classes."""

    name: str  # short name for the report, e.g. "cifar10-jpg.tar.xz"
    classes: tuple[str, ...]  # label → name, sorted by name (numbers by value)
    train: Images
    train_labels: np.ndarray  # int64 (N,)
    test: Images
    test_labels: np.ndarray  # int64 (M,)
    fingerprint: str  # SHA-256 of the selected images, their order and labels; part of the cache key
    split: str  # origin of the test images, in words
    own_split: bool  # True if the data has its own test images, False if they were held out
    accounts: Accounts = field(default_factory=Accounts)  # what was found beside these images

    def check(self) -> None:
        """Decode all images, and name every one that cannot be used.

        Raises:
            BadFilesError: There is one.
        """
        _refuse_bad((self.train, self.test))


def load(config: DataConfig, seed: int, digests_of: Callable[[Images], list[bytes]] = Images.digests) -> Dataset:
    """Read the data set of a configuration.

    Args:
        config: `path` is ``digits`` or a path, possibly relative to ``$SSD_EDGE_DATA``. `classes`, `exclude` and
            `max_per_class` select from the data; `test_fraction` is held out if it has no split.
        seed: Seed of the held-out split and of `max_per_class`. The selection within a class does not depend on
            the other classes.
        digests_of: Does what `Images.digests` does, e.g. on several machines.

    Raises:
        InputError: The path does not exist, the data is damaged, a class is unknown or has no training or test images,
            or fewer than two classes remain. Damaged images are detected when they are decoded, with `skip_bad` here.
        BadFilesError: A file cannot be read, or is a video or a picture of another kind, and `skip_bad` is not set.
        EnvironmentUnfitError: scikit-learn is not installed, but ``digits`` needs it.
    """
    name, source = read_source(config.path)
    return arrange(name, source, config, seed, digests_of)


def arrange(
    name: str,
    source: Source,
    config: DataConfig,
    seed: int,
    digests_of: Callable[[Images], list[bytes]] = Images.digests,
) -> Dataset:
    """Select from a source and split it; arguments and errors as for `load`."""
    classes = _choose(source.classes, config, name)
    train = _relabel(source.train, source.classes, classes)
    own_test = source.test and _relabel(source.test, source.classes, classes)
    skipped = list(source.refused)
    if config.skip_bad:
        train, own_test = _without_bad(train, skipped), own_test and _without_bad(own_test, skipped)
    elif skipped:
        _refuse_bad([part.images for part in (train, own_test) if part], skipped)
    if own_test is None:
        train, test = _hold_out(train, classes, config.test_fraction, seed)
        split = f"a seeded {100 * config.test_fraction:g} % of each class held out"
    else:
        test, split = own_test, source.split
        _check_every_class(train, "training", classes, name)
        _check_every_class(test, "test", classes, name)
    if config.max_per_class:
        train = _at_most(train, classes, config.max_per_class, seed)
    try:
        digests = [digests_of(part.images) for part in (train, test)]
    except InputError:
        _refuse_bad((train.images, test.images))
        raise
    fingerprint = _fingerprint(classes, (train, test), digests)
    accounts = _with_copies(source.accounts, (train.images, test.images), digests)
    accounts = dataclasses.replace(accounts, skipped=tuple(skipped))
    return Dataset(
        name,
        classes,
        train.images,
        train.labels,
        test.images,
        test.labels,
        fingerprint,
        split,
        source.test is not None,
        accounts,
    )


def _refuse_bad(parts: Sequence[Images], known: Sequence[str] = ()) -> None:
    """Raise a `BadFilesError` that names every image that cannot be decoded, and what is `known` to be bad."""
    problems = [*known, *(problem for part in parts for problem in part.problems() if problem is not None)]
    if problems:
        total = sum(map(len, parts)) + len(known)
        raise BadFilesError(sorted(problems), total, "--skip-bad (data.skip_bad=true)")


def _without_bad(part: Labelled, skipped: list[str]) -> Labelled:
    """Return the images that can be decoded, and append a sentence to `skipped` for each of the others."""
    problems = part.images.problems()
    skipped += [problem for problem in problems if problem is not None]
    return part.take(np.array([index for index, problem in enumerate(problems) if problem is None], dtype=np.int64))


def _with_copies(accounts: Accounts, parts: Sequence[Images], digests: Sequence[Sequence[bytes]]) -> Accounts:
    """Add groups of identical files, and the pairs of them in training and test images."""
    groups: dict[bytes, list[tuple[int, str]]] = {}
    for number, (part, own) in enumerate(zip(parts, digests, strict=True)):
        for name, digest in zip(part.names, own, strict=False):
            groups.setdefault(digest, []).append((number, name))
    copies = [group for group in groups.values() if len(group) > 1]
    alike = []
    for group in copies:
        first = next((name for number, name in group if number == 0), None)
        alike += [(first, name) for number, name in group if number == 1 and first is not None]
    identical = tuple(tuple(name for _, name in group) for group in copies)
    return dataclasses.replace(accounts, identical=identical, alike=tuple(alike))


def find(path: str) -> Path:
    """Return the data set at a path, which may be relative to ``$SSD_EDGE_DATA``.

    Raises:
        InputError: There is nothing.
    """
    if not path:
        raise InputError("data.path is empty; name a folder, an archive, an .npz, or 'digits'")
    tried = [Path(os.path.expanduser(path)).absolute()]
    root = os.environ.get("SSD_EDGE_DATA")
    if root:
        tried.append(Path(os.path.expanduser(root), path).absolute())
    for candidate in tried:
        if exists(candidate):
            return candidate
    places = " nor at ".join(str(candidate) for candidate in dict.fromkeys(tried))
    advice = "check data.path" + ("" if root else ", or set SSD_EDGE_DATA to the folder of your data sets")
    near = did_you_mean(tried[0].name, ["digits", *(entry.name for entry in list_folder(tried[0].parent))])
    raise InputError(f"there is no data set at {places}; {advice}.{near}")


def read_source(path: str) -> tuple[str, Source]:
    """Return the short name and the content of the data set at `path`; raises as `load`."""
    if path == "digits":
        return path, read_digits()
    found = find(path)
    if is_folder(found):
        return printable(found.resolve().name), folders.read_folder(found)  # a link may lead to any bytes
    if found.suffix.lower() == ".npz":
        return found.name, read_npz(found)
    return found.name, folders.read_archive(found)


def photographs(path: str, skip_bad: bool) -> tuple[str, Images, tuple[str, ...]]:
    """Return the images at a path without labels: all in a folder of images, the training images of a data set.

    Args:
        path: Folder of images, possibly with subfolders, or what `load` accepts.
        skip_bad: Leave out what cannot be used.

    Returns:
        Short name, images, and a sentence for each file that was left out.

    Raises:
        InputError: There is nothing, or no image.
        BadFilesError: A file cannot be used, and `skip_bad` is not set.
    """
    found = None if path == "digits" else find(path)
    if found is not None and is_folder(found) and any(is_image_name(entry.name) for entry in list_folder(found)):
        name, (paths, refused) = printable(found.resolve().name), find_images([found])
        part = Labelled(Images(paths, [str(path) for path in paths]), np.zeros(len(paths), dtype=np.int64))
    else:
        name, source = read_source(path)
        part, refused = source.train, list(source.refused)
    if not skip_bad:
        if refused or any(part.images.problems()):
            _refuse_bad([part.images], refused)
        return name, part.images, ()
    skipped = list(refused)
    return name, _without_bad(part, skipped).images, tuple(skipped)


def _natural(name: str) -> tuple[list[str | int], str]:
    """Return a sort key that orders numbers in names by value, and '1' and '01' by their text."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)], name


def _some(names: Sequence[str]) -> str:
    """Format at most five names, quoted."""
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _named(word: str, ordered: Sequence[str], name: str) -> Sequence[str]:
    """Return the classes that an entry of a selection denotes: a name, or a slice ``a:b`` of the sorted names."""
    word = normalise_name(word)
    if word in ordered:
        return [word]
    if not re.fullmatch(r"(-?[0-9]{1,9})?:(-?[0-9]{1,9})?", word):
        raise InputError(f"{name} has no class '{word}'.{did_you_mean(word, ordered)} It has {_some(ordered)}")
    ends = [int(end) if end else None for end in word.split(":")]
    found = ordered[slice(*ends)]
    if not found or any(end is not None and abs(end) > len(ordered) for end in ends):
        raise InputError(
            f"the positions '{word}' {'reach beyond' if found else 'hold none of'} the {len(ordered)} classes of "
            f"{name}; they count from 0, as in 0:{len(ordered)} for all"
        )
    return found


def _choose(known: Sequence[str], config: DataConfig, name: str) -> tuple[str, ...]:
    """Return the selected classes, sorted."""
    ordered = sorted(known, key=_natural)
    wanted = {found for word in config.classes for found in _named(word, ordered, name)}
    unwanted = {found for word in config.exclude for found in _named(word, ordered, name)}
    chosen = tuple(sorted((wanted or set(known)) - unwanted, key=_natural))
    if len(chosen) < 2:
        number = f"only one ({_some(chosen)})" if chosen else "none"
        left = " left after data.classes and data.exclude" if len(known) > 1 else ""
        raise InputError(f"at least two classes are needed, but {name} has {number}{left}")
    return chosen


def _relabel(part: Labelled, old: Sequence[str], new: Sequence[str]) -> Labelled:
    """Return the images of the classes `new`, with labels in its order."""
    position = {name: label for label, name in enumerate(new)}
    mapping = np.array([position.get(name, -1) for name in old], dtype=np.int64)
    labels = mapping[part.labels]
    kept = np.flatnonzero(labels >= 0)
    return Labelled(part.images.take(kept), labels[kept])


def _check_every_class(part: Labelled, kind: str, classes: Sequence[str], name: str) -> None:
    counts = np.bincount(part.labels, minlength=len(classes))
    empty = [classes[label] for label in np.flatnonzero(counts == 0).tolist()]
    if empty:
        raise InputError(f"{name} has no {kind} images of {_some(empty)}; add some, or set data.exclude")


def _shuffled(labels: np.ndarray, classes: Sequence[str], seed: int, purpose: int) -> list[np.ndarray]:
    """Return the positions of each class in a seeded order that depends only on the class."""
    return [
        np.random.default_rng([seed, purpose, *name.encode()]).permutation(np.flatnonzero(labels == label))
        for label, name in enumerate(classes)
    ]


def _hold_out(part: Labelled, classes: Sequence[str], fraction: float, seed: int) -> tuple[Labelled, Labelled]:
    """Split each class into training and test images, with at least one of each."""
    test = []
    for name, positions in zip(classes, _shuffled(part.labels, classes, seed, 0), strict=True):
        if len(positions) < 2:
            number = "only one" if len(positions) else "no usable"
            raise InputError(
                f"the class '{name}' has {number} image, but one to train and one to test with are needed; "
                "add images, or set data.exclude"
            )
        test.append(positions[: min(max(1, round(fraction * len(positions))), len(positions) - 1)])
    held = np.sort(np.concatenate(test))
    return part.take(np.setdiff1d(np.arange(len(part.labels)), held)), part.take(held)


def _at_most(part: Labelled, classes: Sequence[str], count: int, seed: int) -> Labelled:
    """Return a seeded subset with at most `count` images per class; larger subsets contain smaller ones."""
    chosen = [positions[:count] for positions in _shuffled(part.labels, classes, seed, 1)]
    return part.take(np.sort(np.concatenate(chosen)))


def _fingerprint(classes: Sequence[str], parts: Sequence[Labelled], digests: Sequence[Sequence[bytes]]) -> str:
    digest = hashlib.sha256(json_bytes({"classes": list(classes), "pixels": PIXELS_VERSION}))
    for part, own in zip(parts, digests, strict=True):
        digest.update(part.images.digest(own))
        digest.update(hashlib.sha256(part.labels.astype("<i8").tobytes()).digest())
    return digest.hexdigest()
