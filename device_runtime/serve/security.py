"""Who may ask for what: token, hosts, origins, and the headers of every answer.

A web page that a person visits can make their browser send requests here. Therefore the ``Host`` of a request must be a
name of this device (a page whose name is rebound to this address has another one), its ``Origin`` must be the same, and
the session cookie is never sent with a request that another page started.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import socket
import stat
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from device_runtime.serve.answers import Memory
from device_runtime.serve.errors import ANSWERED, ForbiddenError, UnauthorisedError, answer_to
from device_runtime.service.frames import RateLimitedWarning
from ssd_edge import files
from ssd_edge.errors import EnvironmentUnfitError, InputError

log = logging.getLogger(__name__)

TOKEN = "token"  # file in a root
SLOWDOWN = 1.0  # seconds before a wrong token is refused
MOST_SLOW = 16  # wrong tokens that are slowed down at once; more are refused at once
COOKIE_AGE = 30 * 24 * 3600  # seconds
_TOKEN = re.compile(r"[\x21-\x7e]{16,512}")
_AUTHORITY = re.compile(r"(?P<host>[\w.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{0,5})?", re.ASCII)
_READS = ("GET", "HEAD", "OPTIONS")
# The page, the documentation, the state of health, and signing in. Everything else needs the token where there is one.
_OPEN = re.compile(
    r"/|/docs(/style\.css)?|/openapi\.json|/console/.*|/v2/health/(live|ready)|/v1/session|/favicon\.ico"
)
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
        "connect-src 'self'; font-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Return True for an address that only this machine can connect to, and for ``localhost``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def read_token(root: Path, path: Path | None, needed: bool) -> tuple[str | None, bool]:
    """Return the token, and True if it was created now.

    Args:
        root: Root of the device.
        path: File of the token; None for `TOKEN` in the root.
        needed: Create the token if there is none.

    Raises:
        InputError: The file holds no token.
        EnvironmentUnfitError: Others may read it, or it cannot be read or written.
    """
    chosen = root / TOKEN if path is None else path
    tree = files.Tree(chosen.parent)
    about = tree.status(chosen)
    if about is None:
        if not needed and path is None:
            return None, False
        token = secrets.token_urlsafe(24)
        tree.write(chosen, f"{token}\n".encode(), 0o600)
        return token, True
    if about.st_mode & 0o077 and not stat.S_ISLNK(about.st_mode):
        raise EnvironmentUnfitError(
            f"other users may read the token in {chosen} (mode {stat.S_IMODE(about.st_mode):o}); run: chmod 600 "
            f"{chosen}, or remove it to get a new one"
        )
    try:
        token = tree.read(chosen).decode("ascii").strip()
    except OSError as error:
        raise files.unfit(chosen, error) from error
    except UnicodeDecodeError:
        token = ""
    if not _TOKEN.fullmatch(token):
        raise InputError(
            f"{chosen} must hold one word of 16 to 512 ASCII characters, but does not; remove it to get a new token"
        )
    return token, False


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may use the service.

    Attributes:
        token: The token; None if everyone who can connect may.
        names: Names and addresses by which the service may be called, in lower case.
        any_address: Also by any address: it listens on all of them. A rebound name is never an address.
        port: The port it listens on.
    """

    token: str | None = None
    names: frozenset[str] = frozenset()
    any_address: bool = False
    port: int = 0

    @classmethod
    def of(cls, host: str, port: int, token: str | None, more: Iterable[str] = ()) -> Access:
        """Return who may use a service that listens on an address.

        Args:
            host: The address or name that it listens on.
            port: The port that it listens on.
            token: The token, or None.
            more: Further names.
        """
        own = socket.gethostname().lower()
        names = {host, "localhost", "127.0.0.1", "::1", own, own.partition(".")[0] + ".local", *more}
        return cls(token, frozenset(name.lower().strip("[]") for name in names), host in ("0.0.0.0", "::", ""), port)

    def knows(self, authority: str) -> bool:
        """Return True if the host in ``host:port`` is this service."""
        if (found := _AUTHORITY.fullmatch(authority)) is None:  # also one with a user or a path
            return False
        host = found["host"].lower().strip("[]")
        if host in self.names or f"{host}." in self.names or host.rstrip(".") in self.names:
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return self.any_address

    @property
    def cookie(self) -> str:
        """Name of the session cookie; cookies do not tell ports apart."""
        return f"ssd_edge_{self.port}"

    @property
    def session(self) -> str:
        """Value of the session cookie, from which the token cannot be told."""
        return hmac.new((self.token or "").encode(), b"session of the console", hashlib.sha256).hexdigest()

    def accepts(self, token: str) -> bool:
        """Return True for the token, in the same time whatever is given."""
        return self.token is None or hmac.compare_digest(token.encode("utf-8", "replace"), self.token.encode())

    def signed_in(self, connection: HTTPConnection) -> bool:
        """Return True if a request carries the session cookie, or none is needed."""
        given = connection.cookies.get(self.cookie, "")
        return self.token is None or hmac.compare_digest(given.encode("utf-8", "replace"), self.session.encode())


class Doorman:
    """Check of tokens, which slows down those who guess.

    Args:
        access: Who may use the service.

    Attributes:
        access: See above.
    """

    def __init__(self, access: Access) -> None:
        self.access = access
        self._slowed = 0
        self._warning = RateLimitedWarning()

    async def check(self, connection: HTTPConnection) -> None:
        """Refuse a request without the token or the session cookie.

        Raises:
            UnauthorisedError: It has neither.
        """
        if self.access.signed_in(connection):
            return
        kind, _, token = connection.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            raise UnauthorisedError("this needs the token of the device; sign in, or send: Authorization: Bearer TOKEN")
        await self.check_token(token.strip(), connection)

    async def check_token(self, token: str, connection: HTTPConnection) -> None:
        """Refuse a wrong token, after `SLOWDOWN`.

        Raises:
            UnauthorisedError: It is wrong.
        """
        if self.access.accepts(token):
            return
        client = connection.client.host if connection.client else "unknown"
        self._warning.warn(f"a wrong token was given by {client}", "wrong_token")
        if self._slowed < MOST_SLOW:
            self._slowed += 1
            try:
                await asyncio.sleep(SLOWDOWN)
            finally:
                self._slowed -= 1
        raise UnauthorisedError("the token is wrong; the right one is in the file 'token' of the device's root")


class Guard:
    """Application around another one: refuses what may not be, and adds `HEADERS` to every answer.

    Args:
        app: The application.
        doorman: What checks tokens.
        memory: Memory of the bodies of all requests.
    """

    def __init__(self, app: ASGIApp, doorman: Doorman, memory: Memory) -> None:
        self._app, self._doorman, self._memory = app, doorman, memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            connection = HTTPConnection(scope)
            self._check_origin(scope, connection.headers)
            if not _OPEN.fullmatch(scope["path"]):
                await self._doorman.check(connection)
        except (ForbiddenError, UnauthorisedError) as error:
            await answer_to(error)(scope, receive, send_with_headers)
            return
        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            if not scope.get(ANSWERED):  # Starlette raises it again, to be logged twice
                raise
        finally:
            self._memory.release(scope)

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        """Refuse a request for another host, or one that another page started.

        Raises:
            ForbiddenError: It is one.
        """
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._doorman.access.knows(hosts[0]):
            raise ForbiddenError(
                f"this service is not called '{', '.join(hosts)[:100]}'; to call it so, start it with --allow-host NAME"
            )
        origins = headers.getlist("origin")
        same = all(_authority(origin) == hosts[0].lower() for origin in origins)
        # a link elsewhere may open the page
        opened = scope["method"] in _READS and _OPEN.fullmatch(scope["path"])
        site = "none" if opened else headers.get("sec-fetch-site", "none")
        if not same or site not in ("same-origin", "none"):
            raise ForbiddenError(
                f"the page that sent this is from {', '.join(origins)[:100] or 'another site'}, but only the page of "
                "this device may; open the console of this device"
            )


def _authority(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
