"""Send a bundle to a device with the system's ssh and sftp, and install it there.

Three connections: one to check that ssd-edge is installed and how much of the bundle has already arrived, one to upload
the rest with sftp, and one to run ``doctor`` and ``device install``, which switches to the new generation last. An
interrupted upload is resumed, because the path on the device contains the SHA-256 of the bundle.

Host keys are checked by ssh as configured. No local shell is involved, and everything the remote shell sees is quoted.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ssd_edge import bundle
from ssd_edge.errors import (
    BundleRefusedError,
    EnvironmentUnfitError,
    GateRefusedError,
    InputError,
    SlowerProviderError,
    SSDEdgeError,
    printable,
)
from ssd_edge.system import NO_TELEMETRY

SSH_VARIABLE = "SSD_EDGE_SSH"
SFTP_VARIABLE = "SSD_EDGE_SFTP"
TRIES = 3
PAUSE = 2.0  # seconds before the second try; twice as long before the third
# Detect a dead link, so that another connection can resume. A terminal would change the bytes.
OPTIONS = ("-T", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")
UPLOADS = ".cache/ssd-edge"  # in the home folder, if no root is given
MAX_OUTPUT = 1 << 20  # bytes that a remote command may print
MAX_SENTENCE = 500  # characters
MAX_NAME = 128  # characters
SSH_FAILED = 255
CANNOT_CREATE = 73

# Both scripts receive their values as positional arguments, so that nothing is interpolated into them.
# They print MARKER first; whatever a login script prints before it is ignored.
# An older version on the device does not set the switches of telemetry itself; what is set there is kept.
MARKER = "ssd-edge-push"
_BEGIN = f"echo; echo {MARKER}; exec 2>&1; " + "".join(
    f'export {name}="${{{name}-{value}}}"; ' for name, value in NO_TELEMETRY.items()
)
# Arguments: file, size, and the command that starts ssd-edge.
PREPARE = (
    f"{_BEGIN}"
    'file=$1 size=$2; shift 2; "$@" --version >/dev/null || exit; '
    # sftp writes by path: nobody else may replace a part of it by a link
    "folder=${file%/*}; above=${folder%/*}; umask 022; "
    'own() { for each in "$above" "$folder" "$file"; do '
    'if test -h "$each" || test -n "$(find "$each" -prune ! -user "$(id -u)" 2>/dev/null)"; then '
    f'echo "$each is a symbolic link, or belongs to another user"; exit {CANNOT_CREATE}; fi; done; }}; '
    'own; mkdir -p "$folder" && own && chmod go-w "$above" "$folder" && touch "$folder" "$file" || '
    f"exit {CANNOT_CREATE}; "
    'find "$above" -mindepth 1 -maxdepth 1 -mtime +7 -exec rm -rf {} +; '  # leftovers of abandoned uploads
    'test "$(wc -c <"$file")" -le "$size" || : >"$file"; echo "uploaded $(wc -c <"$file")"'
)
# Arguments: file, --root=… or an empty string, options of the installation, and the command.
# A crash or a lost connection (exit code 1 or above 128) keeps the upload for the next try.
INSTALL = (
    f"{_BEGIN}"
    'file=$1 root=$2 options=$3; shift 3; "$@" doctor ${root:+"$root"} --json -- "$file" && '
    '"$@" device install ${root:+"$root"} $options --json -- "$file"; '
    'code=$?; case $code in 0|[2-6]) rm -rf "${file%/*}";; esac; exit $code'
)

_USER = re.compile(r"[\w.+@][\w.+@-]*")
_HOST = re.compile(r"[A-Za-z0-9_.:%][A-Za-z0-9_.:%-]*")
_UPLOADED = re.compile(r"uploaded +(\d+)")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]")
_EXAMPLE = "e.g. user@camera-3 or user@camera-3:/data/ssd-edge"
_ERRORS = {
    kind.exit_code: kind
    for kind in (SSDEdgeError, InputError, EnvironmentUnfitError, GateRefusedError, BundleRefusedError)
} | {SlowerProviderError.exit_code: SlowerProviderError}

Log = Callable[[str], None]


@dataclass(frozen=True)
class Destination:
    """A device and the folder of its state.

    Attributes:
        login: Argument for ssh: ``host`` or ``user@host``.
        root: Folder on the device, relative to the user's home unless absolute. None: the device's default.
    """

    login: str
    root: str | None


@dataclass(frozen=True)
class PushResult:
    """An installed bundle.

    Attributes:
        generation: Number of the new generation.
        sent_bytes: Bytes that were not on the device yet.
        device: Everything that ``device install --json`` printed.
    """

    generation: int
    sent_bytes: int
    device: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of ``ssd-edge push --json``."""
        return {**self.device, "generation": self.generation, "sent_bytes": self.sent_bytes}


class _BrokenError(Exception):
    """The connection ended before the command had finished."""


def parse_destination(text: str) -> Destination:
    """Parse ``[user@]host[:root]``; an IPv6 address needs brackets.

    Raises:
        InputError: The text is malformed, or contains something that ssh or a shell could take for an option or a
            command.

    Example:
        >>> parse_destination("robot@[fe80::1%eth0]:/data/ssd-edge")
        Destination(login='robot@fe80::1%eth0', root='/data/ssd-edge')
    """
    if not text.isprintable():
        _refuse(text, "it contains control characters or line breaks")
    if "://" in text:
        _refuse(text, f"it is a URL; set a port in ~/.ssh/config or with ${SSH_VARIABLE}, e.g. 'ssh -p 2222'")
    user, at, place = _split_user(text)
    if place.startswith("["):
        host, bracket, rest = place[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            _refuse(text, "']' is missing or is not followed by ':'")
        colon, root = rest[:1], rest[1:]
    else:
        with contextlib.suppress(ValueError):
            ipaddress.IPv6Address(place)
            _refuse(text, f"an IPv6 address needs brackets: [{place}]")
        host, colon, root = place.partition(":")
    if at and not _USER.fullmatch(user):
        _refuse(text, "the user is empty, begins with '-', or contains a character that is not allowed in a user name")
    if not _HOST.fullmatch(host):
        _refuse(text, "the host is empty, begins with '-', or contains a character that is not allowed in a host name")
    if colon and not root:
        _refuse(text, "no folder follows the ':'; omit the ':' to use the device's default")
    return Destination(user + at + host, _below_home(root) if colon else None)


def _split_user(text: str) -> tuple[str, str, str]:
    """Return user, ``@`` and the rest; an ``@`` after the first colon belongs to the root."""
    end = text.find(":")
    at = text.rfind("@", 0, len(text) if end < 0 else end)
    return (text[:at], "@", text[at + 1 :]) if at >= 0 else ("", "", text)


def _below_home(path: str) -> str:
    """Return ``~/…`` as a path relative to the home folder, where ssh starts: a quoted ``~`` is not expanded."""
    if path.startswith("~"):
        if path not in ("~", "~/") and not path.startswith("~/"):
            raise InputError(f"{path} is in the home folder of another user; write it as /home/…")
        return "./" + path[1:].lstrip("/")
    return path


def _refuse(text: str, reason: str) -> NoReturn:
    raise InputError(f"{text!r} is not a valid destination: {reason}; {_EXAMPLE}")


def push(
    path: str | Path,
    destination: Destination,
    log: Log,
    *,
    command: str = "ssd-edge",
    allow_downgrade: bool = False,
    allow_control_flow: bool = False,
) -> PushResult:
    """Upload a bundle to a device and install it there.

    Args:
        path: The bundle.
        destination: Result of `parse_destination`.
        log: Receives progress messages, also those of the device.
        command: Command line that starts ssd-edge there, quoted as for a shell, e.g. ``'/my apps/ssd-edge'``.
        allow_downgrade: Allow an older release than the installed one.
        allow_control_flow: Let the device accept a backbone with loops and branches.

    Raises:
        InputError: The bundle does not exist, or the device rejects the arguments.
        BundleRefusedError: The bundle is damaged, or the device refuses it.
        EnvironmentUnfitError: No connection, no suitable ssd-edge on the device, or the device is unfit.
        GateRefusedError: The self-test failed on the device.
    """
    opened, path = bundle.read(path, allow_control_flow=True), Path(path).absolute()
    if not str(path).isprintable():
        raise InputError(f"the path {str(path)!r} contains characters that sftp cannot transfer; rename it")
    size = path.stat().st_size
    device = _Device(destination, command, log)
    file = device.upload_path(opened.sha256, path.name)
    allowed = {"--allow-downgrade": allow_downgrade, "--allow-control-flow": allow_control_flow}
    flags = " ".join(name for name, given in allowed.items() if given)
    first: int | None = None
    for attempt in range(TRIES):
        if attempt:
            pause = PAUSE * attempt
            log(f"the connection broke; trying again in {pause:.0f} s ({attempt + 1} of {TRIES})")
            time.sleep(pause)
        try:
            uploaded = device.prepare(file, size)
            first = uploaded if first is None else first
            if uploaded < size:
                log(f"sending {(size - uploaded) / 1e6:.1f} of {size / 1e6:.1f} MB")
                device.upload(path, file)
            answer = device.install(file, flags)
            return PushResult(answer["generation"], size - first, answer)
        except _BrokenError:
            if first is None:
                break
    if first is None:
        raise EnvironmentUnfitError(
            f"ssh could not connect to {destination.login}, see its message above; make 'ssh {destination.login}' work "
            "first"
        )
    raise EnvironmentUnfitError(
        f"the connection to {destination.login} broke {TRIES} times; what has arrived stays there, so push again. If "
        "sftp fails at once, see its message above: it needs OpenSSH 8.7 here and the sftp subsystem of sshd there"
    )


class _Device:
    """The ssh and sftp commands for one device."""

    def __init__(self, destination: Destination, command: str, log: Log) -> None:
        self._login, self._root, self._command, self._log = destination.login, destination.root, command, log
        try:
            ssh = shlex.split(os.environ.get(SSH_VARIABLE, "")) or ["ssh"]
            self._sftp = shlex.split(os.environ.get(SFTP_VARIABLE, "")) or ["sftp"]
            words = shlex.split(command)
        except ValueError as error:
            raise InputError(
                f"${SSH_VARIABLE}, ${SFTP_VARIABLE} or --push-command has an unclosed quotation mark: {error}"
            ) from error
        if not words:
            raise InputError("--push-command is empty; give the command that starts ssd-edge on the device")
        self._ssh = [*ssh, *OPTIONS]
        self._words = [_below_home(words[0]), *words[1:]]

    def upload_path(self, sha256: str, name: str) -> str:
        """Return the path of an upload on the device, absolute or beginning with ``./``."""
        folder = UPLOADS if self._root is None else self._root
        if not folder.startswith(("/", "./")):
            folder = f"./{folder}"
        name = _NOT_IN_NAMES.sub("_", name.removesuffix(".ssdedge"))[:MAX_NAME].lstrip(".-") or "pushed"
        return f"{folder.rstrip('/')}/incoming/{sha256}/{name}.ssdedge"

    def prepare(self, file: str, size: int) -> int:
        """Check that ssd-edge starts, create the file, and return how many bytes of it are on the device.

        Raises:
            EnvironmentUnfitError: ssd-edge is not installed there, or the folder cannot be created.
        """
        uploaded: int | None = None
        session = self._start(PREPARE, file, str(size))
        for line in session:
            if match := _UPLOADED.fullmatch(line):
                uploaded = int(match[1])
            else:
                self._log(line)
        code = session.wait()
        if code in (126, 127):
            raise EnvironmentUnfitError(
                f"{self._command} cannot be started on {self._login}; if ssd-edge is installed there, give its path: "
                "--push-command /…/ssd-edge"
            )
        if code == CANNOT_CREATE:
            raise EnvironmentUnfitError(f"{file} cannot be created on {self._login}; name another root")
        if code or uploaded is None:
            self._fail(code)
        return uploaded

    def upload(self, local: Path, file: str) -> None:
        """Append what is missing of a file on the device.

        Raises:
            EnvironmentUnfitError: sftp is not installed here, or the file cannot be written there.
        """
        # With -D, sftp reaches the device through the same ssh command as everything else.
        server = shlex.join([*self._ssh, "-s", "--", self._login, "sftp"])
        batch = f"reput {_sftp_quoted(str(local))} {_sftp_quoted(file)}\n"
        try:
            done = subprocess.run(
                [*self._sftp, "-b", "-", "-D", server], input=batch.encode(), stdout=subprocess.DEVNULL, check=False
            )
        except OSError as error:
            raise _cannot_start(self._sftp[0], error, SFTP_VARIABLE) from error
        if done.returncode == 1:
            raise EnvironmentUnfitError(
                f"sftp could not write {file} on {self._login}, see its message above; free some space there or name "
                "another root"
            )
        if done.returncode:
            raise _BrokenError

    def install(self, file: str, flags: str) -> dict[str, Any]:
        """Run ``doctor`` and ``device install`` for an uploaded bundle, and return the answer of the latter.

        Raises:
            SSDEdgeError: The error of the device, of the class that belongs to its exit code.
        """
        root = "" if self._root is None else f"--root={self._root}"
        answer: dict[str, Any] | None = None
        sentence = unfit = ""
        session = self._start(INSTALL, file, root, flags)
        for line in session:
            value = _json_object(line)
            if "generation" in value:
                answer = value
            elif "checks" in value:
                unfit = self._log_checks(value["checks"])
            elif line.startswith("error: "):
                sentence = _clean(line.removeprefix("error: "))
            else:
                self._log(line)
        try:
            code = session.wait()
        except _BrokenError:
            if not session.started:
                raise
            status = " ".join([self._command, "device status", root]).rstrip()
            raise EnvironmentUnfitError(
                f"the connection to {self._login} broke while the device was installing; check there with '{status}' "
                "whether it succeeded, and push again if not"
            ) from None
        if unfit:
            raise EnvironmentUnfitError(f"{self._login}: unfit for this bundle: {unfit}")
        if code == 0 and answer is not None:
            if type(answer["generation"]) is not int:
                raise EnvironmentUnfitError(
                    f"{self._login} answers '{_clean(answer['generation'])}' where the number of a generation is "
                    "expected; bring both machines to the same version"
                )
            return answer
        if sentence and code in _ERRORS:
            raise _ERRORS[code](f"{self._login}: {sentence}")
        self._fail(code)

    def _log_checks(self, checks: Any) -> str:
        """Log the warnings of ``doctor``; return the first problem that makes the device unfit, or an empty string."""
        unfit = ""
        for check in checks if isinstance(checks, list) else []:
            if not isinstance(check, dict):
                continue
            fix = f"; {check['fix']}" if check.get("fix") else ""
            problem = _clean(f"{check.get('name')}: {check.get('found')}{fix}")
            if check.get("state") == "unfit":
                unfit = unfit or problem
            elif check.get("state") == "warning":
                self._log(f"warning: {problem}")
        return unfit

    def _fail(self, code: int) -> NoReturn:
        """Raise for a command that ended without the expected output."""
        if code == InputError.exit_code:
            raise EnvironmentUnfitError(
                f"the ssd-edge on {self._login} does not accept these arguments; install the version that runs here"
            )
        kind = SSDEdgeError if code == SSDEdgeError.exit_code else EnvironmentUnfitError
        raise kind(
            f"{self._command} on {self._login} ended with exit code {code} and no result; see its messages above"
        )

    def _start(self, script: str, *args: str) -> _Session:
        """Start a script on the device."""
        remote = shlex.join(["sh", "-c", script, "sh", *args, *self._words])
        return _Session([*self._ssh, "--", self._login, remote], self._login)


class _Session:
    """A script that runs on the device. Iterating yields the lines that it prints; messages of ssh are not among them.

    Attributes:
        started: True once the script has started.
    """

    def __init__(self, args: list[str], login: str) -> None:
        self.started = False
        self._login = login
        try:
            self._process = subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        except OSError as error:
            raise _cannot_start(args[0], error, SSH_VARIABLE) from error

    def __iter__(self) -> Iterator[str]:
        read = 0
        with self._process as process:
            assert process.stdout is not None
            while line := process.stdout.readline(MAX_OUTPUT):
                read += len(line)
                if read >= MAX_OUTPUT:
                    process.terminate()
                    raise EnvironmentUnfitError(
                        f"{self._login} printed more than {MAX_OUTPUT} bytes; its login scripts must print nothing "
                        "when there is no terminal"
                    )
                text = _clean(line.decode("utf-8", "replace"), MAX_OUTPUT)
                if self.started and text:
                    yield text
                self.started = self.started or text == MARKER

    def wait(self) -> int:
        """Return the exit code of the script.

        Raises:
            _BrokenError: The connection could not be made, or broke.
        """
        code = self._process.wait()
        if code < 0 or code == SSH_FAILED:
            raise _BrokenError
        return code


def _cannot_start(program: str, error: OSError, variable: str) -> EnvironmentUnfitError:
    return EnvironmentUnfitError(
        f"{program} cannot be started ({error.strerror}); install OpenSSH's client, or set ${variable}"
    )


def _json_object(line: str) -> dict[str, Any]:
    """Return the JSON object at the end of a line, or an empty one: a driver may print before it."""
    try:
        value = json.loads(line[line.index("{") :])
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _clean(text: object, limit: int = MAX_SENTENCE) -> str:
    """Return text of the device without line breaks and escape codes, cut to a length."""
    return printable(str(text).strip()[:limit])


def _sftp_quoted(path: str) -> str:
    """Quote a path for a command of sftp; within quotes it does not expand wildcards."""
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'
