"""Changes of the device over HTTP."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.tiny_photos import finished, form, picture, pixels

from device_runtime.device import Device
from device_runtime.install.bundle import install
from device_runtime.serve import answers, jobs
from device_runtime.serve import station as station_module


def learned(client, name: str = "wedge", **more) -> dict:
    answer = client.post("/v1/learn", files=form(name, **more), data={"label": name})
    assert answer.status_code == 202, answer.text
    return finished(client, answer.json())


def test_a_class_is_learned_and_undone(client, station):
    with station.events.subscribe() as events:
        job = learned(client)
        assert job["state"] == "done", job
        assert (job["share"], job["seconds_left"], job["error"]) == (1.0, None, None)
        result = job["result"]
        assert (result["generation"], result["held_out"]["images"], result["taught"][0]["label"]) == (2, 12, "wedge")
        kinds = [event.kind for event in iter(lambda: events.get(0), None)]
    assert {"job", "generation"} == set(kinds)
    body = client.post("/v1/predict", files={"image": picture("wedge", 99)}).json()
    assert (body["generation"], body["predictions"][0]["label"]) == (2, "wedge")
    assert client.post("/v1/rollback", json={}).json()["from"] == 2
    body = client.post("/v1/predict", files={"image": picture("wedge", 99)}).json()
    assert (body["generation"], body["predictions"][0]["label"]) == (1, "unknown")
    history = client.get("/v1/history").json()
    assert [one["parent"] for one in history["generations"]] == [None, 1]
    assert [event["event"] for event in history["events"]] == ["install", "learn", "rollback"]


def test_classes_say_how_well_they_are_recognised(client):
    before = {one["name"]: one for one in client.get("/v1/classes").json()["classes"]}
    assert before["cup"] == {
        "name": "cup", "images": 20, "origin": "bundle", "recognised": None, "confused": []
    }  # fmt: skip
    learned(client)
    client.post("/v1/rename", json={"label": "wedge", "new": "<i>cheese</i>/½"})
    after = {one["name"]: one for one in client.get("/v1/classes").json()["classes"]}
    cheese = after["<i>cheese</i>/½"]
    assert (cheese["origin"], cheese["images"], cheese["recognised"]["images"]) == ("device", 12, 12)
    assert client.post("/v1/forget", json={"label": "<i>cheese</i>/½"}).json()["exact"] is True


def test_what_a_class_is_confused_with_is_said(client):
    """Half of the images of the new class look like another one."""
    mixed = form("wedge", 20) + form("nut", 8, 500)
    job = finished(client, client.post("/v1/learn", files=mixed, data={"label": "mixed"}).json())
    assert job["state"] == "done", job["error"]
    (taught,) = job["result"]["taught"]
    missed = taught["held_out"]["images"] * (1 - taught["held_out"]["accuracy"])
    assert sum(taught["confused"].values()) == pytest.approx(missed, abs=0.01)
    assert set(taught["confused"]) == {"nut"}
    shown = {one["name"]: one for one in client.get("/v1/classes").json()["classes"]}["mixed"]
    assert shown["confused"] == [{"with": "nut", "images": taught["confused"]["nut"]}]
    client.post("/v1/rename", json={"label": "nut", "new": "bolt"})
    shown = {one["name"]: one for one in client.get("/v1/classes").json()["classes"]}["mixed"]
    assert [one["with"] for one in shown["confused"]] == ["bolt"]


def test_the_guard_refuses_and_nothing_is_changed(client):
    job = finished(client, client.post("/v1/learn", files=form("cup", 12), data={"label": "screw"}).json())
    assert (job["state"], job["error"]["code"], job["result"]) == ("refused", 4, None)
    assert "nothing was changed" in job["error"]["error"]
    assert "--force" not in job["error"]["error"]  # which only a command has
    assert client.get("/v1/status").json()["generation"] == 1


def test_too_few_images_fail_the_job(client):
    job = learned(client, count=2)
    assert (job["state"], job["error"]["code"]) == ("failed", 2)
    assert "at least 3 different images" in job["error"]["error"]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        ({"label": "unknown"}, 400),
        ({"label": ""}, 400),
        ({"label": "x" * 65}, 400),
        ({}, 400),
        ({"label": "wedge", "force": "true"}, 400),
        ({"label": "wedge", "max_forgetting": "0.5"}, 400),
        ({"label": "wedge", "max_forgetting": "lots"}, 400),
        ({"label": "wedge", "max_forgetting": "-1"}, 400),
        ({"label": "wedge", "max_forgetting": "0.05"}, 202),
    ],
)
def test_bad_orders_are_refused(client, data, status):
    answer = client.post("/v1/learn", files=form("wedge", 3), data=data)
    assert answer.status_code == status, answer.text
    if status == 202:
        assert finished(client, answer.json())["state"] == "done"


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("rename", {"label": "nut", "new": "cup"}, 400, "cup"),
        ("rename", {"label": "nobody", "new": "x"}, 400, "nobody"),
        ("forget", {"label": "nobody"}, 400, "nobody"),
        ("forget", {"label": "cup", "force": True}, 400, "force"),
        ("forget", {"label": "cup", "max_forgetting": 1}, 400, "at most 0.1"),
        ("forget", {"label": "cup", "exactly": 1}, 400, "exactly"),
        ("merge-labels", {"labels": ["cup"], "into": "cup"}, 400, ""),
        ("merge-labels", {"labels": ["cup", 3], "into": "cup"}, 400, "texts"),
        ("rollback", {}, 400, "no parent"),
        ("rollback", {"generation": 77}, 400, "77"),
        ("rollback", {"generation": "1"}, 400, "whole number"),
        ("rollback", {"generation": 10**400}, 400, "there is no generation 1000"),
        ("learn", {"label": "x", "camera": "1"}, 404, "--camera"),
    ],
)
def test_bad_changes_are_refused(client, path, body, status, words):
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]


def test_changes_give_the_results_of_the_device(client):
    merged = client.post("/v1/merge-labels", json={"labels": ["cup", "nut"], "into": "thing"}).json()
    assert (merged["into"], merged["classes"]) == ("thing", ["thing", "screw"])
    forgot = client.post("/v1/forget", json={"label": "screw", "max_forgetting": 0.1}).json()
    assert (forgot["forgot"], forgot["generation"]) == ("screw", 3)
    assert client.post("/v1/rollback", json={"generation": 1}).json()["classes"] == ["cup", "nut", "screw"]


def test_a_bundle_is_exported_and_merged_without_a_file(client, root: Path, tiny_bundle, tmp_path: Path):
    learned(client)
    before = sorted(root.rglob("*"))
    exported = client.post("/v1/export", json={})
    assert exported.headers["content-disposition"] == 'attachment; filename="generation-2.ssdedge"'
    assert sorted(root.rglob("*")) == before
    (tmp_path / "exported.ssdedge").write_bytes(exported.content)
    install(tmp_path / "other", tmp_path / "exported.ssdedge")
    with Device.open(tmp_path / "other") as other:
        assert "wedge" in other.classes
    headers = {"content-type": "application/octet-stream"}
    refused = client.post("/v1/merge", content=exported.content, headers=headers)
    assert refused.status_code == 400, refused.text  # its own
    assert client.post("/v1/merge", content=b"no bundle", headers=headers).status_code == 422
    assert client.post("/v1/merge", content=exported.content).status_code == 415
    client.post("/v1/rollback", json={"generation": 1})
    (tmp_path / "tiny2.ssdedge").write_bytes(tiny_bundle())
    install(tmp_path / "third", tmp_path / "tiny2.ssdedge")
    with Device.open(tmp_path / "third") as third:
        third.learn("wedge", [pixels("wedge", number) for number in range(5)])
        theirs = third.exported("third")
    merged = client.post("/v1/merge", content=theirs, headers=headers)
    assert merged.status_code == 200, merged.text
    assert "wedge" in merged.json()["classes"]


def test_a_waiting_job_and_a_running_one_are_cancelled(client, station):
    began, go_on = threading.Event(), threading.Event()

    def gather(check):
        began.set()
        go_on.wait(10)
        check(0.5)
        raise AssertionError("it was not cancelled")

    running = station.jobs.start(["wedge"], gather)
    waiting = client.post("/v1/learn", files=form("wedge"), data={"label": "wedge"}).json()
    assert waiting["state"] == "waiting"
    began.wait(10)
    assert client.get("/v1/status").json()["job"]["id"] == running.id
    assert client.post("/v1/rename", json={"label": "cup", "new": "mug"}).status_code == 200  # it only collects
    client.delete(f"/v1/jobs/{waiting['id']}")
    client.delete(f"/v1/jobs/{running.id}")
    go_on.set()
    assert finished(client, waiting)["state"] == "cancelled"
    assert running.state == "cancelled"
    assert client.get("/v1/status").json()["generation"] == 2


def test_a_learn_is_cancelled_between_two_batches_of_images(client, station, monkeypatch):
    real, embedded = station.device.embedder.embed, []

    def embed(images):
        embedded.append(len(images))
        if len(embedded) == 2:
            station.jobs.current.cancelled.set()
            time.sleep(0.25)  # progress is told five times per second
        return real(images)

    monkeypatch.setattr(station.device.embedder, "embed", embed)
    with station.events.subscribe(1000) as events:
        assert learned(client, count=200)["state"] == "cancelled"
        shares = [event.fields["share"] for event in iter(lambda: events.get(0), None) if event.kind == "job"]
    assert sum(embedded) == 64
    assert shares[0] == 0.0


def test_nothing_else_is_changed_during_a_learn(client, station, monkeypatch):
    inside, go_on = threading.Event(), threading.Event()

    def slow(images, *rest):
        inside.set()
        go_on.wait(10)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(station.device, "learn_all", slow)
    job = client.post("/v1/learn", files=form("wedge"), data={"label": "wedge"}).json()
    inside.wait(10)
    busy = client.post("/v1/rename", json={"label": "cup", "new": "mug"})
    assert (busy.status_code, busy.headers["retry-after"]) == (503, "2")
    go_on.set()
    job = finished(client, job)
    assert (job["state"], job["error"]["code"]) == ("failed", 3)
    assert "disk is full" in job["error"]["error"]


def test_the_list_of_jobs_is_bounded(client, station):
    for _ in range(40):
        finished(client, station.jobs.start(["x"], lambda check: {"x": []}).to_dict())
    jobs = client.get("/v1/jobs").json()["jobs"]
    assert len(jobs) <= 33
    assert jobs[0]["id"] == "40"
    assert client.get("/v1/jobs/1").status_code == 404
    assert client.delete("/v1/jobs/nothing").status_code == 404


def test_jobs_that_wait_are_bounded(client, station):
    go_on = threading.Event()
    station.jobs.start(["x"], lambda check: go_on.wait(10) and {})
    time.sleep(0.05)
    answers = [client.post("/v1/learn", files=form("wedge", 3), data={"label": "w"}).status_code for _ in range(9)]
    go_on.set()
    assert answers == [202] * 8 + [503]


def test_images_are_decoded_for_one_request_at_a_time(client, station, monkeypatch):
    at_once, most, lock = [], [], threading.Lock()
    real = station.decode

    def decode(data, name):
        with lock:
            at_once.append(name)
            most.append(len(at_once))
        time.sleep(0.005)
        with lock:
            at_once.remove(name)
        return real(data, name)

    monkeypatch.setattr(station, "decode", decode)
    capture = client.post("/v1/captures", json={"label": "wedge"}).json()["id"]

    def send(number: int) -> int:
        if number % 2:
            return client.post(f"/v1/captures/{capture}/images", files=form("wedge", 3)).status_code
        return client.post("/v1/learn", files=form("wedge", 3), data={"label": "wedge"}).status_code

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(send, range(6))) <= {200, 202}
    assert max(most) == 1


def test_images_that_wait_to_be_learned_are_bounded(client, station, monkeypatch):
    monkeypatch.setattr(jobs, "MOST_BYTES", 12 * 8 * 8 * 3)
    go_on = threading.Event()
    station.jobs.start(["x"], lambda check: go_on.wait(10) and {})
    sent = [client.post("/v1/learn", files=form("wedge", 6), data={"label": "w"}) for _ in range(3)]
    assert [answer.status_code for answer in sent] == [202, 202, 503]
    monkeypatch.setattr(station_module, "MOST_BYTES", 3)
    many = client.post("/v1/learn", files=form("wedge", 13), data={"label": "w"})
    assert (many.status_code, "at most 12 images" in many.json()["error"]) == (400, True)
    go_on.set()


def test_an_export_counts_as_memory_until_it_is_taken(client, monkeypatch):
    monkeypatch.setattr(answers, "MOST_HELD", 5000)
    assert client.post("/v1/export", json={}).status_code == 503
    monkeypatch.undo()
    for _ in range(3):
        assert client.post("/v1/export", json={}).status_code == 200


def test_another_process_is_followed(client, station, root: Path):
    with Device.open(root) as other, station.events.subscribe() as events:
        other.rename("cup", "mug")
        station.refresh()
        assert events.get(1).fields == {"generation": 2, "classes": 3, "what": "rename 'cup' to 'mug'"}
    assert client.get("/v1/classes").json()["generation"] == 2
