"""Tests of the levels of a network: the trunk of its graph, the chosen maps, and the joined features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from ssd_edge.backbones import levels
from ssd_edge.backbones import onnx as composing
from ssd_edge.backbones.graph import NetworkGraph
from ssd_edge.backbones.levels import Level, NoLevelsError
from ssd_edge.backbones.onnx import open_session
from ssd_edge.errors import InputError
from ssd_edge.images import Pixels

SIZE = 16
IMAGES = np.random.default_rng(2).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
PIXELS = np.random.default_rng(0).standard_normal((3, 3, SIZE, SIZE)).astype(np.float32)


class Net:
    """A small network; every method adds nodes after the value `at` and returns the name of the result."""

    def __init__(self, half: bool = False, seed: int = 1) -> None:
        self.kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        self.dtype = np.float16 if half else np.float32
        self.rng = np.random.default_rng(seed)
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.at, self.width = "x", 3

    def constant(self, value: np.ndarray) -> str:
        name = f"constant {len(self.constants)}"
        self.constants[name] = value
        return name

    def op(self, kind: str, *more: str, source: str = "", **attributes) -> str:
        self.at, source = f"{len(self.nodes)} {kind}", source or self.at
        self.nodes.append(helper.make_node(kind, [source, *more], [self.at], name=self.at, **attributes))
        return self.at

    def conv(self, width: int, stride: int = 1, groups: int = 1, side: int = 3) -> str:
        weight = self.rng.standard_normal((width, self.width // groups, side, side)) / side
        self.width = width
        pads = [side // 2] * 4
        weight_name = self.constant(weight.astype(self.dtype))
        return self.op("Conv", weight_name, strides=[stride] * 2, pads=pads, group=groups)

    def residual(self, width: int, stride: int = 1) -> str:
        start, wide = self.at, self.width
        inner = self.conv(width, stride), self.op("Relu"), self.conv(width)
        if stride > 1 or wide != width:
            self.at, self.width = start, wide
            start = self.conv(width, stride, side=1)
        self.op("Add", inner[2], source=start)
        return self.op("Relu")

    def inverted(self, width: int, stride: int = 1) -> str:
        """Widen by 6, filter each channel (with padding of its own, as TensorFlow's networks), and narrow."""
        start, wide = self.at, self.width
        self.conv(6 * wide, side=1)
        self.op("Clip", self.constant(np.array(0, self.dtype)), self.constant(np.array(6, self.dtype)))
        self.op("Pad", self.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1])))
        weight = self.rng.standard_normal((6 * wide, 1, 3, 3)).astype(self.dtype)
        self.op("Conv", self.constant(weight), strides=[stride] * 2, group=6 * wide)
        self.conv(width, side=1)
        return self.op("Add", start) if stride == 1 and wide == width else self.at

    def pool(self, how: str = "global") -> str:
        if how == "global":
            self.op("GlobalAveragePool")
            return self.op("Flatten", axis=1)
        if how == "mean":
            return self.op("ReduceMean", self.constant(np.array([2, 3])), keepdims=0)
        pooled = self.op("GlobalAveragePool")
        self.op("Shape")
        self.op("Gather", self.constant(np.array([0])))
        shape = self.op("Concat", self.constant(np.array([-1])), axis=0)
        return self.op("Reshape", shape, source=pooled)

    def model(self, batch: int | str = "n", channels_last: bool = False, opset: int = 18) -> onnx.ModelProto:
        shape = [batch, SIZE, SIZE, 3] if channels_last else [batch, 3, SIZE, SIZE]
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", self.kind, shape)],
            [helper.make_tensor_value_info(self.at, self.kind, [None, None])],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        onnx.checker.check_model(model)
        return model


def run(model: onnx.ModelProto, images: np.ndarray = PIXELS, outputs: list[str] | None = None) -> list[np.ndarray]:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if outputs is not None:
        del copy.graph.output[:]
        copy.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
    session = open_session(copy.SerializeToString())
    if session.get_inputs()[0].type == "tensor(float16)":
        images = images.astype(np.float16)
    if session.get_inputs()[0].shape[-1] == 3:
        images = images.transpose(0, 2, 3, 1)
    found: list[np.ndarray] = session.run(None, {"x": images})
    return found


def find(model: onnx.ModelProto, choice: levels.Choice = "auto") -> tuple[Level, ...]:
    return levels.find(model, SIZE, choice, lambda shapes: run(shapes, PIXELS[:1]))


def named(model: onnx.ModelProto, choice: levels.Choice = "auto") -> list[str]:
    return list(map(str, find(model, choice)))


def plain(pool: str = "global", half: bool = False) -> Net:
    """Convolutions of 4, 8 and 16 channels on maps of 8, 4 and 2 pixels."""
    net = Net(half)
    for width in (4, 8, 16):
        net.conv(width, stride=2)
        net.op("Relu")
    net.pool(pool)
    return net


def residual() -> Net:
    net = Net()
    net.conv(8, stride=2)
    net.residual(8)
    net.residual(32)
    net.residual(32)
    net.residual(64, stride=2)
    net.residual(128, stride=2)
    net.pool()
    return net


def inverted() -> Net:
    """EfficientNet-Lite in small: 32, 16, 24 and 24 | 40 and 56 | 80, then 320 features."""
    net = Net()
    net.conv(32, stride=2)
    for width, stride in ((16, 1), (24, 1), (24, 1), (40, 2), (56, 1), (80, 2)):
        net.inverted(width, stride)
    net.conv(320, side=1)
    net.pool()
    return net


def channels_last() -> Net:
    """Transpose to channels first, and from the second convolution on back to channels last, as converters leave it."""
    net = Net()
    net.op("Transpose", perm=[0, 3, 1, 2])
    net.conv(4, stride=2)
    net.conv(6, stride=2)
    net.op("Transpose", perm=[0, 2, 3, 1])
    net.op("Relu")
    net.op("Transpose", perm=[0, 3, 1, 2])
    net.conv(12, stride=2)
    net.op("Transpose", perm=[0, 2, 3, 1])
    net.op("ReduceMean", net.constant(np.array([1, 2])), keepdims=0)
    return net


def tokens() -> Net:
    """A patch projection, and a network of tokens with one head of attention."""
    net = Net()
    weight = net.constant(net.rng.standard_normal((8, 3, 4, 4)).astype(np.float32))
    net.op("Conv", weight, strides=[4, 4])
    net.op("Reshape", net.constant(np.array([0, 8, -1])))
    start = net.op("Transpose", perm=[0, 2, 1])
    keys = net.op("Transpose", perm=[0, 2, 1])
    net.op("MatMul", keys, source=start)
    net.op("Softmax", axis=-1)
    net.op("MatMul", start)
    net.op("Add", start)
    net.op("ReduceMean", net.constant(np.array([1])), keepdims=0)
    return net


def test_inner_values_of_residual_blocks_are_not_on_the_trunk():
    net = Net()
    stem = net.conv(4)
    block = net.residual(4)
    net.pool()
    values, ends = levels.trunk(net.model().graph)
    assert [value.split()[1] for value in values] == ["Conv", "Add", "Relu", "GlobalAveragePool", "Flatten"]
    assert (values[0], values[2]) == (stem, block)
    assert ends == set(values[1:])


def test_values_before_the_first_product_are_not_levels():
    net = Net()
    net.op("Sub", net.constant(np.float32([[[1]], [[2]], [[3]]])))
    net.op("Slice", *(net.constant(np.array(part)) for part in ([0, 0], [8, 8], [2, 3])))
    net.conv(4, stride=2)
    net.conv(8, stride=2)
    net.conv(12, side=1)
    net.pool()
    assert named(net.model()) == ["4@4", "8@2"]


@pytest.mark.parametrize(
    ("net", "sizes", "auto"),
    [
        (plain, ["4@8", "8@4"], ["4@8", "8@4"]),
        (residual, ["32@8", "64@4"], ["8@8", "32@8", "64@4"]),
        (inverted, ["24@8", "56@4", "80@2"], ["16@8", "24@8", "40@4", "56@4", "80@2"]),
        (channels_last, ["4@8", "6@4"], ["4@8", "6@4"]),
    ],
)
def test_chosen_levels(net: Callable[[], Net], sizes: list[str], auto: list[str]):
    model = net().model(channels_last=net is channels_last)
    assert named(model) == auto
    assert named(model, "auto") == auto
    with pytest.raises(NoLevelsError, match=r"backbone\.levels is last"):
        named(model, "last")


def test_maps_that_grow_again_are_no_levels():
    net = Net()
    net.conv(4, stride=2)
    net.conv(8, stride=2)
    net.op("ConvTranspose", net.constant(np.ones((8, 4, 2, 2), np.float32)), strides=[2, 2])
    net.width = 4
    net.conv(5)
    net.pool()
    assert named(net.model()) == ["4@8", "8@4"]


def test_a_map_that_a_classifier_reads_is_a_level():
    net = plain()
    net.op("MatMul", net.constant(np.ones((16, 5), np.float32)))
    assert named(net.model()) == ["4@8", "8@4", "16@2"]


def test_features_that_are_only_normalised_repeat_the_last_map():
    net = plain()
    net.op("Sub", net.op("ReduceMean", net.constant(np.array([1]))), source=net.nodes[-1].input[0])
    net.op("LayerNormalization", net.constant(np.ones(16, np.float32)))
    assert named(net.model()) == ["4@8", "8@4"]


@pytest.mark.parametrize(
    ("pool", "opset"), [("global", 13), ("global", 17), ("global", 20), ("mean", 18), ("reshape", 13), ("reshape", 18)]
)
def test_joined_features_are_means_over_space_and_the_unchanged_features(pool: str, opset: int):
    model = plain(pool).model(opset=opset)
    check_joined(model, tolerance=1e-6)


@pytest.mark.parametrize("net", [residual, inverted, channels_last])
def test_joined_features_of_other_networks(net: Callable[[], Net]):
    check_joined(net().model(channels_last=net is channels_last), tolerance=1e-5, rounding=1e-5)


def test_means_of_a_float16_network_are_computed_in_float32():
    model = plain(half=True).model()
    model.graph.node.append(helper.make_node("Cast", [model.graph.output[0].name], ["wide"], to=TensorProto.FLOAT))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("wide", TensorProto.FLOAT, [None, None]))
    check_joined(model, tolerance=1e-6, rounding=2**-8)  # ONNX Runtime may keep float32 within a network


def check_joined(model: onnx.ModelProto, tolerance: float, rounding: float = 1e-6) -> None:
    """Compare levels with the means, in float64, of the maps themselves, and features with those of the network."""
    name, found = model.graph.output[0].name, find(model)
    maps = run(model, outputs=[level.value for level in found])
    before = run(model)[0]
    levels.join(model, found, name, "joined")
    onnx.checker.check_model(model, full_check=True)
    joined = run(model, outputs=["joined"])[0]
    expected = [
        map_.astype(np.float64).mean((1, 2) if level.channels_last else (2, 3))
        for level, map_ in zip(found, maps, strict=True)
    ]
    widths = [level.width for level in found]
    assert joined.dtype == np.float32
    assert [part.shape[1] for part in expected] == widths
    assert joined.shape[1] == sum(widths) + before.shape[1]
    pooled, features = np.split(joined, [sum(widths)], axis=1)
    np.testing.assert_allclose(pooled, np.concatenate(expected, 1), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(features, before, rtol=rounding, atol=rounding)


def test_networks_of_tokens_have_no_levels():
    with pytest.raises(NoLevelsError, match="its feature maps have one size, 4×4"):
        find(tokens().model())


def test_maps_of_a_network_of_one_size_are_no_levels():
    net = Net()
    net.conv(8)
    net.residual(8)
    net.pool()
    with pytest.raises(NoLevelsError, match="its feature maps have one size, 16×16"):
        find(net.model())


def test_a_network_whose_features_are_its_only_map_has_no_levels():
    net = Net()
    net.conv(8, stride=2)
    net.op("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    net.pool()
    with pytest.raises(NoLevelsError, match="its only feature map becomes its features"):
        find(net.model())


def parallel() -> Net:
    """Two paths that meet only at the end."""
    net = Net()
    first = net.conv(4, stride=2), net.pool()
    net.at, net.width = "x", 3
    net.conv(4, stride=2)
    net.pool()
    net.op("Concat", first[1], axis=1)
    return net


def constant() -> Net:
    net = Net()
    net.op("Relu", source=net.constant(np.ones((1, 4), np.float32)))
    return net


def unchanged() -> Net:
    return Net()


def flat() -> Net:
    net = Net()
    net.op("Flatten", axis=1)
    net.op("MatMul", net.constant(np.ones((3 * SIZE * SIZE, 5), np.float32)))
    net.op("MatMul", net.constant(np.ones((5, 5), np.float32)))
    return net


def split() -> Net:
    """All maps are divided in two before they go on."""
    net = Net()
    net.conv(4, stride=2)
    half = net.op("Split", axis=1)
    net.nodes[-1].output.append("other")
    net.nodes[-1].attribute.append(helper.make_attribute("num_outputs", 2))
    assert half
    net.op("Mul", "other")
    net.pool()
    return net


@pytest.mark.parametrize(
    ("net", "sentence"),
    [
        (parallel, "no feature map is on every path from its input to its output"),
        (constant, "no feature map is on every path"),
        (unchanged, "no feature map is on every path"),
        (flat, "no feature map is on every path"),
        (split, "its feature maps have one size, 8×8"),
    ],
)
def test_unusual_graphs_have_no_levels(net: Callable[[], Net], sentence: str):
    built = net()
    model = built.model() if built.nodes else onnx.ModelProto()
    if not built.nodes:  # the output is the input
        model.graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, SIZE, SIZE]))
        model.graph.output.append(model.graph.input[0])
    with pytest.raises(NoLevelsError, match=sentence):
        find(model)


def test_values_that_a_branch_reads_are_followed():
    """A branch of control flow that reads an early map goes around everything in between."""
    net = Net()
    early = net.conv(4, stride=2)
    net.conv(4, stride=2)
    late = net.pool()
    graphs = [
        helper.make_graph([node], "branch", [], [helper.make_empty_tensor_value_info(node.output[0])])
        for node in (
            helper.make_node("GlobalAveragePool", [early], ["then"]),
            helper.make_node("Unsqueeze", [late, net.constant(np.array([2, 3]))], ["else"]),
        )
    ]
    net.op("If", source=net.constant(np.array(True)), then_branch=graphs[0], else_branch=graphs[1])
    net.op("Flatten", axis=1)
    values, _ = levels.trunk(net.model().graph)
    assert values[0] == early
    assert [value.split()[1] for value in values] == ["Conv", "If", "Flatten"]


def test_scales_give_every_level_the_same_share():
    widths = [16, 24, 320, 1280]
    scales = levels.scales(widths)
    lengths = [width * scale**2 for width, scale in zip(widths, scales, strict=True)]
    np.testing.assert_allclose(lengths, sum(widths) / 4)
    assert levels.scales([7]) == [1]


# In `compose`


def compose(model: onnx.ModelProto, choice: levels.Choice = "auto", layout: str = "nchw", **more) -> bytes:
    preprocessing = (Pixels(SIZE), (0.5,) * 3, (0.5,) * 3, layout)
    return composing.compose(model.SerializeToString(), *preprocessing, levels=choice, **more)


def labels(data: bytes) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load_from_string(data).metadata_props}


@pytest.mark.parametrize("batch", ["n", 1])
@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-5), (True, 2**-8)])
def test_composed_graph_joins_levels_and_standardises_them(half: bool, tolerance: float, batch: int | str):
    model = plain(half=half).model(batch)
    raw, alone = (composing.open_session(compose(model, choice)) for choice in ("auto", "last"))
    assert composing.widths(raw) == (4, 8, 16)
    assert composing.widths(alone) == (16,)
    features = composing.run(raw, IMAGES)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features[:, 12:], composing.run(alone, IMAGES), rtol=tolerance, atol=tolerance)
    mu, sigma = features.mean(0), features.std(0) + 1
    standardised = composing.run(composing.open_session(compose(model, mu=mu, sigma=sigma)), IMAGES)
    np.testing.assert_allclose(standardised, (features - mu) / sigma, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("choice", ["sizes", "auto"])
def test_composed_graph_of_channels_last(choice: levels.Choice):
    data = compose(channels_last().model(channels_last=True), choice, "nhwc")
    assert labels(data)["levels"] == "4@8 6@4 12"


def test_features_alone_with_a_reason_if_there_are_no_levels():
    model = tokens().model()
    data = compose(model)
    assert labels(data)["no_levels"] == "its feature maps have one size, 4×4"
    assert labels(data)["dim"] == "8"
    assert composing.widths(composing.open_session(data)) == (8,)
    assert not {"levels", "no_levels"} & labels(compose(model, "last")).keys()


def test_features_alone_if_the_graph_does_not_run_with_levels():
    """The sum over a map overflows; the features do not."""
    net = Net()
    net.conv(4, stride=2)
    net.conv(8, stride=2)
    net.op("Sigmoid")
    net.op("Mul", net.constant(np.float32(1e38)))
    net.conv(12, stride=2)
    net.constants[net.nodes[-1].input[1]] *= np.float32(1e-37)
    net.pool()
    data = compose(net.model())
    assert labels(data)["no_levels"].startswith("with levels it gives NaN or infinity for an image of random pixels")
    assert composing.run(composing.open_session(data), IMAGES).shape == (5, 12)
    assert b"levels/" not in data


def test_levels_of_a_frozen_batch_run_one_by_one():
    net = plain()
    net.op("Reshape", net.constant(np.array([1, 16])))
    session = composing.open_session(compose(net.model(batch=1)))
    assert composing.widths(session) == (4, 8, 16)
    assert composing.batch_size(session) == 1
    assert composing.run(session, IMAGES).shape == (5, 28)


def test_embedder_says_which_levels_it_joins():
    plain_graph = NetworkGraph("own", plain().model().SerializeToString(), Pixels(SIZE), (0.5,) * 3, (0.5,) * 3)
    said = {}
    for choice, dim in (("last", 16), ("auto", 28)):
        embedder = composing.OnnxEmbedder(dataclasses.replace(plain_graph, levels=choice))
        assert (embedder.dim, sum(embedder.widths)) == (dim, dim)
        assert embedder.embed(IMAGES).shape == (5, dim)
        said[choice] = embedder.provenance["levels"]
    assert said == {"last": "features alone: backbone.levels is last", "auto": "4@8 8@4 16"}


def test_moments_must_have_the_joined_width():
    with pytest.raises(InputError, match=r"it gives 28 features, but mu and sigma have the shapes \(16,\)"):
        compose(plain().model(), mu=np.zeros(16), sigma=np.ones(16))


def test_composing_with_levels_is_deterministic():
    assert compose(inverted().model()) == compose(inverted().model())
