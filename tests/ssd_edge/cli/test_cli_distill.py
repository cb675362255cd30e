"""`ssd-edge distill`: from photographs to a backbone that is trained with and deployed, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TINY = ("--teacher", "tiny", "--size", "16", "--epochs", "1", "train.batch=50")


@pytest.fixture(scope="module")
def distilled(shapes: Path, cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distilled") / "small"
    result = cli("distill", shapes / "train" / "circle", *TINY, "-o", folder, "--json")
    said = json.loads(result.stdout)
    assert (said["photographs"], said["size"], said["epochs"]) == (40, 16, 1)
    assert "research use only" in said["terms"]
    assert "epoch 1/1" in result.stderr
    return folder


def test_a_student_is_trained_with_and_deployed(distilled: Path, shapes: Path, cli, tmp_path: Path) -> None:
    cli("train", shapes, f"backbone=package:{distilled}", "--no-panel", f"run.out={tmp_path}")
    backbone = json.loads((tmp_path / "1" / "backbone.json").read_text())
    assert backbone["identity"] == json.loads((distilled / "backbone.json").read_text())["identity"]
    assert backbone["provenance"]["teachers"][0]["name"] == "tiny"
    distilled.rename(distilled.parent / "moved")  # the run keeps its backbone
    done = cli("deploy", "--target", "cpu", tmp_path / "1", "-o", tmp_path / "shop.ssdedge", "--precision", "fp32")
    (distilled.parent / "moved").rename(distilled)
    assert (tmp_path / "shop.ssdedge").exists(), done.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--specialist", "nowhere"], "nowhere does not exist"),
        (["--minutes", "1"], "--epochs is 1 and --minutes is 1; leave one of them out"),
        (["--student", "resnet10"], "'resnet10' is no network that can be trained here"),
        (["--teacher", "lite9"], "unknown backbone 'lite9'"),
        (["train.temprature=2"], "unknown key 'train.temprature'. Did you mean 'temperature'?"),
        (["--size", "4000"], "train.size must be at most"),
    ],
)
def test_mistakes_are_refused(more: list[str], message: str, shapes: Path, refused, tmp_path: Path) -> None:
    assert message in refused("distill", shapes, *TINY, "-o", tmp_path / "out", *more, code=2)


def test_an_existing_folder_is_not_replaced(shapes: Path, refused, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    assert "exists already and is not replaced" in refused("distill", shapes, *TINY, "-o", tmp_path, code=2)
    assert (tmp_path / "kept").read_text() == "mine"


def test_photographs_are_checked_first(shapes: Path, refused, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in sorted((shapes / "train" / "circle").iterdir())[:4]:
        (photos / path.name).write_bytes(path.read_bytes())
    mistake = ("distill", photos, *TINY, "-o", tmp_path / "o")
    assert "photos has 4 photographs, but at least 16" in refused(*mistake, code=2)
    (photos / "bad.jpg").write_bytes(b"no image")
    assert "bad.jpg" in refused(*mistake, code=2)
    assert not (tmp_path / "o").exists()
