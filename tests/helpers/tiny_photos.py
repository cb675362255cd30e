"""Images for the bundles of tests/device_runtime/conftest.py: 8 × 8 pixels in the colour of a class."""

from __future__ import annotations

import io
import time
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {"cup": (220, 30, 30), "nut": (30, 220, 30), "screw": (30, 30, 220), "wedge": (220, 220, 30)}


def pixels(name: str, seed: int = 0) -> np.ndarray:
    """Return an image of a class, uint8 ``(8, 8, 3)``."""
    noise = np.random.default_rng([seed, *name.encode()]).normal(0, 20, (8, 8, 3))
    return np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)


def picture(name: str, seed: int = 0, kind: str = "PNG") -> bytes:
    """Return the file of such an image."""
    out = io.BytesIO()
    Image.fromarray(pixels(name, seed)).save(out, kind)
    return out.getvalue()


def form(name: str, count: int = 12, seed: int = 0) -> list[tuple[str, tuple[str, bytes]]]:
    """Return the images of a class as files of a form."""
    return [("image", (f"{number}.png", picture(name, seed + number))) for number in range(count)]


def finished(client: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Wait until a job of the service has ended, and return it."""
    for _ in range(1000):
        job = client.get(f"/v1/jobs/{job['id']}").json()
        if job["state"] not in ("waiting", "running"):
            return job
        time.sleep(0.02)
    raise AssertionError(job)
