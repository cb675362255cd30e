"""Tokens, hosts, origins and headers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from device_runtime.serve import security
from device_runtime.serve.security import Access, read_token
from ssd_edge.errors import EnvironmentUnfitError, InputError

TOKEN = "a-token-of-thirty-two-characters"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(security, "SLOWDOWN", 0.01)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/status"),
        ("GET", "/v1/classes"),
        ("POST", "/v1/predict"),
        ("GET", "/v1/nothing"),
        ("GET", "/v1/session/.."),
        ("GET", "/docs/../v1/status"),
    ],
)
def test_everything_else_needs_the_token(connect, method, path):
    client = connect(TOKEN)
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic eA=="},
        {"cookie": "ssd_edge_8080=x"},
    ):
        answer = client.request(method, path, headers=headers)
        assert answer.status_code == 401, answer.text
        assert answer.json()["code"] == 2
        assert answer.headers["www-authenticate"].startswith("Bearer")
    assert client.request(method, path, headers={"authorization": f"Bearer {TOKEN}"}).status_code != 401


def test_the_cookie_signs_in_and_out(connect):
    client = connect(TOKEN)
    assert client.get("/v1/session").json()["signed_in"] is False
    assert "device" not in client.get("/v1/session").json()
    assert client.post("/v1/session", json={"token": "wrong"}).status_code == 401
    answer = client.post("/v1/session", json={"token": TOKEN})
    assert answer.status_code == 200
    said = answer.headers["set-cookie"]
    assert "HttpOnly" in said
    assert "SameSite=strict" in said
    assert TOKEN not in said
    assert client.get("/v1/session").json()["device"] == "tiny"
    assert client.get("/v1/status").status_code == 200
    client.delete("/v1/session")
    assert client.get("/v1/status").status_code == 401


def test_without_a_token_everyone_on_this_machine_may(client):
    assert client.get("/v1/session").json() == {
        "token_needed": False, "signed_in": True, "version": "0.1.0", "device": "tiny"
    }  # fmt: skip
    assert client.get("/v1/status").json()["generation"] == 1


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "192.0.2.1", "", "[::2]:8080", "a]b[", "evil.example@127.0.0.1",
     "127.0.0.1/evil", "127.0.0.1#x", "localhost?x", "local\thost", "evil\\@localhost", "localhost:80:80",
     "localhost, evil.example", "127.1"],
)  # fmt: skip
def test_a_rebound_name_is_refused(client, host):
    answer = client.get("/v1/status", headers={"host": host})
    assert answer.status_code == 403
    assert "--allow-host" in answer.json()["error"]


@pytest.mark.parametrize("host", ["localhost:8080", "LOCALHOST", "127.0.0.1", "[::1]:8080", f"{os.uname().nodename}:1"])
def test_its_own_names_are_accepted(client, host):
    assert client.get("/v1/status", headers={"host": host}).status_code == 200


def test_a_service_on_all_addresses_is_called_by_any_address_but_by_no_other_name():
    access = Access.of("0.0.0.0", 80, TOKEN, ["Shop.example"])
    assert all(access.knows(host) for host in ("192.0.2.7:80", "[2001:db8::1]", "shop.example", "localhost"))
    assert not any(access.knows(host) for host in ("evil.example", "192.0.2.7.nip.io", "x:y:z"))


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "http://[x"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/status", "/v1/session"])
def test_other_pages_are_refused(client, headers, path):
    method = "POST" if path == "/v1/session" else "GET"
    assert client.request(method, path, headers=headers).status_code == 403


def test_the_page_itself_is_accepted_and_may_be_linked_to(client):
    own = {"origin": "http://127.0.0.1:8080", "sec-fetch-site": "same-origin"}
    assert client.post("/v1/session", json={"token": "any"}, headers=own).status_code == 200
    assert client.get("/", headers={"sec-fetch-site": "cross-site"}, follow_redirects=False).status_code < 400


def test_every_answer_has_the_headers(client):
    for path in ("/v1/status", "/v1/nothing", "/"):
        headers = client.get(path, follow_redirects=False).headers
        assert "script-src 'self'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    assert client.get("/v1/status").headers["cache-control"] == "no-store"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_body_that_any_page_may_send_is_no_json(client, kind):
    answer = client.post("/v1/session", content=b'{"token": "x"}', headers={"content-type": kind})
    assert answer.status_code == 415


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b'{"token": 1}', b"{}", b'{"token": "x", "force": true}', b'{"token": NaN}',
             b"[" * 4000, b"\xff"]
)  # fmt: skip
def test_bad_json_is_refused(client, body):
    answer = client.post("/v1/session", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["code"] == 2


def test_the_token_is_created_once_for_its_owner_only(tmp_path: Path):
    assert read_token(tmp_path, None, needed=False) == (None, False)
    token, created = read_token(tmp_path, None, needed=True)
    assert created
    assert len(token) >= 32
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    assert read_token(tmp_path, None, needed=False) == (token, False)
    (tmp_path / "token").chmod(0o640)
    with pytest.raises(EnvironmentUnfitError, match="chmod 600"):
        read_token(tmp_path, None, needed=True)


@pytest.mark.parametrize("content", [b"", b"short", b"two words that are long enough", b"\xff" * 40])
def test_a_file_without_a_token_is_refused(tmp_path: Path, content):
    (tmp_path / "token").write_bytes(content)
    (tmp_path / "token").chmod(0o600)
    with pytest.raises(InputError, match="one word"):
        read_token(tmp_path, None, needed=True)


def test_a_link_is_no_token(tmp_path: Path):
    (tmp_path / "secret").write_text("something that is long enough")
    (tmp_path / "token").symlink_to(tmp_path / "secret")
    with pytest.raises(EnvironmentUnfitError, match="link"):
        read_token(tmp_path, None, needed=True)


def test_a_bug_is_answered_and_logged_once(client, station, monkeypatch, caplog):
    def fail():
        raise RuntimeError("secret of the inside")

    monkeypatch.setattr(station, "status", fail)
    answer = client.get("/v1/status")
    assert (answer.status_code, answer.json()["code"]) == (500, 1)
    assert "secret" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert [record.code for record in caplog.records if record.levelname == "ERROR"] == ["internal_error"]
