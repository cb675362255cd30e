"""A network namespace in which every packet of a command is recorded, and no one answers.

Run as a script inside the namespace (`run` does), it makes every address of IPv4 and IPv6 local to the loopback
interface, names 127.0.0.1 as the only resolver, and records each packet while the command runs.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ETH_P_ALL, PACKET_OUTGOING = 0x0003, 4
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--mount")


@dataclass(frozen=True)
class Trapped:
    """What a command did: its exit code, its output, and each packet that it sent, as text."""

    code: int
    output: str
    packets: list[str]


@functools.cache
def unavailable() -> str:
    """Return why this machine has no such namespace; empty if it has."""
    if not sys.platform.startswith("linux") or shutil.which("unshare") is None:
        return "network namespaces need Linux and util-linux"
    ask = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))"
    try:
        tried = run([sys.executable, "-c", ask], dict(os.environ), Path.cwd(), 60)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"a network namespace cannot be made here ({error})"
    if tried.code or not any("192.0.2.1:9" in packet for packet in tried.packets):
        return f"the namespace records nothing here: {tried}"
    return ""


def run(command: Sequence[str], env: dict[str, str], cwd: Path, timeout: float) -> Trapped:
    """Run a command in a namespace of its own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        inside = [*UNSHARE, sys.executable, "-I", __file__, str(report), *command]
        done = subprocess.run(inside, env=env, cwd=cwd, timeout=timeout, capture_output=True, text=True, check=False)
        if not report.exists():
            raise OSError(done.stderr.strip() or f"exit code {done.returncode}")
        return Trapped(done.returncode, done.stdout + done.stderr, json.loads(report.read_text()))


def _bring_up_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        flags = struct.unpack("16sh", fcntl.ioctl(control, SIOCGIFFLAGS, struct.pack("16sh", b"lo", 0)))[1]
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh", b"lo", flags | IFF_UP))


def _make_every_address_local(family: int) -> None:
    """Do what ``ip route add local default dev lo`` does, which may not be installed (rtnetlink(7))."""
    create, request_ack, new_route = 0x400, 0x5, 24
    table_local, protocol_boot, scope, type_local = 255, 3, 254 if family == socket.AF_INET else 0, 2
    route = struct.pack("BBBBBBBBI", family, 0, 0, 0, table_local, protocol_boot, scope, type_local, 0)
    route += struct.pack("HHi", 8, 4, socket.if_nametoindex("lo"))  # RTA_OIF
    header = struct.pack("IHHII", 16 + len(route), new_route, create | request_ack, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.send(header + route)
        (code,) = struct.unpack_from("i", netlink.recv(4096), 16)
        if code:
            raise OSError(-code, f"no route for family {family}: {os.strerror(-code)}")


def _name_resolver(folder: Path) -> None:
    """Let look-ups go to 127.0.0.1 instead of a socket of systemd or nscd, which a network namespace does not stop."""
    for name, text in (
        ("resolv.conf", "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n"),
        ("nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n"),
    ):
        path = Path("/etc", name)
        if not path.exists():
            continue
        ours = folder / name
        ours.write_text(text)
        subprocess.run(["mount", "--bind", str(ours), str(path.resolve())], check=True)


def _describe(frame: bytes) -> str:
    """Describe an Ethernet frame of the loopback interface: protocol, address, port, and names in it."""
    kind, packet = struct.unpack("!H", frame[12:14])[0], frame[14:]
    if kind == 0x0800:
        size, protocol, address = (packet[0] & 15) * 4, packet[9], socket.inet_ntoa(packet[16:20])
    elif kind == 0x86DD:
        size, protocol, address = 40, packet[6], socket.inet_ntop(socket.AF_INET6, packet[24:40])
    else:
        return f"protocol {kind:#x}"
    port = struct.unpack("!H", packet[size + 2 : size + 4])[0] if protocol in (6, 17) else 0
    text = "".join(chr(byte) if 32 < byte < 127 else "." for byte in packet[size + 8 :])[:80]
    return f"{ {6: 'TCP', 17: 'UDP'}.get(protocol, protocol) } {address}:{port} {text}"


def _main(report: str, *command: str) -> int:
    _bring_up_loopback()
    _make_every_address_local(socket.AF_INET)
    if Path("/proc/net/if_inet6").exists():
        _make_every_address_local(socket.AF_INET6)
    folder = Path(report).parent
    _name_resolver(folder)
    packets: list[str] = []
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as sniffer:
        sniffer.bind(("lo", 0))
        ended = threading.Event()

        def record() -> None:
            sniffer.settimeout(0.1)
            while True:
                try:
                    frame, (_, _, direction, *_) = sniffer.recvfrom(65536)
                except TimeoutError:
                    if ended.is_set():
                        return
                    continue
                if direction == PACKET_OUTGOING:  # each packet of the loopback interface is seen twice
                    packets.append(_describe(frame))

        thread = threading.Thread(target=record)
        thread.start()
        code = subprocess.run(command, check=False).returncode
        ended.set()
        thread.join()
    Path(report).write_text(json.dumps(packets))
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
