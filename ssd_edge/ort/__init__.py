"""ONNX Runtime: `load` is the only place that imports it."""

from __future__ import annotations

import os
from types import ModuleType

from ssd_edge.errors import require
from ssd_edge.system import NO_TELEMETRY

_SWITCH = "ORT_DISABLE_TELEMETRY"


def load(extra: str = "device", purpose: str = "run the backbone", module: str = "onnxruntime") -> ModuleType:
    """Import ONNX Runtime, or a module of it, with its telemetry off.

    Its builds for PyPI write a device id and a database of events to the user's cache folder as they are loaded, and
    send them. Only the environment (`system.disable_telemetry`) prevents that; the call below is for a program that
    imported ONNX Runtime before SSD-Edge.

    Args:
        extra: As for `require`.
        purpose: As for `require`.
        module: Import name.

    Raises:
        EnvironmentUnfitError: It is missing.
    """
    runtime = require("onnxruntime", extra, purpose)
    if os.environ.get(_SWITCH) == NO_TELEMETRY[_SWITCH]:
        disable = getattr(runtime, "disable_telemetry_events", None)  # older versions have none, and no telemetry
        if disable is not None:
            disable()
    return runtime if module == "onnxruntime" else require(module, extra, purpose)
