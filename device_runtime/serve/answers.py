"""Bodies of requests, read with limits and in memory only, and JSON answers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from device_runtime.serve.asked import BusyError
from device_runtime.serve.errors import TooLargeError, UnsupportedError
from ssd_edge.errors import InputError

MOST_JSON = 2**20  # bytes
MOST_HELD = 256 * 2**20  # bytes of the bodies of all requests that are being answered
_HELD = "ssd_edge.held"  # key of a request's scope: bytes of its body that are in memory


class Memory:
    """Memory of the bodies of all requests; used in the event loop only."""

    def __init__(self) -> None:
        self.held = 0

    def take(self, scope: MutableMapping[str, Any], count: int) -> None:
        """Count bytes of a request.

        Raises:
            BusyError: All requests together would hold more than `MOST_HELD`.
        """
        if self.held + count > MOST_HELD:
            raise BusyError("too much is being uploaded at once; try again in a moment")
        self.held += count
        scope[_HELD] = scope.get(_HELD, 0) + count

    def release(self, scope: MutableMapping[str, Any]) -> None:
        """Forget a request that was answered."""
        self.held -= scope.pop(_HELD, 0)


class Json(Response):
    """A JSON value as an answer, in ASCII: names that are not UTF-8 are escaped."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the bytes of a value."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def media_type(request: Request) -> str:
    """Return the type of a request's body without parameters, in lower case."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def parts_of(request: Request, most: int) -> AsyncIterator[bytes]:
    """Yield the body of a request as it arrives.

    Args:
        request: The request.
        most: Limit in bytes.

    Raises:
        TooLargeError: It is longer, or says so.
        UnsupportedError: It is compressed: a few bytes could become any number.
        BusyError: The bodies of all requests are too long together.
    """
    if (coding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise UnsupportedError(f"a body with the encoding {coding[:20]} is not read; send it as it is")
    too_large = TooLargeError(f"a request of this kind may have at most {most:,} bytes; send less at once")
    stated, memory, got = request.headers.get("content-length", ""), request.app.state.memory, 0
    if stated.isdecimal() and int(stated) > most:
        raise too_large
    async for part in request.stream():
        got += len(part)
        if got > most:
            raise too_large
        memory.take(request.scope, len(part))
        yield part


async def read_body(request: Request, most: int) -> bytes:
    """Return the body of a request; see `parts_of`."""
    return b"".join([part async for part in parts_of(request, most)])


async def read_json(request: Request, most: int = MOST_JSON) -> dict[str, Any]:
    """Return the JSON object in the body of a request.

    Raises:
        UnsupportedError: The body is not said to be JSON: a page elsewhere can send anything else without being asked.
        InputError: It is no JSON object.
        TooLargeError: It is too long.
    """
    if media_type(request) != "application/json":
        raise UnsupportedError("this needs a JSON object; send it with the header Content-Type: application/json")
    return parse_json(await read_body(request, most))


def parse_json(data: bytes | bytearray) -> dict[str, Any]:
    """Return the JSON object in some bytes.

    Raises:
        InputError: They are none.
    """
    try:
        found = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"the body must be a JSON object, but is a {type(found).__name__}")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def take(values: dict[str, Any], key: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
    """Return a value of a JSON object.

    Args:
        values: The object.
        key: Key of the value.
        kind: Type that it must have; a bool is not a number.
        default: Value if there is none; it must be there if this is left out.

    Raises:
        InputError: It is missing, or has another type.
    """
    if key not in values:
        if default is ...:
            raise InputError(f"'{key}' is missing; the body has: {', '.join(sorted(values))[:200] or 'nothing'}")
        return default
    value = values[key]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join({str: "a text", int: "a whole number", float: "a number"}.get(k, k.__name__) for k in kinds)
        raise InputError(f"'{key}' must be {names}, but is {type(value).__name__}: {value!r:.60}")
    return value


def only(values: dict[str, Any], *known: str) -> None:
    """Check that a JSON object has no other keys.

    Raises:
        InputError: It has; a misspelt one would be ignored otherwise.
    """
    if others := sorted(set(values) - set(known)):
        raise InputError(f"'{others[0]}' is not known here; known: {', '.join(known)}")
