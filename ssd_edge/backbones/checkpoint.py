"""The checkpoint of a network's training: a file that is replaced after each epoch, and removed at the end.

It contains everything that the next epoch depends on, so a training that was interrupted ends with the same weights as
one that was not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssd_edge import files
from ssd_edge.errors import BundleRefusedError, InputError

NAME = "checkpoint.safetensors"
MODEL, OPTIMISER, GENERATOR = "model.", "optimiser.", "generator"


@dataclasses.dataclass(frozen=True)
class State:
    """Everything that changes while a network is trained."""

    model: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    generator: torch.Generator

    def pack(self, **metadata: Any) -> bytes:
        """Return the state as bytes, together with JSON values."""
        optimiser = self.optimiser.state_dict()
        tensors = {MODEL + name: tensor for name, tensor in self.model.state_dict().items()}
        for index, moments in optimiser["state"].items():
            tensors |= {f"{OPTIMISER}{index}.{name}": value for name, value in moments.items() if value is not None}
        tensors[GENERATOR] = self.generator.get_state()
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
        metadata |= {"groups": optimiser["param_groups"], "schedule": self.schedule.state_dict()}
        return files.tensor_bytes(arrays, metadata)

    def restore(self, data: bytes) -> dict[str, Any]:
        """Restore the state from bytes, and return what was packed with it.

        Raises:
            BundleRefusedError: They are damaged, or of another network.
        """
        arrays, metadata = files.parse_tensors(data, "the checkpoint")
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        moments: dict[int, dict[str, torch.Tensor]] = {}
        try:
            for name, tensor in tensors.items():
                if name.startswith(OPTIMISER):
                    _, index, key = name.split(".")
                    moments.setdefault(int(index), {})[key] = tensor
            weights = {name.removeprefix(MODEL): t for name, t in tensors.items() if name.startswith(MODEL)}
            self.model.load_state_dict(weights)
            self.optimiser.load_state_dict({"state": moments, "param_groups": metadata["groups"]})
            self.schedule.load_state_dict(metadata["schedule"])
            self.generator.set_state(tensors[GENERATOR])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise BundleRefusedError(f"{NAME} is damaged ({error}); delete it to start anew") from error
        return metadata


class Checkpoint:
    """The file of a training that is not finished.

    Args:
        folder: Its folder.
        about: What determines the result of the training: JSON values by name.
        log: Receives that the training is continued.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], log: Callable[[str], None]) -> None:
        self._path, self._about, self._log = folder / NAME, dict(about), log

    def read(self) -> bytes:
        """Return its content; nothing if there is none.

        Raises:
            InputError: It belongs to a training with other settings or images.
            BundleRefusedError: It is damaged.
        """
        if not files.exists(self._path):
            return b""
        data = files.read_bytes(self._path)
        _, metadata = files.parse_tensors(data, str(self._path))
        about, epoch = metadata.get("about"), metadata.get("epoch")
        if not isinstance(about, dict) or not isinstance(epoch, int):
            raise BundleRefusedError(f"{self._path} does not say what it is about; delete it to start anew")
        names = sorted(about.keys() | self._about.keys())
        other = [
            f"{name} was {about.get(name)} and is now {self._about.get(name)}"
            for name in names
            if about.get(name) != self._about.get(name)
        ]
        if other:
            raise InputError(
                f"{self._path} holds a training that was interrupted after epoch {epoch}, but {'; '.join(other)}. "
                "Continue it with its own settings and images, or delete the file to start anew"
            )
        self._log(f"continuing after epoch {epoch}, from {self._path}")
        return data

    def write(self, state: State, epoch: int, seconds: float) -> None:
        """Replace it by the state after an epoch.

        Args:
            state: The state.
            epoch: Number of epochs that are complete.
            seconds: Time that they took.
        """
        files.write_bytes(self._path, state.pack(about=self._about, epoch=epoch, seconds=seconds))


def is_in(folder: Path) -> bool:
    """Return True if a folder has a checkpoint."""
    return files.exists(folder / NAME)


def remove(folder: Path) -> None:
    """Remove the checkpoint in a folder, if there is one."""
    files.Tree(folder).remove(folder / NAME)
