"""The score of an answer: none without held-out results, then a probability that every change keeps up to date."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import store_standins
from PIL import Image

from device_runtime import Device
from device_runtime.install.bundle import install
from device_runtime.learning.guard import Limits
from ssd_edge.cli.device import device as verbs

photos = vars(store_standins)["photos"]
ANY = Limits(force=True)
Make = Callable[[str], Device]


@pytest.fixture
def new_device(tiny_bundle, tmp_path: Path) -> Make:
    (tmp_path / "tiny.ssdedge").write_bytes(tiny_bundle())

    def make(name: str) -> Device:
        install(tmp_path / name, tmp_path / "tiny.ssdedge")
        return Device.open(tmp_path / name)

    return make


def scores(device: Device) -> list[float | None]:
    return [one.score for name in ("cup", "nut", "wedge") for one in device.predict(photos(name, 5, seed=7))]


def test_score_is_null_until_an_image_was_held_out(new_device: Make, tmp_path: Path) -> None:
    device = new_device("root")
    assert set(scores(device)) == {None}
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    for path, pixels in zip(paths, photos("cup", 2), strict=True):
        Image.fromarray(pixels).save(path)

    def printed(*options: str) -> str:
        return CliRunner().invoke(verbs, ["predict", *paths, "--root", str(tmp_path / "root"), *options]).output

    assert [one["score"] for one in json.loads(printed("--json"))["predictions"]] == [None, None]
    assert printed().splitlines()[0].split()[:2] == ["–", "cup"]
    device.learn("wedge", photos("wedge", 12), ANY)
    assert all(one is not None and 0.25 < one < 1 for one in scores(device))  # of four classes, by 12 images
    assert json.loads(printed("--json"))["predictions"][0]["score"] == pytest.approx(device.predict(paths)[0].score)


def test_restart_and_rollback_give_the_same_scores(new_device: Make) -> None:
    device = new_device("root")
    device.learn("wedge", photos("wedge", 12), ANY)
    before = scores(device)
    assert scores(Device.open(device.store.root)) == before
    device.learn("wedge", photos("nut", 12), ANY)  # mislabelled: the device cannot be as sure any more
    assert sum(map(float, scores(device))) < sum(map(float, before))
    device.rollback()
    assert scores(device) == before


def test_held_out_results_follow_their_class(new_device: Make, tmp_path: Path) -> None:
    here, there = new_device("here"), new_device("there")
    here.learn("wedge", photos("wedge", 12), ANY)
    there.learn_all({"bolt": photos("bolt", 9), "cup": photos("cup", 6, seed=3)}, ANY)
    ours, theirs = here.state.record, there.state.record
    there.export(tmp_path / "there.ssdedge")
    here.merge(tmp_path / "there.ssdedge", ANY)
    assert here.classes == ["cup", "nut", "screw", "wedge", "bolt"]
    merged = here.state.record
    assert torch.equal(merged.promised[[3]], ours.promised[[3]])
    assert torch.equal(merged.promised[[0, 4]], theirs.promised[[0, 3]])
    assert merged.tested.tolist() == [6, 0, 0, 12, 9]
    here.forget("wedge", limits=ANY)
    assert torch.equal(here.state.record.promised, merged.promised[[0, 1, 2, 4]])
    here.merge_labels(["bolt"], "cup", ANY)
    assert torch.equal(here.state.record.promised[0], merged.promised[0] + merged.promised[4])
