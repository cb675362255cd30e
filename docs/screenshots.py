"""Pictures of the console for README.md and docs/console.md, taken of the running service in Debian's Chromium.

The camera shows painted fruit, and the device is taught by the page as a person would teach it. Run it where `make`
has installed everything: ``.venv/bin/python docs/screenshots.py``.
"""

from __future__ import annotations

import io
import itertools
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from helpers.browser import DESKTOP, PHONE, chromium, colours, resize  # noqa: E402
from helpers.console import Page, serving  # noqa: E402
from helpers.empty_bundle import empty_bundle  # noqa: E402

from device_runtime.install.bundle import install  # noqa: E402

WIDTH, HEIGHT = 640, 480
FRUIT = {  # colour, width and height in pixels, how much it shines
    "tomato": ((206, 44, 30), (150, 132), 0.55),
    "lemon": ((240, 200, 40), (170, 118), 0.3),
    "aubergine": ((74, 30, 84), (215, 88), 0.6),
    "lime": ((104, 158, 40), (124, 112), 0.4),
}


def painted(name: str, seed: int) -> Image.Image:
    """Return a picture of a fruit on a counter, lying anywhere near the middle, turned, in changing light."""
    rng = np.random.default_rng([seed, *name.encode()])
    colour, (wide, high), shine = FRUIT[name]
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    boards = 8 * np.sin(y / 5 + 2 * np.sin(x / 170)) + 5 * np.sin(y / 1.9 + x / 60)
    light = rng.uniform(0.88, 1.08) * (1.12 - 0.3 * (np.hypot(x - 230, y - 130) / 520))
    image = (np.array([176, 140, 104]) + boards[..., None] * np.array([1.0, 0.85, 0.6])) * light[..., None]
    at_x, at_y, turn = WIDTH / 2 + rng.uniform(-50, 50), HEIGHT / 2 + rng.uniform(-30, 30), rng.uniform(-0.9, 0.9)
    size = rng.uniform(0.9, 1.2)

    def ellipse(dx: float, dy: float, grown: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        u = (x - at_x - dx) * np.cos(turn) + (y - at_y - dy) * np.sin(turn)
        v = -(x - at_x - dx) * np.sin(turn) + (y - at_y - dy) * np.cos(turn)
        return u / (wide * size * grown), v / (high * size * grown)

    u, v = ellipse(26, 34, 1.06)
    image *= (1 - 0.5 * np.clip(1.25 - np.hypot(u, v), 0, 0.9) ** 0.8)[..., None]  # its shadow
    u, v = ellipse(0, 0)
    depth = np.sqrt(np.clip(1 - u**2 - v**2, 0, 1))
    normal_x = u * np.cos(turn) - v * np.sin(turn)
    normal_y = u * np.sin(turn) + v * np.cos(turn)
    lit = np.clip(0.32 + 0.75 * (-0.45 * normal_x - 0.55 * normal_y + 0.7 * depth), 0.12, 1.15)
    spot = shine * np.clip(-0.5 * normal_x - 0.55 * normal_y + 0.67 * depth, 0, 1) ** 28
    skin = np.array(colour) * (lit * rng.uniform(0.94, 1.04))[..., None] + 255 * spot[..., None]
    skin += rng.normal(0, 5, (HEIGHT, WIDTH, 1))
    if name in ("tomato", "aubergine"):  # a green end
        end = np.hypot(
            (u - (0.93 if name == "aubergine" else 0.25)) * (wide / high), v + (0 if name == "aubergine" else 0.35)
        )
        green = np.array([70, 110, 44]) * lit[..., None]
        skin = np.where((end < (0.34 if name == "aubergine" else 0.16))[..., None], green, skin)
    edge = np.clip((1 - np.hypot(u, v)) * 60, 0, 1)[..., None]
    image = image * (1 - edge) + skin * edge
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.7))


class Counter(threading.Thread):
    """A camera above a counter: a folder that gets a new picture ten times a second, in which the fruit has moved.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self._folder, self._pictures = folder, []
        self.show("tomato")

    def show(self, name: str) -> None:
        """Put another fruit there."""
        pictures = []
        for number in range(30):
            data = io.BytesIO()
            painted(name, number).save(data, "JPEG", quality=88)
            pictures.append(data.getvalue())
        self._pictures = pictures

    def run(self) -> None:
        """Write pictures until the program ends."""
        for number in itertools.count():
            path = self._folder / f"{number:06d}.jpg"
            path.with_suffix(".part").write_bytes(self._pictures[number // 3 % len(self._pictures)])
            path.with_suffix(".part").rename(path)
            (self._folder / f"{number - 20:06d}.jpg").unlink(missing_ok=True)
            time.sleep(0.1)


def save(page: Page, path: Path) -> None:
    """Save what the page shows as a small WebP."""
    picture = Image.open(io.BytesIO(page.driver.get_screenshot_as_png())).convert("RGB")
    picture.save(path, quality=82, method=6)
    print(f"{path.relative_to(ROOT)}: {picture.width} x {picture.height}, {path.stat().st_size:,} bytes")


def main() -> None:
    """Teach a device and take the pictures."""
    images = ROOT / "docs" / "images"
    images.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "shop.ssdedge").write_bytes(empty_bundle())
        install(work / "root", work / "shop.ssdedge")
        (work / "counter").mkdir()
        counter = Counter(work / "counter")
        counter.start()
        camera = f"counter={work / 'counter'}"
        with serving(work / "root", "--camera", camera) as address, chromium(DESKTOP) as driver:
            page = Page(driver, address)
            for name in ("tomato", "lemon", "aubergine"):
                counter.show(name)
                time.sleep(2)
                page.hold(name.capitalize(), views=14)
                page.see(f"Learned: {name.capitalize()}", "#teach")
                page.press("OK", "#teach")
            page.see("Aubergine", ".answer .what")
            page.press_down("Aubergine")
            page.wait("views", lambda: page.views() >= 9)
            save(page, images / "console.webp")
            page.let_go()
            page.see("Learned: Aubergine", "#teach")
            page.press("OK", "#teach")

            resize(driver, PHONE)
            colours(driver, True)
            counter.show("lime")
            page.type_into("#teach input", "Lime")
            driver.execute_script("scrollTo(0, 0)")
            page.wait("an answer", lambda: "Not sure" in page.text(".answer:not(.settling) .what"))
            save(page, images / "console-phone.webp")


if __name__ == "__main__":
    main()
