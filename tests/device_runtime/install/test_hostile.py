"""Hostile images and folders are used or refused with one sentence that names the file, without any other error.

Mutants reach the device as files and as PIL images, through `predict` and `learn`. Images that could exhaust the memory
are decoded in a separate process, whose memory is measured.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.png_bytes import with_right_checksums
from PIL import Image

from device_runtime import Device
from device_runtime.install.bundle import install
from device_runtime.learning import teach
from device_runtime.learning.guard import Limits
from ssd_edge import images
from ssd_edge.errors import InputError, printable
from ssd_edge.images import Pixels

SIZE = 8  # input size of the tiny backbone
pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns about corrections in EXIF data and palettes


@pytest.fixture
def root(tiny_bundle, tmp_path: Path) -> Path:
    (tmp_path / "tiny.ssdedge").write_bytes(tiny_bundle())
    install(tmp_path / "root", tmp_path / "tiny.ssdedge")
    return tmp_path / "root"


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(rng: np.random.Generator, mode: str = "RGB") -> Image.Image:
    width, height = (int(side) for side in rng.integers(3, 40, 2))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width)).astype(np.uint16))
    return Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8)).convert(mode)


def originals(rng: np.random.Generator) -> list[bytes]:
    """Return small valid images of many kinds in the four formats."""
    found = [encoded(noise(rng, mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    found += [encoded(noise(rng, mode), "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")]
    found += [encoded(noise(rng, mode), "JPEG") for mode in ("L", "RGB", "CMYK")]
    found += [encoded(noise(rng, mode), "WEBP", lossless=mode == "RGBA") for mode in ("RGB", "RGBA")]
    found.append(encoded(noise(rng), "JPEG", progressive=True, subsampling=0))
    found.append(encoded(noise(rng, "P"), "PNG", transparency=3))
    found.append(encoded(Image.new("RGB", (200, 160), "teal"), "JPEG"))  # decoded at reduced scale
    frames = [Image.new("RGB", (12, 9), colour) for colour in ("red", "green", "blue")]
    found += [encoded(frames[0], kind, save_all=True, append_images=frames[1:]) for kind in ("PNG", "WEBP", "MPO")]
    for orientation, kind in enumerate(("JPEG", "PNG", "WEBP") * 3):
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = orientation, "a description"
        found.append(encoded(noise(rng), kind, exif=exif))
    return found


NUMBERS = [
    struct.pack(order + "I", n) for order in "<>" for n in (0, 1, 255, 20_000, 60_000, 2**24, 2**31 - 1, 2**32 - 1)
]


def mutated(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """Apply one to three changes: flipped bits, cuts, splices, other header values, repetitions, runs of zeros."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        if len(changed) < 4:
            break
        start, end = sorted(int(at) for at in rng.integers(0, len(changed), 2))
        kind = rng.integers(8)
        if kind == 0:
            for position in rng.integers(0, len(changed), rng.integers(1, 20)):
                changed[position] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del changed[start:]
        elif kind == 2:
            del changed[start:end]
        elif kind == 3:
            changed = changed[:start] + other[int(rng.integers(len(other))) :]
        elif kind in (4, 5):
            at = int(rng.integers(min(64 if kind == 4 else 400, len(changed))))
            changed[at : at + 4] = NUMBERS[rng.integers(len(NUMBERS))]
        elif kind == 6:
            changed[end:end] = changed[start : min(end, start + 200)] * int(rng.integers(1, 30))
        else:
            changed[start:end] = bytes([rng.choice([0, 255])]) * (end - start)
    whole = bytes(changed)
    return with_right_checksums(whole) if whole.startswith(b"\x89PNG") and rng.integers(3) else whole


@contextlib.contextmanager
def one_sentence(name: str) -> Iterator[None]:
    """Check that an error in the block is an `InputError` with one printable sentence that contains `name`."""
    try:
        yield
    except InputError as error:
        told = str(error)
        assert told.isprintable(), told
        assert printable(name) in told
        assert len(told) < len(name) + 300
        raise


def attempt(rng: np.random.Generator, data: bytes, folder: Path, device: Device, number: int) -> str:
    """Give a mutant to the device; return the interface that was used and the outcome."""
    ending, strange = rng.choice(["jpg", "png", "webp", "bmp"]), rng.choice(["x", "a b", "\x1b[2J", "two\nlines", "ü"])
    path = folder / f"{strange}.{ending}"
    path.write_bytes(data)
    way = ("file", "file", "image", "predict", "learn" if number % 40 == 0 else "file")[number % 5]
    way = "learn" if number % 40 == 4 else way
    before = device.generation.number
    try:
        if way == "image":
            try:
                opened = Image.open(path)
            except Exception:  # an error in the caller's own program
                return "image: not opened"
            with opened, one_sentence("image 7"):
                check(teach.decode(opened, "image 7", Pixels(SIZE)))
        elif way == "predict":
            with one_sentence(str(path)):
                assert device.predict([path])[0].image == str(path)
        elif way == "learn":
            try:
                with one_sentence(str(path)):
                    device.learn("cup", [np.full((8, 8, 3), 200, np.uint8), path], Limits(force=True))
            finally:
                learned = device.store.current().number
            assert learned == before + 1
        else:
            with one_sentence(str(path)):
                check(teach.decode(path, "", Pixels(SIZE)))
    except InputError:
        assert device.store.current().number == before
        return f"{way}: refused"
    finally:
        path.unlink()
    return f"{way}: used"


def check(pixels: np.ndarray) -> None:
    assert (pixels.shape, pixels.dtype) == ((SIZE, SIZE, 3), np.uint8)


def many(count: int, root: Path, tmp_path: Path) -> Counter[str]:
    rng, outcomes = np.random.default_rng(20), Counter[str]()
    good, device = originals(rng), Device.open(root)
    for data in good:
        assert attempt(rng, data, tmp_path, device, 0) == "file: used"
    for number in range(count):
        data, other = good[number % len(good)], good[rng.integers(len(good))]
        outcomes[attempt(rng, mutated(rng, data, other), tmp_path, device, number)] += 1
    return outcomes


def test_mutants_are_used_or_refused(root, tmp_path):
    outcomes = many(250, root, tmp_path)
    for way in ("file", "image", "predict", "learn"):
        assert outcomes[f"{way}: used"] > 0, outcomes
        assert outcomes[f"{way}: refused"] > 0, outcomes


@pytest.mark.slow
def test_ten_thousand_mutants(root, tmp_path):
    outcomes = many(10_000, root, tmp_path)
    assert outcomes.total() == 10_000
    assert all(outcomes[f"{way}: {end}"] > 50 for way in ("file", "image", "predict") for end in ("used", "refused"))


@pytest.mark.parametrize(
    "data",
    [
        *(encoded(Image.new("RGB", (16, 16)), kind) for kind in ("ICO", "EPS", "PPM", "TGA", "PDF")),
        b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 16, 16, 8, 3) + bytes(800),
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(200),
        pickle.dumps({"images": [1, 2, 3]}),
        b"\x7fELF" + bytes(100),
        b"\0",
    ],
    ids=["ico", "eps", "ppm", "tga", "pdf", "psd", "svg", "avif", "pickle", "elf", "byte"],
)
def test_other_formats_are_refused_for_any_name(tmp_path, data):
    (tmp_path / "x.jpg").write_bytes(data)
    with pytest.raises(
        InputError, match=r"x\.jpg is not a JPEG, PNG, WebP, BMP, GIF or TIFF image; remove or convert it"
    ):
        teach.decode(tmp_path / "x.jpg", "", Pixels(SIZE))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def zeros(count: int, head: bytes = b"") -> bytes:
    """Return deflated zeros."""
    packer = zlib.compressobj(9 if count < 2**20 else 1)
    parts = [packer.compress(head)] + [packer.compress(bytes(min(2**20, count - at))) for at in range(0, count, 2**20)]
    return b"".join([*parts, packer.flush()])


def png(
    width: int, height: int, depth: int = 8, colour: int = 0, extra: bytes = b"", body: bytes | None = None
) -> bytes:
    """Return a PNG of zeros; `colour` is 0 for grey, 2 for RGB and 6 for RGBA."""
    if body is None:
        channels = {0: 1, 2: 3, 6: 4}[colour]
        body = zeros(height * (1 + -(-width * channels * depth // 8)))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def exif(orientation: int) -> bytes:
    return chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1" + struct.pack(">HH", orientation, 0) + bytes(4))


def webp_claiming(side: int) -> bytes:
    size = (side - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + size + size
    body += b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp_claiming(side: int) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (4, 4)), "BMP"))
    data[18:26] = struct.pack("<ii", side, side)
    return bytes(data)


def gif_claiming(side: int, frame_side: int) -> bytes:
    """Return a GIF of a canvas and a first frame of these sides, with the data of nine pixels."""
    data = bytearray(encoded(Image.new("L", (3, 3)), "GIF"))
    data[6:10] = struct.pack("<HH", side, side)
    at = data.index(b",\0\0\0\0") + 5
    data[at : at + 4] = struct.pack("<HH", frame_side, frame_side)
    return bytes(data)


def tiff(width: int, height: int, tile: int = 0, body: bytes = b"", depth: int = 8, channels: int = 1) -> bytes:
    """Return a deflated TIFF, grey or RGB, in one strip or one tile."""
    body = body or zeros(width * height * channels * depth // 8)
    tags = {256: width, 257: height, 258: depth, 259: 8, 262: 2 if channels == 3 else 1, 277: channels}
    tags |= {322: tile, 323: tile, 324: 8, 325: len(body)} if tile else {273: 8, 278: height, 279: len(body)}
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    if channels == 3:  # three depths do not fit into an entry
        three = 8 + len(body)
        table = table.replace(struct.pack("<HHII", 258, 4, 1, depth), struct.pack("<HHII", 258, 3, 3, three))
        body += struct.pack("<HHH", depth, depth, depth)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(tags)) + table + bytes(4)


def moving(frames: int) -> bytes:
    """Return an animated PNG of tiny frames."""
    extra = chunk(b"acTL", struct.pack(">II", frames, 0)) + frame(0)
    later = [frame(2 * n - 1) + chunk(b"fdAT", struct.pack(">I", 2 * n) + zeros(20)) for n in range(1, frames)]
    whole = png(4, 4, extra=extra)
    return whole[:-12] + b"".join(later) + whole[-12:]


def frame(number: int) -> bytes:
    return chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, 4, 4, 0, 0, 1, 30, 0, 0))


def scans(count: int) -> bytes:
    data = encoded(Image.new("RGB", (3000, 2000)), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


# A lossless WebP of one colour, 16,000 × 5,000 pixels. Decoding it took 1.8 GB before there was a limit.
ONE_COLOUR = bytes.fromhex("524946461a000000574542505650384c0d0000002f7ffee114071011118888fe0700")
USED = "(224, 224, 3)"
BOMBS = {  # name → function that creates it, expected outcome
    "webp": (lambda: ONE_COLOUR, "16000 × 5000 pixels, but an image of this type may have at most 20,000,000"),
    "webp-60000": (lambda: webp_claiming(60_000), "more than 80,000,000 pixels"),
    "bmp-60000": (lambda: bmp_claiming(60_000), "more than 80,000,000 pixels"),
    "png-30000": (lambda: png(30_000, 30_000, depth=1), "more than 80,000,000 pixels"),
    "png-wide": (lambda: png(1_000_000, 1), "a side may have at most 65,535"),
    "gif-60000": (lambda: gif_claiming(60_000, 3), "more than 80,000,000 pixels"),
    "gif-frame": (lambda: gif_claiming(3, 60_000), "more than 80,000,000 pixels"),
    "tiff-60000": (lambda: tiff(60_000, 60_000, body=zeros(9)), "more than 80,000,000 pixels"),
    "tiff-tile": (lambda: tiff(8, 8, tile=60_000, body=zeros(9)), "is corrupt"),
    "tiff-strip": (lambda: tiff(8, 8, body=zeros(200 * 2**20)), USED),
    "idat": (lambda: png(8, 8, body=zeros(200 * 2**20)), USED),
    "zTXt": (lambda: png(8, 8, extra=chunk(b"zTXt", b"Comment\0\0" + zeros(200 * 2**20))), "data too large"),
    "iCCP": (lambda: png(8, 8, extra=chunk(b"iCCP", b"icc\0\0" + zeros(200 * 2**20))), "data too large"),
    "apng": (lambda: moving(5000), USED),
    "scans": (lambda: scans(2000), "2,010 scans, but a JPEG may have at most 100"),
    "20000x4000": (lambda: png(20_000, 4_000, depth=1), USED),
    "1x20000": (lambda: png(1, 20_000), USED),
    "20000x1": (lambda: png(20_000, 1, colour=6, extra=exif(6)), USED),
    "1x1": (lambda: png(1, 1), USED),
}
LARGEST = {  # largest accepted images
    "rgba": lambda: png(20_000, 4_000, colour=6),
    "rgba-turned": lambda: png(20_000, 4_000, colour=6, extra=exif(6)),
    "grey-16": lambda: png(20_000, 4_000, depth=16),
    "tiff-grey-16": lambda: tiff(20_000, 4_000, depth=16),
    "tiff-colour": lambda: tiff(11_000, 4_000, channels=3),
    "tiff-colour-16": lambda: tiff(8_000, 4_000, depth=16, channels=3),
    "gif": lambda: encoded(Image.new("P", (20_000, 4_000)), "GIF"),
    "jpeg": lambda: encoded(Image.new("RGB", (20_000, 4_000)), "JPEG"),
    "jpeg-progressive": lambda: encoded(Image.new("RGB", (8_000, 4_000)), "JPEG", progressive=True),
    "webp": lambda: encoded(Image.new("RGBA", (5_000, 4_000)), "WEBP", lossless=True, method=0),
}
MEASURE = """
import json, re, sys
from pathlib import Path
from PIL import Image
from ssd_edge import images
from ssd_edge.errors import InputError
from ssd_edge.images import Pixels

def peak():  # in MiB; the maximum of getrusage includes that of the parent process
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def told(path):
    try:
        return str(images.decode(images.read(path), path, Pixels(224)).shape)
    except InputError as error:
        return str(error)

Image.init()
before = peak()
print(json.dumps({path: [told(path), peak() - before] for path in sys.argv[1:]}))
"""


def measured(*paths: Path) -> dict[str, tuple[str, float]]:
    """Read images in a separate process; return the outcome and the growth of memory in MiB by name."""
    command = [sys.executable, "-c", MEASURE, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return {Path(path).name: (told, grown) for path, (told, grown) in json.loads(done.stdout).items()}


def test_bombs_use_little_memory(tmp_path):
    for name, (make, _) in BOMBS.items():
        (tmp_path / f"{name}.jpg").write_bytes(make())
    found = measured(*(tmp_path / f"{name}.jpg" for name in BOMBS))
    for name, (_, wanted) in BOMBS.items():
        told, grown = found[f"{name}.jpg"]
        assert wanted in told, name
        assert wanted == USED or (told.isprintable() and f"{name}.jpg" in told)
        assert grown < 200, name


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGEST)
def test_largest_accepted_images_stay_within_bounds(tmp_path, name):
    (tmp_path / "x.jpg").write_bytes(LARGEST[name]())
    told, grown = measured(tmp_path / "x.jpg")["x.jpg"]
    assert told == USED
    assert grown < 400


def names() -> list[bytes]:
    return [
        b"two\nlines.jpg",
        b"\x1b[31mred\x1b[0m.jpg",
        b"not utf-8 \xff\xfe.jpg",
        b"l" * 251 + b".jpg",
        "\u202e.jpg".encode(),
    ]


def test_messages_with_hostile_file_names_are_printable(root, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in names():
        with open(os.fsencode(folder) + b"/" + name, "wb") as stream:
            stream.write(b"no image")
    found = images.image_files([folder])
    assert len(found) == len(names())
    device = Device.open(root)
    for path in found:
        with pytest.raises(InputError, match="is not a JPEG"), one_sentence(str(path)):
            device.predict([path])
        path.write_bytes(encoded(Image.new("RGB", (9, 9)), "PNG"))
        assert device.predict([path])[0].image == str(path)


def test_file_removed_after_listing(root, tmp_path):
    path = tmp_path / "photos" / "x.png"
    path.parent.mkdir()
    path.write_bytes(png(4, 4))
    (found,) = images.image_files([path.parent])
    path.unlink()
    with pytest.raises(InputError, match=r"x\.png does not exist; check the path"):
        Device.open(root).learn("cup", [found])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.full((8, 8, 3), np.nan), "must be uint8 .* but is float64"),
        (np.full((8, 8, 3), np.inf, np.float32), "must be uint8 .* but is float32"),
        (np.zeros((8, 8, 3), object), "must be uint8 .* but is object"),
        (np.zeros((8, 0, 3), np.uint8), r"of shape \(8, 0, 3\)"),
        (np.zeros((8, 8, 5), np.uint8), "1 or 3 channels, but has 5"),
        (np.zeros((8, 8, 3), "<U3"), "but is <U3"),
        (np.zeros((), np.uint8), r"of shape \(\)"),
        (
            np.broadcast_to(np.uint8(0), (10**6, 10**6, 3)),
            "× 1000000 pixels, but an image may have at most 80,000,000",
        ),
        (Image.new("F", (9, 9), float("nan")), "floating-point pixels"),
        (Image.new("I", (9, 9), -5), "values from -5 to -5"),
        (Image.new("RGB", (0, 9)), "0 × 9 pixels"),
        (None, "is a NoneType"),
        (b"bytes", "is a bytes"),
        ([1, 2], "is a list"),
    ],
)
def test_values_that_are_no_image(root, source, message):
    good = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(InputError, match=message), one_sentence("image 2"):
        Device.open(root).predict([good, good, source])


def test_arrays_of_any_memory_layout(root):
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 256, (20, 12, 3), dtype=np.uint8)
    for view in (whole[::-1], whole[:, ::-2], whole[..., ::-1], np.asfortranarray(whole), whole.transpose(1, 0, 2)):
        plain = teach.decode(np.ascontiguousarray(view), "", Pixels(SIZE))
        assert (teach.decode(view, "", Pixels(SIZE)) == plain).all()
    square = np.asfortranarray(whole[:8, :8])[::-1]
    device = Device.open(root)
    assert device.embed([square]).equal(device.embed([np.ascontiguousarray(square)]))


def test_image_of_the_caller_is_unchanged(tmp_path):
    Image.new("RGB", (640, 480), "teal").save(tmp_path / "x.jpg")
    with Image.open(tmp_path / "x.jpg") as image:
        assert (teach.decode(image, "", Pixels(SIZE)) == teach.decode(tmp_path / "x.jpg", "", Pixels(SIZE))).all()
        assert image.size == (640, 480)


def test_one_hostile_image_prevents_learning(root, tmp_path):
    device = Device.open(root)
    good = [np.full((8, 8, 3), shade, np.uint8) for shade in range(10)]
    (tmp_path / "x.png").write_bytes(png(8, 8)[:40])
    kept = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for hostile in (tmp_path / "x.png", good[0].astype(float), tmp_path / "none.png", "/dev/zero"):
        with pytest.raises(InputError):
            device.learn_all({"wedge": good, "cup": [*good, hostile]})
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == kept
    assert device.learn("wedge", good).generation == 2


def test_embeddings_that_are_not_finite_are_refused(root):
    device = Device.open(root)
    session = device.embedder._session

    class Broken:
        def run(self, names: None, given: dict[str, np.ndarray]) -> list[np.ndarray]:
            (embeddings,) = session.run(names, given)
            embeddings[-1, 0] = np.nan
            return [embeddings]

    device.embedder._session = Broken()
    good = [np.full((8, 8, 3), shade, np.uint8) for shade in range(5)]
    for act in (lambda: device.predict(good), lambda: device.learn("wedge", good)):
        with pytest.raises(InputError, match="gives NaN or infinity for image 4; leave it out"):
            act()
    assert device.store.current().number == 1
