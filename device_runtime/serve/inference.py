"""Routes that predict: files and raw images at ``/v1/predict``."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from device_runtime.device import Observation
from device_runtime.serve.answers import Json, media_type, read_body
from device_runtime.serve.errors import UnsupportedError
from device_runtime.serve.station import Station
from device_runtime.serve.uploads import MOST_BODY, images_of, read_form
from ssd_edge.errors import InputError

RAW = ("image/", "application/octet-stream")  # types of a body that is an image


class Inference:
    """Routes that predict.

    Args:
        station: The device and what runs beside it.
    """

    def __init__(self, station: Station) -> None:
        self._station = station

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [Route("/v1/predict", self.predict, methods=["POST"])]

    async def predict(self, request: Request) -> Response:
        """Predict images: of a form with one or several fields ``image``, or the body itself."""
        reject = _flag(request, "reject", True)
        kind = media_type(request)
        if kind.startswith(RAW):
            images = [("image 0", await read_body(request, MOST_BODY))]
        elif kind == "multipart/form-data":
            images = images_of(await read_form(request))
        else:
            raise UnsupportedError(
                "send an image as the body (Content-Type: image/jpeg), or a form with fields 'image'"
            )
        return Json(await asyncio.wrap_future(self._station.work(lambda: self._predicted(images, reject))))

    def _predicted(self, images: list[tuple[str, bytes]], reject: bool) -> dict[str, Any]:
        station = self._station
        names = [name for name, _ in images]
        pixels: list[np.ndarray] = [station.decode(data, name) for name, data in images]
        return _answers(station.predict(pixels, names, reject))


def _answers(seen: Observation) -> dict[str, Any]:
    return {
        "generation": seen.snapshot.generation.number,
        "predictions": [dataclasses.asdict(one) for one in seen.predictions],
    }


def _flag(request: Request, name: str, default: bool) -> bool:
    given = request.query_params.get(name)
    if given is None:
        return default
    if given not in ("true", "false"):
        raise InputError(f"{name} must be true or false, but is '{given[:20]}'")
    return given == "true"
