"""Tiny generations, committed as the device commits them; and what the tests of the store do to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from device_runtime.generations import Generation, Generations
from device_runtime.pruning import Pruned
from ssd_edge import files
from ssd_edge.classes import ClassRegistry

CLASSES = ClassRegistry().add("cup")
BACKBONE = b"an ONNX file"


def state(value: float) -> dict[str, bytes]:
    """The files of a tiny generation."""
    return {
        "learner.safetensors": files.tensor_bytes({"w": np.float32([value])}, {"name": "ssd"}),
        "classes.json": files.json_bytes(CLASSES.to_json()),
    }


def install(store: Generations, value: float = 0.0, backbone: bytes = BACKBONE) -> Generation:
    """Commit a generation as `ssd-edge device install` does."""
    with store.writer():
        return store.commit(state(value), {}, None, store.add_backbone(backbone))


def learn(store: Generations, value: float) -> Generation:
    """Commit a generation as `ssd-edge device learn` does: `value` is what it learned."""
    with store.writer():
        return store.commit(state(value), {"value": value}, store.current().number)


def roll_back(store: Generations, number: int) -> Generation:
    """Return to a generation as `ssd-edge device rollback` does."""
    with store.writer():
        return store.set_current(number)


def three(root: Path) -> Generations:
    """1.0 installed, 2.0 and 3.0 learned one from the other."""
    store = Generations(root)
    install(store, 1.0)
    learn(store, 2.0)
    learn(store, 3.0)
    return store


def value(generation: Generation) -> float:
    """What `state` was given."""
    return float(generation.tensors("learner.safetensors")[0]["w"][0])


def flip(path: Path, bit: int = 50) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.unlink()  # replacing the content of a file would wait for the disk
    path.write_bytes(bytes(data))


def prune(store: Generations, keep: int = 2, budget: int | None = None) -> Pruned:
    """Delete old generations."""
    with store.writer():
        return store.prune(keep, budget)


def contents(generation: Generation) -> dict[str, bytes]:
    """Every file of a generation, verified."""
    return {name: generation.read(name) for name in generation.files}
