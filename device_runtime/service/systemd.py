"""Readiness, status and watchdog messages to systemd, as in sd_notify(3) and sd_watchdog_enabled(3).

Without systemd no call has an effect. See docs/service.md.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable

from ssd_edge.errors import printable

log = logging.getLogger(__name__)

SEND_TIMEOUT = 1.0  # seconds; a supervisor that does not read must not block the loop
LONGEST = 4000  # characters of a status line
BEATS = 4  # heartbeats per watchdog period; systemd recommends at least two


def notify(state: str, status: str = "") -> bool:
    """Send a state to systemd.

    Args:
        state: Assignments, one per line: ``READY=1``, ``WATCHDOG=1``, ``STOPPING=1``,
            ``EXTEND_TIMEOUT_USEC=60000000``.
        status: Text shown by ``systemctl status``. Control characters are replaced, so that a file name in it cannot
            add an assignment.

    Returns:
        True if the message was sent; False without systemd or if its socket does not respond, which is logged.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address[0] not in "/@":
        log.warning("NOTIFY_SOCKET is '%s', but only a path or an abstract name (@…) is supported", printable(address))
        return False
    lines = [state] * bool(state) + [f"STATUS={printable(status[:LONGEST])}"] * bool(status)
    target = "\0" + address[1:] if address[0] == "@" else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.settimeout(SEND_TIMEOUT)
            connection.sendto("\n".join(lines).encode("utf-8", "replace"), target)
    except OSError as error:
        log.warning("cannot send '%s' to systemd (%s)", printable(state), error)
        return False
    return True


def watchdog_seconds() -> float | None:
    """Return the watchdog period in seconds, or None if systemd does not watch this process."""
    try:
        limit = int(os.environ.get("WATCHDOG_USEC", ""))
        addressee = int(os.environ.get("WATCHDOG_PID") or os.getpid())
    except ValueError:
        return None
    return limit / 1e6 if limit > 0 and addressee == os.getpid() else None


class Heartbeat:
    """Watchdog messages of a working loop.

    Call `beat` from the loop itself. A separate thread would continue to send messages while the loop hangs.

    Args:
        clock: Monotonic clock in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        limit = watchdog_seconds()
        self._clock = clock
        self._pause = None if limit is None else limit / BEATS
        self._next = clock()

    def beat(self) -> bool:
        """Send a heartbeat if one is due; return True if it was sent."""
        if self._pause is None or self._clock() < self._next:
            return False
        self._next = self._clock() + self._pause
        return notify("WATCHDOG=1")

    def pause(self, most: float) -> float:
        """Return how many seconds an idle loop may sleep: `most`, or less if a heartbeat is due earlier."""
        return most if self._pause is None else min(most, max(self._next - self._clock(), 0.0))
