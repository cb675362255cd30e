"""A real Chromium without a window, driven by Selenium."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

AXE = Path(__file__).resolve().parent.parent / "device_runtime" / "serve" / "axe.min.js"
DESKTOP, PHONE = (1280, 800), (390, 844)
# Runs axe-core and returns what it finds serious or critical, with the HTML of the first places.
_FIND = """
const done = arguments[arguments.length - 1];
axe.run(document, {resultTypes: ["violations"]}).then(({violations}) => done(violations
    .filter((one) => ["serious", "critical"].includes(one.impact))
    .map((one) => [one.id, one.help, ...one.nodes.slice(0, 3).map((node) => node.html + " " + node.failureSummary)])));
"""


@contextlib.contextmanager
def chromium(size: tuple[int, int] = DESKTOP, dark: bool = False, *more: str) -> Iterator[Any]:
    """Yield a driver; skips the test where there is no Chromium.

    Args:
        size: Width and height of the page in pixels; below 600 it is a phone, with touch.
        dark: Prefer dark colours.
        more: Further arguments of Chromium.
    """
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("no chromium and chromedriver here (Debian: apt install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install '.[dev]')")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    flags = ["headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars", "disable-gpu", "lang=en"]
    flags += ["use-fake-device-for-media-stream", "use-fake-ui-for-media-stream", "disable-background-networking"]
    for flag in [*flags, *more]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as page:
        resize(page, size)
        colours(page, dark)
        page.set_script_timeout(30)
        yield page


def resize(page: Any, size: tuple[int, int]) -> None:
    """Give the page the size of a desktop's window or of a phone."""
    phone = size[0] < 600
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": phone}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})


def colours(page: Any, dark: bool) -> None:
    """Prefer light or dark colours."""
    value = "dark" if dark else "light"
    features = [
        {"name": "prefers-color-scheme", "value": value},
        {"name": "prefers-reduced-motion", "value": "reduce"},  # otherwise colours are read while they change
    ]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def findings(page: Any) -> list[list[str]]:
    """Return what axe-core finds serious or critical on the page as it is now."""
    if not page.execute_script("return Boolean(window.axe)"):
        page.execute_script(_axe())
    found: list[list[str]] = page.execute_async_script(_FIND)
    return found


def messages(page: Any) -> list[str]:
    """Return the warnings and errors of the browser's console since the last call."""
    return [entry["message"] for entry in page.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]


@functools.cache
def _axe() -> str:
    return AXE.read_text(encoding="utf-8")
