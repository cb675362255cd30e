"""Image decoding: orientation, modes, size limits and damaged files."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import socket
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import unprivileged
from helpers.png_bytes import with_right_checksums
from PIL import Image, TiffImagePlugin

from ssd_edge import images
from ssd_edge.errors import InputError
from ssd_edge.images import MAX_PIXELS, Pixels, decode, from_array, image_files, is_image_name, listing
from ssd_edge.images.second import second_view

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 90)


def quadrants(height: int, width: int) -> np.ndarray:
    """Return red, green / blue, grey quadrants, which differ under every flip and rotation."""
    picture = np.empty((height, width, 3), dtype=np.uint8)
    top, left = height // 2, width // 2
    picture[:top, :left], picture[:top, left:] = RED, GREEN
    picture[top:, :left], picture[top:, left:] = BLUE, GREY
    return picture


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """Return a PNG with a valid header of the given size and almost no pixel data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "MPO", "GIF", "TIFF"])
def test_formats_and_shape(kind: str) -> None:
    pixels = decode(encoded(quadrants(48, 32), kind), "a", Pixels(16))
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable  # otherwise torch.from_numpy warns
    assert np.abs(pixels[4, 4].astype(int) - RED).max() < 12
    assert np.abs(pixels[12, 12].astype(int) - GREY).max() < 12


@pytest.mark.parametrize("side", [40, 640])  # at 640 the JPEG is decoded at reduced scale
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, side: int) -> None:
    upright = quadrants(side, side)
    stored = {  # the stored image that this orientation turns upright
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(np.ascontiguousarray(stored), "JPEG", exif=exif, quality=95)
    pixels = decode(data, "a", Pixels(20)).astype(int)
    for (y, x), colour in {(4, 4): RED, (4, 15): GREEN, (15, 4): BLUE, (15, 15): GREY}.items():
        assert np.abs(pixels[y, x] - colour).max() < 12, (y, x)


def test_orientation_is_applied_despite_an_invalid_exif_entry() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    data = encoded(np.ascontiguousarray(np.rot90(quadrants(32, 32), 1)), "JPEG", exif=exif)
    assert data.count(b"\x01\x0e\x00\x02") == 1
    wrong = data.replace(b"\x01\x0e\x00\x02", b"\x01\x16\x00\x02")  # text in place of a number
    assert np.abs(decode(wrong, "a", Pixels(32))[8, 8].astype(int) - RED).max() < 12


def test_sixteen_bit_grey_keeps_its_scale() -> None:
    deep = np.array([[0, 128, 129, 257], [32896, 65535, 65406, 255]], dtype=np.uint16).repeat(2, axis=0)
    pixels = decode(encoded(deep), "a", Pixels(4))
    assert pixels[::2, :, 0].tolist() == [[0, 0, 1, 1], [128, 255, 254, 1]]
    assert (pixels == pixels[..., :1]).all()


def tiff(values: np.ndarray, **tags: int) -> bytes:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        info[int(tag.removeprefix("t"))] = value
    return encoded(values, "TIFF", tiffinfo=info)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(("top", "white"), [(1023, 1023), (1024, 4095), (3000, 4095), (16383, 16383), (16384, 65535)])
def test_the_range_of_sixteen_bit_grey_is_seen_in_its_values(kind: str, top: int, white: int) -> None:
    """A factory camera's 12 bits in 16 were embedded as nearly black."""
    deep = np.linspace(0, top, 64).astype(np.uint16).reshape(8, 8)
    expected = np.rint(deep * (255 / white))
    for turned in (deep, deep.astype(">u2")):
        pixels = decode(encoded(turned, kind), "a", Pixels(8))[..., 0]
        assert np.abs(pixels - expected).max() <= 1
    assert not decode(encoded(deep * 0, kind), "a", Pixels(8)).any()  # black in any range


@pytest.mark.parametrize("top", [1, 200, 1022, 4096, 16382])
def test_sixteen_bits_of_unclear_range_are_refused(top: int) -> None:
    deep = np.linspace(0, top, 64).astype(np.uint16).reshape(8, 8)
    with pytest.raises(InputError, match=rf"^a has 16-bit pixels with values up to {top} of 65,535: .*save it with 8"):
        decode(encoded(deep), "a", Pixels(8))
    assert decode(tiff(deep, t281=16383), "a", Pixels(8)).max() == round(top * 255 / 16383)  # the file says it


def test_colour_of_sixteen_bits() -> None:
    """Pillow keeps the upper 8 bits of each channel: of 12 bits, nearly nothing."""

    def png(top: int, alpha: bool = False) -> bytes:
        kind, channels = (6, 4) if alpha else (2, 3)
        rows = np.linspace(0, top, 8 * 8 * channels).astype(">u2").reshape(8, -1)
        if alpha:
            rows.reshape(8, 8, 4)[..., 3] = 65535
        body = b"".join(b"\0" + row.tobytes() for row in rows)
        parts = [
            (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, kind, 0, 0, 0)),
            (b"IDAT", zlib.compress(body)),
            (b"IEND", b""),
        ]
        chunks = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in parts)
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)

    assert decode(png(65535), "a", Pixels(8)).max() == 255
    for alpha in (False, True):
        with pytest.raises(InputError, match=r"^a has 16-bit pixels with values up to 4095 of 65,535"):
            decode(png(4095, alpha), "a", Pixels(8))


def test_thirty_two_bits_are_refused() -> None:
    with pytest.raises(InputError, match="values from 0 to 70000, but 16-bit grey has 0 to 65535"):
        decode(encoded(np.array([[0, 70000]], np.int32), "TIFF"), "a", Pixels(8))
    with pytest.raises(InputError, match="floating-point"):
        decode(encoded(np.ones((4, 4), np.float32), "TIFF"), "a", Pixels(8))


def test_first_frame_and_first_page() -> None:
    frames = [Image.fromarray(np.full((9, 9, 3), colour, np.uint8)) for colour in (RED, GREEN)]
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        pixels = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:]), "a", Pixels(4))
        assert np.abs(pixels.astype(int) - RED).max() < 12, kind


def test_a_turned_tiff() -> None:
    upright = quadrants(32, 24)
    data = encoded(np.ascontiguousarray(np.rot90(upright, 1)), "TIFF", tiffinfo={0x0112: 6})
    assert np.abs(decode(data, "a", Pixels(32)).astype(int) - decode(encoded(upright), "a", Pixels(32))).max() == 0


HEIC = base64.b64decode(  # 16 × 16, red
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAXxtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAA"
    "ACJpbG9jAAAAAERAAAEAAQAAAAABoAABAAAAAAAAADQAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRt"
    "AAAAAAABAAAA/GlwcnAAAADcaXBjbwAAAHVodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMA"
    "AAMAHroCQGEAAQApQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbqrprm4CGgwIAAAAyAAAADAIRiAAEABkQBwXPBiQAAABNjb2xybmNs"
    "eAABAA0ABoAAAAAUaXNwZQAAAAAAAABAAAAAQAAAAChjbGFwAAAAEAAAAAEAAAAQAAAAAf///9AAAAAC////0AAAAAIAAAAQcGl4"
    "aQAAAAADCAgIAAAAGGlwbWEAAAAAAAAAAQABBYECAwWEAAAAPG1kYXQAAAAwKAGvEyFmY0D4EPdn/+u8Ff+Vaz/zN7HpzshHQMDS"
    "IICbQEiTXVALFhCAh3alVtz4"
)


def test_heic_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    images._register_heif.cache_clear()
    with pytest.raises(
        InputError, match=r"^p/IMG_1\.HEIC is a HEIC photograph; convert .* pip install 'ssd-edge\[heic\]'$"
    ):
        decode(HEIC, "p/IMG_1.HEIC", Pixels(8))


def test_heic() -> None:
    pytest.importorskip("pillow_heif")
    images._register_heif.cache_clear()
    assert np.abs(decode(HEIC, "a", Pixels(8)).astype(int) - RED).max() < 12
    with pytest.raises(InputError, match=r"^a is corrupt"):
        decode(HEIC[:-40], "a", Pixels(8))


def test_transparency_is_blended_onto_white() -> None:
    clear_red = np.zeros((4, 4, 4), dtype=np.uint8)
    clear_red[..., 0] = 255
    half_black = np.zeros((4, 4, 4), dtype=np.uint8)
    half_black[..., 3] = 128
    assert (decode(encoded(clear_red), "a", Pixels(4)) == 255).all()
    assert (decode(encoded(half_black), "a", Pixels(4)) == 127).all()
    assert (decode(encoded(Image.new("LA", (4, 4), (0, 0))), "a", Pixels(4)) == 255).all()
    palette = Image.new("RGB", (4, 4), "blue").convert("P")
    assert (decode(encoded(palette, transparency=palette.getpixel((0, 0))), "a", Pixels(4)) == 255).all()
    for mode in ("1", "L"):
        assert (decode(encoded(Image.new(mode, (4, 4), 0), transparency=0), "a", Pixels(4)) == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette(mode: str) -> None:
    pixels = decode(encoded(Image.new("L", (6, 6), 255).convert(mode)), "a", Pixels(4))
    assert (pixels == 255).all()


def test_cmyk_jpeg() -> None:
    pixels = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), "a", Pixels(8))
    assert np.abs(pixels.astype(int) - RED).max() < 12


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3000), (3000, 1), (2, 3)])
def test_odd_sizes(height: int, width: int) -> None:
    colour = np.full((height, width, 3), (10, 20, 30), dtype=np.uint8)
    assert (decode(encoded(colour), "a", Pixels(32)) == (10, 20, 30)).all()


@pytest.mark.parametrize(("width", "height"), [(9000, 9000), (12000, 9000), (40000, 40000)])
def test_a_decompression_bomb_is_refused_without_a_warning(width: int, height: int) -> None:
    assert width * height > MAX_PIXELS
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(InputError, match=r"bomb\.png has .* pixels.*make it smaller"):
            decode(png_of_size(width, height), "bomb.png", Pixels(32))
    if width == 9000:  # between our limit and that of Pillow
        assert not caught


def test_decoding_in_threads_keeps_the_warning_filters() -> None:
    before = list(warnings.filters)

    def attempt(number: int) -> bool:
        data = png_of_size(9000, 9000) if number % 2 else encoded(quadrants(64, 64))
        try:
            return decode(data, "a", Pixels(8)).shape == (8, 8, 3)
        except InputError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(attempt, range(200))) == [True, False] * 100
    assert list(warnings.filters) == before


def test_errors_name_the_file() -> None:
    jpeg = encoded(quadrants(64, 64), "JPEG")
    for cut in (len(jpeg) // 2, len(jpeg) - 40):
        with pytest.raises(InputError, match=r"^a/b\.jpg is corrupt and cannot be decoded \(.+\); remove"):
            decode(jpeg[:cut], "a/b.jpg", Pixels(32))
    with pytest.raises(InputError, match=r"^a/b\.jpg is empty \(0 bytes\)"):
        decode(b"", "a/b.jpg", Pixels(32))
    for data in (b"this is text", *(encoded(quadrants(8, 8), kind) for kind in ("ICO", "PPM"))):
        with pytest.raises(InputError, match=r"^a/b\.jpg is not a JPEG, PNG, WebP, BMP, GIF or TIFF image"):
            decode(data, "a/b.jpg", Pixels(32))


@pytest.mark.filterwarnings("ignore:.*(EXIF|Truncated|Tag data|MPO)")
def test_mutated_files_are_decoded_or_refused() -> None:
    """Damaged files raise no other error."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    good = [encoded(noise, kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP")]
    good += [encoded(noise, "BMP"), encoded(noise, "JPEG", progressive=True)]
    good += [encoded(Image.fromarray(noise).convert(mode)) for mode in ("L", "P", "RGBA")]
    good += [encoded(rng.integers(0, 65536, (9, 9)).astype(np.uint16))]
    outcomes = []
    for number in range(450):
        data = bytearray(good[number % len(good)])
        start, end = sorted(rng.integers(0, len(data), 2))
        if number % 4 == 0:
            del data[start:]
        elif number % 4 == 1:
            del data[start:end]
        else:
            reach = len(data) if number % 4 == 2 else min(80, len(data))  # mostly in the headers
            for position in rng.integers(0, reach, 4):
                data[position] = rng.integers(256)
        mutant = bytes(data)
        if mutant.startswith(b"\x89PNG") and number % 3:
            mutant = with_right_checksums(mutant)
        try:
            outcomes.append(str(decode(mutant, "mutant", Pixels(8)).shape))
        except InputError as error:
            outcomes.append(str(error))
    refused = [outcome for outcome in outcomes if outcome != "(8, 8, 3)"]
    assert 200 < len(refused) < 450
    assert all(message.startswith("mutant ") for message in refused)


def test_from_array() -> None:
    colour = quadrants(8, 8)
    assert from_array(colour, Pixels(8)) is colour
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for pixels in (grey, grey[..., None]):
        assert (from_array(pixels, Pixels(8)) == grey[..., None]).all()
    assert from_array(colour, Pixels(5)).shape == (5, 5, 3)
    assert (from_array(colour, Pixels(5)) == decode(encoded(colour), "a", Pixels(5))).all()
    for bad in (colour.astype(np.float32), colour[0, 0], colour[:0], np.zeros((2, 8, 8, 3), np.uint8)):
        with pytest.raises(InputError, match=r"must be uint8 of shape .* but is \w+ of shape"):
            from_array(bad, Pixels(8))
    with pytest.raises(InputError, match="1 or 3 channels, but has 4"):
        from_array(np.zeros((8, 8, 4), np.uint8), Pixels(8))


def test_is_image_name() -> None:
    assert all(map(is_image_name, ["a.jpg", "B.JPEG", "x/y.png", "ü.WebP", "c.bmp", "a.gif", "a.TIF", "IMG_1.HEIC"]))
    others = ["a.txt", ".jpg", ".hidden.jpg", "x/._a.jpg", "a.jpg.part", "jpg", "a.mp4"]
    assert not any(map(is_image_name, others))


def test_image_files(tmp_path: Path) -> None:
    skipped = ["a/notes.txt", ".git/x.jpg", "b/.x.jpg", "odd"]
    for name in ["b/2.jpg", "b/1.png", "a/deep/ü.bmp", "z.jpg", *skipped]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in image_files([tmp_path])]
    assert found == ["a/deep/ü.bmp", "b/1.png", "b/2.jpg", "z.jpg"]
    assert image_files([tmp_path / "odd", tmp_path / "b"]) == [
        tmp_path / "odd",  # an explicitly given file is accepted with any extension
        tmp_path / "b/1.png",
        tmp_path / "b/2.jpg",
    ]
    with pytest.raises(InputError, match="nowhere does not exist"):
        image_files([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty contains no images \(\.bmp, \.gif"):
        image_files([tmp_path / "b", tmp_path / "empty"])


def test_links_to_folders(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "1.jpg").touch()
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "all" / "again").symlink_to(tmp_path / "real")
    assert [path.parent.name for path in image_files([tmp_path / "all"])] == ["again", "linked"]
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "all")
    with pytest.raises(InputError, match=r"is a link to a folder that contains it"):
        image_files([tmp_path / "all"])


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """Reading a pipe would block, and a device never ends."""
    folder = tmp_path / "photos"
    (folder / "folder.jpg").mkdir(parents=True)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "linked.jpg").symlink_to(folder / "pipe.jpg")
    (folder / "broken.jpg").symlink_to(folder / "nothing")
    (folder / "itself.jpg").symlink_to(folder / "itself.jpg")
    (folder / "there.jpg").symlink_to(folder / "back.jpg")
    (folder / "back.jpg").symlink_to(folder / "there.jpg")
    with open(folder / "holes.jpg", "wb") as stream:
        stream.truncate(2**31)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(os.path.relpath(folder / "socket.jpg"))
        messages = {}
        for path in [*images.walk_images(folder), folder / "folder.jpg"]:
            with pytest.raises(InputError) as refused:
                images.read(path)
            messages[path.name] = str(refused.value).removeprefix(f"{path} ")
    circle = "cannot be read (Too many levels of symbolic links); remove it or check the path"
    assert messages == {
        "back.jpg": circle,
        "broken.jpg": "does not exist; check the path",
        "folder.jpg": "is a folder, but a file is needed",
        "holes.jpg": f"has {2**31:,} bytes, but an image may have at most 67,108,864; make it smaller",
        "itself.jpg": circle,
        "linked.jpg": "is a pipe, but a file is needed; remove it",
        "pipe.jpg": "is a pipe, but a file is needed; remove it",
        "socket.jpg": "is a socket, but a file is needed; remove it",
        "there.jpg": circle,
        "zero.jpg": "is a device, but a file is needed; remove it",
    }


def test_an_invalid_path_is_refused(tmp_path: Path) -> None:
    for path in ("a\0b.jpg", "x" * 300 + ".jpg", "/".join(["x" * 200] * 30) + ".jpg"):
        with pytest.raises(InputError, match="cannot be read"):
            images.read(path)


def test_a_file_that_is_replaced_by_a_pipe_after_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, look = tmp_path / "x.jpg", os.stat
    path.write_bytes(b"a file")

    def then_replaced(*arguments: Any, **options: Any) -> os.stat_result:
        found = look(*arguments, **options)
        path.unlink()
        os.mkfifo(path)
        return found

    monkeypatch.setattr(images.os, "stat", then_replaced)
    with pytest.raises(InputError, match="is a pipe"):
        images.read(path)


def test_unreadable_files_are_reported(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a user who is not root cannot become another one")
    folder = tmp_path / "photos"
    folder.mkdir(mode=0o700)
    (folder / "x.jpg").write_bytes(b"\x89PNG")
    os.seteuid(65534)
    try:
        with pytest.raises(InputError, match=r"x\.jpg cannot be read: permission denied"):
            images.read(folder / "x.jpg")
        with pytest.raises(InputError, match=r"the folder .*photos cannot be read \(Permission denied\)"):
            list(images.walk_images(folder))
    finally:
        os.seteuid(0)


def test_recursive_links_and_deep_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty folders with two links each to the next give 2 ** 30 paths; deep nesting exceeds the recursion limit."""
    monkeypatch.setattr(listing, "MAX_LINKED", 300)
    for number in range(30):
        (tmp_path / "twice" / str(number)).mkdir(parents=True)
        for name in "ab":
            (tmp_path / "twice" / str(number) / name).symlink_to(tmp_path / "twice" / str(number + 1))
    with pytest.raises(InputError, match="links lead to more than 300 folders"):
        images.image_files([tmp_path / "twice" / "0"])
    stack = [tmp_path / "deep"]
    while len(stack) < 400:
        stack.append(stack[-1] / "d")
    for deep in stack:
        deep.mkdir()
    (stack[-1] / "x.jpg").touch()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(300)  # the default of 1000, with as many folders, takes seconds
    try:
        assert images.image_files([stack[0]]) == [stack[-1] / "x.jpg"]
    finally:
        sys.setrecursionlimit(limit)
    (stack[-1] / "x.jpg").unlink()
    for deep in reversed(stack):  # pytest would remove them recursively
        deep.rmdir()


@pytest.mark.parametrize("band", [100, 3000])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_converting_in_bands_gives_the_same_pixels(
    monkeypatch: pytest.MonkeyPatch, band: int, orientation: int
) -> None:
    rng = np.random.default_rng(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for mode in ("RGBA", "P", "I;16"):
        height, width = (int(side) for side in rng.integers(20, 150, 2))
        if mode == "I;16":
            image = Image.fromarray(rng.integers(0, 65536, (height, width)).astype(np.uint16))
        else:
            image = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8)).convert(mode)
        data = encoded(image, exif=exif)
        expected = decode(data, "a", Pixels(8))
        with monkeypatch.context() as patched:
            patched.setattr(images, "_BAND", band)
            assert (decode(data, "a", Pixels(8)) == expected).all()


def test_reducing_gives_the_pixels_of_pillow_resize() -> None:
    rng = np.random.default_rng(0)
    for height, width in [(200, 300), (47, 251), (24, 1000), (71, 72)]:
        colour = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        wanted = Image.fromarray(colour).resize((8, 8), Image.Resampling.BICUBIC, reducing_gap=3.0)
        assert (from_array(colour, Pixels(8)) == np.asarray(wanted)).all()


def test_messages_of_a_decoder_are_shortened_to_one_printable_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise AttributeError("two\nlines \x1b[31m" + "x" * 500)

    monkeypatch.setattr(images.Image, "open", fail)
    with pytest.raises(InputError, match=r"^a is corrupt and cannot be decoded \(two lines \?\[31mx{85}\); remove it$"):
        decode(b"data", "a", Pixels(8))


def test_a_folder_that_cannot_be_entered_is_an_error_and_not_skipped() -> None:
    with unprivileged.open_folder() as folder:
        (folder / "class a").mkdir()
        (folder / "class a" / "1.png").touch()
        folder.chmod(0o444)
        with (
            unprivileged.unprivileged(),
            pytest.raises(InputError, match=r"class a cannot be read \(Permission denied\)"),
        ):
            list(images.walk_images(folder))
        folder.chmod(0o755)


def test_a_second_view_is_the_middle_enlarged_and_mirrored() -> None:
    image = np.zeros((50, 50, 3), np.uint8)
    image[5:45, 5:25] = 200  # the left half of the middle
    image[:5] = image[45:] = 90  # a frame above and below, which goes
    (view,) = second_view(image[None])
    assert view.shape == image.shape
    assert view.dtype == np.uint8
    assert (view[:, :23] < 20).all()
    assert (view[:, 27:] > 180).all()
    assert second_view(image[None][:0]).shape == (0, 50, 50, 3)
