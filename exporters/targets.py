"""What a bundle can be prepared for. All targets take the same bundle today: fp32 in opset 18.

A target is a name that the bundle carries, so that whoever finds it knows what it was meant for; the engine
is built on the device, where the device is known.
"""

from __future__ import annotations

from ssd_edge.errors import InputError, did_you_mean

TARGETS: dict[str, str] = {
    "jetson": "any Jetson with JetPack 6.1 or newer (TensorRT 10.3 or newer)",
    "jetson-orin-nano": "Jetson Orin Nano, 4 or 8 GB",
    "jetson-orin-nx": "Jetson Orin NX, 8 or 16 GB",
    "jetson-agx-orin": "Jetson AGX Orin, 32 or 64 GB",
    "jetson-thor": "Jetson T4000 or T5000, JetPack 7",
    "generic-cuda": "a PC with an NVIDIA GPU",
    "cpu": "any computer, ONNX Runtime on the CPU",
}


def check(name: str) -> None:
    """Refuse an unknown target.

    Raises:
        InputError: with the nearest right name.
    """
    if name not in TARGETS:
        hint = did_you_mean(name, TARGETS)
        raise InputError(f"unknown target '{name}'.{hint} Known: {', '.join(TARGETS)}")
