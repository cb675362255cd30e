"""A network as an ONNX graph with all that is needed to use it as a backbone, wherever it comes from.

`names` makes one of a name; `onnx.OnnxEmbedder` runs it. A run keeps it in its folder, so that evaluating, deploying
and resuming need neither the library nor the file that it was made from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssd_edge import files
from ssd_edge.backbones.levels import Choice
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.images import Pixels

if TYPE_CHECKING:
    from torch import nn

MODEL, DESCRIPTION = "backbone.onnx", "backbone.json"  # in the folder of a run


@dataclasses.dataclass(frozen=True)
class Network:
    """A network as its source describes it, before the configuration changes its preprocessing.

    Attributes:
        arch: Everything but the weights that determines the network; part of the cache key.
        weights: Digest of the weights.
        build: Returns the network in evaluation mode, from float pixels ``(N, 3, size, size)`` to ``(N, D)``.
        pixels, mean, std: Preprocessing that it was trained with.
        card: See `NetworkGraph`.
    """

    arch: str
    weights: str
    build: Callable[[], nn.Module]
    pixels: Pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    card: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class NetworkGraph:
    """A network and its preprocessing.

    Attributes:
        name: Name in the configuration (`backbone.name`); may contain a path.
        model: ONNX file from normalised pixels, float, to features ``(N, D)``.
        pixels: How an image becomes the input.
        mean: Mean per channel, for pixels in 0..1.
        std: Standard deviation per channel.
        layout: Order of the input axes, ``nchw`` or ``nhwc``.
        allow_control_flow: Accept loops and branches.
        levels: Levels that are joined with the features, see `levels.find`.
        card: Provenance for people: source, architecture, hash, data, accuracy, `terms` (the licence), versions. It
            goes into bundles and contains no path.
    """

    name: str
    model: bytes
    pixels: Pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: str = "nchw"
    allow_control_flow: bool = False
    levels: Choice = "last"
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Short digest of everything that determines the features of an image."""
        parts = {"model": files.sha256(self.model), "pixels": self.pixels.to_dict(), **self._settings()}
        return files.sha256(files.json_bytes(parts))[:16]

    def _settings(self) -> dict[str, Any]:
        return {"mean": list(self.mean), "std": list(self.std), "layout": self.layout, "levels": self.levels}

    def to_dict(self) -> dict[str, Any]:
        """Return everything but name, model, pixels and card as JSON values; the model is named by its digest."""
        return {
            "sha256": files.sha256(self.model),
            **self._settings(),
            "allow_control_flow": self.allow_control_flow,
        }


def load(folder: Path) -> NetworkGraph:
    """Load the network that a run keeps.

    Raises:
        InputError: A file is missing.
        BundleRefusedError: A file is damaged.
    """
    description, model = files.read_json(folder / DESCRIPTION), files.read_bytes(folder / MODEL)
    try:
        values = dict(description["graph"])
        if files.sha256(model) != values.pop("sha256"):
            raise BundleRefusedError(f"{folder / MODEL} is not the network that the run was made with; restore it")
        pixels = Pixels.from_dict(description)
        mean, std = (tuple(map(float, values.pop(key))) for key in ("mean", "std"))
        return NetworkGraph(description["name"], model, pixels, mean, std, card=description["provenance"], **values)
    except (KeyError, TypeError, ValueError, InputError) as error:
        raise BundleRefusedError(f"{folder / DESCRIPTION} is damaged ({error!r}); restore it") from error
