"""Device side: embed, predict, learn and undo, without the packages of the workstation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ssd_edge.system import disable_telemetry

if TYPE_CHECKING:
    from device_runtime.device import Device, Prediction

disable_telemetry()
__all__ = ["Device", "Prediction"]


def __getattr__(name: str) -> Any:
    """Import `Device` and `Prediction` on first use, because they need PyTorch."""
    if name in __all__:
        from device_runtime import device

        return getattr(device, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
