"""Export a backbone package to one ONNX file that maps pixels to standardised embeddings.

PyTorch exports only the body. `compose` adds preprocessing and standardisation, as it does for a user's own ONNX file,
so that the graphs of all bundles have the same structure and nodes that must stay in fp32 are recognised by name.
"""

from __future__ import annotations

from ssd_edge.backbones import torch_onnx
from ssd_edge.backbones.embedder import network
from ssd_edge.backbones.networks import PIXEL_MEAN, PIXEL_STD
from ssd_edge.backbones.onnx import compose
from ssd_edge.backbones.package import BackbonePackage
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.images import Pixels


def export_package(package: BackbonePackage) -> bytes:
    """Export the embedding network to ONNX, with the same bytes for the same versions of torch and onnxscript.

    Args:
        package: A trained backbone.

    Returns:
        A model in fp32 and opset 18 with the input `images`, uint8 RGB ``(batch, size, size, 3)``, and the output
        `embeddings`, float32 ``(batch, D)``. It contains no path or name of this machine.

    Raises:
        EnvironmentUnfitError: onnx or onnxscript is missing, or the installed versions write another opset.
        BundleRefusedError: The weights do not match the architecture, or give NaN.
    """
    pixels = Pixels.from_dict(package.card)
    data = torch_onnx.export(network(package).body, pixels.size)
    preprocessing = (pixels, PIXEL_MEAN, PIXEL_STD, "nchw")
    try:
        return compose(data, *preprocessing, package.mu, package.sigma, package.identity)
    except InputError as error:
        raise BundleRefusedError(f"the backbone package {package.identity} cannot be exported: {error}") from error
