"""Helpers for the store tests: commit, damage and read tiny generations, and make tiny images and bundles."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from device_runtime.store.generations import Generations, Pruned
from device_runtime.store.record import Generation
from ssd_edge import files
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import SSDEdgeError

CLASSES = ClassRegistry().add("cup")
BACKBONE = b"an ONNX file"


def state(value: float) -> dict[str, bytes]:
    """Return the files of a tiny generation."""
    return {
        "learner.safetensors": files.tensor_bytes({"w": np.float32([value])}, {"name": "slda"}),
        "classes.json": files.json_bytes(CLASSES.to_json()),
    }


def install(store: Generations, value: float = 0.0, backbone: bytes = BACKBONE) -> Generation:
    """Commit a generation as `ssd-edge device install` does."""
    with store.writer():
        return store.commit(state(value), {}, None, store.add_backbone(backbone))


def learn(store: Generations, value: float) -> Generation:
    """Commit a generation as `ssd-edge device learn` does, with `value` as its only weight."""
    with store.writer():
        return store.commit(state(value), {"value": value}, store.current().number)


def roll_back(store: Generations, number: int) -> Generation:
    """Make a generation current as `ssd-edge device rollback` does."""
    with store.writer():
        return store.set_current(number)


def three(root: Path) -> Generations:
    """Return a store with three generations: 1.0 installed, then 2.0 and 3.0 learned in sequence."""
    store = Generations(root)
    install(store, 1.0)
    learn(store, 2.0)
    learn(store, 3.0)
    return store


def value(generation: Generation) -> float:
    """Return the value that the generation was committed with."""
    return float(generation.tensors("learner.safetensors")[0]["w"][0])


def flip(path: Path, bit: int = 50) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.unlink()  # overwriting a file in place would wait for the disk
    path.write_bytes(bytes(data))


def prune(store: Generations, keep: int = 2, budget: int | None = None) -> Pruned:
    """Delete old generations."""
    with store.writer():
        return store.prune(keep, budget)


def refusal(call: Callable[[], object]) -> str:
    """Return the message with which a call refuses, or an empty string; any other exception is a bug."""
    try:
        call()
    except SSDEdgeError as error:
        return str(error) or repr(error)
    return ""


def contents(generation: Generation) -> dict[str, bytes]:
    """Return all files of a generation, verified."""
    return {name: generation.read(name) for name in generation.files}


# ── for Device tests: tiny images, and bundles with different backbones ──────────────────────────────
COLOURS = {
    "cup": (220, 30, 30),
    "nut": (30, 220, 30),
    "screw": (30, 30, 220),
    "wedge": (220, 220, 30),
    "bolt": (20, 20, 20),
    "gear": (220, 30, 220),
}


def photos(name: str, count: int, seed: int = 0) -> list[np.ndarray]:
    """Return noisy images in the colour of a class, uint8 ``(8, 8, 3)``.

    The tiny bundles know the first three colours.
    """
    rng = np.random.default_rng([seed, list(COLOURS).index(name)])
    noisy = np.array(COLOURS[name]) + rng.normal(0, 20, (count, 8, 8, 3))
    return list(np.clip(noisy, 0, 255).astype(np.uint8))


def with_backbone(bundle: bytes, version: int) -> bytes:
    """Return the bundle with a backbone file that has other bytes but computes the same embeddings."""
    import onnx

    from ssd_edge import bundle as bundles

    opened = bundles.parse(bundle)
    model = onnx.load_from_string(opened.read("backbone"))
    model.model_version = version
    entries = {name: (role, opened.entries[name]) for role, name in opened.roles.items()}
    name = opened.roles["backbone"]
    entries[name] = ("backbone", model.SerializeToString(deterministic=True))
    manifest = {key: value for key, value in opened.manifest.items() if key not in ("format", "version", "files")}
    manifest["backbone"] = {**manifest["backbone"], "sha256": files.sha256(entries[name][1])}
    return bundles.pack(manifest, entries)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Create a temporary folder, in memory if possible, and limit PyTorch to one thread.

    The tests write many small files and multiply many small matrices.
    """
    import torch

    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield folder
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(folder)


def leftovers(root: Path) -> list[Path]:
    """Return the temporary files that an interrupted write left behind."""
    return sorted(root.rglob(f"{files.TEMPORARY_PREFIX}*"))


def disk_bytes(root: Path) -> int:
    """Return the total size in bytes of all files below a folder."""
    return sum(path.lstat().st_size for path in root.rglob("*") if path.is_file())
