"""Networks of timm, torchvision and transformers by name, with the preprocessing that the library itself states.

Each library is imported where its name is used. It downloads the weights of a named model by itself, which is said
before; with `backbone.weights=FILE`, or `hf/FOLDER`, nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from ssd_edge import files
from ssd_edge.backbones import weights
from ssd_edge.backbones.graph import Network
from ssd_edge.config import BackboneConfig
from ssd_edge.errors import EnvironmentUnfitError, InputError, SSDEdgeError, did_you_mean, first_line, require
from ssd_edge.images import Interpolation, Pixels

Say = Callable[[str], None]

_NOT_STATED = "not stated by the library; ask the author of the weights"
_RESAMPLE: dict[int, Interpolation] = {1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's


def open_network(config: BackboneConfig, say: Say) -> Network:
    """Return the network of a library that a configuration names.

    Args:
        config: Configuration with a name such as ``timm/mobilenetv4_conv_small.e2400_r224_in1k``.
        say: Receives a message before a download.

    Raises:
        InputError: The library has no such network, or the weights do not fit it.
        EnvironmentUnfitError: The library is not installed, or the weights cannot be loaded.
    """
    library, _, name = config.name.partition("/")
    return _LIBRARIES[library](name, config, say)


def _timm(name: str, config: BackboneConfig, say: Say) -> Network:
    timm = require("timm", "timm", f"use the backbone {config.name}")
    if not timm.is_model(name):
        known = timm.list_models()
        raise InputError(f"timm has no network '{name}'.{did_you_mean(name.split('.')[0], known)}")
    stated = None
    with contextlib.suppress(RuntimeError):  # timm does not know the tag
        stated = timm.get_pretrained_cfg(name)
    if stated is None or not (config.weights or stated.has_weights):
        tags = ", ".join(timm.list_pretrained(f"{name.split('.')[0]}.*")[:5]) or "none"
        raise InputError(f"timm has no weights for '{name}' (with weights: {tags}); give a file: backbone.weights=FILE")
    options: dict[str, Any] = {"img_size": config.size} if config.size and stated.fixed_input_size else {}
    digest = ""
    if config.weights:
        tensors, digest = weights.read(Path(config.weights))
        options["pretrained_cfg_overlay"] = {"state_dict": tensors}
    with _loading(config, f"timm, from {stated.hf_hub_id or stated.url}", say):
        network = timm.create_model(name, pretrained=True, num_classes=0, **options)
    network = timm.utils.reparameterize_model(network.eval())  # joins the branches that only training needs
    data = timm.data.resolve_model_data_config(network)
    size = _square(data["input_size"][1:], config)
    interpolation = _interpolation(data["interpolation"])
    if data["crop_mode"] == "center":
        pixels = Pixels.cropped(size, data["crop_pct"], interpolation)
    else:  # "squash", or "border", which pads
        pixels = Pixels(size, "squash" if data["crop_mode"] == "squash" else "pad", 0, interpolation)
    card = {
        "arch": name.split(".")[0],
        "data": f"as its tag says: {stated.tag}" if stated.tag else "not stated",
        "terms": stated.license or _NOT_STATED,
    }
    library = f"timm {timm.__version__}"
    return _network(config, network, digest, pixels, data["mean"], data["std"], library, card)


def _torchvision(name: str, config: BackboneConfig, say: Say) -> Network:
    torchvision = require("torchvision", "torchvision", f"use the backbone {config.name}")
    models = torchvision.models
    arch, _, tag = name.partition(".")
    known = models.list_models(module=models)
    if arch not in known:
        raise InputError(f"torchvision has no classifier '{arch}'.{did_you_mean(arch, known)}")
    entries = models.get_model_weights(arch)
    if tag and tag not in entries.__members__:
        raise InputError(f"torchvision has no weights '{tag}' for {arch}; it has {', '.join(entries.__members__)}")
    stated = entries[tag] if tag else entries.DEFAULT
    if config.weights:
        network, digest = models.get_model(arch, weights=None), ""
        head = _cut_classifier(network, config.name)
        tensors, digest = weights.read(Path(config.weights))
        weights.load_into(network, tensors, config.weights, (f"{head}.", "aux", "AuxLogits."))
    else:
        digest = ""
        with _loading(config, f"torchvision, from {stated.url}", say):
            network = models.get_model(arch, weights=stated)
        _cut_classifier(network, config.name)
    preset = stated.transforms()
    interpolation = _interpolation(preset.interpolation.value)
    pixels = Pixels(_square(preset.crop_size, config), "crop", preset.resize_size[0], interpolation)
    measured = {data: values["acc@1"] for data, values in stated.meta.get("_metrics", {}).items() if "acc@1" in values}
    card: dict[str, Any] = {"arch": arch, "terms": stated.meta.get("license") or _NOT_STATED}
    for data, accuracy in measured.items():
        card |= {"data": data, "accuracy": {"top1": round(accuracy / 100, 4), "on": f"{data}, as torchvision states"}}
    library = f"torchvision {torchvision.__version__}, {stated}"
    return _network(config, network, digest, pixels, preset.mean, preset.std, library, card)


def _hf(name: str, config: BackboneConfig, say: Say) -> Network:
    transformers = require("transformers", "hf", f"use the backbone {config.name}")
    if config.weights:
        raise InputError(
            f"{config.name} needs config.json beside its weights, so backbone.weights does not apply; give the folder: "
            "backbone=hf/FOLDER"
        )
    local = files.is_folder(Path(name))
    options = {"local_files_only": local}
    with _loading(config, "" if local else f"transformers, from huggingface.co/{name}", say):
        network, loaded = transformers.AutoModel.from_pretrained(name, output_loading_info=True, **options)
        stated = transformers.AutoImageProcessor.from_pretrained(name, **options).to_dict()
        card_text = _readme(name, local)
    missing = [key for key in loaded["missing_keys"] if not key.startswith("pooler.")]
    if missing:
        raise InputError(f"the weights of {config.name} lack {', '.join(missing[:3])}; choose a complete model")
    pooler = len(missing) == len(loaded["missing_keys"])  # a pooler without weights would be random
    licence = re.search(r"^license:\s*['\"]?([^\s'\"]+)", card_text, re.MULTILINE)
    normal = stated.get("do_normalize", True)
    mean, std = (stated["image_mean"], stated["image_std"]) if normal else ((0.0,) * 3, (1.0,) * 3)
    card = {
        "arch": type(network).__name__,
        "data": "see its model card",
        "terms": licence[1] if licence else _NOT_STATED,
    }
    library = f"transformers {transformers.__version__}"
    pooled = Pooled(getattr(network, "vision_model", network), pooler)
    return _network(config, pooled, "", _processed(stated, config), mean, std, library, card)


class Pooled(nn.Module):
    """One vector per image of a vision model of transformers.

    Args:
        model: The model.
        pooler: Its pooled output is used if it has one; otherwise the mean of a feature map, or the class token.
    """

    def __init__(self, model: nn.Module, pooler: bool) -> None:
        super().__init__()
        self.model, self.pooler = model, pooler

    def forward(self, images: Tensor) -> Tensor:
        """Return features ``(N, D)`` of float pixels ``(N, 3, H, W)``."""
        output = self.model(pixel_values=images)
        pooled = getattr(output, "pooler_output", None) if self.pooler else None
        if pooled is None:
            last: Tensor = output.last_hidden_state
            pooled = last.mean((2, 3)) if last.ndim == 4 else last[:, 0]
        return cast(Tensor, pooled.flatten(1))


def _processed(stated: Mapping[str, Any], config: BackboneConfig) -> Pixels:
    """Return the pixels of an image processor of transformers."""
    size = stated.get("size") or {}
    interpolation = _RESAMPLE.get(int(stated.get("resample") or 2), "bilinear")
    crop = stated.get("crop_size") or {}
    shorter = size.get("shortest_edge")
    if stated.get("crop_pct") and shorter and shorter < 384:  # ConvNeXt: then the whole image is squashed
        return Pixels.cropped(shorter, stated["crop_pct"], interpolation)
    if stated.get("do_center_crop") and crop:
        side = _square((crop.get("height", 0), crop.get("width", 0)), config)
        return Pixels(side, "crop", max(side, shorter or size.get("height") or side), interpolation)
    if shorter:
        return Pixels(shorter, "squash" if stated.get("crop_pct") else "crop", 0, interpolation)
    return Pixels(_square((size.get("height", 0), size.get("width", 0)), config), "squash", 0, interpolation)


def _readme(name: str, local: bool) -> str:
    """Return the model card of a repository or a folder; empty if it has none."""
    with contextlib.suppress(Exception):  # what the hub raises differs between versions; the card is only shown
        path = Path(name) / "README.md"
        if not local:
            hub = require("huggingface_hub", "hf", "read a model card")
            path = Path(hub.hf_hub_download(name, "README.md"))
        return files.read_bytes(path).decode("utf-8", errors="replace")
    return ""


def _network(
    config: BackboneConfig,
    network: nn.Module,
    digest: str,
    pixels: Pixels,
    mean: Any,
    std: Any,
    library: str,
    card: Mapping[str, Any],
) -> Network:
    """Return a network of a library; `digest` is that of the user's own file of weights, if any."""
    network = network.eval()
    known: dict[str, Any] = dict(card)
    if config.weights:
        known = {"arch": card["arch"], "file": Path(config.weights).name, "terms": "those of the author of the weights"}
    return Network(
        arch=f"{library}: {config.name}",
        weights=_digest(network),
        build=lambda: network,
        pixels=pixels,
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        card={**known, "source": library, "sha256": digest or _digest(network)},
    )


def _digest(network: nn.Module) -> str:
    """Return a digest of the names, shapes and values of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else b"")
    return digest.hexdigest()


def _cut_classifier(network: nn.Module, name: str) -> str:
    """Replace the last linear layer, the classifier, by nothing, and return its name.

    Raises:
        InputError: There is none.
    """
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise InputError(f"{name} ends in no linear classifier, so its features are unknown; choose another network")
    head: str = linear[-1]
    parent, _, last = head.rpartition(".")
    setattr(network.get_submodule(parent), last, nn.Identity())
    return head


@contextlib.contextmanager
def _loading(config: BackboneConfig, source: str, say: Say) -> Iterator[None]:
    """Say that weights are downloaded unless they are local, and give errors of the library their meaning."""
    local = bool(config.weights) or not source
    if not local:
        say(f"loading the weights of {config.name} with {source}; they are downloaded unless its cache has them")
    try:
        yield
    except SSDEdgeError:
        raise
    except Exception as error:  # each library has its own
        reason = f"({type(error).__name__}: {first_line(error)[:200]})"
        if local:
            where = config.weights or config.name
            raise InputError(f"the weights in {where} cannot be used for {config.name} {reason}") from error
        raise EnvironmentUnfitError(
            f"the weights of {config.name} cannot be loaded {reason}; check the name and the connection, or download "
            "them elsewhere and set backbone.weights=FILE"
        ) from error


def _square(sides: Any, config: BackboneConfig) -> int:
    """Return the side of a square input, given as one or two numbers."""
    if min(sides) != max(sides) or min(sides) < 1:
        raise InputError(f"{config.name} takes images of {' × '.join(map(str, sides))} pixels, but a square is needed")
    return int(sides[0])


def _interpolation(name: str) -> Interpolation:
    """Return a filter by the library's name for it; an unknown one (timm: random, nearest) is replaced by bicubic."""
    return cast(Interpolation, name) if name in get_args(Interpolation) else "bicubic"


_LIBRARIES = {"timm": _timm, "torchvision": _torchvision, "hf": _hf}
