"""``keys``, ``inspect`` and ``verify``: output, errors, and no control codes from a bundle on the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import by_hand as hand

from ssd_edge import bundle, files, learners
from ssd_edge.bundle import signing
from ssd_edge.classes import ClassRegistry
from ssd_edge.cli.inspect import inspect
from ssd_edge.cli.keys import keys
from ssd_edge.cli.verify import verify
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.priors import Priors

pytest.importorskip("cryptography")


def run(command: click.Command, *args: str | Path) -> str:
    """Return the standard output of a command that must succeed."""
    result = CliRunner().invoke(command, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., Path]:
    """Return ``put(data)``, which writes a bundle (by default the tiny one) and returns its path."""

    def write(data: bytes | None = None, name: str = "robot.ssdedge") -> Path:
        path = tmp_path / name
        path.write_bytes(bundle.pack(*hand.parts()) if data is None else data)
        return path

    return write


def taught(data: bytes) -> bytes:
    """Return a bundle with the state of a learner that was taught the embeddings of its probe."""
    entries = hand.contents(data)
    arrays, _ = files.parse_tensors(entries["probe.safetensors"], "probe")
    vectors, rows = (torch.from_numpy(np.repeat(arrays[name], 3, 0)) for name in ("embeddings", "rows"))
    learner, statistics = learners.build({"name": "ncm"}, hand.DIM, Priors()), ClassStatistics(hand.DIM)
    learner.learn(learners.Task(vectors, rows))
    statistics.add(vectors, rows)
    manifest = json.loads(entries["manifest.json"])
    manifest["learner"]["name"] = "ncm"
    registry = ClassRegistry()
    for name in hand.CLASSES.names:
        registry = registry.add(name, images=3)
    entries |= {
        "manifest.json": files.json_bytes(manifest),
        "classes.json": files.json_bytes(registry.to_json()),
        "learner.safetensors": files.tensor_bytes(*learners.pack(learner)),
        "statistics.safetensors": files.tensor_bytes({name: t.numpy() for name, t in statistics.state().items()}),
    }
    return hand.sealed(hand.relisted(entries))


def signed(data: bytes, key: Path) -> bytes:
    """Return the bundle with a signature."""
    opened = bundle.parse(data)
    entries = {path: (role, opened.entries[path]) for role, path in opened.roles.items()}
    return bundle.pack(opened.manifest, entries, signing.signer(key))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return signing.new_key(tmp_path / "keys", "lab")[0]


def identity(key: Path) -> str:
    return signing.key_id(signing.load_public(key.with_suffix(".pub")))


def test_keys(tmp_path):
    shown = run(keys, "new", "lab", "--folder", tmp_path / "a b")
    private, public = tmp_path / "a b" / "lab.key", tmp_path / "a b" / "lab.pub"
    own = identity(private)
    assert shown.splitlines()[0] == f"key {own}"
    assert str(public) in shown
    assert f"next, here:          ssd-edge deploy … --sign '{private}'" in shown
    assert "next, on the device: ssd-edge device trust lab.pub" in shown
    assert run(keys, "show", private) == run(keys, "show", public) == f"{own}\n"
    assert json.loads(run(keys, "show", private, "--json")) == {"id": own, "kind": "private"}
    printed = json.loads(run(keys, "new", "other", "--folder", tmp_path, "--json"))
    assert printed == {
        "id": identity(tmp_path / "other.key"),
        "private": str(tmp_path / "other.key"),
        "public": str(tmp_path / "other.pub"),
    }


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("new", "lab", "--folder", "KEYS"), r"lab\.key exists, and keys are never overwritten"),
        (("new", "../lab"), "the name of a key must have 1 to 64 characters"),
        (("show", "none.pub"), r"none\.pub does not exist"),
        (("show", "OPEN"), "run: chmod 600"),
        (("show", "TEXT"), "does not contain a public key in PEM format"),
    ],
)
def test_keys_refuses_bad_input(tmp_path, key, args, message):
    opened, text = tmp_path / "open.key", tmp_path / "text.pub"
    opened.write_bytes(key.read_bytes())
    opened.chmod(0o644)
    text.write_text("hello")
    places = {"KEYS": key.parent, "OPEN": opened, "TEXT": text}
    with pytest.raises(InputError, match=message):
        run(keys, *(places.get(arg, arg) for arg in args))


def test_inspect(put, key):
    path = put()
    shown = run(inspect, path)
    for line in (
        "name        robot",
        "release     7",
        "created     2026-11-21T04:33:00Z",
        "target      jetson",
        "signature   unsigned",
        "learner     ssd: k 10",
        "classes     2: cup, schraube ß",
        "backbone    test: 8 x 8 pixels to 3 values, fp32, opset 18",
        "  images    8 × 8 pixels: the whole image, without keeping its proportions, bicubic",
        "  takes     images uint8 (batch, 8, 8, 3)",
        "  gives     embeddings float32 (batch, 3)",
        "  operators 3 nodes: Cast Mul ReduceMean",
        "accuracy    0.5 on average",
        "  panel     ncm 0.4",
        "parity      none",
        "             8  MODEL_CARD.md  card",
    ):
        assert line in shown.splitlines()
    assert files.sha256(path.read_bytes()) in shown
    signed = put(bundle.pack(*hand.parts(), signing.signer(key)))
    assert f"signature   names the key {identity(key)}; not checked here" in run(inspect, signed)
    printed = json.loads(run(inspect, signed, "--json"))
    assert printed["signature"] == identity(key)
    assert (printed["release"], printed["classes"], printed["sha256"]) == (
        7,
        ["cup", "schraube ß"],
        bundle.read(signed).sha256,
    )
    assert printed["graphs"]["backbone"]["inputs"][0] == {
        "name": "images",
        "dtype": "uint8",
        "shape": ["batch", 8, 8, 3],
    }


def test_inspect_shows_the_head_and_shortens_long_lists(put):
    names = [f"class {number}" for number in range(25)]
    registry = ClassRegistry()
    for name in names:
        registry = registry.add(name)
    entries = {**hand.contents(), "classes.json": files.json_bytes(registry.to_json()), "head.onnx": hand.onnx()}
    parity = {"images": {"cosine": 0.99999, "drift": {"spread": 1.5}}}
    manifest = {**json.loads(entries["manifest.json"]), "classes": names, "parity": parity}
    manifest["files"].append({"path": "head.onnx", "role": "head", "size": 0, "sha256": ""})
    entries = hand.relisted({**entries, "manifest.json": files.json_bytes(manifest)})
    shown = run(inspect, put(hand.sealed(entries)))
    assert "class 19 … and 5 more" in shown
    assert "class 20" not in shown
    assert "head        opset 18" in shown
    assert "  images    cosine 0.99999, drift.spread 1.5" in shown


HOSTILE = "\x1b[2J\x9b1m\u202e\r\n"


def hostile_bundle() -> bytes:
    """Return a bundle with control codes in every free-text field."""
    entries = hand.contents()
    manifest = json.loads(entries["manifest.json"])
    graph = hand.onnx(model=hand.field(14, hand.field(1, HOSTILE) + hand.field(2, HOSTILE)))
    graph = graph.replace(b"\x0a\x06images", b"\x0a\x06im\x1b[2J").replace(b"\x12\x05batch", b"\x12\x05b\x1b[2J")
    manifest["backbone"] |= {"id": HOSTILE, "precision": HOSTILE * 100}
    settings = {HOSTILE: HOSTILE, "deep": {HOSTILE: [HOSTILE]}, "big": 10**400}
    manifest["learner"] = {"name": HOSTILE, "settings": settings}
    manifest["metrics"] = {"average_accuracy": HOSTILE, "panel": {HOSTILE: HOSTILE}, "data": [HOSTILE]}
    manifest["parity"] = {HOSTILE: {HOSTILE: {HOSTILE: HOSTILE}}}
    manifest["producer"]["packages"] = {HOSTILE: HOSTILE}
    manifest["files"] = [
        {**item, "role": HOSTILE if item["path"] == "notes.txt" else item["role"]}
        for item in [*manifest["files"], {"path": "notes.txt", "role": "x", "size": 0, "sha256": ""}]
    ]
    entries |= {"notes.txt": b"", "backbone.onnx": graph, "manifest.json": files.json_bytes(manifest)}
    return hand.sealed(hand.relisted(entries))


@pytest.mark.parametrize("args", [(), ("--json",)])
@pytest.mark.parametrize("command", [inspect, verify])
def test_control_codes_in_a_bundle_are_escaped(put, command, args):
    path = put(hostile_bundle() if command is inspect else taught(hostile_bundle()))
    assert "\x1b" in bundle.read(path).manifest["backbone"]["id"]
    shown = run(command, path, *args)
    assert all(letter.isprintable() or letter == "\n" for letter in shown)
    if args:
        assert shown.isascii()
        assert json.loads(shown)["bundle"] == str(path)


def test_class_names_with_control_codes_are_refused(put):
    registry = {"next_id": 1, "classes": [{"id": 0, "name": HOSTILE, "origin": "base", "images": 1}]}
    with pytest.raises(BundleRefusedError, match="the class registry is damaged") as caught:
        run(inspect, put(hand.with_entry("classes.json", files.json_bytes(registry))))
    assert str(caught.value).isprintable()


def test_verify(put, key):
    plain = taught(bundle.pack(*hand.parts()))
    shown = run(verify, put(plain)).splitlines()
    assert shown[0].startswith("intact     robot, release 7, sha256 ")
    assert shown[1] == "signature  unsigned"
    assert shown[2].startswith("probe      2 images with CPUExecutionProvider: cosine 1.000000, largest diff")
    assert shown[3] == "learner    ncm with 2 classes, 100% of the probe answered as stated"
    path = put(signed(plain, key))
    assert f"signature  names the key {identity(key)}, not checked; pass that key with" in run(verify, path)
    public = key.with_suffix(".pub")
    other = signing.new_key(key.parent, "other")[1]
    assert f"signature  signed by {identity(key)}" in run(verify, path, "--key", other, "--key", public).splitlines()
    printed = json.loads(run(verify, path, "--key", public, "--json"))
    assert (printed["signed_by"], printed["signature"], printed["release"]) == (identity(key), identity(key), 7)
    assert printed["probe"]["images"] == 2
    assert printed["learner"] == {"name": "ncm", "classes": 2, "agreement": 1.0}
    assert (printed["probe_not_run"], printed["learner_not_loaded"]) == (None, None)


def test_verify_refuses_bad_bundles(put, key):
    public, plain = key.with_suffix(".pub"), put()
    with pytest.raises(BundleRefusedError, match="is not signed, but must be signed by"):
        run(verify, plain, "--key", public)
    signed = put(bundle.pack(*hand.parts(), signing.signer(key)))
    other = signing.new_key(key.parent, "other")[1]
    with pytest.raises(BundleRefusedError, match="signed with the key"):
        run(verify, signed, "--key", other)
    entries = hand.relisted({**hand.contents(signed.read_bytes()), "MODEL_CARD.md": b"# another\n"})
    with pytest.raises(BundleRefusedError, match=r"signature of the bundle 'robot' by \w+ does not match its manifest"):
        run(verify, put(hand.sealed(entries)), "--key", public)
    with pytest.raises(InputError, match="contains a private key"):
        run(verify, signed, "--key", key)
    with pytest.raises(BundleRefusedError, match="it is damaged"):
        run(verify, put(bundle.pack(*hand.parts()).replace(b"# robot", b"# Robot")))


def test_a_backbone_with_different_outputs_is_refused(put):
    wrong = hand.probe(embeddings=("F32", [2, 3], [1.0, -2.0, 3.0, 4.0, 5.0, 6.0]))
    with pytest.raises(BundleRefusedError, match="gives other embeddings on this machine than in the bundle"):
        run(verify, put(hand.with_entry("probe.safetensors", wrong)))


def test_a_backbone_that_cannot_run_is_reported_in_one_printable_line(put, refused):
    nodes = [hand.node("Nonsense", ["images"], ["embeddings"], hand.field(3, HOSTILE))]
    printed = refused("verify", put(hand.with_entry("backbone.onnx", hand.onnx(nodes=nodes))), code=3)
    assert "ONNX Runtime cannot run the backbone" in printed
    assert printed.replace("\n", "").isprintable()


def test_verify_without_onnx_runtime_reports_that_the_probe_was_not_run(put, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    path = put(taught(bundle.pack(*hand.parts())))
    shown = run(verify, path)
    assert "learner    ncm with 2 classes" in shown
    assert "probe      not run: the package 'onnxruntime' is needed to run the probe" in shown
    printed: dict[str, Any] = json.loads(run(verify, path, "--json"))
    assert printed["probe"] is None
    assert "onnxruntime" in printed["probe_not_run"]
