"""Captures, cameras and the tray over HTTP, with a camera that a test moves."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.tiny_photos import finished, picture, pixels

from device_runtime.serve import captures
from device_runtime.serve.captures import NEEDED


@dataclasses.dataclass
class Frame:
    camera: str
    number: int
    at: float
    jpeg: bytes


class Feed:
    """A camera; `show` is the next frame."""

    id = "door"

    def __init__(self, station) -> None:
        self._station, self._listeners, self._number, self.last = station, [], 0, None
        self.now = 0.0

    def newest(self):
        return self.last

    def recent(self, count):
        return [self.last]

    def listen(self, callback):
        self._listeners.append(callback)
        return lambda: self._listeners.remove(callback) if callback in self._listeners else None

    def to_dict(self):
        return {"id": self.id, "state": "running"}

    def show(self, image: np.ndarray, seconds: float = 0.25) -> None:
        self._number, self.now = self._number + 1, self.now + seconds
        self.last = Frame(self.id, self._number, self.now, picture("cup", self._number, "JPEG"))
        seen = self._station.device.observe([image])
        for callback in list(self._listeners):
            callback(self.last, image, seen.embeddings[0])


class Cameras:
    def __init__(self, *feeds) -> None:
        self._feeds = feeds

    def list(self):
        return self._feeds


class Tray:
    def __init__(self) -> None:
        self.entries = {}

    def list(self):
        return [{"id": name} for name in self.entries]

    def frames(self, id):
        return self.entries.get(id, [])

    def remove(self, id):
        self.entries.pop(id, None)


@pytest.fixture
def feed(station):
    feed, station.tray = Feed(station), Tray()
    station.cameras = Cameras(feed)
    return feed


def opened(client, station, **values) -> dict:
    """Open a capture, and wait until different views can be counted."""
    answer = client.post("/v1/captures", json={"label": "wedge", **values})
    assert answer.status_code == 201, answer.text
    for _ in range(500):
        if station.captures._views.rule() is not None:
            return answer.json()
        time.sleep(0.02)
    raise AssertionError("the rule was not loaded")


def test_hold_show_and_learn(client, station, feed):
    capture = opened(client, station, camera="door")
    assert (capture["state"], capture["new"], capture["needed"]) == ("collecting", True, 3)
    for number in range(6):
        feed.show(pixels("wedge", number))
    feed.show(pixels("wedge", 6), 0.01)  # too soon after the last one
    held = client.post(f"/v1/captures/{capture['id']}/hold").json()
    feed.show(pixels("wedge", 7))
    assert (held["state"], held["images"], held["different"], held["hint"]) == ("held", 6, 6, "")
    client.post(f"/v1/captures/{capture['id']}/resume")
    feed.show(pixels("wedge", 8))
    job = finished(client, client.post(f"/v1/captures/{capture['id']}/learn", json={}).json())
    assert job["state"] == "done", job
    assert job["result"]["images"] == 7
    done = client.get(f"/v1/captures/{capture['id']}").json()
    assert (done["state"], done["images"], done["job"]) == ("done", 0, job["id"])
    feed.show(pixels("wedge", 9))  # nobody listens any more
    assert not feed._listeners


def test_what_is_counted_is_what_is_learned(client, station, feed):
    """Of eleven frames, eight show the same: a learn counts four, and so does the capture."""
    capture = opened(client, station, camera="door")
    for number in (0, 1, 2):
        feed.show(pixels("wedge", number))
    for _ in range(8):
        feed.show(pixels("wedge", 3))
    shown = client.get(f"/v1/captures/{capture['id']}").json()
    assert (shown["images"], shown["different"], shown["hint"]) == (11, 4, "turn")
    for number in range(4, 8):
        feed.show(pixels("wedge", number))
    shown = client.get(f"/v1/captures/{capture['id']}").json()
    assert (shown["different"], shown["hint"]) == (8, "")
    job = finished(client, client.post(f"/v1/captures/{capture['id']}/learn", json={}).json())
    assert job["result"]["images"] == 8


def test_a_refused_learn_keeps_what_was_collected(client, station, feed):
    capture = opened(client, station, camera="door")
    feed.show(pixels("wedge", 0))
    job = finished(client, client.post(f"/v1/captures/{capture['id']}/learn", json={}).json())
    assert job["state"] == "failed"
    assert client.get(f"/v1/captures/{capture['id']}").json()["state"] == "held"
    files = [("image", (f"{n}.png", picture("wedge", n))) for n in range(1, 5)]
    added = client.post(f"/v1/captures/{capture['id']}/images", files=files).json()
    assert (added["images"], added["different"]) == (5, 5)
    job = finished(client, client.post(f"/v1/captures/{capture['id']}/learn", json={}).json())
    assert job["state"] == "done"
    again = client.post(f"/v1/captures/{capture['id']}/images", files=files)
    assert again.status_code == 400


def test_the_first_class_of_an_empty_device(client, station, feed):
    for name in ("cup", "nut", "screw"):
        station.device.forget(name)
    capture = opened(client, station, camera="door")
    for number in range(5):
        feed.show(pixels("wedge", number))
    assert client.get(f"/v1/captures/{capture['id']}").json()["different"] == 5
    assert finished(client, client.post(f"/v1/captures/{capture['id']}/learn", json={}).json())["state"] == "done"
    assert client.get("/v1/classes").json()["classes"][0]["name"] == "wedge"


def test_a_capture_is_bounded(client, station, feed, monkeypatch):
    monkeypatch.setattr(captures, "MOST_IMAGES", 20)
    monkeypatch.setattr(captures, "LEAST_IMAGES", 1)
    capture = opened(client, station, camera="door")
    for _ in range(40):
        feed.show(pixels("wedge", 1))
    shown = client.get(f"/v1/captures/{capture['id']}").json()
    assert (shown["images"], shown["different"], shown["state"]) == (
        2,
        1,
        "collecting",
    )  # twice the others were dropped
    for number in range(60):
        feed.show(pixels("wedge", number))
    shown = client.get(f"/v1/captures/{capture['id']}").json()
    assert (shown["images"], shown["state"], shown["hint"]) == (20, "held", "full")
    files = [("image", ("x.png", picture("wedge", 1)))]
    assert client.post(f"/v1/captures/{capture['id']}/images", files=files).status_code == 400


def test_captures_are_few_and_dropped_when_idle(client, station, monkeypatch):
    names = [client.post("/v1/captures", json={"label": f"class {n}"}) for n in range(5)]
    assert [answer.status_code for answer in names] == [201] * 4 + [503]
    assert client.delete("/v1/captures/1").status_code == 204
    assert client.get("/v1/captures/1").status_code == 404
    assert len(client.get("/v1/captures").json()["captures"]) == 3
    monkeypatch.setattr(captures, "IDLE", -1)
    station.refresh()
    assert client.get("/v1/captures").json()["captures"] == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"label": "unknown"}, 400),
        ({"label": "a\x00b"}, 400),
        ({"label": 3}, 400),
        ({"label": "wedge", "camera": "attic"}, 404),
        ({"label": "wedge", "force": True}, 400),
    ],
)
def test_bad_captures_are_refused(client, feed, body, status):
    assert client.post("/v1/captures", json=body).status_code == status


def test_one_bad_file_adds_nothing(client, station):
    capture = opened(client, station)
    assert capture["state"] == "held"
    files = [("image", ("good.png", picture("wedge"))), ("image", ("bad.png", b"bad"))]
    answer = client.post(f"/v1/captures/{capture['id']}/images", files=files)
    assert answer.status_code == 400
    assert "bad.png" in answer.json()["error"]
    assert client.get(f"/v1/captures/{capture['id']}").json()["images"] == 0


def added(client, capture: dict, name: str = "wedge", count: int = 5) -> None:
    files = [("image", (f"{number}.png", picture(name, number))) for number in range(count)]
    assert client.post(f"/v1/captures/{capture['id']}/images", files=files).status_code == 200


def test_a_capture_is_learned_once_and_not_empty(client, station):
    capture = opened(client, station)
    empty = client.post(f"/v1/captures/{capture['id']}/learn", json={})
    assert (empty.status_code, "no images of 'wedge'" in empty.json()["error"]) == (400, True)
    added(client, capture)
    go_on = threading.Event()
    station.jobs.start(["x"], lambda check: go_on.wait(10) and {})
    with ThreadPoolExecutor(8) as pool:
        asked = pool.map(lambda _: client.post(f"/v1/captures/{capture['id']}/learn", json={}).status_code, range(8))
        assert sorted(asked) == [202] + [400] * 7
    go_on.set()


def test_a_capture_that_is_dropped_is_not_learned(client, station):
    go_on = threading.Event()
    station.jobs.start(["x"], lambda check: go_on.wait(10) and {})
    capture = opened(client, station)
    added(client, capture)
    job = client.post(f"/v1/captures/{capture['id']}/learn", json={}).json()
    with station.events.subscribe() as events:
        assert client.delete(f"/v1/captures/{capture['id']}").status_code == 204
        assert client.get(f"/v1/jobs/{job['id']}").json()["state"] == "cancelled"  # at once, while another one runs
        go_on.set()
        last = [event.fields["state"] for event in iter(lambda: events.get(0), None) if event.kind == "capture"][-1]
    assert last == "done"


def test_frames_of_the_tray_are_added_and_leave_it_when_learned(client, station, feed):
    for number in range(4):
        station.tray.entries[str(number)] = [Frame("door", number, 0.0, picture("wedge", number, "JPEG"))]
    assert client.get("/v1/tray/2.jpg").content[:2] == b"\xff\xd8"
    capture = opened(client, station)
    added = client.post(f"/v1/captures/{capture['id']}/tray", json={"ids": ["0", "1", "2"]}).json()
    assert added["images"] == 3
    assert client.post(f"/v1/captures/{capture['id']}/tray", json={"ids": ["9"]}).status_code == 404
    assert client.post(f"/v1/captures/{capture['id']}/tray", json={"ids": []}).status_code == 400
    assert finished(client, client.post(f"/v1/captures/{capture['id']}/learn", json={}).json())["state"] == "done"
    assert client.get("/v1/tray").json() == {"tray": [{"id": "3"}]}
    assert client.delete("/v1/tray/3").status_code == 204
    assert client.get("/v1/tray/3.jpg").status_code == 404


def test_a_class_is_learned_from_the_next_frames(client, feed):
    job = client.post("/v1/learn", json={"label": "wedge", "camera": "door", "frames": 6, "every": 0.5}).json()
    stop = threading.Event()

    def run():
        number = 0
        while not stop.is_set():
            feed.show(pixels("wedge", number))
            number += 1
            time.sleep(0.005)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        job = finished(client, job)
    finally:
        stop.set()
        thread.join()
    assert job["state"] == "done", job
    assert job["result"]["images"] == 6
    assert not feed._listeners


def test_a_camera_that_gives_nothing_fails_the_job(client, feed, monkeypatch):
    monkeypatch.setattr("device_runtime.serve.station.PATIENCE", 0.1)
    job = finished(client, client.post("/v1/learn", json={"label": "wedge", "camera": "door"}).json())
    assert job["state"] == "failed"
    assert "gave 0 of 20 frames" in job["error"]["error"]


def test_cameras_are_listed_and_seen(client, feed):
    assert client.get("/v1/cameras").json() == {"cameras": [{"id": "door", "state": "running"}]}
    assert client.get("/v1/cameras/door/frame.jpg").status_code == 404
    feed.show(pixels("cup"))
    answer = client.get("/v1/cameras/door/frame.jpg")
    assert (answer.headers["content-type"], answer.content[:2]) == ("image/jpeg", b"\xff\xd8")
    assert client.get("/v1/cameras/attic/frame.jpg").status_code == 404


def test_the_least_number_of_images_is_that_of_a_learn():
    from device_runtime.learning.teach import MIN_IMAGES

    assert NEEDED == MIN_IMAGES


def test_the_end_waits_for_pytorch(client, station, monkeypatch):
    """A process that ends while a thread loads PyTorch is aborted."""
    loaded = []
    monkeypatch.setattr(captures.Views, "_load", lambda views: (time.sleep(0.3), loaded.append(True)))
    assert client.post("/v1/captures", json={"label": "wedge"}).status_code == 201
    station.close()
    assert loaded


def test_without_pytorch_what_learns_is_refused_at_once(client, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "device_runtime.learning.guard", raising=False)
    for path, body in (
        ("captures", {"label": "wedge"}),
        ("forget", {"label": "cup"}),
        ("merge-labels", {"labels": ["cup", "nut"], "into": "cup"}),
    ):
        answer = client.post(f"/v1/{path}", json=body)
        assert (answer.status_code, answer.json()["code"]) == (503, 3)
        assert "ssd-edge[device]" in answer.json()["error"]
    assert client.post("/v1/rename", json={"label": "cup", "new": "mug"}).status_code == 200
    assert client.post("/v1/rollback", json={}).status_code == 200
