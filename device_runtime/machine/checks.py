"""What the checks of `doctor` share."""

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
    """One finding.

    Attributes:
        name: of what was examined.
        state: one of `STATES`; ``unfit`` alone makes the machine unfit.
        found: what was seen.
        fix: what to do; empty where nothing is to be done.
    """

    name: str
    state: State
    found: str
    fix: str = ""


@dataclasses.dataclass
class Situation:
    """What the checks know, and what the earlier ones have found out for the later ones."""

    board: Board
    root: Path
    bundle: Bundle | None
    now: float
    target: targets.Target | None = None
    torch: ModuleType | None = None
    capability: str = ""  # of a GPU on which PyTorch has computed something
    runners: list[str] = dataclasses.field(default_factory=list)  # what can run a backbone, fastest first

    def fix(self, package: str) -> str:
        """How to get a package here; on a Jetson never from PyPI, whose builds would shadow JetPack's."""
        return (ON_JETSON if self.board.jetson else ON_PC)[package]

    @property
    def loss(self) -> State:
        """Whether doing without the GPU is a loss that a user should know of."""
        return "warning" if self.gpu_wanted else "note"

    @property
    def gpu_wanted(self) -> bool:
        """Whether doing without the GPU is a loss that a user should know of."""
        return self.board.jetson and (self.target is None or self.target.kind != "cpu")


Examined = Iterator[Check]
