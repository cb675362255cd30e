"""A tiny bundle built byte by byte, so that golden bytes do not depend on the version of a library.

Images of 8 × 8 pixels, three features, two classes.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path

from ssd_edge import bundle, files
from ssd_edge.bundle import container
from ssd_edge.classes import ClassRegistry

SIZE, DIM = 8, 3
CLASSES = ClassRegistry().add("cup").add("schraube ß")
SEED = bytes(range(32))  # seed of the private key


def varint(number: int) -> bytes:
    """Encode a protobuf varint."""
    out = b""
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


def field(number: int, value: int | bytes | str) -> bytes:
    """Encode a protobuf field: a varint, or length-delimited bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def node(op_type: str, inputs: list[str], outputs: list[str], *more: bytes) -> bytes:
    """Encode a NodeProto; `more` are further encoded fields, e.g. the domain."""
    names = [field(1, name) for name in inputs] + [field(2, name) for name in outputs]
    return b"".join([*names, field(4, op_type), *more])


def attribute(name: str, kind: int, *more: bytes) -> bytes:
    """Encode an AttributeProto as a field of a node."""
    return field(5, b"".join([field(1, name), *more, field(20, kind)]))


def tensor(name: str, dtype: int, dims: list[int], raw: bytes, *more: bytes) -> bytes:
    """Encode a TensorProto."""
    return b"".join([*(field(1, dim) for dim in dims), field(2, dtype), field(8, name), field(9, raw), *more])


def value(name: str, dtype: int, shape: list[int | str]) -> bytes:
    """Encode a ValueInfoProto of a tensor."""
    dims = b"".join(field(1, field(1, side) if isinstance(side, int) else field(2, side)) for side in shape)
    return field(1, name) + field(2, field(1, field(1, dtype) + field(2, dims)))


def nodes() -> list[bytes]:
    """Return nodes that compute a quarter of the mean colour of each image."""
    return [
        node("Cast", ["images"], ["pixels"], attribute("to", 2, field(3, 1))),
        node("ReduceMean", ["pixels", "axes"], ["colour"], attribute("keepdims", 2, field(3, 0))),
        node("Mul", ["colour", "quarter"], ["embeddings"]),
    ]


def tensors() -> list[bytes]:
    """Return the initializers for `nodes`."""
    return [
        tensor("axes", 7, [2], struct.pack("<2q", 1, 2)),
        tensor("quarter", 1, [3], struct.pack("<3f", 0.25, 0.25, 0.25)),
    ]


def onnx(
    nodes: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    graph: bytes = b"",
    opsets: tuple[tuple[str, int], ...] = (("", 18),),
    model: bytes = b"",
) -> bytes:
    """Encode a ModelProto; `graph` and `model` are further encoded fields of the graph and the model."""
    defaults = globals()
    parts = [field(1, each) for each in (defaults["nodes"]() if nodes is None else nodes)]
    parts.append(field(2, "tiny"))
    parts += [field(5, each) for each in (defaults["tensors"]() if tensors is None else tensors)]
    parts.append(field(11, value("images", 2, ["batch", SIZE, SIZE, 3])))
    parts.append(field(12, value("embeddings", 1, ["batch", DIM])))
    imports = [field(8, field(1, domain) + field(2, version)) for domain, version in opsets]
    return b"".join([field(1, 8), field(7, b"".join(parts) + graph), *imports, model])


DTYPES = {"U8": "B", "F32": "f", "I64": "q"}


def safetensors(tensors: dict[str, tuple[str, list[int], list]], metadata: dict | None = None) -> bytes:
    """Encode a safetensors file from name → (dtype, shape, flat values), in this order."""
    header, body = {}, b""
    if metadata is not None:
        header["__metadata__"] = {"json": json.dumps(metadata, sort_keys=True)}
    for name, (dtype, shape, values) in tensors.items():
        data = struct.pack(f"<{len(values)}{DTYPES[dtype]}", *values)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + body


def vector(*values: float) -> bytes:
    """Encode a safetensors file with one float32 tensor, ``w``."""
    return safetensors({"w": ("F32", [len(values)], list(values))})


def probe(**changed) -> bytes:
    """Encode two probe images with embeddings that are exact in float32: sums of 64 pixels divided by 256."""
    images = [[7 * i % 256 for i in range(SIZE * SIZE * 3)], [255 - i % 256 for i in range(SIZE * SIZE * 3)]]
    embeddings = [sum(image[channel::3]) / 256 for image in images for channel in range(3)]
    arrays = {
        "images": ("U8", [2, SIZE, SIZE, 3], images[0] + images[1]),
        "embeddings": ("F32", [2, DIM], embeddings),
        "rows": ("I64", [2], [0, 1]),
        **changed,
    }
    limits = arrays.pop("limits", {"min_cosine": 0.9999, "max_difference": 0.001})
    return safetensors({name: item for name, item in arrays.items() if item}, limits)


def parts() -> tuple[dict, dict[str, tuple[str, bytes]]]:
    """Return the manifest and the entries (name → role, data) of a tiny bundle."""
    backbone = {"file": "backbone.onnx", "sha256": files.sha256(onnx())}
    manifest = {
        "name": "robot",
        "created": "2026-11-21T04:33:00Z",
        "release": 7,
        "target": "jetson",
        "producer": {"ssd_edge": "0.1.0", "git": "unknown", "packages": {}},
        "backbone": {**backbone, "size": SIZE, "dim": DIM, "precision": "fp32", "opset": 18, "id": "test"},
        "learner": {"name": "ssd", "settings": {"k": 10}},
        "classes": CLASSES.names,
        "metrics": {"average_accuracy": 0.5, "panel": {"ncm": 0.4}},
        "parity": {},
    }
    entries = {
        "backbone.onnx": ("backbone", onnx()),
        "learner.safetensors": ("learner", vector(1.0, -2.0)),
        "statistics.safetensors": ("statistics", vector(3.0)),
        "probe.safetensors": ("probe", probe()),
        "classes.json": ("classes", files.json_bytes(CLASSES.to_json())),
        "MODEL_CARD.md": ("card", b"# robot\n"),
    }
    return manifest, entries


def sealed(entries: dict[str, bytes]) -> bytes:
    """Return the canonical bytes of a bundle with a valid digest, without checking the entries."""
    return b"".join(container.blocks(entries))


def resealed(data: bytes) -> bytes:
    """Return the bytes with the digest recomputed."""
    return data[:-64] + files.sha256(data[:-64]).encode()


def contents(data: bytes | None = None) -> dict[str, bytes]:
    """Return the entries (name → data) of a bundle, including the manifest; by default of the tiny bundle."""
    with zipfile.ZipFile(io.BytesIO(bundle.pack(*parts()) if data is None else data)) as packed:
        return {name: packed.read(name) for name in packed.namelist()}


def relisted(entries: dict[str, bytes]) -> dict[str, bytes]:
    """Return the entries with their sizes and digests updated in the manifest."""
    manifest = json.loads(entries["manifest.json"])
    roles = {item["path"]: item["role"] for item in manifest["files"]}
    manifest["files"] = [
        {"path": path, "role": roles.get(path, path), "size": len(data), "sha256": files.sha256(data)}
        for path, data in sorted(entries.items())
        if path not in ("manifest.json", "manifest.sig")
    ]
    manifest["backbone"]["sha256"] = files.sha256(entries["backbone.onnx"])
    return {**entries, "manifest.json": files.json_bytes(manifest)}


def with_manifest(**changed) -> bytes:
    """Return the tiny bundle with top-level keys of its manifest replaced; None removes a key."""
    entries = contents()
    manifest = {**json.loads(entries["manifest.json"]), **changed}
    manifest = {key: value for key, value in manifest.items() if value is not None}
    return sealed({**entries, "manifest.json": files.json_bytes(manifest)})


def with_entry(name: str, data: bytes, role: str | None = None) -> bytes:
    """Return the tiny bundle with an entry replaced or added, and the manifest updated."""
    entries = relisted({**contents(), name: data})
    manifest = json.loads(entries["manifest.json"])
    for item in manifest["files"]:
        if item["path"] == name and role is not None:
            item["role"] = role
    return sealed({**entries, "manifest.json": files.json_bytes(manifest)})


def write_key(folder: Path, seed: bytes = SEED) -> Path:
    """Write a private key as OpenSSL does (RFC 8410): a PKCS#8 wrapper around the seed."""
    import base64

    path = folder / "fixed.key"
    der = bytes.fromhex("302e020100300506032b657004220420") + seed
    path.touch(mode=0o600)
    path.write_text(f"-----BEGIN PRIVATE KEY-----\n{base64.b64encode(der).decode()}\n-----END PRIVATE KEY-----\n")
    return path
