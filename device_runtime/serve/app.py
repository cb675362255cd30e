"""The HTTP application: its routes, and those of the page, the session and the state of the device."""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from device_runtime.serve.answers import Json, Memory, only, read_json, take
from device_runtime.serve.asked import UnknownError
from device_runtime.serve.collecting import Collecting
from device_runtime.serve.errors import on_error
from device_runtime.serve.inference import Inference
from device_runtime.serve.metrics import Metrics
from device_runtime.serve.openinference import OpenInference
from device_runtime.serve.reference import Reference
from device_runtime.serve.security import COOKIE_AGE, Access, Doorman, Guard
from device_runtime.serve.station import Station
from device_runtime.serve.streams import Streams
from device_runtime.serve.teaching import Teaching
from ssd_edge import files
from ssd_edge.errors import SSDEdgeError
from ssd_edge.system import VERSION

CONSOLE = Path(__file__).parent / "console"
MOST_TOKEN = 4096  # bytes of what anyone may send


class Session:
    """Routes to sign in and out.

    Args:
        station: The device and what runs beside it.
        doorman: What checks tokens.
    """

    def __init__(self, station: Station, doorman: Doorman) -> None:
        self._station, self._doorman = station, doorman

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [
            Route("/v1/session", self.show, methods=["GET"]),
            Route("/v1/session", self.sign_in, methods=["POST"]),
            Route("/v1/session", self.sign_out, methods=["DELETE"]),
        ]

    async def show(self, request: Request) -> Response:
        """Say whether a token is needed, and whether this browser has given it."""
        access = self._doorman.access
        signed_in = access.signed_in(request)
        about = {"token_needed": access.token is not None, "signed_in": signed_in, "version": VERSION}
        if signed_in:
            about["device"] = self._station.device.bundle.name
        return Json(about)

    async def sign_in(self, request: Request) -> Response:
        """Set the session cookie if the token is right."""
        values = await read_json(request, MOST_TOKEN)
        only(values, "token")
        access = self._doorman.access
        await self._doorman.check_token(take(values, "token", str), request)
        answer = Json({"signed_in": True})
        if access.token is not None:
            secure = request.url.scheme == "https"
            answer.set_cookie(
                access.cookie, access.session, COOKIE_AGE, httponly=True, samesite="strict", secure=secure
            )
        return answer

    async def sign_out(self, request: Request) -> Response:
        """Delete the session cookie."""
        answer = Json({"signed_in": False})
        answer.delete_cookie(self._doorman.access.cookie, httponly=True, samesite="strict")
        return answer


class About:
    """Routes that tell about the device.

    Args:
        station: The device and what runs beside it.
    """

    def __init__(self, station: Station) -> None:
        self._station = station

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [
            Route("/v1/status", self.status),
            Route("/v1/classes", self.classes),
            Route("/v1/history", self.history),
        ]

    def status(self, request: Request) -> Response:
        """Return the state of the device, the machine and the service."""
        return Json(self._station.status())

    def classes(self, request: Request) -> Response:
        """Return the classes."""
        return Json(self._station.classes())

    def history(self, request: Request) -> Response:
        """Return all generations and events."""
        return Json(self._station.history().to_dict())


class Console(StaticFiles):
    """The files of the page, which a browser asks for again after every start."""

    def file_response(self, *args: object, **kwargs: object) -> Response:
        """Return a file that may be kept as long as it is the same."""
        answer = super().file_response(*args, **kwargs)  # type: ignore[arg-type]
        answer.headers["cache-control"] = "no-cache"
        return answer


async def _page(request: Request) -> Response:
    index = CONSOLE / "index.html"
    if not files.is_file(index):
        return RedirectResponse("/docs")
    return FileResponse(index, headers={"cache-control": "no-cache"})


async def _missing(request: Request, error: Exception) -> Response:
    return await on_error(request, UnknownError(f"there is nothing at {request.url.path[:200]}; see /docs"))


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it


async def _wrong_method(request: Request, error: Exception) -> Response:
    message = f"{request.method[:20]} is not possible at {request.url.path[:200]}; see /docs"
    answer = Json({"error": message, "code": 2}, 405)
    answer.headers.update(getattr(error, "headers", None) or {})
    return answer


def build(station: Station, access: Access) -> ASGIApp:
    """Return the application of a station.

    Args:
        station: The device and what runs beside it.
        access: Who may use it.
    """
    doorman, metrics = Doorman(access), Metrics(station)
    station.learned = metrics.learned
    routes: list[BaseRoute] = [
        Route("/", _page),
        *Session(station, doorman).routes(),
        *About(station).routes(),
        *Inference(station, metrics).routes(),
        *OpenInference(station, metrics).routes(),
        *Teaching(station).routes(),
        *Collecting(station).routes(),
        *Streams(station).routes(),
        *metrics.routes(),
        Mount("/console", Console(directory=CONSOLE, check_dir=False)),
    ]
    routes += Reference(routes).routes()
    errors = {404: _missing, 405: _wrong_method, ClientDisconnect: _left, SSDEdgeError: on_error, Exception: on_error}
    app = Starlette(routes=routes, exception_handlers=errors)
    app.state.memory = memory = Memory()
    return Guard(app, doorman, memory)
