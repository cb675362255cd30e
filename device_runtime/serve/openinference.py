"""Routes of the Open Inference Protocol, version 2, with the extension for binary tensors.

Specification: github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md. The model is the
device's bundle, by its name or as ``ssd-edge``; its versions are the generations.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from device_runtime.device import Observation
from device_runtime.serve.answers import Json, media_type, parse_json, read_body, take
from device_runtime.serve.asked import UnknownError
from device_runtime.serve.errors import UnsupportedError
from device_runtime.serve.metrics import Metrics
from device_runtime.serve.station import Station
from ssd_edge.errors import InputError
from ssd_edge.system import VERSION

NAME = "ssd-edge"  # name of the model beside that of its bundle, which another bundle changes
LENGTH = "inference-header-content-length"
MOST_BODY = 64 * 2**20  # bytes of a request with binary tensors
MOST_TEXT = 8 * 2**20  # bytes of JSON, which takes far longer to read
MOST_IMAGES = 100
OUTPUTS = {"label": "BYTES", "nearest": "BYTES", "score": "FP32", "margin": "FP32"}


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A request.

    Attributes:
        images: uint8 ``(N, H, W, 3)``.
        outputs: Name of each output → whether it is to be binary.
        id: Id that the client gave, or None.
    """

    images: np.ndarray
    outputs: Mapping[str, bool]
    id: str | None


class OpenInference:
    """Routes of the protocol.

    Args:
        station: The device and what runs beside it.
        metrics: Where predictions are counted.
    """

    def __init__(self, station: Station, metrics: Metrics) -> None:
        self._station, self._metrics = station, metrics

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        model, version = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
        return [
            Route("/v2", self.server),
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.ready),
            *(Route(path, self.model) for path in (model, version)),
            *(Route(f"{path}/ready", self.model_ready) for path in (model, version)),
            *(Route(f"{path}/infer", self.infer, methods=["POST"]) for path in (model, version)),
        ]

    async def server(self, request: Request) -> Response:
        """Tell about the server."""
        return Json({"name": NAME, "version": VERSION, "extensions": ["binary_tensor_data"]})

    async def live(self, request: Request) -> Response:
        """Tell that the process answers."""
        return Json({"live": True})

    async def ready(self, request: Request) -> Response:
        """Tell that the backbone has been started."""
        return Json({"ready": True})

    def model(self, request: Request) -> Response:
        """Tell about the model."""
        self._version(request)
        device = self._station.device
        size = device.bundle.size
        return Json(
            {
                "name": request.path_params["model"],
                "versions": [str(number) for number in device.store.numbers()],
                "platform": f"ssd-edge_{device.snapshot.head.learner}",
                "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}],
                "outputs": [{"name": name, "datatype": kind, "shape": [-1]} for name, kind in OUTPUTS.items()],
                "parameters": {"size": size, "generation": device.generation.number, "bundle": device.bundle.name},
            }
        )

    def model_ready(self, request: Request) -> Response:
        """Tell whether the model knows a class."""
        number = self._version(request)
        snapshot = self._station.device.snapshot if number is None else self._station.at(number)
        ready = bool(snapshot.registry.names)
        return Json({"name": request.path_params["model"], "ready": ready}, 200 if ready else 503)

    def _version(self, request: Request) -> int | None:
        """Return the generation that is named, or None if none is.

        Raises:
            UnknownError: There is no such model, or no such version.
        """
        name = request.path_params["model"]
        if name not in (NAME, self._station.device.bundle.name):
            raise UnknownError(f"there is no model '{name[:80]}'; the model is '{NAME}'")
        version = request.path_params.get("version")
        if version is None:
            return None
        numbers = self._station.device.store.numbers()
        if not version.isascii() or not version.isdecimal() or int(version[:12]) not in numbers:
            known = ", ".join(map(str, numbers))
            raise UnknownError(
                f"there is no version '{version[:20]}' of the model, or it was pruned; versions: {known}"
            )
        return int(version[:12])

    async def infer(self, request: Request) -> Response:
        """Predict images."""
        number = self._version(request)
        body, length = await _read(request)

        def predicted() -> tuple[_Asked, Observation]:  # JSON, too: reading it may take a second
            asked = _asked(body, length)
            names = [f"image {index}" for index in range(len(asked.images))]
            return asked, self._station.predict(list(asked.images), names, True, number)

        began = time.monotonic()
        asked, seen = await asyncio.wrap_future(self._station.work(predicted))
        self._metrics.predicted("http", time.monotonic() - began, [one.label for one in seen.predictions])
        return _answer(request.path_params["model"], asked, seen)


async def _read(request: Request) -> tuple[bytes, int]:
    """Return the body of a request, and how many bytes of it are JSON.

    Raises:
        InputError: Its header is not valid.
        UnsupportedError: It is neither JSON nor has binary tensors.
    """
    stated = request.headers.get(LENGTH)
    if stated is None:
        if media_type(request) not in ("application/json", ""):  # Triton's client names none; nothing is changed here
            raise UnsupportedError(f"send JSON with Content-Type: application/json, or binary tensors with {LENGTH}")
        body = await read_body(request, MOST_TEXT)
        length = len(body)
    else:
        body = await read_body(request, MOST_BODY)
        length = int(stated) if stated.isascii() and stated.isdecimal() and len(stated) < 12 else -1
        if not 0 < length <= min(len(body), MOST_TEXT):
            raise InputError(f"{LENGTH} is {stated[:20]}, but the body has {len(body)} bytes")
    return body, length


def _asked(body: bytes, length: int) -> _Asked:
    """Return what a request asks for.

    Raises:
        InputError: It is not valid.
    """
    values = parse_json(body[:length])
    inputs = take(values, "inputs", list)
    if len(inputs) != 1 or not isinstance(inputs[0], dict) or inputs[0].get("name") != "images":
        raise InputError("'inputs' must have one tensor, named 'images'")
    parameters = take(values, "parameters", dict, {})
    binary = take(parameters, "binary_data_output", bool, False)
    return _Asked(
        _images(inputs[0], memoryview(body)[length:]),
        _outputs(take(values, "outputs", list, []), binary),
        take(values, "id", (str, type(None)), None),
    )


def _images(tensor: dict[str, Any], rest: memoryview) -> np.ndarray:
    shape = take(tensor, "shape", list)
    whole = len(shape) == 4 and all(type(side) is int and side > 0 for side in shape)
    if not whole or shape[3] != 3 or shape[0] > MOST_IMAGES or max(shape) > MOST_BODY:
        raise InputError(
            f"the shape of 'images' must be [n, height, width, 3] with n up to {MOST_IMAGES}: {shape!r:.80}"
        )
    if (kind := take(tensor, "datatype", str)) != "UINT8":
        raise InputError(f"the datatype of 'images' must be UINT8, but is {kind[:20]}")
    count = shape[0] * shape[1] * shape[2] * shape[3]
    size = take(take(tensor, "parameters", dict, {}), "binary_data_size", int, None)
    if size is not None:
        if "data" in tensor or not size == count == len(rest):
            raise InputError(
                f"'images' has the shape {shape}, {count} bytes, but says {size}, and {len(rest)} follow the JSON"
            )
        sent: np.ndarray = np.frombuffer(rest, np.uint8).reshape(shape)
        return sent
    if len(rest):
        raise InputError(f"{len(rest)} bytes follow the JSON, but no tensor has 'binary_data_size'")
    found = _flat(take(tensor, "data", list), shape)
    if len(found) != count or set(map(type, found)) != {int} or min(found) < 0 or max(found) > 255:
        raise InputError(f"'data' must have {count} whole numbers from 0 to 255, as one list or nested like {shape}")
    pixels: np.ndarray = np.array(found, np.uint8).reshape(shape)
    return pixels


def _flat(data: list[Any], shape: Sequence[int]) -> list[Any]:
    """Return the elements of a tensor in one list, which is empty if it is nested in another way than its shape."""
    if not data or not isinstance(data[0], list):
        return data
    rows = [data]
    for side in shape[:-1]:
        if not all(isinstance(row, list) and len(row) == side for row in rows):
            return []
        rows = list(itertools.chain.from_iterable(rows))
    if not all(isinstance(row, list) for row in rows):
        return []
    return list(itertools.chain.from_iterable(rows))


def _outputs(asked: Sequence[Any], binary: bool) -> dict[str, bool]:
    found: dict[str, bool] = {}
    for output in asked:
        name = output.get("name") if isinstance(output, dict) else None
        if not isinstance(name, str) or name not in OUTPUTS:
            raise InputError(f"there is no output {name!r:.40}; outputs: {', '.join(OUTPUTS)}")
        found[name] = take(take(output, "parameters", dict, {}), "binary_data", bool, binary)
    return found or dict.fromkeys(OUTPUTS, binary)


def _answer(model: str, asked: _Asked, seen: Observation) -> Response:
    outputs, tail = [], b""
    for name, binary in asked.outputs.items():
        values = [getattr(prediction, name) for prediction in seen.predictions]
        output: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name], "shape": [len(values)]}
        if binary:
            data = _packed(values, OUTPUTS[name])
            output["parameters"] = {"binary_data_size": len(data)}
            tail += data
        else:
            output["data"] = values
        outputs.append(output)
    number = seen.snapshot.generation.number
    body: dict[str, Any] = {"model_name": model, "model_version": str(number), "outputs": outputs}
    if asked.id is not None:
        body["id"] = asked.id
    answer = Json(body)
    if tail:
        head = bytes(answer.body)
        headers = {LENGTH: str(len(head))}
        answer = Response(head + tail, media_type="application/octet-stream", headers=headers)  # type: ignore[assignment]
    return answer


def _packed(values: Sequence[Any], kind: str) -> bytes:
    if kind == "FP32":
        return np.array([np.nan if value is None else value for value in values], "<f4").tobytes()
    return b"".join(struct.pack("<I", len(data)) + data for data in (str(value).encode() for value in values))
