"""A device makes the same pixels of a file as the workstation, as its bundle says."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from device_runtime import Device
from device_runtime.install.bundle import install
from device_runtime.install.installed import InstalledBundle
from device_runtime.service.frames import take
from ssd_edge.data import Images
from ssd_edge.errors import BundleRefusedError
from ssd_edge.images import Pixels

CROP = Pixels(8, "crop", 11, "bilinear")


def framed(tmp_path: Path) -> Path:
    """Write a photo: green with red margins left and right, which a centre crop leaves out."""
    photo = np.zeros((33, 75, 3), np.uint8)
    photo[...] = 200, 20, 20
    photo[:, 20:55] = 20, 200, 20
    Image.fromarray(photo).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def opened(tmp_path: Path, data: bytes) -> Device:
    (tmp_path / "tiny.ssdedge").write_bytes(data)
    install(tmp_path / "root", tmp_path / "tiny.ssdedge")
    return Device.open(tmp_path / "root")


def test_every_way_into_a_device_gives_the_pixels_of_the_workstation(tiny_bundle, tmp_path):
    device, path = opened(tmp_path, tiny_bundle(fitted=CROP.to_dict())), framed(tmp_path)
    assert device.bundle.pixels == CROP
    expected = Images([path], ["photo"]).load([0], CROP)
    assert (expected[0, 4, 4], expected[0, 0, 0].tolist()) == (pytest.approx([20, 200, 20]), [20, 200, 20])
    stream = io.BytesIO()
    Image.open(path).save(stream, "JPEG", quality=100, subsampling=0)
    (frame,) = take(io.BytesIO(stream.getvalue()), 1, 0.0, device.bundle.pixels)
    assert np.abs(frame.astype(int) - expected[0]).max() <= 3
    with Image.open(path) as image:
        for source in (path, str(path), image, np.asarray(image), expected[0]):
            assert (device.embed([source]) == device.embed(list(expected))).all(), type(source)


def test_bundles_of_earlier_builds_squash(tiny_bundle, tmp_path):
    device, path = opened(tmp_path, tiny_bundle()), framed(tmp_path)
    assert device.bundle.pixels == Pixels(8)
    expected = Images([path], ["photo"]).load([0], Pixels(8))
    assert expected[0, 4, 0, 0] > 150  # the red margin
    assert (device.embed([path]) == device.embed(list(expected))).all()


def test_device_json_is_not_believed(tiny_bundle, tmp_path):
    values = opened(tmp_path, tiny_bundle(fitted=CROP.to_dict())).bundle.to_json()
    assert InstalledBundle.from_json(values).pixels == CROP
    manifest = values["manifest"]
    for change in ({"fit": "stretch"}, {"size": 9}, {"resize": -1}):
        wrong = {**values, "manifest": {**manifest, "backbone": {**manifest["backbone"], **change}}}
        with pytest.raises(BundleRefusedError, match=r"device.json is damaged"):
            InstalledBundle.from_json(wrong)
