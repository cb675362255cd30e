"""The tray of moments in doubt: what is one moment, what is kept of it, and what goes when it is full."""

from __future__ import annotations

import numpy as np
import pytest

from device_runtime.device import Prediction
from device_runtime.serve.frame import Frame, as_jpeg
from device_runtime.serve.tray import FRAMES, MOST, Tray
from ssd_edge.errors import InputError

UNSURE = Prediction("frame", "unknown", 0.71234567, 3, "cup", -0.1)
RNG = np.random.default_rng(0)


def view(seed: int, noise: float = 0.0, dim: int = 200) -> np.ndarray:
    """Return a unit vector; those of different seeds are nearly at right angles."""
    vector = np.random.default_rng(seed).normal(size=dim)
    vector = vector / np.linalg.norm(vector) + noise * RNG.normal(size=dim) / np.sqrt(dim)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def offer(tray: Tray, at: float, seed: int, noise: float = 0.05, camera: str = "1", size: int = 100) -> None:
    tray.offer(Frame(camera, round(at * 10), at, bytes(size)), UNSURE, view(seed, noise))


def ids(tray: Tray) -> list[str]:
    return [moment["id"] for moment in tray.list()]


def test_a_moment_and_its_frames() -> None:
    counts: list[int] = []
    tray = Tray(counts.append)
    offer(tray, 1.0, 1)
    (moment,) = tray.list()
    assert moment.pop("age") >= 0
    assert moment == {
        "id": "1", "camera": "1", "at": 1.0, "label": "unknown", "nearest": "cup", "score": 0.712346, "frames": 1,
    }  # fmt: skip
    assert [frame.number for frame in tray.frames("1")] == [10]
    assert tray.frames("2") == tray.frames("-1") == tray.frames("¹") == []
    assert tray.remove("1")
    assert not tray.remove("1")
    assert counts == [1, 0]


def test_frames_that_are_the_same_are_kept_once() -> None:
    tray = Tray()
    for number in range(50):
        offer(tray, number / 10, 1)
    assert [moment["frames"] for moment in tray.list()] == [1]
    assert tray.list()[0]["at"] == 4.9


def test_something_that_is_turned_is_one_moment_of_up_to_five_views() -> None:
    tray = Tray()
    for number in range(9):
        offer(tray, 1 + number, number)
    assert [moment["frames"] for moment in tray.list()] == [FRAMES]
    assert [frame.number for frame in tray.frames("1")] == [10, 20, 30, 40, 50]


def test_a_moment_ends_when_there_was_no_doubt_for_a_while() -> None:
    tray = Tray()
    offer(tray, 1.0, 1)
    offer(tray, 4.0, 2)
    assert ids(tray) == ["2", "1"]
    offer(tray, 100.0, 1)  # the same thing again
    assert ids(tray) == ["1", "2"]
    offer(tray, 100.1, 1, camera="2")  # of another camera
    assert ids(tray) == ["3", "1", "2"]


def test_a_boring_scene_is_one_moment_all_day() -> None:
    tray = Tray()
    for hour in range(24):
        for second in range(0, 60, 3):
            offer(tray, 3600 * hour + second, 7, noise=0.3)
    (moment,) = tray.list()
    assert 1 <= moment["frames"] <= FRAMES


def test_a_restless_scene_gives_a_moment_per_ten_seconds_and_pushes_nothing_else_out() -> None:
    tray = Tray()
    for number in range(10):
        offer(tray, 10.0 * number, 1000 + number)  # ten different things
    rare = {str(number) for number in range(1, 11)}
    common = view(5)
    for number in range(3000):  # five minutes of leaves in the wind: all somewhat alike, none the same
        noisy = common + 1.2 * view(10_000 + number)
        noisy = (noisy / np.linalg.norm(noisy)).astype(np.float32)
        tray.offer(Frame("1", number, 200 + number / 10, bytes(100)), UNSURE, noisy)
    assert len(ids(tray)) <= 10 + 3000 / 10 / 10 + 1
    for number in range(100):  # half an hour more, with pauses
        noisy = common + 1.2 * view(20_000 + number)
        noisy = (noisy / np.linalg.norm(noisy)).astype(np.float32)
        tray.offer(Frame("1", number, 600 + 20.0 * number, bytes(100)), UNSURE, noisy)
    assert len(ids(tray)) == MOST
    assert rare <= set(ids(tray))
    assert tray.list()[0]["at"] == 600 + 20.0 * 99  # the last one is there, too


def test_bytes_are_bounded() -> None:
    tray = Tray(most_bytes=100_000)
    for number in range(20):
        offer(tray, 10.0 * number, number, size=20_000)
    assert len(ids(tray)) == 4
    offer(tray, 1000.0, 1, size=30_000)  # more than a moment may have
    assert len(ids(tray)) == 4
    small = Tray(most_bytes=100_000)
    for number in range(9):
        offer(small, 1 + number, number, size=10_000)
    assert [moment["frames"] for moment in small.list()] == [2]


@pytest.mark.parametrize("name", ["", "x", "-1", "1" * 5000, "٣", "1\0"])
def test_what_is_no_id_is_no_moment(name: str) -> None:
    assert Tray().frames(name) == []
    assert not Tray().remove(name)


def test_moments_of_another_backbone_go_first() -> None:
    tray = Tray(most=3)
    for number in range(3):
        offer(tray, 10.0 * number, number)
    tray.offer(Frame("1", 1, 100.0, b""), UNSURE, view(1, dim=64))
    tray.offer(Frame("1", 1, 110.0, b""), UNSURE, view(2, dim=64))
    assert ids(tray) == ["5", "4", "3"]


def test_an_image_becomes_a_jpeg_and_a_jpeg_stays_as_it_is() -> None:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGBA", (3000, 1500), (255, 0, 0, 255)).save(out, "PNG")
    with Image.open(io.BytesIO(as_jpeg(out.getvalue(), "a"))) as image:
        assert (image.format, image.size) == ("JPEG", (1920, 960))
        kept = io.BytesIO()
        image.save(kept, "JPEG")
    assert as_jpeg(kept.getvalue(), "a") == kept.getvalue()
    with pytest.raises(InputError):
        as_jpeg(kept.getvalue()[:300], "a")
