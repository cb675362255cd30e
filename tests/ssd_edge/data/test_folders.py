"""Image folders: layouts, splits, skipped files and errors."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from ssd_edge.config import DataConfig
from ssd_edge.data import load, photographs
from ssd_edge.errors import BadFilesError, InputError
from ssd_edge.images import Pixels


def fill(root: Path, *names: str) -> Path:
    """Write single-colour images, each of a different colour."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4), (number, 0, 0)).save(path, "PNG")
    return root


def names(images: object, root: Path) -> list[str]:
    return [str(Path(name).relative_to(root)) for name in images.names]


def read(root: Path, **settings: object) -> object:
    return load(DataConfig(path=str(root), **settings), 0)


def test_split_folder(tmp_path: Path) -> None:
    fill(tmp_path, "train/cat/b.png", "train/cat/a.png", "train/dog/deep/er/x.PNG")
    fill(tmp_path, "test/dog/1.png", "test/cat/2.png")
    data = read(tmp_path)
    assert data.name == tmp_path.name
    assert data.classes == ("cat", "dog")
    assert names(data.train, tmp_path) == ["train/cat/a.png", "train/cat/b.png", "train/dog/deep/er/x.PNG"]
    assert data.train_labels.tolist() == [0, 0, 1]
    assert data.test_labels.tolist() == [0, 1]
    assert data.split == "the data's own train/ and test/"
    assert data.train.load([2, 0], Pixels(3))[:, 0, 0, 0].tolist() == [2, 1]


@pytest.mark.parametrize("test", ["val", "valid", "Validation", "TEST"])
def test_other_names_for_the_test_split(test: str, tmp_path: Path) -> None:
    fill(tmp_path, "Train/a/1.png", "Train/b/1.png", f"{test}/a/1.png", f"{test}/b/1.png")
    assert read(tmp_path).split == f"the data's own Train/ and {test}/"


def test_a_second_test_split_is_ignored_and_reported(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{split}/{name}/1.png" for split in ("train", "val", "test", "docs") for name in "ab"))
    assert read(tmp_path).split == "the data's own train/ and test/, not its docs/, val/"


def test_unsplit_folder(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{name}/{number}.png" for name in "ab" for number in range(5)))
    data = read(tmp_path, test_fraction=0.4)
    assert (len(data.train), len(data.test)) == (6, 4)
    assert data.split == "a seeded 40 % of each class held out"
    only_train = fill(tmp_path / "x", *(f"train/{name}/{number}.png" for name in "ab" for number in range(5)))
    assert len(read(only_train).train) == 8


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{name}/{number}.png" for name in ("bus", "train") for number in range(5)))
    assert read(tmp_path).classes == ("bus", "train")
    fill(tmp_path, *(f"test/{number}.png" for number in range(5)))
    assert read(tmp_path).classes == ("bus", "test", "train")


def test_skipped_files(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{name}/{number}.png" for name in "ab" for number in range(2)))
    fill(tmp_path, "preview.png", ".cache/1.png", "a/.thumb.png")
    (tmp_path / "labels.txt").write_text("a\nb\n")
    (tmp_path / "a" / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "a" / "notes.md").write_text("x")
    data = read(tmp_path)
    assert (data.classes, len(data.train), len(data.test)) == (("a", "b"), 2, 2)


def test_unicode_and_natural_order(tmp_path: Path) -> None:
    names = ["10", "9", "Äpfel", "犬", "a2b"]  # macOS stores names in decomposed form
    fill(tmp_path, *(f"train/{name}/1.png" for name in names))
    fill(tmp_path, *(f"test/{unicodedata.normalize('NFD', name)}/1.png" for name in names))
    data = read(tmp_path)
    assert data.classes == ("9", "10", "a2b", "Äpfel", "犬")
    assert sorted(data.test_labels.tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ([], r"contains no class with images; expected train/<class>/… and test/<class>/…, or <class>/… alone"),
        (["1.png", "2.png"], r"contains no class with images"),
        (["cat/1.png", "cat/2.png"], r"at least two classes are needed, but .* has only one \('cat'\)$"),
        (["a/1.png", "a/2.png", "b/1.png"], r"the class 'b' has only one image, but one to train and one to"),
        (["train/a/1.png", "train/b/1.png", "test/a/1.png"], r"has no test images of 'b'; add some, or"),
        (["train/a/1.png", "test/a/1.png", "test/b/1.png"], r"has no training images of 'b'"),
        ([*(f"train/{n}/1.png" for n in range(9)), "test/8/1.png"], r"'0', '1', '2', '3', '4' and 3 more;"),
        (["a/1.png", "a/2.png", "unknown/1.png", "unknown/2.png"], r"class name 'unknown' is reserved"),
    ],
)
def test_invalid_layouts_are_refused(layout: list[str], message: str, tmp_path: Path) -> None:
    fill(tmp_path, *layout)
    with pytest.raises(InputError, match=message):
        read(tmp_path)


def test_a_class_without_test_images_can_be_excluded(tmp_path: Path) -> None:
    fill(tmp_path, *(f"train/{name}/1.png" for name in "abc"), "test/a/1.png", "test/b/1.png")
    assert read(tmp_path, exclude=("c",)).classes == ("a", "b")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", r"is empty \(0 bytes\)"), (b"text", "is not a JPEG, PNG, WebP, BMP, GIF or TIFF"), (None, "does not exist")],
)
def test_errors_name_the_image_that_cannot_be_decoded(content: bytes | None, message: str, tmp_path: Path) -> None:
    tops = ["train/a", "train/b", "test/a", "test/b"]
    fill(tmp_path, *(f"{top}/{number}.png" for top in tops for number in range(80)))
    data = read(tmp_path)
    for number in ("7", "70"):
        bad = tmp_path / f"train/b/{number}.png"
        bad.unlink()
        if content is not None:
            bad.write_bytes(content)
    # the first one in order, regardless of thread timing
    with pytest.raises(InputError, match=rf"train/b/7\.png {message}"):
        list(data.train.batches(Pixels(4), 200))
    assert sum(len(batch) for batch in data.test.batches(Pixels(4))) == 160


def test_a_broken_link_is_reported(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{name}/{number}.png" for name in "ab" for number in range(2)))
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match=r"a/gone\.png does not exist"):
        read(tmp_path)


def test_photographs_without_labels(tmp_path: Path) -> None:
    """All images of a folder of images, the training images of a data set."""
    flat = fill(tmp_path / "flat", "2.png", "1.png", "more/3.png", "test/4.png")
    name, images, skipped = photographs(str(flat), False)
    assert (name, names(images, flat), skipped) == ("flat", ["1.png", "2.png", "more/3.png", "test/4.png"], ())
    split = fill(tmp_path / "split", "train/cat/a.png", "train/dog/b.png", "test/cat/c.png", "test/dog/d.png")
    assert names(photographs(str(split), False)[1], split) == ["train/cat/a.png", "train/dog/b.png"]
    one = fill(tmp_path / "one", "cat/a.png", "cat/b.png")  # no labels, so one class is enough
    assert len(photographs(str(one), False)[1]) == 2
    (flat / "bad.jpg").write_bytes(b"no image")
    (flat / "film.mp4").write_bytes(b"")
    with pytest.raises(BadFilesError, match=r"(?s)bad\.jpg.*film\.mp4"):
        photographs(str(flat), False)
    _, images, skipped = photographs(str(flat), True)
    assert (len(images), len(skipped)) == (4, 2)
    with pytest.raises(InputError, match="there is no data set at"):
        photographs(str(tmp_path / "nowhere"), False)
