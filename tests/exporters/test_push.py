"""Tests of `push` with scripts in place of ssh and sftp, and over a real sshd where one is installed."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import by_hand as hand
from helpers import sshd
from helpers.sshd import Sshd

from exporters import push as pushing
from exporters.push import Destination, PushResult, parse_destination, push
from ssd_edge import bundle
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError, SSDEdgeError
from ssd_edge.system import NO_TELEMETRY

# Destinations


@pytest.mark.parametrize(
    ("text", "login", "root"),
    [
        ("camera-3", "camera-3", None),
        ("robot@camera-3", "robot@camera-3", None),
        ("robot@10.0.0.7:/data/ssd-edge", "robot@10.0.0.7", "/data/ssd-edge"),
        ("robot@camera:state", "robot@camera", "state"),
        ("camera:a b/$(touch x)'\"@;", "camera", "a b/$(touch x)'\"@;"),
        ("me@home@camera:/x", "me@home@camera", "/x"),
        ("camera:/x@y", "camera", "/x@y"),
        ("robot@[fe80::1%eth0]:/data", "robot@fe80::1%eth0", "/data"),
        ("[::1]", "::1", None),
        ("camera:~/state", "camera", "./state"),
        ("camera:~", "camera", "./"),
        ("camera:-x", "camera", "-x"),
    ],
)
def test_parse_destination(text: str, login: str, root: str | None) -> None:
    assert parse_destination(text) == Destination(login, root)


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "@", "user@", "@host", "user@:/x", ":/x", "host:", "[::1", "[::1]x", "[]", "::1", "u@fe80::1"),
        *("-oProxyCommand=touch x", "user@-oProxyCommand=x", "-l@host", "[-x]", "ssh://user@host:22/x"),
        *("a b", "user@a b", "us er@host", " host", "host\n", "host:/x\ny", "host:\x1b[0m", "us\ter@host"),
        *("host;reboot", "$(x)@host", "host`x`", "user|x@host", "host:~other/x"),
    ],
)
def test_parse_destination_refuses_malformed_text(text: str) -> None:
    with pytest.raises(InputError):
        parse_destination(text)


# Scripts in place of ssh and sftp


def make(path: Path, release: int = 1, extra: bytes = b"") -> Path:
    """Write a valid bundle, whose learner cannot be loaded."""
    manifest, entries = hand.parts()
    if extra:
        entries["extra.txt"] = ("extra", extra)
    bundle.write(path, bundle.pack({**manifest, "release": release}, entries))
    return path


@pytest.fixture
def robot(tmp_path: Path) -> Path:
    return make(tmp_path / "robot.ssdedge")


Fake = Callable[..., None]


@pytest.fixture
def fake(tmp_path: Path, robot: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Replace ssh by a script: ``fake("exit 127")``, or ``fake(install=…, uploaded=…)`` once ssd-edge was found."""
    monkeypatch.setattr(pushing, "PAUSE", 0.01)

    def write(script: str = "", install: str = "", uploaded: int | None = None) -> None:
        uploaded = robot.stat().st_size if uploaded is None else uploaded
        script = script or (
            f'case "$*" in *"device install"*) {install};; *) echo {pushing.MARKER}; echo "uploaded {uploaded}";; esac'
        )
        executable(
            tmp_path / "fake ssh",
            f"printf '%s\\n' \"$@\" > '{tmp_path}/arguments'\necho x >> '{tmp_path}/calls'\n{script}",
        )
        monkeypatch.setenv("SSD_EDGE_SSH", f"{shlex.quote(str(tmp_path / 'fake ssh'))} -p 2222")

    return write


def executable(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def send(robot: Path, log: list[str] | None = None, command: str = "ssd-edge") -> PushResult:
    return push(robot, parse_destination("u@camera:/data"), ([] if log is None else log).append, command=command)


START = f"echo {pushing.MARKER}\n"


def test_arguments_of_ssh(robot: Path, tmp_path: Path, fake: Fake) -> None:
    fake("exit 3")
    with pytest.raises(EnvironmentUnfitError):
        send(robot, command="'/my apps/ssd-edge' -v")
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[:2] == ["-p", "2222"]
    assert arguments[-3:-1] == ["--", "u@camera"]
    file = f"/data/incoming/{bundle.read(robot).sha256}/robot.ssdedge"
    words = ["sh", "-c", pushing.PREPARE, "sh", file, str(robot.stat().st_size), "/my apps/ssd-edge", "-v"]
    assert shlex.split(arguments[-1]) == words
    assert not any("HostKey" in word or "KnownHosts" in word for word in arguments)


@pytest.mark.parametrize("which", ["incoming", "incoming/5a", "incoming/5a/robot.ssdedge"])
@pytest.mark.parametrize("target", ["other", "nowhere"])
def test_nothing_is_uploaded_through_a_link(tmp_path: Path, which: str, target: str) -> None:
    """Neither created, truncated nor removed: the folder for uploads may belong to another user."""
    (tmp_path / "other" / "5a").mkdir(parents=True)
    (tmp_path / "other" / "5a" / "robot.ssdedge").write_bytes(b"precious")
    link = tmp_path / "root" / which
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / target / ("5a/robot.ssdedge" if which.endswith("e") and target == "other" else ""))
    command = [
        "sh",
        "-c",
        pushing.PREPARE,
        "sh",
        str(tmp_path / "root" / "incoming" / "5a" / "robot.ssdedge"),
        "3",
        "true",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == pushing.CANNOT_CREATE
    assert "is a symbolic link, or belongs to another user" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "root"]
    assert (tmp_path / "other" / "5a" / "robot.ssdedge").read_bytes() == b"precious"
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["5a"]
    link.unlink()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "uploaded 0")


def test_commands_on_the_device_send_no_usage_data(tmp_path: Path) -> None:
    command = ["sh", "-c", pushing.INSTALL, "sh", str(tmp_path / "x" / "y"), "", "", "sh", "-c", "env"]
    set_there = {"PATH": os.environ["PATH"], "DO_NOT_TRACK": "0 or 1"}
    printed = subprocess.run(command, env=set_there, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    for name, value in {**NO_TELEMETRY, **set_there}.items():
        assert printed.count(f"{name}={value}") == 2  # doctor and install


def test_command_below_the_home_folder(robot: Path, tmp_path: Path, fake: Fake) -> None:
    fake("exit 3")
    with pytest.raises(EnvironmentUnfitError):
        send(robot, command="~/.venv/bin/ssd-edge")
    assert (tmp_path / "arguments").read_text().splitlines()[-1].endswith(" ./.venv/bin/ssd-edge")


@pytest.mark.parametrize(
    ("root", "folder"),
    [
        (None, "./.cache/ssd-edge/incoming/abc"),
        ("/data/", "/data/incoming/abc"),
        ("-x", "./-x/incoming/abc"),
        ("./", "./incoming/abc"),
    ],
)
def test_folder_of_the_upload(root: str | None, folder: str) -> None:
    device = pushing._Device(Destination("camera", root), "ssd-edge", print)
    assert device.upload_path("abc", "robot.ssdedge") == f"{folder}/robot.ssdedge"


@pytest.mark.parametrize(
    ("name", "uploaded"),
    [
        ("..", "pushed.ssdedge"),
        ("-rf.ssdedge", "rf.ssdedge"),
        ("x" * 500, "x" * 128 + ".ssdedge"),
        ("Ärger\x1b[0m", "_rger__0m.ssdedge"),
        ("a b.ssdedge", "a_b.ssdedge"),
    ],
)
def test_name_of_the_upload(name: str, uploaded: str) -> None:
    device = pushing._Device(Destination("camera", "/data"), "ssd-edge", print)
    assert device.upload_path("abc", name) == f"/data/incoming/abc/{uploaded}"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 255", "could not connect"),
        ("exit 127", "--push-command"),
        ("exit 126", "--push-command"),
        ("exit 2", "version"),
        ("exit 0", "exit code 0"),
        ("exit 73", "cannot be created"),
        ("yes welcome", "login scripts"),
        ("head -c 2000000 /dev/zero", "login scripts"),
        (START + "exit 137", "137"),
        (START + "echo hello", "exit code 0"),
        (START + "echo uploaded many", "exit code 0"),
    ],
)
def test_device_without_ssd_edge(robot: Path, tmp_path: Path, fake: Fake, script: str, message: str) -> None:
    fake(script)
    with pytest.raises(EnvironmentUnfitError, match=message):
        send(robot)
    assert (tmp_path / "calls").read_text() == "x\n"


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6])
def test_error_of_the_device_keeps_its_exit_code(robot: Path, fake: Fake, code: int) -> None:
    fake(install=START + f"printf 'error: not \\033[0m signed\\n'; exit {code}")
    with pytest.raises(SSDEdgeError, match=r"^u@camera: not \?\[0m signed$") as refused:
        send(robot)
    assert refused.value.exit_code == code


@pytest.mark.parametrize(
    ("script", "message", "code"),
    [
        ("exit 1", "exit code 1", 1),
        ("echo Usage: ssd-edge; exit 2", "version", 3),
        ("exit 4", "exit code 4", 3),
        ("exit 0", "exit code 0 and no result", 3),
        ("echo 'error: odd'; exit 9", "exit code 9", 3),
        ("""echo '{"generation": "1"}'""", "number", 3),
        ("""echo '{"checks": [7], "verdict": 7}'; echo '[{'""", "no result", 3),
    ],
)
def test_device_that_gives_no_result(robot: Path, fake: Fake, script: str, message: str, code: int) -> None:
    fake(install=START + script)
    with pytest.raises(SSDEdgeError, match=message) as refused:
        send(robot)
    assert refused.value.exit_code == code


def test_unfit_device_is_named(robot: Path, fake: Fake) -> None:
    checks = [
        {"name": "power", "state": "warning", "found": "15W", "fix": "nvpmodel -m 0"},
        {"name": "torch", "state": "unfit", "found": "missing", "fix": "install it"},
        {"name": "disk", "state": "unfit", "found": "full", "fix": ""},
        {"name": "python", "state": "ok", "found": "3.10", "fix": ""},
    ]
    fake(install=START + f"echo '{json.dumps({'verdict': 'unfit', 'checks': checks})}'; exit 3")
    log: list[str] = []
    with pytest.raises(EnvironmentUnfitError, match=r"^u@camera: unfit for this bundle: torch: missing; install it$"):
        send(robot, log)
    assert log == ["warning: power: 15W; nvpmodel -m 0"]


def test_noise_around_the_result_is_ignored(robot: Path, fake: Fake) -> None:
    log: list[str] = []
    noise = "echo Welcome to JetPack; printf 'no newline'; echo\n"
    result = """printf 'driver 7: '; echo '{"generation": 4, "root": "/data"}'; echo goodbye"""
    fake(install=noise + START + "echo self-test; " + result)
    assert send(robot, log).to_dict() == {"generation": 4, "root": "/data", "sent_bytes": 0}
    assert log == ["self-test", "goodbye"]


def test_upload_that_breaks_every_time_is_tried_three_times(
    robot: Path, tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    fake(uploaded=100)
    executable(tmp_path / "fake sftp", f"cat >> '{tmp_path}/batch'; exit 255")
    monkeypatch.setenv("SSD_EDGE_SFTP", shlex.quote(str(tmp_path / "fake sftp")))
    with pytest.raises(EnvironmentUnfitError, match="push again"):
        send(robot, log)
    assert (tmp_path / "calls").read_text() == "x\n" * 3
    assert [line for line in log if "trying again" in line][-1].endswith("(3 of 3)")
    file = f"/data/incoming/{bundle.read(robot).sha256}/robot.ssdedge"
    assert (tmp_path / "batch").read_text() == f'reput "{robot}" "{file}"\n' * 3


def test_upload_that_cannot_be_written(
    robot: Path, tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(uploaded=0)
    executable(tmp_path / "sftp", "exit 1")
    monkeypatch.setenv("SSD_EDGE_SFTP", str(tmp_path / "sftp"))
    with pytest.raises(EnvironmentUnfitError, match=r"could not write /data/incoming/.* free some space"):
        send(robot)
    assert (tmp_path / "calls").read_text() == "x\n"


def test_lost_connection_while_installing_is_not_tried_again(robot: Path, tmp_path: Path, fake: Fake) -> None:
    fake(install=START + "exit 255")
    with pytest.raises(EnvironmentUnfitError, match="ssd-edge device status --root=/data"):
        send(robot)
    assert (tmp_path / "calls").read_text() == "x\n" * 2


def test_lost_connection_before_installing_is_tried_again(robot: Path, tmp_path: Path, fake: Fake) -> None:
    once = f"test -e '{tmp_path}/once' || {{ touch '{tmp_path}/once'; exit 255; }}; "
    fake(install=once + START + """echo '{"generation": 2}'""")
    assert send(robot) == PushResult(2, 0, {"generation": 2})
    assert (tmp_path / "calls").read_text() == "x\n" * 4


@pytest.mark.parametrize("variable", ["SSD_EDGE_SSH", "SSD_EDGE_SFTP"])
@pytest.mark.parametrize(
    ("value", "message"), [("/no/such/program", "cannot be started"), ("ssh 'x", "quotation mark")]
)
def test_missing_client(
    robot: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    fake(uploaded=0)
    monkeypatch.setenv(variable, value)
    with pytest.raises((EnvironmentUnfitError, InputError), match=message) as refused:
        send(robot)
    assert variable in str(refused.value)


@pytest.mark.parametrize("command", ["", "  ", "ssd-edge 'x"])
def test_malformed_command(robot: Path, command: str) -> None:
    with pytest.raises(InputError, match="--push-command"):
        send(robot, command=command)


def test_damaged_bundle_is_not_sent(robot: Path, fake: Fake, tmp_path: Path) -> None:
    fake("exit 1")
    robot.write_bytes(robot.read_bytes()[:-1])
    with pytest.raises(BundleRefusedError):
        send(robot)
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[0m", os.fsdecode(b"latin-1 \xe4")])
def test_path_that_sftp_cannot_transfer_is_refused(robot: Path, fake: Fake, tmp_path: Path, name: str) -> None:
    fake("exit 1")
    path = tmp_path / name
    path.write_bytes(robot.read_bytes())
    with pytest.raises(InputError, match="rename it"):
        send(path)
    assert not (tmp_path / "calls").exists()


# Over a real sshd


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    yield from sshd.start(tmp_path_factory.mktemp("sshd"))


Over = Callable[..., PushResult]


@pytest.fixture
def over(server: Sshd, monkeypatch: pytest.MonkeyPatch) -> Over:
    """Return ``over(bundle, root)``, which pushes to the stand-in for ssd-edge."""
    monkeypatch.setenv("SSD_EDGE_SSH", server.ssh)
    monkeypatch.setattr(pushing, "PAUSE", 0.1)
    for name in ("calls.jsonl", "answer.json"):
        (server.home / name).unlink(missing_ok=True)

    def run(
        path: Path, root: str | Path, log: list[str] | None = None, command: str = server.device, **options: bool
    ) -> PushResult:
        log = [] if log is None else log
        return push(path, parse_destination(f"{server.login}:{root}"), log.append, command=command, **options)

    return run


def calls(server: Sshd) -> list[list[str]]:
    return [json.loads(line) for line in (server.home / "calls.jsonl").read_text().splitlines()]


def test_push_uploads_and_installs_and_removes_the_upload(
    over: Over, server: Sshd, robot: Path, tmp_path: Path
) -> None:
    root, log = tmp_path / "new" / "device", list[str]()
    old = root / "incoming" / "abandoned"
    recent = root / "incoming" / "recent"
    for folder, days in ((old, 8), (recent, 6)):
        folder.mkdir(parents=True)
        (folder / "x.ssdedge").write_bytes(b"x")
        os.utime(folder, (time.time() - days * 86_400,) * 2)
    result = over(robot, root, log, allow_downgrade=True)
    size, file = robot.stat().st_size, f"{root}/incoming/{bundle.read(robot).sha256}/robot.ssdedge"
    assert result.to_dict() == {"generation": 1, "root": str(root), "bundle": "robot.ssdedge", "sent_bytes": size}
    assert (root / "installed").read_bytes() == robot.read_bytes()
    assert calls(server) == [
        ["--version"],
        ["doctor", f"--root={root}", "--json", "--", file],
        ["device", "install", f"--root={root}", "--allow-downgrade", "--json", "--", file],
    ]
    assert log == ["sending 0.0 of 0.0 MB", "self-test on 2 images"]
    assert list((root / "incoming").iterdir()) == [recent]


def test_unknown_host_key_is_refused(
    over: Over, server: Sshd, robot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSD_EDGE_SSH", server.stranger)
    with pytest.raises(EnvironmentUnfitError, match="could not connect"):
        over(robot, tmp_path / "device")
    assert not (tmp_path / "device").exists()
    assert not (server.home / "calls.jsonl").exists()


def test_interrupted_upload_is_resumed(
    over: Over, server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "big.ssdedge", extra=np.random.default_rng(1).bytes(12 << 20))
    monkeypatch.setenv("SSD_EDGE_SFTP", "sftp -l 80000")  # 10 MB/s
    root, cut = tmp_path / "device", 4 << 20
    file = root / "incoming" / bundle.read(path).sha256 / path.name
    sizes: list[int] = []

    def interrupt() -> None:
        for _ in range(6000):
            if file.exists() and file.stat().st_size > cut:
                server.cut()
                sizes.append(file.stat().st_size)
                return
            time.sleep(0.005)

    thread = threading.Thread(target=interrupt)
    thread.start()
    log: list[str] = []
    result = over(path, root, log)
    thread.join()
    assert (root / "installed").read_bytes() == path.read_bytes()
    assert [line for line in log if "trying again" in line] == ["the connection broke; trying again in 0 s (2 of 3)"]
    left = [float(line.split()[1]) for line in log if line.startswith("sending")]
    assert len(left) == 2
    assert left[1] <= (path.stat().st_size - cut) / 1e6
    assert sizes[0] < path.stat().st_size
    assert result.sent_bytes == path.stat().st_size


@pytest.mark.parametrize("code", [1, 5])
def test_refused_bundle_leaves_the_installed_one(over: Over, server: Sshd, tmp_path: Path, code: int) -> None:
    root = tmp_path / "device"
    first, second = make(tmp_path / "robot.ssdedge"), make(tmp_path / "robot-2.ssdedge", release=2)
    over(first, root)
    (server.home / "answer.json").write_text(json.dumps({"error": "no", "code": code}))
    with pytest.raises(SSDEdgeError, match=r"127\.0\.0\.1: no$") as refused:
        over(second, root)
    assert refused.value.exit_code == code
    assert (root / "installed").read_bytes() == first.read_bytes()
    (server.home / "answer.json").unlink()
    kept = code == 1  # after a crash the upload is still good
    assert over(second, root).sent_bytes == (0 if kept else second.stat().st_size)
    assert (root / "installed").read_bytes() == second.read_bytes()
    assert list((root / "incoming").iterdir()) == []


def test_unfit_device_is_not_installed_to(over: Over, server: Sshd, robot: Path, tmp_path: Path) -> None:
    check = {"name": "torch", "state": "unfit", "found": "missing", "fix": ""}
    (server.home / "answer.json").write_text(json.dumps({"checks": [check], "doctor": 3}))
    with pytest.raises(EnvironmentUnfitError, match=r"unfit for this bundle: torch: missing$"):
        over(robot, tmp_path / "device")
    assert [args[0] for args in calls(server)] == ["--version", "doctor"]
    assert list((tmp_path / "device" / "incoming").iterdir()) == []


@pytest.mark.parametrize("name", ["a b'c\"d $(touch x) `touch x` ;touch x", "größe \\ * \\* ? [x] #", "--x"])
def test_special_characters_in_paths(over: Over, server: Sshd, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    robot, root = make(tmp_path / name / f"{name}.ssdedge"), tmp_path / name / f"device {name}"
    over(robot, root)
    assert f"--root={root}" in calls(server)[-1]
    assert (root / "installed").read_bytes() == robot.read_bytes()
    assert list((root / "incoming").iterdir()) == []
    assert not any((Path(folder) / "x").exists() for folder in (Path.home(), tmp_path, Path.cwd()))


def test_root_that_cannot_be_created(over: Over, robot: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentUnfitError, match="cannot be created"):
        over(robot, tmp_path / "file" / "device")


def test_missing_command_and_outdated_command(over: Over, robot: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfitError, match="--push-command"):
        over(robot, tmp_path / "device", command="/nowhere/ssd-edge")
    with pytest.raises(EnvironmentUnfitError, match="version"):
        over(robot, tmp_path / "device", command="sh -c 'exit 2'")


@pytest.mark.parametrize("damaged", [False, pytest.param(True, marks=pytest.mark.slow)])  # twice the processes
def test_push_to_a_real_device(over: Over, onnx_run: Path, tmp_path: Path, damaged: bool) -> None:
    from device_runtime.device import Device
    from exporters.deploy import Options, deploy

    path, root, log = tmp_path / "robot.ssdedge", tmp_path / "device", list[str]()
    deploy(onnx_run, Options("cpu"), path, log.append)
    command = shlex.join([sys.executable, "-m", "ssd_edge"])
    if damaged:  # by a power failure
        upload = root / "incoming" / bundle.read(path).sha256 / path.name
        upload.parent.mkdir(parents=True)
        upload.write_bytes(bytes(path.stat().st_size))
        with pytest.raises(BundleRefusedError, match=r"127\.0\.0\.1: "):
            over(path, root, log, command=command)
    result = over(path, root, log, command=command)
    assert result.generation == 1
    assert result.device["bundle_sha256"] == bundle.read(path).sha256
    assert result.device["bundle"] == path.name
    assert any(line.startswith("self-test on ") for line in log)
    with Device.open(root) as device:
        assert device.classes == bundle.read(path).registry.names
    assert list((root / "incoming").iterdir()) == []
