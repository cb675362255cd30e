"""Predictions over HTTP."""

from __future__ import annotations

import pytest
from helpers.tiny_photos import picture

from device_runtime.device import Device
from device_runtime.serve import answers, uploads


def test_several_images_are_predicted_at_once(client):
    files = [("image", (f"{name}.png", picture(name))) for name in ("cup", "nut", "wedge")]
    answer = client.post("/v1/predict", files=files)
    assert answer.status_code == 200
    body = answer.json()
    assert body["generation"] == 1
    found = [(one["image"], one["label"], one["nearest"], one["generation"]) for one in body["predictions"]]
    assert found[:2] == [("cup.png", "cup", "cup", 1), ("nut.png", "nut", "nut", 1)]
    assert found[2][1] == "unknown"
    always = client.post("/v1/predict?reject=false", files=files).json()["predictions"]
    assert always[2]["label"] == found[2][2]


def test_the_answers_are_those_of_the_device(client, station):
    body = client.post("/v1/predict", content=picture("screw"), headers={"content-type": "image/png"}).json()
    with Device.open(station.device.store.root) as device:
        (found,) = device.predict([station.decode(picture("screw"), "image 0")])
    assert body["predictions"] == [vars(found)]


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"", "image/jpeg", 400),
        (b"not an image", "image/jpeg", 400),
        (picture("cup")[:60], "image/png", 400),
        (picture("cup"), "text/plain", 415),
        (picture("cup"), "", 415),
        (b"--x\r\n", "multipart/form-data", 400),
        (b"--x\r\n", "multipart/form-data; boundary=x", 400),
        (b"--x--\r\n", "multipart/form-data; boundary=x", 400),
        (b"--x\r\nContent-Disposition: attachment\r\n\r\n\r\n--x--\r\n", "multipart/form-data; boundary=x", 400),
        (b"garbage", "multipart/form-data; boundary=x", 400),
    ],
)
def test_what_is_no_image_is_refused(client, content, kind, status):
    answer = client.post("/v1/predict", content=content, headers={"content-type": kind})
    assert (answer.status_code, answer.json()["code"]) == (status, 2), answer.text


def test_one_bad_image_is_named(client):
    files = [("image", ("good.png", picture("cup"))), ("image", ("<b>bad</b>.png", b"bad"))]
    answer = client.post("/v1/predict", files=files)
    assert answer.status_code == 400
    assert "<b>bad</b>.png is not a JPEG" in answer.json()["error"]


def test_a_misspelt_field_is_named(client):
    answer = client.post("/v1/predict", files={"imgae": picture("cup")})
    assert answer.status_code == 400
    assert "imgae" in answer.json()["error"]
    assert client.post("/v1/predict?reject=no", files={"image": picture("cup")}).status_code == 400


def test_large_bodies_and_many_parts_are_refused(client, monkeypatch):
    monkeypatch.setattr(uploads, "MOST_PARTS", 3)
    files = [("image", ("x.png", picture("cup")))] * 4
    assert client.post("/v1/predict", files=files).status_code == 413
    headers = {"content-type": "application/json", "content-length": str(answers.MOST_JSON + 1)}
    assert client.post("/v1/session", content=b"{", headers=headers).status_code == 413


def test_a_device_without_classes_says_so(client, station):
    for name in ("cup", "nut", "screw"):
        station.device.forget(name)
    answer = client.post("/v1/predict", files={"image": picture("cup")})
    assert answer.status_code == 400
    assert "no class yet" in answer.json()["error"]


def test_what_does_not_exist_is_said(client):
    answer = client.get("/v1/nothing")
    assert (answer.status_code, answer.json()["code"]) == (404, 2)
    assert client.get("/v1/predict").status_code == 405
