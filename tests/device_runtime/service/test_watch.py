"""The loop of the camera service, step by step; test_watch_process.py runs it as a process."""

from __future__ import annotations

import errno
import io
import itertools
import json
import logging
import queue
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from device_runtime.device import Device
from device_runtime.install.bundle import install
from device_runtime.service import drift
from device_runtime.service import watch as module
from device_runtime.service.drift import MINIMUM
from device_runtime.service.watch import Answer, watch
from device_runtime.store import watch_state
from device_runtime.store.watch_state import last_report
from ssd_edge import files
from ssd_edge.errors import EnvironmentUnfitError, SlowerProviderError

COLOURS = {"cup": (220, 30, 30), "nut": (30, 220, 30), "screw": (30, 30, 220), "wedge": (220, 220, 30)}


def pixels(name: str, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng([seed, *name.encode()]).normal(0, 20, (8, 8, 3))
    return np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)


def picture(name: str, seed: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels(name, seed)).save(out, "PNG")
    return out.getvalue()


def frame(name: str, seed: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels(name, seed)).save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def put(folder: Path, name: str, data: bytes) -> None:
    (folder / f"{name}.part").write_bytes(data)
    (folder / f"{name}.part").rename(folder / name)


@pytest.fixture(scope="module")
def installed(tiny_bundle, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    (folder / "tiny.ssdedge").write_bytes(tiny_bundle())
    install(folder / "root", folder / "tiny.ssdedge")
    return folder / "root"


@pytest.fixture(autouse=True)
def _rough(monkeypatch) -> None:
    """Use fewer samples for the reference, which takes a tenth of the time."""
    monkeypatch.setattr(drift, "SAMPLES", 2000)


@pytest.fixture
def root(installed: Path, tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    return Path(shutil.copytree(installed, tmp_path / "root"))


@pytest.fixture
def solid(monkeypatch) -> None:
    """Let the tiny classes of 20 images be a reference for drift."""
    monkeypatch.setattr(drift, "SOLID", 20)


@pytest.fixture
def camera(tmp_path: Path) -> Path:
    (tmp_path / "camera").mkdir()
    return tmp_path / "camera"


class Driven:
    """Runs `watch` with a simulated clock that advances whenever `watch` checks whether to stop.

    Args:
        script: Called in turn, one per check; after the last one `watch` stops.
    """

    def __init__(self, monkeypatch, *script: Callable[[], object], step: float = 0.25) -> None:
        self.now, self.lines, self.steps, self.step = 1000.0, [], iter(script), step
        monkeypatch.setattr(module.time, "sleep", lambda seconds: None)

    def stopped(self) -> bool:
        self.now += self.step
        act = next(self.steps, None)
        if act is not None:
            act()
        return act is None

    def answer(self, answer: Answer) -> None:
        self.lines.append(answer.to_dict())

    def run(self, device: Device, source: Any, **options: Any) -> list[dict[str, Any]]:
        watch(device, source, self.answer, stopped=self.stopped, clock=lambda: self.now, **options)
        return self.lines


def nothing() -> None:
    """Do nothing in this step."""


def test_images_without_an_embedding_are_skipped_and_counted(tiny_bundle, camera: Path, monkeypatch, caplog):
    """A backbone that divides by its norm gives NaN for a black image, also for the first one that warms it up."""
    root = camera.parent / "root"
    (camera.parent / "a.ssdedge").write_bytes(tiny_bundle(normalised=True))
    install(root, camera.parent / "a.ssdedge")
    black = io.BytesIO()
    Image.new("RGB", (8, 8)).save(black, "PNG")
    for number in range(4):
        put(camera, f"{number}.png", picture("nut") if number == 2 else black.getvalue())
    driven = Driven(monkeypatch, *[nothing] * 20)
    lines = driven.run(Device.open(root), camera, existing=True)
    assert [(Path(line["image"]).name, line["label"]) for line in lines] == [("2.png", "nut")]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        f"no prediction: the backbone gives NaN or infinity for {camera / '0.png'}; leave it out, or use a backbone "
        "that does not divide by zero (for example by the norm of a black image)",
        "3 of 4 images had no prediction",
    ]
    assert last_report(root)["skipped"] == 3


def test_frames_without_an_embedding_are_skipped(tiny_bundle, tmp_path: Path, monkeypatch, caplog):
    (tmp_path / "a.ssdedge").write_bytes(tiny_bundle(normalised=True))
    install(tmp_path / "root", tmp_path / "a.ssdedge")
    black = io.BytesIO()
    Image.new("RGB", (8, 8)).save(black, "JPEG")
    assert watch(Device.open(tmp_path / "root"), io.BytesIO(black.getvalue()), lambda answer: None) == 0
    assert "NaN or infinity for frame 1" in caplog.text


def test_one_answer_per_new_image(root: Path, camera: Path, monkeypatch):
    put(camera, "old.png", picture("cup"))

    def arrive() -> None:
        for number, name in enumerate(("nut", "screw")):
            put(camera, f"{number}.png", picture(name))

    driven = Driven(monkeypatch, nothing, arrive, *[nothing] * 12)
    lines = driven.run(Device.open(root), camera)
    assert [(line["image"], line["label"], line["nearest"], line["generation"]) for line in lines] == [
        (str(camera / "0.png"), "nut", "nut", 1),
        (str(camera / "1.png"), "screw", "screw", 1),
    ]
    assert set(lines[0]) == {"image", "label", "nearest", "score", "generation", "monotonic"}
    assert 1000 < lines[0]["monotonic"] <= lines[1]["monotonic"]
    assert lines[0]["score"] is None  # this bundle has no held-out results
    json.dumps(lines, allow_nan=False)
    assert [line["label"] for line in Driven(monkeypatch, *[nothing] * 9).run(
        Device.open(root), camera, existing=True
    )] == ["cup", "nut", "screw"]  # fmt: skip


def test_image_unlike_every_class_is_unknown(root: Path, camera: Path, monkeypatch):
    put(camera, "odd.png", picture("wedge"))
    (line,) = Driven(monkeypatch, *[nothing] * 4).run(Device.open(root), camera, existing=True)
    assert line["label"] == "unknown"
    assert line["nearest"] in COLOURS


def test_damaged_image_does_not_stop_the_loop(root: Path, camera: Path, monkeypatch, caplog):
    put(camera, "bad.png", b"no image")
    driven = Driven(monkeypatch, *[nothing] * 60)
    driven.steps = itertools.chain(driven.steps, [lambda: put(camera, "good.png", picture("cup"))], [nothing] * 8)
    assert [line["image"] for line in driven.run(Device.open(root), camera, existing=True)] == [
        str(camera / "good.png")
    ]
    assert caplog.text.count("bad.png is skipped") == 1


def test_missing_folder_does_not_stop_the_loop(root: Path, camera: Path, monkeypatch, caplog):
    away = camera.with_name("away")

    def back() -> None:
        away.rename(camera)
        put(camera, "a.png", picture("cup"))

    driven = Driven(monkeypatch, nothing, lambda: camera.rename(away), *[nothing] * 20, back, *[nothing] * 8)
    assert len(driven.run(Device.open(root), camera)) == 1
    assert caplog.text.count("cannot be read") == 1


def test_generation_of_another_process_answers_the_next_image(root: Path, camera: Path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    other = Device.open(root)

    def teach() -> None:
        other.learn("wedge", [pixels("wedge", seed) for seed in range(12)])

    def arrive() -> None:
        put(camera, f"{len(list(camera.iterdir()))}.png", picture("wedge", 77))

    driven = Driven(monkeypatch, arrive, *[nothing] * 8, teach, *[nothing] * 8, arrive, *[nothing] * 8)
    lines = driven.run(Device.open(root), camera, existing=True)
    assert [(line["label"], line["generation"]) for line in lines] == [("unknown", 1), ("wedge", 2)]
    assert "generation 2 is in use now" in caplog.text


def test_generations_are_read_only_after_a_commit(root: Path, camera: Path, monkeypatch):
    device, read = Device.open(root), []
    refresh = device.refresh
    monkeypatch.setattr(device, "refresh", lambda: read.append(0) or refresh())
    Driven(monkeypatch, *[nothing] * 40, lambda: Device.open(root).rename("cup", "mug"), *[nothing] * 40).run(
        device, camera
    )
    assert len(read) == 2  # at the start, and after the rename
    assert device.classes[0] == "mug"


def test_unreadable_generation_leaves_the_old_one_in_use(root, camera, monkeypatch, caplog):
    device, other = Device.open(root), Device.open(root)

    def fail() -> bool:
        raise EnvironmentUnfitError("too many open files")

    def commit() -> None:
        other.rename("cup", "mug")
        monkeypatch.setattr(device, "refresh", fail)
        put(camera, "a.png", picture("cup"))

    driven = Driven(monkeypatch, *[nothing] * 8, commit, *[nothing] * 20)
    assert [line["label"] for line in driven.run(device, camera)] == ["cup"]
    assert caplog.text.count("generation 1 stays in use") == 1


def test_device_without_classes_waits_for_the_first(empty: Path, camera, monkeypatch, caplog):
    other = Device.open(empty)
    put(camera, "a.png", picture("cup"))

    def teach() -> None:
        other.learn_all({name: [pixels(name, n) for n in range(12)] for name in ("cup", "nut")})

    driven = Driven(monkeypatch, *[nothing] * 30, teach, *[nothing] * 9)
    lines = driven.run(Device.open(empty), camera, existing=True)
    assert [(line["label"], line["generation"]) for line in lines] == [("cup", 2)]  # the image was not lost
    assert caplog.text.count("has no classes yet and waits") == 1
    assert last_report(empty)["images"] == 1


def stream(*frames: bytes) -> io.BytesIO:
    return io.BytesIO(b"".join(frames))


class Live(io.RawIOBase):
    """A stream whose frames the test sends."""

    def __init__(self) -> None:
        self.frames: queue.Queue[bytes] = queue.Queue()

    def read(self, size: int = -1) -> bytes:
        return self.frames.get()


def test_frames_have_numbers_and_a_stable_answer(root: Path, monkeypatch):
    live, driven = Live(), Driven(monkeypatch)
    shown = ["cup", "cup", "nut", "cup", "cup", *["screw"] * 4]

    def answer(answer: Answer) -> None:
        driven.answer(answer)
        driven.now += 0.1
        live.frames.put(frame(shown[len(driven.lines)], 5) if len(driven.lines) < len(shown) else b"")

    live.frames.put(frame(shown[0], 5))
    device = Device.open(root)
    assert watch(device, live, answer, clock=lambda: driven.now) == len(shown)
    assert [line["frame"] for line in driven.lines] == list(range(1, len(shown) + 1))
    assert [line["label"] for line in driven.lines] == shown
    assert [line["stable"] for line in driven.lines] == [None, None, "cup", "cup", "cup", "cup", None, "screw", "screw"]
    assert last_report(root)["images"] == 2  # a cup and a screw were seen, not nine images


def test_frames_of_another_generation_do_not_vote(root: Path, monkeypatch):
    live, other, driven = Live(), Device.open(root), Driven(monkeypatch)

    def answer(answer: Answer) -> None:
        driven.answer(answer)
        driven.now += 1.1  # the check for a new generation is due
        if len(driven.lines) == 3:
            other.rename("cup", "mug")
        live.frames.put(frame("cup", 5) if len(driven.lines) < 6 else b"")

    live.frames.put(frame("cup", 5))
    watch(Device.open(root), live, answer, clock=lambda: driven.now)
    assert [line["generation"] for line in driven.lines] == [1, 1, 1, 2, 2, 2]
    assert [line["stable"] for line in driven.lines] == [None, None, "cup", None, None, "mug"]


def test_loop_ends_with_the_stream(root: Path, caplog):
    lines: list[Answer] = []
    assert watch(Device.open(root), stream(), lines.append) == 0
    assert watch(Device.open(root), stream(frame("cup")[:-9]), lines.append) == 0
    assert "ended within a frame" in caplog.text
    damaged = b"\xff\xd8\xff\xda\x00\x02-\xff\xd9"
    assert watch(Device.open(root), stream(damaged), lines.append) == 0
    assert "frame 1 is" in caplog.text
    assert lines == []
    assert watch(Device.open(root), stream(frame("cup")), lines.append) == 1


def test_loop_without_classes_ends_with_the_stream(empty: Path):
    assert watch(Device.open(empty), stream(frame("cup"), frame("nut")), pytest.fail) == 0


def test_without_pytorch_it_predicts_and_measures_no_drift(root: Path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    device = Device.open(root)
    monkeypatch.setitem(sys.modules, "torch", None)
    lines: list[Answer] = []
    assert watch(device, stream(frame("cup")), lines.append) == 1
    assert [line.label for line in lines] == ["cup"]
    assert "drift is not measured: the package 'torch' is needed to measure drift" in caplog.text
    assert last_report(root) is None


def fill(camera: Path, count: int) -> None:
    for number in range(count):
        put(camera, f"{number:04d}.png", picture(("cup", "nut", "screw")[number % 3], number))


def test_counts_are_saved_reported_and_continued(root: Path, camera: Path, monkeypatch, solid):
    assert last_report(root) is None
    fill(camera, MINIMUM)
    Driven(monkeypatch, *[nothing] * (MINIMUM + 4)).run(Device.open(root), camera, existing=True)
    told = last_report(root)
    assert (told["images"], told["named"], told["generation"]) == (MINIMUM, MINIMUM, 1)
    assert told["level"] in ("stable", "moderate", "drifted")
    assert told["psi"] >= 0
    assert 0 <= told["reject_rate"] < 0.2
    assert told["untrusted_time"].endswith("Z")
    json.dumps(told, allow_nan=False)
    put(camera, "next.png", picture("cup"))
    put(camera, "other.png", picture("cup", 1))
    driven = Driven(monkeypatch, lambda: put(camera, "new.png", picture("cup", 2)), *[nothing] * 8)
    driven.run(Device.open(root), camera)
    told = last_report(root)
    assert (told["images"], told["named"]) == (MINIMUM + 1, 1)


def test_age_is_known_within_a_boot_only(root: Path, camera: Path, monkeypatch, tmp_path: Path):
    fill(camera, 1)
    named: list[dict[str, Any]] = []
    watch(Device.open(root), camera, named.append, existing=True, stopped=lambda: bool(named))
    assert 0 <= last_report(root)["age"] < 60
    (tmp_path / "boot").write_text("another\n")
    monkeypatch.setattr(watch_state, "_BOOT", tmp_path / "boot")
    assert last_report(root)["age"] is None
    monkeypatch.setattr(watch_state, "_BOOT", tmp_path / "none")
    assert last_report(root)["age"] is None


def test_counts_are_saved_once_per_minute_if_changed(root: Path, camera: Path, monkeypatch):
    written = []
    write = files.Tree.write
    monkeypatch.setattr(files.Tree, "write", lambda *a: written.append(driven.now) or write(*a))
    arrive = [lambda n=n: put(camera, f"{n}.png", picture("cup", n)) for n in range(200)]
    driven = Driven(monkeypatch, *arrive, *[nothing] * 500, step=1.0)
    assert len(driven.run(Device.open(root), camera)) == 200
    assert 3 <= len(written) <= 5, written
    assert all(later - earlier >= 60 for earlier, later in itertools.pairwise(written))


def test_full_disk_is_logged_and_predictions_continue(root: Path, camera: Path, monkeypatch, caplog):
    fill(camera, 3)

    def full(step: str, path: Path) -> None:
        if path.name == watch_state.NAME:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "fault_hook", full)
    assert len(Driven(monkeypatch, *[nothing] * 9).run(Device.open(root), camera, existing=True)) == 3
    assert "the drift counts were not saved" in caplog.text
    assert "the disk is full" in caplog.text
    assert last_report(root) is None


def test_cleanup_of_temporary_files_loses_no_counts(root: Path, camera: Path, monkeypatch):
    fill(camera, 1)
    cleared = []

    def clear(step: str, path: Path) -> None:
        if (step, path.name, cleared) == ("rename", watch_state.NAME, []):
            cleared.extend(root.glob(".tmp-*"))
            for temporary in cleared:
                temporary.unlink()

    monkeypatch.setattr(files, "fault_hook", clear)
    Driven(monkeypatch, *[nothing] * 4).run(Device.open(root), camera, existing=True)
    assert cleared
    assert last_report(root)["images"] == 1


def test_damaged_counts_are_ignored(root: Path, camera: Path, monkeypatch, caplog):
    fill(camera, 2)
    Driven(monkeypatch, *[nothing] * 4).run(Device.open(root), camera, existing=True)
    path = root / watch_state.NAME
    sound = path.read_bytes()
    places = [*range(0, len(sound), 97), sound.index(b"named"), sound.index(b"stored") if b"stored" in sound else 9]
    for place in places:
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 4]) + sound[place + 1 :])
        caplog.clear()
        assert last_report(root) is None, place
        assert "is damaged and is ignored" in caplog.text
    path.write_bytes(sound[: len(sound) // 2])
    assert last_report(root) is None
    put(camera, "more.png", picture("cup"))
    assert len(Driven(monkeypatch, *[nothing] * 6).run(Device.open(root), camera, existing=True)) == 3
    assert last_report(root)["images"] == 3  # started anew


def test_new_class_restarts_the_counts_but_a_rename_does_not(root: Path, camera: Path, monkeypatch):
    other = Device.open(root)
    fill(camera, 6)
    seen = []

    def kept() -> None:
        seen.append(last_report(root)["images"])

    def again(name: str) -> Callable[[], None]:
        return lambda: put(camera, name, picture("cup", 99))

    minute = [nothing] * 8
    driven = Driven(
        monkeypatch,
        *minute,
        kept,
        lambda: other.rename("cup", "mug"),
        *[nothing] * 2,
        again("x.png"),
        *minute,
        kept,
        lambda: other.learn("wedge", [pixels("wedge", n) for n in range(12)]),
        *[nothing] * 2,
        again("y.png"),
        *minute,
        kept,
        step=20.0,
    )
    driven.run(Device.open(root), camera, existing=True)
    assert seen == [6, 7, 1]


def test_drift_is_logged_once(root: Path, camera: Path, monkeypatch, caplog, solid):
    for number in range(MINIMUM + 150):  # the counts are saved twice more
        put(camera, f"{number}.png", picture("wedge", number))
    driven = Driven(monkeypatch, *[nothing] * (MINIMUM + 300), step=1.0)
    driven.run(Device.open(root), camera, existing=True)
    assert caplog.text.count("the images have drifted from those that were learned (drift: drifted") == 1


def test_strict_refuses_a_slower_runtime(tiny_bundle, tmp_path: Path, camera: Path):
    (tmp_path / "b.ssdedge").write_bytes(tiny_bundle(target="jetson"))
    install(tmp_path / "root", tmp_path / "b.ssdedge")
    with pytest.raises(SlowerProviderError):
        watch(Device.open(tmp_path / "root", strict=True), camera, print, stopped=lambda: True)
