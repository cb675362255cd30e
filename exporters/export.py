"""Export a backbone package to one ONNX file that maps pixels to standardised embeddings.

PyTorch exports only the body. `compose` adds preprocessing and standardisation, as it does for a user's own ONNX file,
so that the graphs of all bundles have the same structure and nodes that must stay in fp32 are recognised by name.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch

from ssd_edge.backbones.embedder import network
from ssd_edge.backbones.networks import PIXEL_MEAN, PIXEL_STD
from ssd_edge.backbones.onnx import compose
from ssd_edge.backbones.onnx_file import OPSET
from ssd_edge.backbones.package import BackbonePackage
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError, require
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
    for module in ("onnx", "onnxscript"):
        require(module, "export", "export a backbone")
    body = network(package).body
    # In training mode, the exporter would silently export different numbers.
    assert not any(module.training for module in body.modules())
    pixels = Pixels.from_dict(package.card)
    batch = torch.zeros(2, 3, pixels.size, pixels.size)  # a batch of one might be exported as a constant
    with _quiet():
        program = torch.onnx.export(
            body,
            (batch,),
            input_names=["pixels"],
            output_names=["features"],
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    assert program is not None  # with dynamo=True
    model = program.model_proto  # in memory, so all weights stay in one file
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets != {"": OPSET}:  # the exporter may fall back to another opset without an error
        raise EnvironmentUnfitError(
            f"torch {torch.__version__} exported with the opsets {opsets}, but opset {OPSET} was requested; "
            "install the versions of constraints.txt"
        )
    preprocessing = (pixels, PIXEL_MEAN, PIXEL_STD, "nchw")
    try:
        data = model.SerializeToString(deterministic=True)
        return compose(data, *preprocessing, package.mu, package.sigma, package.identity)
    except InputError as error:
        raise BundleRefusedError(f"the backbone package {package.identity} cannot be exported: {error}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's progress output and its warnings about packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
