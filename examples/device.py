"""Teach a device in Python: two classes of made-up pictures, in a folder that is thrown away afterwards.

Usage: python examples/device.py robot.ssdedge

The bundle is any that `ssd-edge deploy` has written; nothing it was taught is needed or changed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from device_runtime import Device
from device_runtime.install.bundle import install
from device_runtime.learning.budget import Budget

# RGB. A frame of OpenCV is BGR: hand over frame[..., ::-1].
COLOURS = {"a red thing": (200, 40, 40), "a green thing": (40, 180, 60)}


def pictures(colour: tuple[int, int, int], count: int, seed: int) -> list[np.ndarray]:
    """Noise of one colour, uint8 ``(48, 64, 3)`` each; any size will do."""
    noise = np.random.default_rng(seed).normal(0, 25, (count, 48, 64, 3))
    return list(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


def main(bundle: Path) -> None:
    """Install, learn, predict, forget, undo."""
    with tempfile.TemporaryDirectory() as scratch:
        install(Path(scratch) / "root", bundle, say=print)
        with Device.open(Path(scratch) / "root") as device:
            learned = device.learn_all(
                {name: pictures(colour, 20, seed=0) for name, colour in COLOURS.items()}, budget=Budget(seconds=30)
            )
            print(f"generation {learned.generation} in {learned.seconds:.1f} s: {', '.join(device.classes)}")
            for name, colour in COLOURS.items():
                answer = device.predict(pictures(colour, 1, seed=1))[0]
                print(f"{name}: {answer.label} (nearest {answer.nearest}, score {answer.score:.2f})")
            print(f"forgot '{device.forget('a red thing').forgot}': {', '.join(device.classes)}")
            device.rollback(1)
            print(f"as it was installed: {', '.join(device.classes) or 'no class'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
