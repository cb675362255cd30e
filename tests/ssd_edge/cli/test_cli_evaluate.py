"""`ssd-edge evaluate`: runs, bundles and devices, in percent, and their reports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from device_runtime.device import Device
from ssd_edge import files
from ssd_edge.cli.evaluate import evaluate
from ssd_edge.errors import InputError


def run(*words: str | Path) -> str:
    """Return what the verb prints on standard output."""
    return CliRunner().invoke(evaluate, [str(word) for word in words], catch_exceptions=False).stdout


@pytest.fixture(scope="module")
def photographs(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Test images of the classes that `trained` has learned, without a split."""
    folder = tmp_path_factory.mktemp("photographs")
    for kind in ("circle", "cross", "square", "stripes"):
        shutil.copytree(shapes / "test" / kind, folder / kind)
    return folder


def test_a_run_in_percent_and_its_report(trained: Path, tmp_path: Path) -> None:
    metrics, page = files.read_json(trained / "metrics.json"), tmp_path / "page.html"
    lines = run(trained, "--report", page).splitlines()
    worst = min(metrics["class_accuracy"].values())
    assert lines[0].startswith(f"{100 * worst:5.1f} %  ")
    assert lines[0].endswith("(15 images)")
    assert lines[-2].endswith(f"% all 60 images of shapes ({metrics['split']})".replace("% all", "%  all"))
    assert lines[-1] == f"report: {page}"
    source = page.read_text()
    assert "of the test images are named correctly" in source
    assert "Compared with other learners" in source  # its stream and its comparison, as in its own report
    assert source.count("<image ") >= 4


def test_a_report_without_the_images(trained: Path, shapes: Path, tmp_path: Path) -> None:
    folder, page = tmp_path / "run", tmp_path / "page.html"
    shutil.copytree(trained, folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(str(shapes), str(tmp_path / "gone")))
    with pytest.raises(InputError, match="there is no data set at"):
        run(folder)
    own = json.loads(run(folder, "--report", page, "--json"))
    assert own["class_accuracy"] == files.read_json(trained / "metrics.json")["class_accuracy"]
    source = page.read_text()
    assert "Without photographs: there is no data set at" in source
    assert "<image " not in source


def test_a_device_and_a_bundle_answer_alike(bundle: Path, installed: Path, photographs: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    on_device = json.loads(run(installed, photographs, "--json", "--report", page))
    of_bundle = json.loads(run(bundle, photographs, "--json"))
    for key in ("images", "which", "accuracy", "class_accuracy"):
        assert on_device[key] == of_bundle[key]
    assert (on_device["images"], on_device["which"]) == (60, "all images")
    paths = [path for name in ("circle", "cross") for path in sorted((photographs / name).iterdir())]
    with Device.open(installed) as device:
        found = [prediction.nearest for prediction in device.predict(paths)]
    right = [name == path.parent.name for name, path in zip(found, paths, strict=True)]
    assert sum(on_device["class_accuracy"][name] for name in ("circle", "cross")) == pytest.approx(sum(right) / 15)
    source = page.read_text()
    assert "generation 1 on photographs" in source
    assert "had not seen before" not in source  # nobody knows what a device was taught
    assert source.count("<image ") >= 4


def test_refusals(bundle: Path, trained: Path, shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no images of its own; name a folder"):
        run(bundle)
    with pytest.raises(InputError, match="the device did not learn triangle"):
        run(bundle, shapes)
    with pytest.raises(InputError, match="the run did not learn triangle"):
        run(trained, shapes)
    with pytest.raises(InputError, match="only settings of the section data"):
        run(trained, "learner.name=ncm")
    with pytest.raises(InputError, match="neither of the form"):
        run(trained, tmp_path / "none")
