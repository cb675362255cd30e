"""Tests of the container format of docs/bundle.md: its canonical bytes and the refusal of all other forms."""

from __future__ import annotations

import io
import os
import random
import shutil
import stat
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from helpers import by_hand as hand

from ssd_edge import bundle, files
from ssd_edge.bundle import container
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError

contents, parts, resealed, sealed = hand.contents, hand.parts, hand.resealed, hand.sealed


def test_golden_bytes():
    data = bundle.pack(*parts())
    # version needed; no flags, stored, 00:00:00, 1980-01-01; CRC-32; both lengths; lengths of name and extra field
    common = bytes.fromhex("0a00 0000 0000 0000 2100 6f29ccf9 08000000 08000000 0d00 0000")
    assert data[:51] == b"PK\x03\x04" + common + b"MODEL_CARD.md" + b"# robot\n"
    directory = data.index(b"PK\x01\x02")
    # made by 1.0 on UNIX; no comment, disk 0, internal attributes 0; a regular file, rw-r--r--; offset
    before, after = b"PK\x01\x02\x0a\x03", bytes.fromhex("0000 0000 0000 0000a481 00000000")
    assert data[directory : directory + 59] == before + common + after + b"MODEL_CARD.md"
    # disk numbers; both entry counts; length and offset of the directory; length of the comment
    end = b"PK\x05\x06" + bytes.fromhex("0000 0000 0700 0700 af010000 4d0d0000 5900")
    assert data[-111:-64] == end + b"ssd-edge-bundle/1 sha256:"
    assert data[-64:] == files.sha256(data[:-64]).encode()
    # Changing this digest means changing the format: existing bundles would be refused.
    assert files.sha256(data) == "3d5105f1535be9f51ee74be7712370b3cf19ce4d39530ca2f2dac8c45e1fd54f"


def test_order_of_arguments_does_not_matter():
    manifest, entries = parts()
    backwards = bundle.pack(dict(reversed(manifest.items())), dict(reversed(entries.items())))
    assert backwards == bundle.pack(manifest, entries) == bundle.pack(manifest, entries)


def test_zipfile_and_unzip_open_it(tmp_path):
    path = tmp_path / "robot.ssdedge"
    bundle.write(path, bundle.pack(*parts()))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == sorted(archive.namelist())
        for info in archive.infolist():
            assert (info.compress_type, info.flag_bits, info.extra) == (zipfile.ZIP_STORED, 0, b"")
            assert info.date_time == (1980, 1, 1, 0, 0, 0)
            assert stat.filemode(info.external_attr >> 16) == "-rw-r--r--"
    if shutil.which("unzip"):
        subprocess.run(["unzip", "-tq", path], check=True, stdout=subprocess.DEVNULL)


def test_pack_and_read_round_trip(tmp_path):
    manifest, entries = parts()
    table = files.tensor_bytes({"indices": np.arange(3, dtype=np.uint32)}, {"n": 3})
    entries["table.safetensors"] = ("table", table)
    entries["calibration/notes.txt"] = ("notes", b"")
    manifest["learner"]["since"] = "a key unknown to version 1"
    data = bundle.pack(manifest, entries)
    path = tmp_path / "new folder" / "robot.ssdedge"
    bundle.write(path, data)
    got = bundle.read(path)
    packed = {name: data for name, (_, data) in entries.items()}
    assert got.entries == {**packed, "manifest.json": files.json_bytes(got.manifest)}
    assert {key: got.manifest[key] for key in manifest} == manifest
    assert (got.manifest["format"], got.manifest["version"]) == ("ssd-edge-bundle", 1)
    assert got.sha256 == files.sha256(data)
    assert got.registry.names == ["cup", "schraube ß"]
    assert got.read("backbone") == hand.onnx()
    assert got.signature is None
    assert got.roles["notes"] == "calibration/notes.txt"
    arrays, metadata = got.tensors("table")
    assert (arrays["indices"].tolist(), metadata) == ([0, 1, 2], {"n": 3})
    assert os.listdir(path.parent) == ["robot.ssdedge"]
    with pytest.raises(InputError, match="no entry for 'notes2'; it has: card, backbone, notes, cl"):
        got.read("notes2")


def test_missing_file_and_folder_are_input_errors(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.ssdedge cannot be read: No such file or directory; "):
        bundle.read(tmp_path / "nothing.ssdedge")
    with pytest.raises(InputError, match="cannot be read: Is a directory; check the path"):
        bundle.read(tmp_path)
    with pytest.raises(InputError, match=r"is a folder, but a file is needed; add the name of the file"):
        bundle.write(tmp_path, b"")


def test_only_a_regular_file_is_replaced(tmp_path):
    (tmp_path / "other").write_bytes(b"x")
    (tmp_path / "link").symlink_to("other")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "dangling", "pipe"):
        with pytest.raises(InputError, match="and only a regular file is replaced; choose another path"):
            bundle.write(tmp_path / name, b"new")
        with pytest.raises(EnvironmentUnfitError, match=f"^cannot write {tmp_path}/{name}: it is "):
            files.write_bytes(tmp_path / name, b"new")
    with pytest.raises(InputError, match=r"/dev/null is a device"):
        bundle.write("/dev/null", b"new")
    assert (tmp_path / "other").read_bytes() == b"x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "link", "other", "pipe"]
    bundle.write(tmp_path / "other", b"new")
    assert (tmp_path / "other").read_bytes() == b"new"


def test_import_does_not_load_torch_or_onnx():
    code = "import sys, ssd_edge.bundle; sys.exit(bool({'torch', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("fix_digest", [bytes, resealed], ids=["stale digest", "valid digest"])
def test_every_flipped_bit_is_refused(refusal, fix_digest):
    data, rng = bundle.pack(*parts()), random.Random(0)
    for position in range(len(data) - 64):
        flipped = bytearray(data)
        flipped[position] ^= 1 << rng.randrange(8)
        message = refusal(fix_digest(bytes(flipped)))
        if fix_digest is bytes and position < len(data) - len("ssd-edge-bundle/1 sha256:") - 64:
            assert message.startswith("it is damaged (it states sha256 11aa1915051e…, but its bytes give ")
    for position in range(len(data) - 64, len(data)):
        refusal(data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :])


def test_truncated_files_are_refused(refusal):
    data = bundle.pack(*parts())
    assert refusal(b"") == "it is empty (no 'ssd-edge-bundle/1 sha256:…' at its end); copy or build it again"
    for length in [*range(1, 100), *range(100, len(data) - 100, 37), *range(len(data) - 100, len(data))]:
        assert "it is not a bundle, or was cut short or appended to (no 'ssd-" in refusal(data[:length])


@pytest.mark.parametrize("more", [b"\n", b"\0", b"PK\x05\x06" + bytes(18), b"x" * 70_000])
def test_appended_and_prepended_bytes_are_refused(refusal, more):
    data = bundle.pack(*parts())
    assert "appended to" in refusal(data + more)
    assert "it is damaged" in refusal(more + data)
    refusal(resealed(more + data))
    refusal(resealed(data[:-89] + more + data[-89:]))


def test_random_bytes_are_refused(refusal):
    rng = random.Random(2)
    for length in range(0, 400, 7):
        for noise in (rng.randbytes(length), b"PK\x03\x04" + rng.randbytes(length)):
            refusal(noise)
            refusal(resealed(noise + container._COMMENT + bytes(64)))


def zipped(**options) -> bytes:
    """Return the entries of the tiny bundle as written by `zipfile`, with the right comment and digest."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **options) as packed:
        for name, data in sorted(contents().items()):
            packed.writestr(name, data)
        packed.comment = container._COMMENT + bytes(64)
    return resealed(stream.getvalue())


def replaced(old: bytes, new: bytes, count: int = -1) -> bytes:
    """Return the tiny bundle with some bytes replaced and the digest recomputed."""
    data = bundle.pack(*parts())
    assert old in data
    return resealed(data.replace(old, new, count))


@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param(lambda: zipped(), id="stored by zipfile"),
        pytest.param(lambda: zipped(compression=zipfile.ZIP_DEFLATED), id="compressed"),
        pytest.param(lambda: replaced(b"\x00\x00\xa4\x81", b"\x00\x00\xff\xa1"), id="symbolic links"),
        pytest.param(lambda: replaced(b"\x21\x00", b"\x22\x00"), id="another date"),
        pytest.param(lambda: replaced(b"PK\x01\x02", b"PK\x01\x02PK\x01\x02", 1), id="a gap"),
        pytest.param(lambda: replaced(b"\x00\x00MODEL", b"\x01\x00MODEL"), id="an extra field"),
        pytest.param(lambda: replaced(b"MODEL_CARD.md#", b"NODEL_CARD.md#"), id="two names for one entry"),
        pytest.param(lambda: resealed(sealed(contents() | {"zz.md": b""}).replace(b"zz.md", b"AA.md")), id="unsorted"),
    ],
)
def test_noncanonical_bytes_with_valid_digest_are_refused(refusal, hostile):
    assert "another tool may have packed it" in refusal(hostile())


@pytest.mark.parametrize(
    "name",
    ["", "../x", "/x", "a/../b", "a//b", "a/", "./a", ".a", "-rf", "a b", "a\\b", "C:a", "a\n", "x" * 129],
)
def test_unsafe_entry_names_are_refused(refusal, name):
    assert "is not allowed: it is absolute, hidden" in refusal(sealed({**contents(), name: b""}))
    manifest, entries = parts()
    with pytest.raises(BundleRefusedError, match="is not allowed"):
        bundle.pack(manifest, {**entries, name: ("other", b"")})


@pytest.mark.parametrize(
    "name", ["a.engine", "a.plan", "a.trt", "a.so", "a.py", "a.pkl", "a.pt", "a.sh", "a.JSON", "a", "a.onnx/b", "x.sig"]
)
def test_unknown_suffixes_are_refused(refusal, name):
    message = refusal(sealed({**contents(), name: b""}))
    assert (
        f"its entry {name!r} has a suffix that is not allowed in a bundle; allowed are .csv .html .json .md .onnx"
        in message
    )


def test_colliding_entry_names_are_refused(refusal):
    entries = contents()
    assert "differ only in case" in refusal(sealed({**entries, "Classes.json": b""}))
    assert "'classes.json/x' is inside another entry" in refusal(sealed({**entries, "classes.json/x": b""}))
    twice = sealed({**entries, "extra-a": b"", "extra-b": b""}).replace(b"extra-b", b"extra-a")
    assert "its entry 'extra-a' is there twice" in refusal(resealed(twice))
    foreign = sealed({**entries, "extra-a": b""}).replace(b"extra-a", b"extra-\xe9")
    assert "is not allowed" in refusal(resealed(foreign))


def test_limits(refusal, monkeypatch):
    many = {f"{number}": b"" for number in range(60)}
    assert "it has more than 64 entries" in refusal(sealed({**contents(), **many}))
    big = b'"' + b"x" * bundle.MAX_JSON_BYTES + b'"\n'
    message = refusal(hand.with_entry("big.json", big, "big"))
    assert "its big.json has 2097155 bytes, but at most 2097152 are allowed" in message
    oversized = replaced(b"\x08\x00\x00\x00\x08\x00\x00\x00", b"\xff\xff\xff\xff\xff\xff\xff\xff")
    assert "its entry 'MODEL_CARD.md' is longer than the file" in refusal(oversized)
    data = bundle.pack(*parts())
    for limit in (1500, len(data) - 1):
        monkeypatch.setattr(container, "MAX_BYTES", limit)
        assert refusal(data) == f"it has {len(data)} bytes, but a bundle has at most {limit}"
        with pytest.raises(BundleRefusedError, match=f"bytes, but a bundle has at most {limit}"):
            bundle.pack(*parts())
    monkeypatch.setattr(container, "MAX_BYTES", len(data))
    assert bundle.pack(*parts()) == data


def test_unsupported_versions_are_refused(refusal):
    expected = "it has format version 2; this SSD-Edge reads 1; upgrade SSD-Edge on this machine"
    assert refusal(replaced(b"ssd-edge-bundle/1 ", b"ssd-edge-bundle/2 ")) == expected
    assert refusal(hand.with_manifest(version=2)).startswith(expected)
    assert refusal(hand.with_manifest(version=0)).startswith("it has format version 0; this SSD-Edge reads 1 (")
