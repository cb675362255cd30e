"""A real process under mutated requests: forms, images, heads, chunks and lengths, over a socket."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from helpers.tiny_photos import picture

from device_runtime.install.bundle import install
from ssd_edge.system import MIB, resident

ROOT = Path(__file__).resolve().parents[3]
BOUNDARY = b"x7MA4YWxkTrZu0gW"
PATIENCE = 0.1  # seconds
KINDS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
HEAD = b"--" + BOUNDARY + b"\r\nContent-Disposition: form-data; name="
PIECES = (
    b"\r\n", b"\n", b"\r", b"\0", b"--", b"\xff" * 9, b"\xc3\x28", b"\xed\xa0\x80", b";" * 200, b'"', b"\\",
    b"Content-Type: multipart/mixed; boundary=y\r\n\r\n--y\r\n", b"Content-Length: -1\r\n",
    b"X: " + b"y" * 5000 + b"\r\n", b"=?utf-8?B?",
    b"X: y\r\n" * 20, b'; filename="../../../../tmp/ssd"', b"; filename*=UTF-8''%2e%2e%2fx", b'; name="label"',
    b"--" + BOUNDARY, b"\r\n--" + BOUNDARY + b"--\r\n", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"1" * 400,
)  # fmt: skip
STATUSES = {200, 202, 400, 404, 405, 413, 415, 503}


def png(width: int, height: int) -> bytes:
    """Return a PNG whose header tells any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(2**16)))
        + chunk(b"IEND", b"")
    )


def field(name: bytes, data: bytes, file: bytes = b"") -> bytes:
    return HEAD + name + (b'; filename="' + file + b'"' if file else b"") + b"\r\n\r\n" + data + b"\r\n"


BOMBS = [png(0, 5), png(5, 0), png(60_000, 60_000), png(2**31 - 1, 1), png(2**32 - 1, 2**32 - 1)]
BOMBS += [b"GIF89a\xff\xff\xff\xff\0\0\0", b"BM" + b"\xff" * 60, b"RIFF\xff\xff\xff\xffWEBPVP8L" + b"\xff" * 20]
BOMBS += [b"II*\0\x08\0\0\0" + b"\xff\xff" * 40, b"\xff\xd8\xff\xc2\0\x11\x08\xff\xff\xff\xff\3" + b"\1\x22\0" * 3]


class Process:
    """A service and how it is seen from outside."""

    def __init__(self, root: Path) -> None:
        self.temporary = root.parent / "tmp"
        self.temporary.mkdir()
        self.log = root.parent / "log"
        command = [sys.executable, "-m", "ssd_edge", "device", "serve", "--port", "0", "--root", str(root)]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary), "HOME": str(self.temporary)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=env, cwd=self.temporary
            )
        self.port = int(self.process.stdout.readline().rpartition(":")[2] or 0)

    def send(self, request: bytes) -> bytes:
        """Return the answer to some bytes. If there is none soon, more is awaited, but will not come."""
        with socket.create_connection(("127.0.0.1", self.port), 30) as connection:
            got = b""
            with contextlib.suppress(ConnectionError):
                connection.sendall(request)
                if not select.select([connection], [], [], PATIENCE)[0]:
                    connection.shutdown(socket.SHUT_WR)
                while part := connection.recv(65536):
                    got += part
                    head, _, body = got.partition(b"\r\n\r\n")
                    length = re.search(rb"\r\ncontent-length: (\d+)", head)
                    if length and len(body) >= int(length[1]):
                        break  # the rest of a request that was refused is dropped for a second
            return got

    def resident(self) -> int:
        """Return its memory in MiB."""
        found = resident("VmRSS", Path(f"/proc/{self.process.pid}"))
        assert found, "no VmRSS"
        return found // MIB

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        self.process.stdout.close()
        return self.process.wait(30)


@pytest.fixture(scope="module")
def served(tiny_bundle, tmp_path_factory) -> Iterator[tuple[Process, Path]]:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "tiny.ssdedge").write_bytes(tiny_bundle())
    install(folder / "root", folder / "tiny.ssdedge")
    process = Process(folder / "root")
    yield process, folder
    assert process.stop() == 0


def contents(folder: Path) -> dict[str, str]:
    files = [
        path for path in folder.rglob("*") if path.name not in ("log", ".lock")
    ]  # who writes to a root is in .lock
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in files}


def mutated(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 3, 6))):
        at = chance.randrange(len(changed) + 1)
        end = at + chance.choice((1, 1, 2, 4, 16, 200))
        match chance.randrange(5):
            case 0:
                changed[at:end] = chance.randbytes(len(changed[at:end]))
            case 1:
                del changed[at:end]
            case 2:
                changed[at:at] = changed[at:end]
            case 3:
                changed[at:at] = chance.choice(PIECES)
            case _:
                del changed[at + chance.randrange(2000) :]
    return bytes(changed)


PREDICT = (b"/v1/predict", b"/v1/predict?reject=false")
TEACH = (b"/v1/learn", b"/v1/captures/1/images")  # they load PyTorch, which takes seconds


LARGE = png(65_535, 1_000)  # 250 MiB while it is decoded


def form(chance: random.Random, paths: Sequence[bytes]) -> tuple[bytes, bytes]:
    """Return a path and a form for it, most of them damaged."""
    bombs = BOMBS if paths == PREDICT else [*BOMBS, LARGE]
    image = chance.choice(bombs) if chance.random() < 0.1 else picture("cup", chance.randrange(9), chance.choice(KINDS))
    if chance.random() < 0.4:
        image = mutated(image, chance)
    parts = [field(b"image", image, b"a.png")] * chance.choice((1, 1, 2, 5))
    path = chance.choice(paths)
    if path == b"/v1/learn" or chance.random() < 0.1:  # at most two images: too few to be learned
        parts = [*parts[:2], field(b"label", chance.choice((b"nut", b"\xff", b"", b"<b>", b"x" * 70, b"a\0b")))]
    if chance.random() < 0.1:
        parts.append(field(b"boxes", chance.choice((b"[[[0,0,8,8]]]", b"[" * 9999, b"[[[1e999,0,8,8]]]", b"{}"))))
    chance.shuffle(parts)
    whole = b"".join(parts) + b"--" + BOUNDARY + b"--\r\n"
    return path, mutated(whole, chance) if chance.random() < 0.7 else whole


def request(chance: random.Random, paths: Sequence[bytes]) -> bytes:
    """Return a request with a length, chunks, a wrong length, two, or a damaged head."""
    if chance.random() < 0.3:
        image = picture("nut", chance.randrange(9), chance.choice(KINDS))
        path, body = b"/v1/predict", chance.choice((mutated(image, chance), chance.choice(BOMBS)))
        kind = chance.choice((b"image/png", b"image/", b"application/octet-stream"))
    else:
        path, body = form(chance, paths)
        kind = b"multipart/form-data; boundary=" + BOUNDARY
        if chance.random() < 0.1:
            kind = mutated(kind, chance).translate(None, b"\r\n\0")
    head = b"POST " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: " + kind + b"\r\n"
    match chance.randrange(10):
        case 0 | 1:
            cuts = sorted(chance.randrange(len(body) + 1) for _ in range(chance.randrange(8)))
            parts = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True) if b > a]
            chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
            rest = b"Transfer-Encoding: chunked\r\n\r\n" + (
                mutated(chunks, chance) if chance.random() < 0.3 else chunks
            )
        case 2:
            wrong = chance.choice((len(body) + 9, max(len(body) - 9, 0), 0, 2**40, 10**30, -1))
            rest = b"Content-Length: %d\r\n\r\n" % wrong + body
        case 3:
            rest = b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % len(body) + body
        case _:
            rest = b"Content-Length: %d\r\n\r\n" % len(body) + body
    return mutated(head, chance) + rest if chance.random() < 0.1 else head + rest


@pytest.mark.parametrize(
    ("count", "paths"), [(300, PREDICT), pytest.param(10_000, PREDICT + TEACH, marks=pytest.mark.slow)]
)
def test_a_process_survives_mutated_requests(served, count, paths):
    process, folder = served
    body = b'{"label": "wedge"}'
    if paths != PREDICT:
        head = b"POST /v1/captures HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        assert b" 201 " in process.send(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    chance, seen, before, held = random.Random(count), Counter[int](), contents(folder), 0
    for number in range(count):
        if number == count // 5:
            held = process.resident()
        sent = request(chance, paths)
        answer = process.send(sent)
        found = {int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)}
        assert found <= STATUSES | {100, 403}, (sent, answer)  # 403: the name of the host was damaged
        seen.update(found or {0})
    for _ in range(1 if paths == PREDICT else 60):  # freed memory is given back every ten seconds
        after = process.resident()
        if after - held < 60:
            break
        time.sleep(0.25)
    print(f"{dict(seen)}, memory {held} -> {after} MiB")
    assert process.process.poll() is None
    assert process.send(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 200")
    assert after - held < 60
    assert contents(folder) == before
    said = process.log.read_text()
    assert "Traceback" not in said, said[-3000:]
    assert len(said) < 200 * count
    assert min(seen[200], seen[400]) > count / 20
