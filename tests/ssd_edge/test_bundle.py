"""docs/bundle.md, sentence by sentence: the one byte form, and what is refused."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import stat
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from ssd_edge import bundle, files
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import BundleRefusedError, InputError

CLASSES = ClassRegistry().add("cup").add("schraube ß")


def safetensors(*values: float) -> bytes:
    """By hand, so that the golden bytes do not depend on the version of the library."""
    header = b'{"w":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (len(values), 4 * len(values))
    return struct.pack("<Q", len(header)) + header + struct.pack(f"<{len(values)}f", *values)


def parts() -> tuple[dict, dict[str, tuple[str, bytes]]]:
    """The manifest and the entries of a tiny bundle."""
    onnx = b"an ONNX file"
    backbone = {"file": "backbone.onnx", "sha256": files.sha256(onnx)}
    manifest = {
        "name": "robot",
        "created": "2026-11-21T04:33:00Z",
        "producer": {"ssd_edge": "0.1.0", "git": "unknown", "packages": {}},
        "backbone": {**backbone, "size": 8, "dim": 2, "precision": "fp32", "id": "test"},
        "learner": {"name": "ssd", "settings": {"k": 10}},
        "classes": CLASSES.names,
        "metrics": {"average_accuracy": 0.5},
        "parity": {},
    }
    entries = {
        "backbone.onnx": ("backbone", onnx),
        "learner.safetensors": ("learner", safetensors(1.0, -2.0)),
        "statistics.safetensors": ("statistics", safetensors(3.0)),
        "classes.json": ("classes", files.json_bytes(CLASSES.to_json())),
        "MODEL_CARD.md": ("card", b"# robot\n"),
    }
    return manifest, entries


def sealed(entries: dict[str, bytes]) -> bytes:
    """A bundle of any entries, without a check: the canonical bytes, with the right digest."""
    return b"".join(bundle._canonical(entries))


def resealed(data: bytes) -> bytes:
    """The same bytes with a digest that agrees with them."""
    return data[:-64] + files.sha256(data[:-64]).encode()


def contents() -> dict[str, bytes]:
    """Name → data of the tiny bundle, the manifest included."""
    with zipfile.ZipFile(io.BytesIO(bundle.pack(*parts()))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def with_manifest(**changed) -> bytes:
    """The tiny bundle with other values at the top of its manifest; None removes the key."""
    whole = contents()
    manifest = {**json.loads(whole["manifest.json"]), **changed}
    manifest = {key: value for key, value in manifest.items() if value is not None}
    return sealed({**whole, "manifest.json": files.json_bytes(manifest)})


def with_entry(name: str, data: bytes, role: str | None = None) -> bytes:
    """The tiny bundle with an entry replaced or added, and a manifest that agrees."""
    manifest, entries = parts()
    entries[name] = (role or entries[name][0], data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "_check_contents", lambda entries: None)
        return bundle.pack(manifest, entries)


@pytest.fixture
def refusal(tmp_path):
    """refusal(data) → the message with which these bytes are refused."""
    path = tmp_path / "robot.ssdedge"

    def read(data: bytes) -> str:
        path.unlink(missing_ok=True)  # replacing the content of a file would wait for the disk each time
        path.write_bytes(data)
        with pytest.raises(BundleRefusedError) as caught:
            bundle.read(path)
        head, message = str(caught.value).split(" is refused: ", 1)
        assert head == str(path)
        assert message.isprintable()
        assert len(message) <= 400
        return message

    return read


def test_golden_bytes():
    data = bundle.pack(*parts())
    # version needed; no flags, stored, 00:00:00, 1980-01-01; CRC-32; length, twice; lengths of name, extra
    common = bytes.fromhex("0a00 0000 0000 0000 2100 6f29ccf9 08000000 08000000 0d00 0000")
    assert data[:51] == b"PK\x03\x04" + common + b"MODEL_CARD.md" + b"# robot\n"
    directory = data.index(b"PK\x01\x02")
    # made by 1.0 on UNIX; no comment, disk 0, internal attributes 0; a regular file, rw-r--r--; offset
    before, after = b"PK\x01\x02\x0a\x03", bytes.fromhex("0000 0000 0000 0000a481 00000000")
    assert data[directory : directory + 59] == before + common + after + b"MODEL_CARD.md"
    # disks; entries, twice; length and offset of the directory; length of the comment
    end = b"PK\x05\x06" + bytes.fromhex("0000 0000 0600 0600 70010000 4c080000 5900")
    assert data[-111:-64] == end + b"ssd-edge-bundle/1 sha256:"
    assert data[-64:] == files.sha256(data[:-64]).encode()
    # A change of this literal is a change of the format: old bundles would be refused.
    assert files.sha256(data) == "69236735d8fc51ef336277d13fc0c3d40ba174579e2f11f8601a7d792ea83107"


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


def test_what_is_packed_is_read(tmp_path):
    manifest, entries = parts()
    table = files.tensor_bytes({"indices": np.arange(3, dtype=np.uint32)}, {"n": 3})
    entries["top_n.safetensors"] = ("top_n", table)
    entries["calibration/notes.txt"] = ("notes", b"")
    manifest["learner"]["since"] = "a key that version 1 does not know"
    data = bundle.pack(manifest, entries)
    path = tmp_path / "new folder" / "robot.ssdedge"
    bundle.write(path, data)
    got = bundle.read(path)
    given = {name: data for name, (_, data) in entries.items()}
    assert got.entries == {**given, "manifest.json": files.json_bytes(got.manifest)}
    assert {key: got.manifest[key] for key in manifest} == manifest
    assert (got.manifest["format"], got.manifest["version"]) == ("ssd-edge-bundle", 1)
    assert got.sha256 == files.sha256(data)
    assert got.registry.names == ["cup", "schraube ß"]
    assert got.read("backbone") == b"an ONNX file"
    assert got.roles["notes"] == "calibration/notes.txt"
    arrays, metadata = got.tensors("top_n")
    assert (arrays["indices"].tolist(), metadata) == ([0, 1, 2], {"n": 3})
    assert os.listdir(path.parent) == ["robot.ssdedge"]
    with pytest.raises(InputError, match="no entry for 'notes2'; it has: card, backbone, notes, cl"):
        got.read("notes2")


def test_missing_file_and_folder_are_input_errors(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.ssdedge cannot be read: No such file or directory; "):
        bundle.read(tmp_path / "nothing.ssdedge")
    with pytest.raises(InputError, match="cannot be read: Is a directory; check the path"):
        bundle.read(tmp_path)
    with pytest.raises(InputError, match=r"is a folder, but a file is needed, e\.g\. .*/robot\.ssdedge"):
        bundle.write(tmp_path, b"")


def test_needs_neither_torch_nor_onnx():
    code = "import sys, ssd_edge.bundle; sys.exit(bool({'torch', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("mend", [bytes, resealed], ids=["damaged", "with a digest that agrees"])
def test_every_flipped_bit_is_refused(refusal, mend):
    data, rng = bundle.pack(*parts()), random.Random(0)
    for position in range(len(data) - 64):
        flipped = bytearray(data)
        flipped[position] ^= 1 << rng.randrange(8)
        message = refusal(mend(bytes(flipped)))
        if mend is bytes and position < len(data) - len("ssd-edge-bundle/1 sha256:") - 64:
            assert message.startswith("it is damaged (it states sha256 ce0b7e56258b…, but its bytes give ")
    for position in range(len(data) - 64, len(data)):
        refusal(data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :])


def test_cut_files_are_refused(refusal):
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
            refusal(resealed(noise + bundle._COMMENT + bytes(64)))


def zipped(**options) -> bytes:
    """The tiny bundle's entries as `zipfile` writes them, with the right comment and digest."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **options) as archive:
        for name, data in sorted(contents().items()):
            archive.writestr(name, data)
        archive.comment = bundle._COMMENT + bytes(64)
    return resealed(stream.getvalue())


def replaced(old: bytes, new: bytes, count: int = -1) -> bytes:
    """The tiny bundle with some bytes replaced and the digest made to agree."""
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
        pytest.param(lambda: resealed(sealed(contents() | {"zz": b""}).replace(b"zz", b"AA")), id="unsorted"),
    ],
)
def test_another_byte_form_is_refused_although_the_digest_agrees(refusal, hostile):
    assert "another tool may have packed it" in refusal(hostile())


@pytest.mark.parametrize(
    "name",
    ["", "../x", "/x", "a/../b", "a//b", "a/", "./a", ".a", "-rf", "a b", "a\\b", "C:a", "a\n", "x" * 129],
)
def test_names_that_lead_elsewhere_are_refused(refusal, name):
    assert "is not allowed: it is absolute, hidden" in refusal(sealed({**contents(), name: b""}))
    manifest, entries = parts()
    with pytest.raises(BundleRefusedError, match="is not allowed"):
        bundle.pack(manifest, {**entries, name: ("other", b"")})


def test_names_that_collide_are_refused(refusal):
    whole = contents()
    assert "differ only in case" in refusal(sealed({**whole, "Classes.json": b""}))
    assert "'classes.json/x' lies in another entry" in refusal(sealed({**whole, "classes.json/x": b""}))
    twice = sealed({**whole, "extra-a": b"", "extra-b": b""}).replace(b"extra-b", b"extra-a")
    assert "its entry 'extra-a' is there twice" in refusal(resealed(twice))
    foreign = sealed({**whole, "extra-a": b""}).replace(b"extra-a", b"extra-\xe9")
    assert "is not allowed" in refusal(resealed(foreign))


def test_limits(refusal, monkeypatch):
    many = {f"{number}": b"" for number in range(60)}
    assert "it has more than 64 entries" in refusal(sealed({**contents(), **many}))
    big = b'"' + b"x" * bundle.MAX_JSON_BYTES + b'"\n'
    message = refusal(with_entry("big.json", big, "big"))
    assert "its big.json has 4194307 bytes, but may have 4194304" in message
    claims = replaced(b"\x08\x00\x00\x00\x08\x00\x00\x00", b"\xff\xff\xff\xff\xff\xff\xff\xff")
    assert "its entry 'MODEL_CARD.md' is longer than the file" in refusal(claims)
    data = bundle.pack(*parts())
    for limit in (1500, len(data) - 1):
        monkeypatch.setattr(bundle, "MAX_BYTES", limit)
        assert refusal(data) == f"it has 2603 bytes, but a bundle has at most {limit}"
        with pytest.raises(BundleRefusedError, match=f"bytes, but a bundle has at most {limit}"):
            bundle.pack(*parts())
    monkeypatch.setattr(bundle, "MAX_BYTES", len(data))
    assert bundle.pack(*parts()) == data


def test_newer_versions_ask_for_an_upgrade(refusal):
    expected = "it has format version 2; this SSD-Edge reads 1; upgrade SSD-Edge on this machine"
    assert refusal(replaced(b"ssd-edge-bundle/1 ", b"ssd-edge-bundle/2 ")) == expected
    assert refusal(with_manifest(version=2)).startswith(expected)
    assert refusal(with_manifest(version=0)).startswith("it has format version 0; this SSD-Edge reads 1 (")


BACKBONE = parts()[0]["backbone"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "zip"}, "its manifest.json does not say that its format is 'ssd-edge-bundle'"),
        ({"version": True}, "its manifest.json: version has type bool, not int"),
        ({"version": None}, "its manifest.json lacks the key 'version'"),
        ({"learner": "ssd"}, "its manifest.json: learner has type str, not dict"),
        ({"learner": {"name": "ssd"}}, "its manifest.json: learner lacks the key 'settings'"),
        ({"classes": ["cup", 3]}, "its manifest.json: classes[1] has type int, not str"),
        ({"classes": ["cup"]}, "its classes are ['cup', 'schraube ß'], but manifest.json says ['cup']"),
        ({"classes": ["schraube ß", "cup"]}, "but manifest.json says ['schraube ß', 'cup']"),
        ({"name": ""}, "its name '' needs 1 to 64 printable characters"),
        ({"name": "x" * 65}, "needs 1 to 64 printable characters"),
        ({"name": "\x1b[2J"}, r"its name '\x1b[2J' needs 1 to 64 printable characters"),
        ({"created": "21.11.2026"}, "its time '21.11.2026' is not of the form 2026-11-21T04:33:00Z"),
        ({"backbone": {**BACKBONE, "dim": 0}}, "its backbone has size 8 and dim 0, but both must be"),
        ({"backbone": {**BACKBONE, "dim": 2.0}}, "its manifest.json: backbone: dim has type float, not int"),
        ({"backbone": {**BACKBONE, "sha256": "0"}}, "its backbone.onnx is not the backbone that manifest"),
        ({"backbone": {**BACKBONE, "file": "x"}}, "its backbone.onnx is not the backbone that manifest"),
    ],
)
def test_manifest_is_checked(refusal, changed, message):
    got = refusal(with_manifest(**changed))
    assert message in got
    assert got.endswith(" (a new one is built by: ssd-edge deploy)")


def test_files_are_what_the_manifest_says(refusal):
    *others, last = json.loads(contents()["manifest.json"])["files"]
    message = refusal(with_manifest(files=[*others, {**last, "sha256": "0" * 64}]))
    assert "its statistics.safetensors is (66, '" in message
    assert "but listed as (66, '0000" in message
    assert "but listed as (67, '" in refusal(with_manifest(files=[*others, {**last, "size": 67}]))
    for wrong in ([last, *others], [*others, last, last]):
        assert "its manifest.json lists a file twice or out of order" in refusal(with_manifest(files=wrong))
    message = refusal(with_manifest(files=[*others, last, {**last, "path": "x.onnx"}]))
    assert "its manifest.json lists 'x.onnx', but there is no such entry" in message
    message = refusal(sealed({**contents(), "x.onnx": b"an ONNX file"}))
    assert "its entry 'x.onnx' is not listed in manifest.json" in message


def test_a_bundle_without_a_manifest_is_refused(refusal):
    whole = contents()
    del whole["manifest.json"]
    assert "it has no manifest.json" in refusal(sealed(whole))
    assert "it has no manifest.json" in refusal(sealed({}))
    for value in (None, 3, "x", [], [{}]):
        message = refusal(sealed({**whole, "manifest.json": files.json_bytes(value)}))
        assert "its manifest.json does not say that its format is 'ssd-edge-bundle'" in message


def test_every_role_is_there_once_under_its_name(refusal):
    *others, last = json.loads(contents()["manifest.json"])["files"]
    message = refusal(with_manifest(files=[*others, {**last, "role": "numbers"}]))
    assert "it has no entry with the role 'statistics' (statistics.safetensors)" in message
    message = refusal(with_entry("more.safetensors", safetensors(0.0), "learner"))
    assert "learner.safetensors and more.safetensors have one role, 'learner'" in message
    message = refusal(with_entry("table.safetensors", safetensors(0.0), "top_n"))
    assert "its entry table.safetensors has the role 'top_n', but that is of top_n.safetensors" in message


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["learner.safetensors", "statistics.safetensors"])
def test_nan_and_infinity_are_refused(refusal, name, number):
    message = refusal(with_entry(name, safetensors(1.0, number)))
    assert f"its {name}: the tensor 'w' holds NaN or infinity" in message
    manifest, entries = parts()
    entries[name] = (entries[name][0], safetensors(number))
    with pytest.raises(BundleRefusedError, match="holds NaN or infinity"):
        bundle.pack(manifest, entries)


def test_broken_tensors_are_refused(refusal):
    good = safetensors(1.0)
    deep = b'{"__metadata__":{"json":"' + b"[" * 100_000 + b'"}}'
    for bad in (b"", good[:-1], good + b"\0", b"\xff" * 8, good.replace(b"F32", b"F99")):
        message = refusal(with_entry("learner.safetensors", bad))
        assert "its learner.safetensors is not a valid safetensors file" in message
    deep = struct.pack("<Q", len(deep)) + deep
    assert "is not a valid safetensors file" in refusal(with_entry("learner.safetensors", deep))
    escape = good.replace(b'"w":{', b'"\\u001b[2J":{')
    escape = struct.pack("<Q", len(escape) - 12) + escape[8:-4] + struct.pack("<f", float("nan"))
    assert "the tensor '?[2J' holds NaN" in refusal(with_entry("learner.safetensors", escape))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        *((bad, "classes.json is not valid JSON") for bad in (b"", b"\xff", b'"\\ud800"', b"NaN", b"1e999")),
        (b"[" * 100_000, "its JSON is nested too deeply"),
        (b'{"a": 1}', "its classes.json is not canonical JSON (sorted keys, two spaces, no key twice)"),
        (b'{\n  "a": 1,\n  "a": 1\n}\n', "its classes.json is not canonical JSON"),
        (b"{}\n", "the class registry is damaged"),
    ],
)
def test_broken_json_is_refused(refusal, data, message):
    assert message in refusal(with_entry("classes.json", data))
