"""Routes that change the device: learn, rename, forget, merge, roll back; and its export."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from device_runtime.serve.answers import Json, media_type, only, read_body, read_json, take
from device_runtime.serve.errors import UnsupportedError
from device_runtime.serve.station import Station
from device_runtime.serve.uploads import Part, images_of, read_form, text_of
from ssd_edge.errors import InputError

MOST_BUNDLE = 192 * 2**20  # bytes
MOST_FRAMES = 200
NUMBER = (int, float)


class Teaching:
    """Routes that change the device.

    Args:
        station: The device and what runs beside it.
    """

    def __init__(self, station: Station) -> None:
        self._station = station

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [
            Route("/v1/rename", self.rename, methods=["POST"]),
            Route("/v1/forget", self.forget, methods=["POST"]),
            Route("/v1/merge-labels", self.merge_labels, methods=["POST"]),
            Route("/v1/rollback", self.rollback, methods=["POST"]),
            Route("/v1/export", self.export, methods=["POST"]),
            Route("/v1/merge", self.merge, methods=["POST"]),
            Route("/v1/learn", self.learn, methods=["POST"]),
            Route("/v1/jobs", self.jobs),
            Route("/v1/jobs/{id}", self.job),
            Route("/v1/jobs/{id}", self.cancel, methods=["DELETE"]),
        ]

    async def rename(self, request: Request) -> Response:
        """Rename a class."""
        values = await read_json(request)
        only(values, "label", "new")
        label, new = take(values, "label", str), take(values, "new", str)
        return Json((await run_in_threadpool(self._station.rename, label, new)).to_dict())

    async def forget(self, request: Request) -> Response:
        """Remove a class."""
        values = await read_json(request)
        only(values, "label", "exactly", "max_forgetting")
        label, exactly = take(values, "label", str), take(values, "exactly", bool, False)
        most = take(values, "max_forgetting", NUMBER, None)
        return Json((await run_in_threadpool(self._station.forget, label, exactly, most)).to_dict())

    async def merge_labels(self, request: Request) -> Response:
        """Merge classes into one."""
        values = await read_json(request)
        only(values, "labels", "into", "max_forgetting")
        labels, into = take(values, "labels", list), take(values, "into", str)
        if not all(isinstance(label, str) for label in labels):
            raise InputError("'labels' must be a list of texts")
        most = take(values, "max_forgetting", NUMBER, None)
        return Json((await run_in_threadpool(self._station.merge_labels, labels, into, most)).to_dict())

    async def rollback(self, request: Request) -> Response:
        """Return to an earlier generation."""
        values = await read_json(request)
        only(values, "generation")
        number = take(values, "generation", (int, type(None)), None)
        return Json((await run_in_threadpool(self._station.rollback, number)).to_dict())

    async def export(self, request: Request) -> Response:
        """Return the current generation as a bundle."""
        values = await read_json(request)
        only(values, "history")
        device = self._station.device
        history = take(values, "history", bool, True)
        making = self._station.take_in(lambda: device.exported(device.bundle.name, history))
        data = await asyncio.wrap_future(making)
        request.app.state.memory.take(request.scope, len(data))  # until the client has taken all of it
        name = f"generation-{device.generation.number}.ssdedge"
        headers = {"content-disposition": f'attachment; filename="{name}"'}
        return Response(data, media_type="application/octet-stream", headers=headers)

    async def merge(self, request: Request) -> Response:
        """Add what another device has learned, from the bundle that it exported."""
        if media_type(request) != "application/octet-stream":
            raise UnsupportedError("send the bundle as the body, with Content-Type: application/octet-stream")
        data = await read_body(request, MOST_BUNDLE)
        return Json((await run_in_threadpool(self._station.merge, data)).to_dict())

    async def learn(self, request: Request) -> Response:
        """Learn a class from images of a form, or from the next frames of a camera."""
        if media_type(request) == "application/json":
            return await self._learn_from_camera(await read_json(request))
        parts = await read_form(request)
        files = images_of(parts, "label", "max_forgetting")
        label = text_of(parts, "label")
        if label is None:
            raise InputError("the form has no field 'label'; send the name of the class")
        most = _share(parts)

        def start() -> Any:
            station = self._station
            return station.learn({label: station.decode_all(files)}, most).to_dict()

        return Json(await asyncio.wrap_future(self._station.take_in(start)), 202)

    async def _learn_from_camera(self, values: dict[str, Any]) -> Response:
        only(values, "label", "camera", "frames", "every", "max_forgetting")
        frames, every = take(values, "frames", int, 20), take(values, "every", NUMBER, 0.2)
        if not 1 <= frames <= MOST_FRAMES or not 0 <= every <= 60:
            raise InputError(f"frames must be 1 to {MOST_FRAMES} and every 0 to 60 s, but are {frames} and {every}")
        label, camera = take(values, "label", str), take(values, "camera", (str, type(None)), None)
        most = take(values, "max_forgetting", NUMBER, None)
        job = await run_in_threadpool(self._station.learn_from_camera, label, camera, frames, every, most)
        return Json(job.to_dict(), 202)

    async def jobs(self, request: Request) -> Response:
        """Return the jobs, newest first."""
        return Json({"jobs": [job.to_dict() for job in self._station.jobs.list()]})

    async def job(self, request: Request) -> Response:
        """Return a job."""
        return Json(self._station.jobs.get(request.path_params["id"]).to_dict())

    async def cancel(self, request: Request) -> Response:
        """Cancel a job."""
        return Json(self._station.jobs.cancel(request.path_params["id"]).to_dict())


def _share(parts: list[Part]) -> float | None:
    text = text_of(parts, "max_forgetting")
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, NUMBER) or isinstance(found, bool):
        raise InputError(f"max_forgetting must be a share from 0 to 1, but is '{text[:20]}'")
    return found
