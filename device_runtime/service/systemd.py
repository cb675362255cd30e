"""What a process under systemd owes its supervisor and its reader: readiness, heartbeats, log lines.

Protocol: sd_notify(3) and sd_watchdog_enabled(3); without systemd every call does nothing. See docs/service.md.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable

from ssd_edge.errors import printable

log = logging.getLogger(__name__)

SEND_TIMEOUT = 1.0  # seconds; a supervisor that does not read must not stop the camera
LONGEST = 4000  # characters of a status line
BEATS = 4  # heartbeats in the time that the watchdog allows; systemd asks for at least two


def notify(state: str, status: str = "") -> bool:
    """Tell the supervisor how things are; whether it was told.

    Args:
        state: assignments, one a line: ``READY=1``, ``WATCHDOG=1``, ``STOPPING=1``, ``EXTEND_TIMEOUT_USEC=60000000``.
        status: a line for people, which ``systemctl status`` shows. It may hold any text, a file's name too: what would
            end the line and begin another assignment is made harmless.

    Returns:
        False without systemd, or when its socket does not answer (logged): the work goes on without.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address[0] not in "/@":
        log.warning("NOTIFY_SOCKET is '%s', but only a path and an abstract name (@…) are known", printable(address))
        return False
    lines = [state] * bool(state) + [f"STATUS={printable(status[:LONGEST])}"] * bool(status)
    target = "\0" + address[1:] if address[0] == "@" else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.settimeout(SEND_TIMEOUT)
            connection.sendto("\n".join(lines).encode("utf-8", "replace"), target)
    except OSError as error:
        log.warning("systemd could not be told '%s' (%s)", printable(state), error)
        return False
    return True


def watchdog_seconds() -> float | None:
    """Seconds within which the supervisor wants to hear ``WATCHDOG=1``; None when it does not wait for this process."""
    try:
        limit = int(os.environ.get("WATCHDOG_USEC", ""))
        addressee = int(os.environ.get("WATCHDOG_PID") or os.getpid())
    except ValueError:
        return None
    return limit / 1e6 if limit > 0 and addressee == os.getpid() else None


class Heartbeat:
    """Keeps the watchdog quiet as long as the work goes on.

    Call `beat` from the loop that does the work and never from a thread of its own, which would go on beating beside
    a loop that hangs.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        limit = watchdog_seconds()
        self._clock = clock
        self._pause = None if limit is None else limit / BEATS
        self._next = clock()

    def beat(self) -> bool:
        """Send a heartbeat if one is due; costs nothing else. Whether one was sent."""
        if self._pause is None or self._clock() < self._next:
            return False
        self._next = self._clock() + self._pause
        return notify("WATCHDOG=1")

    def pause(self, most: float) -> float:
        """Seconds that a loop without work may sleep: `most`, or less where a heartbeat is due before."""
        return most if self._pause is None else min(most, max(self._next - self._clock(), 0.0))
