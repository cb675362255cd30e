"""Tests of ONNX backbones of users: the composed graph and refused models."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import onnx
import pytest
import torch
from helpers import hostile_graphs as hostile
from onnx import TensorProto, helper, numpy_helper

from ssd_edge.backbones import names
from ssd_edge.backbones.graph import NetworkGraph
from ssd_edge.backbones.onnx import OnnxEmbedder, batch_size, compose, open_session, run, stated_size
from ssd_edge.config import BackboneConfig
from ssd_edge.errors import EnvironmentUnfitError, InputError
from ssd_edge.images import Pixels
from ssd_edge.ort import apart
from ssd_edge.system import MIB

SIZE, DIM = 8, 5
PIXELS = Pixels(SIZE)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
RNG = np.random.default_rng(1)
WEIGHT = RNG.standard_normal((DIM, 3, 3, 3)).astype(np.float32)
IMAGES = RNG.integers(0, 256, (7, SIZE, SIZE, 3), dtype=np.uint8)
MU = RNG.standard_normal(DIM).astype(np.float32)
SIGMA = RNG.uniform(0.5, 2, DIM).astype(np.float32)


def network(
    *,
    batch: int | str = "n",
    layout: str = "nchw",
    half: bool = False,
    opset: int = 18,
    tail: str = "flatten",
    names: tuple[str, str] = ("x", "y"),
    side: int | str = SIZE,
    weight: np.ndarray = WEIGHT,
) -> onnx.ModelProto:
    """Return a network of convolution, ReLU and pooling; `tail` selects the shape of its output."""
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    image, output = names
    source = image
    nodes, weights = [], [numpy_helper.from_array(weight.astype(np.float16 if half else np.float32), "w")]
    shape = [batch, 3, side, side]
    if layout == "nhwc":
        nodes.append(helper.make_node("Transpose", [image], ["chw"], perm=[0, 3, 1, 2]))
        source = "chw"
        shape = [batch, side, side, 3]
    nodes += [
        helper.make_node("Conv", [source, "w"], ["conv"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["relu"]),
    ]
    source = "relu" if tail == "map" else "pool"
    if tail != "map":
        nodes.append(helper.make_node("GlobalAveragePool", ["relu"], ["pool"]))
    if tail == "flatten":
        nodes.append(helper.make_node("Flatten", [source], [output], axis=1))
    elif tail == "one":  # a shape frozen at batch size 1
        weights.append(numpy_helper.from_array(np.array([1, -1], np.int64), "frozen"))
        nodes.append(helper.make_node("Reshape", [source, "frozen"], [output]))
    elif tail == "last":
        nodes.append(helper.make_node("Transpose", [source], [output], perm=[0, 2, 3, 1]))
    else:
        nodes.append(helper.make_node("Identity", [source], [output]))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(image, kind, shape)],
        [helper.make_tensor_value_info(output, kind, [None] * (2 if tail in ("flatten", "one") else 4))],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def composed(model: onnx.ModelProto, layout: str = "nchw", pixels: Pixels = PIXELS, **more) -> onnx.ModelProto:
    options = {"name": "its identity", **more}
    return onnx.load_from_string(compose(model.SerializeToString(), pixels, MEAN, STD, layout, **options))


def features(model: onnx.ModelProto, images: np.ndarray = IMAGES) -> np.ndarray:
    return run(open_session(model.SerializeToString()), images)


def expected(images: np.ndarray = IMAGES) -> np.ndarray:
    """Return the features of `network` computed by PyTorch in float64."""
    pixels = (torch.from_numpy(images).double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    conv = torch.conv2d(pixels.permute(0, 3, 1, 2), torch.from_numpy(WEIGHT).double(), padding=1)
    return conv.relu().mean((2, 3)).numpy()


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_composed_graph_agrees_with_pytorch(layout):
    model = composed(network(layout=layout), layout, mu=MU, sigma=SIGMA)
    np.testing.assert_allclose(features(model), (expected() - MU) / SIGMA, atol=2e-6)


def test_composed_graph_input_output_and_metadata():
    pixels = Pixels(SIZE, "crop", 9, "bilinear")
    model = composed(network(), pixels=pixels, mu=MU, sigma=SIGMA)
    (image,), (output,) = model.graph.input, model.graph.output
    assert onnx.helper.printable_value_info(image) == "%images[UINT8, batchx8x8x3]"
    assert onnx.helper.printable_value_info(output) == "%embeddings[FLOAT, batchx5]"
    labels = {entry.key: entry.value for entry in model.metadata_props}
    assert Pixels.from_dict(labels) == pixels
    assert labels == {
        "schema": "ssd-edge-backbone/1",
        "identity": "its identity",
        "size": "8",
        "fit": "crop",
        "resize": "9",
        "interpolation": "bilinear",
        "dim": "5",
        "layout": "NHWC",
        "precision": "fp32",
        "colour_order": "RGB",
        "output": "embeddings",
    }
    assert composed(network()).graph.output[0].name == "features"


@pytest.mark.parametrize("tail", ["flatten", "pooled", "last"])
def test_output_may_have_trailing_axes_of_length_one(tail):
    model = composed(network(tail=tail))
    np.testing.assert_allclose(features(model), expected(), atol=2e-6)


def test_float16_network_is_standardised_in_float32():
    model = composed(network(half=True), mu=MU, sigma=SIGMA)
    assert features(model).dtype == np.float32
    np.testing.assert_allclose(features(model), (expected() - MU) / SIGMA, atol=5e-3)


def test_declared_batch_of_one_becomes_dynamic():
    model = composed(network(batch=1))
    assert batch_size(open_session(model.SerializeToString())) == 32
    np.testing.assert_allclose(features(model), expected(), atol=2e-6)


def test_network_frozen_at_batch_one_runs_one_by_one():
    model = composed(network(batch=1, tail="one"))
    assert batch_size(open_session(model.SerializeToString())) == 1
    np.testing.assert_allclose(features(model), expected(), atol=2e-6)


def test_network_with_batch_dependence_runs_one_by_one():
    model = network()
    model.graph.node.insert(0, helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=1))
    model.graph.node.insert(1, helper.make_node("Sub", ["x", "mean"], ["centred"]))
    model.graph.node[2].input[0] = "centred"
    assert batch_size(open_session(composed(model).SerializeToString())) == 1


def test_large_images_use_a_small_batch():
    data = compose(network(side="s").SerializeToString(), Pixels(512), MEAN, STD, "nchw")
    assert batch_size(open_session(data)) == 8


def test_names_may_collide_with_those_of_the_composed_graph():
    model = composed(network(names=("images", "embeddings")), mu=MU, sigma=SIGMA)
    np.testing.assert_allclose(features(model), (expected() - MU) / SIGMA, atol=2e-6)


def test_subgraphs_can_use_outer_weights():
    model = network(names=("x", "raw"))
    branch = helper.make_graph(
        [helper.make_node("Mul", ["raw", "two"], ["twice"])],
        "branch",
        [],
        [helper.make_tensor_value_info("twice", TensorProto.FLOAT, [None, None])],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.float32(2), "two"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch))
    model.graph.output[0].name = "y"
    allowed = composed(model, allow_control_flow=True)
    np.testing.assert_allclose(features(allowed), 2 * expected(), atol=4e-6)
    with pytest.raises(InputError, match=r"it has control flow \(If\), .*backbone.allow_control_flow=true"):
        composed(model)


def test_local_functions_are_inlined():
    model = network(names=("x", "raw"))
    opsets = [helper.make_opsetid("", 18)]
    double = helper.make_function("own", "Double", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], opsets)
    model.functions.append(double)
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.node.append(helper.make_node("Double", ["raw"], ["y"], domain="own"))
    model.graph.output[0].name = "y"
    result = composed(model)
    assert [entry.domain for entry in result.opset_import] == [""]
    np.testing.assert_allclose(features(result), 2 * expected(), atol=4e-6)


def test_weights_may_be_listed_as_inputs():
    model = network()
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, WEIGHT.shape))
    np.testing.assert_allclose(features(composed(model)), expected(), atol=2e-6)


@pytest.mark.parametrize(("opset", "kept"), [(11, 18), (13, 13), (20, 20), (21, 18)])
def test_an_opset_outside_13_to_20_is_converted_to_18(opset, kept):
    model = composed(network(opset=opset))
    assert model.opset_import[0].version == kept
    np.testing.assert_allclose(features(model), expected(), atol=2e-6)


def test_doc_strings_and_metadata_are_removed():
    model = network(tail="pooled")
    model.doc_string = model.graph.doc_string = model.graph.node[0].doc_string = "/home/someone/secret"
    helper.set_model_props(model, {"source": "/home/someone/secret"})
    model.graph.value_info.append(helper.make_tensor_value_info("relu", TensorProto.FLOAT, [1, DIM, SIZE, SIZE]))
    data = compose(model.SerializeToString(), PIXELS, MEAN, STD, "nchw")
    assert b"secret" not in data
    assert not onnx.load_from_string(data).graph.value_info


def test_compose_is_deterministic():
    data = network().SerializeToString()
    assert compose(data, PIXELS, MEAN, STD, "nchw") == compose(data, PIXELS, MEAN, STD, "nchw")


# Refused models: (message, model, changed arguments)


def external() -> onnx.ModelProto:
    model = network()
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "weights.data")
    model.graph.initializer[0].ClearField("raw_data")
    return model


def external_in_subgraph() -> onnx.ModelProto:
    model = network()
    inner = external().graph.initializer[0]
    inner.name = "inner"
    model.graph.node.append(helper.make_node("Constant", [], ["unused"], value=inner))
    return model


def foreign() -> onnx.ModelProto:
    model = network()
    model.graph.node[1].op_type, model.graph.node[1].domain = "FusedGelu", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def two_inputs() -> onnx.ModelProto:
    model = network()
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["n", 1]))
    return model


def two_outputs() -> onnx.ModelProto:
    model = network()
    model.graph.output.append(helper.make_tensor_value_info("pool", TensorProto.FLOAT, ["n", DIM, 1, 1]))
    return model


def byte_input() -> onnx.ModelProto:
    model = network()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT))
    model.graph.node[1].input[0] = "wide"
    return model


def flat_input() -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "flat",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 192])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 192])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def dropout() -> onnx.ModelProto:
    model = network(names=("x", "raw"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "ratio"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "training"))
    model.graph.node.append(helper.make_node("Dropout", ["raw", "ratio", "training"], ["y"]))
    model.graph.output[0].name = "y"
    return model


def inconvertible() -> onnx.ModelProto:
    model = network(opset=24)
    model.graph.node[1].op_type = "Swish"  # new in opset 24
    return model


def invalid() -> onnx.ModelProto:
    model = network()
    model.graph.node[1].input[0] = "nowhere"
    return model


REFUSED = [
    ("is not an ONNX file, or was cut short", b"no model, but some text", {}),
    ("not an ONNX file, or an empty one", b"", {}),
    (r"weights \('w'\) are in another file.*external_data=False", external, {}),
    (r"weights \('inner'\) are in another file", external_in_subgraph, {}),
    (r"it uses custom operators \(com.microsoft.FusedGelu\)", foreign, {}),
    (r"2 inputs.*'x' float32 \(\?, 3, 8, 8\), 'mask' float32 \(\?, 1\)", two_inputs, {}),
    (r"2 outputs.*'y' float32 .*'pool' float32 \(\?, 5, 1, 1\)", two_outputs, {}),
    (r"input must be float32 or float16, but is 'x' uint8 \(\?, 3, 8, 8\)", byte_input, {}),
    (r"images, of rank 4, but is 'x' float32 \(\?, 192\)", flat_input, {}),
    (r"3 channels, but is 'x' float32 \(\?, 3, 8, 8\) with.*; set backbone.layout=nchw", network, {"layout": "nhwc"}),
    (r"input is 'x' float32 \(\?, 3, 8, 8\), but backbone.size is 32", network, {"pixels": Pixels(32)}),
    (r"backbone.mean needs 3 values, one per channel, but has 2: \[0.5, 0.5\]", network, {"mean": (0.5, 0.5)}),
    ("backbone.std needs 3 values, one per channel, but has 1", network, {"std": (0.5,)}),
    (r"backbone.std must be above 0 in every channel, but is \[0.2, 0.0, 0.2\]", network, {"std": (0.2, 0.0, 0.2)}),
    ("NaN or infinity", lambda: network(weight=np.full_like(WEIGHT, np.nan)), {}),
    ("different outputs for the same image.*dropout", dropout, {}),
    (r"one vector per image, \(1, D\), but is \(1, 5, 8, 8\); cut it after", lambda: network(tail="map"), {}),
    ("opset 24 is not one of 13 to 20, and it cannot be converted to 18.*export it with opset 18", inconvertible, {}),
    ("not a valid ONNX model", invalid, {}),
    (r"does not run on one image of 8×8 \(its input is 'x' float32 \(\?, 3, \?, \?\)", lambda: huge_kernel(), {}),
    (r"gives 5 features, but mu and sigma have the shapes \(4,\)", network, {"mu": MU[:4], "sigma": SIGMA[:4]}),
]


def huge_kernel() -> onnx.ModelProto:
    return network(side="s", weight=np.ones((DIM, 3, 32, 32), np.float32))


@pytest.mark.parametrize(("sentence", "model", "changes"), REFUSED)
def test_refused(sentence, model, changes):
    data = model if isinstance(model, bytes) else model().SerializeToString()
    arguments = {"pixels": PIXELS, "mean": MEAN, "std": STD, "layout": "nchw", **changes}
    with pytest.raises(InputError, match=sentence) as raised:
        compose(data, **arguments)
    assert "\n" not in str(raised.value)


# Embedder


def opened(path, **changes) -> OnnxEmbedder:
    config = BackboneConfig(f"onnx:{path}", **{"mean": MEAN, "std": STD, **changes})
    return OnnxEmbedder(names.resolve(config, lambda text: None))


def test_embedder_gives_raw_features_and_provenance(tmp_path):
    path = tmp_path / "own.onnx"
    path.write_bytes(network().SerializeToString())
    embedder = opened(path)
    assert (embedder.pixels, embedder.dim, embedder.standardised) == (PIXELS, DIM, False)
    assert embedder.priors.within_covariance is None
    assert embedder.provenance["file"] == "own.onnx"  # without the folder
    many = np.concatenate([IMAGES] * 10)
    np.testing.assert_allclose(embedder.embed(many), expected(many), atol=2e-6)
    assert embedder.embed(IMAGES[:0]).shape == (0, DIM)


@pytest.mark.parametrize(
    ("graph", "allow", "sentence"),
    [
        (hostile.endless(own=True), False, "it has control flow (Loop), which may never end"),
        (hostile.endless(own=True), True, "it did not finish within 3.00 s and was stopped when it was tried"),
        (hostile.slow(own=True), False, "it did not finish within"),
        (hostile.huge(own=True), False, "it needs more than 1,024 MiB of memory and was stopped"),
        (hostile.multiplying(), False, "it did not finish within"),
    ],
    ids=["control flow", "endless", "slow", "huge", "functions"],
)
def test_a_harmful_file_is_stopped(monkeypatch, tmp_path, graph, allow, sentence):
    monkeypatch.setattr(apart, "SECONDS", 3.0 if "finish" in sentence else 60.0)
    monkeypatch.setattr(apart, "memory_limit", lambda: 1024 * MIB)
    (tmp_path / "x.onnx").write_bytes(graph)
    with pytest.raises(InputError) as refused:
        opened(tmp_path / "x.onnx", size=hostile.SIZE, allow_control_flow=allow)
    assert sentence in str(refused.value)


def test_identity_depends_on_model_and_preprocessing():
    base = NetworkGraph("own", network().SerializeToString(), Pixels(SIZE), MEAN, STD)
    changes = [
        {"model": network(half=True).SerializeToString()},
        {"pixels": Pixels(16)},
        {"pixels": Pixels(SIZE, "crop", 10)},
        {"mean": STD},
        {"std": MEAN},
        {"layout": "nhwc"},
        {"levels": "auto"},
    ]
    others = [dataclasses.replace(base, **change) for change in changes]
    assert dataclasses.replace(base, name="other", card={"a": 1}).identity == base.identity
    assert len({graph.identity for graph in (base, *others)}) == 8


def test_the_size_that_a_file_states_is_used():
    for layout in ("nchw", "nhwc"):
        assert stated_size(network(layout=layout).SerializeToString(), layout, False) == SIZE
    with pytest.raises(InputError, match=r"backbone.size is missing; set it to the side of its input"):
        stated_size(network(side="s").SerializeToString(), "nchw", False)
    with pytest.raises(InputError, match="3 channels"):
        stated_size(network().SerializeToString(), "nhwc", False)


def test_embedder_errors_name_the_file(tmp_path):
    path = tmp_path / "own.onnx"
    path.write_bytes(b"text")
    with pytest.raises(InputError, match=r"backbone.name=onnx:.*own.onnx: it is not an ONNX file"):
        opened(path)
    with pytest.raises(InputError, match=r"none.onnx does not exist"):
        opened(tmp_path / "none.onnx")


def test_a_file_over_2_gib_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "own.onnx"
    with open(path, "wb") as stream:
        stream.truncate(2**31 + 1)  # sparse file
    with pytest.raises(InputError, match=r"2,147,483,649 bytes.*2 GiB"):
        opened(path)


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_missing_extra_names_the_install_command(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(EnvironmentUnfitError, match=r"pip install 'ssd-edge\[export\]'"):
        compose(b"", PIXELS, MEAN, STD, "nchw")
