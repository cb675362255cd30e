"""Teach a device two classes of synthetic images in Python, in a temporary folder.

Usage: python examples/device.py robot.ssdedge

Any bundle written by `ssd-edge deploy` works, whatever its classes; the file is not changed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from device_runtime import Device
from device_runtime.install.bundle import install
from device_runtime.learning.budget import Budget

# RGB. OpenCV frames are BGR, so pass frame[..., ::-1].
COLOURS = {"a red thing": (200, 40, 40), "a green thing": (40, 180, 60)}


def noisy_images(colour: tuple[int, int, int], count: int, seed: int) -> list[np.ndarray]:
    """Return noisy images of one colour, uint8 ``(48, 64, 3)``; any image size works."""
    noise = np.random.default_rng(seed).normal(0, 25, (count, 48, 64, 3))
    return list(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


def main(bundle: Path) -> None:
    """Install a bundle, learn, predict, forget and roll back."""
    with tempfile.TemporaryDirectory() as scratch:
        install(Path(scratch) / "root", bundle, say=print)
        with Device.open(Path(scratch) / "root") as device:
            learned = device.learn_all(
                {name: noisy_images(colour, 20, seed=0) for name, colour in COLOURS.items()}, budget=Budget(seconds=30)
            )
            print(f"generation {learned.generation} in {learned.seconds:.1f} s: {', '.join(device.classes)}")
            for name, colour in COLOURS.items():
                prediction = device.predict(noisy_images(colour, 1, seed=1))[0]
                print(f"{name}: {prediction.label} (nearest {prediction.nearest}, score {prediction.score or 0:.2f})")
            print(f"forgot '{device.forget('a red thing').forgot}': {', '.join(device.classes)}")
            device.rollback(1)
            print(f"as it was installed: {', '.join(device.classes) or 'no class'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
