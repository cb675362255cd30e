"""Coloured objects that are turned in front of a camera, as pictures and as videos."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE = (320, 240)
OBJECTS = {  # colour, corners of a polygon or none for a disc, width
    "ball": ((214, 40, 40), 0, 1.0),
    "box": ((40, 70, 210), 4, 1.0),
    "wedge": ((235, 190, 30), 3, 1.0),
    "bar": ((40, 160, 70), 4, 0.35),
}


def view(name: str, seed: int, turn: float | None = None) -> Image.Image:
    """Return a picture of an object: it lies anywhere near the middle, near or far, in changing light.

    Args:
        name: One of `OBJECTS`.
        seed: Of place, size, light and noise.
        turn: Angle in radians; None for any.
    """
    rng = np.random.default_rng([seed, *name.encode()])
    colour, corners, width = OBJECTS[name]
    light = rng.uniform(0.75, 1.15)
    image = Image.new("RGB", SIZE, tuple(int(v * light) for v in (126, 122, 116)))
    pen = ImageDraw.Draw(image)
    x, y = SIZE[0] / 2 + rng.uniform(-26, 26), SIZE[1] / 2 + rng.uniform(-18, 18)
    radius = rng.uniform(52, 92)
    angle = rng.uniform(0, 2 * math.pi) if turn is None else turn
    ink = tuple(int(min(255, v * light)) for v in colour)
    if not corners:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
        spot = (x + 0.5 * radius * math.cos(angle), y + 0.5 * radius * math.sin(angle))
        pen.ellipse((spot[0] - 14, spot[1] - 14, spot[0] + 14, spot[1] + 14), fill=(245, 245, 245))
    else:
        points = [2 * math.pi * (k + 0.5) / corners for k in range(corners)]
        around = [(radius * math.cos(a), radius * width * math.sin(a)) for a in points]
        cos, sin = math.cos(angle), math.sin(angle)
        pen.polygon([(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in around], fill=ink)
    pixels = np.asarray(image, np.float32) + rng.normal(0, 6, (SIZE[1], SIZE[0], 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def photographs(folder: Path, name: str, count: int, seed: int = 0) -> Path:
    """Write JPEGs of an object into a folder, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        view(name, seed + number).save(folder / f"{name}-{number:02d}.jpg", quality=90)
    return folder


def video(path: Path, *names: str, views: int = 24, each: int = 4, seed: int = 1000) -> Path:
    """Write objects, one after the other, as a stream of JPEGs, which ffmpeg and Chromium read at 25 frames a second.

    Args:
        path: The file, ``….mjpeg``.
        names: The objects.
        views: Different views of each.
        each: Frames for which a view stays.
        seed: Of the views.
    """
    with path.open("wb") as out:
        for name in names:
            for number in range(views):
                data = io.BytesIO()
                view(name, seed + number).save(data, "JPEG", quality=90)
                out.write(data.getvalue() * each)
    return path
