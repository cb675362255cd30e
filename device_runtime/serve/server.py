"""`serve`: the process of the service, from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from device_runtime.device import Device
from device_runtime.serve.app import build
from device_runtime.serve.cameras import EVERY, Cameras
from device_runtime.serve.connections import HEAD_SECONDS, Connection
from device_runtime.serve.events import Events
from device_runtime.serve.mqtt import Bridge, Broker
from device_runtime.serve.security import Access, is_loopback, read_token
from device_runtime.serve.station import Station
from device_runtime.serve.tray import Tray
from device_runtime.service import systemd
from device_runtime.service.follower import REFRESH
from ssd_edge.errors import EnvironmentUnfitError, InputError, system_problem
from ssd_edge.system import return_memory

log = logging.getLogger(__name__)

GRACE = 5  # seconds that running requests get at the end
STUCK = 60.0  # seconds without progress after which the watchdog is no longer fed
NAP = 0.5  # seconds between two looks at signals' and systemd's due work
STATUS = 10.0  # seconds between two status lines for systemd, and until freed memory is given back


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the server.

    Attributes:
        host: Address or name to listen on.
        port: Port to listen on; 0 for a free one.
        token_file: File of the token; None for the one in the root.
        allow_hosts: Further names by which the service may be called.
        tls_cert: File of a certificate chain; None for HTTP.
        tls_key: File of its private key.
        strict: See `Device.open`.
        cameras: Cameras, see `Cameras`.
        every: Seconds between two answers of a camera at least.
        mqtt: The MQTT broker; None for none.
        mqtt_commands: Let others on the broker teach and roll back.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    token_file: Path | None = None
    allow_hosts: Sequence[str] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    strict: bool = False
    cameras: Sequence[str] = ()
    every: float = EVERY
    mqtt: Broker | None = None
    mqtt_commands: bool = False


def serve(
    root: Path,
    options: Options,
    say: Callable[[str], object],
    ready: Callable[[str], object],
) -> None:
    """Serve a device until SIGTERM or SIGINT.

    Args:
        root: Root of the device.
        options: How.
        say: Prints a sentence for people on standard error.
        ready: Called with the address once it answers.

    Raises:
        InputError: No bundle is installed, or an option is wrong.
        EnvironmentUnfitError: The address is taken or not one of this machine, or others may read the token.
        SlowerProviderError, BundleRefusedError: The backbone cannot run as it should.
    """
    if (options.tls_cert is None) != (options.tls_key is None):
        raise InputError("--tls-cert and --tls-key belong together; give both, or neither for HTTP")
    with Device.open(root, options.strict) as device, _bound(options.host, options.port) as listener:
        port = listener.getsockname()[1]
        token, created = read_token(root, options.token_file, not is_loopback(options.host))
        events = Events()
        tray = Tray(lambda count: events.publish("tray", count=count))
        cameras = Cameras(device, options.cameras, events, tray, options.every) if options.cameras else None
        station = Station(device, events, cameras, tray)
        parts: list[Cameras | Bridge] = [] if cameras is None else [cameras]
        if options.mqtt is not None:
            parts.append(Bridge(station, options.mqtt, options.mqtt_commands))
        try:
            station.warm()
            access = Access.of(options.host, port, token, options.allow_hosts)
            config = uvicorn.Config(
                build(station, access),
                host=options.host,
                port=port,
                loop="asyncio",
                http=Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=GRACE,
                ssl_certfile=options.tls_cert,
                ssl_keyfile=options.tls_key,
            )
            with _tls_errors(options):
                config.load()
            address = f"{'https' if options.tls_cert else 'http'}://{_shown(options.host)}:{port}"

            def started() -> None:
                for part in parts:
                    part.start()
                if created:
                    where = options.token_file or root / "token"
                    say(f"the token, shown this once (it is kept in {where}): {token}")
                ready(address)
                known = len(device.classes)
                systemd.notify("READY=1", f"serving at {address}: {known} classes")
                text = "ready: serving at %s with generation %d, %d classes, on %s"
                about = (address, device.generation.number, known, device.embedder.provider)
                log.info(text, *about, extra={"code": "ready"})

            for quiet in ("uvicorn", "python_multipart"):  # they warn of every invalid request and form
                logging.getLogger(quiet).setLevel(logging.ERROR)
            # how long a client may take to agree on a key, for which uvicorn has no option
            asyncio.constants.SSL_HANDSHAKE_TIMEOUT = HEAD_SECONDS  # type: ignore[attr-defined]
            asyncio.run(_Server(config, station, started).serve([listener]))
        finally:
            systemd.notify("STOPPING=1", "stopping")
            for part in reversed(parts):
                part.close()
            station.close()


class _Server(uvicorn.Server):
    """Uvicorn with the signals, the heartbeat and the periodic work of the service.

    Args:
        config: Configuration of uvicorn.
        station: What is served.
        started: Called once connections are accepted.
    """

    def __init__(self, config: uvicorn.Config, station: Station, started: Callable[[], object]) -> None:
        super().__init__(config)
        self._station, self._ready = station, started
        self._heart = systemd.Heartbeat()
        self._tasks: list[asyncio.Task[None]] = []

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals in the loop: uvicorn's own would be raised again at the end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        self.force_exit = self.should_exit  # the second signal
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections, and start the periodic work."""
        await super().startup(sockets)
        self._tasks = [asyncio.create_task(self._beat()), asyncio.create_task(self._follow())]
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams, then the requests."""
        for task in self._tasks:
            task.cancel()
        self._station.events.close()
        await super().shutdown(sockets)

    async def _beat(self) -> None:
        """Send heartbeats from the loop, as long as requests are answered."""
        loop = asyncio.get_running_loop()
        finished, since = -1, loop.time()
        while True:
            if self._station.finished != finished or not self._station.waiting:
                finished, since = self._station.finished, loop.time()
            cameras = self._station.cameras
            if loop.time() - since < STUCK and not (cameras is not None and cameras.hangs(STUCK)):
                self._heart.beat()
            await asyncio.sleep(max(0.01, self._heart.pause(NAP)))

    async def _follow(self) -> None:
        """Follow what other processes commit, and tell systemd how it goes."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            await asyncio.to_thread(self._station.refresh)
            if loop.time() >= due:
                due = loop.time() + STATUS
                number = self._station.device.generation.number
                systemd.notify("", f"generation {number}: {self._station.finished} requests answered")
                await asyncio.to_thread(return_memory)  # a large photograph takes 320 MB for a moment
            await asyncio.sleep(REFRESH)


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """Bind a socket, before anything takes long."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InputError(f"'{host}' is not an address of this machine ({error}); use 127.0.0.1 or 0.0.0.0") from error
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and host == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            listener.bind(address)
            listener.listen(128)
        except OSError as error:
            raise EnvironmentUnfitError(
                f"cannot listen on {_shown(host)}:{port} ({error.strerror}); end what listens there, or use --port"
            ) from error
        listener.setblocking(False)
        yield listener


@contextlib.contextmanager
def _tls_errors(options: Options) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = system_problem(error) if isinstance(error, OSError) and error.errno else error
        raise InputError(f"{options.tls_cert} and {options.tls_key} are no certificate and key ({reason})") from error


def _shown(host: Any) -> str:
    return f"[{host}]" if ":" in host else str(host)
