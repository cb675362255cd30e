"""A real sshd on the loopback interface with its own keys, and a fast stand-in for ssd-edge behind it."""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
# Stands in for ssd-edge on the device, without PyTorch. It answers as HOME/answer.json says and records its arguments.
DEVICE = """
import json, sys
from pathlib import Path

home, args = Path(sys.argv[1]), sys.argv[2:]
with open(home / "calls.jsonl", "a") as calls:
    calls.write(json.dumps(args) + "\\n")
path = home / "answer.json"
answer = json.loads(path.read_text()) if path.exists() else {}
root = next((Path(arg[len("--root="):]) for arg in args if arg.startswith("--root=")), None)
if args[0] == "doctor":
    print(json.dumps({"verdict": "fit", "checks": answer.get("checks", [])}))
    sys.exit(answer.get("doctor", 0))
if args[0] == "device":
    print("self-test on 2 images", file=sys.stderr)
    if "error" in answer:
        print("error: " + answer["error"], file=sys.stderr)
        sys.exit(answer["code"])
    (root / "installed").write_bytes(Path(args[-1]).read_bytes())
    print(json.dumps({"generation": 1, "root": str(root), "bundle": Path(args[-1]).name}))
"""


class Sshd:
    """A running sshd.

    Attributes:
        login: Argument for `parse_destination`.
        ssh: Value for ``$SSD_EDGE_SSH`` with the host key among the known hosts.
        stranger: The same without the host key.
        device: Value for ``--push-command`` that starts `DEVICE`, which keeps its files in `home`.
    """

    def __init__(self, folder: Path, port: int, pid: int) -> None:
        self._pid = pid
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

    def cut(self) -> None:
        """Kill every session, but not the listening process."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        for pid in parents:
            ancestor = pid
            while ancestor in parents and ancestor != self._pid:
                ancestor = parents[ancestor]
            if ancestor == self._pid != pid:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)


def _client(folder: Path, known: str, port: int) -> str:
    config = folder / f"{known}.config"
    lines = [
        f"Port {port}",
        f"IdentityFile {folder / 'client_key'}",
        "IdentitiesOnly yes",
        "BatchMode yes",  # no prompts on the terminal that runs the tests
        f"UserKnownHostsFile {folder / known}",
        "GlobalKnownHostsFile none",
        "LogLevel ERROR",
    ]
    config.write_text("\n".join(lines) + "\n")
    return shlex.join(["ssh", "-F", str(config)])


def start(folder: Path) -> Iterator[Sshd]:
    """Run an sshd until the generator is closed; skip the test if OpenSSH is not installed."""
    program = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if not program or not all(map(shutil.which, ("ssh", "sftp", "ssh-keygen"))):
        pytest.skip("NOT TESTED: push over a real ssh; install openssh-server and openssh-client")
    for name in ("host_key", "client_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    separation = Path("/run/sshd")  # Debian's sshd needs it when it runs as root
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
        "Subsystem sftp internal-sftp",
        "UsePAM no",
        "PasswordAuthentication no",
        "PermitRootLogin prohibit-password",
        f"SetEnv OMP_NUM_THREADS=1 PYTHONPATH={ROOT}",
    ]
    (folder / "sshd_config").write_text("\n".join(lines) + "\n")
    log = folder / "sshd.log"
    server = subprocess.Popen([program, "-D", "-E", str(log), "-f", str(folder / "sshd_config")])
    try:
        _wait(port, server, log)
        yield Sshd(folder, port, server.pid)
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
    raise AssertionError(f"sshd did not start: {log.read_text() if log.exists() else 'no log'}")
