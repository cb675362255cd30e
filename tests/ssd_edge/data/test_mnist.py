"""MNIST idx files: valid files, and errors raised before memory is allocated."""

from __future__ import annotations

import contextlib
import gzip
import io
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ssd_edge.config import DataConfig
from ssd_edge.data import Dataset, load, mnist
from ssd_edge.errors import InputError
from ssd_edge.images import Pixels

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (30, 28, 28), dtype=np.uint8)
LABELS = (np.arange(30) % 10).astype(np.uint8)


def idx(array: np.ndarray) -> bytes:
    """Return the idx file of an array."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def files(**changes: bytes | None) -> dict[str, bytes]:
    content = {
        "train-images-idx3-ubyte": idx(PIXELS),
        "train-labels-idx1-ubyte": idx(LABELS),
        "t10k-images-idx3-ubyte": idx(PIXELS[:10]),
        "t10k-labels-idx1-ubyte": idx(LABELS[:10]),
    }
    content |= {name.replace("_", "-"): data for name, data in changes.items()}
    return {name: data for name, data in content.items() if data is not None}


def save(content: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder


def read(path: Path, **settings: object) -> Dataset:
    return load(DataConfig(path=str(path), **settings), 0)


def file_names(style: str) -> dict[str, bytes]:
    content = {name.replace("-idx", ".idx") if "dots" in style else name: data for name, data in files().items()}
    return {f"{name}.gz": gzip.compress(data) for name, data in content.items()} if "gz" in style else content


@pytest.mark.parametrize("style", ["plain", "dots", "gz", "dots gz"])
@pytest.mark.parametrize("form", ["folder", "a.tar", "a.zip"])
def test_the_four_files(style: str, form: str, tmp_path: Path) -> None:
    content, path = {**file_names(style), "readme.md": b"x"}, tmp_path / form
    if form == "folder":
        save(content, path)
    elif form == "a.zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in content.items():
                archive.writestr(f"MNIST/raw/{name}", data)
    else:
        with tarfile.open(path, "w") as archive:
            for name, data in content.items():
                member = tarfile.TarInfo(f"MNIST/raw/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    data = read(path)
    assert (data.name, data.classes) == (form, tuple("0123456789"))
    assert data.split == "official train/test split"
    assert data.train_labels.tolist() == LABELS.tolist()
    assert data.test_labels.tolist() == list(range(10))
    expected = np.zeros((30, 32, 32, 3), dtype=np.uint8)
    expected[:, 2:30, 2:30] = PIXELS[..., None]  # a black border, and equal channels
    assert (data.train.load(range(30), Pixels(32)) == expected).all()
    assert (data.test.load(range(10), Pixels(32)) == expected[:10]).all()
    assert data.train.names[7] == "train image 7"


def test_same_data_as_the_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=PIXELS, y_train=LABELS, x_test=PIXELS[:10], y_test=LABELS[:10])
    assert read(save(files(), tmp_path / "a")).fingerprint == read(tmp_path / "a.npz").fingerprint


def test_unpacked_files_take_precedence_and_other_sizes_are_kept(tmp_path: Path) -> None:
    home = save({**files(), "train-images-idx3-ubyte.gz": b"damaged"}, tmp_path)
    assert len(read(home).train) == 30
    small = idx(RNG.integers(0, 256, (30, 20, 16)))
    save(files(train_images_idx3_ubyte=small), home)
    assert read(home, classes=("3", "7")).train.load([5], Pixels(20)).shape == (1, 20, 20, 3)


BIG = struct.pack(">HBB3I", 0, 8, 3, 2**31, 28, 28)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, r"a lacks the file train-images-idx3-ubyte of MNIST; download"),
        (b"", r"starts with nothing, but an idx file of unsigned bytes in 3 dimensions with 00000803"),
        (idx(LABELS), r"starts with 00000801, but an idx file of unsigned bytes in 3 dimensions with 00000803"),
        (b"\0\0\x0d\3" + idx(PIXELS)[4:], r"starts with 00000d03, but"),
        (b"\x1f\x8b\0\0" + idx(PIXELS)[4:], r"starts with 1f8b0000, but"),
        (idx(PIXELS)[:15], r"ends after 15 bytes, within its header"),
        (idx(PIXELS)[:-1], r"its shape is \(30, 28, 28\), which is 23,520 bytes, but holds 23,519; download"),
        (idx(PIXELS) + b"\0", r"which is 23,520 bytes, but holds more; download"),
        (BIG, r"its shape is \(2147483648, 28, 28\), but 1 to 2,147,483,648 bytes are read"),
        (idx(PIXELS[:0]), r"its shape is \(0, 28, 28\), but 1 to"),
        (idx(PIXELS[:29]), r"train-images-idx3-ubyte(\.gz)? holds 29 images, but train-labels-idx1-ubyte 30 labels"),
    ],
)
def test_invalid_files_are_refused(data: bytes | None, message: str, packed: bool, tmp_path: Path) -> None:
    content = files(train_images_idx3_ubyte=None)
    if data is not None:
        content["train-images-idx3-ubyte" + (".gz" if packed else "")] = gzip.compress(data) if packed else data
    home = save(content, tmp_path / "a")
    with pytest.raises(InputError, match=message) as caught:
        read(home)
    assert "train-images-idx3-ubyte" in str(caught.value)


def test_labels_are_checked_too(tmp_path: Path) -> None:
    home = save(files(t10k_labels_idx1_ubyte=idx(PIXELS)), tmp_path)
    with pytest.raises(InputError, match=r"t10k-labels-idx1-ubyte starts with 00000803, but .* in 1 dimension with"):
        read(home)


def test_damaged_gzip(tmp_path: Path) -> None:
    packed = gzip.compress(idx(PIXELS))
    content = files(train_images_idx3_ubyte=None)
    for data in (packed[:-9], packed[:-8] + bytes(8), b"text", packed[:40]):
        home = save({**content, "train-images-idx3-ubyte.gz": data}, tmp_path)
        with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz cannot be read \(.+\); download it again"):
            read(home)
    for _ in range(30):
        changed = bytearray(packed)
        changed[RNG.integers(len(packed))] ^= 1 + RNG.integers(255)
        save({"train-images-idx3-ubyte.gz": bytes(changed)}, tmp_path)
        with contextlib.suppress(InputError):  # any other error fails the test
            read(tmp_path)


def test_a_false_header_allocates_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a declared size of 2 GB without data nor 64 MB of zeros after a declared 23 kB is read."""
    promise = struct.pack(">HBB3I", 0, 8, 3, 2_000_000, 32, 32)
    bomb = gzip.compress(idx(PIXELS) + bytes(64 << 20))
    for data, message in ((gzip.compress(promise), r"but holds 0; download"), (bomb, r"but holds more; download")):
        content = files(train_images_idx3_ubyte=None)
        home = save({**content, "train-images-idx3-ubyte.gz": data}, tmp_path)
        tracemalloc.start()
        with pytest.raises(InputError, match=message):
            read(home)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 << 20
    monkeypatch.setattr(mnist, "MAX_BYTES", 20_000)
    with pytest.raises(InputError, match=r"its shape is \(30, 28, 28\), but 1 to 20,000 bytes are read"):
        read(save(files(), tmp_path / "b"))
