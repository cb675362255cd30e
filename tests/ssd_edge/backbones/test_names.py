"""Backbones by name: what each name gives, what is cached and pinned, and which names are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ssd_edge import files
from ssd_edge.backbones import lite, names, torch_onnx, weights
from ssd_edge.backbones.embedder import open_backbone
from ssd_edge.backbones.graph import Network
from ssd_edge.backbones.onnx import open_session
from ssd_edge.backbones.wheels import IMAGENET_MEAN, IMAGENET_STD, WHEELS, Wheel, joined
from ssd_edge.config import BackboneConfig, TrainConfig, merge, parse
from ssd_edge.errors import EnvironmentUnfitError, InputError
from ssd_edge.images import Pixels

CPU = torch.device("cpu")


def silent(text: str) -> None:
    """Ignore a message."""


def resolved(name: str, **settings) -> names.NetworkGraph:
    return names.resolve(BackboneConfig(name, **settings), silent)


def small_net() -> torch.nn.Module:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, 2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    return net.eval()


NETWORK = Network("small", "digest", small_net, Pixels(16, "crop", 20), (0.5,) * 3, (0.25,) * 3, {"terms": "MIT"})


@pytest.fixture
def small_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `lite0` be a network that exports in a second."""
    monkeypatch.setattr(names, "_from_wheel", lambda config: NETWORK)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "lite1",
            r"unknown backbone 'lite1'. Did you mean 'lite\d'\? Known: lite0, lite2, mobilenet-v3-small, tiny, tim",
        ),
        ("resnet50", r"unknown backbone 'resnet50'\. Known: .*timm/NAME, torchvision/NAME, hf/NAME, onnx:FILE"),
        ("timm/", r"unknown backbone 'timm/'"),
        ("", r"unknown backbone ''"),
        ("package:/nowhere", "is not a backbone package"),
        ("onnx:/nowhere.onnx", r"/nowhere\.onnx does not exist"),
    ],
)
def test_a_wrong_name_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_backbone(BackboneConfig(name), CPU)


def test_the_short_form_on_the_command_line() -> None:
    assert parse(TrainConfig, merge({}, ["backbone=tiny"])).backbone.name == "tiny"
    assert parse(TrainConfig, merge({}, [])).backbone.name == "lite0"


def test_a_package_has_its_settings_inside() -> None:
    assert names.package_folder(BackboneConfig("lite0", size=5)) is None
    assert names.package_folder(BackboneConfig("package:a/b")) == Path("a/b")
    for setting in ({"size": 32}, {"mean": (0.5,) * 3}, {"weights": "x.pth"}, {"fit": "crop"}):
        with pytest.raises(InputError, match=rf"backbone.{next(iter(setting))} is fixed in a package \(tiny\)"):
            open_backbone(BackboneConfig("tiny", **setting), CPU)


def test_every_path_in_a_configuration_becomes_absolute() -> None:
    found = {
        name: names.with_paths(BackboneConfig(name, weights="w"), lambda path: f"/at/{path}" if path else "").name
        for name in ("onnx:a.onnx", "package:b", "hf/c", "timm/d", "lite0")
    }
    assert list(found.values()) == ["onnx:/at/a.onnx", "package:/at/b", "hf//at/c", "timm/d", "lite0"]
    assert names.with_paths(BackboneConfig(weights="w"), lambda path: f"/at/{path}").weights == "/at/w"


@pytest.mark.usefixtures("small_wheel")
def test_a_network_is_exported_once_and_runs_like_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    graph = names.resolve(BackboneConfig(), said.append)
    assert said == ["exporting lite0 to ONNX, once for this version of torch"]
    assert (graph.pixels, graph.mean, graph.layout) == (NETWORK.pixels, NETWORK.mean, "nchw")
    assert graph.card["terms"] == "MIT"
    assert set(graph.card["versions"]) == {"torch", "onnx", "onnxscript"}
    pixels = np.random.default_rng(0).standard_normal((5, 3, 16, 16)).astype(np.float32)
    got = open_session(graph.model).run(None, {torch_onnx.INPUT: pixels})[0]
    np.testing.assert_allclose(got, small_net()(torch.from_numpy(pixels)).detach().numpy(), atol=1e-6)
    monkeypatch.setattr(torch_onnx, "export", None)
    assert names.resolve(BackboneConfig(), said.append) == graph  # from the cache
    with pytest.raises(InputError, match="lite0 cannot be exported to ONNX at 24 pixels"):
        resolved("lite0", size=24)  # another size is another graph


@pytest.mark.usefixtures("small_wheel")
def test_settings_replace_single_values_of_the_preprocessing() -> None:
    own = resolved("lite0")
    crop = resolved("lite0", size=32)
    assert crop.pixels == Pixels(32, "crop", 40)  # the share of the shorter side stays
    assert resolved("lite0", resize=18).pixels == Pixels(16, "crop", 18)
    assert resolved("lite0", fit="squash", interpolation="box").pixels == Pixels(16, "squash", 0, "box")
    assert resolved("lite0", mean=(0.1, 0.2, 0.3)).mean == (0.1, 0.2, 0.3)
    assert resolved("lite0", mean=(0.1, 0.2, 0.3)).std == own.std
    assert len({own.identity, crop.identity, resolved("lite0", std=(1, 1, 1)).identity}) == 3
    with pytest.raises(InputError, match=r"backbone.resize=18 is for backbone.fit=crop, but the fit is pad"):
        resolved("lite0", fit="pad", resize=18)


def conv(path: Path, side: int | str = 8, external: bool = False) -> Path:
    """Write an ONNX network."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["y"]),
    ]
    weight = np.random.default_rng(0).standard_normal((40, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, side, side])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 40])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, str(path), save_as_external_data=external, location="weights.data", size_threshold=0)
    return path


def test_a_file_of_the_user(tmp_path: Path) -> None:
    path = conv(tmp_path / "own.onnx")
    graph = resolved(f"onnx:{path}")
    assert (graph.pixels, graph.mean, graph.std) == (Pixels(8), IMAGENET_MEAN, IMAGENET_STD)
    assert graph.card["name"] == "onnx:own.onnx"  # cards leave the machine: no folder
    assert graph.card["sha256"] == files.sha256(path.read_bytes())
    assert resolved(f"onnx:{path}", fit="pad").pixels.fit == "pad"
    with pytest.raises(
        InputError, match=r"backbone.weights is for networks of a library, but onnx:\S+ has its weights"
    ):
        resolved(f"onnx:{path}", weights="w.pth")
    with pytest.raises(InputError, match=r"backbone.name=onnx:\S+any.onnx: backbone.size is missing"):
        resolved(f"onnx:{conv(tmp_path / 'any.onnx', 's')}")


# Packages of PyPI


def test_weights_in_another_file_are_joined(tmp_path: Path) -> None:
    path = conv(tmp_path / "split.onnx", external=True)
    together = conv(tmp_path / "one.onnx")
    pixels = {"x": np.ones((1, 3, 8, 8), np.float32)}
    got, expected = (open_session(data).run(None, pixels)[0] for data in (joined(path), together.read_bytes()))
    np.testing.assert_array_equal(got, expected)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, extra in (("lite0", "train"), ("lite2", "lite2"), ("mobilenet-v3-small", "mobilenet")):
        absent = dataclasses.replace(WHEELS[name], package="no-such-package")
        monkeypatch.setitem(WHEELS, name, absent)
        with pytest.raises(EnvironmentUnfitError, match=rf"is not installed; .*pip install 'ssd-edge\[{extra}\]'"):
            resolved(name)


def test_a_changed_file_of_a_package_is_refused() -> None:
    changed = Wheel("numpy", "2", "x", {"numpy/__init__.py": "0" * 64}, Pixels(8), (), (), {})
    with pytest.raises(EnvironmentUnfitError, match=r"__init__\.py of numpy .* is not the file .*--force-reinstall"):
        changed.locate()


def test_own_weights_of_a_known_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = lite.lite0()
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in net.state_dict().items()}}, tmp_path / "own.pth"
    )
    network = names._from_wheel(BackboneConfig(weights=str(tmp_path / "own.pth")))
    assert network.card["source"] == "own.pth"
    assert network.card["terms"] == "those of the author of the weights"
    assert "accuracy" not in network.card
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(network.build()(x), net.eval()(x))


# The real ones


def present(name: str) -> Wheel:
    try:
        WHEELS[name].locate()
    except EnvironmentUnfitError as error:
        pytest.skip(f"NOT RUN: {error}")
    return WHEELS[name]


@pytest.mark.parametrize(("name", "blocks"), [("lite0", 16), ("lite2", 21)])
def test_the_published_weights_fit_the_network(name: str, blocks: int) -> None:
    """They have a classifier over 1,000 classes, which tells a photograph."""
    sample = pytest.importorskip("sklearn.datasets").load_sample_image("china.jpg")
    wheel = present(name)
    path = wheel.locate()
    network = wheel.build(path)
    assert len(network._blocks) == blocks
    tensors, _ = weights.read(path)
    from PIL import Image

    from ssd_edge import images

    pixels = images.to_array(Image.fromarray(sample), "china", wheel.pixels)
    x = (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    with torch.inference_mode():
        scores = network(x) @ tensors["_fc.weight"].T + tensors["_fc.bias"]
    assert int(scores.argmax()) == 698  # palace


def test_same_padding_is_that_of_tensorflow() -> None:
    """An even input and stride 2 gets one pixel, at the right and at the bottom."""
    conv = lite.SameConv(1, 1, 3, 2, bias=False)
    torch.nn.init.ones_(conv.weight)
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    expected = [[x[0, 0, i : i + 3, j : j + 3].sum() for j in (0, 2)] for i in (0, 2)]
    assert conv(x)[0, 0].tolist() == expected


def test_the_onnx_package_is_one_file_with_a_dynamic_batch() -> None:
    present("mobilenet-v3-small")
    embedder = open_backbone(BackboneConfig("mobilenet-v3-small", levels="last"), CPU)
    assert (embedder.dim, embedder.pixels.resize, embedder.provenance["batch"]) == (576, 256, "dynamic")
    assert embedder.embed(np.zeros((3, 224, 224, 3), np.uint8)).shape == (3, 576)


# Weights


def test_a_file_of_weights_runs_no_code(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"a": Harmful()}, tmp_path / "bad.pth")
    with pytest.raises(InputError, match=r"bad\.pth is no file of weights"):
        weights.read(tmp_path / "bad.pth")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", b"\x08\0\0\0\0\0\0\0{broken"])
def test_a_damaged_file_of_weights_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(InputError, match="is no file of weights"):
        weights.read(tmp_path / "w")


def test_other_things_than_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "a": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="contains other things than named tensors"):
        weights.read(tmp_path / "w.pth")


def test_weights_that_do_not_fit_are_refused() -> None:
    net, fitting = small_net(), small_net().state_dict()
    weights.load_into(net, {**fitting, "head.weight": torch.zeros(1)}, "w", ("head.",))
    for wrong, message in (
        ({"0.bias": fitting["0.bias"]}, r"1 missing \(0.weight\), 0 left over"),
        ({**fitting, "more": torch.zeros(1)}, r"0 missing \(\), 1 left over \(more\)"),
        ({**fitting, "0.bias": torch.zeros(9)}, "do not fit the network"),
    ):
        with pytest.raises(InputError, match=message):
            weights.load_into(net, wrong, "w")
