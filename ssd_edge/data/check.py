"""Look at a data set before any work: what would be refused, and what would mislead.

Every image is decoded once. Two images count as nearly identical if their 16 × 16 pixels, less the mean colour,
correlate by more than 98 %. Of 3,292 photographs of groceries, six have such a neighbour, all of one scene; a copy
that is saved again as JPEG of quality 20, halved, 30 % brighter or noisy has one in 99 of 100 cases, a crop by 5 % no.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssd_edge.config import DataConfig
from ssd_edge.data.accounts import Accounts
from ssd_edge.data.arrays import Labelled, Source
from ssd_edge.data.datasets import Dataset, arrange, read_source
from ssd_edge.errors import InputError
from ssd_edge.images import Pixels

SIMILAR = 0.98  # correlation
MOST_COMPARED = 20_000  # images; the comparison of all pairs takes ten seconds then
FEW = 10  # training images of a class
LEAST = 48  # pixels of the shorter side; smaller images look alike without being so, such as digits
_SIDE, _GRID = 32, 16
_BLOCK = 1024
_FLAT = 1.0  # deviation in levels of 255, below which an image shows nothing


@dataclass(frozen=True)
class ClassCount:
    """Number of usable images of a class."""

    name: str
    train: int
    test: int


@dataclass(frozen=True)
class DataCheck:
    """Content of a data set.

    Attributes:
        name: Name of the data set.
        classes: The classes with their numbers of images.
        split: Origin of the test images, in words; empty if `obstacle` leaves none.
        formats: Number of images by format.
        sizes: Width and height of the image with the fewest pixels, of the median and of the one with the most.
        problems: A sentence for each file that cannot be used.
        obstacle: Why training would refuse the rest; None if it would not.
        accounts: What was found beside the images.
        similar: Pairs of nearly identical images.
        leaked: Pairs of those in which the first is a training and the second a test image.
        compared: True if all pairs were compared for similarity.
    """

    name: str
    classes: tuple[ClassCount, ...]
    split: str
    formats: dict[str, int]
    sizes: tuple[tuple[int, int], ...]
    problems: tuple[str, ...]
    obstacle: str | None
    accounts: Accounts
    similar: tuple[tuple[str, str], ...]
    leaked: tuple[tuple[str, str], ...]
    compared: bool

    @property
    def bad(self) -> bool:
        """True if training would refuse the data set."""
        return bool(self.problems) or self.obstacle is not None

    def warnings(self) -> list[str]:
        """Return a sentence for each thing that would mislead."""
        found = self.accounts.warnings()
        exactly = set(self.accounts.alike)
        near = [pair for pair in self.leaked if pair not in exactly]
        if near:
            found.append(
                f"{len(near):,} test image{'s' * (len(near) > 1)} nearly identical to training images, so that "
                f"accuracy is overstated: {_pairs(near)}"
            )
        same = {frozenset((group[0], other)) for group in self.accounts.identical for other in group[1:]}
        rest = [pair for pair in self.similar if pair not in self.leaked and frozenset(pair) not in same]
        if rest:
            found.append(f"{len(rest):,} pair{'s' * (len(rest) > 1)} of nearly identical images: {_pairs(rest)}")
        if few := [f"{one.name} ({one.train})" for one in self.classes if one.train < FEW]:
            found.append(
                f"{len(few):,} class{'es' * (len(few) > 1)} with fewer than {FEW} training images: "
                f"{', '.join(few[:10])}{' …' if len(few) > 10 else ''}"
            )
        if not self.compared:
            found.append(
                f"similar images were not looked for, as there are more than {MOST_COMPARED:,}, or some are smaller "
                f"than {LEAST} pixels"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the values and the sentences about them as a JSON object."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["accounts"] = self.accounts.to_dict()
        values["classes"] = [dataclasses.asdict(one) for one in self.classes]
        return {**values, "warnings": self.warnings(), "bad": self.bad}


@dataclass(frozen=True)
class Checked:
    """A `DataCheck` with the images, for a page of pictures.

    Attributes:
        result: What was found.
        by_class: Names of the usable images by class.
        thumbnail: Returns an image by its name as uint8 RGB of a `Pixels`.
    """

    result: DataCheck
    by_class: dict[str, list[str]]
    thumbnail: Callable[[str, Pixels], np.ndarray]


def check(path: str) -> Checked:
    """Look at every file of a data set.

    Raises:
        InputError: There is no data set, or no class with images.
    """
    name, source = read_source(path)
    parts = [part for part in (source.train, source.test) if part is not None]
    looks = [_Look(part) for part in parts]
    good = [look.good for look in looks]
    usable = dataclasses.replace(source, train=good[0], test=good[1] if source.test else None, refused=())
    problems = [*source.refused, *(problem for look in looks for problem in look.problems)]
    dataset, obstacle = None, None
    try:
        dataset = arrange(name, usable, DataConfig(path=path), 0)
    except InputError as error:
        obstacle = str(error)
    vectors = {key: vector for look in looks for key, vector in look.vectors.items()}
    compared = len(vectors) <= MOST_COMPARED and not any(look.small for look in looks)
    similar, leaked = _similar(vectors, dataset) if compared else ([], [])
    sizes = sorted((size for look in looks for size in look.sizes), key=lambda size: (size[0] * size[1], size))
    place = {key: (part.images, index) for part in good for index, key in enumerate(part.images.names)}

    def thumbnail(key: str, form: Pixels) -> np.ndarray:
        images, index = place[key]
        loaded: np.ndarray = images.load([index], form)[0]
        return loaded

    by_class: dict[str, list[str]] = {one: [] for one in source.classes}
    for part in good:
        for key, label in zip(part.images.names, part.labels.tolist(), strict=True):
            by_class[source.classes[label]].append(key)
    result = DataCheck(
        name=name,
        classes=_counts(usable, dataset),
        split=dataset.split if dataset else "",
        formats=dict(sum((look.formats for look in looks), Counter()).most_common()),
        sizes=(sizes[0], sizes[len(sizes) // 2], sizes[-1]) if sizes else (),
        problems=tuple(sorted(problems)),
        obstacle=obstacle,
        accounts=dataset.accounts if dataset else source.accounts,
        similar=tuple(similar),
        leaked=tuple(leaked),
        compared=compared,
    )
    return Checked(result, by_class, thumbnail)


class _Look:
    """One look at every image of a part.

    Attributes:
        good: The images that can be decoded.
        problems: A sentence for each of the others.
        formats: Number of images by format.
        sizes: Width and height of each.
        small: True if one is smaller than `LEAST`.
        vectors: What `_similar` compares, by name; without images that show nothing.
    """

    def __init__(self, part: Labelled) -> None:
        images = part.images
        self._vectors: list[np.ndarray | None] = [None] * len(images)
        found = images.each(self._see, Pixels(_SIDE))
        kept = [index for index, problem in enumerate(found) if problem is None]
        self.good = part.take(np.array(kept, dtype=np.int64))
        self.problems = [problem for problem in found if problem is not None]
        headers = [images.header(index) for index in kept]
        self.formats = Counter(kind for kind, *_ in headers)
        self.sizes = [(width, height) for _, width, height in headers]
        self.small = any(min(size) < LEAST for size in self.sizes)
        vectors = zip(images.names, self._vectors, strict=True)
        self.vectors = {key: vector for key, vector in vectors if vector is not None}

    def _see(self, index: int, pixels: np.ndarray) -> None:
        step = _SIDE // _GRID
        small = pixels.astype(np.float32).reshape(_GRID, step, _GRID, step, 3).mean((1, 3))
        centred = (small - small.mean((0, 1))).ravel()
        norm = float(np.linalg.norm(centred))
        if norm > _FLAT * np.sqrt(len(centred)):
            self._vectors[index] = centred / norm


def _similar(
    vectors: dict[str, np.ndarray], dataset: Dataset | None
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return pairs of nearly identical images, at most one for each image, and those of a training and a test image."""
    similar = _nearest(list(vectors), vectors, list(vectors), earlier=True)
    if dataset is None:
        return similar, []
    train, test = ([key for key in part.names if key in vectors] for part in (dataset.train, dataset.test))
    return similar, _nearest(test, vectors, train, earlier=False)


def _nearest(
    keys: Sequence[str], vectors: dict[str, np.ndarray], others: Sequence[str], earlier: bool
) -> list[tuple[str, str]]:
    """Return (other, key) for each key with a similar other, the nearest; `earlier`: among those before it."""
    if not keys or not others:
        return []
    pool, found = np.stack([vectors[key] for key in others]), []
    for start in range(0, len(keys), _BLOCK):
        block = np.stack([vectors[key] for key in keys[start : start + _BLOCK]])
        alike = block @ (pool[: start + len(block)] if earlier else pool).T
        if earlier:
            alike[np.arange(alike.shape[1]) >= start + np.arange(len(block))[:, None]] = -1
        nearest = alike.argmax(1)
        for row in np.flatnonzero(alike[np.arange(len(block)), nearest] > SIMILAR).tolist():
            found.append((others[int(nearest[row])], keys[start + row]))
    return found


def _counts(source: Source, dataset: Dataset | None) -> tuple[ClassCount, ...]:
    """Return the numbers of images by class, after the split if there is one."""
    classes = dataset.classes if dataset else source.classes
    train = dataset.train_labels if dataset else source.train.labels
    test = dataset.test_labels if dataset else source.test.labels if source.test else np.zeros(0, np.int64)
    columns = zip(
        classes, *(np.bincount(labels, minlength=len(classes)).tolist() for labels in (train, test)), strict=True
    )
    return tuple(ClassCount(*column) for column in columns)


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    shown = ", ".join(f"{first} ~ {second}" for first, second in pairs[:3])
    return shown + (f" and {len(pairs) - 3:,} more" if len(pairs) > 3 else "")
