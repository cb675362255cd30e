"""Whole images: upright, with their proportions, and not larger than asked for."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ssd_edge.errors import InputError
from ssd_edge.images.whole import whole


def file(width: int, height: int, kind: str, orientation: int = 1) -> bytes:
    """Return an image that is red at its upper edge and blue below, once it is upright."""
    upright = np.zeros((height, width, 3), np.uint8)
    upright[: height // 4], upright[height // 4 :] = (255, 0, 0), (0, 0, 255)
    turns = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    turn = turns[orientation]
    image = Image.fromarray(upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    (image if turn is None else image.transpose(turn)).save(out, kind, exif=exif)
    return out.getvalue()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_it_is_upright_and_keeps_its_proportions(kind: str, orientation: int) -> None:
    found = whole(file(120, 80, kind, orientation), "a", 60)
    assert found.shape == (40, 60, 3)
    assert found[0, 30, 0] > 200 > 60 > found[0, 30, 2]
    assert found[-1, 30, 2] > 200 > 60 > found[-1, 30, 0]


def test_a_small_one_stays_as_it_is() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (33, 20, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "PNG")
    assert np.array_equal(whole(out.getvalue(), "a", 1000), noise)


def test_damage_is_named() -> None:
    with pytest.raises(InputError, match=r"a is corrupt|a is not a JPEG"):
        whole(file(120, 80, "JPEG")[:300], "a", 60)
