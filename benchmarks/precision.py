"""Deploy a run in every precision and compare embeddings, decisions, sizes and latency.

Usage: SSD_EDGE_DATA=FOLDER python benchmarks/precision.py RUN [--json FILE]

Accuracy is that of the run's learner on all of its test images; cosine, difference and drift compare the embeddings of
the same images with those of the run. Milliseconds are medians per image with ONNX Runtime on this machine's CPU, with
alternating precisions; they do not apply to a GPU. TensorRT-RTX builds the engine, which needs a GPU only to run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from exporters import parity
from exporters import precision as precisions
from exporters.deploy import Options, deploy
from ssd_edge import bundle, data
from ssd_edge.backbones.embedder import open_backbone
from ssd_edge.backbones.onnx import open_session
from ssd_edge.run import finished, storage
from ssd_edge.run.train import set_threads

REPEATS = 200


def main() -> None:
    """Print the table, and write it as JSON on request."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    set_threads(0)
    run = finished.read(args.run)
    dataset = data.load(run.config.data, run.config.run.seed)
    images = dataset.test.load(np.arange(len(dataset.test)), run.pixels)
    labels = np.array([run.registry.row(name) for name in dataset.classes])[dataset.test_labels]
    wanted = open_backbone(run.config.backbone, torch.device("cpu"), args.run).embed(images)
    rows, graphs = [], {}
    for precision in precisions.names():
        row, graphs[precision] = _deploy(args.run, precision)
        measured = parity.measure(graphs[precision], lambda _: wanted, images, run.learner, labels)
        rows.append({**row, **measured})
    times = _times(list(graphs.values()), images)
    for row, milliseconds in zip(rows, times, strict=True):
        row["milliseconds"] = milliseconds
        shown = {key: row[key] for key in ("precision", "backbone_bytes", "min_cosine", "max_difference", "agreement")}
        print(shown, row["accuracy"], f"{milliseconds:.2f} ms")
    if args.json:
        result = {"command": "python benchmarks/precision.py RUN", **storage.environment(), "rows": rows}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def _deploy(run: Path, precision: str) -> tuple[dict[str, Any], bytes]:
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "robot.ssdedge"
        result = deploy(run, Options("jetson", precision=precision), output, lambda text: None)
        graph = bundle.read(output).read("backbone")
    engine = result.tensorrt["bytes"] if result.tensorrt else None
    row = {"precision": precision, "seconds": result.seconds, "bundle_bytes": result.bytes}
    return {**row, "backbone_bytes": len(graph), "engine_bytes": engine}, graph


def _times(graphs: list[bytes], images: np.ndarray) -> list[float]:
    """Return the median milliseconds per image, with alternating graphs so that other load affects all of them."""
    sessions = [open_session(graph) for graph in graphs]
    taken: list[list[float]] = [[] for _ in sessions]
    for turn in range(REPEATS):
        image = images[turn % len(images)][None]
        for session, times in zip(sessions, taken, strict=True):
            began = time.perf_counter()
            session.run(None, {session.get_inputs()[0].name: image})
            times.append(time.perf_counter() - began)
    return [round(1e3 * float(np.median(times[REPEATS // 10 :])), 3) for times in taken]


if __name__ == "__main__":
    main()
