"""The official CIFAR pickles, and malicious pickles."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ssd_edge.config import DataConfig
from ssd_edge.data import load
from ssd_edge.errors import InputError
from ssd_edge.images import Pixels

TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class _Python2Pickler(pickle._Pickler):
    """Pickler that writes bytes and text like Python 2 strings, as in the official files."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    def save_str(self, value: str) -> None:
        self.save_bytes(value.encode("latin1"))

    dispatch[bytes] = save_bytes
    dispatch[str] = save_str


def python2(value: object) -> bytes:
    stream = io.BytesIO()
    _Python2Pickler(stream, protocol=2).dump(value)
    return stream.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


WRITERS: dict[str, Callable[[object], bytes]] = {
    "python2": python2,
    "protocol2": lambda value: pickle.dumps(value, protocol=2),  # bytes are pickled through _codecs.encode
    "protocol4": lambda value: pickle.dumps(value, protocol=4),
}


def cifar10(write: Callable[[object], bytes] = python2) -> dict[str, bytes]:
    """Return CIFAR-10 files of ten images, one per class; red counts up over the pixels of a file."""
    files = {"batches.meta": write({b"label_names": [name.encode() for name in TEN], b"num_vis": 3072})}
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        data = np.zeros((10, 3, 32, 32), dtype=np.uint8)
        data[:, 0] = np.arange(1024).reshape(32, 32) % 251
        data[:, 2] = number
        labels = list(range(9, -1, -1))
        files[name] = write({b"data": data.reshape(10, 3072), b"labels": labels, b"filenames": [b"x"] * 10})
    return files


def save(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("kind", WRITERS)
def test_cifar10(kind: str, tmp_path: Path) -> None:
    home = save(cifar10(WRITERS[kind]), tmp_path / "cifar-10-batches-py")
    for path in (home, tmp_path):  # the folder itself and its parent
        data = load(DataConfig(path=str(path)), 0)
        assert data.classes == tuple(TEN)
        assert (len(data.train), len(data.test)) == (50, 10)
        assert data.split == "official train/test split"
        assert data.train_labels.tolist() == list(range(9, -1, -1)) * 5
        assert data.train.names[17] == "train image 17"
        pixels = data.train.load([0, 49], Pixels(32))
        assert (pixels[:, :, :, 0] == np.arange(1024).reshape(32, 32) % 251).all()
        assert pixels[:, 0, 0, 2].tolist() == [0, 4]
        assert (data.test.load([0], Pixels(32))[..., 2] == 5).all()


def test_official_archive(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {**cifar10(), "readme.html": b"<html>"}.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    data = load(DataConfig(path=str(path), max_per_class=3), 0)
    assert (data.name, len(data.train), len(data.test)) == ("cifar-10-python.tar.gz", 30, 10)


def test_cifar100_uses_the_fine_labels(tmp_path: Path) -> None:
    names = [f"class_{number}" for number in range(100)]
    meta = {b"fine_label_names": [name.encode() for name in names], b"coarse_label_names": [b"all"]}
    table = {
        b"data": np.zeros((100, 3072), dtype=np.uint8),
        b"fine_labels": list(range(100)),
        b"coarse_labels": [0] * 100,
    }
    files = {"meta": python2(meta), "train": python2(table), "test": python2(table)}
    home = save(files, tmp_path / "cifar-100-python")
    data = load(DataConfig(path=str(home)), 0)
    assert data.classes == tuple(names)  # in natural order: 9 before 10
    assert data.train_labels.tolist() == list(range(100))
    save(cifar10(), tmp_path / "cifar-10-batches-py")
    with pytest.raises(InputError, match=r"holds more than one CIFAR; name one of .*cifar-10-batches-py, "):
        load(DataConfig(path=str(tmp_path)), 0)


def test_arrays_in_fortran_order(tmp_path: Path) -> None:
    files = cifar10()
    data = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
    files["test_batch"] = python2({b"data": np.asfortranarray(data), b"labels": list(range(10))})
    dataset = load(DataConfig(path=str(save(files, tmp_path / "c"))), 0)
    assert (dataset.test.load(range(10), Pixels(32)) == data.reshape(10, 3, 32, 32).transpose(0, 2, 3, 1)).all()


class _Touch:
    """Object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_pickle_is_refused_and_not_run(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "was here"
    evil = pickle.dumps({b"data": _Touch(marker), b"labels": [0]}, protocol=protocol)
    files = {**cifar10(), "data_batch_3": evil}
    home = save(files, tmp_path / "c")
    with pytest.raises(InputError, match=r"data_batch_3 is refused: it asks for \w+\.open, which"):
        load(DataConfig(path=str(home)), 0)
    assert not marker.exists()
    pickle.loads(evil)[b"data"].close()  # the pickle works: plain loading creates the file
    assert marker.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("os", "system"),
        ("numpy", "load"),
        ("numpy", "ndarray.tofile"),
        ("numpy.core.multiarray", "fromfile"),
        ("_codecs", "lookup"),
        ("ssd_edge.data.cifar", "np"),
    ],
)
def test_no_other_global_can_be_loaded(module: str, name: str, tmp_path: Path) -> None:
    files = {**cifar10(), "batches.meta": f"\x80\x02c{module}\n{name}\n.".encode("latin1")}
    with pytest.raises(InputError, match=rf"batches\.meta is refused: it asks for {module}\.{name}"):
        load(DataConfig(path=str(save(files, tmp_path / "c"))), 0)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({b"data": np.zeros((2, 3072)), b"labels": [0, 1]}, "an array of type .*f8.* instead of uint8"),
        ({b"data": np.array([None] * 2), b"labels": [0, 1]}, "an array of type .*O8.* instead of uint8"),
        ({b"data": np.zeros((2, 3000), np.uint8), b"labels": [0, 1]}, "is not a batch of CIFAR"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "2 images, but 1 labels"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, "a"]}, "has labels that are not whole numbers"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]}, "has labels 0..10, but there are 10"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [-1, 0]}, "has labels -1..0, but there are 10"),
        ({b"data": b"bytes", b"labels": [0]}, "is not a batch of CIFAR"),
        ({b"labels": [0]}, "is not a batch of CIFAR"),
        ([1, 2], "does not contain a table of arrays"),
    ],
)
def test_invalid_content_is_refused(table: object, message: str, tmp_path: Path) -> None:
    home = save({**cifar10(), "test_batch": python2(table)}, tmp_path / "c")
    with pytest.raises(InputError, match=f"test_batch.*{message}"):
        load(DataConfig(path=str(home)), 0)


_LATER = b"\x80\x04"
_ENCODE, _LATIN1 = b"c_codecs\nencode\n", b"X\x06\x00\x00\x00latin1"
_DTYPE = b"cnumpy\ndtype\n"
_UINT8 = _DTYPE + b"C\x02u1\x85R"
_LONG_TEXT = b"X\x00\x00\x10\x00" + b"a" * (1 << 20)
_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00C\x01btR"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x80\x02)r\xff\xff\xff\x0f.", id="a far place in memory"),
        pytest.param(_LATER + b"\x8e" + (1 << 33).to_bytes(8, "little") + b"x", id="a long text"),
        pytest.param(_LATER + b"\x96" + (1 << 31).to_bytes(8, "little"), id="a long buffer"),
        pytest.param(_LATER + b"\x95" + (1 << 31).to_bytes(8, "little") + b"N.", id="a long frame"),
        pytest.param(b"\x80\x02})" + b"2\x86" * 100 + b"Ns.", id="a key whose hash never ends"),
        pytest.param(b"\x80\x02}q\x00)q\x01" + b"h\x01h\x01\x86q\x01" * 64 + b"Ns.", id="the same through the memory"),
        pytest.param(_DTYPE + b")q\x01" + b"h\x01h\x01\x86q\x01" * 64 + b"\x85R.", id="a type whose text never ends"),
        pytest.param(
            _ENCODE + b"q\x00" + _LONG_TEXT + _LATIN1 + b"\x86q\x01](" + b"h\x00h\x01R" * 100_000 + b"e.",
            id="one text encoded again and again",
        ),
        pytest.param(
            _ARRAY + b"(K\x01(" + b"K\x01" * 99_999 + b"t" + _UINT8 + b"\x89C\x00tq\x03" + 99_999 * b"h\x03b",
            id="a long shape set again and again",
        ),
        pytest.param(b"\x80\x02" + b"]q\x00" + b"h\x00a" * 1000 + b".", id="a list in itself"),
        pytest.param(b"I" + b"9" * 100_000 + b"\n.", id="a long number"),
    ],
)  # fmt: skip
def test_a_few_bytes_ask_for_neither_memory_nor_time(data: bytes, tmp_path: Path) -> None:
    home = save({**cifar10(), "test_batch": data}, tmp_path / "c")
    tracemalloc.start()
    try:
        begun = time.monotonic()
        with pytest.raises(InputError, match="test_batch") as caught:
            load(DataConfig(path=str(home)), 0)
        assert time.monotonic() - begun < 5
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 500


def test_labels_in_a_list_of_itself_are_refused(tmp_path: Path) -> None:
    labels: list[object] = []
    labels += [labels, labels]  # NumPy would look for an array in it, two ways at each of 64 levels
    files = {**cifar10(), "test_batch": python2({b"data": np.zeros((2, 3072), np.uint8), b"labels": labels})}
    with pytest.raises(InputError, match="test_batch has labels that are not whole numbers"):
        load(DataConfig(path=str(save(files, tmp_path / "c"))), 0)


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    files = cifar10()
    home = save({name: data for name, data in files.items() if name != "data_batch_4"}, tmp_path / "a")
    with pytest.raises(InputError, match="lacks the file data_batch_4 of CIFAR"):
        load(DataConfig(path=str(home)), 0)
    home = save({**files, "batches.meta": python2({b"names": []})}, tmp_path / "b")
    with pytest.raises(InputError, match=r"batches\.meta holds no class names"):
        load(DataConfig(path=str(home)), 0)
    rng = np.random.default_rng(0)
    home = save(files, tmp_path / "c")
    for number in range(60):
        data = bytearray(files["data_batch_1"])
        if number % 2:
            del data[rng.integers(len(data)) :]
        else:
            for position in rng.integers(0, 300, 3):
                data[position] = rng.integers(256)
        (home / "data_batch_1").write_bytes(bytes(data))
        with contextlib.suppress(InputError):  # if only a pixel changed, the file loads
            load(DataConfig(path=str(home)), 0)
