"""The Open Inference Protocol, as its specification has it."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from helpers.tiny_photos import pixels

INFER = "/v2/models/ssd-edge/infer"
LENGTH = "inference-header-content-length"


def tensor(images: np.ndarray, **more) -> dict:
    return {"name": "images", "datatype": "UINT8", "shape": list(images.shape), **more}


def test_the_server_and_the_model_tell_about_themselves(client, station):
    assert client.get("/v2").json() == {"name": "ssd-edge", "version": "0.1.0", "extensions": ["binary_tensor_data"]}
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    station.device.rename("cup", "mug")
    for name in ("ssd-edge", "tiny"):
        about = client.get(f"/v2/models/{name}").json()
        assert (about["name"], about["versions"], about["platform"]) == (name, ["1", "2"], "ssd-edge_ncm")
        assert about["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}]
        assert [one["name"] for one in about["outputs"]] == ["label", "nearest", "score", "margin"]
    assert client.get("/v2/models/ssd-edge/versions/1").status_code == 200
    assert client.get("/v2/models/ssd-edge/versions/1/ready").json() == {"name": "ssd-edge", "ready": True}
    for path in ("other", "ssd-edge/versions/7", "ssd-edge/versions/x", "ssd-edge/versions/²", "other/ready"):
        answer = client.get(f"/v2/models/{path}")
        assert answer.status_code == 404, path
        assert set(answer.json()) == {"error", "code"}


@pytest.mark.parametrize("nested", [True, False])
def test_json_tensors(client, nested):
    images = np.stack([pixels("nut"), pixels("wedge")])
    data = images.tolist() if nested else images.ravel().tolist()
    body = client.post(INFER, json={"id": "a", "inputs": [tensor(images, data=data)]}).json()
    assert (body["model_name"], body["model_version"], body["id"]) == ("ssd-edge", "1", "a")
    outputs = {one["name"]: one for one in body["outputs"]}
    assert outputs["label"] == {"name": "label", "datatype": "BYTES", "shape": [2], "data": ["nut", "unknown"]}
    assert (outputs["margin"]["datatype"], outputs["margin"]["data"][1] < 0) == ("FP32", True)
    assert outputs["score"]["data"] == [None, None]  # the tiny bundle has no held-out images on record


def test_binary_tensors_both_ways(client, station):
    """The same images, as bytes behind the JSON, and of any size."""
    images = np.stack([np.repeat(np.repeat(pixels(name), 3, 0), 2, 1) for name in ("cup", "screw")])
    outputs = [{"name": "label", "parameters": {"binary_data": True}}, {"name": "nearest"}]
    outputs += [{"name": "margin", "parameters": {"binary_data": True}}]
    head = json.dumps(
        {"inputs": [tensor(images, parameters={"binary_data_size": images.nbytes})], "outputs": outputs}
    ).encode()
    headers = {LENGTH: str(len(head)), "content-type": "application/octet-stream"}
    answer = client.post(INFER, content=head + images.tobytes(), headers=headers)
    assert answer.status_code == 200, answer.text
    length = int(answer.headers[LENGTH])
    body, tail = json.loads(answer.content[:length]), answer.content[length:]
    label, nearest, margin = body["outputs"]
    assert nearest["data"] == ["cup", "screw"]
    labels = b"".join(struct.pack("<I", len(name)) + name for name in (b"cup", b"screw"))
    assert tail[: label["parameters"]["binary_data_size"]] == labels
    found = np.frombuffer(tail[len(labels) :], "<f4")
    assert margin["parameters"]["binary_data_size"] == found.nbytes
    expected = [one.margin for one in station.device.predict(list(images))]
    assert np.allclose(found, expected)


def test_all_outputs_are_binary_if_asked_for(client):
    images = pixels("cup")[None]
    asked = {"inputs": [tensor(images, data=images.tolist())], "parameters": {"binary_data_output": True}}
    answer = client.post(INFER, json=asked)
    length = int(answer.headers[LENGTH])
    assert all("data" not in one for one in json.loads(answer.content[:length])["outputs"])
    assert np.isnan(np.frombuffer(answer.content[length:][14:18], "<f4")[0])


def test_an_older_generation_answers_by_its_number(client, station):
    for number, name in enumerate(("a", "b", "c", "d")):
        station.device.rename(("cup", "a", "b", "c")[number], name)
    images = pixels("cup")[None]
    asked = {"inputs": [tensor(images, data=images.tolist())], "outputs": [{"name": "label"}]}
    for version, label in ((1, "cup"), (2, "a"), (3, "b"), (4, "c"), (5, "d"), (1, "cup"), (4, "c")):
        body = client.post(f"/v2/models/ssd-edge/versions/{version}/infer", json=asked).json()
        assert (body["model_version"], body["outputs"][0]["data"]) == (str(version), [label])
        assert len(station._older) <= 2
    with station.device.store.writer():
        station.device.store.prune(1)
    gone = client.post("/v2/models/ssd-edge/versions/3/infer", json=asked)
    assert (gone.status_code, "pruned" in gone.json()["error"]) == (404, True)
    assert client.post(INFER, json=asked).json()["model_version"] == "5"


SHAPE = [1, 2, 2, 3]


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"inputs": []},
        {"inputs": [3]},
        {"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": SHAPE, "data": [0] * 12}]},
        {"inputs": [{"name": "images", "datatype": "FP32", "shape": SHAPE, "data": [0] * 12}]},
        {"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 2, 2], "data": [0] * 4}]},
        {"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 2, 2, 4], "data": [0] * 16}]},
        {"inputs": [{"name": "images", "datatype": "UINT8", "shape": [0, 2, 2, 3], "data": []}]},
        {"inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, 2, 2, -3], "data": [0] * 12}]},
        {"inputs": [{"name": "images", "datatype": "UINT8", "shape": [True, 2, 2, 3], "data": [0] * 12}]},
        {"inputs": [{"name": "images", "datatype": "UINT8", "shape": [2**62, 4, 1, 3], "data": [0] * 12}]},
        {"inputs": [{"name": "images", "datatype": "UINT8", "shape": [101, 1, 1, 3], "data": [0] * 303}]},
        {"inputs": [{"name": "images", "datatype": "UINT8", "shape": SHAPE, "data": [0] * 11}]},
        {"inputs": [{"name": "images", "datatype": "UINT8", "shape": SHAPE, "data": [256] * 12}]},
        {"inputs": [{"name": "images", "datatype": "UINT8", "shape": SHAPE, "data": [-1] * 12}]},
        {"inputs": [{"name": "images", "datatype": "UINT8", "shape": SHAPE, "data": [0.5] * 12}]},
        {"inputs": [{"name": "images", "datatype": "UINT8", "shape": SHAPE, "data": ["0"] * 12}]},
        {"inputs": [{"name": "images", "datatype": "UINT8", "shape": SHAPE, "data": [[0], [0, 1]]}]},
        {"inputs": [{"name": "images", "datatype": "UINT8", "shape": SHAPE, "data": []}]},
        {"inputs": [{"name": "images", "datatype": "UINT8", "shape": SHAPE, "data": [2**70] * 12}]},
        {"inputs": [{"name": "images", "datatype": "UINT8", "shape": SHAPE}]},
        {"inputs": [{"name": "images", "datatype": "UINT8", "shape": SHAPE, "parameters": {"binary_data_size": 12}}]},
        {"inputs": [{"name": "images", "datatype": "UINT8", "shape": SHAPE, "data": [0] * 12}], "outputs": [{}]},
        {"inputs": [{"name": "images", "datatype": "UINT8", "shape": SHAPE, "data": [0] * 12}], "outputs": ["label"]},
        {"inputs": [{"name": "images", "datatype": "UINT8", "shape": SHAPE, "data": [0] * 12}], "id": 3},
    ],
)
def test_bad_requests_are_refused(client, asked):
    answer = client.post(INFER, json=asked)
    assert answer.status_code == 400, answer.text
    assert answer.json()["code"] == 2


@pytest.mark.parametrize("length", ["0", "-1", "x", "9999", "9" * 30, "20"])
def test_a_wrong_length_is_refused(client, length):
    answer = client.post(INFER, content=b'{"inputs": []}' + b"x" * 12, headers={LENGTH: length})
    assert answer.status_code == 400, answer.text


def test_other_types_are_not_read(client):
    for kind in ("text/plain", "application/octet-stream"):
        assert client.post(INFER, content=b"{}", headers={"content-type": kind}).status_code == 415
    for path in (INFER, "/v1/rename"):
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        answer = client.post(path, content=b"{}", headers=headers)
        assert (answer.status_code, "gzip" in answer.json()["error"]) == (415, True)


def test_a_client_that_names_no_type_is_understood(client):
    """Triton's client does not."""
    images = pixels("cup")[None]
    asked = json.dumps({"inputs": [tensor(images, data=images.tolist())]}).encode()
    assert client.post(INFER, content=asked, headers={"content-type": ""}).status_code == 200
