"""Tests of the conversion to fp16 and int8 on small handmade networks."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from exporters import parity, precision
from ssd_edge import targets
from ssd_edge.backbones import onnx_file
from ssd_edge.backbones.levels import Choice
from ssd_edge.backbones.onnx import compose, open_session, run
from ssd_edge.errors import InputError
from ssd_edge.images import Pixels

Node = tuple[str, list[str], dict]


def images(count: int, size: int = 16, seed: int = 0) -> np.ndarray:
    """Return seeded images of 2 × 2 coloured patches; finer patterns look alike after pooling."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    return coarse.repeat(size // 2, axis=1).repeat(size // 2, axis=2)


def chain(
    nodes: Sequence[Node],
    constants: dict[str, np.ndarray],
    size: int = 16,
    batch: int | str = "n",
    dim: int = 8,
    levels: Choice = "last",
) -> bytes:
    """Return a composed backbone from a chain of nodes; the input `_` is the output of the previous node."""
    chained, last = [], "x"
    for index, (operator, inputs, attributes) in enumerate(nodes):
        out = f"{operator}{index}"
        chained.append(helper.make_node(operator, [last if i == "_" else i for i in inputs], [out], **attributes))
        last = out
    graph = helper.make_graph(
        chained,
        "own",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, size, size])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, [batch, dim])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString()
    plain = (Pixels(size), (0.5,) * 3, (0.25,) * 3, "nchw")
    features = run(open_session(compose(data, *plain, levels=levels)), images(32, size, seed=1))
    return compose(data, *plain, features.mean(0), features.std(0) + np.float32(1e-3), levels=levels)


def weight(*shape: int, scale: float = 1.0) -> np.ndarray:
    """Return random weights, seeded by the shape and scaled by the fan-in."""
    values = np.random.default_rng(shape).standard_normal(shape)
    return (values * scale * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)


def convolutions(size: int = 16, batch: int | str = "n", levels: Choice = "last") -> bytes:
    """Return a network of three convolutions, one with ReLU and one with Clip, and pooling."""
    stride = {"strides": [2, 2], "pads": [1, 1, 1, 1]}
    nodes: list[Node] = [
        ("Conv", ["_", "w1", "b1"], stride),
        ("Relu", ["_"], {}),
        ("MaxPool", ["_"], {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("Conv", ["_", "w2"], stride),
        ("Clip", ["_", "low", "high"], {}),
        ("Conv", ["_", "w3"], {}),
        ("GlobalAveragePool", ["_"], {}),
        ("Flatten", ["_"], {}),
    ]
    bounds = {"low": np.array(0, np.float32), "high": np.array(6, np.float32)}
    weights = {"w1": weight(48, 3, 3, 3), "b1": weight(48, 1)[:, 0], "w2": weight(48, 48, 3, 3)}
    return chain(nodes, {**weights, "w3": weight(64, 48, 1, 1), **bounds}, size, batch, 64, levels)


@pytest.fixture(scope="module")
def plain() -> bytes:
    return convolutions()


@pytest.fixture(scope="module")
def quantised(plain) -> bytes:
    return precision.to_int8(plain, images(32))


def measured(graph: bytes, original: bytes, size: int = 16) -> dict:
    test_images = images(40, size, seed=2)
    return parity.measure(graph, lambda pixels: run(open_session(original), pixels), test_images)


def metadata(data: bytes) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load_from_string(data).metadata_props}


def interface(data: bytes) -> list:
    graph = onnx.load_from_string(data).graph
    return [
        (value.name, value.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in onnx_dims(value)])
        for value in (*graph.input, *graph.output)
    ]


def onnx_dims(value: onnx.ValueInfoProto) -> list:
    return list(value.type.tensor_type.shape.dim)


def operators(data: bytes, kind: int) -> dict[str, set[str]]:
    """Group operators by whether their outputs have an element type: ``{"in": …, "not in": …}``."""
    inferred = onnx.shape_inference.infer_shapes(onnx.load_from_string(data))
    types = {v.name: v.type.tensor_type.elem_type for v in [*inferred.graph.value_info, *inferred.graph.output]}
    groups: dict[str, set[str]] = {"in": set(), "not in": set()}
    for node in inferred.graph.node:
        if node.op_type != "Cast":
            groups["in" if types[node.output[0]] == kind else "not in"].add(node.op_type)
    return groups


@pytest.mark.parametrize("batch", ["n", 1])
@pytest.mark.parametrize("wanted", ["fp16", "int8"])
def test_converted_graph_keeps_interface_metadata_and_embeddings(wanted, batch):
    original = convolutions(224, batch) if batch == 1 else convolutions()
    size = 224 if batch == 1 else 16
    graph = precision.convert(original, wanted, images(16, size))
    assert interface(graph) == interface(original)
    assert metadata(graph) == {**metadata(original), "precision": wanted}
    assert onnx_file.precision(graph) == wanted
    model, before = onnx.load_from_string(graph), onnx.load_from_string(original)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert model.ir_version == before.ir_version == 8
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert len(graph) < 0.75 * len(original) or batch == 1
    assert parity.failures(measured(graph, original, size), wanted) == []


def test_graph_in_the_requested_precision_is_unchanged(plain, quantised):
    assert precision.convert(plain, "fp32") is plain
    assert precision.convert(quantised, "int8") is quantised


def test_fp16_and_int8_graphs_cannot_be_converted(plain, quantised):
    for graph, found, wanted in [(quantised, "int8", "fp16"), (precision.to_fp16(plain), "fp16", "fp32")]:
        with pytest.raises(InputError, match=f"is {found} itself and cannot be made {wanted}"):
            precision.convert(graph, wanted)


def test_int8_without_images_and_unknown_precision_are_refused(plain):
    with pytest.raises(InputError, match="int8 needs images to calibrate with"):
        precision.convert(plain, "int8")
    with pytest.raises(InputError, match="unknown precision 'fp8'; known: fp32, fp16, int8"):
        precision.convert(plain, "fp8")


@pytest.mark.parametrize("target", targets.targets().values(), ids=targets.targets())
def test_precisions_of_targets_exist(target: targets.Target) -> None:
    assert set(target.precisions) <= set(precision.names())


def test_preprocessing_and_standardisation_stay_in_fp32(plain, quantised):
    for graph in (precision.to_fp16(plain), quantised):
        model = onnx.shape_inference.infer_shapes(onnx.load_from_string(graph))
        types = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.value_info, *model.graph.output]}
        types.update((tensor.name, tensor.data_type) for tensor in model.graph.initializer)
        added = [node for node in model.graph.node if node.name.startswith(("before/", "after/"))]
        assert sum(node.op_type in ("Sub", "Div") for node in added) == 5
        for node in added:
            if node.op_type in ("Sub", "Div"):
                assert {types[value] for value in (*node.input, *node.output)} == {TensorProto.FLOAT}


def test_levels_stay_in_fp32_and_the_network_does_not():
    plain = convolutions(levels="sizes")
    labels = {entry.key: entry.value for entry in onnx.load_from_string(plain).metadata_props}
    assert labels["levels"] == "48@8 48@4 64"
    for name in ("fp16", "int8"):
        graph = precision.convert(plain, name, images(32, seed=1))
        model = onnx.shape_inference.infer_shapes(onnx.load_from_string(graph))
        assert {entry.key: entry.value for entry in model.metadata_props} == {**labels, "precision": name}
        types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
        added = [node for node in model.graph.node if node.name.startswith("levels/") and node.op_type != "Cast"]
        assert {node.op_type for node in added} == {"GlobalAveragePool", "Flatten", "Identity", "Concat"}
        assert {types[value] for node in added for value in (*node.input, *node.output)} == {TensorProto.FLOAT}
        assert parity.failures(measured(graph, plain), name) == []
    groups = operators(precision.to_fp16(plain), TensorProto.FLOAT16)
    assert {"Conv", "Relu", "MaxPool", "Clip"} <= groups["in"]


def test_quantised_embeddings_keep_the_mean_of_the_calibration_images(monkeypatch):
    plain, calibration = convolutions(levels="auto"), images(32, seed=1)
    expected = run(open_session(plain), calibration)
    found = run(open_session(precision.to_int8(plain, calibration)), calibration)
    np.testing.assert_allclose(found.mean(0), expected.mean(0), atol=1e-5)
    monkeypatch.setattr(precision, "_standardisation", lambda model: None)
    as_rounded = run(open_session(precision.to_int8(plain, calibration)), calibration)
    assert np.abs(as_rounded.mean(0) - expected.mean(0)).max() > 0.02
    assert np.abs(found - expected).mean() < np.abs(as_rounded - expected).mean()


def test_expensive_operators_are_fp16(plain):
    groups = operators(precision.to_fp16(plain), TensorProto.FLOAT16)
    assert {"Conv", "Relu", "MaxPool", "Clip"} <= groups["in"]
    assert groups["not in"] == {"Div", "Sub", "Transpose", "GlobalAveragePool", "Flatten"}


def test_operators_with_constants_out_of_range_stay_in_fp32():
    nodes: list[Node] = [
        ("Conv", ["_", "w"], {"strides": [4, 4]}),
        ("Clip", ["_", "low", "high"], {}),
        ("Conv", ["_", "tiny"], {}),
        ("Mul", ["_", "large"], {}),
        ("GlobalAveragePool", ["_"], {}),
        ("Flatten", ["_"], {}),
    ]
    bounds = {"low": np.array(0, np.float32), "high": np.array(3e38, np.float32)}
    small = {"tiny": weight(8, 8, 1, 1, scale=1e-7), "large": np.array(1e7, np.float32)}
    original = chain(nodes, {"w": weight(8, 3, 4, 4), **bounds, **small})
    graph = precision.to_fp16(original)
    assert {"Clip", "Mul"} <= operators(graph, TensorProto.FLOAT)["in"]
    assert "backbone/tiny/half" not in {tensor.name for tensor in onnx.load_from_string(graph).graph.initializer}
    assert parity.failures(measured(graph, original), "fp16") == []


def layer_norm(square: str) -> bytes:
    """Return a LayerNorm over features in the thousands, as one operator or decomposed as by exporters."""
    head: list[Node] = [
        ("Conv", ["_", "w"], {"strides": [4, 4]}),
        ("Flatten", ["_"], {}),
        ("Gemm", ["_", "w1"], {"transB": 1}),
    ]
    tail: list[Node] = [("Gemm", ["_", "w2"], {"transB": 1})]
    constants = {
        "w": weight(8, 3, 4, 4, scale=1000),
        "w1": weight(24, 128),
        "w2": weight(8, 24),
        "axes": np.array([-1]),
        "two": np.array(2, np.float32),
        "epsilon": np.array(1e-12, np.float32),
        "gain": np.ones(24, np.float32),
    }
    if square == "LayerNormalization":
        middle: list[Node] = [("LayerNormalization", ["_", "gain"], {"axis": -1})]
    else:
        middle = [
            ("ReduceMean", ["_", "axes"], {}),
            ("Sub", ["Gemm2", "_"], {}),
            ("Mul", ["_", "_"], {}) if square == "Mul" else ("Pow", ["_", "two"], {}),
            ("ReduceMean", ["_", "axes"], {}),
            ("Add", ["_", "epsilon"], {}),
            ("Sqrt", ["_"], {}),
            ("Div", ["Sub4", "_"], {}),
        ]
    return chain([*head, *middle, *tail], constants)


@pytest.mark.parametrize("square", ["Pow", "Mul", "LayerNormalization"])
def test_layer_norm_stays_in_fp32(square):
    original = layer_norm(square)
    assert parity.failures(measured(precision.to_fp16(original), original), "fp16") == []


def test_layer_norm_in_fp16_fails_parity(monkeypatch):
    original = layer_norm("Pow")
    monkeypatch.setattr(precision, "_LIGHT", precision._LIGHT | {"ReduceMean", "Pow", "Sqrt"})
    graph = precision.to_fp16(original)
    assert "Pow" in operators(graph, TensorProto.FLOAT16)["in"]
    assert parity.failures(measured(graph, original), "fp16")


def test_fp16_overflow_hidden_by_onnx_runtime_is_refused():
    nodes: list[Node] = [
        ("Conv", ["_", "large"], {"strides": [4, 4]}),
        ("Conv", ["_", "small"], {}),
        ("GlobalAveragePool", ["_"], {}),
        ("Flatten", ["_"], {}),
    ]
    original = chain(nodes, {"large": weight(8, 3, 4, 4, scale=1e5), "small": weight(8, 8, 1, 1, scale=0.01)})
    graph = precision.to_fp16(original)
    assert np.isfinite(run(open_session(graph), images(40, seed=2))).all()
    report = measured(graph, original)
    assert report["nonfinite"] == 40
    assert report["max_difference"] == 1e9  # JSON has no infinity
    assert parity.failures(report, "fp16")[0] == (
        "40 of 40 images give NaN or infinity (float16 ends at 65,504: use fp32)"
    )
    assert parity.failures(measured(original, original), "fp32") == []


def test_parity_rounds_between_fp16_operators_like_a_gpu(plain):
    graph = precision.to_fp16(plain)
    stored = parity.as_stored(graph)
    assert onnx_file.precision(parity.as_stored(plain)) == "fp32"
    assert parity.as_stored(plain) == plain
    exact, rounded = (run(open_session(data), images(40, seed=2)) for data in (graph, stored))
    assert 1e-5 < np.abs(exact - rounded).max() < 0.05


def test_int8_weights_have_scales_per_channel_and_float_biases(quantised):
    graph = onnx.load_from_string(quantised).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    sources = {node.output[0]: node for node in graph.node}
    convs = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convs) == 3
    for conv in convs:
        for value in conv.input[:2]:
            assert sources[value].op_type == "DequantizeLinear"
        stored = sources[conv.input[1]]
        assert constants[stored.input[0]].dtype == np.int8
        assert constants[stored.input[1]].shape == (constants[stored.input[0]].shape[0],)
    assert constants[convs[0].input[2]].dtype == np.float32
    zero_points = [constants[n.input[2]] for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert all(point.dtype == np.int8 and not point.any() for point in zero_points)


def test_attention_products_and_softmax_are_not_quantised():
    nodes: list[Node] = [
        ("Conv", ["_", "w"], {"strides": [4, 4]}),
        ("Reshape", ["_", "rows"], {}),
        ("MatMul", ["_", "w1"], {}),
        ("Transpose", ["_"], {"perm": [0, 2, 1]}),
        ("MatMul", ["MatMul2", "_"], {}),
        ("Softmax", ["_"], {}),
        ("MatMul", ["_", "MatMul2"], {}),
        ("ReduceMean", ["_", "axes"], {"keepdims": 0}),
    ]
    shapes = {"rows": np.array([0, 8, 16]), "axes": np.array([2])}
    original = chain(nodes, {"w": weight(8, 3, 4, 4), "w1": weight(16, 16), **shapes})
    graph = onnx.load_from_string(precision.to_int8(original, images(32))).graph
    rounded = {node.input[0].removeprefix("backbone/") for node in graph.node if node.op_type == "QuantizeLinear"}
    assert rounded == {"x", "Conv0", "Reshape1", "MatMul2"}
    fp16 = precision.to_fp16(original)
    assert {"Softmax", "ReduceMean"} <= operators(fp16, TensorProto.FLOAT)["in"]
    assert parity.failures(measured(fp16, original), "fp16") == []


def test_last_matrix_product_is_not_quantised():
    nodes: list[Node] = [
        ("Conv", ["_", "w"], {"strides": [4, 4]}),
        ("GlobalAveragePool", ["_"], {}),
        ("Flatten", ["_"], {}),
        ("Gemm", ["_", "w1"], {"transB": 1}),
        ("Relu", ["_"], {}),
        ("Gemm", ["_", "w2"], {"transB": 1}),
        ("Add", ["_", "bias"], {}),
    ]
    weights = {"w": weight(8, 3, 4, 4), "w1": weight(16, 8), "w2": weight(8, 16), "bias": weight(8, 1)[:, 0]}
    graph = onnx.load_from_string(precision.to_int8(chain(nodes, weights), images(32))).graph
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert {stored[f"backbone/{name}_quantized"] for name in ("w", "w1")} == {TensorProto.INT8}
    assert stored["backbone/w2"] == TensorProto.FLOAT


def test_int8_conversion_is_reproducible_and_silent(plain, quantised, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert precision.to_int8(plain, images(32)) == quantised
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs sched_setaffinity")
def test_int8_conversion_does_not_depend_on_threads(plain, quantised, tmp_path):
    (tmp_path / "plain.onnx").write_bytes(plain)
    np.save(tmp_path / "images.npy", images(32))
    code = (
        "import os, numpy as np; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from pathlib import Path; from exporters import precision\n"
        "made = precision.to_int8(Path('plain.onnx').read_bytes(), np.load('images.npy'))\n"
        "Path('int8.onnx').write_bytes(made)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "int8.onnx").read_bytes() == quantised


@pytest.mark.parametrize(
    ("calibration", "sentence"),
    [
        (images(15), "at least 16 images to calibrate with, but the calibration set gives 15"),
        (images(16, size=8), r"must be uint8 of shape \(16, 16, 3\), but are uint8 \(8, 8, 3\)"),
        (images(16).astype(np.float32), "must be uint8 .* but are float32"),
    ],
    ids=["too few", "wrong size", "wrong type"],
)
def test_invalid_calibration_images_are_refused(plain, calibration, sentence):
    with pytest.raises(InputError, match=sentence):
        precision.to_int8(plain, calibration)


def test_int8_calibrated_with_grey_images_fails_parity(plain):
    graph = precision.to_int8(plain, np.full((32, 16, 16, 3), 127, np.uint8))
    assert parity.failures(measured(graph, plain), "int8")


def test_network_without_weights_cannot_be_converted():
    nodes: list[Node] = [("Slice", ["_", "zero", "eight", "axis"], {}), ("ReduceMean", ["_", "axes"], {"keepdims": 0})]
    constants = {"zero": np.array([0]), "eight": np.array([8]), "axis": np.array([2]), "axes": np.array([1, 3])}
    graph = chain(nodes, constants)
    with pytest.raises(InputError, match="no convolution, and no matrix product except the last"):
        precision.to_int8(graph, images(16))
    with pytest.raises(InputError, match="cannot be made fp16: it has no weights"):
        precision.to_fp16(graph)


def test_control_flow_cannot_be_converted(plain):
    model = onnx.load_from_string(plain)
    empty = helper.make_graph([], "branch", [], [])
    model.graph.node.append(helper.make_node("If", ["yes"], ["z"], then_branch=empty, else_branch=empty))
    for wanted in ("fp16", "int8"):
        with pytest.raises(InputError, match=r"has control flow \(If\)"):
            precision.convert(model.SerializeToString(), wanted, images(16))


def write_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.fromarray(np.full((12, 20, 3), 10 * index, np.uint8)).save(folder / f"{index:02d}.png")


def test_calibration_images_are_spread_evenly_over_subfolders(tmp_path):
    write_images(tmp_path / "a", 10)
    write_images(tmp_path / "b", 10)
    every = precision.calibration_images(tmp_path, Pixels(8), 100)
    assert (every.shape, every.dtype) == ((20, 8, 8, 3), np.uint8)
    subset = precision.calibration_images(tmp_path, Pixels(8), 16)
    assert len(subset) == 16
    assert np.array_equal(subset[[0, -1]], every[[0, -1]])


def test_unreadable_calibration_images_are_replaced(tmp_path):
    write_images(tmp_path, 18)
    (tmp_path / "00.png").write_bytes(b"no image")
    assert len(precision.calibration_images(tmp_path, Pixels(8), 17)) == 17
    (tmp_path / "05.png").write_bytes(b"")
    (tmp_path / "06.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"at least 16 images to calibrate with, but .* \(18 files\) gives 15"):
        precision.calibration_images(tmp_path, Pixels(8), 256)
    with pytest.raises(InputError, match="does not exist"):
        precision.calibration_images(tmp_path / "nowhere", Pixels(8), 256)
