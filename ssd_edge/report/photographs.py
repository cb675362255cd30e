"""Small photographs for a report: which test images are shown, and their bytes as part of the page."""

from __future__ import annotations

import base64
import dataclasses
import io

import numpy as np
from PIL import Image

from ssd_edge.errors import InputError
from ssd_edge.images import Pixels
from ssd_edge.report.findings import confused, mistakes
from ssd_edge.report.results import Results

SIDE = 112  # pixels
QUALITY = 50  # of JPEG: about 2.2 kB each
MOST = 900  # photographs on a page, about 2.7 MB
LARGEST = 3_000_000  # bytes of all photographs on a page
EXAMPLES = 4  # per class; fewer with so many classes that they would take more than half of `MOST`
_CHUNK = 256  # images decoded at a time


@dataclasses.dataclass(frozen=True)
class Album:
    """Photographs of a page.

    Attributes:
        pictures: ``data:`` address by index of the test image.
        examples: Test images of each class that are named correctly, by row.
        missing: Why there are none; empty if there are.
    """

    pictures: dict[int, str]
    examples: tuple[tuple[int, ...], ...]
    missing: str = ""


def album(results: Results) -> Album:
    """Return the photographs of a report: examples of every class, and the mistakes, the surest first."""
    nothing = ((),) * len(results.classes)
    if results.photographs is None:
        return Album({}, nothing, results.missing)
    answers = results.answers
    each = min(EXAMPLES, MOST // 2 // len(results.classes))
    examples = tuple(
        _spread(np.flatnonzero(answers.right & (answers.truth == row)), each) for row in range(len(nothing))
    )
    paired = [index for pair in confused(answers) for index in pair.wrong[:EXAMPLES]]
    wrong = mistakes(answers)
    wanted = [*(index for some in examples for index in some), *wrong[:EXAMPLES], *paired[: MOST // 4], *wrong]
    try:
        return Album(_encoded(results, list(dict.fromkeys(wanted))[:MOST]), examples)
    except InputError as error:
        return Album({}, nothing, f"a test image cannot be read any more ({error})")


def _spread(indices: np.ndarray, count: int) -> tuple[int, ...]:
    """Return `count` of some images, evenly spread: neighbours are often photographs of the same thing."""
    if len(indices) <= count:
        return tuple(indices.tolist())
    return tuple(indices[np.linspace(0, len(indices) - 1, count).astype(int)].tolist()) if count else ()


def _encoded(results: Results, indices: list[int]) -> dict[int, str]:
    assert results.photographs is not None
    found: dict[int, str] = {}
    left, form = LARGEST, Pixels(SIDE, "crop", interpolation="bilinear")
    for start in range(0, len(indices), _CHUNK):
        some = indices[start : start + _CHUNK]
        for index, pixels in zip(some, results.photographs.load(some, form), strict=True):
            found[index] = _address(pixels)
            left -= len(found[index])
            if left < 0:
                return found
    return found


def _address(pixels: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
