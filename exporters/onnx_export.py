"""A backbone package → one ONNX file: pixels in, standardised embeddings out."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch

from ssd_edge.backbones.embedder import network
from ssd_edge.backbones.onnx import EMBEDDINGS, INPUT, finish
from ssd_edge.backbones.onnx_file import OPSET
from ssd_edge.backbones.package import BackbonePackage
from ssd_edge.errors import EnvironmentUnfitError, require


def export_package(package: BackbonePackage) -> bytes:
    """The embedding network as ONNX, the same bytes each time with the same versions of torch and onnxscript.

    Args:
        package: a trained backbone.

    Returns:
        A model in fp32 and opset 18 with the input `images`, uint8 RGB ``(batch, size, size, 3)``, and the
        output `embeddings`, float32 ``(batch, D)``. It holds no path and no name of this machine.

    Raises:
        EnvironmentUnfitError: onnx or onnxscript is missing, or these versions write another opset.
        BundleRefusedError: weights that do not fit the architecture.
    """
    for module in ("onnx", "onnxscript"):
        require(module, "export", "export a backbone")
    embedding_network = network(package)
    # In training mode the exporter warns of nothing and exports other numbers.
    assert not any(module.training for module in embedding_network.modules())
    size = package.card["size"]
    images = torch.zeros(2, size, size, 3, dtype=torch.uint8)  # two: a batch of one may be taken for a constant
    with _quiet():
        program = torch.onnx.export(
            embedding_network,
            (images,),
            input_names=[INPUT],
            output_names=[EMBEDDINGS],
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
    return finish(model, package.identity, size, package.card["dim"])


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
