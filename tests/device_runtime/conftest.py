"""Handmade tiny bundles: 8 × 8 pixels, six features, three classes; nearest class mean by default."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from device_runtime.install.bundle import install
from ssd_edge import bundle, files, learners
from ssd_edge.classes import ClassRegistry
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.priors import Priors

SIZE, DIM, CLASSES = 8, 6, ("cup", "nut", "screw")


def tiny_backbone(normalised: bool = False) -> bytes:
    """Return an ONNX backbone that projects the mean colour of an image to an embedding.

    Args:
        normalised: Divide by the norm, without an epsilon: a black image gives NaN.
    """
    weight = np.random.default_rng(3).standard_normal((3, DIM)).astype(np.float32) / 64
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["colour"], keepdims=0),
        helper.make_node("Sub", ["colour", "grey"], ["centred"]),
        helper.make_node("MatMul", ["centred", "weight"], ["projected" if normalised else "embeddings"]),
    ]
    constants = [
        numpy_helper.from_array(np.array([1, 2]), "axes"),
        numpy_helper.from_array(np.float32(0 if normalised else 127.5), "grey"),
        numpy_helper.from_array(weight, "weight"),
    ]
    if normalised:
        nodes.append(helper.make_node("ReduceL2", ["projected", "last"], ["norm"]))
        nodes.append(helper.make_node("Div", ["projected", "norm"], ["embeddings"]))
        constants.append(numpy_helper.from_array(np.array([1]), "last"))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", SIZE, SIZE, 3])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", DIM])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def tiny_embed(images: np.ndarray, normalised: bool = False) -> np.ndarray:
    """Compute the embeddings of `tiny_backbone` with NumPy."""
    weight = np.random.default_rng(3).standard_normal((3, DIM)).astype(np.float32) / 64
    projected = (images.astype(np.float32).mean((1, 2)) - np.float32(0 if normalised else 127.5)) @ weight
    return projected / np.linalg.norm(projected, axis=1, keepdims=True) if normalised else projected


TinyBundle = Callable[..., bytes]


@pytest.fixture(scope="session")
def tiny_bundle() -> TinyBundle:
    """Return a function that makes the bytes of a bundle.

    Its defaults are ``tiny_bundle(release=1, sign=None, shift=0.0, roll=0, target="cpu", learner="ncm",
    settings=None, normalised=False)``. `shift` corrupts the embeddings of the probe, `roll` its predictions; `fitted`
    is what the manifest says of its pixels beside their size; see `tiny_backbone`.
    """
    rng = np.random.default_rng(0)
    colours = np.array([(220, 30, 30), (30, 220, 30), (30, 30, 220)])
    pixels = np.clip(colours[np.arange(60) % 3][:, None, None] + rng.normal(0, 20, (60, SIZE, SIZE, 3)), 0, 255)
    labels = torch.arange(60) % 3
    probe = pixels[:4].astype(np.uint8)

    @functools.cache
    def train(
        name: str, normalised: bool = False, settings: tuple[tuple[str, Any], ...] = ()
    ) -> tuple[learners.Learner, ClassStatistics, np.ndarray, np.ndarray]:
        """Return a trained learner, its statistics, and the embeddings and predicted rows of the probe."""
        vectors = torch.from_numpy(tiny_embed(pixels.astype(np.uint8), normalised))
        learner = learners.build({"name": name, **dict(settings)}, DIM, Priors())
        learner.learn(learners.Task(vectors, labels))
        statistics = ClassStatistics(DIM)
        statistics.add(vectors, labels)
        embeddings = tiny_embed(probe, normalised)
        return learner, statistics, embeddings, learner.predict(torch.from_numpy(embeddings)).numpy()

    def counted(learner: learners.Learner, statistics: ClassStatistics) -> dict[str, bytes]:
        if learner.class_statistics() is not None:
            return {}
        return {"statistics": files.tensor_bytes({name: t.numpy() for name, t in statistics.state().items()})}

    registry = ClassRegistry()
    for name in CLASSES:
        registry = registry.add(name, images=20)

    def make(
        release: int = 1,
        sign: Any = None,
        shift: float = 0.0,
        roll: int = 0,
        target: str = "cpu",
        learner: str = "ncm",
        settings: dict[str, Any] | None = None,
        normalised: bool = False,
        backbone: bytes = b"",
        fitted: dict[str, Any] | None = None,
        **changes: Any,
    ) -> bytes:
        backbone = backbone or tiny_backbone(normalised)
        learned, statistics, probe_embeddings, rows = train(learner, normalised, tuple((settings or {}).items()))
        arrays = {"images": probe, "embeddings": probe_embeddings + np.float32(shift), "rows": np.roll(rows, roll)}
        entries = {
            "backbone": backbone,
            "learner": files.tensor_bytes(*learners.pack(learned)),
            **counted(learned, statistics),
            "classes": files.json_bytes(registry.to_json()),
            "probe": files.tensor_bytes(arrays, {"min_cosine": 0.9999, "max_difference": 1e-3}),
            "card": b"# tiny\n",
        }
        described = {"size": SIZE, "dim": DIM, "precision": "fp32", "opset": 18, "id": "tiny", **(fitted or {})}
        manifest = {
            "name": "tiny",
            "created": "2026-11-21T04:33:00Z",
            "release": release,
            "target": target,
            "producer": {"ssd_edge": "0.1.0", "git": "unknown", "packages": {}},
            "backbone": {"file": "backbone.onnx", "sha256": files.sha256(backbone), **described},
            "learner": {"name": learner, "settings": settings or {}},
            "classes": registry.names,
            "metrics": {},
            "parity": {},
            **changes,
        }
        return bundle.pack(manifest, {bundle.ROLES[role]: (role, data) for role, data in entries.items()}, sign)

    train("ncm")  # train it now, because a test may replace PyTorch
    return make


@pytest.fixture
def empty(tiny_bundle: TinyBundle, tmp_path: Path) -> Path:
    """Return a root with a bundle that was deployed without classes."""
    full = bundle.parse(tiny_bundle())
    dim = full.manifest["backbone"]["dim"]
    learner, statistics = learners.build({"name": "ncm"}, dim, Priors()), ClassStatistics(dim)
    entries = {bundle.ROLES[role]: (role, full.read(role)) for role in ("backbone", "probe", "card")}
    entries |= {
        "learner.safetensors": ("learner", files.tensor_bytes(*learners.pack(learner))),
        "statistics.safetensors": (
            "statistics", files.tensor_bytes({name: t.numpy() for name, t in statistics.state().items()}),
        ),
        "classes.json": ("classes", files.json_bytes(ClassRegistry().to_json())),
    }  # fmt: skip
    (tmp_path / "empty.ssdedge").write_bytes(bundle.pack({**full.manifest, "classes": []}, entries))
    install(tmp_path / "empty", tmp_path / "empty.ssdedge")
    return tmp_path / "empty"
