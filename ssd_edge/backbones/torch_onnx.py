"""Export a PyTorch network to ONNX bytes."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from ssd_edge.backbones.onnx_file import OPSET
from ssd_edge.errors import EnvironmentUnfitError, require

INPUT, OUTPUT = "pixels", "features"


def export(network: nn.Module, size: int) -> bytes:
    """Export a network to ONNX, with the same bytes for the same versions of torch and onnxscript.

    Args:
        network: Network in evaluation mode from float pixels ``(N, 3, size, size)`` to features ``(N, D)``.
        size: Side of the input in pixels.

    Returns:
        A model in opset 18 with a dynamic batch. It contains no path or name of this machine.

    Raises:
        EnvironmentUnfitError: onnx or onnxscript is missing, or the installed versions write another opset.
    """
    require_exporter()
    # In training mode, the exporter would silently export different numbers.
    assert not any(module.training for module in network.modules())
    pixels = torch.zeros(2, 3, size, size)  # a batch of one might be exported as a constant
    with _quiet():
        program = torch.onnx.export(
            network,
            (pixels,),
            input_names=[INPUT],
            output_names=[OUTPUT],
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
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def require_exporter() -> dict[str, str]:
    """Return the versions of the packages that an export depends on.

    Raises:
        EnvironmentUnfitError: onnx or onnxscript is missing.
    """
    modules = {name: require(name, "train", "export a backbone") for name in ("onnx", "onnxscript")}
    return {"torch": torch.__version__, **{name: module.__version__ for name, module in modules.items()}}


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
