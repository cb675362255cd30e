"""Does the exported graph compute what the run computed? Measured on images, and a gate.

Measured on a ResNet-9 of this project, largest difference in standard deviations of the embeddings: 4e-6 for a
correct export in fp32, 5e-3 with a body in fp16; 0.14 with pixel means that are off by 0.02, 2 with red and blue
swapped, 5 in training mode. The limits lie between what is correct and the smallest mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ssd_edge.backbones import onnx_file
from ssd_edge.backbones.onnx import batch_size, open_session, run
from ssd_edge.errors import GateRefusedError
from ssd_edge.learners import Learner

MIN_COSINE = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.999}
MAX_DIFFERENCE = {"fp32": 1e-3, "fp16": 0.05, "int8": 0.05}  # in standard deviations of the reference
MIN_AGREEMENT = 0.99  # only a near-tie may be decided otherwise
ALONE = 8  # images that are also run one by one

Reference = Callable[[np.ndarray], np.ndarray]  # uint8 (N, size, size, 3) → float32 (N, D)


def parity(
    onnx_bytes: bytes,
    reference: Reference,
    images: np.ndarray,
    learner: Learner | None = None,
    labels: np.ndarray | None = None,
) -> dict[str, Any]:
    """Compare a graph, run by ONNX Runtime on the CPU, with a reference.

    All images go through it in batches, and the first few also one by one.

    Args:
        onnx_bytes: the graph that a bundle will hold.
        reference: the embeddings that the run was made with.
        images: uint8 RGB ``(N, size, size, 3)``.
        learner: also compare its decisions.
        labels: rows of the learner, int64 ``(N,)``; also measure accuracy.

    Returns:
        ``images``, ``batch_sizes``, ``max_difference`` in standard deviations, ``min_cosine``; with a learner
        ``agreement``; with labels ``accuracy`` of ``reference`` and ``exported``.

    Raises:
        GateRefusedError: they differ by more than rounding.
    """
    session, precision = open_session(onnx_bytes), onnx_file.precision(onnx_bytes)
    wanted = reference(images)
    found = run(session, images)
    pairs = [(wanted, found), (wanted[:ALONE], run(session, images[:ALONE], batch=1))]
    spread = max(float(wanted.std()), np.finfo(np.float32).tiny)
    difference = max(float(np.abs(one - other).max()) for one, other in pairs) / spread
    cosine = min(float(_cosines(one, other).min()) for one, other in pairs)
    result: dict[str, Any] = {
        "images": len(images),
        "batch_sizes": sorted({1, min(batch_size(session), len(images))}),
        "max_difference": float(f"{difference:.1e}"),
        "min_cosine": round(cosine, 7),
    }
    limit = MAX_DIFFERENCE[precision]
    _gate(difference <= limit, f"an embedding differs by {difference:.2g} standard deviations", limit)
    limit = MIN_COSINE[precision]
    _gate(cosine >= limit, f"two embeddings of one image have a cosine of {cosine:.6f}", limit)
    if learner is not None:
        before, after = (learner.predict(torch.from_numpy(part)).numpy() for part in (wanted, found))
        agreement = float((before == after).mean())
        result["agreement"] = round(agreement, 4)
        _gate(agreement >= MIN_AGREEMENT, f"{agreement:.2%} of the decisions agree", MIN_AGREEMENT)
        if labels is not None:
            accuracy = {"reference": (before == labels).mean(), "exported": (after == labels).mean()}
            result["accuracy"] = {name: round(float(value), 4) for name, value in accuracy.items()}
    return result


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = one.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return (one * other).sum(1) / np.maximum(lengths, np.finfo(np.float64).tiny)


def _gate(passed: bool, what: str, limit: float) -> None:
    if not passed:  # also for NaN
        raise GateRefusedError(
            f"the exported backbone does not compute what the run computed: {what}, but the limit is {limit:g}; "
            "nothing was written. Please report it with the run's run.json and the versions of torch and onnxruntime"
        )
