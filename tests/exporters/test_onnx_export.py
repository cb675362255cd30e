"""The exported graph: what it promises, what it must not hold, and that it is the network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import exporters.onnx_export as onnx_export
from exporters.parity import parity
from ssd_edge.backbones.embedder import TorchEmbedder
from ssd_edge.errors import EnvironmentUnfitError

IMAGES = np.random.default_rng(3).integers(0, 256, (33, 4, 4, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture(scope="module")
def exported(package) -> bytes:
    return onnx_export.export_package(package)


@pytest.fixture(scope="module")
def model(exported) -> onnx.ModelProto:
    return onnx.load_from_string(exported)


def test_it_computes_what_the_network_computes(package, exported):
    measured = parity(exported, TorchEmbedder(package, torch.device("cpu")).embed, IMAGES)
    assert measured["max_difference"] < 3e-5
    assert measured["min_cosine"] == 1.0


def test_so_does_a_convmixer(convmixer):
    exported = onnx_export.export_package(convmixer)
    measured = parity(exported, TorchEmbedder(convmixer, torch.device("cpu")).embed, IMAGES[:9])
    assert measured["max_difference"] < 1e-4


def test_pixels_go_in_and_embeddings_come_out(model):
    (image,), (output,) = model.graph.input, model.graph.output
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (image, output)]
    assert shapes == [["batch", 32, 32, 3], ["batch", 256]]
    assert (image.name, output.name) == ("images", "embeddings")
    kinds = [value.type.tensor_type.elem_type for value in (image, output)]
    assert kinds == [onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT]


def test_it_is_of_opset_18_and_readable_by_old_runtimes(model):
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert model.ir_version == 8


def test_it_says_what_it_is(model, package):
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["identity"] == package.identity
    assert (properties["size"], properties["dim"], properties["colour_order"]) == ("32", "256", "RGB")


def test_all_weights_are_inside(model):
    assert model.graph.initializer
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in model.graph.initializer)


def test_it_does_not_tell_of_the_machine_that_made_it(exported):
    places = [Path(onnx_export.__file__).parents[1], Path(torch.__file__).parents[1], Path.cwd()]
    for place in places:
        assert str(place).encode() not in exported
    assert b"site-packages" not in exported
    assert b".py" not in exported


def test_a_package_gives_the_same_bytes_again_and_nothing_is_printed(package, exported, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert onnx_export.export_package(package) == exported
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_an_exporter_that_falls_back_to_another_opset_is_refused(package, monkeypatch):
    monkeypatch.setattr(onnx_export, "OPSET", 17)  # torch 2.13 exports 18 instead, without an error
    with pytest.raises(EnvironmentUnfitError, match=r"opsets \{'': 18\}, but 17 was asked for"):
        onnx_export.export_package(package)
