"""Read a file of weights: safetensors, or PyTorch's own format restricted to tensors (`torch.load`, `weights_only`)."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from ssd_edge import files
from ssd_edge.errors import InputError, first_line

_WRAPPERS = ("state_dict", "model", "state_dict_ema", "model_ema")  # keys under which training scripts save weights


def parse(data: bytes, name: str) -> dict[str, Tensor]:
    """Return the tensors of a file of weights.

    Args:
        data: Content of the file, safetensors or PyTorch. Code in it is never run.
        name: Name of the file for error messages.

    Raises:
        InputError: The file has neither format, is damaged, or contains something other than tensors.
    """
    try:
        if data[8:9] == b"{":  # the header of safetensors, after its length
            from safetensors.torch import load

            return load(data)
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch's reader has no common error class
        raise InputError(
            f"{name} is no file of weights (safetensors or PyTorch), or is damaged ({first_line(error)[:200]})"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{name} contains other things than named tensors; save the state_dict of the network alone")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def read(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a file of weights and the file's SHA-256.

    Raises:
        InputError: As for `parse`, or the file cannot be read.
    """
    data = files.read_bytes(path)
    return parse(data, str(path)), files.sha256(data)


def load_into(network: torch.nn.Module, tensors: dict[str, Tensor], name: str, ignored: tuple[str, ...] = ()) -> None:
    """Load weights into a network, all of them.

    Args:
        network: The network.
        tensors: Its weights.
        name: Name of the file for error messages.
        ignored: Prefixes of weights that the network has no place for: its classifier.

    Raises:
        InputError: Weights are missing, left over, or have other shapes.
    """
    kept = {key: value for key, value in tensors.items() if not key.startswith(ignored)} if ignored else tensors
    try:
        missing, left = network.load_state_dict(kept, strict=False)
    except RuntimeError as error:
        raise InputError(f"the weights in {name} do not fit the network ({first_line(error)}…)") from error
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or left:
        raise InputError(
            f"the weights in {name} do not fit the network: {len(missing)} missing ({', '.join(missing[:3])}), "
            f"{len(left)} left over ({', '.join(left[:3])})"
        )
