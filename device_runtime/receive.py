"""The device's end of ``ssd-edge push``: take over what is missing of a bundle, check it here, and install it.

It runs below ssh and speaks with `exporters.push` over standard input and output. In this order::

    device  a line MAGIC; a sender skips what a login prints before it
    sender  {"bundle", "size", "name", "entries": [{"path", "sha256", "size"}], "retry", "allow_downgrade"}
    device  {"want": [[sha256, first byte], …]}: the entries that it lacks, and from where on
    sender  exactly those bytes, one entry after the other
    device  {"say": sentence} and {"have": bytes}, at any time
    device  {"ok": true, "generation", …} or {"error": sentence, "code": exit code}, once and at last

Each {…} is one line of JSON. What has come when the connection breaks stays (`incoming`): the next push goes on there.
"""

from __future__ import annotations

import contextlib
import json
import select
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from device_runtime.incoming import Incoming, Offer, parse_offer
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError, SSDEdgeError

MAGIC = b"ssd-edge-receive/1"
MAX_LINE = 1 << 16  # an offer of 64 entries with the longest names takes 20 kB
BLOCK = 1 << 16
TELL_EVERY = 2.0  # seconds
SILENCE = 60.0  # seconds without a byte: the sender is gone, though the network did not say so
PATIENCE = 90.0  # seconds that a retry waits until the receiver of the broken connection has noticed
MARGIN = 16 << 20  # bytes of disk that stay free


class Disconnected(Exception):
    """The sender is gone; nobody can be told."""


class Wire:
    """Lines and bytes from the sender, lines to it."""

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self._source, self._sink, self._buffer = source, sink, b""
        try:
            self._descriptor: int | None = source.fileno()
        except (OSError, AttributeError):  # not a file: nothing to wait for
            self._descriptor = None

    def tell(self, **message: Any) -> None:
        """Send one line of JSON."""
        self.write(json.dumps(message, allow_nan=False).encode())

    def write(self, line: bytes) -> None:
        try:
            self._sink.write(line + b"\n")
            self._sink.flush()
        except (OSError, ValueError) as error:  # ValueError: it was closed
            raise Disconnected(str(error)) from error

    def line(self) -> bytes:
        """The next line, at most `MAX_LINE` long."""
        while b"\n" not in self._buffer:
            if len(self._buffer) > MAX_LINE:
                raise BundleRefusedError(f"the offer is longer than {MAX_LINE} bytes; push with `ssd-edge push`")
            self._fill()
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def take(self, limit: int) -> bytes:
        """Up to `limit` bytes, at least one."""
        if not self._buffer:
            self._fill()
        taken, self._buffer = self._buffer[:limit], self._buffer[limit:]
        return taken

    def _fill(self) -> None:
        try:
            if self._descriptor is not None and not select.select([self._descriptor], [], [], SILENCE)[0]:
                raise Disconnected(f"nothing came for {SILENCE:.0f} s")
            data = self._source.read(BLOCK)
        except OSError as error:
            raise Disconnected(str(error)) from error
        if not data:
            raise Disconnected("the connection was closed")
        self._buffer += data


def receive(
    root: str | Path,
    source: BinaryIO,
    sink: BinaryIO,
    *,
    examine: Callable[[Path, Path], Any] | None = None,
    install: Callable[..., Any] | None = None,
) -> int:
    """Serve one push.

    Args:
        root: the device's state; created if need be.
        source: from the sender; unbuffered where it is a file.
        sink: to the sender.
        examine: (path of the bundle, root) → `doctor.Check` of this machine for it; one that is ``unfit`` refuses it.
        install: `installation.install`.

    Returns:
        The exit code; 3 when the connection broke. Errors have been told to the sender.
    """
    wire = Wire(source, sink)
    try:
        wire.write(b"\n" + MAGIC)  # on a line of its own, whatever a login has printed
        try:
            result = _serve(Path(root), wire, examine or _examine, install or _install)
        except SSDEdgeError as error:
            wire.tell(error=str(error), code=error.exit_code)
            return error.exit_code
        except ModuleNotFoundError as error:
            reason = f"the package '{error.name}' is missing on the device; run there: ssd-edge doctor"
            wire.tell(error=reason, code=EnvironmentUnfitError.exit_code)
            return EnvironmentUnfitError.exit_code
        except Disconnected:
            raise
        except Exception as error:
            traceback.print_exc()  # standard error comes to the sender's terminal
            wire.tell(error=f"a defect of ssd-edge on the device: {type(error).__name__}: {error}", code=1)
            return 1
        wire.tell(ok=True, **result)
        return 0
    except Disconnected:
        return EnvironmentUnfitError.exit_code


def _serve(root: Path, wire: Wire, examine: Callable[..., Any], install: Callable[..., Any]) -> dict[str, Any]:
    offer = parse_offer(wire.line())
    incoming = Incoming(root)
    with incoming.lock(PATIENCE if offer.retry else 0):
        if offer.retry and (done := _installed(root, offer.sha256)):
            incoming.empty()
            return done
        incoming.tidy(offer)
        try:
            _fetch(root, wire, incoming, offer)
            path = incoming.assemble(offer)
            for check in examine(path, root):
                if check.state == "unfit":
                    fix = f"; {check.fix}" if check.fix else ""
                    raise EnvironmentUnfitError(f"unfit for this bundle: {check.name}: {check.found}{fix}")
                if check.state == "warning":
                    wire.tell(say=f"warning: {check.name}: {check.found}" + (f"; {check.fix}" if check.fix else ""))
            generation = install(
                root, path, allow_downgrade=offer.allow_downgrade, say=lambda text: wire.tell(say=text)
            )
        except Disconnected:
            raise
        except Exception:
            incoming.discard(offer)
            raise
        incoming.empty()
        return {"generation": generation.number, "root": str(root), **generation.info}


def _fetch(root: Path, wire: Wire, incoming: Incoming, offer: Offer) -> None:
    """Ask for what is missing, and read it."""
    missing = {digest: size for digest, size in offer.sizes.items() if incoming.find(digest, size) is None}
    want = {digest: incoming.partial(digest, size) for digest, size in missing.items()}
    left = sum(missing.values()) - sum(want.values())
    # What comes, the bundle that is put together of it, and what installing it writes.
    needed, free = left + 2 * offer.size + MARGIN, shutil.disk_usage(root).free
    if free < needed:
        raise EnvironmentUnfitError(
            f"the disk of {root} has {free / 1e6:.0f} MB free, but {needed / 1e6:.0f} MB are needed; free some space"
        )
    wire.tell(want=list(want.items()))
    have, told_at = 0, time.monotonic()

    def read(limit: int) -> bytes:
        nonlocal have, told_at
        block = wire.take(limit)
        have += len(block)
        if time.monotonic() - told_at >= TELL_EVERY:
            told_at = time.monotonic()
            wire.tell(have=have)
        return block

    for digest in want:
        incoming.take(read, digest, missing[digest])


def _installed(root: Path, sha256: str) -> dict[str, Any] | None:
    """The current generation, if it is this bundle: the connection broke after it had been installed."""
    from device_runtime.store.generations import Generations

    with contextlib.suppress(InputError, BundleRefusedError):
        current = Generations(root).current()
        if current.origin == "install" and current.info.get("bundle_sha256") == sha256:
            return {"generation": current.number, "root": str(root), **current.info}
    return None


def _examine(path: Path, root: Path) -> Any:
    from device_runtime.machine.doctor import examine
    from ssd_edge import bundle

    return examine(bundle.read(path), root)


def _install(root: Path, path: Path, **options: Any) -> Any:
    from device_runtime.install.bundle import install

    return install(root, path, **options)
