"""Routes that collect images before they are learned: captures, cameras, and the tray of doubtful frames."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from device_runtime.serve.answers import Json, only, read_json, take
from device_runtime.serve.asked import UnknownError
from device_runtime.serve.station import Station
from device_runtime.serve.uploads import images_of, read_form
from ssd_edge.errors import InputError

MOST_ENTRIES = 100  # of the tray, in one request


class Collecting:
    """Routes that collect images.

    Args:
        station: The device and what runs beside it.
    """

    def __init__(self, station: Station) -> None:
        self._station = station

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [
            Route("/v1/captures", self.captures, methods=["GET"]),
            Route("/v1/captures", self.open, methods=["POST"]),
            Route("/v1/captures/{id}", self.show, methods=["GET"]),
            Route("/v1/captures/{id}", self.drop, methods=["DELETE"]),
            Route("/v1/captures/{id}/hold", self.hold, methods=["POST"]),
            Route("/v1/captures/{id}/resume", self.resume, methods=["POST"]),
            Route("/v1/captures/{id}/images", self.add, methods=["POST"]),
            Route("/v1/captures/{id}/tray", self.add_tray, methods=["POST"]),
            Route("/v1/captures/{id}/learn", self.learn, methods=["POST"]),
            Route("/v1/cameras", self.cameras),
            Route("/v1/cameras/{id}/frame.jpg", self.frame),
            Route("/v1/tray", self.tray),
            Route("/v1/tray/{id}.jpg", self.tray_frame, methods=["GET"]),
            Route("/v1/tray/{id}", self.remove, methods=["DELETE"]),
        ]

    async def open(self, request: Request) -> Response:
        """Begin to collect images of a class."""
        values = await read_json(request)
        only(values, "label", "camera")
        label, camera = take(values, "label", str), take(values, "camera", (str, type(None)), None)
        return Json((await run_in_threadpool(self._station.collect, label, camera)).to_dict(), 201)

    def captures(self, request: Request) -> Response:
        """Return the open captures."""
        return Json({"captures": [capture.to_dict() for capture in self._station.captures.list()]})

    def show(self, request: Request) -> Response:
        """Return a capture."""
        return Json(self._station.captures.get(_id(request)).to_dict())

    def drop(self, request: Request) -> Response:
        """Drop a capture and its images."""
        self._station.drop_capture(_id(request))
        return Response(status_code=204)

    def hold(self, request: Request) -> Response:
        """Take no more frames of the camera."""
        return Json(self._station.hold(_id(request), False).to_dict())

    def resume(self, request: Request) -> Response:
        """Take frames of the camera again."""
        return Json(self._station.hold(_id(request), True).to_dict())

    async def add(self, request: Request) -> Response:
        """Add image files."""
        files = images_of(await read_form(request))
        adding = self._station.take_in(lambda: self._station.add_images(_id(request), files))
        return Json((await asyncio.wrap_future(adding)).to_dict())

    async def add_tray(self, request: Request) -> Response:
        """Add frames of the tray."""
        values = await read_json(request)
        only(values, "ids")
        ids: list[Any] = take(values, "ids", list)
        if not all(isinstance(one, str) for one in ids) or not 1 <= len(ids) <= MOST_ENTRIES:
            raise InputError(f"'ids' must be a list of 1 to {MOST_ENTRIES} ids of the tray")
        adding = self._station.take_in(lambda: self._station.add_tray(_id(request), ids))
        return Json((await asyncio.wrap_future(adding)).to_dict())

    async def learn(self, request: Request) -> Response:
        """Learn what a capture holds."""
        values = await read_json(request)
        only(values, "max_forgetting")
        most = take(values, "max_forgetting", (int, float), None)
        return Json((await run_in_threadpool(self._station.learn_capture, _id(request), most)).to_dict(), 202)

    def cameras(self, request: Request) -> Response:
        """Return the cameras."""
        return Json({"cameras": [feed.to_dict() for feed in self._station.feeds()]})

    def frame(self, request: Request) -> Response:
        """Return the newest frame of a camera."""
        newest = self._station.camera(_id(request)).newest()
        if newest is None:
            raise UnknownError(f"the camera '{_id(request)}' has given no frame yet")
        return Response(newest.jpeg, media_type="image/jpeg")

    def tray(self, request: Request) -> Response:
        """Return what is in the tray."""
        return Json({"tray": self._station.tray.list()})

    def tray_frame(self, request: Request) -> Response:
        """Return the newest frame of an entry of the tray."""
        frames = self._station.tray.frames(_id(request))
        if not frames:
            raise UnknownError(f"the frame '{_id(request)[:40]}' is no longer in the tray")
        return Response(frames[-1].jpeg, media_type="image/jpeg")

    def remove(self, request: Request) -> Response:
        """Remove an entry of the tray."""
        self._station.tray.remove(_id(request))
        return Response(status_code=204)


def _id(request: Request) -> str:
    name: str = request.path_params["id"]
    return name
