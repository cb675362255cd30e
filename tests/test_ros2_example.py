"""The conversions of examples/ros2_node.py, with stand-ins for the messages; ROS itself is not needed."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from device_runtime.device import Prediction
from ssd_edge.errors import InputError

PATH = Path(__file__).resolve().parent.parent / "examples" / "ros2_node.py"
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)


@pytest.fixture(scope="module")
def node() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("ros2_node", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "rclpy" not in sys.modules
    return module


def image(encoding: str, array: np.ndarray, padding: int = 0) -> types.SimpleNamespace:
    height, width = array.shape[:2]
    rows = np.pad(array.reshape(height, -1), ((0, 0), (0, padding)), constant_values=77)
    return types.SimpleNamespace(
        encoding=encoding, height=height, width=width, step=rows.shape[1], data=list(rows.tobytes()), header="header"
    )


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "rgba8", "bgra8"])
def test_pixels_are_those_of_the_image(node: types.ModuleType, encoding: str, padding: int) -> None:
    array = PIXELS[:, :, ::-1] if encoding.startswith("bgr") else PIXELS
    if encoding.endswith("a8"):
        array = np.concatenate([array, np.full((3, 5, 1), 9, np.uint8)], 2)
    assert np.array_equal(node.to_pixels(image(encoding, array, padding)), PIXELS)


def test_grey_is_repeated(node: types.ModuleType) -> None:
    found = node.to_pixels(image("mono8", PIXELS[:, :, :1]))
    assert np.array_equal(found, np.repeat(PIXELS[:, :, :1], 3, 2))


def test_other_images_are_refused(node: types.ModuleType) -> None:
    with pytest.raises(InputError, match="the encoding of the image is '16UC1', but must be one of rgb8, bgr8"):
        node.to_pixels(image("16UC1", PIXELS))
    short = image("rgb8", PIXELS)
    short.data = short.data[:-1]
    with pytest.raises(InputError, match="an image of 5 × 3 pixels has only 44 bytes"):
        node.to_pixels(short)


def test_messages_are_filled(node: types.ModuleType) -> None:
    for score in (0.75, None):
        prediction = Prediction("frame", "cup", score, 4, "cup", 0.1)
        told = node.fill_classification(types.SimpleNamespace(), types.SimpleNamespace, "header", prediction)
        assert (told.header, told.results[0].class_id) == ("header", "cup")
        assert told.results[0].score == 0.75 if score else math.isnan(told.results[0].score)
    info = node.fill_info(types.SimpleNamespace(), "shop", "ssd_edge/classes", 4)
    assert (info.method, info.database_location, info.database_version) == ("shop", "ssd_edge/classes", 4)
