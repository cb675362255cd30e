"""Images in arrays: digits, .npz files and image loading."""

from __future__ import annotations

import contextlib
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ssd_edge.config import DataConfig
from ssd_edge.data import Dataset, Images, arrays, load
from ssd_edge.errors import InputError
from ssd_edge.images import Pixels


def mnist(count: int = 20) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = (np.arange(count) % 10).astype(np.uint8)
    pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    return {"x_train": pixels, "y_train": labels, "x_test": pixels[:10], "y_test": labels[:10]}


def read(path: Path, **settings: object) -> Dataset:
    return load(DataConfig(path=str(path), **settings), 0)


def test_digits() -> None:
    data = load(DataConfig(), 0)
    assert data.name == "digits"
    assert data.classes == tuple("0123456789")
    assert len(data.train) + len(data.test) == 1797
    assert np.bincount(data.test_labels).tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    pixels = data.train.load([0, 1], Pixels(8))
    assert (pixels.min(), pixels.max(), pixels.shape) == (0, 255, (2, 8, 8, 3))
    assert data.train.load([0], Pixels(32)).shape == (1, 32, 32, 3)
    assert data.train.names[0].startswith("digits image ")


def test_mnist_is_padded(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "mnist.npz", **mnist())
    data = read(tmp_path / "mnist.npz")
    assert data.classes == tuple("0123456789")
    assert data.split == "official train/test split"
    pixels = data.train.load(range(20), Pixels(32))
    assert (pixels[:, 2:30, 2:30] == mnist()["x_train"][..., None]).all()
    frame = np.ones((32, 32), dtype=bool)
    frame[2:30, 2:30] = False
    assert not pixels[:, frame].any()
    assert data.train.names[17] == "train image 17"
    assert data.train.load([3], Pixels(16)).shape == (1, 16, 16, 3)


def test_colour_images_and_arbitrary_labels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 12, 10, 3), dtype=np.uint8)
    labels = np.array([30, 4, 100] * 2)
    np.savez(tmp_path / "a.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    data = read(tmp_path / "a.npz")
    assert data.classes == ("4", "30", "100")
    assert data.train_labels.tolist() == [1, 0, 2] * 2
    assert data.train.load([5], Pixels(12)).shape == (1, 12, 12, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_test": None}, "must hold x_train, y_train, x_test and y_test, but holds x_train, "),
        ({"x_train": np.zeros((20, 28, 28))}, r"x_train must be uint8 of shape .* but is float64 of shape"),
        ({"x_test": np.zeros((10, 784), np.uint8)}, r"x_test must be uint8 .* of shape \(10, 784\)"),
        ({"x_test": np.zeros((10, 4, 4, 4), np.uint8)}, r"x_test must be uint8"),
        ({"x_test": np.zeros((0, 28, 28), np.uint8)}, r"x_test must be uint8 .* of shape \(0, 28, 28\)"),
        ({"y_test": np.zeros(9, np.uint8)}, r"y_test must be .* of shape \(10,\), .* of shape \(9,\)"),
        ({"y_test": np.zeros(10)}, r"y_test must be whole numbers .* but is float64"),
        ({"y_test": np.full(10, None)}, r"cannot be read as an \.npz file \(Object arrays cannot be"),
        ({"y_test": np.zeros(10, np.uint8)}, r"has no test images of '1', '2', '3', '4', '5' and 4 more"),
    ],
)
def test_invalid_arrays_are_refused(change: dict[str, np.ndarray | None], message: str, tmp_path: Path) -> None:
    content = {key: value for key, value in {**mnist(), **change}.items() if value is not None}
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.npz")


def test_damaged_npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **mnist())
    original = path.read_bytes()
    for data in (b"", b"text", original[: len(original) // 2], b"\x93NUMPY"):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"a\.npz cannot be read as an \.npz file \(.+\); is it one\?"):
            read(path)
    rng = np.random.default_rng(0)
    for _ in range(100):
        changed = bytearray(original)
        changed[rng.integers(len(original))] ^= 1 + rng.integers(255)
        path.write_bytes(bytes(changed))
        with contextlib.suppress(InputError):  # any other error fails the test
            read(path)
    encrypted = bytearray(original)
    encrypted[original.index(b"PK\x03\x04") + 6] |= 1
    encrypted[original.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(bytes(encrypted))
    with pytest.raises(InputError, match="encrypted"):
        read(path)
    path.write_bytes(original)
    monkeypatch.setattr(arrays, "MAX_BYTES", 1000)
    with pytest.raises(InputError, match=r"holds [\d,]+ bytes, but at most 1,000 are read"):
        read(path)


def test_npz_with_a_shape_larger_than_its_data(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **mnist())
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    # a .npy header is padded with spaces, so a longer shape fits
    longer = members["x_train.npy"].replace(b"(20, 28, 28), }" + b" " * 12, b"(20000000000000, 28, 28), }")
    assert longer != members["x_train.npy"]
    members["x_train.npy"] = longer
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(InputError, match=r"cannot be read as an \.npz file"):
        read(path)


def test_load_and_batches() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 6, 6, 3), dtype=np.uint8)
    images = Images(pixels, [str(number) for number in range(300)])
    assert (images.load([7, 3, 7], Pixels(6)) == pixels[[7, 3, 7]]).all()
    assert images.load([], Pixels(6)).shape == (0, 6, 6, 3)
    for size in (6, 5):  # unchanged, and resized in threads
        batches = list(images.batches(Pixels(size), batch=128))
        assert [len(batch) for batch in batches] == [128, 128, 44]
        assert (np.concatenate(batches) == images.load(np.arange(300), Pixels(size))).all()
    part = images.take(np.array([5, 299]))
    assert (len(part), list(part.names)) == (2, ["5", "299"])
    assert (part.load([1], Pixels(6)) == pixels[299]).all()
    assert images.take(np.arange(300)) is images
    assert images.digest() != part.digest()
    batch = next(images.batches(Pixels(6)))
    batch[:] = 0  # a copy: changing it leaves the images unchanged
    assert (images.load([0], Pixels(6)) == pixels[0]).all()
