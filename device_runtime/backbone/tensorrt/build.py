"""Building of a TensorRT engine in a separate process, ``python -m device_runtime.backbone.tensorrt.build``.

A build takes gigabytes of memory that a process does not return, and may be killed or crash, which must not stop the
program that serves a camera. The process reads one request as JSON from standard input or its argument and writes JSON
lines to standard output: progress, and finally the result.

::

    {"onnx": PATH, "onnx_sha256": …, "plan": PATH, "timing_cache": PATH or null, "module": "tensorrt",
     "batches": [1, 8, 32], "workspace": BYTES}
    {"phase": …, "step": 3, "of": 9}
    {"ok": true, "seconds": …, "bytes": …, "sha256": …, "version": …, "layers": {…}, "warnings": […]}
    {"ok": false, "error": …, "exit_code": …}
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from device_runtime.backbone.tensorrt.api import TensorRT
from ssd_edge import files
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, GateRefusedError, InputError, SSDEdgeError
from ssd_edge.ort.apart import die_with_parent, last_output

HEARTBEAT = 10.0  # seconds
Say = Callable[[str], None]
Write = Callable[[dict[str, Any]], None]
_PROGRESS_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class BuildRequest:
    """Arguments of a build, which reach the building process as JSON.

    Attributes:
        onnx: Path of the graph.
        onnx_sha256: Its expected digest.
        plan: Path of the engine to write.
        timing_cache: Path of the timing cache; None to use none.
        module: Import name of TensorRT.
        batches: Smallest, usual and largest batch.
        workspace: Scratch memory in bytes.
        parent: Id of the process that waits for the result; None for no check.
    """

    onnx: str
    onnx_sha256: str
    plan: str
    timing_cache: str | None
    module: str
    batches: Sequence[int]
    workspace: int
    parent: int | None = None


def build(request: BuildRequest, write: Write) -> dict[str, Any]:
    """Build an engine and write it atomically.

    Args:
        request: Arguments of the build.
        write: Called with progress records, at most once per second.

    Returns:
        The result record, see the module's docstring.

    Raises:
        SSDEdgeError: As in `TensorRT.build`, or a file cannot be read or written.
    """
    api = TensorRT(request.module)
    onnx = files.read_bytes(Path(request.onnx))
    found = files.sha256(onnx)
    if found != request.onnx_sha256:
        raise BundleRefusedError(
            f"{request.onnx} has the sha256 {found}, but {request.onnx_sha256} is expected; install the bundle again"
        )
    timings = Path(request.timing_cache) if request.timing_cache else None
    known = None if timings is None else timings.read_bytes() if files.exists(timings) else b""
    built = api.build(onnx, request.batches, request.workspace, known, _Progress(write))
    warnings = built.warnings
    files.write_bytes(Path(request.plan), built.plan)
    if timings is not None and built.timing_cache is not None:
        with contextlib.suppress(EnvironmentUnfitError):  # the cache only saves time
            files.write_bytes(timings, built.timing_cache)
    layers: dict[str, Any] = {"parsed": built.layers}
    try:
        engine = api.load(built.plan)
        layers.update(engine.summary)
        engine.close()
    except EnvironmentUnfitError as error:  # TensorRT-RTX builds without a GPU, but cannot load the engine
        warnings = [*warnings, str(error)]
    return {
        "ok": True,
        "seconds": built.seconds,
        "bytes": len(built.plan),
        "sha256": files.sha256(built.plan),
        "version": api.version,
        "layers": layers,
        "warnings": warnings,
    }


class _Progress:
    """Callback that writes the progress of the builder's threads, at most once per second."""

    def __init__(self, write: Write) -> None:
        self._write, self._next, self._lock = write, 0.0, threading.Lock()

    def __call__(self, phase: str, step: int, of: int) -> None:
        with self._lock:
            now = time.monotonic()
            if now >= self._next:
                self._next = now + _PROGRESS_SECONDS
                self._write({"phase": phase, "step": step, "of": of})


def main() -> int:
    """Read a request, write its result and return the exit code."""
    die_with_parent()
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of native libraries must not mix with the JSON lines

    def write(record: dict[str, Any]) -> None:
        lines.write(json.dumps(record) + "\n")
        lines.flush()

    request = BuildRequest(**json.loads(sys.argv[1] if len(sys.argv) > 1 else sys.stdin.read()))
    if request.parent not in (None, os.getppid()):
        return 1  # the parent ended before `die_with_parent`
    try:
        result = build(request, write)
    except SSDEdgeError as error:
        result = {"ok": False, "error": str(error), "exit_code": error.exit_code}
    except MemoryError:
        unfit = EnvironmentUnfitError("there is not enough memory to build the engine; stop other programs or add swap")
        result = {"ok": False, "error": str(unfit), "exit_code": unfit.exit_code}
    write(result)
    return int(result.get("exit_code", 0))


class Crashed(EnvironmentUnfitError):
    """Raised when the building process ends without a result."""


def run_apart(
    command: Sequence[str], request: BuildRequest, say: Say, deadline: float, timeout: float
) -> dict[str, Any]:
    """Run the building process and return its result; the process never outlives this call.

    Args:
        command: Command of the process.
        request: Arguments of the build.
        say: Called every ten seconds with a progress message.
        deadline: Time on `time.monotonic` at which the process is killed.
        timeout: The same as a duration in seconds, for the error message.

    Returns:
        The result record, see the module's docstring.

    Raises:
        Crashed: The process ended without a result.
        EnvironmentUnfitError: The deadline has passed.
        SSDEdgeError: The error of `build` in the process.
    """
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=Path(__file__).resolve().parents[3],  # -m imports this package, not an installed one
            start_new_session=True,  # Ctrl-C reaches only this process, which then kills the child
        )
        try:
            result = _listen(child, request, say, deadline)
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            raise EnvironmentUnfitError(
                f"building the TensorRT engine took longer than {timeout:g} s and was stopped; stop other programs and "
                "try again, or run the backbone with ONNX Runtime"
            ) from error
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if result is None:
            raise Crashed(_crash_message(child.returncode, errors))
    if not result["ok"]:
        kinds = (GateRefusedError, BundleRefusedError, InputError)
        kind = next((kind for kind in kinds if kind.exit_code == result["exit_code"]), EnvironmentUnfitError)
        raise kind(result["error"])
    return result


def _listen(child: subprocess.Popen[bytes], request: BuildRequest, say: Say, deadline: float) -> dict[str, Any] | None:
    """Send the request and read the output until the process ends; return the result, or None without one."""
    assert child.stdin is not None
    assert child.stdout is not None
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_pump, args=(child.stdout, lines), daemon=True).start()
    with contextlib.suppress(BrokenPipeError), child.stdin:  # the process may have ended already
        child.stdin.write(json.dumps(dataclasses.asdict(request)).encode())
    started = time.monotonic()
    beat, step, result = started + HEARTBEAT, "", None
    while True:
        now = time.monotonic()
        if now >= deadline:
            raise TimeoutError
        if now >= beat:
            say(
                f"building the TensorRT engine, {now - started:.0f} s so far{step} (once per board and model; takes "
                "minutes on small boards)"
            )
            beat = now + HEARTBEAT
        try:
            line = lines.get(timeout=min(beat, deadline) - now)
        except queue.Empty:
            continue
        if line is None:
            child.wait(timeout=max(0.0, deadline - time.monotonic()))
            return result
        record = json.loads(line)
        if "ok" in record:
            result = record
        else:
            step = f": {record['phase']}, step {record['step']} of {record['of']}"


def _pump(stream: IO[bytes], lines: queue.SimpleQueue[bytes | None]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def _crash_message(code: int, errors: IO[bytes]) -> str:
    last = last_output(errors)
    if code < 0:
        with contextlib.suppress(ValueError):
            return (
                f"building the TensorRT engine was stopped by {signal.Signals(-code).name}{last}, possibly for lack of "
                "memory; stop other programs or add swap, or run the backbone with ONNX Runtime"
            )
    return (
        f"building the TensorRT engine ended with code {code} and no result{last}; run ssd-edge doctor, or run the "
        "backbone with ONNX Runtime"
    )


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # skips the driver's teardown, a crash of which would hide the result
