"""The published layout of Tiny-ImageNet, where a table gives the class of each test image."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from ssd_edge.config import DataConfig
from ssd_edge.data import Dataset, load
from ssd_edge.errors import InputError
from ssd_edge.images import Pixels

WNIDS = ("n02124075", "n01443537", "n04067472")  # unsorted, as in wnids.txt
TABLE = "".join(f"val_{number}.JPEG\t{WNIDS[number % 3]}\t0\t32\t44\t62\n" for number in range(6))


def jpeg(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8), 20 * value).save(stream, "JPEG")
    return stream.getvalue()


def content(table: str | None = TABLE) -> dict[str, bytes]:
    """Return three classes with four training images each, six test images and two without labels."""
    entries = {"wnids.txt": "\n".join(WNIDS).encode(), "words.txt": b"n02124075\tEgyptian cat\n"}
    for kind, wnid in enumerate(WNIDS):
        entries[f"train/{wnid}/{wnid}_boxes.txt"] = b"n_0.JPEG\t0\t10\t63\t58\n"
        entries |= {f"train/{wnid}/images/{wnid}_{number}.JPEG": jpeg(kind) for number in range(4)}
    entries |= {f"val/images/val_{number}.JPEG": jpeg(number) for number in range(6)}
    entries |= {f"test/images/test_{number}.JPEG": jpeg(9) for number in range(2)}
    return entries if table is None else {**entries, "val/val_annotations.txt": table.encode()}


def save(members: dict[str, bytes], path: Path, prefix: str = "") -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(prefix + name, data)
    elif path.suffix == ".tar":
        with tarfile.open(path, "w") as archive:
            for name, data in members.items():
                member = tarfile.TarInfo(prefix + name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    else:
        for name, data in members.items():
            (path / (prefix + name)).parent.mkdir(parents=True, exist_ok=True)
            (path / (prefix + name)).write_bytes(data)
    return path


def read(path: Path, **settings: object) -> Dataset:
    return load(DataConfig(path=str(path), **settings), 0)


@pytest.mark.parametrize("prefix", ["", "tiny-imagenet-200/"])
@pytest.mark.parametrize("form", ["folder", "a.zip", "a.tar"])
def test_the_official_layout(form: str, prefix: str, tmp_path: Path) -> None:
    data = read(save(content(), tmp_path / form, prefix))
    assert data.classes == ("n01443537", "n02124075", "n04067472")
    assert (len(data.train), len(data.test)) == (12, 6)
    assert data.split == "the data's own train/ and val/"
    label = {wnid: data.classes.index(wnid) for wnid in WNIDS}
    for images, labels, truth in (
        (data.train, data.train_labels, lambda name: name.rsplit("/", 1)[1].split("_")[0]),
        (data.test, data.test_labels, lambda name: WNIDS[int(name.split("val_")[1][0]) % 3]),
    ):
        assert labels.tolist() == [label[truth(name)] for name in images.names]
    shown = data.test.load(range(6), Pixels(8))[:, 0, 0, 0].tolist()
    assert shown == [20 * int(name.split("val_")[1][0]) for name in data.test.names]
    assert data.test.names[0].endswith(f"{prefix}val/images/val_1.JPEG")
    assert data.fingerprint == read(save(content(), tmp_path / "b")).fingerprint


def test_half_of_the_classes(tmp_path: Path) -> None:
    home = save(content(), tmp_path)
    one, two = read(home, classes=("0:2",)), read(home, classes=("2:", "0:1"))
    assert one.classes == ("n01443537", "n02124075")
    assert two.classes == ("n01443537", "n04067472")
    assert (len(one.test), len(two.test)) == (4, 4)


def test_the_table_is_ignored_where_test_images_are_sorted_into_folders(tmp_path: Path) -> None:
    members = {name: data for name, data in content().items() if not name.startswith(("val/images", "test"))}
    members |= {f"val/{wnid}/images/val_0.JPEG": jpeg(kind) for kind, wnid in enumerate(WNIDS)}
    for form in ("folder", "a.zip"):
        assert len(read(save(members, tmp_path / form)).test) == 3


@pytest.mark.parametrize("form", ["folder", "a.zip"])
@pytest.mark.parametrize(
    ("table", "message"),
    [
        (TABLE.replace("val_3.JPEG", "val_9.JPEG"), r"does not say of which class val/images/val_3\.JPEG is"),
        (TABLE + "val_6.JPEG\tn02124075\n", r"names val_6\.JPEG, but there is no val/images/val_6\.JPEG"),
        (TABLE.replace("n04067472", "n00000001"), r"says that val_2\.JPEG is of the class 'n00000001', but there is"),
        (TABLE + "val_0.JPEG\tn02124075\n", r"line 7, must give an image and its class, each image once, but is 'val"),
        (TABLE + "\nrubbish\n", r"line 8, must give an image and its class, each image once, but is 'rubbish'"),
        ("", r"does not say of which class val/images/val_0\.JPEG is"),
    ],
)
def test_invalid_tables_are_refused(table: str, message: str, form: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"val/val_annotations\.txt,? {message}"):
        read(save(content(table), tmp_path / form))


def test_blank_lines_and_windows_line_ends(tmp_path: Path) -> None:
    assert len(read(save(content(TABLE.replace("\n", "\r\n") + "\r\n"), tmp_path)).test) == 6
