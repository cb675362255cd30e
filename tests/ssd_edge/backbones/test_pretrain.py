"""End-to-end tests of pretraining on small data and of the backbone package that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ssd_edge.backbones import package as packages
from ssd_edge.backbones.embedder import TorchEmbedder, network
from ssd_edge.backbones.networks import ARCHITECTURES
from ssd_edge.backbones.supervised import Moves, augment, draw, normalise
from ssd_edge.cli.pretrain import pretrain
from ssd_edge.data import Dataset
from ssd_edge.errors import BundleRefusedError, InputError

TINY = ("train.epochs=2", "train.batch=32", "train.lr=0.05", "student.neurons=64", "student.epochs=2")


@pytest.fixture(scope="module")
def pretrained(shapes: Path, cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package") / "mine"
    result = cli("pretrain", folder, f"data.path={shapes}", *TINY, "train.terms=drawn by the tests")
    assert "epoch 2/2" in result.stderr
    return folder


def test_package_contents_and_card(pretrained: Path) -> None:
    card = json.loads((pretrained / "card.json").read_text())
    assert card["arch"] == "resnet9"
    assert card["terms"] == "drawn by the tests"
    assert card["command"].startswith("ssd-edge pretrain")
    assert card["config"]["epochs"] == 2
    assert 0 <= card["accuracy"]["top1"] <= 1
    package = packages.load(pretrained)
    assert package.priors.keys.shape == (64, 256)
    assert (package.priors.keys >= 0).all()
    assert package.priors.count == 200


def test_embeddings_of_the_pretraining_data_are_standardised(pretrained: Path, shapes: Path) -> None:
    from ssd_edge.config import DataConfig
    from ssd_edge.data import load

    package = packages.load(pretrained)
    embedder = TorchEmbedder(package, torch.device("cpu"))
    images = load(DataConfig(path=str(shapes)), 0).train
    z = embedder.embed(images.load(np.arange(len(images)), embedder.pixels))
    assert z.dtype == np.float32
    varying = package.sigma > 1.01e-3 * package.sigma.max()  # the deviation of the others is clipped to a floor
    assert varying.sum() > 100
    assert np.abs(z.mean(0)).max() < 0.02
    assert np.abs(z.std(0)[varying] - 1).max() < 0.02


def test_student_option_retrains_only_the_keys(pretrained: Path, shapes: Path, cli, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(pretrained, tmp_path / "copy"))
    cli("pretrain", folder, "--student", f"data.path={shapes}", "student.neurons=32", "student.epochs=1")
    old, new = packages.load(pretrained), packages.load(folder)
    assert new.identity == old.identity
    assert new.priors.keys.shape == (32, 256)
    assert new.priors.student["neurons"] == 32


def test_a_run_uses_the_package(pretrained: Path, shapes: Path, cli, tmp_path: Path) -> None:
    cli(
        "train", f"data.path={shapes}", f"backbone=package:{pretrained}",
        "run.panel=false", "run.baselines=false", f"run.out={tmp_path}",
    )  # fmt: skip
    backbone = json.loads((tmp_path / "1" / "backbone.json").read_text())
    assert backbone["identity"] == packages.load(pretrained).identity


def test_a_damaged_package_is_refused(pretrained: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(pretrained, tmp_path / "copy"))
    (folder / "card.json").unlink()
    with pytest.raises(InputError, match=r"card\.json missing"):
        packages.load(folder)
    package = packages.load(pretrained)
    package.weights.pop("last.0.weight")
    with pytest.raises(BundleRefusedError, match=r"missing \['last.0.weight'\]"):
        network(package)


def test_pretrain_needs_data(cli, tmp_path: Path) -> None:
    assert "data.path=FOLDER" in cli("pretrain", tmp_path / "x", code=2).stderr
    assert (
        "--student needs an existing backbone package"
        in cli("pretrain", tmp_path / "x", "--student", "data.path=digits", code=2).stderr
    )
    assert not (tmp_path / "x").exists()


def test_pretrain_on_some_classes(pretrained: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def stand_in(package: object, config: object, dataset: Dataset, *_: object) -> None:
        used.append(dataset.classes)
        raise InputError("stopped by the test")

    monkeypatch.setattr("ssd_edge.backbones.pretrain.retrain_student", stand_in)
    monkeypatch.setattr("ssd_edge.run.train.set_threads", lambda count: None)
    args = [str(pretrained), "--student", f"data.path={shapes}"]
    for more, message in (
        (["--classes", "0:2"], "stopped by the test"),
        (["--classes", "cross,3:"], "stopped by the test"),
        (["--classes", "0:9"], "the positions '0:9' reach beyond the 5 classes of"),
        (["--classes", "0:2", "data.classes=1:3"], "--classes is 0:2, but data.classes is 1:3; leave one"),
    ):
        done = CliRunner().invoke(pretrain, [*args, *more])
        assert isinstance(done.exception, InputError)
        assert message in str(done.exception)
    assert used == [("circle", "cross"), ("cross", "stripes", "triangle")]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_architectures_give_256_features(name: str) -> None:
    body = ARCHITECTURES[name]()
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    assert body(normalise(images)).shape == (4, 256)
    body.eval()
    batched, single = body(normalise(images)), body(normalise(images[:1]))
    assert torch.allclose(batched[:1], single, atol=1e-4)


def test_augmentation_moves_flips_and_keeps_pixels() -> None:
    ramp = torch.arange(64.0).view(1, 1, 8, 8).repeat(200, 3, 1, 1)

    def drawn(seed: int, crop: int, cutout: int) -> Moves:
        return draw(len(ramp), (8, 8), crop, cutout, torch.Generator().manual_seed(seed))

    moved = augment(ramp, 2, 0, moves := drawn(0, 2, 0))
    assert moved.shape == ramp.shape
    assert set(moved.unique().tolist()) <= set(range(64))
    rising = moved[:, 0, 4, 4] < moved[:, 0, 4, 5]
    assert 40 < int(rising.sum()) < 160  # about half are flipped
    assert torch.equal(~rising, moves.flip)
    same = augment(ramp, 0, 0, drawn(1, 0, 0))
    assert all(torch.equal(each, ramp[0]) or torch.equal(each, ramp[0].flip(-1)) for each in same)
    holes = augment(ramp + 1, 0, 4, drawn(2, 0, 4))
    assert (holes == 0).any()
    part = Moves(*(each[50:90] for each in moves))
    assert torch.equal(augment(ramp[50:90], 2, 0, part), moved[50:90])


def test_the_shipped_package_is_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in packages.SHIPPED.iterdir()}
    assert sizes["backbone.safetensors"] <= 6_000_000
    assert sum(sizes.values()) <= 10_000_000
    package = packages.load()
    assert package.priors.keys.shape == (1000, package.card["dim"])
    assert package.priors.counters.shape == (1000,)
    assert package.priors.within_covariance.shape == (package.card["dim"],) * 2
    assert package.priors.count > 0
    for key in ("data", "terms", "command", "seed", "accuracy"):
        assert package.card[key] or package.card[key] == 0
