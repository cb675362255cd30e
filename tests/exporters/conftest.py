"""Fixtures for the exporters: random backbone packages, a tiny ONNX backbone, and a finished run of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ssd_edge import data, files, learners
from ssd_edge.backbones import package as packages
from ssd_edge.backbones.embedder import Embedder, TorchEmbedder, open_backbone
from ssd_edge.backbones.networks import ARCHITECTURES, EmbeddingNetwork
from ssd_edge.backbones.package import BackbonePackage
from ssd_edge.classes import ClassRegistry
from ssd_edge.config import TrainConfig, parse
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.priors import Priors
from ssd_edge.learners.retention import TrackRecord
from ssd_edge.learners.unknown import Rejector
from ssd_edge.run import metrics, storage
from ssd_edge.run.train import write_backbone

FINISHED = "2026-11-21T04:33:00Z"


def patches(count: int) -> np.ndarray:
    """Return seeded images of 4 × 4 coloured patches, uint8 ``(count, 32, 32, 3)``."""
    coarse = np.random.default_rng(count).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def random_package(arch: str, folder: Path) -> BackbonePackage:
    """Save and return a package with random weights and the feature statistics of these weights on coarse patches.

    On pixel noise the features of a random network are almost constant, and standardising would amplify rounding.
    """
    torch.manual_seed(0)
    body = ARCHITECTURES[arch]().eval()
    images = torch.from_numpy(patches(64))
    raw = EmbeddingNetwork(body, torch.zeros(256), torch.ones(256))
    with torch.inference_mode():
        features = raw(images).numpy()
    weights = {name: tensor.numpy() for name, tensor in body.state_dict().items()}
    card: dict[str, Any] = {
        "arch": arch,
        "size": 32,
        "dim": 256,
        "data": "noise.tar: 64 images of 2 classes",
        "terms": "",
        "command": "ssd-edge pretrain out data.path=noise.tar",
        "accuracy": {"top1": 0.5, "on": "2 held-out images"},
    }
    sigma = np.maximum(features.std(0), 1e-3 * features.std(0).max())
    packages.save(BackbonePackage(weights, features.mean(0), sigma, Priors(), card), folder)
    return packages.load(folder)


def tiny_onnx() -> bytes:
    """Return an ONNX model with a convolution, ReLU and pooling: 8 × 8 pixels to 6 features."""
    weight = np.random.default_rng(5).standard_normal((6, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["conv"]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 6])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def write_run(folder: Path, config: TrainConfig, embedder: Embedder) -> Path:
    """Write the folder of a finished run that learned two tasks: the first class, then the others."""
    dataset = data.load(config.data, config.run.seed)
    names = dataset.classes[::-1]  # so that rows differ from labels
    rows = torch.from_numpy(len(names) - 1 - dataset.train_labels)
    embeddings = embedder.embed(dataset.train.load(range(len(dataset.train)), embedder.pixels))
    folder.mkdir(parents=True)
    if not embedder.standardised:
        mu, sigma = embeddings.mean(0), embeddings.std(0)
        embeddings = (embeddings - mu) / sigma
        files.write_tensors(folder / "standardisation.safetensors", {"mu": mu, "sigma": sigma})
    vectors = torch.from_numpy(embeddings)
    learner = learners.build(config.learner, embedder.dim, embedder.priors, config.run.seed)
    for mask in (rows == 0, rows > 0):
        learner.learn(learners.Task(vectors[mask], rows[mask]))
    storage.write_config(folder, config)
    files.write_tensors(folder / "learner.safetensors", *learners.pack(learner))
    statistics = ClassStatistics(embedder.dim)
    statistics.add(vectors, rows)
    if learner.class_statistics() is None:
        state = {name: tensor.numpy() for name, tensor in statistics.state().items()}
        files.write_tensors(folder / "statistics.safetensors", state)
    rejector = Rejector.calibrate(statistics, vectors, rows, vectors[:0], rows[:0])
    files.write_tensors(folder / "unknown.safetensors", rejector.state())
    counts = torch.bincount(rows)
    files.write_tensors(
        folder / "record.safetensors", TrackRecord.of(learner, statistics, counts, counts, counts).state()
    )
    registry = ClassRegistry()
    for row, name in enumerate(names):
        registry = registry.add(name, images=int((rows == row).sum()))
    files.write_json(folder / "classes.json", registry.to_json())
    write_backbone(folder, config.backbone.name, embedder)
    results = {
        **metrics.summary([[0.9, None], [0.8, 0.7]]).to_dict(),
        "data": dataset.name,
        "split": dataset.split,
        "train_images": len(dataset.train),
        "test_images": len(dataset.test),
        "class_accuracy": dict.fromkeys(names, 0.75),
        "tasks": [{}, {}],
        "panel": {"ncm": 0.71, "joint": 0.93},
        "baselines": {"finetune": {"average_accuracy": 0.35}},
    }
    files.write_json(folder / "metrics.json", results)
    record = {
        "argv": ["ssd-edge", "train", "data.path=digits"],
        "seed": config.run.seed,
        "status": "finished",
        "finished": FINISHED,
        "identity": {"data": dataset.fingerprint},
        **storage.environment(),
    }
    files.write_json(folder / "run.json", record)
    return folder


@pytest.fixture(scope="session")
def package_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resnet9")
    random_package("resnet9", folder)
    return folder


@pytest.fixture(scope="session")
def package(package_folder: Path) -> BackbonePackage:
    return packages.load(package_folder)


@pytest.fixture(scope="session")
def convmixer(tmp_path_factory: pytest.TempPathFactory) -> BackbonePackage:
    return random_package("convmixer", tmp_path_factory.mktemp("convmixer"))


@pytest.fixture(scope="session")
def package_run(package_folder: Path, package: BackbonePackage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of `slda` on three digits, with the ResNet-9 package."""
    tree = {
        "data": {"path": "digits", "classes": ["1", "3", "4"], "max_per_class": 40},
        "backbone": {"name": f"package:{package_folder}"},
        "learner": {"name": "slda"},
    }
    embedder = TorchEmbedder(package, torch.device("cpu"))
    return write_run(tmp_path_factory.mktemp("runs") / "1", parse(TrainConfig, tree), embedder)


@pytest.fixture(scope="session")
def onnx_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of `ncm` on three digits, with an ONNX backbone of the user."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "tiny.onnx").write_bytes(tiny_onnx())
    tree = {
        "data": {"path": "digits", "classes": ["0", "1", "7"]},
        "backbone": {"name": f"onnx:{folder / 'tiny.onnx'}", "mean": [0.5] * 3, "std": [0.25] * 3},
        "learner": {"name": "ncm"},
    }
    config = parse(TrainConfig, tree)
    return write_run(folder / "1", config, open_backbone(config.backbone, torch.device("cpu")))
