"""Which precision is taken: the wanted one, the target's, or the fastest that passes; and what is said when none does.

The conversions and the measurement themselves have their own tests; here they are stand-ins with known verdicts.
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
    """verdicts(int8=["too far"]) lets int8 fail; what is measured is only counted."""
    failing: dict[str, list[str]] = {}
    measured: list[tuple[bytes, int]] = []

    def measure(onnx, reference, images, learner, rows):
        measured.append((onnx, len(reference(images))))
        return {"images": len(images), "min_cosine": 1.0, "max_difference": 0.0, "agreement": 1.0}

    monkeypatch.setattr(ladder.precision, "convert", lambda onnx, name, images: f"{name} of {onnx.decode()}".encode())
    monkeypatch.setattr(ladder.parity, "measure", measure)
    monkeypatch.setattr(ladder.parity, "failures", lambda report, name: failing.get(name, []))
    monkeypatch.setattr(ladder.onnx_file, "precision", lambda onnx: native[0])
    native = ["fp32"]

    def set_up(brought: str = "fp32", **given: list[str]):
        native[0] = brought
        failing.update(given)
        return measured

    return set_up


def chosen(wanted: str = "", target=JETSON, judged=BOTH, calibration=PIXELS, said=None):
    images = Samples(judged, calibration, "training images of the run")
    tell = (said if said is not None else []).append
    return choose(b"graph", lambda pixels: np.zeros((len(pixels), 2)), None, images, target, wanted, tell)


def test_without_a_wish_the_targets_default_is_taken(verdicts):
    verdicts()
    assert (chosen().precision, chosen(target=CPU).precision) == ("fp16", "fp32")
    assert chosen().onnx == b"fp16 of graph"


def test_every_kind_of_image_is_reported_and_said(verdicts):
    said, measured = [], verdicts()
    report = chosen("int8", said=said).report
    assert set(report) == {"precision", "calibration", "synthetic", "test"}
    assert report["calibration"]["images"] == 4
    assert report["calibration"]["source"] == "training images of the run"
    kinds = [f"{name} on 4 {kind} images" for name in ("fp32", "int8") for kind in ("synthetic", "test")]
    assert [line.split(":")[0] for line in said] == kinds
    assert measured == [(b"fp32 of graph", 4)] * 2 + [(b"int8 of graph", 4)] * 2


def test_a_mistake_of_the_export_is_not_hidden_by_a_coarser_precision(verdicts):
    verdicts(fp32=["red and blue swapped"])
    for wanted in ("", "int8", "auto"):
        with pytest.raises(GateRefusedError, match="in fp32 does not compute what the run computed: red and blue"):
            chosen(wanted)


def test_auto_takes_the_fastest_that_passes_and_keeps_why_the_others_did_not(verdicts):
    verdicts(int8=["a cosine of 0.9"])
    choice = chosen("auto")
    assert choice.precision == "fp16"
    assert list(choice.report["refused"]) == ["int8"]
    assert "a cosine of 0.9 on test images" in choice.report["refused"]["int8"]
    verdicts(fp16=["too far"])
    assert chosen("auto").precision == "fp32"
    assert chosen("auto", target=CPU).precision == "fp32"


def test_auto_goes_on_without_images_to_calibrate_with(verdicts):
    verdicts()
    choice = chosen("auto", calibration="the run's data cannot be used (gone)")
    assert choice.precision == "fp16"
    assert "--calibration FOLDER" in choice.report["refused"]["int8"]


def test_a_refused_precision_names_one_that_passes(verdicts):
    verdicts(int8=["too far"])
    with pytest.raises(GateRefusedError, match=r"in int8 does not.* too far.*; --precision fp16 would pass; nothing"):
        chosen("int8")
    verdicts(fp16=["too far"], fp32=["too far"])
    with pytest.raises(GateRefusedError, match="no other precision passes; nothing was written"):
        chosen("int8")
    with pytest.raises(GateRefusedError, match="no precision passes: the backbone in fp32"):
        chosen("auto")


def test_noise_judges_only_where_nothing_else_does(verdicts, monkeypatch):
    verdicts()
    noise, both = {"synthetic": (np.ones((5, 8, 8, 3), np.uint8), None)}, ["fp16"]

    def failures(report, name):
        return ["too far"] if report["images"] == 5 and name in both else []

    monkeypatch.setattr(ladder.parity, "failures", failures)
    assert chosen("fp16", judged={**noise, "test": (PIXELS, None)}).precision == "fp16"
    with pytest.raises(GateRefusedError, match="too far on synthetic images"):
        chosen("fp16", judged=noise)
    both.append("fp32")
    with pytest.raises(GateRefusedError, match="too far on synthetic images"):  # here it is not rounding
        chosen("fp32", judged={**noise, "test": (PIXELS, None)})


def test_int8_without_images_is_refused_with_the_option(verdicts):
    verdicts()
    with pytest.raises(InputError, match=r"int8 needs images to calibrate with, but there is no data.*--calibration"):
        chosen("int8", calibration="there is no data")


def test_a_network_that_was_brought_narrow_stays_as_it_is(verdicts):
    verdicts(brought="fp16")
    assert chosen().precision == chosen("auto").precision == chosen("fp16", target=CPU).precision == "fp16"
    with pytest.raises(InputError, match="the backbone is fp16 itself and cannot be made int8"):
        chosen("int8")
    verdicts(brought="int8")
    assert "calibration" not in chosen(calibration="gone").report


def test_what_a_target_does_not_run_is_refused(verdicts):
    verdicts()
    with pytest.raises(InputError, match="the target cpu does not support fp16"):
        chosen("fp16", target=CPU)


# The images


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(24):
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    return folder


def test_test_images_judge_and_training_images_calibrate(onnx_run):
    found = samples(finished.read(onnx_run), None, lambda text: None)
    assert set(found.judged) == {"synthetic", "test"}
    pixels, rows = found.judged["test"]
    assert pixels.shape[1:] == (8, 8, 3)
    assert len(rows) == len(pixels)
    assert found.source == "training images of the run"
    judged = {image.tobytes() for image in pixels}
    assert not judged & {image.tobytes() for image in found.calibration}


def test_the_users_images_calibrate_instead(onnx_run, photos):
    found = samples(finished.read(onnx_run), photos, lambda text: None)
    assert (len(found.calibration), found.source) == (24, "a folder of the user")
    assert set(found.judged) == {"synthetic", "test"}


def test_without_the_runs_data_a_quarter_of_the_users_images_judges(onnx_run, photos, tmp_path):
    run = shutil.copytree(onnx_run, tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("path: digits", "path: gone"))
    said = []
    found = samples(finished.read(run), photos, said.append)
    assert set(found.judged) == {"synthetic", "brought"}
    assert (len(found.judged["brought"][0]), len(found.calibration)) == (6, 18)
    assert "there is no data set at" in said[0]
    bare = samples(finished.read(run), None, said.append)
    assert set(bare.judged) == {"synthetic"}
    assert "there is no data set at" in bare.calibration
