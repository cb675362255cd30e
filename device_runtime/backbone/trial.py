"""The first run of a bundle's backbone on its probe images, in a child process with limits on time and memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np

from device_runtime.backbone.embedder import OnnxRuntimeEmbedder
from device_runtime.backbone.selftest import Embed
from ssd_edge import ort, targets
from ssd_edge.answers.head import Head
from ssd_edge.bundle import ROLES, Bundle
from ssd_edge.errors import BundleRefusedError
from ssd_edge.ort import apart
from ssd_edge.system import MIB

# (backbone, probe) of bundles that have passed in this process: digests of their entries
_passed: dict[tuple[str, str], Mapping[int, np.ndarray]] = {}


def check(opened: Bundle) -> None:
    """Do `run` before this process runs the backbone; raises as `run`.

    Where TensorRT is the only runtime there is no need: it builds the engine in such a process, and engines have no
    loops unless they were allowed.
    """
    if importlib.util.find_spec("onnxruntime") or not importlib.util.find_spec("tensorrt"):
        run(opened)


def run(opened: Bundle) -> Embed:
    """Run a bundle's backbone on its probe images, as one batch and the first one alone, on the CPU.

    A graph of an unknown author must pass this before this process runs it: it may be made to take all time or memory.

    Returns:
        A function that gives the embeddings of these two batches.

    Raises:
        BundleRefusedError: The backbone takes too long, needs too much memory, crashes, or gives another shape.
        EnvironmentUnfitError: ONNX Runtime is missing, or cannot run the backbone.
    """
    ort.load()
    digests = {entry["role"]: entry["sha256"] for entry in opened.manifest["files"]}
    key = digests["backbone"], digests["probe"]
    if key not in _passed:
        _passed[key] = _run(opened)
    found = _passed[key]
    return lambda images: found[len(images)]


def check_head(head: bytes, embeddings: np.ndarray) -> None:
    """Score embeddings with a head of an unknown author, in a process with limits.

    Raises:
        BundleRefusedError: It takes too long, needs too much memory, or is damaged.
    """
    arrays = {"head": np.frombuffer(head, np.uint8), "embeddings": embeddings}
    try:
        apart.call(f"{__name__}:_score", arrays, {}, len(head), apart.memory_limit())
    except apart.Stopped as error:
        raise BundleRefusedError(
            f"the bundle's {ROLES['answers']} {error} when it was tried; deploy it again"
        ) from error


def _score(arrays: apart.Arrays, options: Mapping[str, Any]) -> apart.Arrays:
    """Score the embeddings of `check_head` in the child."""
    Head.parse(arrays["head"].tobytes()).score(arrays["embeddings"])
    return {}


def _run(opened: Bundle) -> Mapping[int, np.ndarray]:
    backbone, target = opened.read("backbone"), targets.targets().get(opened.manifest["target"])
    images = opened.tensors("probe")[0]["images"]
    arrays = {"model": np.frombuffer(backbone, np.uint8), "images": images}
    options = {key: opened.manifest["backbone"][key] for key in ("size", "dim")}
    memory = apart.memory_limit(target.memory_mb * MIB if target else None)
    try:
        found = apart.call(f"{__name__}:_embed", arrays, options, len(backbone), memory)
    except apart.Stopped as error:
        raise BundleRefusedError(
            f"the bundle's {ROLES['backbone']} {error} when it was tried on the {len(images)} probe images; get one "
            "with a smaller backbone, or use a machine with more memory"
        ) from error
    # NaN is allowed here: the self-test reports it
    return {len(images): found["together"].view(np.float32), 1: found["alone"].view(np.float32)}


def _embed(arrays: apart.Arrays, options: Mapping[str, Any]) -> apart.Arrays:
    """Embed the images of `_run` in the child; the results are bytes, because they may be NaN."""
    embedder, images = OnnxRuntimeEmbedder(arrays["model"].tobytes(), **options), arrays["images"]
    return {name: embedder.embed(part).view(np.uint8) for name, part in (("together", images), ("alone", images[:1]))}
