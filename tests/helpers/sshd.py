"""A real sshd on the loopback interface, with keys of its own, and a device behind it that is quick to answer."""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# Speaks the device's part of the protocol with the real `receive`, but needs no PyTorch: it takes 0.2 s, not 5.
# "cut-at N" makes it kill the sshd above it after N bytes, once.
DEVICE = '''
import json, os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from device_runtime.receive import receive

home = Path(sys.argv[1])
words = sys.argv[2:]
(home / "words.json").write_text(json.dumps(words))
root = Path(next((w.partition("=")[2] for w in words if w.startswith("--root=")), home / "default"))


def session():
    """The sshd process that carries this connection."""
    pid = os.getppid()
    while Path(f"/proc/{pid}/comm").read_text().strip() not in ("sshd", "sshd-session"):
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid


class Source:
    def __init__(self):
        self.stream, self.count, self.cut = open(0, "rb", buffering=0), 0, home / "cut-at"

    def read(self, limit):
        data = self.stream.read(limit)
        self.count += len(data)
        if self.cut.exists() and self.count >= int(self.cut.read_text()):
            self.cut.unlink()
            os.kill(session(), signal.SIGKILL)
        return data

    def fileno(self):
        return self.stream.fileno()


def install(root, path, *, allow_downgrade, say):
    say("testing")
    (root / "installed").write_bytes(path.read_bytes())
    return SimpleNamespace(number=len(list(root.iterdir())), info={"allow_downgrade": allow_downgrade})


sink = open(os.dup(1), "wb", buffering=0)
os.dup2(2, 1)
sys.exit(receive(root, Source(), sink, examine=lambda path, root: [], install=install))
'''


class Sshd:
    """A running sshd.

    Attributes:
        login: for `parse_destination`.
        ssh: for ``$SSD_EDGE_SSH``; it knows the host's key.
        stranger: the same, but the host's key is not known.
        device: command line for ``--push-command``: `DEVICE`, which keeps its files in `home`.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.login = f"{pwd.getpwuid(os.getuid()).pw_name}@127.0.0.1"
        self.home = folder / "home"
        self.home.mkdir()
        script = folder / "device.py"
        script.write_text(DEVICE)
        self.device = shlex.join([sys.executable, str(script), str(self.home)])
        host_key = (folder / "host_key.pub").read_text().split()[:2]
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {' '.join(host_key)}\n")
        (folder / "no_hosts").write_text("")
        self.ssh = _client(folder, "known_hosts", port)
        self.stranger = _client(folder, "no_hosts", port)


def _client(folder: Path, known: str, port: int) -> str:
    config = folder / f"{known}.config"
    lines = [
        f"Port {port}",
        f"IdentityFile {folder / 'client_key'}",
        "IdentitiesOnly yes",
        "BatchMode yes",  # no question at the terminal of whoever runs the tests
        f"UserKnownHostsFile {folder / known}",
        "GlobalKnownHostsFile none",
        "LogLevel ERROR",
    ]
    config.write_text("\n".join(lines) + "\n")
    return shlex.join(["ssh", "-F", str(config)])


def start(folder: Path) -> Iterator[Sshd]:
    """Run one until the generator is closed; skips the test where OpenSSH is not installed."""
    program = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if not program or not shutil.which("ssh") or not shutil.which("ssh-keygen"):
        pytest.skip("NOT TESTED: push over a real ssh; install openssh-server and openssh-client")
    for name in ("host_key", "client_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    separation = Path("/run/sshd")  # sshd of Debian wants it when it runs as root
    made = os.geteuid() == 0 and not separation.exists()
    if made:
        separation.mkdir(mode=0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lines = [
        f"Port {port}",
        "ListenAddress 127.0.0.1",
        f"HostKey {folder / 'host_key'}",
        f"AuthorizedKeysFile {folder / 'client_key.pub'}",
        f"PidFile {folder / 'sshd.pid'}",
        "StrictModes no",
        "UsePAM no",
        "PasswordAuthentication no",
        "PermitRootLogin prohibit-password",
        "SetEnv OMP_NUM_THREADS=1",
    ]
    (folder / "sshd_config").write_text("\n".join(lines) + "\n")
    log = folder / "sshd.log"
    server = subprocess.Popen([program, "-D", "-E", str(log), "-f", str(folder / "sshd_config")])
    try:
        _wait(port, server, log)
        yield Sshd(folder, port)
    finally:
        server.terminate()
        server.wait(10)
        if made:
            separation.rmdir()


def _wait(port: int, server: subprocess.Popen, log: Path) -> None:
    for _ in range(100):
        if server.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"sshd does not run: {log.read_text() if log.exists() else 'no log'}")
