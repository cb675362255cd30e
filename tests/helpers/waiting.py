"""Waiting in tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PATIENCE = 30  # seconds that a test waits for what normally happens at once


def until(true: Callable[[], Any]) -> Any:
    """Wait until something is true, and return it."""
    end = time.monotonic() + PATIENCE
    while not (found := true()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
    return found
