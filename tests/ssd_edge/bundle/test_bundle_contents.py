"""Tests of the contents of a bundle: manifest, signature, roles, graphs, probe images, tensors and JSON."""

from __future__ import annotations

import json
import struct

import pytest
from helpers import by_hand as hand

from ssd_edge import bundle, files
from ssd_edge.errors import BundleRefusedError

contents, parts, sealed = hand.contents, hand.parts, hand.sealed


BACKBONE = parts()[0]["backbone"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "zip"}, "its manifest.json does not say that its format is 'ssd-edge-bundle'"),
        ({"version": True}, "its manifest.json: version has type bool, not int"),
        ({"version": None}, "its manifest.json lacks the key 'version'"),
        ({"learner": "slda"}, "its manifest.json: learner has type str, not dict"),
        ({"learner": {"name": "slda"}}, "its manifest.json: learner lacks the key 'settings'"),
        ({"classes": ["cup", 3]}, "its manifest.json: classes[1] has type int, not str"),
        ({"classes": ["cup"]}, "its classes are ['cup', 'schraube ß'], but manifest.json says ['cup']"),
        ({"classes": ["schraube ß", "cup"]}, "but manifest.json says ['schraube ß', 'cup']"),
        ({"name": ""}, "its name '' needs 1 to 64 printable characters"),
        ({"name": "x" * 65}, "needs 1 to 64 printable characters"),
        ({"name": "\x1b[2J"}, r"its name '\x1b[2J' needs 1 to 64 printable characters"),
        ({"target": ""}, "its target '' needs 1 to 64 printable characters"),
        ({"target": "x\u202e"}, "needs 1 to 64 printable characters"),
        ({"target": None}, "its manifest.json lacks the key 'target'"),
        ({"release": True}, "its manifest.json: release has type bool, not int"),
        ({"release": 7.0}, "its manifest.json: release has type float, not int"),
        ({"release": -1}, "its release is -1, but must be 0 or more, below 2^63"),
        ({"release": 2**63}, "its release is 9223372036854775808, but must be"),
        ({"release": 10**4000}, "but must be 0 or more"),
        ({"backbone": {**BACKBONE, "opset": 17}}, "its backbone.onnx has opset 18, but manifest.json says 17"),
        ({"backbone": {**BACKBONE, "opset": True}}, "its manifest.json: backbone: opset has type bool, not int"),
        ({"created": "21.11.2026"}, "its time '21.11.2026' is not of the form 2026-11-21T04:33:00Z"),
        ({"backbone": {**BACKBONE, "dim": 0}}, "its backbone has size 8 and dim 0, but both must be"),
        ({"backbone": {**BACKBONE, "dim": 2.0}}, "its manifest.json: backbone: dim has type float, not int"),
        ({"backbone": {**BACKBONE, "sha256": "0"}}, "its backbone.onnx is not the backbone that manifest"),
        ({"device": []}, "does not say correctly which device exported it"),
        ({"device": {"merged": "abc"}}, "does not say correctly which device exported it"),
        ({"device": {"installation": "\x1b[2J"}}, r"its device has the id '\x1b[2J', not one of the form [0-9a-f]{16}"),
        ({"device": {"merged": ["0" * 16, 7]}}, "its device has the id 7, not one of the form"),
        ({"device": {"bundle_sha256": "A" * 64}}, "not one of the form [0-9a-f]{64}"),
        ({"backbone": {**BACKBONE, "file": "x"}}, "its backbone.onnx is not the backbone that manifest"),
    ],
)
def test_manifest_is_checked(refusal, changed, message):
    refused = refusal(hand.with_manifest(**changed))
    assert message in refused
    assert refused.endswith(" (build a new one with: ssd-edge deploy)")


def test_files_must_match_the_manifest(refusal):
    *others, last = json.loads(contents()["manifest.json"])["files"]
    message = refusal(hand.with_manifest(files=[*others, {**last, "sha256": "0" * 64}]))
    assert "its statistics.safetensors is (66, '" in message
    assert "but listed as (66, '0000" in message
    assert "but listed as (67, '" in refusal(hand.with_manifest(files=[*others, {**last, "size": 67}]))
    for wrong in ([last, *others], [*others, last, last]):
        assert "its manifest.json lists a file twice or out of order" in refusal(hand.with_manifest(files=wrong))
    message = refusal(hand.with_manifest(files=[*others, last, {**last, "path": "x.onnx"}]))
    assert "its manifest.json lists 'x.onnx', but there is no such entry" in message
    message = refusal(sealed({**contents(), "x.onnx": hand.onnx()}))
    assert "its entry 'x.onnx' is not listed in manifest.json" in message


def test_missing_manifest_is_refused(refusal):
    entries = contents()
    del entries["manifest.json"]
    assert "it has no manifest.json" in refusal(sealed(entries))
    assert "it has no manifest.json" in refusal(sealed({}))
    for value in (None, 3, "x", [], [{}]):
        message = refusal(sealed({**entries, "manifest.json": files.json_bytes(value)}))
        assert "its manifest.json does not say that its format is 'ssd-edge-bundle'" in message


def test_each_role_is_required_once_with_its_file_name(refusal):
    *others, last = json.loads(contents()["manifest.json"])["files"]
    message = refusal(hand.with_manifest(files=[*others, {**last, "role": "numbers"}]))
    assert "its entry statistics.safetensors needs the role 'statistics'" in message
    listed = [{**item, "role": "numbers"} if item["role"] == "learner" else item for item in [*others, last]]
    message = refusal(hand.with_manifest(files=listed))
    assert "it has no entry with the role 'learner' (learner.safetensors)" in message
    message = refusal(hand.with_entry("more.safetensors", hand.vector(0.0), "learner"))
    assert "learner.safetensors and more.safetensors have the same role, 'learner'" in message
    message = refusal(hand.with_entry("table.safetensors", hand.vector(0.0), "head"))
    assert "its entry table.safetensors has the role 'head', but head.onnx has that role" in message


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["learner.safetensors", "statistics.safetensors"])
def test_nan_and_infinity_are_refused(refusal, name, number):
    message = refusal(hand.with_entry(name, hand.vector(1.0, number)))
    assert f"its {name}: the tensor 'w' contains NaN or infinity" in message
    manifest, entries = parts()
    entries[name] = (entries[name][0], hand.vector(number))
    with pytest.raises(BundleRefusedError, match="contains NaN or infinity"):
        bundle.pack(manifest, entries)


def test_broken_tensors_are_refused(refusal):
    good = hand.vector(1.0)
    deep = b'{"__metadata__":{"json":"' + b"[" * 100_000 + b'"}}'
    for bad in (b"", good[:-1], good + b"\0", b"\xff" * 8, good.replace(b"F32", b"F99")):
        message = refusal(hand.with_entry("learner.safetensors", bad))
        assert "its learner.safetensors is not a valid safetensors file" in message
    deep = struct.pack("<Q", len(deep)) + deep
    assert "is not a valid safetensors file" in refusal(hand.with_entry("learner.safetensors", deep))
    escape = good.replace(b'"w":{', b'"\\u001b[2J":{')
    escape = struct.pack("<Q", len(escape) - 12) + escape[8:-4] + struct.pack("<f", float("nan"))
    assert "the tensor '?[2J' contains NaN" in refusal(hand.with_entry("learner.safetensors", escape))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        *((bad, "classes.json is not valid JSON") for bad in (b"", b"\xff", b'"\\ud800"', b"NaN", b"1e999")),
        (b"[" * 100_000, "its JSON is nested too deeply"),
        (b'{"a": 1}', "its classes.json is not canonical JSON (sorted keys, two spaces, no duplicate keys)"),
        (b'{\n  "a": 1,\n  "a": 1\n}\n', "its classes.json is not canonical JSON"),
        (b"{}\n", "the class registry is damaged"),
    ],
)
def test_broken_json_is_refused(refusal, data, message):
    assert message in refusal(hand.with_entry("classes.json", data))


def signed() -> dict[str, bytes]:
    """Return the entries of a bundle with a signature of the right form that does not verify."""
    return {**contents(), "manifest.sig": bundle.Signature("0123456789abcdef", bytes(64)).to_bytes()}


def test_signature_is_parsed_without_verification(tmp_path):
    path = tmp_path / "robot.ssdedge"
    path.write_bytes(sealed(signed()))
    signature = bundle.read(path).signature
    assert signature == bundle.Signature("0123456789abcdef", bytes(64))
    data = bundle.pack(*parts(), lambda manifest: bundle.Signature("0123456789abcdef", manifest[:64]).to_bytes())
    path.write_bytes(data)
    read = bundle.read(path)
    assert read.signature.value == read.entries["manifest.json"][:64]
    with pytest.raises(BundleRefusedError, match=r"manifest\.sig does not have the form"):
        bundle.pack(*parts(), lambda manifest: bytes(64))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"ed25519", b"rsa"),
        (b"0123456789abcdef", b"0123456789ABCDEF"),
        (b"0123456789abcdef", b"0123456789abcde"),
        (b'"0123456789abcdef"', b"7"),
        (b"AA==", b"AB=="),  # decodes to the same 64 bytes in a lenient decoder
        (b"AA==", b"A==="),
        (b"AA==", b"AAAA"),
        (b"\n}", b',\n  "time": 1\n}'),
        (b"  ", b" "),
        (b"}\n", b"}"),
        (b"{", b"[{"),
    ],
)
def test_malformed_signature_is_refused(refusal, old, new):
    entries = signed()
    assert old in entries["manifest.sig"]
    entries["manifest.sig"] = entries["manifest.sig"].replace(old, new, 1)
    assert "its manifest.sig does not have the form of docs/bundle.md" in refusal(sealed(entries))


@pytest.mark.parametrize("data", [b"", b"null\n", b"[]\n", b"{}\n", b"\xff", b"[" * 190, b" " * 10**6, bytes(64)])
def test_arbitrary_bytes_as_signature_are_refused(refusal, data):
    assert "its manifest.sig does not have the form" in refusal(sealed({**contents(), "manifest.sig": data}))


def test_signature_must_not_be_listed_in_the_manifest(refusal):
    files_listed = json.loads(contents()["manifest.json"])["files"]
    extra = {"path": "manifest.sig", "role": "x", "size": 0, "sha256": ""}
    message = refusal(hand.with_manifest(files=[*files_listed, extra]))
    assert "its manifest.json lists 'manifest.sig', but there is no such entry" in message


def test_tensorrt_engines_are_refused(refusal):
    for magic in (b"ptrt", b"vtrt"):
        message = refusal(hand.with_entry("notes.txt", magic + bytes(100)))
        assert "its notes.txt is a compiled TensorRT engine; a device builds its own" in message


def test_real_tensorrt_rtx_engine_is_refused(refusal):
    """Use an engine built by TensorRT-RTX, which does not need a GPU."""
    trt = pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    image = network.add_input("x", trt.float32, (1, 4))
    network.mark_output(network.add_activation(image, trt.ActivationType.RELU).get_output(0))
    engine = bytes(builder.build_serialized_network(network, builder.create_builder_config()))
    assert "is a compiled TensorRT engine" in refusal(hand.with_entry("notes.txt", engine))


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (b"an ONNX file", "its backbone.onnx is not an ONNX model"),
        (hand.onnx(nodes=[]), "its backbone.onnx has no nodes"),
        (hand.onnx(opsets=(("", 17),)), "its backbone.onnx has opset 17, but manifest.json says 18"),
        (
            hand.onnx(graph=hand.field(12, hand.value("more", 1, ["batch", 3]))),
            "its backbone.onnx gives 'embeddings' float32 ('batch', 3), 'more' float32 ('batch', 3), not float32 of",
        ),
        (
            hand.onnx().replace(b"\x08\x02\x12\x15", b"\x08\x01\x12\x15"),
            "its backbone.onnx takes 'images' float32 ('batch', 8, 8, 3), not uint8 of shape (N, 8, 8, 3)",
        ),
        (
            hand.onnx().replace(b"\x0a\x02\x08\x08\x0a\x02\x08\x08", b"\x0a\x02\x08\x09\x0a\x02\x08\x08"),
            "takes 'images' uint8 ('batch', 9, 8, 3), not uint8 of shape (N, 8, 8, 3)",
        ),
    ],
)
def test_backbone_graph_must_match_the_manifest(refusal, graph, message):
    assert message in refusal(hand.with_entry("backbone.onnx", graph))


def test_pixels_of_manifest_and_graph(refusal):
    """A graph says how images become its input; one that says nothing is believed whatever the manifest says."""

    def said(graph: dict[str, str], manifest: dict[str, object]) -> dict[str, bytes]:
        labels = b"".join(hand.field(14, hand.field(1, key) + hand.field(2, text)) for key, text in graph.items())
        entries = hand.relisted({**hand.contents(), "backbone.onnx": hand.onnx() + labels})
        values = json.loads(entries["manifest.json"])
        values["backbone"] |= manifest
        return {**entries, "manifest.json": files.json_bytes(values)}

    crop = {"fit": "crop", "resize": 9, "interpolation": "bilinear"}
    texts = {"size": "8", **{key: str(value) for key, value in crop.items()}}
    for graph, manifest in ((texts, crop), ({}, crop), ({"size": "8"}, {}), ({}, {})):
        bundle.parse(hand.sealed(said(graph, manifest)))
    for graph, manifest, message in (
        (texts, {}, "its backbone.onnx takes 8 × 8 pixels: shorter side to 9, centre crop, bilinear; but manifest"),
        ({"size": "8"}, crop, "manifest.json says 8 × 8 pixels: shorter side to 9"),
        ({**texts, "resize": "10"}, crop, "shorter side to 10"),
        ({**texts, "fit": "x"}, crop, "backbone.onnx does not say correctly how images become the input: fit must be"),
        (
            {},
            {**crop, "resize": 10**9},
            "manifest.json does not say correctly how images become the input: resize must",
        ),
        ({}, {"interpolation": None}, "interpolation must be one of"),
    ):
        assert message in refusal(hand.sealed(said(graph, manifest)))


def test_unspecified_input_shape_is_accepted(tmp_path):
    graph = hand.onnx().replace(b"\x0a\x02\x08\x08\x0a\x02\x08\x08", b"\x0a\x02\x12\x00\x0a\x02\x12\x00")
    path = tmp_path / "robot.ssdedge"
    path.write_bytes(hand.with_entry("backbone.onnx", graph))
    assert bundle.read(path).read("backbone") == graph


def test_all_onnx_entries_are_scanned(refusal, tmp_path):
    bad = hand.onnx(nodes=[hand.node("Gemm", [], [], hand.field(7, "com.microsoft"))])
    for name, role in (("head.onnx", "head"), ("other/more.onnx", "more")):
        message = refusal(hand.with_entry(name, bad, role))
        assert f"its {name} has the operator b'Gemm' of the foreign domain b'com.microsoft'" in message
        path = tmp_path / "good.ssdedge"
        path.write_bytes(hand.with_entry(name, hand.onnx(), role))
        assert bundle.read(path).read(role) == hand.onnx()
    assert "its entry head.onnx needs the role 'head'" in refusal(hand.with_entry("head.onnx", hand.onnx(), "x"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": None}, "its probe.safetensors has 0 images, but needs 1 to 64"),
        ({"images": ("U8", [0, 8, 8, 3], [])}, "its probe.safetensors has 0 images, but needs 1 to 64"),
        ({"images": ("U8", [65, 1, 1, 3], [0] * 195)}, "its probe.safetensors has 65 images, but needs 1 to 64"),
        ({"images": ("U8", [2, 4, 8, 3], [0] * 192)}, "its probe.safetensors has {'"),
        ({"images": ("F32", [2, 8, 8, 3], [0.0] * 384)}, "its probe.safetensors has {'"),
        ({"embeddings": None}, "its probe.safetensors has {'"),
        ({"embeddings": ("F32", [2, 4], [0.0] * 8)}, "its probe.safetensors has {'"),
        ({"embeddings": ("F32", [1, 3], [0.0] * 3)}, "its probe.safetensors has {'"),
        ({"embeddings": ("F32", [2, 3], [float("nan")] * 6)}, "the tensor 'embeddings' contains NaN or infinity"),
        ({"rows": ("I64", [1], [0])}, "its probe.safetensors has {'"),
        ({"rows": ("F32", [2], [0.0, 1.0])}, "its probe.safetensors has {'"),
        ({"rows": ("I64", [2], [0, 2])}, "its probe.safetensors names rows 0 to 2, but there are 2 classes"),
        ({"rows": ("I64", [2], [-1, 0])}, "its probe.safetensors names rows -1 to 0, but there are 2 classes"),
        ({"more": ("I64", [1], [0])}, "its probe.safetensors has {'"),
        ({"limits": {}}, "its probe.safetensors needs 'min_cosine' in its metadata, -1 to 1, not None"),
        ({"limits": []}, "its probe.safetensors needs 'min_cosine' in its metadata, -1 to 1, not None"),
        ({"limits": {"min_cosine": 2}}, "needs 'min_cosine' in its metadata, -1 to 1, not 2"),
        ({"limits": {"min_cosine": True}}, "needs 'min_cosine' in its metadata, -1 to 1, not True"),
        ({"limits": {"min_cosine": 1, "max_difference": float("nan")}}, "needs 'max_difference' in its metadata, 0 to"),
        ({"limits": {"min_cosine": 1, "max_difference": 10**400}}, "needs 'max_difference' in its metadata, 0 to"),
    ],
)
def test_invalid_probe_is_refused(refusal, changed, message):
    assert message in refusal(hand.with_entry("probe.safetensors", hand.probe(**changed)))


@pytest.mark.parametrize("role", sorted(bundle.ROLES.keys() - bundle.OPTIONAL_ROLES))
def test_missing_role_is_refused(refusal, role):
    entries = contents()
    listed = [item for item in json.loads(entries["manifest.json"])["files"] if item["role"] != role]
    del entries[bundle.ROLES[role]]
    manifest = {**json.loads(entries["manifest.json"]), "files": listed}
    message = refusal(sealed({**entries, "manifest.json": files.json_bytes(manifest)}))
    assert f"it has no entry with the role '{role}' ({bundle.ROLES[role]})" in message
