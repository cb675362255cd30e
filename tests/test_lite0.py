"""The default backbone, EfficientNet-Lite0 with its published weights, from training to a device."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from device_runtime.device import Device
from device_runtime.install.bundle import install
from ssd_edge import bundle, files
from ssd_edge.backbones import names, torch_onnx
from ssd_edge.backbones.embedder import open_backbone
from ssd_edge.backbones.graph import NetworkGraph
from ssd_edge.backbones.onnx import open_session
from ssd_edge.backbones.wheels import WHEELS
from ssd_edge.cli import cli as command
from ssd_edge.config import BackboneConfig
from ssd_edge.errors import EnvironmentUnfitError


@pytest.fixture(scope="module")
def graph() -> NetworkGraph:
    """The exported network; the export, the slowest part, is cached for the tests below."""
    try:
        return names.resolve(BackboneConfig(), lambda text: None)
    except EnvironmentUnfitError as error:
        pytest.skip(f"NOT RUN: {error}")


def test_the_export_equals_pytorch(graph: NetworkGraph) -> None:
    network = WHEELS["lite0"].build(WHEELS["lite0"].locate())
    pixels = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (4, 3, 224, 224)).astype(np.float32))
    with torch.inference_mode():
        expected = network(pixels).numpy()
    found = open_session(graph.model).run(None, {torch_onnx.INPUT: pixels.numpy()})[0]
    assert found.shape == (4, 1280)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_graph_is_plain(graph: NetworkGraph) -> None:
    """Padding and batch normalisation are folded into the convolutions, as every engine wants it."""
    import onnx

    model = onnx.load_from_string(graph.model)
    assert {node.op_type for node in model.graph.node} == {"Conv", "Clip", "Add", "ReduceMean"}
    assert len(graph.model) < 14_000_000


def test_from_training_to_a_device(graph: NetworkGraph, shapes: Path, tmp_path: Path) -> None:
    quick = ("learner.name=ncm", "data.classes=circle,stripes", "data.max_per_class=8", "stream.tasks=1")
    settings = ("run.panel=false", "run.baselines=false", "run.threads=1", f"run.out={tmp_path / 'runs'}")
    trained = CliRunner().invoke(command, ["train", f"data.path={shapes}", *quick, *settings], catch_exceptions=False)
    assert trained.exit_code == 0
    assert trained.output.count("licence: Apache-2.0") == 1
    assert "shorter side to 256, centre crop, bicubic" in trained.output
    run = tmp_path / "runs" / "1"
    assert json.loads((run / "run.json").read_text())["backbone"]["provenance"]["terms"] == "Apache-2.0"
    assert "Apache-2.0" in (run / "report.html").read_text()
    assert files.sha256((run / "backbone.onnx").read_bytes()) == files.sha256(graph.model)
    with pytest.MonkeyPatch.context() as patch:  # the run has all that it needs
        patch.setattr(names, "resolve", None)
        own = open_backbone(BackboneConfig(), torch.device("cpu"), run)
        for words in (
            ["evaluate", str(run)],
            ["deploy", "--target", "cpu", str(run), "-o", str(tmp_path / "b.ssdedge")],
        ):
            assert CliRunner().invoke(command, words, catch_exceptions=False).exit_code == 0
    assert own.identity == graph.identity
    read = bundle.read(tmp_path / "b.ssdedge")
    assert b"licence and terms: Apache-2.0" in read.read("card")
    assert read.manifest["backbone"]["provenance"]["terms"] == "Apache-2.0"
    assert (tmp_path / "b.ssdedge").stat().st_size < 40_000_000
    install(tmp_path / "root", tmp_path / "b.ssdedge")
    pictures = sorted((shapes / "test" / "stripes").iterdir())[:5]
    with Device.open(tmp_path / "root") as device:
        assert [answer.label for answer in device.predict(pictures)].count("stripes") >= 4
