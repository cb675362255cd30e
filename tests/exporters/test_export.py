"""Tests of the exported graph: its interface, its metadata, and agreement with the PyTorch network."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from exporters import export as onnx_export
from exporters import precision
from exporters.parity import failures, measure
from ssd_edge.backbones import package as packages
from ssd_edge.backbones import torch_onnx
from ssd_edge.backbones.embedder import TorchEmbedder, network
from ssd_edge.backbones.package import BackbonePackage
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError

IMAGES = np.random.default_rng(3).integers(0, 256, (33, 4, 4, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture(scope="module")
def exported(package, export_once) -> bytes:
    return export_once(package)


@pytest.fixture(scope="module")
def shipped(export_once) -> tuple[BackbonePackage, bytes]:
    """Return the shipped package and its export, because features of random weights vary too little for int8."""
    package = packages.load(None)
    return package, export_once(package)


@pytest.fixture(scope="module")
def model(exported) -> onnx.ModelProto:
    return onnx.load_from_string(exported)


def test_graph_agrees_with_the_network(package, exported):
    """Compare with float64, because the difference of two float32 results depends on the CPU."""
    network = TorchEmbedder(package, torch.device("cpu")).network.double()

    @torch.inference_mode()
    def exact(images: np.ndarray) -> np.ndarray:
        pixels = (torch.from_numpy(images).double() / 255 - network.pixel_mean) / network.pixel_std
        return ((network.body(pixels.permute(0, 3, 1, 2)) - network.mu) / network.sigma).numpy()

    measured = measure(exported, exact, IMAGES)
    assert failures(measured, "fp32") == []
    assert measured["max_difference"] < 3e-5
    assert measured["min_cosine"] == 1.0


def test_convmixer_agrees_with_the_network(convmixer):
    exported = onnx_export.export_package(convmixer)
    measured = measure(exported, TorchEmbedder(convmixer, torch.device("cpu")).embed, IMAGES[:9])
    assert measured["max_difference"] < 1e-4


def test_graph_input_and_output(model):
    (image,), (output,) = model.graph.input, model.graph.output
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (image, output)]
    assert shapes == [["batch", 32, 32, 3], ["batch", 256]]
    assert (image.name, output.name) == ("images", "embeddings")
    kinds = [value.type.tensor_type.elem_type for value in (image, output)]
    assert kinds == [onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT]


def test_opset_and_ir_version(model):
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert model.ir_version == 8


def test_metadata(model, package):
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["identity"] == package.identity
    assert (properties["size"], properties["dim"], properties["colour_order"]) == ("32", "256", "RGB")
    assert (properties["layout"], properties["output"], properties["precision"]) == ("NHWC", "embeddings", "fp32")


def test_node_names_identify_the_parts(model):
    parts = [node.name.split("/")[0] for node in model.graph.node]
    assert parts == sorted(parts, key=("before", "backbone", "after").index)
    assert (parts.count("before"), parts.count("after")) == (5, 2)
    assert "backbone" in parts


def test_weights_are_stored_in_the_model(model):
    assert model.graph.initializer
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in model.graph.initializer)


def test_graph_contains_no_local_paths(exported):
    folders = [Path(onnx_export.__file__).parents[1], Path(torch.__file__).parents[1], Path.cwd()]
    for folder in folders:
        assert str(folder).encode() not in exported
    assert b"site-packages" not in exported
    assert b".py" not in exported


def test_export_is_reproducible_and_silent(package, exported, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert onnx_export.export_package(package) == exported
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_fallback_to_another_opset_is_refused(package, monkeypatch):
    monkeypatch.setattr(torch_onnx, "OPSET", 17)  # torch 2.13 exports 18 instead, without an error
    with pytest.raises(EnvironmentUnfitError, match=r"opsets \{'': 18\}, but opset 17 was requested"):
        onnx_export.export_package(package)


@pytest.mark.slow
def test_weights_that_overflow_are_refused(package):
    name = next(name for name in package.weights if name.endswith("bias"))
    broken = {**package.weights, name: np.full_like(package.weights[name], 3e38)}
    with pytest.raises(BundleRefusedError, match="cannot be exported: it gives NaN or infinity"):
        onnx_export.export_package(dataclasses.replace(package, weights=broken))


def changed(exported: bytes, mistake: str) -> bytes:
    """Return the graph with one error introduced."""
    model = onnx.load_from_string(exported)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    if mistake == "swapped channels":
        model.graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0]), "order"))
        model.graph.node[0].input[0] = "swapped"
        model.graph.node.insert(
            0, helper.make_node("Gather", ["images", "order"], ["swapped"], axis=3, name="before/swap")
        )
    elif mistake == "wrong mean":
        tensor = constants["before/2/Sub/constant"]
        tensor.CopyFrom(numpy_helper.from_array(np.full(3, 0.4, np.float32), tensor.name))
    else:
        tensor = next(t for t in model.graph.initializer if len(t.dims) == 4 and t.dims[1] > 3)
        values = numpy_helper.to_array(tensor)
        step = np.abs(values).max((1, 2, 3), keepdims=True) / 3  # three bits
        tensor.CopyFrom(numpy_helper.from_array((np.round(values / step) * step).astype(np.float32), tensor.name))
    return model.SerializeToString()


@pytest.mark.parametrize("narrow", ["fp32", "fp16", "int8"])
def test_errors_are_detected_in_every_precision(shipped, narrow):
    package, exported = shipped
    images, calibration = IMAGES[:16], patches(32)
    expected = TorchEmbedder(package, torch.device("cpu")).embed(images)

    def failing(graph: bytes, reference: np.ndarray = expected) -> list[str]:
        return failures(measure(graph, lambda _: reference, images), narrow)

    correct = precision.convert(exported, narrow, calibration)
    assert failing(correct) == []
    for mistake in ("swapped channels", "wrong mean", "a weight rounded wrongly"):
        assert failing(precision.convert(changed(exported, mistake), narrow, calibration)), mistake
    training = network(package)
    training.body.train()
    with torch.no_grad():
        assert failing(correct, training(torch.from_numpy(images)).numpy())
    if narrow == "int8":
        assert failing(precision.convert(exported, narrow, np.zeros_like(calibration)))


def patches(count: int) -> np.ndarray:
    """Return seeded images of 4 × 4 coloured patches."""
    coarse = np.random.default_rng(4).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)
