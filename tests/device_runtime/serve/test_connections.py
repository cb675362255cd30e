"""The service as a process: slow, endless and many connections, signals, ports and tokens."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.tiny_photos import picture

from device_runtime.install.bundle import install
from ssd_edge.system import MIB, resident

ROOT = Path(__file__).resolve().parents[3]
# The command, with limits that a test can wait for.
SHORT = """
import sys
from device_runtime.serve import connections
connections.HEAD_SECONDS = connections.SILENCE = connections.GRACE = 1.0
connections.UNREAD, connections.TICK, connections.MOST = 1.5, 0.1, 12
from ssd_edge.cli import main
main()
"""


class Server:
    """A process that serves; `address` is what it has printed."""

    def __init__(self, root: Path, *options: str) -> None:
        command = [sys.executable, "-c", SHORT, "device", "serve", "--root", str(root), "--port", "0", *options]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.log = open(root.parent / f"{root.name}.log", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True, env=env)
        self.address = self.process.stdout.readline().strip()
        self.port = int(self.address.rpartition(":")[2] or 0)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 20)

    def get(self, path: str, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def resident(self) -> int:
        """Return its memory in MiB."""
        found = resident("VmRSS", Path(f"/proc/{self.process.pid}"))
        assert found, "no VmRSS"
        return found // MIB

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(30)
        self.process.stdout.close()
        self.log.close()
        return code

    def said(self) -> str:
        return Path(self.log.name).read_text()


@pytest.fixture(scope="module")
def installed(tiny_bundle, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / "tiny.ssdedge").write_bytes(tiny_bundle())
    install(folder / "root", folder / "tiny.ssdedge")
    return folder / "root"


@pytest.fixture(scope="module")
def server(installed) -> Iterator[Server]:
    server = Server(installed)
    assert server.address.startswith("http://127.0.0.1:"), server.said()
    yield server
    assert server.stop() == 0, server.said()
    assert "Traceback" not in server.said()


def until_closed(connection: socket.socket, seconds: float = 8.0) -> bytes:
    """Return what arrives until the other side ends the connection."""
    connection.settimeout(seconds)
    got = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            got += part
    return got


POST = b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /v1/status HTTP/1.1\r\nHost: 127.0.0.1\r\n",
        POST + b"Content-Length: 9\r\n\r\nabc",
        POST + b"Transfer-Encoding: chunked\r\n\r\n",
    ],
    ids=["nothing", "half a head", "half a body", "no chunk"],
)
def test_a_client_that_stops_is_closed(server, sent):
    with server.connect() as connection:
        connection.sendall(sent)
        began = time.monotonic()
        assert until_closed(connection) == b""
        assert 0.9 < time.monotonic() - began < 5


def test_a_slow_body_is_closed(server):
    with server.connect() as connection:
        connection.sendall(POST + b"Content-Length: 9999\r\n\r\n")
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < 8:
                connection.sendall(b"x")
                time.sleep(0.1)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("method", ["POST /v1/predict", "GET /v1/status", "POST /v1/session", "POST /v1/nothing"])
def test_an_endless_body_is_answered_and_closed(server, method):
    with server.connect() as connection:
        head = f"{method} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        chunk = b"100000\r\n" + b"x" * 2**20 + b"\r\n"
        with contextlib.suppress(ConnectionError):
            for _ in range(300):
                connection.sendall(chunk)
            raise AssertionError("300 MiB were taken")
        answer = until_closed(connection)
    assert answer.startswith(b"HTTP/1.1 ") or answer == b""  # a reset may overtake it
    assert server.resident() < 700
    assert server.get("/v2/health/live")[0] == 200


def test_a_large_head_is_refused(server):
    with server.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 100_000)
        assert until_closed(connection)[:12] in (b"HTTP/1.1 400", b"")


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /v1/status HTTP/1.1\r\n\r\n",
        b"GET /v1/status HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n",
        b"GET http://evil.example/v1/status HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_no_proper_request_is_refused(server, sent):
    with server.connect() as connection:
        connection.sendall(sent)
        answer = until_closed(connection)
    assert answer[:10] in (b"HTTP/1.1 4", b"")


def test_no_second_request_is_hidden_in_a_body(server):
    with server.connect() as connection:
        hidden = b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\n\r\n"
        connection.sendall(POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden)
        answer = until_closed(connection)
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1 ") == 1


def test_a_body_of_tiny_chunks_is_refused(server):
    with server.connect() as connection:
        connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"1\r\nx\r\n" * 100_000 + b"0\r\n\r\n")
        answer = until_closed(connection)
        assert answer == b"" or b"Invalid HTTP request" in answer
    with server.connect() as connection:  # a client that sends small chunks of a small body is served
        connection.sendall(POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b"".join(b"%x\r\n%s\r\n" % (1, bytes([one])) for one in picture("nut")) + b"0\r\n\r\n")
        assert b'"label":"nut"' in until_closed(connection)


def test_a_client_that_leaves_or_sends_rubbish_is_no_error(server):
    for sent in (
        POST.replace(b"image/png", b"multipart/form-data; boundary=x") + b"Content-Length: 99\r\n\r\n--x\r\n",
        POST.replace(b"image/png", b"application/json").replace(b"predict", b"rename") + b"Content-Length: 99\r\n\r\n{",
        b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nwhat\r\n",
        b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nwhat\r\n",
    ):
        with server.connect() as connection:
            connection.sendall(sent)
            time.sleep(0.2)
    assert server.get("/v2/health/live")[0] == 200
    assert "Traceback" not in server.said()


def test_the_head_of_a_stream_is_not_endless(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    for _ in range(2):
        connection.request("HEAD", "/v1/events")
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("content-type")) == (200, "text/event-stream; charset=utf-8")
        answer.read()
    connection.close()


@pytest.mark.parametrize(
    "path", ["/console/../server.py", "/console/%2e%2e/server.py", "/console/..%2fserver.py", "/console//etc/passwd",
             "/console/%00", "/console/vendor.js/..", "/console/..\\server.py"]
)  # fmt: skip
def test_no_path_leads_out_of_the_console(server, path):
    status, body = server.get(path)
    assert status in (400, 404), body[:100]
    assert b"import" not in body


def test_silent_connections_do_not_keep_others_out(server):
    silent = [server.connect() for _ in range(40)]
    try:
        for _ in range(5):
            assert server.get("/v2/health/live")[0] == 200
    finally:
        for connection in silent:
            connection.close()


def test_streams_are_connections_and_more_than_all_are_refused(server):
    streams = []
    for _ in range(12):
        connection = server.connect()
        connection.sendall(b"GET /v1/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert b"text/event-stream" in connection.recv(4096)
        streams.append(connection)
    try:
        status, body = server.get("/v1/status")
        assert (status, json.loads(body)["code"]) == (503, 3)
    finally:
        for connection in streams:
            connection.close()
    for _ in range(50):
        if server.get("/v2/health/live")[0] == 200:
            break
        time.sleep(0.1)
    assert server.get("/v2/health/live")[0] == 200


def test_events_arrive_as_they_happen(server, installed):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", "/v1/events")
    stream = connection.getresponse()
    assert stream.readline() == b": open\n"
    other = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    body = json.dumps({"label": "cup", "new": "</script><b>"})
    other.request("POST", "/v1/rename", body, {"content-type": "application/json"})
    assert other.getresponse().read().startswith(b'{"generation":')
    lines = [stream.readline() for _ in range(4)]
    assert lines[2] == b"event: generation\n"
    assert json.loads(lines[3].removeprefix(b"data: "))["what"].endswith("'</script><b>'")
    connection.close()
    other.close()


def test_a_taken_port_is_named(server, installed):
    command = [
        sys.executable,
        "-m",
        "ssd_edge",
        "device",
        "serve",
        "--root",
        str(installed),
        "--port",
        str(server.port),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 3
    assert f"cannot listen on 127.0.0.1:{server.port} (Address already in use)" in done.stderr


def test_on_another_address_a_token_is_made_and_needed(installed, tmp_path):
    token_file = tmp_path / "token"
    server = Server(installed, "--host", "0.0.0.0", "--token-file", str(token_file))
    token = token_file.read_text().strip()
    assert token_file.stat().st_mode & 0o777 == 0o600
    assert server.get("/v1/status")[0] == 401
    assert server.get("/v1/status", authorization=f"Bearer {token}")[0] == 200
    assert server.get("/v2/health/ready")[0] == 200
    assert server.stop(signal.SIGINT) == 0
    assert token in server.said()
    again = Server(installed, "--host", "0.0.0.0", "--token-file", str(token_file))
    assert again.stop() == 0
    assert token not in again.said()  # it is shown once


def test_https_is_served_with_a_certificate(installed, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    make += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(make, capture_output=True, check=True)
    server = Server(installed, "--tls-cert", str(certificate), "--tls-key", str(key))
    assert server.address.startswith("https://")
    context = ssl.create_default_context(cafile=str(certificate))
    context.check_hostname = False
    connection = http.client.HTTPSConnection("127.0.0.1", server.port, context=context, timeout=20)
    connection.request("POST", "/v1/predict", picture("nut"), {"content-type": "image/png"})
    assert json.loads(connection.getresponse().read())["predictions"][0]["label"] == "nut"
    connection.close()
    with server.connect() as silent:  # agrees on no key
        assert until_closed(silent, 15) == b""
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--tls-cert", "missing.pem"], 2, "belong together"),
        (["--tls-cert", "missing.pem", "--tls-key", "missing.pem"], 2, "certificate"),
        (["--host", "203.0.113.1"], 3, "cannot listen on 203.0.113.1"),
        (["--host", "no.such.host.invalid"], 2, "is not an address"),
        (["--root", "/nonexistent"], 2, "no bundle is installed"),
    ],
)
def test_a_bad_start_is_explained(installed, tmp_path, options, code, words):
    command = [sys.executable, "-m", "ssd_edge", "device", "serve", "--root", str(installed), "--port", "0", *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
