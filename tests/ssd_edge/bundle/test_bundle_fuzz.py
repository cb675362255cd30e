"""Fuzz tests with seeded mutants of a signed bundle.

Each mutant must be refused with a `BundleRefusedError`, or be readable and fail the signature check. There are four
kinds: random corruption (raw), corruption with a recomputed digest (resealed), a valid container around a changed
entry, without the private key (repacked), and a changed signature (signature).
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

EDGE_VALUES = [
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, 5e-324),
    *("", "x", "\x1b[2J", "\u202e", "ß" * 5000, "../x", "manifest.json", "manifest.sig", "backbone.onnx", "ed25519"),
    *([], {}, [[]], [None], {"": {}}, ["cup"], [0, 2**62], [1] * 50),
]


def interesting_offsets(data: bytes) -> list[int]:
    """Return offsets where changes matter most: container records, the start of each entry, the trailer."""
    records = [match.start() for match in re.finditer(b"PK(?:\x03\x04|\x01\x02|\x05\x06)", data)]
    starts = [match.end() for match in re.finditer(rb"(?:\.json|\.sig|\.onnx|\.safetensors|\.md)(?=[^\0])", data)]
    return [*records, *starts, max(0, len(data) - 111), max(0, len(data) - 64)]


def mutate(data: bytes, rng: random.Random, near: list[int]) -> bytes:
    """Apply one to three random changes, half of them at most 63 bytes after an offset in `near`."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not out:
            break
        at = rng.choice(near) + rng.randrange(64) if near and rng.random() < 0.5 else rng.randrange(len(out))
        at = min(at, len(out) - 1)
        length = rng.choice((1, 1, 2, 4, 8, 30, 64, 500))
        kind = rng.randrange(7)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + length] = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
        elif kind == 2:
            del out[at : at + length]
        elif kind == 3:
            out[at:at] = rng.choice((rng.randbytes(length), bytes(length), b" " * length, b"[" * length))
        elif kind == 4:
            out[at:at] = out[at : at + length]
        elif kind == 5:
            other = rng.randrange(len(out))
            out[at : at + length], out[other : other + length] = out[other : other + length], out[at : at + length]
        else:
            del out[at:]
    return bytes(out)


def mutate_value(value: Any, rng: random.Random) -> Any:
    """Return a JSON value with one part replaced, removed, duplicated, reordered or wrapped in a list."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key, changed = rng.choice(sorted(value)), dict(value)
        draw = rng.random()
        if draw < 0.1:
            del changed[key]
        elif draw < 0.2:
            changed[str(rng.choice(EDGE_VALUES))[:50]] = changed.pop(key)
        else:
            changed[key] = mutate_value(value[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.85:
        at, draw = rng.randrange(len(value)), rng.random()
        if draw < 0.1:
            return value[:at] + value[at + 1 :]
        if draw < 0.2:
            return [*value, value[at]]
        if draw < 0.3:
            return value[::-1]
        return [*value[:at], mutate_value(value[at], rng), *value[at + 1 :]]
    return [value] if rng.random() < 0.05 else rng.choice(EDGE_VALUES)


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file with one value in its header changed."""
    length = int.from_bytes(data[:8], "little")
    header = mutate_value(json.loads(data[8 : 8 + length]), rng)
    text = json.dumps(header).encode()
    stated = len(text) if rng.random() < 0.9 else rng.choice((0, 1, 2**20, 2**32, 2**63, 2**64 - 1, len(text) + 1))
    return stated.to_bytes(8, "little") + text + data[8 + length :]


def repacked(entries: dict[str, bytes], rng: random.Random) -> bytes:
    """Return a valid container with one changed entry; the manifest agrees with it unless it is that entry."""
    name = rng.choice([path for path in entries if path != "manifest.sig"] + ["manifest.json"] * 2)
    data = entries[name]
    if name.endswith(".json") and rng.random() < 0.8:
        changed = files.json_bytes(mutate_value(json.loads(data), rng))
    elif name.endswith(".safetensors") and rng.random() < 0.6:
        changed = mutate_header(data, rng)
    else:
        changed = mutate(data, rng, [0])
    mutant = {**entries, name: changed}
    return hand.sealed(mutant if name == "manifest.json" else hand.relisted(mutant))


def resigned(entries: dict[str, bytes], rng: random.Random) -> bytes:
    """Return a bundle with another signature: mutated bytes, mutated JSON, or random bytes in the right form."""
    data = entries["manifest.sig"]
    kind = rng.randrange(3)
    if kind == 0:
        changed = mutate(data, rng, [0, 25, 50, 70])
    elif kind == 1:
        changed = files.json_bytes(mutate_value(json.loads(data), rng))
    else:
        changed = bundle.Signature(json.loads(data)["key"], rng.randbytes(64)).to_bytes()
    return hand.sealed({**entries, "manifest.sig": changed})


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Any]]:
    """Return the bytes of a signed bundle and the trusted keys."""
    private = hand.write_key(tmp_path_factory.mktemp("keys"))
    key = signing.load_private(private).public_key()
    return bundle.pack(*hand.parts(), signing.signer(private)), {signing.key_id(key): key}


def fuzz(count: int, seed: int, signed: tuple[bytes, dict[str, Any]], path: Path) -> Counter[str]:
    """Read `count` mutants and count the outcomes by kind of mutant and reason."""
    original, trusted = signed
    entries, rng, near = hand.contents(original), random.Random(seed), interesting_offsets(original)
    makers: dict[str, Callable[[], bytes]] = {
        "raw": lambda: mutate(original, rng, near),
        "resealed": lambda: hand.resealed(mutate(original, rng, near)),
        "repacked": lambda: repacked(entries, rng),
        "signature": lambda: resigned(entries, rng),
    }
    reasons: Counter[str] = Counter()
    for number in range(count):
        name = ("raw", "resealed", "repacked", "repacked", "signature")[number % 5]
        data = makers[name]()
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
        assert name in ("repacked", "signature"), f"mutant {number} of seed {seed} was accepted"
        with pytest.raises(BundleRefusedError, match=r"is not signed|the signature of|signed with the key"):
            signing.check(opened, trusted)
        reasons[f"{name}: read, but not trusted"] += 1
    return reasons


def test_fuzz_1000_mutants(signed, tmp_path):
    reasons = fuzz(1000, 0, signed, tmp_path / "mutant.ssdedge")
    assert sum(reasons.values()) == 1000
    assert len(reasons) > 60  # many different checks were exercised
    for name in ("repacked", "signature"):
        assert 0 < reasons[f"{name}: read, but not trusted"] < 150


@pytest.mark.slow
def test_fuzz_20000_mutants(signed, tmp_path, capsys):
    start = time.monotonic()
    reasons = fuzz(20_000, 1, signed, tmp_path / "mutant.ssdedge")
    assert sum(reasons.values()) == 20_000
    with capsys.disabled():
        print(f"\n20,000 mutants in {time.monotonic() - start:.1f} s, {len(reasons)} reasons:")
        for reason, count in reasons.most_common(60):
            print(f"{count:6}  {reason}")


def oversized_bundles() -> dict[str, bytes]:
    """Return small files that declare large contents."""
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


@pytest.mark.parametrize("name", sorted(oversized_bundles()))
def test_declared_sizes_do_not_cause_large_allocations(name, tmp_path):
    path, data = tmp_path / "oversized.ssdedge", oversized_bundles()[name]
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


def test_memory_for_parsed_json_is_bounded(tmp_path):
    """Use empty lists, the worst case: 6 bytes each in the file and about a hundred in memory."""
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
