"""Splitting of JPEG streams into frames, for any input."""

from __future__ import annotations

import io
import itertools
import queue
import random
import threading
import time
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from device_runtime.service import frames
from device_runtime.service.frames import Newest, RateLimitedWarning, mjpeg, take
from ssd_edge.errors import InputError
from ssd_edge.images import Pixels


def jpeg(colour: tuple[int, int, int] = (200, 30, 30), size: int = 24, preview: bool = False, **options) -> bytes:
    """Return a JPEG with noise, so that its data has stuffed zeros."""
    noise = np.random.default_rng(sum(colour)).integers(-25, 25, (size, size, 3))
    image = Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))
    if preview:  # a JPEG inside a segment, as written by cameras
        small = io.BytesIO()
        image.resize((8, 8)).save(small, "JPEG")
        options["exif"] = b"Exif\0\0" + small.getvalue()
    out = io.BytesIO()
    image.save(out, "JPEG", **{"quality": 95, **options})
    return out.getvalue()


KINDS = {
    "plain": jpeg(),
    "large": jpeg((10, 200, 90), 200),
    "progressive": jpeg((90, 90, 200), 64, progressive=True),
    "restarts": jpeg((120, 120, 10), 64, restart_marker_blocks=1),
    "preview": jpeg((40, 40, 160), 64, preview=True),
    "comment": jpeg((60, 10, 60), comment=b"\xff\xd8\xff\xd9 and \xff\xd8\xff\xe0"),
}


class Pieces(io.RawIOBase):
    """A stream that returns pieces of random size."""

    def __init__(self, data: bytes, sizes: Iterator[int]) -> None:
        self.left, self.sizes = memoryview(data), sizes

    def read(self, size: int = -1) -> bytes:
        count = min(max(next(self.sizes, 1), 1), size)
        piece, self.left = self.left[:count], self.left[count:]
        return bytes(piece)


def cut(data: bytes, **options) -> list[bytes]:
    return list(mjpeg(io.BytesIO(data), **options))


def test_samples_have_the_intended_markers():
    assert all(Image.open(io.BytesIO(data)).getbbox() for data in KINDS.values())
    assert b"\xff\x00" in KINDS["large"]
    assert b"\xff\xd0" in KINDS["restarts"]
    assert KINDS["progressive"].count(b"\xff\xda") > 1
    assert KINDS["preview"].count(b"\xff\xd8\xff") == 2
    assert KINDS["preview"].count(b"\xff\xd9") == 2


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_unchanged(kind: str):
    sent = [KINDS[kind], KINDS["plain"], KINDS[kind]]
    assert cut(b"".join(sent)) == sent


@settings(max_examples=60)
@given(st.lists(st.sampled_from(list(KINDS.values())), max_size=6), st.randoms(use_true_random=False), st.data())
def test_pieces_and_bytes_between_frames_do_not_matter(sent: list[bytes], chance: random.Random, data):
    # without the start of a JPEG, which would be ambiguous
    between = st.binary(max_size=40).map(lambda some: some.replace(b"\xff", b"-"))
    stream = b"".join(data.draw(between) + frame for frame in sent) + data.draw(between)
    assert list(mjpeg(Pieces(stream, iter(lambda: chance.choice((1, 2, 3, 500, 10**6)), 0)))) == sent


def test_multipart_headers_are_skipped(caplog):
    part = b"\r\n--frame\r\nContent-Type: image/jpeg\r\n\r\n"
    assert cut(part + KINDS["plain"] + part + KINDS["large"] + part) == [KINDS["plain"], KINDS["large"]]
    assert not caplog.records


def test_fill_bytes_before_markers():
    plain = KINDS["plain"]
    first = plain.index(b"\xff\xdb")
    filled = plain[:first] + b"\xff\xff\xff" + plain[first:-2] + b"\xff\xff" + plain[-2:]
    assert cut(filled + plain) == [filled, plain]


def test_markers_inside_a_split_header_are_ignored():
    odd = b"\xff\xd8\xff\xda\x00\x07\x01\xff\xd9\x02\xff" + b"\xd9 data \xff\x00" + b"\xff\xd9"
    for size in range(1, len(odd) + 1):
        assert list(mjpeg(Pieces(odd + odd, itertools.repeat(size)))) == [odd, odd]


def test_end_within_a_frame_is_logged(caplog):
    plain = KINDS["plain"]
    for length in range(3, len(plain)):
        caplog.clear()
        assert cut(plain + plain[:length]) == [plain]
        assert [record.getMessage() for record in caplog.records] == [
            f"the stream ended within a frame; its first {length} bytes were dropped"
        ]


def test_truncated_frame_does_not_affect_the_next(caplog):
    large, plain = KINDS["large"], KINDS["plain"]
    broken = large[: large.index(b"\xff\xda") + 200]
    assert cut(plain + broken + plain + large) == [plain, plain, large]
    assert "broken after" in caplog.text


@pytest.mark.parametrize(
    "bad",
    [b"\xff\xd8\xff\xd9", b"\xff\xd8\xff\xe0\x00\x01", b"\xff\xd8\xff\x02", b"\xff\xd8\xff\xc8\x00\x04ab"],
    ids=["nothing in it", "length below two", "no marker of a JPEG", "reserved marker"],
)
def test_bytes_that_start_like_a_frame(bad: bytes, caplog):
    assert cut(bad + KINDS["plain"]) == [KINDS["plain"]]
    assert len(caplog.records) == 1


def test_frame_over_the_limit_is_dropped_and_logged(caplog):
    plain, large = KINDS["plain"], KINDS["large"]
    assert cut(plain + large + plain, limit=len(large) - 1) == [plain, plain]
    assert f"larger than {len(large) - 1} bytes" in caplog.text
    assert cut(plain + large + plain, limit=len(large)) == [plain, large, plain]
    endless = b"\xff\xd8\xff\xda\x00\x02" + b"\x11" * 500_000
    assert cut(endless + plain, limit=100_000) == [plain]


@pytest.mark.parametrize("start", [b"", b"\xff\xd8\xff\xda\x00\x02"], ids=["no start", "no end"])
def test_memory_is_that_of_one_frame(start: bytes):
    limit = 10 * frames.BLOCK
    blocks = itertools.chain([start], itertools.repeat(b"\x11" * frames.BLOCK, 400))  # 26 MB

    class Long(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            return next(blocks, b"")

    stream = Long()
    tracemalloc.start()
    try:
        assert list(mjpeg(stream, limit)) == []
        assert tracemalloc.get_traced_memory()[1] < 4 * limit
    finally:
        tracemalloc.stop()


@settings(max_examples=300)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=30),
            st.sampled_from([b"\xff", b"\xff\xd8\xff", b"\xff\xd9", b"\xff\xda\x00\x02", b"\xff\xe1\x00\x09"]),
            st.sampled_from([KINDS["plain"], KINDS["preview"][:400], b"\xff" * 50]),
        ),
        max_size=12,
    ),
    st.integers(1, 50),
)
@example([b"\xff\xd8\xff"] * 5, 1)
def test_any_bytes(parts: list[bytes], piece: int):
    data = b"".join(parts)
    whole = cut(data)
    assert whole == list(mjpeg(Pieces(data, iter(lambda: piece, 0))))
    at = 0
    for frame in whole:  # each is a part of the stream after the previous one
        at = data.index(frame, at) + len(frame)
        assert frame.startswith(b"\xff\xd8\xff")
        assert frame.endswith(b"\xff\xd9")


def test_failing_stream_ends(caplog):
    class Failing(io.RawIOBase):
        def __init__(self) -> None:
            self.data = KINDS["plain"] + KINDS["plain"][:50]

        def read(self, size: int = -1) -> bytes:
            data, self.data = self.data, b""
            if not data:
                raise OSError(5, "Input/output error")
            return data

    assert list(mjpeg(Failing())) == [KINDS["plain"]]
    assert "Input/output error" in caplog.text


def test_repeated_warnings_are_counted(caplog):
    now = [0.0]
    sparingly = RateLimitedWarning(lambda: now[0])
    for _ in range(200):
        sparingly.warn("broken", "bad_frame")
        now[0] += 1.0
    assert [record.getMessage() for record in caplog.records] == [
        "broken", "broken (59 more since the last time)", "broken (59 more since the last time)",
        "broken (59 more since the last time)",
    ]  # fmt: skip


def test_take_decodes_frames_at_intervals(caplog):
    now = [0.0]

    class Camera(io.RawIOBase):
        """Ten frames per second; the eleventh and twelfth are damaged."""

        sent = 0

        def read(self, size: int = -1) -> bytes:
            self.sent += 1
            now[0] = self.sent / 10
            return b"\xff\xd8\xff\xda\x00\x02-\xff\xd9" if self.sent in (11, 12) else jpeg((self.sent, 0, 0))

    camera = Camera()
    found = take(camera, 3, 1.0, Pixels(8), clock=lambda: now[0])
    assert [array.shape for array in found] == [(8, 8, 3)] * 3
    # the 1st, the 13th in place of the damaged 11th, the 23rd
    assert camera.sent == 23
    assert caplog.text.count("taking the next frame instead") == 2


def test_take_from_a_stream_that_is_too_short():
    with pytest.raises(InputError, match="ended after 2 of 3 frames"):
        take(io.BytesIO(KINDS["plain"] * 2), 3, 0.0, Pixels(8))
    assert len(take(io.BytesIO(KINDS["plain"] * 4), 3, 0.0, Pixels(8))) == 3


def test_newest_frame_is_taken_and_older_ones_are_dropped():
    arriving: queue.Queue[bytes | None] = queue.Queue()
    newest = Newest(iter(arriving.get, None))
    assert newest.take(0.01) is None
    for number in range(5):
        arriving.put(bytes([number]))
    arriving.put(b"last")
    arriving.put(None)
    while not newest._over:
        time.sleep(0.001)
    assert not newest.ended
    assert newest.take(5) == (6, b"last")
    assert newest.take(0) is None
    assert newest.ended


def test_waiting_ends_with_the_next_frame():
    arriving: queue.Queue[bytes | None] = queue.Queue()
    newest = Newest(iter(arriving.get, None))
    threading.Timer(0.02, arriving.put, [b"one"]).start()
    assert newest.take(30) == (1, b"one")
    threading.Timer(0.02, arriving.put, [None]).start()
    assert newest.take(30) is None
