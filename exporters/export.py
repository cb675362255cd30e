"""A backbone package → one ONNX file: pixels in, standardised embeddings out.

PyTorch exports the body alone. Preprocessing and standardisation are put around it by the same `compose` that a
user's own ONNX goes through: every bundle's graph has one shape, and what must stay in fp32 is known by its name.
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


def export_package(package: BackbonePackage) -> bytes:
    """The embedding network as ONNX, the same bytes each time with the same versions of torch and onnxscript.

    Args:
        package: a trained backbone.

    Returns:
        A model in fp32 and opset 18 with the input `images`, uint8 RGB ``(batch, size, size, 3)``, and the
        output `embeddings`, float32 ``(batch, D)``. It holds no path and no name of this machine.

    Raises:
        EnvironmentUnfitError: onnx or onnxscript is missing, or these versions write another opset.
        BundleRefusedError: weights that do not fit the architecture, or that give NaN.
    """
    for module in ("onnx", "onnxscript"):
        require(module, "export", "export a backbone")
    body = network(package).body
    # In training mode the exporter warns of nothing and exports other numbers.
    assert not any(module.training for module in body.modules())
    size = package.card["size"]
    pixels = torch.zeros(2, 3, size, size)  # two: a batch of one may be taken for a constant
    with _quiet():
        program = torch.onnx.export(
            body,
            (pixels,),
            input_names=["pixels"],
            output_names=["features"],
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    model = program.model_proto  # in memory, with all its weights: no second file can come about
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets != {"": OPSET}:  # the exporter may fall back to another opset without an error
        raise EnvironmentUnfitError(
            f"torch {torch.__version__} exported with the opsets {opsets}, but {OPSET} was asked for; "
            "install the versions of constraints.txt"
        )
    preprocessing = (size, PIXEL_MEAN, PIXEL_STD, "nchw")
    try:
        data = model.SerializeToString(deterministic=True)
        return compose(data, *preprocessing, package.mu, package.sigma, package.identity)
    except InputError as error:
        raise BundleRefusedError(f"the backbone package {package.identity} cannot be exported: {error}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and its remarks on packages that are not installed to itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
