"""Mutated forms, images and tensors: each is answered or refused, nothing is written, and memory stays flat."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_photos import picture, pixels

from ssd_edge.system import MIB, resident

BOUNDARY = "----WebKitFormBoundary7MA4YWxkTrZu0gW"
WORDS = (
    b"\r\n", b"--", b"\0", b"\xff" * 9, b"Content-Disposition: ", b"Content-Type: text/plain; charset=utf-7\r\n",
    b"Content-Transfer-Encoding: base64\r\n", b'filename="../../../etc/passwd"', b"filename*=UTF-8''%2e%2e%2f",
    b"; " * 50,
    BOUNDARY.encode(), f"\r\n--{BOUNDARY}--\r\n".encode(), b"IHDR\xff\xff\xff\xff\xff\xff\xff\xff", b"1" * 400,
)  # fmt: skip


def whole_form(kinds: tuple[str, ...] = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")) -> bytes:
    parts = []
    for number, kind in enumerate(kinds):
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="{number}.{kind}"\r\n'
        parts.append(head.encode() + b"Content-Type: image/x\r\n\r\n" + picture("cup", number, kind) + b"\r\n")
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def whole_tensor() -> tuple[bytes, int]:
    images = np.stack([pixels("cup"), pixels("nut")])
    tensor = {"name": "images", "datatype": "UINT8", "shape": list(images.shape)}
    head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": images.nbytes}}]}).encode()
    return head + images.tobytes(), len(head)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Return bytes with up to five changes: replaced, cut out, doubled, inserted, cut off."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 5)):
        at = chance.randrange(len(changed) + 1)
        some = slice(at, at + chance.choice((1, 2, 8, 64, 300)))
        match chance.randrange(6):
            case 0:
                changed[some] = chance.randbytes(len(changed[some]))
            case 1:
                del changed[some]
            case 2:
                changed[at:at] = changed[some]
            case 3:
                changed[at:at] = chance.choice(WORDS)
            case 4:
                changed[some] = chance.choice(WORDS)
            case _:
                del changed[at + chance.randrange(len(changed) + 1) :]
    return bytes(changed)


def attack(client, root: Path, count: int, seed: int) -> dict[int, int]:
    """Send `count` mutated requests, and return how many had which status."""
    chance, seen = random.Random(seed), {}
    capture = client.post("/v1/captures", json={"label": "wedge"}).json()["id"]
    form, small, (tensor, length) = whole_form(), whole_form(("PNG",)), whole_tensor()
    kind = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    before = sorted(str(path) for path in root.rglob("*"))
    held = 0
    for number in range(count):
        if number == count // 4:  # after the first, everything is loaded
            held = resident()
        match number % 5:
            case 0 | 1:
                answer = client.post("/v1/predict", content=mutated(form, chance), headers=kind)
            case 2:
                data = mutated(picture("cup", 1, chance.choice(("PNG", "JPEG", "GIF", "WEBP", "TIFF"))), chance)
                answer = client.post("/v1/predict", content=data, headers={"content-type": "image/png"})
            case 3:
                answer = client.post(f"/v1/captures/{capture}/images", content=mutated(small, chance), headers=kind)
                if answer.status_code == 200 and answer.json()["images"] > 150:
                    client.delete(f"/v1/captures/{capture}")
                    capture = client.post("/v1/captures", json={"label": "wedge"}).json()["id"]
            case _:
                headers = {"inference-header-content-length": str(length + chance.choice((0, 0, 0, 1, -1, 40)))}
                answer = client.post("/v2/models/ssd-edge/infer", content=mutated(tensor, chance), headers=headers)
        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
        assert answer.status_code in (200, 400, 413), answer.text
        if answer.status_code != 200:
            assert set(answer.json()) == {"error", "code"}
            assert answer.json()["code"] == 2
    assert resident() - held < 60 * MIB
    assert sorted(str(path) for path in root.rglob("*")) == before
    return seen


@pytest.fixture(autouse=True)
def _no_temporary_files(client, root, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a temporary file was asked for")

    for name in ("NamedTemporaryFile", "SpooledTemporaryFile", "TemporaryFile", "mkstemp", "mkdtemp"):
        monkeypatch.setattr(f"tempfile.{name}", refuse)


def test_mutated_requests_are_answered_or_refused(client, root):
    seen = attack(client, root, 400, 1)
    assert seen[200] > 5
    assert seen[400] > 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_ten_thousand_mutated_requests_are_answered_or_refused(client, root, seed):
    assert sum(attack(client, root, 5000, seed).values()) == 5000


@pytest.mark.parametrize(
    "name",
    ["../../../etc/passwd", "/etc/shadow", "..\\..\\x", "a\0b", "", "x" * 5000, "\u202egnp.exe", "<svg/onload=x>"],
)
def test_a_file_name_is_only_shown(client, root, name):
    before = sorted(root.rglob("*"))
    answer = client.post("/v1/predict", files=[("image", (name, picture("cup")))])
    assert answer.status_code in (200, 400)
    assert answer.headers["content-type"] == "application/json"
    assert sorted(root.rglob("*")) == before


def test_many_small_parts_and_long_heads_are_refused(client):
    part = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"\r\n\r\n\r\n'.encode()
    kind = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    assert client.post("/v1/predict", content=part * 20_000, headers=kind).status_code == 413
    head = f"--{BOUNDARY}\r\n".encode() + b"X-Y: z\r\n" * 100_000
    assert client.post("/v1/predict", content=head, headers=kind).status_code == 400
    line = f"--{BOUNDARY}\r\n".encode() + b"X-Y: " + b"z" * 2**20
    assert client.post("/v1/predict", content=line, headers=kind).status_code == 400
    long = {"content-type": "multipart/form-data; boundary=" + "x" * 5000}
    assert client.post("/v1/predict", content=b"", headers=long).status_code == 400
