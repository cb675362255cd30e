"""`push`: where to, what is sent, and what is said when it fails; over a real ssh where one is installed."""

from __future__ import annotations

import json
import shlex
import stat
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import by_hand as hand
from helpers import sshd

from exporters import push as pushing
from exporters.push import Destination, parse_destination, push
from ssd_edge import bundle, files
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError, SSDEdgeError

HERE = Path(__file__).parent

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
def test_destinations(text, login, root):
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
def test_what_is_no_destination(text):
    with pytest.raises(InputError):
        parse_destination(text)


# A bundle that is made quickly


def make(path: Path, release: int = 1, weight: float = 1.0, extra: bytes = b"") -> Path:
    """A valid bundle, with a learner that nobody loads."""
    manifest, entries = hand.parts()
    entries["learner.safetensors"] = ("learner", hand.vector(*[weight] * 500))
    if extra:
        entries["extra.txt"] = ("extra", extra)
    bundle.write(path, bundle.pack({**manifest, "release": release}, entries))
    return path


@pytest.fixture
def robot(tmp_path: Path) -> Path:
    return make(tmp_path / "robot.ssdedge")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """In place of ssh, a script of the test: ``fake("exit 127")``."""
    monkeypatch.setattr(pushing, "PAUSE", 0.01)

    def write(script: str) -> list[str]:
        path = tmp_path / "fake ssh"
        path.write_text(
            f"#!/bin/sh\nprintf '%s\\n' \"$@\" > '{tmp_path}/arguments'\necho x >> '{tmp_path}/calls'\n{script}\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("SSD_EDGE_SSH", f"{shlex.quote(str(path))} -p 2222")
        return said

    said: list[str] = []
    return write


def send(robot: Path, said: list[str] | None = None, **options) -> dict:
    return push(robot, parse_destination("u@camera:/data"), (said if said is not None else []).append, **options)


MAGIC = "echo ssd-edge-receive/1\n"


def test_what_ssh_is_given(robot, tmp_path, fake):
    fake("exit 3")
    with pytest.raises(EnvironmentUnfitError):
        send(robot, command="'/my apps/ssd-edge' -v")
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[:2] == ["-p", "2222"]
    assert arguments[-3:] == ["--", "u@camera", "'/my apps/ssd-edge' -v device receive --root=/data"]
    assert not any("HostKey" in word or "KnownHosts" in word for word in arguments)


def test_a_command_below_the_home_folder(robot, tmp_path, fake):
    fake("exit 3")
    with pytest.raises(EnvironmentUnfitError):
        send(robot, command="~/.venv/bin/ssd-edge")
    assert (tmp_path / "arguments").read_text().splitlines()[-1].startswith("./.venv/bin/ssd-edge device receive")


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("exit 255", "could not connect"),
        ("exit 127", "--push-command"),
        ("exit 126", "--push-command"),
        ("exit 2", "version"),
        ("exit 0", "exit code 0"),
        ("echo ssd-edge-receive/9; cat", "ssd-edge-receive/9"),
        ("yes welcome", "login scripts"),
        ("head -c 200000 /dev/zero", "login scripts"),
        (MAGIC + "exit 137", "137"),
        (MAGIC + "echo hello", "hello"),
        (MAGIC + "echo '[1]'", "means nothing"),
        (MAGIC + """echo '{"want": [["00", 0]]}'""", "not in the bundle"),
        (MAGIC + """echo '{"want": 7}'""", "not in the bundle"),
        (MAGIC + """echo '{"ok": true, "generation": "1"}'""", "number"),
    ],
)
def test_what_is_said_when_the_device_does_not_answer_as_it_should(robot, tmp_path, fake, script, told):
    fake(script)
    with pytest.raises(EnvironmentUnfitError, match=told):
        send(robot)
    assert (tmp_path / "calls").read_text() == "x\n"


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6])
def test_an_error_of_the_device_keeps_its_exit_code(robot, fake, code):
    fake(MAGIC + f"""printf '{{"error": "so \\\\u001b[0m it is", "code": {code}}}\\n'; exit {code}""")
    with pytest.raises(SSDEdgeError, match=r"^u@camera: so \?\[0m it is$") as refused:
        send(robot)
    assert refused.value.exit_code == code


def test_an_error_in_the_middle_of_sending_is_heard(tmp_path, fake):
    robot = make(tmp_path / "big.ssdedge", extra=bytes(4 << 20))
    digest = files.sha256(bytes(4 << 20))
    fake(
        MAGIC
        + f"""echo '{{"want": [["{digest}", 0]]}}'
head -c 3000 > /dev/null
echo '{{"error": "the disk is full", "code": 3}}'; exit 3"""
    )
    with pytest.raises(EnvironmentUnfitError, match="disk is full"):
        send(robot)


def test_a_connection_that_breaks_every_time_is_tried_three_times(robot, tmp_path, fake):
    said = []
    fake(MAGIC + f"head -n 1 >> '{tmp_path}/offers'; exit 255")
    with pytest.raises(EnvironmentUnfitError, match="push again"):
        send(robot, said)
    assert (tmp_path / "calls").read_text() == "x\n" * 3
    assert [line for line in said if "trying again" in line][-1].endswith("(3 of 3)")
    offers = [json.loads(line) for line in (tmp_path / "offers").read_text().splitlines()]
    assert [offer["retry"] for offer in offers] == [False, True, True]


def test_whoever_asks_after_the_end_does_not_wait():
    script = MAGIC + """echo '{"say": "x"}'; exit 7"""
    with pushing._Remote(["sh", "-c", script], "u@camera", "ssd-edge") as remote:
        remote.wait_for_magic()
        assert list(remote.messages()) == [{"say": "x"}]
        again: list[list] = []
        asking = threading.Thread(target=lambda: again.append(list(remote.messages())), daemon=True)
        asking.start()
        asking.join(5)
        assert again == [[]]


def test_a_banner_is_skipped_and_what_the_device_says_is_passed_on(robot, fake):
    said = []
    fake(
        "echo Welcome to JetPack; printf 'no newline'; echo\n"
        + MAGIC
        + """echo '{"want": []}'; echo '{"say": "testing"}'; echo '{"have": 0}'; echo '{"ok": true, "generation": 4}'"""
    )
    assert send(robot, said) == {"generation": 4, "sent_bytes": 0}
    assert "testing" in said


@pytest.mark.parametrize(("value", "told"), [("/no/such/ssh", "cannot be started"), ("ssh 'x", "quotation mark")])
def test_no_ssh(robot, monkeypatch, value, told):
    monkeypatch.setenv("SSD_EDGE_SSH", value)
    with pytest.raises((EnvironmentUnfitError, InputError), match=told):
        send(robot)


@pytest.mark.parametrize("command", ["", "  ", "ssd-edge 'x"])
def test_no_command(robot, command):
    with pytest.raises(InputError, match="--push-command"):
        send(robot, command=command)


def test_a_damaged_bundle_does_not_leave(robot, fake, tmp_path):
    fake("exit 1")
    robot.write_bytes(robot.read_bytes()[:-1])
    with pytest.raises(BundleRefusedError):
        send(robot)
    assert not (tmp_path / "calls").exists()


# Over a real ssh


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    yield from sshd.start(tmp_path_factory.mktemp("sshd"))


@pytest.fixture
def over(server, monkeypatch):
    """``over(bundle, root)``: push to the quick device."""
    monkeypatch.setenv("SSD_EDGE_SSH", server.ssh)
    monkeypatch.setattr(pushing, "PAUSE", 0.1)

    def run(path: Path, root: str | Path, said: list[str] | None = None, **options) -> dict:
        options = {"command": server.device, **options}
        said = [] if said is None else said
        return push(path, parse_destination(f"{server.login}:{root}"), said.append, **options)

    return run


def test_the_first_push_sends_all_and_the_next_only_what_changed(over, tmp_path):
    root = tmp_path / "device"
    first = make(tmp_path / "robot.ssdedge")
    done = over(first, root, allow_downgrade=True)
    assert done["allow_downgrade"] is True
    assert (root / "installed").read_bytes() == first.read_bytes()
    sizes = {name: len(data) for name, data in bundle.read(first).entries.items()}
    assert done["sent_bytes"] == sum(sizes.values())
    (root / "backbones").mkdir()  # as the real installation would
    backbone = bundle.read(first).entries["backbone.onnx"]
    (root / "backbones" / f"{files.sha256(backbone)}.onnx").write_bytes(backbone)
    second = make(tmp_path / "robot-2.ssdedge", release=2, weight=2.0)
    said: list[str] = []
    assert over(second, root, said)["sent_bytes"] == sum(sizes.values()) - sizes["backbone.onnx"]
    assert (root / "installed").read_bytes() == second.read_bytes()
    assert "testing" in said
    assert {path.name for path in (root / "incoming").iterdir()} == {".lock"}


def test_a_host_whose_key_is_not_known_is_refused(over, server, robot, tmp_path, monkeypatch):
    monkeypatch.setenv("SSD_EDGE_SSH", server.stranger)
    with pytest.raises(EnvironmentUnfitError, match="could not connect"):
        over(robot, tmp_path / "device")
    assert not (tmp_path / "device").exists()


def test_a_transfer_that_is_cut_goes_on_where_it_stopped(over, server, tmp_path):
    extra = np.random.default_rng(1).bytes(12 << 20)
    path = make(tmp_path / "big.ssdedge", extra=extra)
    cut = 8 << 20
    (server.home / "cut-at").write_text(str(cut))
    said: list[str] = []
    over(path, tmp_path / "device", said)
    assert (tmp_path / "device" / "installed").read_bytes() == path.read_bytes()
    assert [line for line in said if "trying again" in line] == ["the connection broke; trying again in 0 s (2 of 3)"]
    todo = [float(line.split()[0]) for line in said if "to be sent" in line]
    assert len(todo) == 2
    assert todo[1] <= (path.stat().st_size - cut + 200_000) / 1e6  # not from zero
    assert not (server.home / "cut-at").exists()


def test_a_root_with_quotes_and_a_command_in_it_arrives_as_it_is(over, server, robot, tmp_path):
    root = tmp_path / "a b'c\"d $(touch x) `touch x` ;touch x"
    over(robot, root)
    assert json.loads((server.home / "words.json").read_text()) == ["device", "receive", f"--root={root}"]
    assert (root / "installed").exists()
    assert not any((Path(folder) / "x").exists() for folder in (Path.home(), tmp_path, Path.cwd()))


def test_a_command_that_is_not_there_and_one_that_is_too_old(over, robot, tmp_path):
    with pytest.raises(EnvironmentUnfitError, match="--push-command"):
        over(robot, tmp_path / "device", command="/nowhere/ssd-edge")
    with pytest.raises(EnvironmentUnfitError, match="version"):
        over(robot, tmp_path / "device", command="sh -c 'exit 2'")


def test_a_run_is_deployed_to_a_device_that_tests_itself(over, server, onnx_run, tmp_path):
    from device_runtime.device import Device
    from exporters.deploy import Options, deploy

    path, root, said = tmp_path / "robot.ssdedge", tmp_path / "device", []
    deploy(onnx_run, Options("cpu"), path, said.append)
    done = over(path, root, said, command=shlex.join([sys.executable, "-m", "ssd_edge"]))
    assert done["generation"] == 1
    assert done["bundle_sha256"] == bundle.read(path).sha256
    assert any(line.startswith("self-test on ") for line in said)
    with Device.open(root) as device:
        assert device.classes == bundle.read(path).registry.names
    assert {each.name for each in (root / "incoming").iterdir()} == {".lock"}
