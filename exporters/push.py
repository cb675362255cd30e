"""Send a bundle to a device over the system's ssh; the device checks it, installs it, and switches over last.

One connection (so one password) starts ``ssd-edge device receive`` there, and `device_runtime.receive` says what both
speak. Only what the device lacks is sent. When the connection breaks, the next one goes on where it stopped.

Checks of host keys are ssh's and stay as they are configured. Nothing passes through a shell of this machine, and what
passes through the device's is quoted.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import queue
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from device_runtime.receive import MAGIC
from ssd_edge import bundle, files
from ssd_edge.errors import (
    BundleRefusedError,
    EnvironmentUnfitError,
    GateRefusedError,
    InputError,
    SlowerProviderError,
    SSDEdgeError,
    printable,
)

ENVIRONMENT = "SSD_EDGE_SSH"
TRIES = 3
PAUSE = 2.0  # seconds before the second try; twice as long before the third
# A link that is dead must end: only then can another connection go on. No terminal: it would change the bytes.
OPTIONS = ("-T", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")
MAX_BANNER = 1 << 16  # bytes that a login may print before the device answers
MAX_LINE = 1 << 20
MAX_SENTENCE = 500  # characters
SSH_FAILED = 255
BLOCK = 1 << 17

_USER = re.compile(r"[\w.+@][\w.+@-]*")
_HOST = re.compile(r"[A-Za-z0-9_.:%][A-Za-z0-9_.:%-]*")
_EXAMPLE = "e.g. user@camera-3 or user@camera-3:/data/ssd-edge"
_ERRORS = {
    kind.exit_code: kind
    for kind in (InputError, EnvironmentUnfitError, GateRefusedError, BundleRefusedError, SlowerProviderError)
}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Destination:
    """A device, and where its state is.

    Attributes:
        login: what ssh is given: ``host`` or ``user@host``.
        root: folder on the device, a relative one below the user's home; None: the device's own default.
    """

    login: str
    root: str | None


class _BrokenError(Exception):
    """The connection ended before there was a result."""


@dataclass
class _Job:
    """What is sent, and how much of it was."""

    offer: dict[str, Any]
    blobs: dict[str, bytes]
    say: Say
    connected: bool = False
    sent: int = 0
    total: int = 0  # of what this connection is to send


def parse_destination(text: str) -> Destination:
    """Read ``[user@]host[:root]``; an IPv6 address is put in brackets.

    Raises:
        InputError: it is none, or something that ssh or a shell could take for an option or a command.

    Example:
        >>> parse_destination("robot@[fe80::1%eth0]:/data/ssd-edge")
        Destination(login='robot@fe80::1%eth0', root='/data/ssd-edge')
    """
    if not text.isprintable():
        _refuse(text, "it has control characters or line breaks")
    if "://" in text:
        _refuse(text, f"it is a URL; a port goes into ~/.ssh/config, or into ${ENVIRONMENT}, e.g. 'ssh -p 2222'")
    user, at, place = _split_user(text)
    if place.startswith("["):
        host, bracket, rest = place[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            _refuse(text, "a ']' is missing, or something other than ':' follows it")
        colon, root = rest[:1], rest[1:]
    else:
        with contextlib.suppress(ValueError):
            ipaddress.IPv6Address(place)
            _refuse(text, f"an IPv6 address needs brackets: [{place}]")
        host, colon, root = place.partition(":")
    if at and not _USER.fullmatch(user):
        _refuse(text, "its user is empty, begins with '-', or has characters that no user has")
    if not _HOST.fullmatch(host):
        _refuse(text, "its host is empty, begins with '-', or has characters that no host has")
    if colon and not root:
        _refuse(text, "no folder follows the ':'; leave both away for the device's default")
    return Destination(user + at + host, _below_home(root) if colon else None)


def _split_user(text: str) -> tuple[str, str, str]:
    """``user``, ``@``, and the rest; an @ behind the first colon belongs to the root."""
    end = text.find(":")
    at = text.rfind("@", 0, len(text) if end < 0 else end)
    return (text[:at], "@", text[at + 1 :]) if at >= 0 else ("", "", text)


def _below_home(path: str) -> str:
    """A path with ``~/`` as one relative to the home folder, where ssh starts: quoted, a ~ would be a folder's name."""
    if path.startswith("~"):
        if path not in ("~", "~/") and not path.startswith("~/"):
            raise InputError(f"{path} is in the home folder of another user; write it as /home/…")
        return "./" + path[1:].lstrip("/")
    return path


def _refuse(text: str, reason: str) -> NoReturn:
    raise InputError(f"{text!r} is no destination: {reason}; {_EXAMPLE}")


def push(
    path: str | Path,
    destination: Destination,
    say: Say,
    *,
    command: str = "ssd-edge",
    allow_downgrade: bool = False,
) -> dict[str, Any]:
    """Bring a bundle to a device and install it there.

    Args:
        path: the bundle.
        destination: from `parse_destination`.
        say: told what happens, here and on the device.
        command: command line that starts ssd-edge there, quoted as for a shell, e.g. ``'/my apps/ssd-edge'``.
        allow_downgrade: let the device take an older release.

    Returns:
        ``generation``, ``root``, what the device keeps about the installation, and ``sent_bytes``.

    Raises:
        InputError: no such bundle, or the device refuses what it was asked for.
        BundleRefusedError: the bundle is damaged, or the device refuses it.
        EnvironmentUnfitError: there is no ssh, no connection, or no fitting ssd-edge there; the device is unfit.
        GateRefusedError: the self-test failed there.
    """
    opened = bundle.read(path)
    blobs = {files.sha256(data): data for data in opened.entries.values()}
    entries = [{"path": name, "sha256": files.sha256(data), "size": len(data)} for name, data in opened.entries.items()]
    stated = {"bundle": opened.sha256, "size": Path(path).stat().st_size, "name": Path(path).name, "entries": entries}
    job = _Job({**stated, "allow_downgrade": allow_downgrade, "retry": False}, blobs, say)
    arguments = _arguments(destination, command)
    for attempt in range(TRIES):
        if attempt:
            pause = PAUSE * attempt
            say(f"the connection broke; trying again in {pause:.0f} s ({attempt + 1} of {TRIES})")
            time.sleep(pause)
            job.offer["retry"] = True
        try:
            with _Remote(arguments, destination.login, command) as remote:
                result = _converse(remote, job)
            return {**result, "sent_bytes": job.sent}
        except _BrokenError:
            if not job.connected:
                break
    if job.connected:
        raise EnvironmentUnfitError(
            f"the connection to {destination.login} broke {TRIES} times; what has come over stays there, so push again"
        )
    raise EnvironmentUnfitError(
        f"ssh could not connect to {destination.login} and says why above; get 'ssh {destination.login}' to work first"
    )


def _arguments(destination: Destination, command: str) -> list[str]:
    """The command line of ssh."""
    try:
        ssh, words = shlex.split(os.environ.get(ENVIRONMENT, "")) or ["ssh"], shlex.split(command)
    except ValueError as error:
        raise InputError(f"${ENVIRONMENT} or --push-command has a quotation mark that does not end: {error}") from error
    if not words:
        raise InputError("--push-command is empty; give what starts ssd-edge on the device")
    words = [_below_home(words[0]), *words[1:], "device", "receive"]
    if destination.root is not None:
        words.append(f"--root={destination.root}")
    return [*ssh, *OPTIONS, "--", destination.login, shlex.join(words)]


def _converse(remote: _Remote, job: _Job) -> dict[str, Any]:
    """Offer, send what the device wants, wait for the result."""
    remote.wait_for_magic()
    job.connected = True
    remote.send(json.dumps(job.offer).encode() + b"\n")
    for message in remote.messages():
        if "want" in message:
            _send(remote, job, _checked(message["want"], job.blobs))
        elif (result := _heard(remote, job, message)) is not None:
            return result
    remote.fail()


def _send(remote: _Remote, job: _Job, wanted: list[memoryview]) -> None:
    job.total = sum(map(len, wanted))
    job.say(f"{job.total / 1e6:.1f} of {sum(map(len, job.blobs.values())) / 1e6:.1f} MB are to be sent")
    for part in wanted:
        for start in range(0, len(part), BLOCK):
            block = part[start : start + BLOCK]
            if not remote.send(block):
                return
            job.sent += len(block)
            for message in remote.messages(wait=False):
                _heard(remote, job, message)


def _heard(remote: _Remote, job: _Job, message: dict[str, Any]) -> dict[str, Any] | None:
    """Pass on what the device says; returns its result."""
    if "say" in message:
        job.say(_clean(message["say"]))
    elif "have" in message:
        job.say(f"{_number(message['have']) / 1e6:.1f} of {job.total / 1e6:.1f} MB have arrived")
    elif "error" in message:
        kind = _ERRORS.get(_number(message.get("code")), SSDEdgeError)
        raise kind(f"{remote.login}: {_clean(message['error'])}")
    elif message.get("ok") is True:
        _number(message.get("generation"))
        return {key: value for key, value in message.items() if key != "ok"}
    return None


def _checked(want: Any, blobs: dict[str, bytes]) -> list[memoryview]:
    try:
        wanted = [(blobs[digest], start) for digest, start in want]
        if not all(type(start) is int and 0 <= start <= len(data) for data, start in wanted):
            raise ValueError("a position outside of an entry")
    except (KeyError, ValueError, TypeError) as error:
        raise EnvironmentUnfitError(f"the device asks for what is not in the bundle ({error}); upgrade it") from error
    return [memoryview(data)[start:] for data, start in wanted]


def _number(value: Any) -> int:
    if type(value) is not int:
        raise EnvironmentUnfitError(f"the device answers {_clean(value)} where a number is expected; upgrade it")
    return value


def _clean(text: Any) -> str:
    """One sentence from the device: no line breaks or escape codes from there, and no end."""
    text = text.decode("utf-8", "replace").strip() if isinstance(text, bytes) else str(text)
    return printable(text[:MAX_SENTENCE])


class _Remote:
    """A running ssh. Its errors, and the device's, go to standard error as they come."""

    def __init__(self, arguments: Sequence[str], login: str, command: str) -> None:
        self.login, self._command = login, command
        try:
            self._process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            raise EnvironmentUnfitError(
                f"{arguments[0]} cannot be started ({error.strerror}); install OpenSSH's client, or set ${ENVIRONMENT}"
            ) from error
        self._lines: queue.Queue[bytes] = queue.Queue()
        self._reading = False

    def __enter__(self) -> _Remote:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            self._process.terminate()
        self._end()
        if not self._reading:  # else the other thread closes it
            self._process.stdout.close()

    def _end(self) -> int:
        """Wait for ssh; its exit code is the device's, unless it is `SSH_FAILED`."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        return self._process.wait()

    def send(self, data: bytes | memoryview) -> bool:
        """Write to the device; False: it no longer listens, and what it says last tells why."""
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except BrokenPipeError:
            return False
        return True

    def wait_for_magic(self) -> None:
        """Skip what a login prints, until the device answers."""
        read = 0
        while read < MAX_BANNER:
            line = self._process.stdout.readline(MAX_BANNER)
            if not line:
                self._fail_early()
            if line.strip() == MAGIC:
                self._reading = True
                threading.Thread(target=self._read, daemon=True).start()
                return
            read += len(line)
            if line.startswith(MAGIC.partition(b"/")[0] + b"/"):
                raise EnvironmentUnfitError(
                    f"the ssd-edge on {self.login} speaks {_clean(line.strip())}, but this one {_clean(MAGIC)}; bring "
                    "both to the same version"
                )
        raise EnvironmentUnfitError(
            f"{self.login} printed {MAX_BANNER} bytes, but no answer of ssd-edge; its login scripts must be quiet when "
            "there is no terminal"
        )

    def _fail_early(self) -> NoReturn:
        code = self._end()
        if code < 0 or code == SSH_FAILED:
            raise _BrokenError
        if code in (126, 127):
            reason = f"{self._command} cannot be started on {self.login}; say where it is: --push-command /…/ssd-edge"
        elif code == 2:
            reason = f"the ssd-edge on {self.login} cannot receive bundles; bring it to the version of this one"
        else:
            reason = f"{self._command} on {self.login} ended with exit code {code} and no answer; it says why above"
        raise EnvironmentUnfitError(reason)

    def _read(self) -> None:
        """Collect the device's lines, so that it never waits for this side while this side waits for it."""
        with contextlib.suppress(OSError), self._process.stdout as stream:
            while line := stream.readline(MAX_LINE):
                self._lines.put(line)
        self._lines.put(b"")

    def messages(self, wait: bool = True) -> Iterator[dict[str, Any]]:
        """What the device says, until it ends; without `wait`, what it has said by now."""
        while wait or not self._lines.empty():
            if not (line := self._lines.get()):
                self._lines.put(b"")  # ended: whoever asks next must not wait
                return
            try:
                message = json.loads(line)
                if not isinstance(message, dict):
                    raise ValueError("no object")
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):  # cut
                    continue
                raise EnvironmentUnfitError(
                    f"{self.login} answers '{_clean(line[:60])}', which means nothing here; bring both machines to the "
                    "same version"
                ) from error
            yield message

    def fail(self) -> NoReturn:
        """It ended without a result."""
        code = self._end()
        if code < 0 or code == SSH_FAILED:
            raise _BrokenError
        raise EnvironmentUnfitError(
            f"{self._command} on {self.login} ended with exit code {code} and no result; it says why above"
        )
