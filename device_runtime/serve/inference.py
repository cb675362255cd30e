"""Routes that predict files: ``/v1/predict``, for whole images or the boxes of a detector."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from device_runtime.serve.answers import Json, media_type, read_body
from device_runtime.serve.errors import UnsupportedError
from device_runtime.serve.metrics import Metrics
from device_runtime.serve.station import Station
from device_runtime.serve.uploads import MOST_BODY, images_of, read_form, text_of
from ssd_edge import images
from ssd_edge.errors import InputError
from ssd_edge.images.whole import whole

RAW = ("image/", "application/octet-stream")  # types of a body that is an image
MOST_IMAGES = 100  # images and boxes of a request
LONGEST = 4096  # pixels per side of an image that boxes are cut from; a larger one is made smaller

Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class _Asked:
    """An image of a request.

    Attributes:
        name: Its name in answers and messages.
        data: Its file.
        boxes: What to predict; None for the whole image.
    """

    name: str
    data: bytes
    boxes: Sequence[Box] | None = None


class Inference:
    """Routes that predict.

    Args:
        station: The device and what runs beside it.
        metrics: Where predictions are counted.
    """

    def __init__(self, station: Station, metrics: Metrics) -> None:
        self._station, self._metrics = station, metrics

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [Route("/v1/predict", self.predict, methods=["POST"])]

    async def predict(self, request: Request) -> Response:
        """Predict images: of a form with one or several fields ``image``, or the body itself."""
        reject = _flag(request, "reject", True)
        kind = media_type(request)
        if kind.startswith(RAW):
            asked = [_Asked("image 0", await read_body(request, MOST_BODY))]
        elif kind == "multipart/form-data":
            parts = await read_form(request)
            asked = [_Asked(name, data) for name, data in images_of(parts, "boxes")]
            if (text := text_of(parts, "boxes")) is not None:
                boxes = _boxes(text, len(asked))
                asked = [dataclasses.replace(one, boxes=own) for one, own in zip(asked, boxes, strict=True)]
        else:
            raise UnsupportedError(
                "send an image as the body (Content-Type: image/jpeg), or a form with fields 'image'"
            )
        if (count := sum(1 if one.boxes is None else len(one.boxes) for one in asked)) > MOST_IMAGES:
            raise InputError(
                f"a request may have at most {MOST_IMAGES} images and boxes, but has {count}; send several"
            )
        began = time.monotonic()
        body = await asyncio.wrap_future(self._station.work(lambda: self._predicted(asked, reject)))
        self._metrics.predicted("http", time.monotonic() - began, [one["label"] for one in body["predictions"]])
        return Json(body)

    def _predicted(self, asked: Sequence[_Asked], reject: bool) -> dict[str, Any]:
        station, form = self._station, self._station.device.bundle.pixels
        pixels: list[np.ndarray] = []
        names: list[str] = []
        boxes: list[Box | None] = []
        for one in asked:
            if one.boxes is None:
                pixels.append(station.decode(one.data, one.name))
            else:
                pixels += [images.from_array(part, form, one.name) for part in _cut(one)]
            own: Sequence[Box | None] = [None] if one.boxes is None else one.boxes
            boxes += own
            names += [one.name] * len(own)
        if not pixels:
            return {"generation": station.device.generation.number, "predictions": []}
        seen = station.predict(pixels, names, reject)
        found = [dataclasses.asdict(prediction) for prediction in seen.predictions]
        for prediction, box in zip(found, boxes, strict=True):
            if box is not None:
                prediction["box"] = list(box)
        return {"generation": seen.snapshot.generation.number, "predictions": found}


def _cut(asked: _Asked) -> list[np.ndarray]:
    """Return the boxes of an image, uint8 RGB ``(H, W, 3)`` each.

    Raises:
        InputError: It cannot be read, or a box is not in it.
    """
    array = whole(asked.data, asked.name, LONGEST)
    stored = images.header(asked.data, asked.name)[1:]
    scale = max(array.shape[:2]) / max(stored)
    height, width = array.shape[:2]
    found = []
    for box in asked.boxes or ():
        left, top = (max(0, int(np.floor(value * scale))) for value in box[:2])
        right, bottom = (int(np.ceil(value * scale)) for value in box[2:])
        part = array[top : min(bottom, height), left : min(right, width)]
        if not part.size:
            raise InputError(
                f"the box {list(box)} is not in {asked.name}, which has {stored[0]} × {stored[1]} pixels; give x0, y0, "
                "x1, y1 with x0 < x1 and y0 < y1"
            )
        found.append(part)
    return found


def _boxes(text: str, count: int) -> list[list[Box]]:
    """Return the boxes of each image.

    Raises:
        InputError: The text is not a list of them for each image.
    """
    try:
        given = json.loads(text)
        found = [[(float(a), float(b), float(c), float(d)) for a, b, c, d in own] for own in given]
        if len(found) != count or not np.isfinite([value for own in found for box in own for value in box]).all():
            raise ValueError
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise InputError(
            f"'boxes' must be a JSON list with one list per image, {count} here, of boxes [x0, y0, x1, y1] in pixels"
        ) from error
    return found


def _flag(request: Request, name: str, default: bool) -> bool:
    given = request.query_params.get(name)
    if given is None:
        return default
    if given not in ("true", "false"):
        raise InputError(f"{name} must be true or false, but is '{given[:20]}'")
    return given == "true"
