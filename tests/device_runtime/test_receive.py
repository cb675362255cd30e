"""Taking over a pushed bundle: only what is missing, after a cut from there on, and nothing but what was announced."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from device_runtime import incoming, receive
from device_runtime.store.generations import Generations
from ssd_edge import bundle, files
from ssd_edge.bundle import container
from ssd_edge.errors import BundleRefusedError, GateRefusedError

ENTRIES = {
    "backbone.onnx": bytes(range(256)) * 8,
    "learner.safetensors": b"l" * 700,
    "classes.json": b"{}\n",
    "empty.txt": b"",
}


def offered(entries: dict[str, bytes], /, **changes: Any) -> dict[str, Any]:
    data = b"".join(container.blocks(entries))
    listed = [{"path": p, "sha256": files.sha256(d), "size": len(d)} for p, d in entries.items()]
    return {"bundle": files.sha256(data), "size": len(data), "name": "robot.ssdedge", "entries": listed, **changes}


def line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


class Peer(io.RawIOBase):
    """A sender in memory: answers what is asked for, and is gone after `cut` bytes."""

    def __init__(self, offer: dict, entries: dict[str, bytes], cut: int | None = None, spoil: bool = False) -> None:
        self.blobs = {files.sha256(data): data for data in entries.values()}
        self.todo, self.cut, self.spoil, self.asked, self.sent = line(offer), cut, spoil, None, 0
        self.heard: list[dict] = []
        self.first = b""

    def read(self, limit: int = -1) -> bytes:
        data, self.todo = self.todo[: min(limit, 100)], self.todo[min(limit, 100) :]
        if self.cut is not None:
            data = data[: self.cut - self.sent]
        self.sent += len(data)
        return data

    def write(self, data: bytes) -> int:
        if not data.lstrip().startswith(b"{"):
            self.first += data
            return len(data)
        message = json.loads(data)
        self.heard.append(message)
        if "want" in message:
            self.asked = dict(message["want"])
            rest = b"".join(self.blobs[digest][start:] for digest, start in message["want"])
            self.todo += bytes(len(rest)) if self.spoil else rest
        return len(data)


def fit(path: Path, root: Path) -> list:
    return [SimpleNamespace(name="power", state="warning", found="15W", fix="nvpmodel -m 0")]


def put(root: Path, path: Path, *, allow_downgrade: bool, say: Callable[[str], None]) -> SimpleNamespace:
    """Instead of an installation: keeps the bundle's bytes."""
    say("testing")
    (root / "installed").write_bytes(path.read_bytes())
    return SimpleNamespace(number=1, info={"downgrade": allow_downgrade})


def serve(root: Path, peer: Peer, examine=fit, install=put) -> int:
    return receive.receive(root, peer, peer, examine=examine, install=install)


def left(root: Path) -> set[str]:
    return {path.name for path in (root / "incoming").iterdir()} - {".lock"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "device"


def test_a_bundle_arrives_byte_for_byte_is_examined_and_installed(root):
    seen = []

    def examine(path: Path, root: Path) -> list:
        seen.append((path.name, path.read_bytes()))
        return fit(path, root)

    peer = Peer(offered(ENTRIES, allow_downgrade=True), ENTRIES)
    assert serve(root, peer, examine=examine) == 0
    data = b"".join(container.blocks(ENTRIES))
    assert seen == [("robot.ssdedge", data)]
    assert (root / "installed").read_bytes() == data
    assert peer.first == b"\n" + receive.MAGIC + b"\n"
    assert peer.heard[-1] == {"ok": True, "generation": 1, "root": str(root), "downgrade": True}
    said = [message["say"] for message in peer.heard if "say" in message]
    assert said == ["warning: power: 15W; nvpmodel -m 0", "testing"]
    assert left(root) == set()


def test_an_installed_backbone_and_what_came_before_are_not_asked_for(root):
    backbone, learner = ENTRIES["backbone.onnx"], ENTRIES["learner.safetensors"]
    (root / "backbones").mkdir(parents=True)
    (root / "backbones" / f"{files.sha256(backbone)}.onnx").write_bytes(backbone)
    (root / "incoming").mkdir()
    (root / "incoming" / files.sha256(learner)).write_bytes(learner)
    peer = Peer(offered(ENTRIES), ENTRIES)
    assert serve(root, peer) == 0
    assert peer.asked == {files.sha256(b"{}\n"): 0, files.sha256(b""): 0}


def test_nor_is_what_a_generation_holds(root):
    folder = root / "generations" / "000003"
    folder.mkdir(parents=True)
    (folder / "learner.safetensors").write_bytes(ENTRIES["learner.safetensors"])
    peer = Peer(offered(ENTRIES), ENTRIES)
    assert serve(root, peer) == 0
    assert files.sha256(ENTRIES["learner.safetensors"]) not in peer.asked
    assert (root / "installed").read_bytes() == b"".join(container.blocks(ENTRIES))


def test_a_damaged_backbone_is_asked_for_again(root):
    digest = files.sha256(ENTRIES["backbone.onnx"])
    (root / "backbones").mkdir(parents=True)
    (root / "backbones" / f"{digest}.onnx").write_bytes(bytes(len(ENTRIES["backbone.onnx"])))
    peer = Peer(offered(ENTRIES), ENTRIES)
    assert serve(root, peer) == 0
    assert peer.asked[digest] == 0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 0.999])
def test_after_a_cut_anywhere_the_next_push_goes_on_there(root, share):
    offer = offered(ENTRIES)
    length, total = len(line(offer)), sum(map(len, ENTRIES.values()))
    cut = Peer(offer, ENTRIES, cut=length + int(share * total))
    assert serve(root, cut) == 3
    assert not any("ok" in message or "error" in message for message in cut.heard)
    assert not (root / "installed").exists()
    again = Peer(offered(ENTRIES, retry=True), ENTRIES)
    assert serve(root, again) == 0
    assert again.sent - len(line(offered(ENTRIES, retry=True))) == total - int(share * total)
    assert left(root) == set()


def test_a_cut_in_the_offer_leaves_nothing(root):
    peer = Peer(offered(ENTRIES), ENTRIES, cut=40)
    assert serve(root, peer) == 3
    assert not root.exists()


def test_when_the_sender_is_gone_nothing_is_installed_and_all_that_came_stays(root):
    def gone(root: Path, path: Path, *, allow_downgrade: bool, say: Callable[[str], None]) -> SimpleNamespace:
        peer.write = lambda data: (_ for _ in ()).throw(BrokenPipeError())
        say("testing")
        raise AssertionError("it went on")

    peer = Peer(offered(ENTRIES), ENTRIES)
    assert serve(root, peer, install=gone) == 3
    again = Peer(offered(ENTRIES), ENTRIES)
    assert serve(root, again) == 0
    assert again.asked == {}


def test_silence_counts_as_a_cut(root, monkeypatch):
    monkeypatch.setattr(receive, "SILENCE", 0.05)
    ours, theirs = os.pipe()
    with open(ours, "rb", buffering=0) as source, open(theirs, "wb", buffering=0) as sender:
        sender.write(line(offered(ENTRIES)) + ENTRIES["backbone.onnx"][:50])
        sink = io.BytesIO()
        assert receive.receive(root, source, sink, examine=fit, install=put) == 3
    assert (root / "incoming" / f"{files.sha256(ENTRIES['backbone.onnx'])}.part").stat().st_size == 50


# What comes wrongly

BACKBONE = files.sha256(ENTRIES["backbone.onnx"])


@pytest.mark.parametrize("offer", [b"hello\n", line(offered({"../x.txt": b"x"})), b"x" * 300_000])
def test_a_hostile_offer_is_refused_before_anything_is_written(root, offer):
    peer = Peer({}, ENTRIES)
    peer.todo = offer
    assert serve(root, peer) == 5
    assert peer.heard[-1]["code"] == 5
    assert peer.heard[-1]["error"]
    assert not root.exists()


def test_other_bytes_than_announced_are_refused_and_nothing_stays(root):
    peer = Peer(offered(ENTRIES), ENTRIES, spoil=True)
    assert serve(root, peer) == 5
    assert BACKBONE[:12] in peer.heard[-1]["error"]
    assert left(root) == set()
    assert not (root / "installed").exists()


def test_entries_that_give_another_bundle_are_refused(root):
    peer = Peer(offered(ENTRIES, bundle="0" * 64), ENTRIES)
    assert serve(root, peer) == 5
    assert "000000000000" in peer.heard[-1]["error"]
    assert left(root) == set()


def test_a_part_that_is_longer_than_the_entry_is_not_used(root):
    (root / "incoming").mkdir(parents=True)
    (root / "incoming" / f"{BACKBONE}.part").write_bytes(bytes(5000))
    peer = Peer(offered(ENTRIES), ENTRIES)
    assert serve(root, peer) == 0
    assert peer.asked[BACKBONE] == 0


def test_a_spoilt_part_is_found_and_the_next_push_starts_anew(root):
    (root / "incoming").mkdir(parents=True)
    (root / "incoming" / f"{BACKBONE}.part").write_bytes(bytes(500))
    assert serve(root, Peer(offered(ENTRIES), ENTRIES)) == 5
    again = Peer(offered(ENTRIES), ENTRIES)
    assert serve(root, again) == 0
    assert again.asked[BACKBONE] == 0


# What the device refuses


def test_an_unfit_device_refuses_before_the_installation(root):
    def unfit(path: Path, root: Path) -> list:
        return [*fit(path, root), SimpleNamespace(name="torch", state="unfit", found="missing", fix="install it")]

    peer = Peer(offered(ENTRIES), ENTRIES)
    assert serve(root, peer, examine=unfit) == 3
    assert peer.heard[-1] == {"error": "unfit for this bundle: torch: missing; install it", "code": 3}
    assert left(root) == set()
    assert not (root / "installed").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (GateRefusedError("the self-test failed"), 4),
        (BundleRefusedError("not signed"), 5),
        (ModuleNotFoundError("no", name="torch"), 3),
        (RuntimeError("a defect"), 1),
    ],
)
def test_a_refusal_is_told_with_its_code_and_nothing_stays(root, error, code, capfd):
    def refuse(root: Path, path: Path, **options: Any) -> None:
        raise error

    peer = Peer(offered(ENTRIES), ENTRIES)
    assert serve(root, peer, install=refuse) == code
    assert peer.heard[-1]["code"] == code
    assert ("Traceback" in capfd.readouterr().err) == (code == 1)
    assert left(root) == set()


def test_too_little_disk_is_told_before_anything_is_asked_for(root, monkeypatch):
    monkeypatch.setattr(receive.shutil, "disk_usage", lambda path: SimpleNamespace(free=10 << 20))
    peer = Peer(offered(ENTRIES), ENTRIES)
    assert serve(root, peer) == 3
    assert "10 MB free" in peer.heard[-1]["error"]
    assert peer.asked is None


@pytest.mark.parametrize("step", ["fsync_directory", "create", "rename"])
def test_a_disk_that_fills_up_is_told_and_nothing_stays(root, monkeypatch, step):
    def full(now: str, path: Path) -> None:
        if now == step and "incoming" in str(path) and any((root / "incoming").glob("?*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "fault_hook", full)
    peer = Peer(offered(ENTRIES), ENTRIES)
    assert serve(root, peer) == 3
    assert "free some space" in peer.heard[-1]["error"]
    assert left(root) == set()


def test_a_write_that_fails_in_the_middle_is_told_and_nothing_stays(root):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    peer = Peer(offered(ENTRIES), ENTRIES)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        code = serve(root, peer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 3
    assert "File too large" in peer.heard[-1]["error"]
    assert left(root) == set()


def test_only_one_push_at_a_time(root):
    peer = Peer(offered(ENTRIES), ENTRIES)
    with incoming.Incoming(root).lock(0):
        assert serve(root, peer) == 3
    assert "another push" in peer.heard[-1]["error"]
    assert serve(root, Peer(offered(ENTRIES), ENTRIES)) == 0


def test_a_retry_waits_for_the_broken_connection(root, monkeypatch):
    monkeypatch.setattr(receive, "PATIENCE", 0.2)
    peer, started = Peer(offered(ENTRIES, retry=True), ENTRIES), time.monotonic()
    with incoming.Incoming(root).lock(0):
        assert serve(root, peer) == 3
    assert time.monotonic() - started >= 0.2


# The command

COMMAND = """
import os, sys
from types import SimpleNamespace
from device_runtime import receive
from ssd_edge.cli.receive import receive as command

def install(root, path, *, allow_downgrade, say):
    print("a driver prints")
    os.system("echo a child prints")
    return SimpleNamespace(number=5, info={})

receive._examine, receive._install = lambda path, root: [], install
command.main([f"--root={sys.argv[1]}"])
"""


def start(root: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_what_others_print_does_not_disturb_the_protocol(root):
    (root / "incoming").mkdir(parents=True)
    for data in ENTRIES.values():
        (root / "incoming" / files.sha256(data)).write_bytes(data)
    with start(root) as process:
        out, err = process.communicate(line(offered(ENTRIES)), timeout=60)
    assert process.returncode == 0
    assert out.splitlines()[:2] == [b"", receive.MAGIC]
    assert [json.loads(text) for text in out.splitlines()[2:]] == [
        {"want": []},
        {"ok": True, "generation": 5, "root": str(root)},
    ]
    assert {b"a driver prints", b"a child prints"} <= set(err.splitlines())


def test_a_hang_up_keeps_what_has_come(root):
    with start(root) as process:
        process.stdin.write(line(offered(ENTRIES)) + ENTRIES["backbone.onnx"][:50])
        process.stdin.flush()
        assert [process.stdout.readline() for _ in range(3)][2].startswith(b'{"want"')
        part = root / "incoming" / f"{BACKBONE}.part"
        for _ in range(500):
            if part.exists():
                break
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) != 0
    assert part.stat().st_size == 50
    again = Peer(offered(ENTRIES), ENTRIES)
    assert serve(root, again) == 0
    assert again.asked[BACKBONE] == 50


# With the real installation


def test_a_tiny_bundle_is_really_installed_and_a_retry_after_it_does_nothing(root, tmp_path, tiny_bundle):
    path = tmp_path / "tiny.ssdedge"
    bundle.write(path, tiny_bundle())
    opened = bundle.read(path)

    def offer(**changes: Any) -> dict:
        return offered(opened.entries, **changes)

    peer = Peer(offer(), opened.entries)
    assert receive.receive(root, peer, peer, examine=fit) == 0
    assert peer.heard[-1]["generation"] == 1
    assert peer.heard[-1]["bundle_sha256"] == opened.sha256
    again = Peer(offer(retry=True), opened.entries)
    assert receive.receive(root, again, again, examine=fit) == 0
    assert again.asked is None
    assert again.heard[-1]["generation"] == 1
    assert Generations(root).current().number == 1
    newer = Peer(offer(), opened.entries)  # not a retry: it is meant
    assert receive.receive(root, newer, newer, examine=fit) == 0
    assert newer.heard[-1]["generation"] == 2
    assert opened.manifest["backbone"]["sha256"] not in newer.asked


def test_doctor_is_asked_about_the_bundle(root, tmp_path, tiny_bundle, monkeypatch):
    from device_runtime.machine import doctor

    asked = []
    monkeypatch.setattr(doctor, "examine", lambda opened, root: asked.append((opened.manifest["name"], root)) or [])
    path = tmp_path / "tiny.ssdedge"
    bundle.write(path, tiny_bundle())
    entries = bundle.read(path).entries
    assert receive.receive(root, peer := Peer(offered(entries), entries), peer, install=put) == 0
    assert asked == [("tiny", root)]
