"""A service with the console in a browser, driven as a person would."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PATIENCE = 40.0  # seconds for what normally takes less than two
KEYS = {"Space": (" ", 32), "Enter": ("Enter", 13)}


@contextlib.contextmanager
def serving(root: Path, *arguments: str | Path, port: int = 0) -> Iterator[str]:
    """Run ``ssd-edge device serve`` and yield its address."""
    command = [sys.executable, "-m", "ssd_edge", "device", "serve", "--root", root, "--port", port, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    log = root.parent / "serve.log"
    with log.open("a", encoding="utf-8") as errors:
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address.startswith("http"), log.read_text(encoding="utf-8")
            yield address
        finally:
            process.terminate()
            try:
                process.wait(20)
            finally:
                process.kill()
                process.stdout.close()


class Page:
    """The console in a browser.

    Args:
        driver: See `browser.chromium`.
        address: Address of the service.
    """

    def __init__(self, driver: Any, address: str) -> None:
        self.driver, self.address = driver, address
        self._at: dict[str, float] = {}  # where the button was pressed
        driver.get(address)

    def wait(self, what: str, true: Callable[[], Any], patience: float = PATIENCE) -> Any:
        """Return what `true` returns as soon as it is truthy; elements that are redrawn meanwhile do not matter."""
        from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException

        end = time.monotonic() + patience
        while True:
            with contextlib.suppress(NoSuchElementException, StaleElementReferenceException):
                if found := true():
                    return found
            assert time.monotonic() < end, f"{what} did not appear in:\n{self.text()}"
            time.sleep(0.05)

    def text(self, css: str = "body") -> str:
        """Return the visible text of the first element that fits, empty without one."""
        found = self.driver.find_elements("css selector", css)
        return str(found[0].text) if found else ""

    def see(self, text: str, css: str = "body", patience: float = PATIENCE) -> None:
        """Wait until an element shows a text."""
        self.wait(repr(text), lambda: text in self.text(css), patience)

    def go(self, view: str) -> None:
        """Open a view by its link."""
        self.driver.find_element("css selector", f'nav a[href="#/{view}"]').click()
        self.wait(view, lambda: self.driver.find_element("css selector", f'nav a[href="#/{view}"][aria-current]'))

    def button(self, text: str, within: str = "") -> Any:
        """Wait for a button whose accessible name begins with a text, and return it."""

        def find() -> Any:
            found = self.driver.find_elements("css selector", f"{within} button")
            return next((one for one in found if one.is_displayed() and one.accessible_name.startswith(text)), None)

        return self.wait(f"button {text!r}", find)

    def press(self, text: str, within: str = "") -> None:
        """Press a button."""
        self.click(self.button(text, within))

    def click(self, element: Any) -> None:
        """Scroll to an element and click on it; on a phone, the views' links cover the lower end of the page."""
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def type_into(self, css: str, text: str) -> None:
        """Replace the text of a field as a person does."""
        from selenium.webdriver.common.keys import Keys

        field = self.driver.find_element("css selector", css)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text or Keys.DELETE)

    def views(self) -> int:
        """Return the number in the ring of different views."""
        return int(self.text("#teach .ring text") or 0)

    def hold(self, name: str, views: int = 5, by: str = "mouse") -> None:
        """Type a name, hold the button until there are enough different views, and let go.

        Args:
            name: The name.
            views: How many different views.
            by: What holds it: ``mouse``, ``touch`` or one of `KEYS`.
        """
        self.press_down(name, by)
        self.wait(f"{views} views", lambda: self.views() >= views)
        self.let_go(by)

    def press_down(self, name: str, by: str = "mouse") -> None:
        """Type a name and press the button down."""
        self.type_into("#teach input", name)
        button = self.driver.find_element("css selector", "#teach button.hold")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].focus()", button)
        if by in KEYS:
            self._key("keyDown", by)
            return
        box = self.driver.execute_script("return arguments[0].getBoundingClientRect()", button)
        self._at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        self._point("Pressed" if by == "mouse" else "Start", by)

    def let_go(self, by: str = "mouse") -> None:
        """Let go of the button."""
        if by in KEYS:
            self._key("keyUp", by)
        else:
            self._point("Released" if by == "mouse" else "End", by)

    def _point(self, what: str, by: str) -> None:
        if by == "mouse":
            values = {"type": f"mouse{what}", "button": "left", "buttons": 1, "clickCount": 1, **self._at}
            self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", values)
        else:
            points = [self._at] if what == "Start" else []
            self.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": f"touch{what}", "touchPoints": points})

    def hold_without_effect(self, name: str) -> None:
        """Type a name and press the button shortly."""
        self.type_into("#teach input", name)
        self.press("Hold to teach")

    def _key(self, kind: str, key: str) -> None:
        text, code = KEYS[key]
        values = {"type": kind, "key": text, "code": key, "windowsVirtualKeyCode": code}
        self.driver.execute_cdp_cmd("Input.dispatchKeyEvent", values)

    def look_through(self, camera: str) -> None:
        """Choose a camera."""
        self.press(f"Camera {camera}", ".sources")

    def answer(self) -> str:
        """Return the answer in large type."""
        return self.text(".answer .what")
