"""`ssd-edge data check`: what it finds, what it prints, and its page of pictures."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageEnhance

from ssd_edge.cli.data import check as command
from ssd_edge.data import check as data_check
from ssd_edge.data.check import check
from ssd_edge.errors import BadFilesError, InputError
from ssd_edge.report import pictures

SCENE = np.random.default_rng(0)


def scene() -> Image.Image:
    """Return a picture of coarse patches, which differs from all others."""
    coarse = SCENE.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((180, 120), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for split, count in (("train", 12), ("test", 4)):
        for name in ("gear", "nut"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                scene().save(root / split / name / f"{number}.png")
    return root


def again(image: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


def test_a_clean_folder(folder: Path) -> None:
    found = check(str(folder)).result
    assert [(one.name, one.train, one.test) for one in found.classes] == [("gear", 12, 4), ("nut", 12, 4)]
    assert (found.formats, found.sizes) == ({"PNG": 32}, ((180, 120),) * 3)
    assert (found.bad, found.warnings(), found.split) == (False, [], "the data's own train/ and test/")


@pytest.mark.parametrize(
    "change",
    [
        lambda image: again(image, quality=30),
        lambda image: again(image.resize((90, 60))),
        lambda image: again(ImageEnhance.Brightness(image).enhance(0.8)),
        lambda image: again(ImageEnhance.Contrast(image).enhance(0.8)),
    ],
    ids=["jpeg", "half", "darker", "contrast"],
)
def test_nearly_identical_images_are_named(folder: Path, change: Callable[[Image.Image], bytes]) -> None:
    original = Image.open(folder / "train/gear/3.png")
    (folder / "test/nut/copy.jpg").write_bytes(change(original))
    (folder / "train/nut/copy.jpg").write_bytes(change(original))
    found = check(str(folder)).result
    assert ("train/gear/3.png", "test/nut/copy.jpg") in [relative(folder, pair) for pair in found.leaked] or (
        "train/nut/copy.jpg",
        "test/nut/copy.jpg",
    ) in [relative(folder, pair) for pair in found.leaked]
    assert ("train/gear/3.png", "train/nut/copy.jpg") in [relative(folder, pair) for pair in found.similar]
    assert len(found.leaked) == 1
    assert not found.bad  # misleading, but usable


def relative(folder: Path, pair: tuple[str, str]) -> tuple[str, ...]:
    return tuple(str(Path(name).relative_to(folder)) for name in pair)


def test_small_images_are_not_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "test/nut/copy.png").write_bytes((folder / "train/gear/3.png").read_bytes())
    assert len(check(str(folder)).result.leaked) == 1
    for name in ("LEAST", "MOST_COMPARED"):
        with monkeypatch.context() as patch:
            patch.setattr(data_check, name, 121 if name == "LEAST" else 20)
            found = check(str(folder)).result
            assert (found.similar, found.leaked) == ((), ())
            assert found.warnings()[0].startswith("1 test image identical to training images")
            assert found.warnings()[-1].startswith("similar images were not looked for")


def test_blank_images_are_not_called_similar(folder: Path) -> None:
    for level in range(4):
        Image.new("RGB", (180, 120), (level, level, level)).save(folder / f"train/gear/blank{level}.png")
    assert check(str(folder)).result.similar == ()


def test_what_training_would_refuse(folder: Path) -> None:
    (folder / "train/gear/clip.mp4").touch()
    (folder / "train/gear/empty.jpg").touch()
    found = check(str(folder)).result
    assert (found.bad, len(found.problems), found.obstacle) == (True, 2, None)
    for path in (folder / "test/nut").iterdir():
        path.unlink()
    found = check(str(folder)).result
    assert "has no test images of 'nut'" in str(found.obstacle)
    assert [(one.name, one.train, one.test) for one in found.classes] == [("gear", 12, 4), ("nut", 12, 0)]
    with pytest.raises(InputError, match="there is no data set at"):
        check(str(folder / "nowhere"))


def test_the_command(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = CliRunner().invoke(command, [str(folder), "--html", str(page)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "photos: 32 images of 2 classes; the data's own train/ and test/" in done.stdout
    assert re.search(r"gear +12 +4\n", done.stdout)
    assert f"next:     ssd-edge train {folder}\n" in done.stdout
    text = page.read_text()
    assert text.count("<img ") == 32
    assert not re.search(r"(src|href)=\"(?!data:)", text)  # needs nothing else
    values = json.loads(CliRunner().invoke(command, [str(folder), "--json"]).stdout)
    assert (values["bad"], values["formats"], len(values["classes"])) == (False, {"PNG": 32}, 2)


def test_the_command_fails_if_something_is_bad(folder: Path, tmp_path: Path) -> None:
    for number in range(5):
        (folder / f"train/gear/empty{number}.jpg").touch()
    done = CliRunner().invoke(command, [str(folder), "--json"])
    assert isinstance(done.exception, BadFilesError)  # exit code 2
    assert len(json.loads(done.stdout)["problems"]) == 5
    assert f"ssd-edge train {folder} --skip-bad" in CliRunner().invoke(command, [str(folder)]).stdout


def test_bad_data_ends_with_exit_code_2(folder: Path, refused) -> None:
    (folder / "train/gear/empty.jpg").touch()
    assert "empty.jpg is empty" in refused("data", "check", folder, code=2)
    assert "there is no data set at" in refused("data", "check", folder / "x", code=2)


def test_the_page_stays_small_and_shows_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_BYTES", 60_000)
    by_class = {f"class <{number}>": [f"{number}/{image}" for image in range(100)] for number in range(20)}
    values = {
        "name": "many",
        "formats": {"JPEG": 2000},
        "split": "",
        "obstacle": None,
        "problems": ["<b> is empty"],
        "warnings": [],
        "leaked": [("0/1", "0/2")],
        "similar": [("0/1", "0/2"), ("0/3", "0/4")],
        "classes": [{"name": name, "train": 80, "test": 20} for name in by_class],
    }
    text = pictures.render(values, by_class, lambda name: bytes(600))
    assert len(text) < 60_000 + 40_000
    shown = [part.count("<img ") for part in text.split("class &lt;")[1:]]
    assert min(shown) >= 1
    assert max(shown) - min(shown) <= 1  # pictures go round
    assert text.index("training and test: 0/1 ~ 0/2") < text.index("0/3 ~ 0/4") < text.index("class &lt;")
    assert "<b>" not in text.replace("<body>", "")
