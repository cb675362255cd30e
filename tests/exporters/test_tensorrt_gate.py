"""Tests that TensorRT can parse and build every exported graph, without a GPU, and that the graphs are correct.

TensorRT-RTX is used in place of the TensorRT of a board: the same parser, strongly typed, but other kernels.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from exporters import parity, precision
from exporters.export import export_package
from ssd_edge import ort
from ssd_edge.backbones import package as packages
from ssd_edge.backbones.onnx import compose, open_session, run
from ssd_edge.errors import GateRefusedError
from ssd_edge.images import Pixels

PRECISIONS = ("fp32", "fp16", "int8")
MODULE = "tensorrt_rtx"
needs_parser = pytest.mark.skipif(
    importlib.util.find_spec(MODULE) is None,
    reason=f"{MODULE} is not installed (x86-64 Linux only): the gate for exported graphs did NOT run",
)


def check(graph: bytes) -> dict:
    from device_runtime.backbone.tensorrt.engines import check_graph

    return check_graph(graph, module=MODULE).to_dict()


def pictures(count: int, size: int, seed: int) -> np.ndarray:
    """Return seeded images of 4 × 4 coloured patches."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(size // 4, axis=1).repeat(size // 4, axis=2)


class Squeezed(nn.Module):
    """Block of depthwise convolution, LayerNorm over channels, and inverted bottleneck with squeeze-and-excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)
        self.squeeze, self.excite = nn.Conv2d(2 * width, width // 4, 1), nn.Conv2d(width // 4, 2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.depthwise(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        hidden = nn.functional.hardswish(self.up(hidden))
        gate = self.excite(nn.functional.relu(self.squeeze(hidden.mean((2, 3), keepdim=True))))
        return x + self.down(hidden * torch.sigmoid(gate))


class SqueezedNet(nn.Module):
    """Network of two `Squeezed` blocks and a linear output."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 4, stride=4), Squeezed(width), Squeezed(width))
        self.head = nn.Linear(width, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Transformer(nn.Module):
    """Vision transformer with one pre-norm block of attention and an MLP with GELU."""

    def __init__(self, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.places = nn.Parameter(torch.randn(1, 64, width) / 10)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.queries, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        parts = self.queries(self.norms[0](x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*parts.unbind(0))
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return self.norms[2](x + self.perceptron(self.norms[1](x))).mean(1)


class Mobile(nn.Module):
    """Strided convolutions with ReLU6 and adaptive pooling; the output has shape (N, 64, 1, 1)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = (3, 16, 32, 48, 64)
        for index in range(4):
            stride = 4 if index == 0 else 2
            layers += [nn.Conv2d(channels[index], channels[index + 1], 3, stride, 1), nn.ReLU6()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def composed(network: nn.Module, size: int, batch: int | None = None) -> bytes:
    """Export a network and compose the backbone as for a user; with `batch`, the batch size is fixed."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network.eval(),
                (torch.zeros(batch or 2, 3, size, size),),
                opset_version=18,
                dynamo=True,
                dynamic_shapes=None if batch else ({0: torch.export.Dim("n")},),
                external_data=False,
                verbose=False,
            )
    finally:
        logging.disable(logging.NOTSET)
    data = program.model_proto.SerializeToString()
    preprocessing = (Pixels(size), (0.5,) * 3, (0.25,) * 3, "nchw")
    features = run(open_session(compose(data, *preprocessing)), pictures(24, size, 0))
    return compose(data, *preprocessing, features.mean(0), np.maximum(features.std(0), 0.1 * features.std()))


@pytest.fixture(scope="module")
def graphs(request: pytest.FixtureRequest) -> dict[str, bytes]:
    """Return one network in all precisions, fp32 first."""
    name = request.param
    sizes = {"mobile": 224, "mobile of one image": 224}
    if name == "shipped":
        original = export_package(packages.load(None))
    elif name == "convmixer":
        original = export_package(request.getfixturevalue("convmixer"))
    else:
        batch = 1 if name == "mobile of one image" else None
        torch.manual_seed(0)
        network = {"squeezed": SqueezedNet, "transformer": Transformer}.get(name, Mobile)()
        original = composed(network, sizes.get(name, 32), batch)
    calibration = pictures(24, sizes.get(name, 32), 0)
    return {name: precision.convert(original, name, calibration) for name in PRECISIONS}


networks = pytest.mark.parametrize(
    "graphs",
    [
        "squeezed",
        "transformer",
        pytest.param("mobile", marks=pytest.mark.slow),
        pytest.param("mobile of one image", marks=pytest.mark.slow),
        pytest.param("shipped", marks=pytest.mark.slow),
        pytest.param("convmixer", marks=pytest.mark.slow),
    ],
    indirect=True,
)


@networks
@needs_parser
def test_tensorrt_builds_every_precision(graphs):
    for graph in graphs.values():
        model = onnx.load_from_string(graph)
        assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
        check(graph)


@networks
def test_every_precision_passes_parity(graphs):
    original = open_session(graphs["fp32"])
    size = original.get_inputs()[0].shape[1]
    for name, graph in graphs.items():
        report = parity.measure(graph, lambda pixels: run(original, pixels), pictures(32, size, 1))
        assert parity.failures(report, name) == [], name


def broken(kind: str) -> bytes:
    """Return a graph that is valid ONNX but not supported by TensorRT."""
    vector = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    image = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 64, 64, 3])
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["x"], ["flat"]),
    ]
    constants = {}
    if kind == "TopK":
        constants["k"] = np.array([3841])
        nodes.append(helper.make_node("TopK", ["flat", "k"], ["y", "places"]))
    elif kind == "int32 bias":
        rng = np.random.default_rng(0)
        constants = {
            "weight": rng.integers(-127, 128, (8, 12288), dtype=np.int8),
            "bias": rng.integers(-127, 128, 8, dtype=np.int32),
            "scale": np.array(0.01, np.float32),
        }
        nodes += [
            helper.make_node("DequantizeLinear", ["weight", "scale"], ["w"]),
            helper.make_node("DequantizeLinear", ["bias", "scale"], ["b"]),
            helper.make_node("Gemm", ["flat", "w", "b"], ["y"], transB=1),
        ]
    else:
        nodes.append(helper.make_node("NoSuchOperator", ["flat"], ["y"], domain="example.unknown"))
    graph = helper.make_graph(
        nodes, kind, [image], [vector], [numpy_helper.from_array(array, name) for name, array in constants.items()]
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("example.unknown", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


@pytest.mark.parametrize(
    ("kind", "message"), [("TopK", "3840"), ("int32 bias", "type Int32"), ("unknown operator", "NoSuchOperator")]
)
@needs_parser
def test_error_of_tensorrt_is_reported(kind, message):
    with pytest.raises(GateRefusedError, match=message) as raised:
        check(broken(kind))
    assert raised.value.exit_code == 4


@pytest.mark.slow
@needs_parser
def test_default_quantisation_of_onnx_runtime_is_refused(tmp_path):
    """Show why `precision.to_int8` changes the defaults: they give int32 biases."""
    quantization = ort.load(module="onnxruntime.quantization")
    torch.manual_seed(0)
    original = composed(nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(512, 16)), 32)
    images = iter([{"images": pictures(16, 32, 0)}])

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(images, None)

    path = tmp_path / "default.onnx"
    quantization.quantize_static(onnx.load_from_string(original), path, Reader(), per_channel=True)
    with pytest.raises(GateRefusedError):
        check(path.read_bytes())
    check(precision.to_int8(original, pictures(16, 32, 0)))
