"""Every file of a data set is accounted for: bad ones are named at once, others are counted."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssd_edge.config import DataConfig
from ssd_edge.data import Dataset, load
from ssd_edge.errors import BadFilesError, InputError

NOISE = np.random.default_rng(0)


def png() -> bytes:
    """Return an image that differs from all others."""
    stream = io.BytesIO()
    Image.fromarray(NOISE.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def fill(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png())
    return root


def classes(count: int = 5, top: str = "") -> list[str]:
    return [f"{top}{name}/{number}.png" for name in "ab" for number in range(count)]


def read(root: Path, **settings: object) -> Dataset:
    return load(DataConfig(path=str(root), **settings), 0)


def spoil(root: Path) -> list[str]:
    """Add one bad file of each kind; return what is said of each."""
    (root / "a" / "clip.MP4").write_bytes(b"\0")
    (root / "b" / "raw.nef").write_bytes(b"\0")
    (root / "a" / "cut.png").write_bytes(png()[:60])
    (root / "b" / "empty.jpg").touch()
    (root / "b" / "gone.png").symlink_to(root / "nowhere")
    return [
        "clip.MP4 is a video; take",
        "raw.nef is a picture of a kind",
        "cut.png is",
        "empty.jpg is e",
        "gone.png does",
    ]


def test_all_bad_files_are_named_at_once(tmp_path: Path) -> None:
    said = spoil(fill(tmp_path, *classes()))
    with pytest.raises(
        BadFilesError, match=r"^5 of 15 files cannot be used: .*; and 2 more\. To go on .*: --skip-bad"
    ) as bad:
        read(tmp_path)
    assert len(bad.value.problems) == 5
    assert all(any(f"/{text}" in problem for problem in bad.value.problems) for text in said)
    for name in ("a/clip.MP4", "b/raw.nef"):
        (tmp_path / name).unlink()
    with pytest.raises(BadFilesError, match=r"^3 of 13"):  # the broken link cannot be read
        read(tmp_path)
    (tmp_path / "b/gone.png").unlink()
    data = read(tmp_path)  # what is damaged shows when it is decoded
    with pytest.raises(
        BadFilesError, match=r"^2 of 12 files cannot be used: .*/a/cut\.png is corrupt .*; .*/b/empty\.jpg is empty"
    ):
        data.check()


def test_skip_bad_goes_on_without_them(tmp_path: Path) -> None:
    clean = read(fill(tmp_path, *classes()))
    said = spoil(tmp_path)
    data = read(tmp_path, skip_bad=True)
    assert data.fingerprint == clean.fingerprint
    assert data.train.names == clean.train.names
    assert len(data.accounts.skipped) == 5
    assert all(any(f"/{text}" in problem for problem in data.accounts.skipped) for text in said)
    assert "5 files left out, as they cannot be used: " in data.accounts.warnings()[0]
    for number in range(5):
        (tmp_path / "b" / f"{number}.png").write_bytes(b"")
    with pytest.raises(InputError, match="'b' has no usable image"):
        read(tmp_path, skip_bad=True)


def test_other_files_are_counted(tmp_path: Path) -> None:
    fill(tmp_path, *classes(), "loose.jpg", "a/.hidden.png", ".git/x.png", "__MACOSX/a/1.png", "a/Thumbs.db")
    fill(tmp_path, "a/notes.txt", "b/list.TXT", "b/data.xml", "b/README")
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    accounts = read(tmp_path).accounts
    assert accounts.outside == (str(tmp_path / "loose.jpg"),)
    assert accounts.empty == ("empty",)
    assert accounts.junk == 4
    assert dict(accounts.others) == {".txt": 2, "": 1, ".xml": 1}
    assert accounts.ignored() == "4 other files (.txt 2, no ending 1, .xml 1) and 4 hidden or system files"
    assert [text.split(":")[0] for text in accounts.warnings()] == [
        "1 image outside any class folder, not used",
        "1 class folder without images",
    ]
    assert accounts.to_dict()["warnings"] == accounts.warnings()


def test_nothing_is_said_of_a_clean_folder(tmp_path: Path) -> None:
    accounts = read(fill(tmp_path, *classes(top="train/"), *classes(top="test/"))).accounts
    assert (accounts.warnings(), accounts.ignored()) == ([], "")


def test_identical_files_are_named(tmp_path: Path) -> None:
    fill(tmp_path, *classes(top="train/"), *classes(top="test/"))
    first = (tmp_path / "train/a/0.png").read_bytes()
    for copy in ("train/a/9.png", "train/b/9.png", "test/b/9.png"):
        (tmp_path / copy).write_bytes(first)
    accounts = read(tmp_path).accounts
    assert [[str(Path(name).relative_to(tmp_path)) for name in group] for group in accounts.identical] == [
        ["train/a/0.png", "train/a/9.png", "train/b/9.png", "test/b/9.png"]
    ]
    assert accounts.alike == ((str(tmp_path / "train/a/0.png"), str(tmp_path / "test/b/9.png")),)
    alike, copies = accounts.warnings()
    assert alike.startswith("1 test image identical to training images, so that accuracy is overstated: ")
    assert copies.startswith("3 copies of other files: ")


def test_repeated_members_of_an_archive_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("photos/", "photos/leer/", "photos/.git/"):
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE
            archive.addfile(member)
        for name in [*classes(top="photos/"), "photos/a/1.png", "photos/a/._1.png", "photos/a/x.txt"]:
            data = png()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    data = read(path)
    assert len(data.train) + len(data.test) == 10
    assert data.accounts.repeated == ("a.tar: photos/a/1.png",)
    assert (data.accounts.empty, data.accounts.junk, data.accounts.others) == (("leer",), 1, ((".txt", 1),))
    assert data.accounts.warnings()[1].startswith("1 file of the archive replaced by later ones of the same name")


@pytest.mark.parametrize("outer", ["photos/", "my/own photos/", "photos/train/"])
def test_outer_folders_are_left_aside(outer: str, tmp_path: Path) -> None:
    data = read(fill(tmp_path, *classes(top=outer)))
    assert (data.classes, data.own_split) == (("a", "b"), False)
    split = read(fill(tmp_path / "x", *classes(top=f"{outer}train/"), *classes(top=f"{outer}val/")))
    assert (split.classes, len(split.test), split.own_split) == (("a", "b"), 10, True)


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/train/1.jpg", "labels/train/1.txt"),
        ("images/1.jpg", "labels/1.txt"),
        ("train/images/1.jpg", "train/labels/1.txt"),
        ("set/valid/images/1.jpg", "set/valid/labels/1.txt"),
    ],
)
def test_boxes_in_the_layout_of_yolo_are_refused(image: str, label: str, tmp_path: Path) -> None:
    fill(tmp_path, image, label, "data.yaml", *classes())
    with pytest.raises(
        InputError, match=rf"has YOLO's layout of boxes: {image} with {label}\. Here, .*cut out the boxes"
    ):
        read(tmp_path)


def test_classes_may_be_called_images_and_labels(tmp_path: Path) -> None:
    assert read(
        fill(tmp_path, "images/1.jpg", "images/2.jpg", "labels/1.jpg", "labels/2.jpg", "labels/notes.txt")
    ).classes


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("1.png", "name the folder that contains a folder of"),
        ("my.yaml", "read with: --config"),
        ("a.rar", "unpack it"),
    ],
)
def test_other_files_are_refused_with_advice(name: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"is not a data set: .*{hint}"):
        read(fill(tmp_path, name) / name)


def test_a_mistyped_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no data set at .*photo; check data.path.* Did you mean 'photos'\?"):
        read(fill(tmp_path, "photos/a/1.png") / "photo")


def test_images_without_class_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no class with images; .*\(2 images in no folder; 1 file of kinds that"):
        read(fill(tmp_path, "1.png", "2.png", "3.mov"))
