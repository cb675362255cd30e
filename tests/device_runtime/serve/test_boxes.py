"""The boxes of a detector, and metrics."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
from helpers.tiny_photos import picture
from PIL import Image


def scene(orientation: int = 1) -> bytes:
    """Return a photograph of 60 × 40 pixels with a nut at the left and a screw at the right, on the colour of a cup."""
    array = np.tile(np.array((220, 30, 30), np.uint8), (40, 60, 1))
    array[10:30, 5:25], array[10:30, 35:55] = (30, 220, 30), (30, 30, 220)
    image = Image.fromarray(array)
    if orientation == 6:  # stored turned, shown upright
        image = image.transpose(Image.Transpose.ROTATE_90)
    out, exif = io.BytesIO(), image.getexif()
    exif[0x0112] = orientation
    image.save(out, "JPEG", quality=95, subsampling=0, exif=exif)
    return out.getvalue()


def predicted(client, files: list[bytes], boxes: object) -> list[tuple[str, str, list | None]]:
    form = [("image", (f"{number}.jpg", data)) for number, data in enumerate(files)]
    answer = client.post("/v1/predict", files=form, data={"boxes": json.dumps(boxes)})
    assert answer.status_code == 200, answer.text
    return [(one["image"], one["nearest"], one.get("box")) for one in answer.json()["predictions"]]


@pytest.mark.parametrize("orientation", [1, 6])
def test_each_box_is_predicted(client, orientation):
    nut, screw = [5, 10, 25, 30], [35.4, 10, 54.6, 29.5]
    found = predicted(client, [scene(orientation), scene(orientation)], [[nut, screw], [screw]])
    assert found == [("0.jpg", "nut", nut), ("0.jpg", "screw", screw), ("1.jpg", "screw", screw)]


def test_boxes_are_clipped_and_an_image_may_have_none(client):
    found = predicted(client, [scene(), scene()], [[[-50, -50, 4, 500]], []])
    assert found == [("0.jpg", "cup", [-50, -50, 4, 500])]
    assert predicted(client, [scene()], [[]]) == []


@pytest.mark.parametrize(
    "boxes",
    ["x", "[]", "[[], []]", "[[[0, 0, 1]]]", "[[[0, 0, 0, 0]]]", "[[[9, 0, 2, 9]]]", "[[[99, 0, 120, 9]]]",
     "[[[0, 0, 1e999, 1]]]", '[[["a", 0, 1, 1]]]', "[" * 100_000, json.dumps([[[0, 0, 9, 9]] * 101])]
)  # fmt: skip
def test_bad_boxes_are_refused(client, boxes):
    answer = client.post("/v1/predict", files={"image": scene()}, data={"boxes": boxes})
    assert answer.status_code == 400, answer.text


def test_metrics_count_what_is_answered(client, station):
    client.post("/v1/predict", files=[("image", picture("cup")), ("image", picture("wedge"))])
    station.events.publish("answer", label="cup", latency_ms=40.0)
    station.jobs.start(["x"], lambda check: {"x": []})
    station.jobs.close()
    text = client.get("/metrics").text
    values = dict(re.findall(r"^(\S+) ([0-9.e+-]+)$", text, re.MULTILINE))
    assert float(values['ssd_edge_predictions_total{answer="known",source="http"}']) == 1
    assert float(values['ssd_edge_predictions_total{answer="unknown",source="http"}']) == 1
    assert float(values['ssd_edge_predict_seconds_bucket{le="0.05",source="camera"}']) == 1
    assert float(values['ssd_edge_learn_seconds_count{state="failed"}']) == 1
    assert float(values["ssd_edge_generation"]) == 1
    assert float(values['ssd_edge_info{bundle="tiny",version="0.1.0"}']) == 1
    assert float(values["process_resident_memory_bytes"]) > 0


def test_an_upload_takes_no_file(client, station, monkeypatch):
    """Not even a temporary one for a large part, as is usual."""
    monkeypatch.setattr("tempfile.SpooledTemporaryFile", None)
    monkeypatch.setattr("builtins.open", None)
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), np.uint8)).save(out, "PNG")
    assert len(out.getvalue()) > 4 * 2**20
    answer = client.post("/v1/predict", files={"image": ("large.png", out.getvalue())})
    assert answer.status_code == 200
