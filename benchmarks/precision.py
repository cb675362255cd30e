"""Deploy a run in every precision and compare embeddings, decisions, sizes and latency.

Usage: python benchmarks/precision.py RUN [--json FILE]

Accuracy is that of the run's learner on all of its test images; cosine, difference and drift compare the embeddings of
the same images with those of the run. A precision that `deploy` refuses, which tests fewer
images, is measured all the same. Milliseconds are the
least of many calls of ONNX Runtime with one image, on one core, the precisions in turn until no minimum falls any more:
other processes may use the machine. They do not apply to a GPU. TensorRT-RTX builds the engine, which needs a GPU only
to run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from shared import RunOnData, least_milliseconds, one_core

from device_runtime.backbone.tensorrt.engines import check_graph
from exporters import ladder, parity
from exporters import precision as precisions
from exporters.deploy import Options, deploy
from ssd_edge import bundle
from ssd_edge.backbones.onnx import open_session
from ssd_edge.errors import GateRefusedError
from ssd_edge.run import storage
from ssd_edge.run.finished import FinishedRun


def main() -> None:
    """Print the table, and write it as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    one_core()
    trained = RunOnData(args.run)
    dataset = trained.dataset
    images = dataset.test.load(np.arange(len(dataset.test)), trained.run.pixels)
    wanted, labels = trained.embed_all(dataset)["test"], trained.rows[dataset.test_labels]
    rows, graphs = [], {}
    for precision in precisions.names():
        row, graphs[precision] = _deploy(trained.run, precision, graphs)
        measured = parity.measure(graphs[precision], lambda _: wanted, images, trained.run.learner, labels)
        rows.append({**row, **measured})
        print(rows[-1], flush=True)
    times = dict(zip(graphs, least_milliseconds([_once(graph, images) for graph in graphs.values()]), strict=True))
    rows = [{**row, "milliseconds": times[row["precision"]]} for row in rows]
    print(times)
    if args.json:
        command = f"python benchmarks/precision.py RUN (RUN: ssd-edge train data.path={Path(dataset.name).name})"
        facts = {
            "data": dataset.name,
            "backbone": trained.run.config.backbone.name,
            "features": trained.run.learner.dim,
        }
        result = {"command": command, **storage.environment(), "cores": 1, **facts, "rows": rows}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def _deploy(run: FinishedRun, precision: str, graphs: dict[str, bytes]) -> tuple[dict[str, Any], bytes]:
    """Return sizes and the graph in a precision, which is made from that in fp32 if `deploy` refuses it."""
    row: dict[str, Any] = {"precision": precision}
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "robot.ssdedge"
        try:
            result = deploy(run.folder, Options("jetson", precision=precision), output, lambda text: None)
        except GateRefusedError as error:
            calibration = ladder.samples(run, None, print).calibration
            assert isinstance(calibration, np.ndarray)
            graph = precisions.convert(graphs[precisions.FP32.name], precision, calibration)
            row |= {"refused": str(error), "engine_bytes": check_graph(graph).bytes}
        else:
            graph = bundle.read(output).read("backbone")
            row |= {"seconds": result.seconds, "bundle_bytes": result.bytes}
            row["engine_bytes"] = result.tensorrt["bytes"] if result.tensorrt else None
    return {**row, "backbone_bytes": len(graph)}, graph


def _once(graph: bytes, images: np.ndarray) -> Callable[[int], object]:
    """Return a function that runs a graph on one image."""
    session = open_session(graph)
    name = session.get_inputs()[0].name
    return lambda number: session.run(None, {name: images[number % len(images)][None]})


if __name__ == "__main__":
    main()
