"""Tests of the choice of precision: requested, default of the target, or the fastest that passes the parity gate.

Conversion and measurement are replaced by stubs with known results; they have their own tests.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from exporters import ladder
from exporters.ladder import Samples, choose, samples
from ssd_edge import targets
from ssd_edge.errors import GateRefusedError, InputError
from ssd_edge.run import finished

PIXELS = np.zeros((4, 8, 8, 3), np.uint8)
BOTH = {"synthetic": (PIXELS, None), "test": (PIXELS, np.zeros(4, np.int64))}
JETSON, CPU = targets.get("jetson"), targets.get("cpu")


@pytest.fixture
def verdicts(monkeypatch):
    """Stub conversion and measurement, and return a function to set the failures of each precision.

    ``verdicts(int8=["too far"])`` makes int8 fail; it returns the list of recorded measurements.
    """
    failing: dict[str, list[str]] = {}
    measured: list[tuple[bytes, int]] = []

    def measure(onnx, reference, images, learner, rows):
        measured.append((onnx, len(reference(images))))
        return {"images": len(images), "min_cosine": 1.0, "max_difference": 0.0, "agreement": 1.0}

    monkeypatch.setattr(ladder.precision, "convert", lambda onnx, name, images: f"{name} of {onnx.decode()}".encode())
    monkeypatch.setattr(ladder.parity, "measure", measure)
    monkeypatch.setattr(ladder.parity, "failures", lambda report, name, answers_only=False: failing.get(name, []))
    monkeypatch.setattr(ladder.onnx_file, "precision", lambda onnx: native[0])
    native = ["fp32"]

    def set_up(original: str = "fp32", **failures: list[str]):
        native[0] = original
        failing.update(failures)
        return measured

    return set_up


def chosen(wanted: str = "", target=JETSON, judged=BOTH, calibration=PIXELS, lines=None):
    images = Samples(judged, calibration, "training images of the run")
    log = (lines if lines is not None else []).append
    return choose(b"graph", lambda pixels: np.zeros((len(pixels), 2)), None, images, target, wanted, log)


def test_default_precision_of_the_target(verdicts):
    verdicts()
    assert (chosen().precision, chosen(target=CPU).precision) == ("fp16", "fp32")
    assert chosen().onnx == b"fp16 of graph"


def test_each_kind_of_image_is_reported_and_logged(verdicts):
    lines, measured = [], verdicts()
    report = chosen("int8", lines=lines).report
    assert set(report) == {"precision", "calibration", "synthetic", "test"}
    assert report["calibration"]["images"] == 4
    assert report["calibration"]["source"] == "training images of the run"
    kinds = [f"{name} on 4 {kind} images" for name in ("fp32", "int8") for kind in ("synthetic", "test")]
    assert [line.split(":")[0] for line in lines] == kinds
    assert measured == [(b"fp32 of graph", 4)] * 2 + [(b"int8 of graph", 4)] * 2


def test_error_in_fp32_is_refused_for_every_precision(verdicts):
    verdicts(fp32=["red and blue swapped"])
    for wanted in ("", "int8", "auto"):
        with pytest.raises(GateRefusedError, match="in fp32 does not compute what the run computed: red and blue"):
            chosen(wanted)


def test_auto_chooses_the_fastest_that_passes_and_reports_the_refused(verdicts):
    verdicts(int8=["a cosine of 0.9"])
    choice = chosen("auto")
    assert choice.precision == "fp16"
    assert list(choice.report["refused"]) == ["int8"]
    assert "a cosine of 0.9 on test images" in choice.report["refused"]["int8"]
    verdicts(fp16=["too far"])
    assert chosen("auto").precision == "fp32"
    assert chosen("auto", target=CPU).precision == "fp32"


def test_auto_skips_int8_without_calibration_images(verdicts):
    verdicts()
    choice = chosen("auto", calibration="the run's data cannot be used (gone)")
    assert choice.precision == "fp16"
    assert "--calibration FOLDER" in choice.report["refused"]["int8"]


def test_refused_precision_suggests_one_that_passes(verdicts):
    verdicts(int8=["too far"])
    with pytest.raises(GateRefusedError, match=r"in int8 does not.* too far.*; --precision fp16 would pass; nothing"):
        chosen("int8")
    verdicts(fp16=["too far"], fp32=["too far"])
    with pytest.raises(GateRefusedError, match="no slower precision passes; nothing was written"):
        chosen("int8")
    with pytest.raises(GateRefusedError, match="no precision passes: the backbone in fp32"):
        chosen("auto")


def test_the_default_falls_back_to_a_slower_precision_and_says_so(verdicts):
    """int8 is not converted or measured unless asked for, and fp32 is measured once."""
    lines, measured = [], verdicts(fp16=["too far"])
    choice = chosen(lines=lines)
    assert choice.precision == "fp32"
    assert list(choice.report["refused"]) == ["fp16"]
    assert lines[-2:] == [
        "fp16: refused: the backbone in fp16 does not compute what the run computed: too far on test images",
        "the bundle is fp32 instead of fp16",
    ]
    assert [graph for graph, _ in measured] == [b"fp32 of graph"] * 2 + [b"fp16 of graph"] * 2
    with pytest.raises(GateRefusedError, match="--precision fp32 would pass"):  # one that was named is not replaced
        chosen("fp16")
    assert b"int8 of graph" not in [graph for graph, _ in measured]


def test_synthetic_images_decide_only_without_test_images_or_in_fp32(verdicts, monkeypatch):
    verdicts()
    noise, imprecise = {"synthetic": (np.ones((5, 8, 8, 3), np.uint8), None)}, ["fp16"]

    def failures(report, name):
        return ["too far"] if report["images"] == 5 and name in imprecise else []

    monkeypatch.setattr(ladder.parity, "failures", failures)
    assert chosen("fp16", judged={**noise, "test": (PIXELS, None)}).precision == "fp16"
    with pytest.raises(GateRefusedError, match="too far on synthetic images"):
        chosen("fp16", judged=noise)
    imprecise.append("fp32")
    with pytest.raises(GateRefusedError, match="too far on synthetic images"):  # not explained by rounding
        chosen("fp32", judged={**noise, "test": (PIXELS, None)})


def test_answers_on_enough_test_images_decide(verdicts, monkeypatch):
    verdicts()
    pixels, lines = np.ones((ladder.TESTED, 8, 8, 3), np.uint8), []

    def measure(graph, known, images, learner, rows):
        return {"images": len(images), "min_cosine": 1.0, "max_difference": 2.0, "accuracy": accuracy}

    def failures(report, name, answers_only=False):
        wrong = ["accuracy drops"] if report["accuracy"]["exported"] < 0.8 else []
        return wrong if answers_only or name == "fp32" else ["too far", *wrong]

    monkeypatch.setattr(ladder.parity, "measure", measure)
    monkeypatch.setattr(ladder.parity, "failures", failures)
    accuracy = {"reference": 0.8, "exported": 0.8}
    found = chosen("int8", judged={"test": (pixels, np.zeros(len(pixels)))}, lines=lines)
    assert found.report["remarks"] == ["too far on test images"]
    assert any(line.startswith("warning: int8: too far on test images") for line in lines)
    with pytest.raises(GateRefusedError, match="too far on test images"):
        chosen("int8", judged={"test": (pixels[1:], np.zeros(len(pixels) - 1))})
    accuracy["exported"] = 0.7
    with pytest.raises(GateRefusedError, match="accuracy drops on test images"):
        chosen("int8", judged={"test": (pixels, np.zeros(len(pixels)))})


def test_int8_without_images_names_the_calibration_option(verdicts):
    verdicts()
    with pytest.raises(InputError, match=r"int8 needs images to calibrate with, but there is no data.*--calibration"):
        chosen("int8", calibration="there is no data")


def test_fp16_and_int8_backbones_are_not_converted(verdicts):
    verdicts(original="fp16")
    assert chosen().precision == chosen("auto").precision == chosen("fp16", target=CPU).precision == "fp16"
    with pytest.raises(InputError, match="the backbone is fp16 itself and cannot be made int8"):
        chosen("int8")
    verdicts(original="int8")
    assert "calibration" not in chosen(calibration="gone").report


def test_precision_not_supported_by_the_target_is_refused(verdicts):
    verdicts()
    with pytest.raises(InputError, match="the target cpu does not support fp16"):
        chosen("fp16", target=CPU)


# Images


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(24):
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    return folder


def test_test_images_are_measured_and_training_images_calibrate(onnx_run):
    result = samples(finished.read(onnx_run), None, lambda text: None)
    assert set(result.judged) == {"synthetic", "test"}
    pixels, rows = result.judged["test"]
    assert pixels.shape[1:] == (8, 8, 3)
    assert len(rows) == len(pixels)
    assert result.source == "training images of the run"
    judged = {image.tobytes() for image in pixels}
    assert not judged & {image.tobytes() for image in result.calibration}


def test_images_of_the_user_replace_training_images_for_calibration(onnx_run, photos):
    result = samples(finished.read(onnx_run), photos, lambda text: None)
    assert (len(result.calibration), result.source) == (24, "a folder of the user")
    assert set(result.judged) == {"synthetic", "test"}


def test_without_data_a_quarter_of_the_images_of_the_user_is_measured(onnx_run, photos, tmp_path):
    run = shutil.copytree(onnx_run, tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("path: digits", "path: gone"))
    lines = []
    result = samples(finished.read(run), photos, lines.append)
    assert set(result.judged) == {"synthetic", "brought"}
    assert (len(result.judged["brought"][0]), len(result.calibration)) == (6, 18)
    assert "there is no data set at" in lines[0]
    without_photos = samples(finished.read(run), None, lines.append)
    assert set(without_photos.judged) == {"synthetic"}
    assert "there is no data set at" in without_photos.calibration
