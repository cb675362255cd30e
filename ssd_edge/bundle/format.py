"""Pack, write, read and verify bundles. Specification: docs/bundle.md.

This module checks the contents of a bundle; `container` implements the archive, which has exactly one valid byte form.

After ``write(p, pack(manifest, entries))``, ``read(p).entries == {**entries, "manifest.json": ...}``.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short  # limits the length of messages about untrusted files
from typing import Any, BinaryIO

import numpy as np

from ssd_edge import files
from ssd_edge.bundle import container, onnx_scan
from ssd_edge.bundle.container import FORMAT, SIGNATURE, VERSION
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.images import Pixels

MANIFEST = "manifest.json"
ROLES = {  # role → name of its entry
    "backbone": "backbone.onnx",
    "learner": "learner.safetensors",
    "statistics": "statistics.safetensors",
    "probe": "probe.safetensors",
    "unknown": "unknown.safetensors",
    "record": "record.safetensors",
    "answers": "head.safetensors",
    "head": "head.onnx",
    "classes": "classes.json",
    "card": "MODEL_CARD.md",
}
OPTIONAL_ROLES = frozenset({"answers", "head", "statistics", "unknown", "record"})

# docs/bundle.md gives the reason for each limit.
MAX_JSON_BYTES = 2 * 2**20
MAX_TITLE_LENGTH = 64
MAX_RELEASE = 2**63
MAX_PROBE_IMAGES = 64

# TensorRT's plans begin with "ptrt" (kPLAN_MAGIC_TAG), those of TensorRT-RTX 1.7.1 with "vtrt" and "ptrt" at byte 112.
ENGINE_MARKS = (b"ptrt", b"vtrt")

_CREATED = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
_KEY_ID = re.compile(r"[0-9a-f]{16}")
_DEVICE_IDS = {"installation": _KEY_ID, "bundle_sha256": re.compile(r"[0-9a-f]{64}")}
_MAX_REASON = 400  # characters

_SCHEMA = {
    "format": str,
    "version": int,
    "name": str,
    "created": str,
    "release": int,
    "target": str,
    "producer": {"ssd_edge": str, "git": str, "packages": dict},
    "backbone": {"file": str, "sha256": str, "size": int, "dim": int, "precision": str, "opset": int, "id": str},
    "learner": {"name": str, "settings": dict},
    "classes": [str],
    "files": [{"path": str, "role": str, "size": int, "sha256": str}],
    "metrics": dict,
    "parity": dict,
}


@dataclass(frozen=True)
class Signature:
    """An Ed25519 signature of manifest.json, which is not verified here: see `signing.check`.

    Attributes:
        key: Id of the key, 16 hexadecimal digits.
        value: 64 bytes.
    """

    key: str
    value: bytes

    def to_bytes(self) -> bytes:
        """Return the contents of ``manifest.sig``."""
        text = base64.b64encode(self.value).decode()
        return files.json_bytes({"algorithm": "ed25519", "key": self.key, "signature": text})


@dataclass(frozen=True)
class Bundle:
    """A bundle that passed every check of docs/bundle.md; made by `read` and `parse`.

    Attributes:
        manifest: Parsed manifest.json.
        entries: Name → data of all entries.
        sha256: Digest of the whole file, as printed by ``sha256sum``.
        signature: Signature of the manifest, not verified. None if unsigned.
    """

    manifest: dict[str, Any]
    entries: dict[str, bytes]
    sha256: str
    signature: Signature | None = None

    @property
    def roles(self) -> dict[str, str]:
        """Names of the entries by role."""
        return {item["role"]: item["path"] for item in self.manifest["files"]}

    def read(self, role: str) -> bytes:
        """Return the data of the entry with a role.

        Raises:
            InputError: There is no such entry. Of the roles in `ROLES`, only those in `OPTIONAL_ROLES` can be missing.
        """
        if role not in self.roles:
            raise InputError(f"this bundle has no entry for '{role}'; it has: {', '.join(self.roles)}")
        return self.entries[self.roles[role]]

    def tensors(self, role: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return arrays and metadata of a safetensors entry; raises like `read`."""
        return files.parse_tensors(self.read(role), self.roles[role])

    @property
    def registry(self) -> ClassRegistry:
        """Classes in the order of the learner's rows."""
        return ClassRegistry.from_json(json.loads(self.read("classes")))


def pack(
    manifest: Mapping[str, Any],
    entries: Mapping[str, tuple[str, bytes]],
    sign: Callable[[bytes], bytes] | None = None,
) -> bytes:
    """Pack a bundle; the bytes depend only on the arguments, not on the order of their keys.

    Args:
        manifest: Manifest of docs/bundle.md without ``format``, ``version`` and ``files``, which are added.
        entries: Name → (role, data) of every entry except the manifest.
        sign: Function from the bytes of manifest.json to those of manifest.sig, see `signing.signer`. None: unsigned.

    Raises:
        BundleRefusedError: `read` would refuse the result, e.g. because a weight is NaN.

    Example:
        >>> bundle.write("robot.ssdedge", bundle.pack(manifest, {"backbone.onnx": ("backbone", onnx), ...}))
    """
    listed = [
        {"path": path, "role": role, "size": len(data), "sha256": files.sha256(data)}
        for path, (role, data) in sorted(entries.items())
    ]
    contents = {path: data for path, (_, data) in entries.items()}
    contents[MANIFEST] = files.json_bytes({**manifest, "format": FORMAT, "version": VERSION, "files": listed})
    if sign is not None:
        contents[SIGNATURE] = sign(contents[MANIFEST])
    container.check_size(sum(map(len, contents.values())))  # before sizes are stored in 32 bits
    container.check_names(contents)
    _check_contents(contents, allow_control_flow=True)  # whoever reads the bundle decides
    data = b"".join(container.blocks(contents))
    container.check_size(len(data))
    return data


def write(path: str | Path, data: bytes) -> None:
    """Write a packed bundle atomically, creating the folder if it is missing.

    Raises:
        InputError: `path` is a folder, a symbolic link or a device.
        EnvironmentUnfitError: The disk is full, or the folder is not writable.
    """
    path = Path(path)
    files.check_output(path)
    files.make_directory(path.parent)
    files.write_bytes(path, data)


def read(path: str | Path, allow_control_flow: bool = False) -> Bundle:
    """Read a bundle and check everything except the signature, which `signing.check` verifies.

    Args:
        path: The file.
        allow_control_flow: Accept a backbone with loops and branches, whose cost nothing bounds. It is no danger as
            long as the backbone is not run.

    Raises:
        InputError: The file does not exist, is a folder, or cannot be read.
        BundleRefusedError: The file is damaged, not a bundle, or of a newer version.

    Example:
        >>> bundle.read("robot.ssdedge").registry.names
        ['cup', 'screw']
    """
    try:
        with open(path, "rb") as stream:
            return _read(stream, allow_control_flow)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"the bundle {path} cannot be read: {reason}; check the path") from error
    except BundleRefusedError as error:
        raise BundleRefusedError(f"{path} is refused: {str(error)[:_MAX_REASON]}") from error


def parse(data: bytes, allow_control_flow: bool = False) -> Bundle:
    """Read a bundle from bytes, such as `pack` returns.

    Args:
        data: The bytes.
        allow_control_flow: As for `read`.

    Raises:
        BundleRefusedError: As for `read`.
    """
    return _read(io.BytesIO(data), allow_control_flow)


def _read(stream: BinaryIO, allow_control_flow: bool) -> Bundle:
    digest = container.check_digest(stream)
    try:
        entries = container.unpack(stream)
        return Bundle(_check_contents(entries, allow_control_flow), entries, digest, _signature(entries))
    except RecursionError as error:
        raise BundleRefusedError("its JSON is nested too deeply") from error
    except BundleRefusedError as error:
        raise BundleRefusedError(f"{error} (build a new one with: ssd-edge deploy)") from error


def _check_contents(entries: Mapping[str, bytes], allow_control_flow: bool) -> dict[str, Any]:
    """Check the manifest and every entry against it, and return the manifest."""
    if MANIFEST not in entries:
        raise BundleRefusedError(f"it has no {MANIFEST}")
    manifest: dict[str, Any] = _parse_json(MANIFEST, entries[MANIFEST])
    _check_manifest(manifest)
    _signature(entries)
    _check_files(manifest, entries)
    _check_roles(manifest, entries)
    for path, data in entries.items():
        if data.startswith(ENGINE_MARKS):
            raise BundleRefusedError(f"its {path} is a compiled TensorRT engine; a device builds its own from the ONNX")
        if path.endswith(".json") and path != MANIFEST:
            _parse_json(path, data)
    _check_classes(manifest, entries)
    for path, data in entries.items():
        if path.endswith(".onnx"):
            facts = onnx_scan.scan(data, f"its {path}", allow_control_flow and path == ROLES["backbone"])
            if path == ROLES["backbone"]:
                _check_backbone(manifest["backbone"], facts)
        elif path.endswith(".safetensors"):
            tensors = files.parse_tensors(data, f"its {path}")
            if path == ROLES["probe"]:
                _check_probe(manifest, *tensors)
    return manifest


def _check_classes(manifest: Mapping[str, Any], entries: Mapping[str, bytes]) -> None:
    names, stated = ClassRegistry.from_json(json.loads(entries[ROLES["classes"]])).names, manifest["classes"]
    if names != stated:
        raise BundleRefusedError(f"its classes are {short(names)}, but {MANIFEST} says {short(stated)}")


def _parse_json(path: str, data: bytes) -> Any:
    if len(data) > MAX_JSON_BYTES:
        raise BundleRefusedError(f"its {path} has {len(data)} bytes, but at most {MAX_JSON_BYTES} are allowed")
    try:
        value = json.loads(data)
        canonical = files.json_bytes(value)
    except ValueError as error:  # also for invalid UTF-8, NaN, and lone surrogates
        raise BundleRefusedError(f"its {path} is not valid JSON ({error})") from error
    if canonical != data:
        raise BundleRefusedError(f"its {path} is not canonical JSON (sorted keys, two spaces, no duplicate keys)")
    return value


def _signature(entries: Mapping[str, bytes]) -> Signature | None:
    """Parse manifest.sig, if there is one. It must have the form that `Signature` writes."""
    data = entries.get(SIGNATURE)
    if data is None:
        return None
    wrong = BundleRefusedError(f"its {SIGNATURE} does not have the form of docs/bundle.md")
    if len(data) > 200:  # a signature has 165
        raise wrong
    try:
        stated = json.loads(data)
        found = Signature(stated["key"], base64.b64decode(stated["signature"]))
    except (ValueError, KeyError, TypeError) as error:
        raise wrong from error
    if type(found.key) is not str or not _KEY_ID.fullmatch(found.key) or len(found.value) != 64:
        raise wrong
    if found.to_bytes() != data:
        raise wrong
    return found


def _check_manifest(manifest: Any) -> None:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleRefusedError(f"its {MANIFEST} does not say that its format is '{FORMAT}'")
    if type(manifest.get("version")) is int:
        container.check_version(manifest["version"])
    _check_types(manifest, _SCHEMA, MANIFEST)
    for key in ("name", "target"):
        if not (0 < len(manifest[key]) <= MAX_TITLE_LENGTH and manifest[key].isprintable()):
            raise BundleRefusedError(
                f"its {key} {short(manifest[key])} needs 1 to {MAX_TITLE_LENGTH} printable characters"
            )
    if not _CREATED.fullmatch(manifest["created"]):
        raise BundleRefusedError(f"its time {short(manifest['created'])} is not of the form 2026-11-21T04:33:00Z")
    if not 0 <= manifest["release"] < MAX_RELEASE:
        raise BundleRefusedError(f"its release is {short(manifest['release'])}, but must be 0 or more, below 2^63")
    _check_device(manifest.get("device"))
    size, dim = manifest["backbone"]["size"], manifest["backbone"]["dim"]
    if min(size, dim) < 1:
        raise BundleRefusedError(f"its backbone has size {size} and dim {dim}, but both must be at least 1")
    _pixels(manifest["backbone"], MANIFEST)


def _pixels(values: Mapping[str, object], where: str) -> Pixels:
    """Return what a manifest or a graph says about how images become the input."""
    try:
        return Pixels.from_dict(values)
    except InputError as error:
        raise BundleRefusedError(f"its {where} does not say correctly how images become the input: {error}") from error


def _check_device(device: Any) -> None:
    """Check the ids in what an exported bundle says about its device; the rest is checked by a merge."""
    if device is None:
        return
    if not isinstance(device, dict) or not isinstance(device.get("merged", []), list):
        raise BundleRefusedError(f"its {MANIFEST} does not say correctly which device exported it")
    ids = [(_KEY_ID, value) for value in device.get("merged", [])]
    ids += [(shape, device[key]) for key, shape in _DEVICE_IDS.items() if key in device]
    for shape, value in ids:
        if type(value) is not str or not shape.fullmatch(value):
            raise BundleRefusedError(f"its device has the id {short(value)}, not one of the form {shape.pattern}")


def _check_types(value: Any, schema: Any, where: str) -> None:
    kind: Any = schema if isinstance(schema, type) else type(schema)
    if type(value) is not kind:  # not isinstance: True is not a number here
        raise BundleRefusedError(f"its {where} has type {type(value).__name__}, not {kind.__name__}")
    if isinstance(schema, dict):
        for key, inner in schema.items():
            if key not in value:
                raise BundleRefusedError(f"its {where} lacks the key '{key}'")
            _check_types(value[key], inner, f"{where}: {key}")
    elif isinstance(schema, list):
        for index, item in enumerate(value):
            _check_types(item, schema[0], f"{where}[{index}]")


def _check_files(manifest: Mapping[str, Any], entries: Mapping[str, bytes]) -> None:
    """Check that ``files`` lists every entry except manifest and signature, in order, with size and digest."""
    listed = [item["path"] for item in manifest["files"]]
    present = sorted(set(entries) - {MANIFEST, SIGNATURE})
    for path in sorted(set(listed) - set(present)):
        raise BundleRefusedError(f"its {MANIFEST} lists {short(path)}, but there is no such entry")
    for path in sorted(set(present) - set(listed)):
        raise BundleRefusedError(f"its entry {short(path)} is not listed in {MANIFEST}")
    if listed != present:
        raise BundleRefusedError(f"its {MANIFEST} lists a file twice or out of order: {short(listed)}")
    for item in manifest["files"]:
        path, stated = item["path"], (item["size"], item["sha256"])
        found = (len(entries[path]), files.sha256(entries[path]))
        if found != stated:
            raise BundleRefusedError(f"its {path} is {short(found)}, but listed as {short(stated)}")


def _check_roles(manifest: Mapping[str, Any], entries: Mapping[str, bytes]) -> None:
    """Check that every role occurs once and under its name, and that the manifest describes this backbone."""
    by_role: dict[str, str] = {}
    for item in manifest["files"]:
        role, path = item["role"], item["path"]
        if role in by_role:
            raise BundleRefusedError(f"its entries {by_role[role]} and {path} have the same role, {short(role)}")
        if ROLES.get(role, path) != path:
            raise BundleRefusedError(f"its entry {path} has the role '{role}', but {ROLES[role]} has that role")
        by_role[role] = path
    for role in sorted(ROLES.keys() - OPTIONAL_ROLES - by_role.keys()):
        raise BundleRefusedError(f"it has no entry with the role '{role}' ({ROLES[role]})")
    for role in sorted(OPTIONAL_ROLES - by_role.keys()):
        if ROLES[role] in entries:
            raise BundleRefusedError(f"its entry {ROLES[role]} needs the role '{role}'")
    path, stated = ROLES["backbone"], manifest["backbone"]
    if stated["file"] != path or stated["sha256"] != files.sha256(entries[path]):
        raise BundleRefusedError(f"its {path} is not the backbone that {MANIFEST} names (file, sha256)")


def _check_backbone(stated: Mapping[str, Any], facts: onnx_scan.Facts) -> None:
    """Check opset, input, output and what is said about pixels of the graph against the manifest."""
    path = ROLES["backbone"]
    if facts.opset != stated["opset"]:
        raise BundleRefusedError(f"its {path} has opset {facts.opset}, but {MANIFEST} says {short(stated['opset'])}")
    if "size" in facts.metadata:  # in every graph that SSD-Edge makes
        wanted, found = _pixels(stated, MANIFEST), _pixels(facts.metadata, path)
        if found != wanted:
            raise BundleRefusedError(f"its {path} takes {found.describe()}; but {MANIFEST} says {wanted.describe()}")
    size, dim = stated["size"], stated["dim"]
    for side, values, dtype, shape in (
        ("takes", facts.inputs, "uint8", (None, size, size, 3)),
        ("gives", facts.outputs, "float32", (None, dim)),
    ):
        if not (len(values) == 1 and values[0].dtype == dtype and _fits(values[0].shape, shape)):
            given = ", ".join(f"{short(v.name)} {v.dtype} {short(v.shape)}" for v in values[:3]) or "nothing"
            needed = ", ".join(map(str, shape[1:]))
            raise BundleRefusedError(f"its {path} {side} {given}, not {dtype} of shape (N, {needed})")


def _fits(found: tuple[int | str | None, ...] | None, wanted: tuple[int | None, ...]) -> bool:
    """Return True if no known dimension disagrees; unknown dimensions are checked by the probe on the device."""
    if found is None:
        return True
    if len(found) != len(wanted):
        return False
    return all(type(a) is not int or b is None or a == b for a, b in zip(found, wanted, strict=True))


def _check_probe(manifest: Mapping[str, Any], arrays: Mapping[str, np.ndarray], metadata: Any) -> None:
    """Check shapes, types and limits of the probe images, their embeddings and the predicted rows."""
    path, size, dim = ROLES["probe"], manifest["backbone"]["size"], manifest["backbone"]["dim"]
    images = arrays.get("images")
    count = len(images) if images is not None and images.ndim == 4 else 0
    if not 1 <= count <= MAX_PROBE_IMAGES:
        raise BundleRefusedError(f"its {path} has {count} images, but needs 1 to {MAX_PROBE_IMAGES}")
    wanted = {
        "images": ("uint8", (count, size, size, 3)),
        "embeddings": ("float32", (count, dim)),
        "rows": ("int64", (count,)),
    }
    found = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
    if found != wanted:
        raise BundleRefusedError(f"its {path} has {short(found)}, but needs {short(wanted)}")
    rows, classes = arrays["rows"], len(manifest["classes"])
    if classes and not (rows.min() >= 0 and rows.max() < classes):
        raise BundleRefusedError(f"its {path} names rows {rows.min()} to {rows.max()}, but there are {classes} classes")
    for key, low, high in (("min_cosine", -1, 1), ("max_difference", 0, 1e9)):
        limit = metadata.get(key) if isinstance(metadata, dict) else None
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not low <= limit <= high:
            raise BundleRefusedError(f"its {path} needs '{key}' in its metadata, {low} to {high:g}, not {short(limit)}")
