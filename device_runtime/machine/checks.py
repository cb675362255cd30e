"""Types shared by the checks of `doctor`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

from device_runtime.machine.board import Board
from ssd_edge import targets
from ssd_edge.bundle import Bundle

State = Literal["ok", "note", "warning", "unfit"]
STATES: tuple[State, ...] = get_args(State)
VENV = "use a venv made with python3 -m venv --system-site-packages"
ON_JETSON = {
    "torch": f"install NVIDIA's PyTorch for this JetPack, not PyPI's, and {VENV}",
    "onnxruntime": f"install an ONNX Runtime built for this JetPack, not PyPI's, and {VENV}",
    "tensorrt": f"sudo apt install python3-libnvinfer, and {VENV}",
    "cryptography": f"sudo apt install python3-cryptography, and {VENV}",
}
ON_PC = {
    **dict.fromkeys(("torch", "onnxruntime", "cryptography"), "pip install 'ssd-edge[device]'"),
    "tensorrt": "pip install 'ssd-edge[tensorrt]', if there is an NVIDIA GPU",
}


@dataclasses.dataclass(frozen=True)
class Check:
    """Result of a check.

    Attributes:
        name: Name of the check.
        state: One of `STATES`; only ``unfit`` makes the machine unfit.
        found: Finding.
        fix: Recommended action; empty if there is none.
    """

    name: str
    state: State
    found: str
    fix: str = ""


@dataclasses.dataclass
class Situation:
    """Input of the checks, and results of earlier checks for later ones."""

    board: Board
    root: Path
    bundle: Bundle | None
    now: float
    target: targets.Target | None = None
    torch: ModuleType | None = None
    capability: str = ""  # of a GPU that ran a PyTorch kernel
    runners: list[str] = dataclasses.field(default_factory=list)  # runtimes that can run a backbone, fastest first

    def fix(self, package: str) -> str:
        """Return how to install a package; on a Jetson not from PyPI, whose builds would shadow JetPack's."""
        return (ON_JETSON if self.board.jetson else ON_PC)[package]

    @property
    def loss(self) -> State:
        """State of a check that finds no usable GPU."""
        return "warning" if self.gpu_wanted else "note"

    @property
    def gpu_wanted(self) -> bool:
        """True if running without a GPU deserves a warning."""
        return self.board.jetson and (self.target is None or self.target.kind != "cpu")


Examined = Iterator[Check]
