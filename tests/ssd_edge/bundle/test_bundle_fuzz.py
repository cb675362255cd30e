"""Seeded mutants of a signed bundle: refused in one sentence, never another exception, and never vouched for.

Four attackers: one whose medium fails (raw), one who mends the digest (resealed), one who builds a whole new bundle
around a changed entry, without the key (repacked), and one who only works on the signature.
"""

from __future__ import annotations

import json
import random
import re
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import by_hand as hand

from ssd_edge import bundle, files
from ssd_edge.bundle import signing
from ssd_edge.errors import BundleRefusedError

pytest.importorskip("cryptography")

NASTY = [
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, 5e-324),
    *("", "x", "\x1b[2J", "\u202e", "ß" * 5000, "../x", "manifest.json", "manifest.sig", "backbone.onnx", "ed25519"),
    *([], {}, [[]], [None], {"": {}}, ["cup"], [0, 2**62], [1] * 50),
]


def spots(data: bytes) -> list[int]:
    """Where a byte decides most: records of the container, the beginning of each entry, the manifest, the end."""
    marks = [found.start() for found in re.finditer(b"PK(?:\x03\x04|\x01\x02|\x05\x06)", data)]
    begins = [found.end() for found in re.finditer(rb"(?:\.json|\.sig|\.onnx|\.safetensors|\.md)(?=[^\0])", data)]
    return [*marks, *begins, max(0, len(data) - 111), max(0, len(data) - 64)]


def mutate(data: bytes, rng: random.Random, near: list[int]) -> bytes:
    """One to three changes, half of them near a decisive byte."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not out:
            break
        at = rng.choice(near) + rng.randrange(64) if near and rng.random() < 0.5 else rng.randrange(len(out))
        at = min(at, len(out) - 1)
        length = rng.choice((1, 1, 2, 4, 8, 30, 64, 500))
        what = rng.randrange(7)
        if what == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            out[at : at + length] = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
        elif what == 2:
            del out[at : at + length]
        elif what == 3:
            out[at:at] = rng.choice((rng.randbytes(length), bytes(length), b" " * length, b"[" * length))
        elif what == 4:
            out[at:at] = out[at : at + length]
        elif what == 5:
            other = rng.randrange(len(out))
            out[at : at + length], out[other : other + length] = out[other : other + length], out[at : at + length]
        else:
            del out[at:]
    return bytes(out)


def mutate_value(value: Any, rng: random.Random) -> Any:
    """A JSON value with one part replaced, removed, doubled or wrapped."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key, changed = rng.choice(sorted(value)), dict(value)
        what = rng.random()
        if what < 0.1:
            del changed[key]
        elif what < 0.2:
            changed[str(rng.choice(NASTY))[:50]] = changed.pop(key)
        else:
            changed[key] = mutate_value(value[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.85:
        at, what = rng.randrange(len(value)), rng.random()
        if what < 0.1:
            return value[:at] + value[at + 1 :]
        if what < 0.2:
            return [*value, value[at]]
        if what < 0.3:
            return value[::-1]
        return [*value[:at], mutate_value(value[at], rng), *value[at + 1 :]]
    return [value] if rng.random() < 0.05 else rng.choice(NASTY)


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another value somewhere in its header."""
    length = int.from_bytes(data[:8], "little")
    header = mutate_value(json.loads(data[8 : 8 + length]), rng)
    text = json.dumps(header).encode()
    stated = len(text) if rng.random() < 0.9 else rng.choice((0, 1, 2**20, 2**32, 2**63, 2**64 - 1, len(text) + 1))
    return stated.to_bytes(8, "little") + text + data[8 + length :]


def repacked(whole: dict[str, bytes], rng: random.Random) -> bytes:
    """A faultless container around a changed entry; what the manifest states of it agrees, unless itself is changed."""
    name = rng.choice([path for path in whole if path != "manifest.sig"] + ["manifest.json"] * 2)
    data = whole[name]
    if name.endswith(".json") and rng.random() < 0.8:
        changed = files.json_bytes(mutate_value(json.loads(data), rng))
    elif name.endswith(".safetensors") and rng.random() < 0.6:
        changed = mutate_header(data, rng)
    else:
        changed = mutate(data, rng, [0])
    made = {**whole, name: changed}
    return hand.sealed(made if name == "manifest.json" else hand.relisted(made))


def resigned(whole: dict[str, bytes], rng: random.Random) -> bytes:
    """Another signature: other bytes, other values, or one of the right form."""
    data = whole["manifest.sig"]
    what = rng.randrange(3)
    if what == 0:
        changed = mutate(data, rng, [0, 25, 50, 70])
    elif what == 1:
        changed = files.json_bytes(mutate_value(json.loads(data), rng))
    else:
        found = bundle.Signature(json.loads(data)["key"], rng.randbytes(64))
        changed = found.to_bytes()
    return hand.sealed({**whole, "manifest.sig": changed})


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Any]]:
    """A signed bundle, and the keys that are trusted."""
    private = hand.write_key(tmp_path_factory.mktemp("keys"))
    key = signing.load_private(private).public_key()
    return bundle.pack(*hand.parts(), signing.signer(private)), {signing.key_id(key): key}


def fuzz(count: int, seed: int, signed: tuple[bytes, dict[str, Any]], path: Path) -> Counter[str]:
    """Try `count` mutants; how often each reason was given, by attacker."""
    original, trusted = signed
    whole, rng, near = hand.contents(original), random.Random(seed), spots(original)
    attackers: dict[str, Callable[[], bytes]] = {
        "raw": lambda: mutate(original, rng, near),
        "resealed": lambda: hand.resealed(mutate(original, rng, near)),
        "repacked": lambda: repacked(whole, rng),
        "signature": lambda: resigned(whole, rng),
    }
    reasons: Counter[str] = Counter()
    for number in range(count):
        name = ("raw", "resealed", "repacked", "repacked", "signature")[number % 5]
        data = attackers[name]()
        if data == original:
            reasons[f"{name}: no change"] += 1
            continue
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        try:
            opened = bundle.read(path)
        except BundleRefusedError as error:
            reason = str(error).split(" is refused: ", 1)[1]
            assert reason.isprintable()
            reason = re.sub(r"'.*'|\(.*\)|\[.*\]|\{.*\}|[0-9a-f]*[0-9][0-9a-f]*", "…", reason)[:70]
            reasons[f"{name}: {reason}"] += 1
            continue
        assert name in ("repacked", "signature"), f"mutant {number} of seed {seed} was taken"
        with pytest.raises(BundleRefusedError, match=r"is not signed|the signature of|signed with the key"):
            signing.check(opened, trusted)
        reasons[f"{name}: taken, but not vouched for"] += 1
    return reasons


def test_a_thousand_mutants(signed, tmp_path):
    reasons = fuzz(1000, 0, signed, tmp_path / "mutant.ssdedge")
    assert sum(reasons.values()) == 1000
    assert len(reasons) > 60  # many different checks refused, not one for all
    for name in ("repacked", "signature"):
        assert 0 < reasons[f"{name}: taken, but not vouched for"] < 150


@pytest.mark.slow
def test_twenty_thousand_mutants(signed, tmp_path, capsys):
    began = time.monotonic()
    reasons = fuzz(20_000, 1, signed, tmp_path / "mutant.ssdedge")
    assert sum(reasons.values()) == 20_000
    with capsys.disabled():
        print(f"\n20,000 mutants in {time.monotonic() - began:.1f} s, {len(reasons)} reasons:")
        for reason, count in reasons.most_common(60):
            print(f"{count:6}  {reason}")


def nasty_bundles() -> dict[str, bytes]:
    """Small files that claim to be large."""
    data = bundle.pack(*hand.parts())
    lengths = re.sub(rb"(PK\x03\x04.{14}).{8}", rb"\1" + b"\xff\xff\xff\x7f" * 2, data, flags=re.DOTALL)
    tensor = {"w": {"dtype": "F32", "shape": [2**31, 2**20], "data_offsets": [0, 2**53]}}
    text = json.dumps(tensor).encode()
    nodes = [hand.node("Abs", ["x"] * 40, ["y"] * 40)] * 500
    return {
        "lengths": hand.resealed(lengths),
        "tensor": hand.with_entry("learner.safetensors", len(text).to_bytes(8, "little") + text),
        "header": hand.with_entry("learner.safetensors", (2**62).to_bytes(8, "little") + text),
        "graph": hand.with_entry("backbone.onnx", hand.onnx(nodes=nodes)),
        "empty fields": hand.with_entry("backbone.onnx", hand.onnx(graph=b"\x0a\x00" * 40_000)),
        "weights": hand.with_entry("weights.safetensors", hand.vector(*[1.0] * 200_000)),
    }


@pytest.mark.parametrize("name", sorted(nasty_bundles()))
def test_no_claim_makes_the_reader_allocate(name, tmp_path):
    path, data = tmp_path / "nasty.ssdedge", nasty_bundles()[name]
    path.write_bytes(data)
    tracemalloc.start()
    try:
        if name in ("weights", "graph"):
            bundle.read(path)
        else:
            with pytest.raises(BundleRefusedError):
                bundle.read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * len(data) + 2**21


def test_parsed_json_is_the_largest_multiple_and_bounded(tmp_path):
    """Empty lists are the worst: 6 bytes in the file, some hundred in memory."""
    big = files.json_bytes([[]] * (bundle.MAX_JSON_BYTES // 6 // 8))
    path = tmp_path / "lists.ssdedge"
    path.write_bytes(hand.with_entry("lists.json", big))
    tracemalloc.start()
    try:
        bundle.read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 25 * len(big)
