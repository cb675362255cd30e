"""Errors as answers: each has a status of HTTP, a sentence, and the exit code that a command would end with."""

from __future__ import annotations

import logging

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from device_runtime.serve.asked import BusyError, UnknownError, meaning
from ssd_edge.errors import (
    BundleRefusedError,
    EnvironmentUnfitError,
    GateRefusedError,
    InputError,
    SSDEdgeError,
)

log = logging.getLogger(__name__)

ANSWERED = "ssd_edge.answered"  # key of a request's scope: an error of it was answered and, if it is a bug, logged
RETRY = 2  # seconds after which a request that was too many may be sent again


class ForbiddenError(InputError):
    """A request for another host, or of another page."""


class UnauthorisedError(InputError):
    """A request without the token."""


class TooLargeError(InputError):
    """A request larger than what is accepted."""


class UnsupportedError(InputError):
    """A request of a type that is not read."""


# The first one that an error is an instance of gives the status.
STATUS: dict[type[SSDEdgeError], int] = {
    ForbiddenError: 403,
    UnauthorisedError: 401,
    TooLargeError: 413,
    UnsupportedError: 415,
    UnknownError: 404,
    InputError: 400,
    GateRefusedError: 409,
    BundleRefusedError: 422,
    BusyError: 503,
    EnvironmentUnfitError: 503,
}


def answer_to(error: Exception) -> Response:
    """Return the answer for an error; one that is a bug is logged with its traceback."""
    known = meaning(error)
    if known is None:
        log.error("internal error: %s", error, exc_info=error, extra={"code": "internal_error"})
        body = {"error": "internal error: this is a bug in ssd-edge; its log says more", "code": SSDEdgeError.exit_code}
        return JSONResponse(body, 500)
    status = next((status for kind, status in STATUS.items() if isinstance(known, kind)), 503)
    headers = {}
    if isinstance(known, BusyError):
        headers["retry-after"] = str(RETRY)
    if status == 401:
        headers["www-authenticate"] = 'Bearer realm="ssd-edge"'
    return JSONResponse({"error": str(known), "code": known.exit_code}, status, headers)


async def on_error(request: Request, error: Exception) -> Response:
    """Answer a request that failed."""
    request.scope[ANSWERED] = True
    return answer_to(error)
