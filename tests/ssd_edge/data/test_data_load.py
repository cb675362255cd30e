"""`data.load`: search paths, class selection, splits and fingerprint."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssd_edge.config import DataConfig
from ssd_edge.data import Dataset, load
from ssd_edge.errors import InputError
from ssd_edge.images import Pixels

SIZES = {"ant": 4, "bee": 10, "cow": 25, "dog": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make four classes of different sizes whose images all have different colours."""
    root = tmp_path_factory.mktemp("sets") / "animals"
    for kind, (name, count) in enumerate(SIZES.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (4, 4), (kind, number, 0)).save(root / name / f"{number:02}.png")
    return root


def read(home: Path, seed: int = 0, **settings: object) -> Dataset:
    return load(DataConfig(path=str(home), **settings), seed)


def counts(labels: np.ndarray) -> list[int]:
    return np.bincount(labels).tolist()


def files(images: object) -> list[str]:
    return ["/".join(Path(name).parts[-2:]) for name in images.names]


def test_import_is_fast_and_without_torch() -> None:
    code = "import sys, ssd_edge.data, ssd_edge.data.cache; print({'torch', 'sklearn'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_search_paths(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SSD_EDGE_DATA", raising=False)
    with pytest.raises(InputError, match=rf"no data set at {tmp_path}/animals; check data\.path, or set"):
        load(DataConfig(path="animals"), 0)
    monkeypatch.setenv("SSD_EDGE_DATA", str(home.parent))
    assert load(DataConfig(path="animals"), 0).classes == tuple(SIZES)
    with pytest.raises(InputError, match=rf"no data set at {tmp_path}/cars nor at {home.parent}/cars; check"):
        load(DataConfig(path="cars"), 0)
    monkeypatch.chdir(home)
    assert load(DataConfig(path="."), 0).name == "animals"
    monkeypatch.delenv("SSD_EDGE_DATA")
    with pytest.raises(InputError, match="Did you mean 'digits'"):
        load(DataConfig(path="digit"), 0)
    with pytest.raises(InputError, match=r"data\.path is empty; name a folder"):
        load(DataConfig(path=""), 0)


def test_split_is_stratified_seeded_and_complete(home: Path) -> None:
    data = read(home)
    assert counts(data.test_labels) == [1, 2, 5, 1]  # at least one test image
    assert counts(data.train_labels) == [3, 8, 20, 1]  # and one training image
    assert counts(read(home, test_fraction=0.9).train_labels) == [1, 1, 3, 1]
    train, test = set(files(data.train)), set(files(data.test))
    assert not train & test
    assert len(train | test) == sum(SIZES.values())
    again, other = read(home), read(home, seed=1)
    assert files(again.test) == files(data.test)
    assert again.fingerprint == data.fingerprint
    assert files(other.test) != files(data.test)
    assert other.fingerprint != data.fingerprint


def test_labels_match_the_images(home: Path) -> None:
    data = read(home, classes=("dog", "bee"))
    assert data.classes == ("bee", "dog")
    for images, labels in ((data.train, data.train_labels), (data.test, data.test_labels)):
        assert labels.dtype == np.int64
        assert (images.load(range(len(images)), Pixels(4))[:, 0, 0, 0] == np.array([1, 3])[labels]).all()


def test_class_selection_does_not_change_the_split(home: Path) -> None:
    everything = read(home)
    some = read(home, classes=("cow", "ant"))
    rest = read(home, exclude=("bee", "dog"))
    assert some.classes == rest.classes == ("ant", "cow")
    assert files(some.test) == [name for name in files(everything.test) if name.startswith(("ant", "cow"))]
    assert some.fingerprint == rest.fingerprint != everything.fingerprint


def test_max_per_class_applies_to_training_only(home: Path) -> None:
    full, five, ten = (read(home, max_per_class=count) for count in (0, 5, 10))
    assert counts(five.train_labels) == [3, 5, 5, 1]
    assert files(five.test) == files(full.test)
    assert set(files(five.train)) < set(files(ten.train)) < set(files(full.train))
    assert set(files(five.train)) != set(files(read(home, seed=1, max_per_class=5).train))


def test_invalid_selections_are_refused(home: Path) -> None:
    with pytest.raises(InputError, match=r"^animals has no class 'beee'\. Did you mean 'bee'\? It has"):
        read(home, classes=("ant", "beee"))
    with pytest.raises(InputError, match=r"^animals has no class 'x'\. It has"):
        read(home, exclude=("x",))
    with pytest.raises(InputError, match=r"but animals has only one \('ant'\) left after data\.classes"):
        read(home, classes=("ant",))
    with pytest.raises(InputError, match=r"but animals has none left after"):
        read(home, exclude=tuple(SIZES))


@pytest.mark.parametrize(
    ("positions", "chosen"),
    [
        (("0:2",), "ant bee"),
        ((":3",), "ant bee cow"),
        (("2:",), "cow dog"),
        (("-2:",), "cow dog"),
        (("1:-1",), "bee cow"),
        ((":",), "ant bee cow dog"),
        (("0:1", "3:4"), "ant dog"),
        (("dog", "0:2", "1:2"), "ant bee dog"),
        (("0:4",), "ant bee cow dog"),
    ],
)
def test_selection_by_position(positions: tuple[str, ...], chosen: str, home: Path) -> None:
    data = read(home, classes=positions)
    assert data.classes == tuple(chosen.split())
    rest = [name for name in SIZES if name not in data.classes]
    if len(rest) > 1:
        assert read(home, exclude=positions).classes == tuple(rest)


@pytest.mark.parametrize(
    ("position", "message"),
    [
        ("0:5", r"^the positions '0:5' reach beyond the 4 classes of animals; they count from 0, as in 0:4 for all$"),
        ("-5:2", r"^the positions '-5:2' reach beyond the 4 classes"),
        ("4:", r"^the positions '4:' hold none of the 4 classes"),
        ("2:2", r"^the positions '2:2' hold none of the 4 classes"),
        ("9:12", r"^the positions '9:12' hold none of the 4 classes"),
        ("0:1:2", r"^animals has no class '0:1:2'\."),
        ("1:x", r"^animals has no class '1:x'\."),
        ("0", r"^animals has no class '0'\."),
    ],
)
def test_empty_positions_are_refused(position: str, message: str, home: Path) -> None:
    for key in ("classes", "exclude"):
        with pytest.raises(InputError, match=message):
            read(home, **{key: (position,)})


def test_positions_follow_the_label_order_and_names_take_precedence(tmp_path: Path) -> None:
    for name in ("10", "9", "0:2", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    everything = read(tmp_path).classes
    assert everything == ("0:2", "9", "10", "b")
    assert read(tmp_path, classes=("1:3",)).classes == ("9", "10")
    assert read(tmp_path, classes=("0:2", "b")).classes == (
        "0:2",
        "b",
    )  # the class with this name, not a range of two classes


def test_fingerprint_depends_on_the_content(home: Path, tmp_path: Path) -> None:
    def copy(name: str, old: str = "", new: str = "") -> str:
        for split in ("train", "test"):
            for path in home.rglob("*.png"):
                target = tmp_path / name / split / str(path.relative_to(home)).replace(old, new)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        return read(tmp_path / name).fingerprint

    original = copy("original")
    assert copy("renamed files", ".png", ".PNG") == original
    assert copy("renamed class", "ant/", "auk/") != original
    assert copy("another label", "bee/00", "ant/99") != original  # the same images in the same order
    Image.new("RGB", (4, 4), "white").save(tmp_path / "original/test/cow/03.png")
    assert read(tmp_path / "original").fingerprint != original


def test_dataset_is_frozen(home: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        read(home).name = "x"
