"""A bundle without classes whose handmade backbone tells coloured objects, and views of them, apart."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from ssd_edge import bundle, files, learners
from ssd_edge.classes import ClassRegistry
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.priors import Priors

SIZE, PATCH, DIM = 32, 8, 24


def _weight() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((3 * (SIZE // PATCH) ** 2, DIM)).astype(np.float32) / 400


def backbone() -> bytes:
    """Return an ONNX graph: the mean colours of 4 × 4 patches, projected at random."""
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["pixels", "grey"], ["centred"]),
        helper.make_node("Transpose", ["centred"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["patches"], kernel_shape=[PATCH] * 2, strides=[PATCH] * 2),
        helper.make_node("Flatten", ["patches"], ["colours"]),
        helper.make_node("MatMul", ["colours", "weight"], ["embeddings"]),
    ]
    constants = [
        numpy_helper.from_array(np.float32(120), "grey"),
        numpy_helper.from_array(_weight(), "weight"),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", SIZE, SIZE, 3])
    embeddings = helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", DIM])
    graph = helper.make_graph(nodes, "patches", [images], [embeddings], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return bytes(model.SerializeToString(deterministic=True))


def embed(images: np.ndarray) -> np.ndarray:
    """Compute the embeddings of `backbone` with NumPy."""
    patches = (images.astype(np.float32) - 120).reshape(len(images), SIZE // PATCH, PATCH, SIZE // PATCH, PATCH, 3)
    colours = patches.mean((2, 4)).transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.asarray(colours @ _weight(), np.float32)


def empty_bundle(learner: str = "slda") -> bytes:
    """Return the bytes of the bundle."""
    built = learners.build({"name": learner}, DIM, Priors())
    probe = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3)).astype(np.uint8)
    arrays = {"images": probe, "embeddings": embed(probe), "rows": np.zeros(4, np.int64)}
    graph = backbone()
    entries = {
        "backbone": graph,
        "learner": files.tensor_bytes(*learners.pack(built)),
        "classes": files.json_bytes(ClassRegistry().to_json()),
        "probe": files.tensor_bytes(arrays, {"min_cosine": 0.9999, "max_difference": 1e-2}),
        "card": b"# objects\n",
    }
    if built.class_statistics() is None:
        entries["statistics"] = files.tensor_bytes({k: t.numpy() for k, t in ClassStatistics(DIM).state().items()})
    manifest = {
        "name": "objects",
        "created": "2026-11-21T04:33:00Z",
        "release": 1,
        "target": "cpu",
        "producer": {"ssd_edge": "0.1.0", "git": "unknown", "packages": {}},
        "backbone": {
            "file": "backbone.onnx",
            "sha256": files.sha256(graph),
            "size": SIZE,
            "dim": DIM,
            "precision": "fp32",
            "opset": 18,
            "id": "objects",
        },
        "learner": {"name": learner, "settings": {}},
        "classes": [],
        "metrics": {},
        "parity": {},
    }
    return bundle.pack(manifest, {bundle.ROLES[role]: (role, data) for role, data in entries.items()}, None)
