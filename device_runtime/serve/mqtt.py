"""The service on an MQTT broker: states, discovery by Home Assistant, and commands if they are switched on.

Nothing waits for the broker: only the latest value of each topic is kept, and all are published when it is there again.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import queue
import re
import secrets
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from device_runtime.serve import homeassistant
from device_runtime.serve.asked import BusyError, meaning
from device_runtime.serve.events import Event
from device_runtime.serve.station import Station
from device_runtime.service.frames import RateLimitedWarning
from ssd_edge import files
from ssd_edge.errors import InputError, SSDEdgeError, first_line, printable, require

if TYPE_CHECKING:
    from paho.mqtt.client import Client, MQTTMessage

log = logging.getLogger(__name__)

PASSWORD = "SSD_EDGE_MQTT_PASSWORD"  # environment variable
PORTS = {"mqtt": 1883, "mqtts": 8883}
KEEPALIVE = 30  # seconds; after one and a half times this, the broker tells that the device is gone
LONGEST_WAIT = 60  # seconds between two attempts to connect
NAP = 0.2  # seconds; a thread notices the end within this time
MOST_COMMANDS = 8  # that wait
MOST_RESULTS = 16  # of commands that wait for the broker
MOST_PAYLOAD = 4096  # bytes of a command
FRAMES, LEAST_FRAMES, MOST_FRAMES = 20, 3, 64  # that a command teaches
LONGEST_PREFIX = 200  # characters
_ENDED = ("done", "refused", "failed", "cancelled")


@dataclasses.dataclass(frozen=True)
class Broker:
    """Where the broker is, and what all topics begin with.

    Attributes:
        host: Name or address.
        port: Port.
        tls: Whether the connection is encrypted.
        user: User name; empty for none.
        password: Its password; empty for none.
        prefix: What all topics begin with, without a slash at its end.
        ca: File of the certificates that are trusted; None for those of the system.
    """

    host: str
    port: int
    tls: bool
    user: str
    password: str = dataclasses.field(repr=False)
    prefix: str
    ca: Path | None = None

    @classmethod
    def parse(cls, url: str, password_file: Path | None, environment: Mapping[str, str], ca: Path | None) -> Broker:
        """Read ``mqtt[s]://[USER@]HOST[:PORT][/PREFIX]``.

        Args:
            url: See above.
            password_file: File of the password; None for the environment variable `PASSWORD`, if there is one.
            environment: Environment variables.
            ca: See the attribute.

        Raises:
            InputError: The URL is not one, holds a password, or the prefix cannot be a topic; or a file cannot be read.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise InputError(f"--mqtt is no URL ({error}); use mqtt://USER@HOST:PORT/PREFIX") from error
        if parts.password is not None:
            raise InputError(
                "every user of this machine can read a password in --mqtt; remove it there, and write it to a file for "
                f"--mqtt-password-file or to the environment variable {PASSWORD}"
            )
        if parts.scheme not in PORTS or not parts.hostname:
            raise InputError(f"--mqtt must be mqtt://USER@HOST:PORT/PREFIX or mqtts://…, but is '{url[:200]}'")
        prefix = unquote(parts.path).strip("/") or f"ssd-edge/{homeassistant.safe(socket.gethostname())}"
        if re.search(r"[+#\x00-\x1f\x7f]|//|^\$", prefix) or len(prefix) > LONGEST_PREFIX:
            raise InputError(
                f"the prefix '{prefix[:50]}' of --mqtt cannot be the start of a topic: use levels of letters, digits, "
                f"- and _, at most {LONGEST_PREFIX} characters"
            )
        password = environment.get(PASSWORD, "")
        if password_file is not None:
            try:
                password = password_file.read_text(encoding="utf-8")[:1000].rstrip("\r\n")
            except (OSError, UnicodeError) as error:
                raise InputError(f"the password for MQTT cannot be read from {password_file} ({error})") from error
        if ca is not None and not files.is_file(ca):
            raise InputError(f"{ca} of --mqtt-ca is not a file; name the certificate of the authority (PEM)")
        user = unquote(parts.username or "")
        if password and not user:
            raise InputError("there is a password for MQTT, but no user; name one: mqtt://USER@HOST")
        return cls(parts.hostname, port or PORTS[parts.scheme], parts.scheme == "mqtts", user, password, prefix, ca)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Bridge:
    """Connection of a station to a broker.

    Args:
        station: The station.
        broker: The broker.
        commands: Let others on the broker teach and roll back.

    Attributes:
        connected: True while the broker is connected.

    Raises:
        EnvironmentUnfitError: paho-mqtt is not installed.
        InputError: The certificates cannot be used.
    """

    def __init__(self, station: Station, broker: Broker, commands: bool = False) -> None:
        require("paho.mqtt.client", "mqtt", "connect to an MQTT broker")
        self._station, self._broker, self._commanded = station, broker, commands
        self.connected = False
        self._closed = threading.Event()
        self._lock = threading.Lock()  # held while something is published, so that the order is that of the values
        self._values: dict[str, str] = {}  # topic → latest value, retained
        self._results: collections.deque[str] = collections.deque(maxlen=MOST_RESULTS)
        self._asked: queue.Queue[tuple[str, bytes]] = queue.Queue(MOST_COMMANDS)
        self._jobs: dict[str, dict[str, Any]] = {}  # id → the command that has started it
        self._stable: dict[str, tuple[str, int]] = {}  # camera → answer and generation that were published
        self._frames = FRAMES
        self._warning = RateLimitedWarning()
        self._client = self._connected_client()
        self._threads = [threading.Thread(target=self._follow, name="mqtt events", daemon=True)]
        if commands:
            self._threads.append(threading.Thread(target=self._obey, name="mqtt commands", daemon=True))

    def _connected_client(self) -> Client:
        """Return a client that is not connected yet."""
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        broker = self._broker
        client = Client(CallbackAPIVersion.VERSION2, f"ssd-edge-{secrets.token_hex(4)}", clean_session=True)
        if broker.user:
            client.username_pw_set(broker.user, broker.password or None)
        if broker.tls:
            try:
                client.tls_set(None if broker.ca is None else str(broker.ca))
            except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
                raise InputError(f"{broker.ca} of --mqtt-ca holds no certificates ({error})") from error
        client.will_set(self._topic("available"), "offline", 1, retain=True)
        client.reconnect_delay_set(1, LONGEST_WAIT)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_connect_fail = self._on_connect_fail
        client.on_message = self._on_message
        return client

    def start(self) -> None:
        """Connect, now or as soon as the broker is there, and publish from now on."""
        names = [feed.id for feed in self._station.cameras.list()] if self._station.cameras else []
        config = homeassistant.discovery(
            self._broker.prefix,
            self._station.device.bundle.name,
            names,
            (LEAST_FRAMES, MOST_FRAMES) if self._commanded else None,
        )
        self._set(homeassistant.topic(self._broker.prefix), json.dumps(config))
        for thread in self._threads:
            thread.start()
        self._client.connect_async(self._broker.host, self._broker.port, KEEPALIVE)
        self._client.loop_start()

    def close(self) -> None:
        """Tell that the device is gone, and disconnect."""
        self._closed.set()
        if self.connected:
            with contextlib.suppress(RuntimeError, ValueError):  # the connection was lost at this moment
                self._client.publish(self._topic("available"), "offline", 1, retain=True).wait_for_publish(2.0)
        self._client.disconnect()
        self._client.loop_stop()
        for thread in self._threads:
            thread.join(5.0)

    # the broker; in the thread of its client

    def _on_connect(self, client: Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._warning.warn(
                f"the MQTT broker {self._broker} refuses the connection ({reason}); check the user and the password",
                "mqtt_refused",
            )
            return
        log.info("connected to the MQTT broker %s", self._broker, extra={"code": "mqtt"})
        with self._lock:
            self.connected = True
            if self._commanded:
                # 0: at most once. A command must not be repeated after a reconnection.
                client.subscribe([(self._topic("command", name), 0) for name in ("teach", "rollback", "frames")])
            for topic, value in self._values.items():
                client.publish(topic, value, 0, retain=True)
            client.publish(self._topic("available"), "online", 1, retain=True)
            while self._results:
                client.publish(self._topic("command", "result"), self._results.popleft())

    def _on_disconnect(self, client: Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        was, self.connected = self.connected, False
        if was and not self._closed.is_set():
            log.warning(
                "the MQTT broker %s is gone (%s); connecting again", self._broker, reason, extra={"code": "mqtt_lost"}
            )

    def _on_connect_fail(self, client: Client, userdata: Any) -> None:
        reason = sys.exc_info()[1]  # paho calls this while it handles the exception
        why = "" if reason is None else f" ({first_line(reason)})"
        self._warning.warn(f"the MQTT broker {self._broker} cannot be reached{why}; trying again", "mqtt_lost")

    def _on_message(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        command = message.topic.rpartition("/")[2]
        if message.retain:  # it would be obeyed again at every connection
            self._warning.warn(
                f"a retained MQTT command '{command}' is ignored; send it without retain", "mqtt_ignored"
            )
            return
        try:
            self._asked.put_nowait((command, bytes(message.payload)))
        except queue.Full:
            self._tell({"command": command}, BusyError(f"{MOST_COMMANDS} commands wait already; try again later"))

    # values

    def _topic(self, *levels: str) -> str:
        return "/".join((self._broker.prefix, *levels))

    def _set(self, topic: str, value: str) -> None:
        """Keep the value of a topic, and publish it if it is another one."""
        with self._lock:
            if self._values.get(topic) != value:
                self._values[topic] = value
                if self.connected:
                    self._client.publish(topic, value, 0, retain=True)

    def _follow(self) -> None:
        """Turn events into values."""
        with self._station.events.subscribe() as subscription:
            self._read_all()
            while not self._closed.is_set() and not subscription.closed:
                event = subscription.get(NAP)
                if event is not None:
                    try:
                        self._on_event(event)
                    except Exception as error:  # one event must not end all that follow
                        self._warning.warn(f"{event.kind} was not published: {error}", "mqtt_failed", error)

    def _on_event(self, event: Event) -> None:
        if event.kind == "answer":
            self._set_answer(event.fields)
        elif event.kind == "camera":
            self._set_camera(event.fields["id"], event.fields["state"])
        elif event.kind in ("generation", "drift"):
            self._set_state()
        elif event.kind == "job":
            self._on_job(event.fields)
        elif event.kind == "lost":
            self._read_all()
            for name in list(self._jobs):
                self._on_job(self._station.jobs.get(name).to_dict())

    def _read_all(self) -> None:
        self._set_state()
        for feed in self._station.cameras.list() if self._station.cameras else ():
            told = feed.to_dict()
            self._set_camera(told["id"], told["state"])
            if told["answer"] is not None:
                self._set_answer(told["answer"])

    def _set_state(self) -> None:
        snapshot = self._station.device.snapshot
        drift = self._station.cameras.drift() if self._station.cameras else None
        value = {
            "generation": snapshot.generation.number,
            "classes": len(snapshot.registry.names),
            "drift": None if drift is None else drift.level,
            "index": None if drift is None else drift.psi,
            "frames": self._frames,
        }
        self._set(self._topic("state"), json.dumps(value))

    def _set_camera(self, camera: str, state: str) -> None:
        self._set(self._topic(camera, "available"), "online" if state == "running" else "offline")

    def _set_answer(self, answer: Mapping[str, Any]) -> None:
        """Publish a stable answer that is another one than before, or of another generation."""
        camera, stable = answer["camera"], answer["stable"]
        if stable is None or self._stable.get(camera) == (stable, answer["generation"]):
            return
        self._stable[camera] = stable, answer["generation"]
        score = answer["score"] if answer["nearest"] == stable else None  # it is that of the nearest class
        value = {"label": stable, "score": score, "generation": answer["generation"], "frame": answer["frame"]}
        self._set(self._topic(camera, "state"), json.dumps(value))
        model = homeassistant.safe(self._station.device.bundle.name)
        self._set(self._topic(camera, "classification", model), stable)

    # commands

    def _obey(self) -> None:
        """Carry out commands, one at a time."""
        while not self._closed.is_set():
            try:
                command, payload = self._asked.get(timeout=NAP)
            except queue.Empty:
                continue
            asked: dict[str, Any] = {"command": command}
            try:
                self._carry_out(asked, payload)
            except Exception as error:
                known = meaning(error)
                if known is None:
                    log.error("internal error: %s", error, exc_info=error, extra={"code": "internal_error"})
                    known = SSDEdgeError(f"internal error: {type(error).__name__}; the log of the device says more")
                self._tell(asked, known)

    def _carry_out(self, asked: dict[str, Any], payload: bytes) -> None:
        """Carry out a command, and tell the result; of a learn, once it has ended.

        Raises:
            SSDEdgeError: It cannot be carried out.
        """
        values = _parsed(payload)
        if asked["command"] == "frames":
            self._frames = _number(values, LEAST_FRAMES, MOST_FRAMES)
            self._set_state()
        elif asked["command"] == "rollback":
            number = _only(values, "generation").get("generation")
            result = self._station.rollback(None if number is None else _number(number, 1, 2**53))
            told = f"generation {result.generation} is in use again"
            self._tell(asked, told, generation=result.generation)
        else:
            values = _only(values, "label", "camera", "frames")
            label, camera = values.get("label"), values.get("camera")
            asked |= {"label": label}
            if not isinstance(label, str) or not isinstance(camera, str | None):
                raise InputError('a command to teach is {"label": NAME, "camera": ID, "frames": NUMBER}')
            feed = self._station.camera(camera)
            asked |= {"camera": feed.id}
            frames = feed.recent(_number(values.get("frames", self._frames), LEAST_FRAMES, MOST_FRAMES))
            pixels = [self._station.decode(frame.jpeg, f"frame {frame.number}") for frame in frames]
            job = self._station.learn({label: pixels})
            self._jobs[job.id] = asked
            self._on_job(job.to_dict())  # it may have ended before it was known here

    def _on_job(self, job: Mapping[str, Any]) -> None:
        """Tell the end of a learn that was commanded here, once."""
        if job["state"] not in _ENDED or (asked := self._jobs.pop(job["id"], None)) is None:
            return
        if job["result"] is not None:
            generation, held_out = job["result"]["generation"], job["result"]["held_out"]
            told = f"'{job['label']}' is learned in generation {generation}"
            if held_out is not None and held_out["accuracy"] is not None:
                told += f"; {held_out['accuracy']:.0%} of {held_out['images']} held-out images are recognised"
            self._tell(asked, told, generation=generation)
        else:
            error = job["error"] or {"error": f"'{job['label']}' was cancelled", "code": 130}
            self._tell(asked, error["error"], code=error["code"])

    def _tell(self, asked: Mapping[str, Any], message: str | SSDEdgeError, **more: Any) -> None:
        """Publish the result of a command, or keep it until the broker is there."""
        if isinstance(message, SSDEdgeError):
            more["code"] = message.exit_code
        told = printable(str(message))
        result = json.dumps({**asked, "ok": "code" not in more, "message": told, **more})
        with self._lock:
            if self.connected:
                self._client.publish(self._topic("command", "result"), result)
            else:
                self._results.append(result)


def _parsed(payload: bytes) -> Any:
    """Return the JSON value of a payload; an empty object for an empty one."""
    if len(payload) > MOST_PAYLOAD:
        raise InputError(f"a command has {len(payload):,} bytes, but may have at most {MOST_PAYLOAD:,}")
    try:
        return json.loads(payload) if payload.strip() else {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"the command is not valid JSON ({error})") from error


def _only(values: Any, *names: str) -> dict[str, Any]:
    """Return a JSON object that has no other keys."""
    if not isinstance(values, dict):
        raise InputError(f"a command must be a JSON object, but is a {type(values).__name__}")
    if unknown := sorted(set(values) - set(names)):
        raise InputError(f"'{unknown[0][:40]}' is unknown here; known: {', '.join(names)}")
    return values


def _number(value: Any, least: int, most: int) -> int:
    """Return a whole number in a range; a text that is one counts, too."""
    found = int(value) if isinstance(value, str) and value.isdecimal() else value
    found = int(found) if isinstance(found, float) and found.is_integer() else found
    if type(found) is not int or not least <= found <= most:
        raise InputError(f"it must be a whole number from {least} to {most}, but is {str(value)[:40]}")
    return found
