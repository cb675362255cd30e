"""Tests of `Pixels`: crops, squashed and padded images against what torchvision and timm make of them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from ssd_edge.data import Images
from ssd_edge.errors import InputError
from ssd_edge.images import Pixels, decode, from_array, to_array

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
UPRIGHT = {  # EXIF orientation → transposition of an upright image that is stored with it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **({"compress_level": 0} if kind == "PNG" else {}), **options)
    return stream.getvalue()


def photo(width: int, height: int, grain: int = 6) -> Image.Image:
    """Return soft blobs with some noise. Without black or white, filters cannot overshoot.

    Pillow's two passes clip what overshoots, and which of them comes first depends on its version.
    """
    rng = np.random.default_rng(width * 7919 + height)
    blobs = rng.integers(50, 200, (height // grain + 2, width // grain + 2, 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(np.clip(soft + rng.integers(-8, 9, soft.shape), 0, 255).astype(np.uint8))


def library(image: Image.Image, pixels: Pixels) -> np.ndarray:
    """Do what torchvision's ``Resize`` and ``CenterCrop`` do with a PIL image; timm uses them.

    torchvision is not a dependency. It gives the same bytes as this function (checked with 0.29.1 and timm 1.0.31).
    """
    short, long = sorted(image.size)
    other = int(pixels.resize * long / short)
    size = (pixels.resize, other) if image.size[0] <= image.size[1] else (other, pixels.resize)
    left, top = (round((side - pixels.size) / 2.0) for side in size)
    box = (left, top, left + pixels.size, top + pixels.size)
    return np.asarray(image.resize(size, FILTERS[pixels.interpolation]).crop(box)).astype(int)


def test_crop_takes_the_centre_to_the_pixel():
    """Where the shorter side need not be resized, a crop is a slice; halves are rounded to even."""
    for width, height, left, top in ((37, 32, 6, 4), (39, 32, 8, 4), (32, 41, 4, 8), (32, 32, 4, 4)):
        image = photo(width, height)
        found = decode(encoded(image), "a", Pixels(24, "crop", 32))
        assert (found == np.asarray(image)[top : top + 24, left : left + 24]).all(), (width, height)


@pytest.mark.parametrize("interpolation", FILTERS)
def test_crop_agrees_with_the_libraries(interpolation):
    for width, height, size, share in (
        *((301, 199, 64, 0.875), (64, 64, 64, 0.9), (17, 60, 32, 0.95), (200, 333, 97, 1.0)),
        *((123, 124, 32, 0.875), (5, 9, 32, 0.8)),
    ):
        pixels = Pixels.cropped(size, share, interpolation)
        image = photo(width, height)
        found = to_array(image, "a", pixels).astype(int)
        assert np.abs(found - library(image, pixels)).max() <= 1, (width, height, size, share)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_large_photos_are_reduced_without_a_shift(kind):
    """Sides that are no multiple of eight: a JPEG's last reduced column is partly empty and must not stretch it."""
    pixels = Pixels.cropped(96, 0.875)
    for width, height in ((1001, 779), (778, 1403)):
        image = Image.open(io.BytesIO(encoded(photo(width, height, 30), kind)))
        for orientation in (1, 6, 3):
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = orientation
            data = encoded(image, kind, exif=exif)
            upright = Image.open(io.BytesIO(data)).convert("RGB")
            if orientation == 6:
                upright = upright.transpose(Image.Transpose.ROTATE_270)
            elif orientation == 3:
                upright = upright.transpose(Image.Transpose.ROTATE_180)
            difference = np.abs(decode(data, "a", pixels) - library(upright, pixels))
            assert difference.mean() < 0.6, (width, height, orientation)


@pytest.mark.parametrize("size", [(161, 47), (47, 161)])  # both sides are cut, by an odd number of pixels
def test_orientation_is_applied_before_the_crop(size):
    upright = photo(*size)
    for pixels in (Pixels.cropped(32, 0.875), Pixels(32, "pad"), Pixels(32)):
        for mode in ("RGB", "L", "RGBA"):
            expected = to_array(upright.convert(mode), "a", pixels)
            for orientation, turn in UPRIGHT.items():
                exif = Image.Exif()
                exif[ExifTags.Base.Orientation] = orientation
                data = encoded(upright.convert(mode).transpose(turn), exif=exif)
                assert (decode(data, "a", pixels) == expected).all(), (pixels, mode, orientation)


@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_crop_of_a_panorama_converts_only_its_centre(mode, monkeypatch):
    touched = 0

    def counting(method):
        def count(self, *args, **options):
            nonlocal touched
            made = method(self, *args, **options)
            touched += made.width * made.height
            return made

        return count

    image = photo(9000, 120, 40).convert(mode)
    for name in ("convert", "crop", "reduce", "resize", "transpose", "copy"):
        monkeypatch.setattr(Image.Image, name, counting(getattr(Image.Image, name)))
    pixels = Pixels.cropped(32, 0.875)
    found = to_array(image, "a", pixels)
    assert touched < 6 * 120 * 140  # of 1,080,000 pixels
    monkeypatch.undo()
    assert np.abs(found - library(image.convert("RGB"), pixels)).max() <= 1


def test_bands_of_a_large_image_give_the_same_pixels(monkeypatch):
    """An image that is not RGB is converted in bands of at most `images._BAND` pixels."""
    image = photo(1500, 1700, 50).convert("RGBA")
    pixels = Pixels.cropped(48, 0.8)
    assert (to_array(image, "a", pixels) == to_array(image.convert("RGB"), "a", pixels)).all()


def test_pad_centres_the_whole_image_on_grey():
    image = photo(60, 31)
    found = decode(encoded(image), "a", Pixels(32, "pad"))
    expected = np.asarray(image.resize((32, 17), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(found[7:24] - expected).max() <= 1
    assert (found[:7] == (124, 116, 104)).all()
    assert (found[24:] == (124, 116, 104)).all()
    tall = decode(encoded(Image.new("L", (1, 5000), 9)), "a", Pixels(32, "pad", interpolation="bilinear"))
    assert (tall[:, 15] == 9).all()
    assert (tall[:, :15] == (124, 116, 104)).all()


def test_squash_shows_the_whole_image():
    image = photo(70, 40)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))
    assert (decode(encoded(image), "a", Pixels(32)) == expected).all()


def test_arrays_and_files_give_the_same_pixels():
    image = photo(81, 50)
    for pixels in (Pixels.cropped(32, 0.875, "bilinear"), Pixels(32, "pad"), Pixels(32)):
        expected = decode(encoded(image), "a", pixels)
        array = np.asarray(image)
        assert (from_array(array, pixels) == expected).all()
        assert (Images([encoded(image)], ["a"]).load([0], pixels)[0] == expected).all()
        assert (Images(array[None], ["a"]).load([0], pixels)[0] == expected).all()


def test_finished_arrays_are_not_cropped_again():
    pixels = Pixels.cropped(32, 0.875)
    colour = np.asarray(photo(32, 32))
    assert from_array(colour, pixels) is colour
    grey = colour[..., 0]
    assert (from_array(grey, pixels) == grey[..., None]).all()
    assert (Images(grey[None], ["a"]).load([0], pixels)[0] == grey[..., None]).all()
    assert (decode(encoded(Image.fromarray(colour)), "a", pixels) != colour).any()  # a file is a photo


def test_dictionaries():
    for pixels in (Pixels(7), Pixels(224, "crop", 256, "lanczos"), Pixels(5, "pad", interpolation="bilinear")):
        values = pixels.to_dict()
        assert Pixels.from_dict(values) == pixels
        assert Pixels.from_dict({"dim": 3, **{key: str(value) for key, value in values.items()}}) == pixels
    assert Pixels.from_dict({"size": 32}) == Pixels(32, "squash", 0, "bicubic")  # as in bundles of earlier builds
    assert Pixels(9, "crop").resize == 9
    assert Pixels.cropped(224, 0.95) == Pixels(224, "crop", 235)


def test_descriptions():
    assert Pixels.cropped(224, 0.875).describe() == "224 × 224 pixels: shorter side to 256, centre crop, bicubic"
    assert "without keeping its proportions" in Pixels(32).describe()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "size is missing"),
        ({"size": 0}, "size must be 1 to 4096 pixels, but is 0"),
        ({"size": 10**9}, "size must be 1 to 4096"),
        ({"size": True}, "size must be 1 to 4096 pixels, but is True"),
        ({"size": "٣٢"}, "size must be 1 to 4096"),
        ({"size": 8.0}, "size must be 1 to 4096"),
        ({"size": 8, "fit": "stretch"}, "fit must be one of crop, squash, pad, but is 'stretch'"),
        ({"size": 8, "fit": ["crop"]}, "fit must be one of"),
        ({"size": 8, "interpolation": "nearest"}, "interpolation must be one of box, bilinear,"),
        ({"size": 8, "fit": "crop", "resize": 7}, "resize must be 8 to 4096 pixels with fit crop, but is 7"),
        ({"size": 8, "fit": "crop", "resize": "99999"}, "resize must be 8 to 4096"),
        ({"size": 8, "fit": "pad", "resize": 9}, "resize must be 0 with fit pad, but is 9"),
    ],
)
def test_wrong_values_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        Pixels.from_dict(values)
