"""Routes that never end by themselves: server-sent events, and live pictures of a camera."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from device_runtime.serve.asked import BusyError
from device_runtime.serve.cameras import CameraFeed
from device_runtime.serve.station import Station

MOST_STREAMS = 32  # at once
SILENCE = 15.0  # seconds after which a comment shows that the stream is alive
FASTEST = 0.08  # seconds between two live pictures
STILL = 5.0  # seconds after which the same picture is sent again, to notice who has left
BOUNDARY = "ssd-edge-frame"


class Streams:
    """Routes that never end by themselves.

    Args:
        station: The device and what runs beside it.
    """

    def __init__(self, station: Station) -> None:
        self._station = station
        self._open = 0

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [Route("/v1/events", self.events), Route("/v1/cameras/{id}/live.mjpeg", self.live)]

    async def events(self, request: Request) -> Response:
        """Send all events as they happen."""
        return self._stream(request, self._events(), "text/event-stream")

    async def live(self, request: Request) -> Response:
        """Send the frames of a camera as pictures that replace each other."""
        feed = self._station.camera(request.path_params["id"])
        return self._stream(request, self._pictures(feed), f"multipart/x-mixed-replace; boundary={BOUNDARY}")

    def _stream(self, request: Request, parts: AsyncIterator[bytes], kind: str) -> Response:
        if request.method == "HEAD":  # nothing of it would be sent, without end
            return Response(media_type=kind)
        if self._open >= MOST_STREAMS:
            raise BusyError(f"{MOST_STREAMS} streams are open already; close one of them")

        async def counted() -> AsyncIterator[bytes]:
            self._open += 1
            try:
                async for part in parts:
                    yield part
            finally:
                self._open -= 1

        return StreamingResponse(counted(), media_type=kind, headers={"x-accel-buffering": "no"})

    async def _events(self) -> AsyncIterator[bytes]:
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(woken.set)

        with self._station.events.subscribe(wake=wake) as subscription:
            yield b": open\n\n"
            while not subscription.closed:
                while (event := subscription.get(0)) is not None:
                    yield sent(event.number, event.kind, event.fields)
                try:
                    await asyncio.wait_for(woken.wait(), SILENCE)
                    woken.clear()
                except asyncio.TimeoutError:
                    yield b": alive\n\n"

    async def _pictures(self, feed: CameraFeed) -> AsyncIterator[bytes]:
        number, sent_at = 0, 0.0
        while not self._station.events.closed:
            frame, now = feed.newest(), time.monotonic()
            if frame is not None and (frame.number != number or now - sent_at > STILL):
                number, sent_at = frame.number, now
                head = f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(frame.jpeg)}\r\n\r\n"
                yield head.encode() + frame.jpeg + b"\r\n"
            await asyncio.sleep(FASTEST)


def sent(number: int, kind: str, fields: Mapping[str, Any]) -> bytes:
    """Return an event as server-sent text."""
    return f"id: {number}\nevent: {kind}\ndata: {json.dumps(fields, allow_nan=False)}\n\n".encode("ascii")
