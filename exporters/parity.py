"""Compare an exported graph with the embeddings of the run, and check the difference against limits.

A graph in fp16 is measured as a GPU computes it, with each value rounded (`as_stored`): ONNX Runtime on a CPU
computes it in fp32 and would hide an overflow.

The limits (`precision`) lie between the rounding of a correct export and the smallest mistakes. Measured on 256 and
1,024 test images of CIFAR-10 with the shipped ResNet-9 on one CPU: the largest difference and the 99th percentile of
the differences of single values, in standard deviations of the embeddings, and the smallest cosine:

| precision | correct                 | smallest mistakes                                                              |
|-----------|-------------------------|--------------------------------------------------------------------------------|
| fp32      | 8e-6, 3e-6, 1.000000    | one of eight weights rounded to float16: 8e-4, 3e-4, 0.999999                  |
| fp16      | 0.019, 0.0033, 0.999998 | pixel means off by 0.004: 0.17, 0.050, 0.9996; a weight in 6 bits: 0.16, 0.065 |
| int8      | 0.52, 0.17, 0.9946      | a weight in 4 bits: 0.75, 0.32, 0.991; means off by 0.02: 0.95, 0.31, 0.984    |

Larger mistakes: a zeroed channel 0.9, 0.4, 0.97; int8 calibrated with black images 3.1, 0.92, 0.74; red and blue
swapped 7, 3.3, 0.05; training mode 3.6, 1.5, 0.77. Networks with random weights have larger rounding errors: up to
0.025, 0.007, 0.99999 in fp16 and 0.8, 0.17, 0.983 in int8 (ConvMixer). A mistake smaller than the rounding of int8 is
invisible in int8: measure the same graph in fp32 first.

With six learners at least 99.9 % of the decisions agree in fp16, and 96.7 % (`ssd`) to 99.0 % in int8, where
the accuracy changes by at most half a point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from device_runtime.backbone.selftest import cosines
from exporters import precision as precisions
from exporters.precision import element_types
from ssd_edge.backbones import onnx_file
from ssd_edge.backbones.onnx import batch_size, open_session, run
from ssd_edge.errors import require
from ssd_edge.learners import Learner

if TYPE_CHECKING:
    from onnx import NodeProto

ALONE = 8  # images that are also run one by one
DEAD = 0.1  # dimensions with a smaller share of the overall standard deviation are left out of `spread`
_ROUNDED = 1e-4  # resolution of the shares in a report
_WORST = 1e9  # replaces infinity, which JSON does not have

Reference = Callable[[np.ndarray], np.ndarray]  # uint8 (N, size, size, 3) → float32 (N, D)


def measure(
    onnx_bytes: bytes,
    reference: Reference,
    images: np.ndarray,
    learner: Learner | None = None,
    labels: np.ndarray | None = None,
) -> dict[str, Any]:
    """Compare a graph, run by ONNX Runtime on the CPU, with a reference.

    All images are run in batches, and the first few also one by one.

    Args:
        onnx_bytes: The graph.
        reference: Function that gives the embeddings of the run.
        images: uint8 RGB ``(N, size, size, 3)``, at least one.
        learner: If given, its decisions are compared.
        labels: Learner rows, int64 ``(N,)``. If given, accuracy is measured.

    Returns:
        Finite JSON values: ``images``, ``batch_sizes``; ``nonfinite``, the number of images that gave NaN or infinity;
        ``max_difference`` and ``p99_difference`` of single values, in standard deviations of their dimension in the
        reference, or of all dimensions where that is more;
        ``min_cosine`` and ``mean_cosine`` of the two embeddings of an image; ``drift`` with ``mean_shift``, the
        largest shift of the mean of a dimension in standard deviations, and ``spread``, the largest ratio of the two
        standard deviations of a dimension, at least 1; with a learner, the ``agreement`` of its decisions; with
        labels, the ``accuracy`` of ``reference`` and ``exported``.
    """
    session = open_session(as_stored(onnx_bytes))
    wanted = reference(images)
    batched = run(session, images)
    alone = run(open_session(onnx_bytes), images[:ALONE], batch=1)
    broken = ~(np.isfinite(batched).all(1) & np.isfinite(wanted).all(1))
    broken[:ALONE] |= ~np.isfinite(alone).all(1)
    wanted, batched, alone = (np.nan_to_num(part, posinf=0, neginf=0) for part in (wanted, batched, alone))
    # Features keep their proportions, so that some vary many times more than others, and so does their rounding.
    deviation = np.maximum(wanted.std(0), max(float(wanted.std()), np.finfo(np.float32).tiny))
    differences = np.abs(batched - wanted) / deviation
    similar = cosines(wanted, batched)
    differences[broken], similar[broken] = _WORST, -1
    single = (np.abs(alone - wanted[:ALONE]) / deviation).max()
    report: dict[str, Any] = {
        "images": len(images),
        "batch_sizes": sorted({1, min(batch_size(session), len(images))}),
        "nonfinite": int(broken.sum()),
        "max_difference": _short(max(differences.max(), single)),
        "p99_difference": _short(np.percentile(differences, 99)),
        "min_cosine": round(float(min(similar.min(), cosines(wanted[:ALONE], alone).min())), 7),
        "mean_cosine": round(float(similar.mean()), 7),
        "drift": _drift(wanted, batched, deviation),
    }
    if learner is not None:
        before, after = (learner.predict(torch.from_numpy(part)).numpy() for part in (wanted, batched))
        report["agreement"] = round(float((before == after).mean()), 4)
        if labels is not None:
            accuracy = {"reference": (before == labels).mean(), "exported": (after == labels).mean()}
            report["accuracy"] = {name: round(float(value), 4) for name, value in accuracy.items()}
    return report


def failures(report: dict[str, Any], precision: str, answers_only: bool = False) -> list[str]:
    """Return one sentence for each limit that a report of `measure` exceeds, the clearest first.

    Args:
        report: Result of `measure`.
        precision: Name of the precision, which has the limits.
        answers_only: If True, differences of embeddings count only as far as they change answers.
    """
    declared = precisions.get(precision)
    found = []

    def check(value: float, name: str, problem: str) -> None:
        limit: float = getattr(declared.limits, name)
        passed = value >= limit if name.startswith("min_") else value <= limit
        if not passed:  # also for NaN
            found.append(f"{problem}, but the limit is {limit:g}")

    if report["nonfinite"]:
        overflow = f" ({declared.overflow})" if declared.overflow else ""
        found.append(f"{report['nonfinite']} of {report['images']} images give NaN or infinity{overflow}")
    if not answers_only:
        value = report["max_difference"]
        check(value, "max_difference", f"an embedding differs by {value:.2g} standard deviations")
        value = report["min_cosine"]
        check(value, "min_cosine", f"two embeddings of one image have a cosine of {value:.6f}")
        value = report["p99_difference"]
        check(value, "p99_difference", f"one value in a hundred differs by {value:.2g} standard deviations")
        value = report["drift"]["mean_shift"]
        check(value, "max_mean_shift", f"the mean of a dimension is shifted by {value:.2g} standard deviations")
        value = report["drift"]["spread"]
        check(value, "max_spread", f"the standard deviation of a dimension changes by a factor of {value:.4g}")
    one = 1 / report["images"]  # tolerate a single near-tie
    if "agreement" in report:
        value = report["agreement"]
        if value < 1 - one - _ROUNDED:
            check(value, "min_agreement", f"{value:.2%} of the decisions agree")
    if "accuracy" in report:
        before, after = report["accuracy"]["reference"], report["accuracy"]["exported"]
        if before - after > one + _ROUNDED:
            check(round(before - after, 4), "max_accuracy_drop", f"accuracy drops from {before:.4f} to {after:.4f}")
    return found


def as_stored(onnx_bytes: bytes) -> bytes:
    """Return an fp32 graph that rounds every value which the given graph stores in float16.

    ONNX Runtime has no float16 arithmetic on a CPU: it computes in fp32 and omits the rounding between operators, which
    hides overflows that would become infinity on a GPU. It does keep a cast to float16 and back.

    Raises:
        EnvironmentUnfitError: onnx is missing.
    """
    onnx = require("onnx", "export", "measure a backbone's graph")
    single, half = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    model = onnx.ModelProto.FromString(onnx_bytes)
    stored = {name for name, kind in element_types(model).items() if kind == half}
    if not stored:
        return onnx_bytes
    graphs = list(onnx_file.messages_of(model, onnx.GraphProto))
    for tensor in list(onnx_file.messages_of(model, onnx.TensorProto)):
        if tensor.data_type == half:
            wide = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))
    for graph in graphs:
        nodes: list[NodeProto] = []
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == half:
                    attribute.i = single
            nodes.append(node)
            for index, value in enumerate(node.output):
                if value in stored:
                    node.output[index] = f"{value}/exact"
                    nodes.append(onnx.helper.make_node("Cast", [f"{value}/exact"], [f"{value}/half"], to=half))
                    nodes.append(onnx.helper.make_node("Cast", [f"{value}/half"], [value], to=single))
        del graph.node[:]
        graph.node.extend(nodes)
        for value in [*graph.input, *graph.output, *graph.value_info]:
            if onnx_file.element_type(value) == half:
                value.type.tensor_type.elem_type = single
    stored_model: bytes = model.SerializeToString(deterministic=True)
    return stored_model


def _drift(wanted: np.ndarray, found: np.ndarray, deviation: np.ndarray) -> dict[str, float]:
    wanted, found = wanted.astype(np.float64), found.astype(np.float64)
    shift = (np.abs(found.mean(0) - wanted.mean(0)) / deviation).max()
    before, after = wanted.std(0), found.std(0)
    live = before > DEAD * float(wanted.std())
    ratio = after[live] / before[live]
    spread = max(ratio.max(initial=1.0), 1 / max(ratio.min(initial=1.0), 1 / _WORST))
    return {"mean_shift": _short(shift), "spread": round(float(min(spread, _WORST)), 4)}


def _short(value: float) -> float:
    """Round to two digits, and replace larger values by `_WORST`."""
    return float(f"{min(float(value), _WORST):.1e}")
