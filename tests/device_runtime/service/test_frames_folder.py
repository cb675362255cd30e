"""`Folder` yields each new image once, for all kinds of writers and clocks."""

from __future__ import annotations

import io
import logging
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from device_runtime.service import frames
from device_runtime.service.frames import Folder
from ssd_edge.errors import InputError
from ssd_edge.images import Pixels


def jpeg(colour: tuple[int, int, int] = (200, 30, 30), size: int = 24) -> bytes:
    noise = np.random.default_rng(sum(colour)).integers(-25, 25, (size, size, 3))
    out = io.BytesIO()
    Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=95)
    return out.getvalue()


PLAIN, LARGE = jpeg(), jpeg((10, 200, 90), 200)


class Camera:
    """A folder and a clock that the test sets."""

    def __init__(self, path: Path, existing: bool = False) -> None:
        self.path, self.now = path, 100.0
        self.folder = Folder(path, existing, clock=lambda: self.now)

    def put(self, name: str, data: bytes = PLAIN) -> None:
        """Write an image under a temporary name and rename it."""
        (self.path / f"{name}.part").write_bytes(data)
        (self.path / f"{name}.part").rename(self.path / name)

    def look(self, size: int = 8) -> list[str]:
        found = list(self.folder.images(lambda: Pixels(size)))
        assert all(pixels.shape == (size, size, 3) for _, pixels in found)
        return [Path(path).name for path, _ in found]

    def look_every_second(self, times: int) -> None:
        """Put a good image before each look, and check that it is yielded alone."""
        for _ in range(times):
            self.put(f"good-{self.now}.jpg")
            assert self.look() == [f"good-{self.now}.jpg"]
            self.now += 1.0


@pytest.fixture
def camera(tmp_path: Path) -> Camera:
    return Camera(tmp_path)


def test_only_new_images_are_yielded(tmp_path: Path):
    (tmp_path / "old.jpg").write_bytes(PLAIN)
    camera = Camera(tmp_path)
    assert camera.look() == []
    (tmp_path / "below.jpg").mkdir()
    for name in ("b.jpg", "a.PNG", "note.txt", ".hidden.jpg"):
        camera.put(name)
    assert camera.look() == ["b.jpg", "a.PNG"]  # in order of arrival
    assert camera.look() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".hidden.jpg", "a.PNG", "b.jpg", "below.jpg", "note.txt", "old.jpg",
    ]  # fmt: skip


def test_subfolders_on_request(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "before.jpg").write_bytes(PLAIN)
    (tmp_path / "link").symlink_to(tmp_path / "old")
    plain, deep = Folder(tmp_path), Folder(tmp_path, recursive=True)
    assert not list(deep.images(lambda: Pixels(8)))
    (tmp_path / "2026" / "12").mkdir(parents=True)
    for name in ("2026/12/a.jpg", "old/b.jpg", "c.jpg"):
        (tmp_path / "x.part").write_bytes(PLAIN)
        (tmp_path / "x.part").rename(tmp_path / name)
    assert [Path(path).name for path, _ in plain.images(lambda: Pixels(8))] == ["c.jpg"]
    assert [path for path, _ in deep.images(lambda: Pixels(8))] == [
        str(tmp_path / name) for name in ("2026/12/a.jpg", "old/b.jpg", "c.jpg")
    ]
    shutil.rmtree(tmp_path / "2026")
    assert not list(deep.images(lambda: Pixels(8)))


def test_existing_images_on_request(tmp_path: Path):
    (tmp_path / "old.jpg").write_bytes(PLAIN)
    camera = Camera(tmp_path, existing=True)
    assert camera.look() == ["old.jpg"]
    assert camera.look() == []


def test_old_file_moved_into_the_folder_is_new(camera: Camera):
    outside = camera.path / "elsewhere.part"
    outside.write_bytes(PLAIN)
    os.utime(outside, (1, 1))
    outside.rename(camera.path / "moved.jpg")
    assert camera.look() == ["moved.jpg"]


def test_rewritten_file_is_new(camera: Camera):
    for colour in ((1, 2, 3), (30, 2, 3), (1, 40, 3)):
        camera.put("latest.jpg", jpeg(colour))
        assert camera.look() == ["latest.jpg"]
    (camera.path / "latest.jpg").write_bytes(jpeg((9, 9, 90)))  # in place
    assert camera.look() == ["latest.jpg"]
    assert camera.look() == []


def test_changed_mode_is_no_new_image(camera: Camera):
    camera.put("a.jpg")
    assert camera.look() == ["a.jpg"]
    (camera.path / "a.jpg").chmod(0o600)
    assert camera.look() == []


def test_links_are_followed(camera: Camera, tmp_path_factory):
    target = tmp_path_factory.mktemp("target") / "frame.jpg"
    target.write_bytes(PLAIN)
    (camera.path / "link.jpg").symlink_to(target)
    (camera.path / "dead.jpg").symlink_to(camera.path / "nothing")
    assert camera.look() == ["link.jpg"]
    assert camera.look() == []


def test_new_link_to_an_old_image_is_new(camera: Camera, monkeypatch):
    monkeypatch.setattr(frames, "WINDOW", 0)
    target = camera.path.parent / f"{camera.path.name}-old.jpg"
    target.write_bytes(PLAIN)
    for name in ("link.jpg", "again.jpg"):
        time.sleep(0.02)  # the clock of a file system ticks every few milliseconds
        (camera.path / name).symlink_to(target)
        assert camera.look() == [name]


def test_slowly_written_file_is_yielded_when_complete(camera: Camera, caplog):
    data = LARGE
    with open(camera.path / "slow.jpg", "wb") as file:
        for part in range(9):
            file.write(data[part * len(data) // 9 : (part + 1) * len(data) // 9])
            file.flush()
            camera.now += 4.0  # each pause is shorter than PATIENCE, their sum is longer
            assert camera.look() == (["slow.jpg"] if part == 8 else [])
    assert camera.look() == []
    assert not caplog.records


def test_damaged_file_is_given_up_with_one_warning(camera: Camera, caplog):
    camera.put("bad.jpg", b"no image")
    camera.put("empty.jpg", b"")
    camera.look_every_second(8)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "bad.jpg is skipped:" in told[0]
    assert "is not a JPEG, PNG, WebP, BMP, GIF or TIFF image" in told[0]
    camera.put("bad.jpg")  # repaired
    assert camera.look() == ["bad.jpg"]


def test_videos_and_unread_pictures_are_named_once(camera: Camera, caplog):
    for name in ("clip.mp4", "raw.CR2", "notes.txt", ".hidden.mp4"):
        camera.put(name, b"\0")
    camera.look_every_second(4)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "clip.mp4 is a video" in told[0]
    assert "raw.CR2 is a picture of a kind that is not read" in told[1]


def test_file_removed_before_reading(camera: Camera, caplog):
    caplog.set_level(logging.INFO)
    camera.put("a.jpg")
    camera.put("b.jpg")
    found = []
    for path, _ in camera.folder.images(lambda: Pixels(8)):
        found.append(Path(path).name)
        (camera.path / "b.jpg").unlink(missing_ok=True)
    assert found == ["a.jpg"]
    assert "removed before it was read" in caplog.text
    assert camera.look() == []


def test_file_that_is_too_large_is_given_up(camera: Camera, monkeypatch, caplog):
    monkeypatch.setattr(frames.images, "MAX_BYTES", 50)
    camera.put("film.jpg")
    for _ in range(4):
        assert camera.look() == []
        camera.now += 3.0
    assert len(caplog.records) == 1
    assert "but an image may have at most 50" in caplog.text


def test_number_of_unfinished_files_is_limited(camera: Camera, monkeypatch, caplog):
    monkeypatch.setattr(frames, "UNFINISHED", 2)
    for number in range(5):
        camera.put(f"{number}.jpg", b"half")
    assert camera.look() == []
    assert len(camera.folder._unfinished) == 2
    assert caplog.text.count("is skipped") == 3


def test_folder_that_disappears_and_returns(camera: Camera):
    away = camera.path.with_name("away")
    camera.put("a.jpg")
    assert camera.look() == ["a.jpg"]
    camera.path.rename(away)
    with pytest.raises(FileNotFoundError):
        camera.look()
    away.rename(camera.path)
    camera.put("b.jpg")
    assert camera.look() == ["b.jpg"]


def test_path_that_is_no_folder(tmp_path: Path):
    with pytest.raises(InputError, match="is not a folder"):
        Folder(tmp_path / "none")


class Drawn(Folder):
    """A folder with simulated files and times."""

    def __init__(self, path: Path, existing: bool = False) -> None:
        self.files: dict[str, int] = {}
        super().__init__(path, existing)

    def _files(self, folders):
        return ((name, when, (hash(name), when, 1)) for name, when in list(self.files.items()))


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch) -> Drawn:
    """Return a folder that yields and remembers ten files at once and whose ctime is that of its newest file."""
    monkeypatch.setattr(frames, "AT_ONCE", 10)
    monkeypatch.setattr(frames, "WINDOW", 100)
    folder = Drawn(tmp_path, existing=True)
    times = {"now": 0}
    folder.times = times

    class Clocked:
        st_ctime_ns = property(lambda self: times["now"])

    monkeypatch.setattr(frames.os, "stat", lambda path: Clocked())
    return folder


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 45)), min_size=1, max_size=15))
def test_each_file_once_and_in_order(steps: list[tuple[int, int]]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "AT_ONCE", 10)
        patch.setattr(frames, "WINDOW", 100)
        clock = [1000]
        patch.setattr(frames.os, "stat", lambda path: type("", (), {"st_ctime_ns": clock[0]})())
        patch.setattr(frames.files, "is_folder", lambda path: True)
        folder, seen = Drawn(Path("nowhere"), existing=True), []
        for later, count in steps:
            clock[0] += later
            folder.files |= {f"{len(folder.files) + n:05d}": clock[0] for n in range(count)}
            seen += folder._scan()
            assert len(folder._recent) <= 10
        for _ in range(len(folder.files) // 10 + 1):
            seen += folder._scan()
        assert seen == sorted(folder.files)


def test_clock_set_back_hides_no_new_file(drawn: Drawn, caplog):
    drawn.times["now"] = 10_000
    drawn.files = {f"old-{n}": 3_000 + 1_400 * n for n in range(6)}  # two of them are remembered by name
    assert len(drawn._scan()) == 6
    drawn.times["now"] = 2_000
    drawn.files["new-1"] = 2_000
    assert drawn._scan() == ["new-1"]
    assert "set back" in caplog.text
    drawn.times["now"] = drawn.files["new-2"] = 2_500
    assert drawn._scan() == ["new-2"]
    assert drawn._scan() == []
    assert len(caplog.records) == 1


def test_files_of_the_same_clock_tick_are_new(drawn: Drawn):
    drawn.times["now"] = drawn.files["m"] = 1_000
    assert drawn._scan() == ["m"]
    drawn.files |= {"a": 1_000, "z": 1_000, "b": 950}  # FAT counts in steps of two seconds
    assert drawn._scan() == ["b", "a", "z"]
    assert drawn._scan() == []


def test_files_from_the_future_hide_no_others(drawn: Drawn):
    drawn.files = {"from-2099": 10**9, "now": 1_000}
    drawn.times["now"] = 1_000
    assert drawn._scan() == ["now", "from-2099"]
    drawn.times["now"] = drawn.files["next"] = 5_000
    assert drawn._scan() == ["next"]
    assert drawn._scan() == []
