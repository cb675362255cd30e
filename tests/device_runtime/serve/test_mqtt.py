"""The bridge to MQTT, against a real mosquitto: what is published, commands, and a broker that is killed."""

from __future__ import annotations

import json
import queue
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_photos import picture
from helpers.waiting import until

from device_runtime.device import Device
from device_runtime.serve.cameras import Cameras
from device_runtime.serve.events import Events
from device_runtime.serve.mqtt import Bridge, Broker
from device_runtime.serve.station import Station
from device_runtime.serve.tray import Tray
from device_runtime.service import drift
from ssd_edge.errors import InputError

paho = pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed")
MOSQUITTO = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin") or ""
needs_mosquitto = pytest.mark.skipif(not MOSQUITTO, reason="mosquitto is not installed")


class Mosquitto:
    """A broker with a user ``shop`` whose password is ``right``."""

    def __init__(self, folder: Path, more: str = "") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        password, self._config = folder / "passwords", folder / "mosquitto.conf"
        subprocess.run(["mosquitto_passwd", "-b", "-c", password, "shop", "right"], check=True)
        password.chmod(0o644)
        text = f"user root\nlistener {self.port} 127.0.0.1\npassword_file {password}\nallow_anonymous false\n{more}"
        self._config.write_text(text)
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen([MOSQUITTO, "-c", self._config], stderr=subprocess.DEVNULL)
        until(self._answers)

    def _answers(self) -> bool:
        with socket.socket() as trial:
            return trial.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    broker = Mosquitto(tmp_path)
    yield broker
    broker.kill()


class Hearer:
    """A client that hears everything."""

    def __init__(self, port: int) -> None:
        self.messages: queue.Queue[tuple[str, str, bool]] = queue.Queue()
        self.last: dict[str, str] = {}
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2)
        self.client.username_pw_set("shop", "right")
        self.client.on_connect = lambda client, *more: client.subscribe("#", 1)
        self.client.on_message = self._hear
        self.client.reconnect_delay_set(1, 1)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()

    def _hear(self, client: Any, userdata: Any, message: Any) -> None:
        self.last[message.topic] = message.payload.decode()
        self.messages.put((message.topic, message.payload.decode(), message.retain))

    def json(self, topic: str) -> Any:
        return json.loads(until(lambda: self.last.get(topic)))

    def result(self, command: str, payload: str) -> dict[str, Any]:
        self.last.pop("shop/1/command/result", None)
        self.client.publish(f"shop/1/command/{command}", payload)
        return self.json("shop/1/command/result")

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


class Shop:
    """A station whose camera is a folder."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        self.device = Device.open(root)
        events = Events()
        self.tray = Tray()
        self.cameras = Cameras(self.device, [f"door={folder}"], events, self.tray)
        self.station = Station(self.device, events, self.cameras, self.tray)
        self.cameras.start()
        self.bridges: list[Bridge] = []
        self.shown = 0

    def bridge(self, port: int, commands: bool = False, password: str = "right") -> Bridge:
        broker = Broker.parse(f"mqtt://shop@127.0.0.1:{port}/shop/1", None, {"SSD_EDGE_MQTT_PASSWORD": password}, None)
        self.bridges.append(Bridge(self.station, broker, commands))
        self.bridges[-1].start()
        return self.bridges[-1]

    def show(self, name: str, count: int = 1) -> None:
        """Let the camera see something, and wait until that was answered."""
        for _ in range(count):
            self.shown += 1
            (self.folder / f"{self.shown}.part").write_bytes(picture(name, self.shown))
            (self.folder / f"{self.shown}.part").rename(self.folder / f"{self.shown}.png")
        (feed,) = self.cameras.list()
        until(lambda: feed.recent(1) and feed.recent(1)[0].number == self.shown)

    def close(self) -> None:
        for bridge in self.bridges:
            bridge.close()
        self.cameras.close()
        self.station.close()


@pytest.fixture
def shop(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.setattr(drift, "SAMPLES", 2000)
    (tmp_path / "camera").mkdir()
    shop = Shop(root, tmp_path / "camera")
    yield shop
    shop.close()


@pytest.fixture
def hear(mosquitto: Mosquitto) -> Iterator[Hearer]:
    hearer = Hearer(mosquitto.port)
    yield hearer
    hearer.close()


@needs_mosquitto
def test_states_are_retained_and_published_on_change(shop: Shop, mosquitto: Mosquitto) -> None:
    bridge = shop.bridge(mosquitto.port)
    until(lambda: bridge.connected)
    shop.show("cup", 3)
    shop.show("nut")
    shop.show("nut")
    hearer = Hearer(mosquitto.port)
    answer = hearer.json("shop/1/door/state")
    assert (answer["label"], answer["score"], answer["generation"]) == ("nut", None, 1)
    assert answer["frame"] == 4  # nothing was published for the fifth
    assert until(lambda: hearer.last.get("shop/1/door/classification/tiny")) == "nut"
    assert hearer.last["shop/1/available"] == hearer.last["shop/1/door/available"] == "online"
    state = hearer.json("shop/1/state")
    assert (state["generation"], state["classes"]) == (1, 3)
    assert all(retained for _, _, retained in list(hearer.messages.queue))
    shop.station.rename("nut", "bolt")
    shop.show("nut")
    until(lambda: hearer.json("shop/1/state")["generation"] == 2)
    until(lambda: hearer.json("shop/1/door/state")["label"] == "bolt")
    shop.folder.rename(shop.folder.with_name("away"))
    until(lambda: hearer.last["shop/1/door/available"] == "offline")
    bridge.close()
    until(lambda: hearer.last["shop/1/available"] == "offline")
    hearer.close()


@needs_mosquitto
def test_home_assistant_discovers_one_device(shop: Shop, mosquitto: Mosquitto, hear: Hearer) -> None:
    shop.bridge(mosquitto.port)
    found = hear.json("homeassistant/device/ssd_edge_shop_1/config")
    assert found["device"]["identifiers"] == ["ssd_edge_shop_1"]
    assert found["origin"]["name"] == "SSD-Edge"
    parts = found["components"]
    assert set(parts) == {"generation", "drift", "door_answer", "door_score"}
    assert all(part["platform"] in ("sensor", "binary_sensor") for part in parts.values())
    assert len({part["unique_id"] for part in parts.values()}) == len(parts)
    shop.show("cup")
    hear.json(parts["door_answer"]["state_topic"])
    hear.json(parts["generation"]["state_topic"])
    assert {one["topic"] for one in parts["door_answer"]["availability"]} <= set(hear.last)


@needs_mosquitto
def test_a_device_that_dies_is_offline_and_commands_are_off(shop: Shop, mosquitto: Mosquitto, hear: Hearer) -> None:
    bridge = shop.bridge(mosquitto.port)
    until(lambda: hear.last.get("shop/1/available") == "online")
    hear.client.publish("shop/1/command/rollback", "{}").wait_for_publish()
    shop.show("cup")
    hear.json("shop/1/door/state")
    assert "shop/1/command/result" not in hear.last
    bridge._client.socket().shutdown(socket.SHUT_RDWR)  # the will is published, as if the process was killed
    until(
        lambda: "offline" in [payload for topic, payload, _ in list(hear.messages.queue) if topic == "shop/1/available"]
    )
    until(lambda: hear.last["shop/1/available"] == "online")  # it is back


@needs_mosquitto
def test_commands_teach_and_roll_back(shop: Shop, mosquitto: Mosquitto, hear: Hearer) -> None:
    shop.bridge(mosquitto.port, commands=True)
    parts = hear.json("homeassistant/device/ssd_edge_shop_1/config")["components"]
    assert {"rollback", "frames", "result", "door_teach"} <= set(parts)
    shop.show("wedge", 6)
    until(lambda: hear.json("shop/1/door/state")["label"] == "unknown")
    hear.client.publish("shop/1/command/frames", "6")
    until(lambda: hear.json("shop/1/state")["frames"] == 6)
    template = parts["door_teach"]["command_template"]
    asked = template.replace("{{ value | tojson }}", json.dumps("wedge"))
    told = hear.result("teach", asked)
    assert (told["ok"], told["label"], told["camera"], told["generation"]) == (True, "wedge", "door", 2)
    assert told["message"].startswith("'wedge' is learned in generation 2")
    shop.show("wedge")
    until(lambda: hear.json("shop/1/door/state")["label"] == "wedge")
    told = hear.result("rollback", "{}")
    assert (told["ok"], told["message"], told["generation"]) == (True, "generation 1 is in use again", 1)
    until(lambda: hear.json("shop/1/state")["generation"] == 1)


@needs_mosquitto
def test_commands_are_refused_with_a_sentence(shop: Shop, mosquitto: Mosquitto, hear: Hearer) -> None:
    shop.bridge(mosquitto.port, commands=True)
    until(lambda: hear.last.get("shop/1/available") == "online")
    for command, payload, code, message in (
        ("rollback", "{}", 2, "has no parent"),
        ("rollback", '{"generation": 99}', 2, "99"),
        ("rollback", "nonsense", 2, "the command is not valid JSON"),
        ("frames", "1000", 2, "it must be a whole number from 3 to 64, but is 1000"),
        ("teach", "[]", 2, "a command must be a JSON object, but is a list"),
        ("teach", '{"lable": "x"}', 2, "'lable' is unknown here; known: label, camera, frames"),
        ("teach", '{"label": 3}', 2, "a command to teach is"),
        ("teach", '{"label": "x", "camera": "roof"}', 2, "there is no camera 'roof'; cameras: door"),
        ("teach", '{"label": "x"}', 2, "there is nothing to learn"),
        ("teach", '{"label": "' + "x" * 5000 + '"}', 2, "bytes, but may have at most 4,096"),
    ):
        told = hear.result(command, payload)
        assert (told["ok"], told["command"], told["code"]) == (False, command, code), told
        assert message in told["message"]
    shop.show("wedge")
    shop.show("cup", 5)
    told = hear.result("teach", '{"label": "wedge", "frames": 5}')  # cups: the guard
    assert (told["ok"], told["code"]) == (False, 4), told
    hear.last.pop("shop/1/command/result")
    hear.client.publish("shop/1/command/rollback", "{}", retain=True).wait_for_publish()
    hear.result("frames", "x")
    bridge = shop.bridges[0]
    bridge._client.socket().shutdown(socket.SHUT_RDWR)
    until(lambda: not bridge.connected)
    until(lambda: bridge.connected)
    assert hear.result("frames", "y")["command"] == "frames"  # and none of the retained rollback, which came before


@needs_mosquitto
def test_a_broker_that_is_killed_and_comes_back_has_all_states(shop: Shop, mosquitto: Mosquitto, caplog) -> None:
    bridge = shop.bridge(mosquitto.port, commands=True)
    shop.show("cup")
    until(lambda: bridge.connected)
    mosquitto.kill()
    until(lambda: not bridge.connected)
    shop.show("nut")
    for number in range(100):
        bridge._tell({"command": "frames", "number": number}, "told")
    shop.show("screw")
    assert len(bridge._results) == 16
    mosquitto.start()  # it remembers nothing
    hearer = Hearer(mosquitto.port)
    until(lambda: hearer.json("shop/1/door/state")["label"] == "screw")
    until(lambda: hearer.last.get("shop/1/available") == "online")
    assert {"homeassistant/device/ssd_edge_shop_1/config", "shop/1/state", "shop/1/door/available"} <= set(hearer.last)
    shop.show("cup")
    until(lambda: hearer.json("shop/1/door/state")["label"] == "cup")
    assert not bridge._results
    assert "is gone" in caplog.text
    hearer.close()


@needs_mosquitto
def test_a_wrong_password_is_said_and_the_service_goes_on(shop: Shop, mosquitto: Mosquitto, caplog) -> None:
    bridge = shop.bridge(mosquitto.port, password="wrong")
    text = f"the MQTT broker 127.0.0.1:{mosquitto.port} refuses the connection (Not authorized); check the user and the"
    until(lambda: text in caplog.text)
    shop.show("cup")
    assert not bridge.connected
    assert "wrong" not in caplog.text.replace("a wrong", "")


def test_a_broker_that_is_not_there_is_said(shop: Shop, caplog) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        shop.bridge(closed.getsockname()[1])
        until(lambda: "cannot be reached ([Errno 111] Connection refused); trying again" in caplog.text)
    begun = time.monotonic()
    shop.bridges[0].close()
    assert time.monotonic() - begun < 5


@pytest.mark.slow
@needs_mosquitto
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_the_connection_is_encrypted_and_the_certificate_checked(shop: Shop, tmp_path: Path, caplog) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-out", certificate, "-keyout", key]
    subprocess.run([*made, *subject], check=True, stderr=subprocess.DEVNULL)
    broker = Mosquitto(tmp_path, f"certfile {certificate}\nkeyfile {key}\n")
    url = f"mqtts://shop@localhost:{broker.port}/shop/1"
    for ca in (None, certificate):
        parsed = Broker.parse(url, None, {"SSD_EDGE_MQTT_PASSWORD": "right"}, ca)
        shop.bridges.append(Bridge(shop.station, parsed))
        shop.bridges[-1].start()
    until(lambda: shop.bridges[1].connected)
    until(lambda: "CERTIFICATE_VERIFY_FAILED" in caplog.text)
    assert not shop.bridges[0].connected
    broker.kill()


def test_threads_end(shop: Shop) -> None:
    before = threading.active_count()
    shop.bridge(1, commands=True).close()
    until(lambda: threading.active_count() <= before)


def parse(url: str, file: Path | None = None, ca: Path | None = None, **environment: str) -> Broker:
    return Broker.parse(url, file, environment, ca)


def test_what_a_url_means(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("s3cret\n")
    found = parse("mqtts://me%40home@broker:1234/shop/door%201/", tmp_path / "password")
    assert (found.host, found.port, found.tls, found.user) == ("broker", 1234, True, "me@home")
    assert (found.password, found.prefix) == ("s3cret", "shop/door 1")
    assert "s3cret" not in f"{found!r} {found}"
    plain = parse("mqtt://broker", SSD_EDGE_MQTT_PASSWORD="")
    assert (plain.port, plain.user, plain.password, plain.tls) == (1883, "", "", False)
    assert plain.prefix.startswith("ssd-edge/")
    assert parse("mqtts://broker").port == 8883
    assert parse("mqtt://me@broker", SSD_EDGE_MQTT_PASSWORD="x").password == "x"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("mqtt://me:secret@h", "every user of this machine can read a password in --mqtt"),
        ("http://h", "must be mqtt://USER@HOST:PORT/PREFIX"),
        ("mqtt:///x", "must be mqtt://USER@HOST:PORT/PREFIX"),
        ("mqtt://h:99999", "is no URL"),
        ("mqtt://h/a%23", "cannot be the start of a topic"),
        ("mqtt://h/a/+/b", "cannot be the start of a topic"),
        ("mqtt://h/a//b", "cannot be the start of a topic"),
        ("mqtt://h/$SYS", "cannot be the start of a topic"),
        ("mqtt://h/a%00", "cannot be the start of a topic"),
        ("mqtt://h/" + "a" * 300, "cannot be the start of a topic"),
    ],
)
def test_what_is_no_broker_is_refused(url: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        parse(url)
    assert "secret" not in str(caught.value)


def test_files_and_users_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the password for MQTT cannot be read from"):
        parse("mqtt://me@h", tmp_path / "none")
    with pytest.raises(InputError, match="is not a file; name the certificate"):
        parse("mqtts://me@h", ca=tmp_path / "none")
    with pytest.raises(InputError, match="there is a password for MQTT, but no user"):
        parse("mqtt://h", SSD_EDGE_MQTT_PASSWORD="x")
