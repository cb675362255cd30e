"""Networks of timm, torchvision and transformers, with random weights: what is loaded, and with which preprocessing.

The libraries are not part of the `dev` extra, because torchvision exists on PyPI only for a CUDA build of PyTorch; the
tests skip without them. To run them: ``pip install --target FOLDER --no-deps timm torchvision transformers …``, with
what these import, and FOLDER on ``PYTHONPATH``. An export takes half a minute on a busy core: those tests are slow.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssd_edge import images
from ssd_edge.backbones import libraries, lite, names, torch_onnx
from ssd_edge.backbones.graph import NetworkGraph
from ssd_edge.backbones.onnx import OnnxEmbedder, open_session
from ssd_edge.config import BackboneConfig
from ssd_edge.errors import EnvironmentUnfitError, InputError
from ssd_edge.images import Pixels

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
DECLARED: list[torch.library.Library] = []  # an operator lives as long as the library that declares it


@pytest.fixture(scope="module", autouse=True)
def _operators_of_torchvision() -> None:
    """Declare torchvision's operators for detection.

    timm imports torchvision, which registers stand-ins for operators of its C++ library. The library of PyPI's CUDA
    build does not load beside PyTorch for the CPU, so they are unknown. No classifier calls them.
    """
    DECLARED.append(torch.library.Library("torchvision", "FRAGMENT"))
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            DECLARED[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any download fail at once."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: (_ for _ in ()).throw(OSError("no network in tests")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def library(name: str) -> ModuleType:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"NOT RUN: {name} is not installed")
    return importlib.import_module(name)


def resolved(name: str, **settings: Any) -> NetworkGraph:
    return names.resolve(BackboneConfig(name, **settings), lambda text: None)


def features(graph: NetworkGraph, pixels: torch.Tensor) -> np.ndarray:
    return open_session(graph.model).run(None, {torch_onnx.INPUT: pixels.numpy()})[0]


def photograph(width: int = 90, height: int = 70) -> Image.Image:
    """Return a smooth picture: filters differ little on it, and their positions are visible."""
    coarse = RNG.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def normalised(graph: NetworkGraph, image: Image.Image) -> torch.Tensor:
    """Return the input of the network as this project makes it."""
    pixels = images.to_array(image, "image", graph.pixels)
    return torch.from_numpy((pixels / 255 - np.array(graph.mean)) / np.array(graph.std)).float().permute(2, 0, 1)[None]


# timm


@pytest.fixture
def timm_weights(tmp_path: Path) -> Path:
    timm = library("timm")
    torch.manual_seed(0)
    torch.save(timm.create_model("mobilenetv4_conv_small", pretrained=False).state_dict(), tmp_path / "net.pth")
    return tmp_path / "net.pth"


@pytest.mark.slow
def test_timm_with_local_weights(timm_weights: Path) -> None:
    timm = library("timm")
    name = "timm/mobilenetv4_conv_small.e2400_r224_in1k"
    graph = resolved(name, weights=str(timm_weights), size=64)
    assert graph.pixels == Pixels(64, "crop", 73, "bicubic")  # crop_pct 0.875
    assert (graph.mean, graph.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert graph.card["terms"] == "those of the author of the weights"
    own = timm.create_model("mobilenetv4_conv_small", pretrained=False, num_classes=0).eval()
    own.load_state_dict(
        {key: value for key, value in torch.load(timm_weights, weights_only=True).items() if "classifier" not in key}
    )
    x = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        np.testing.assert_allclose(features(graph, x), own(x).numpy(), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_pixels_are_those_of_timm(timm_weights: Path) -> None:
    timm = library("timm")
    graph = resolved("timm/mobilenetv4_conv_small.e2400_r224_in1k", weights=str(timm_weights))
    network = timm.create_model("mobilenetv4_conv_small.e2400_r224_in1k", pretrained=False)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    image = photograph(400, 300)
    assert float((transform(image)[None] - normalised(graph, image)).abs().max()) < 0.05  # two steps of 255


def test_timm_states_licence_and_says_before_it_downloads() -> None:
    library("timm")
    said: list[str] = []
    with pytest.raises(EnvironmentUnfitError, match=r"cannot be loaded \(.*backbone.weights=FILE") as refused:
        names.resolve(BackboneConfig("timm/mobilenetv4_conv_small.e2400_r224_in1k"), said.append)
    assert "loading the weights of timm/mobilenetv4_conv_small" in said[0]
    assert "downloaded unless its cache has them" in said[0]
    assert "\n" not in str(refused.value)


def test_wrong_names_of_timm(timm_weights: Path) -> None:
    library("timm")
    with pytest.raises(InputError, match=r"timm has no network 'resnet5x'. Did you mean 'resnet5"):
        resolved("timm/resnet5x")
    with pytest.raises(InputError, match=r"timm has no weights for 'resnet50.nothing' \(with weights: resnet50\."):
        resolved("timm/resnet50.nothing")
    with pytest.raises(InputError, match=r"the weights in \S+net.pth cannot be used for timm/resnet18"):
        resolved("timm/resnet18.a1_in1k", weights=str(timm_weights))


@pytest.mark.slow
def test_a_vit_of_another_size() -> None:
    """Its position embedding depends on the size, so timm makes it for that size."""
    timm = library("timm")
    network = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    folder = Path(os.environ["SSD_EDGE_CACHE"])
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), folder / "vit.pth")
    graph = resolved("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", weights=str(folder / "vit.pth"), size=64)
    assert features(graph, torch.zeros(2, 3, 64, 64)).shape == (2, 192)


@pytest.mark.parametrize(("name", "own"), [("lite0", lite.lite0), ("lite2", lite.lite2)])
def test_the_own_lite_networks_are_those_of_timm(name: str, own: Callable[[], torch.nn.Module]) -> None:
    timm = library("timm")
    torch.manual_seed(0)
    theirs, ours = timm.create_model(f"tf_efficientnet_{name}", pretrained=False, num_classes=0).eval(), own().eval()
    values = list(theirs.state_dict().values())  # in the same order, under other names
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))
    for size in (64, 75):  # an odd one is padded in another way
        x = torch.randn(2, 3, size, size)
        with torch.inference_mode():
            torch.testing.assert_close(ours(x), theirs(x))


# torchvision


@pytest.mark.slow
def test_torchvision_with_local_weights(tmp_path: Path) -> None:
    models = library("torchvision").models
    torch.manual_seed(0)
    network = models.mobilenet_v3_small(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "net.pth")
    graph = resolved("torchvision/mobilenet_v3_small", weights=str(tmp_path / "net.pth"))
    assert graph.pixels == Pixels(224, "crop", 256, "bilinear")
    network.classifier[-1] = torch.nn.Identity()
    x = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        np.testing.assert_allclose(features(graph, x), network(x).numpy(), atol=1e-5)
    image = photograph(400, 300)
    stated = models.get_model_weights("mobilenet_v3_small").DEFAULT.transforms()(image)[None]
    assert float((stated - normalised(graph, image)).abs().max()) < 0.05


def test_wrong_names_of_torchvision(tmp_path: Path) -> None:
    library("torchvision")
    with pytest.raises(InputError, match=r"torchvision has no classifier 'resnet5'. Did you mean 'resnet"):
        resolved("torchvision/resnet5")
    with pytest.raises(InputError, match=r"no weights 'V9' for resnet18; it has IMAGENET1K_V1"):
        resolved("torchvision/resnet18.V9")
    torch.save({"a": torch.zeros(1)}, tmp_path / "net.pth")
    with pytest.raises(InputError, match=r"do not fit the network: \d+ missing"):
        resolved("torchvision/resnet18", weights=str(tmp_path / "net.pth"))
    with pytest.raises(InputError, match="ends in no linear classifier"):
        resolved("torchvision/squeezenet1_1", weights=str(tmp_path / "net.pth"))


# transformers


@pytest.mark.slow
def test_a_folder_of_transformers(tmp_path: Path) -> None:
    transformers = library("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    network = transformers.ResNetModel(config).eval()
    network.save_pretrained(tmp_path)
    processor = transformers.ConvNextImageProcessor(
        size={"shortest_edge": 56}, crop_pct=0.875, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    processor.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    graph = resolved(f"hf/{tmp_path}")
    assert graph.pixels == Pixels(56, "crop", 64, "bilinear" if processor.resample == 2 else "bicubic")
    assert (graph.mean, graph.std, graph.card["terms"]) == ((0.5,) * 3, (0.25,) * 3, "mit")
    assert graph.card["name"] == f"hf/{tmp_path.name}"
    x = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        np.testing.assert_allclose(features(graph, x), network(x).pooler_output.flatten(1).numpy(), atol=1e-5)
    embedder = OnnxEmbedder(dataclasses.replace(graph, levels="last"))
    assert embedder.embed(np.zeros((3, 56, 56, 3), np.uint8)).shape == (3, 16)
    with pytest.raises(InputError, match=r"backbone.weights does not apply"):
        resolved(f"hf/{tmp_path}", weights="x.pth")


@pytest.mark.slow
def test_a_vit_without_a_trained_pooler_gives_its_class_token(tmp_path: Path) -> None:
    transformers = library("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16
    )
    network = transformers.ViTModel(config, add_pooling_layer=False).eval()
    network.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    graph = resolved(f"hf/{tmp_path}")
    assert graph.pixels.fit == "squash"
    assert graph.pixels.size == 32
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        np.testing.assert_allclose(features(graph, x), network(x).last_hidden_state[:, 0].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224},
          "resample": 3}, Pixels(224, "crop", 256, "bicubic")),
        ({"size": {"height": 224, "width": 224}, "resample": 2}, Pixels(224, "squash", 0, "bilinear")),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3}, Pixels(224, "crop", 256, "bicubic")),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875, "resample": 3}, Pixels(384, "squash", 0, "bicubic")),
        ({"size": {"height": 256, "width": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}},
         Pixels(224, "crop", 256, "bilinear")),
    ],
)  # fmt: skip
def test_image_processors_of_transformers(stated: dict[str, Any], expected: Pixels) -> None:
    assert libraries._processed(stated, BackboneConfig("hf/x")) == expected


@pytest.mark.parametrize(
    ("name", "extra"), [("timm/resnet18", "timm"), ("torchvision/resnet18", "torchvision"), ("hf/a/b", "hf")]
)
def test_a_missing_library_names_its_extra(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(module: str) -> ModuleType:
        raise ImportError(f"No module named '{module}'")

    monkeypatch.setattr("ssd_edge.errors.importlib.import_module", absent)
    with pytest.raises(EnvironmentUnfitError, match=rf"is needed to use the backbone {name}.*'ssd-edge\[{extra}\]'"):
        resolved(name)
