"""Connections of the service: their number, and what a slow or silent client may take.

Uvicorn limits the time between two requests of a connection only. Here every part of a request has a time, and a new
connection takes the place of one that does nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from device_runtime.service.frames import RateLimitedWarning

log = logging.getLogger(__name__)

MOST = 128  # connections
HEAD_SECONDS = 10.0  # for the head of a request, from the start of the connection or the end of the last answer
SILENCE = 10.0  # seconds without a byte of a body that is awaited
GRACE, LEAST_RATE = 20.0, 4096.0  # from this many seconds on, bytes per second of a body
UNREAD = 30.0  # seconds in which a client takes nothing of its answer
# How long and how much of the rest of a body is dropped after the answer, so that the client can read that.
LINGER, LINGER_BYTES = 1.0, 8 * 2**20
TICK = 1.0  # seconds between two looks
HEAD_BYTES = 16 * 1024
# Chunks of a body, each of which takes as long as a whole packet: from this many on, their mean size must be larger.
MOST_CHUNKS, LEAST_CHUNK = 4096, 64
_FULL = json.dumps({"error": "the device has as many connections as it can; try again in a moment", "code": 3}).encode()
_warning = RateLimitedWarning()


class _Parser(h11.Connection):
    """A parser that also refuses what two servers may understand differently, and bodies of tiny chunks."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, HEAD_BYTES)
        self._chunks = self._chunked = 0  # of a body, and their bytes

    def next_event(self) -> Any:
        """Return the next event.

        Raises:
            h11.RemoteProtocolError: The client sends what is no HTTP, or is refused here.
        """
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._chunked = 0
            if {b"content-length", b"transfer-encoding"} <= {name for name, _ in event.headers}:
                raise h11.RemoteProtocolError("a body has one length")  # RFC 9112, 6.3: request smuggling
        elif isinstance(event, h11.Data):
            self._chunks, self._chunked = self._chunks + event.chunk_start, self._chunked + len(event.data)
            if self._chunks > MOST_CHUNKS and self._chunked < LEAST_CHUNK * self._chunks:
                raise h11.RemoteProtocolError("the chunks are too small")
        return event


class Connection(H11Protocol):
    """A connection of HTTP/1.1 that ends when its client takes too long."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = _Parser()
        self._since = self.loop.time()  # start of what it waits for
        self._heard, self._bytes = self._since, 0  # last byte of the request, and their number
        self._cycle: object = None  # the request that these are about
        self._stuck: float | None = None  # since when the client takes nothing
        self._lingering = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, in the place of an idle one if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > MOST and not self._make_room():
            _warning.warn(f"{MOST} connections are open, and all are used", "connections")
            head = "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 2\r\n"
            head += f"content-length: {len(_FULL)}\r\nconnection: close\r\n\r\n"
            transport.write(head.encode() + _FULL)
            transport.close()
            return
        self._timer = self.loop.call_later(TICK, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the connection."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request."""
        self._heard, self._bytes = self.loop.time(), self._bytes + len(data)
        if self._lingering:
            if self._bytes > LINGER_BYTES:
                self.transport.abort()
            return
        super().data_received(data)

    def on_response_complete(self) -> None:
        """Wait for the next request, or end here if the client still sends a body that nobody reads."""
        self._since, self._bytes = self.loop.time(), 0
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._lingering = True
            self.flow.resume_reading()
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self.loop.call_later(LINGER, self.transport.close)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request; in the middle of an answer, only the end of the connection can say so."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
            if not self.idle:  # what answers a body that turned out to be damaged must not answer, too
                self.cycle.disconnected = True
                self.cycle.message_event.set()
        else:
            self.transport.abort()

    @property
    def idle(self) -> bool:
        """True while no request is answered."""
        return self.cycle is None or self.cycle.response_complete

    def _make_room(self) -> bool:
        """Close the connection that has been idle for longest; return False if none is."""
        others = [one for one in self.connections if isinstance(one, Connection) and one is not self]
        idle = [one for one in others if one.idle and not one.transport.is_closing()]
        # a body that takes long is slow on purpose, or can be sent again
        idle = idle or [one for one in others if one._receiving and self.loop.time() - one._since > GRACE]
        if not idle:
            return any(one.transport.is_closing() for one in others)
        min(idle, key=lambda one: one._since).transport.abort()
        return True

    @property
    def _receiving(self) -> bool:
        return not self.idle and self.cycle.more_body

    def _look(self) -> None:
        """End a connection that takes too long."""
        now = self.loop.time()
        if self.cycle is not self._cycle:  # another request has begun
            self._cycle, self._since, self._bytes = self.cycle, now, 0
        if reason := self._too_slow(now):
            log.info("a connection was closed: %s", reason, extra={"code": "slow_client"})
            self.transport.abort()
            return
        self._timer = self.loop.call_later(TICK, self._look)

    def _too_slow(self, now: float) -> str:
        """Return how a client takes too long, or an empty text."""
        if not self.flow.write_paused:
            self._stuck = None
        elif self._stuck is None:
            self._stuck = now
        elif now - self._stuck > UNREAD:
            return f"it took nothing of its answer for {UNREAD:.0f} s"
        if self.idle:
            return f"no request within {HEAD_SECONDS:.0f} s" if now - self._since > HEAD_SECONDS else ""
        if self._receiving and not self.flow.read_paused:
            spent = now - self._since
            if now - max(self._heard, self._since) > SILENCE:
                return f"nothing of its body for {SILENCE:.0f} s"
            if spent > GRACE and self._bytes < LEAST_RATE * spent:
                return f"less than {LEAST_RATE:.0f} bytes of its body per second"
        return ""
