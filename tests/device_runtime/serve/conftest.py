"""A station with a tiny device, and a client of its application without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from device_runtime.device import Device
from device_runtime.install.bundle import install
from device_runtime.serve.app import build
from device_runtime.serve.security import Access
from device_runtime.serve.station import Station


@pytest.fixture
def root(tiny_bundle, tmp_path: Path) -> Path:
    (tmp_path / "tiny.ssdedge").write_bytes(tiny_bundle())
    install(tmp_path / "root", tmp_path / "tiny.ssdedge")
    return tmp_path / "root"


@pytest.fixture
def station(root: Path) -> Iterator[Station]:
    with Device.open(root) as device:
        station = Station(device)
        yield station
        station.close()


Connect = Callable[..., TestClient]


@pytest.fixture
def connect(station: Station) -> Connect:
    """Return a function that makes a client; `token` is that of the service."""

    def client(token: str | None = None, **options: object) -> TestClient:
        app = build(station, Access.of("127.0.0.1", 8080, token))
        return TestClient(app, base_url="http://127.0.0.1:8080", raise_server_exceptions=False, **options)

    return client


@pytest.fixture
def client(connect: Connect) -> TestClient:
    """Return a client of a service without a token."""
    return connect()
