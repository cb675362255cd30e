"""Calls of a function in a child process with limits on time and memory: the first run of a graph made by others.

A graph can be made to run for ever, or to need more memory than a machine has; it cannot be interrupted, because its
runtime does not return to Python. The child can be killed. Once a graph has passed, its process may run it directly.

The limit on memory is `RLIMIT_DATA`, which counts memory that is really used by heaps and stacks. `RLIMIT_AS` also
counts address space that CUDA builds and thread-local heaps only reserve, gigabytes of it.

The process is ``python -m ssd_edge.ort.apart``. It reads a request from standard input and writes a reply to standard
output, both as safetensors with JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from ssd_edge import files
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, GateRefusedError, InputError, SSDEdgeError
from ssd_edge.system import MIB, available_memory, duration, usable_cores

SECONDS = 120.0  # for a graph without weights, on a slow and busy board
SECONDS_PER_MIB = 1.0  # of the graph
SHARE = 0.75  # of the memory that is available
LEAST = 512 * MIB  # interpreter, NumPy and ONNX Runtime take 150
PER_CORE = 16 * MIB  # stack and heap of a thread
REPLY = 64 * MIB  # size of a reply, in addition to several times the request

Arrays = Mapping[str, np.ndarray]

_OUT_OF_MEMORY = 77  # exit code of the child
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Stopped(Exception):
    """The child was stopped or crashed. The message completes "the graph …"."""


def memory_limit(most: int | None = None) -> int:
    """Return the bytes that a child may use: three quarters of what is available, or less.

    Args:
        most: Memory of the board for which the graph was made.
    """
    wanted = int(SHARE * available_memory())
    return max(LEAST + PER_CORE * usable_cores(), wanted if most is None else min(most, wanted))


def call(function: str, arrays: Arrays, options: Mapping[str, Any], graph_bytes: int, memory: int) -> Arrays:
    """Call a function in a child process.

    Args:
        function: ``module:name`` of a function that takes `arrays` and `options` and returns finite arrays by name.
        arrays: Finite arrays.
        options: JSON values.
        graph_bytes: Size of the graph, on which the time limit depends.
        memory: Limit on memory, see `memory_limit`.

    Raises:
        Stopped: The child exceeded a limit or crashed.
        SSDEdgeError: The error of the function.
        EnvironmentUnfitError: The child cannot be started.
    """
    call = {"function": function, "options": options, "memory": memory, "parent": os.getpid()}
    request = files.tensor_bytes(arrays, call)
    seconds = SECONDS + SECONDS_PER_MIB * graph_bytes / MIB
    with tempfile.TemporaryFile() as errors:
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=Path(__file__).resolve().parents[2],  # -m imports this package, not an installed one
                start_new_session=True,  # Ctrl-C reaches only this process, which then kills the child
            )
        except OSError as error:
            raise EnvironmentUnfitError(f"a process to try a graph cannot be started ({error.strerror})") from error
        try:
            reply = _exchange(child, request, 4 * len(request) + REPLY, time.monotonic() + seconds)
        except (TimeoutError, subprocess.TimeoutExpired):
            raise Stopped(f"did not finish within {duration(seconds)} and was stopped") from None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if child.returncode == _OUT_OF_MEMORY:
            raise Stopped(f"needs more than {memory // MIB:,} MiB of memory and was stopped")
        if child.returncode:
            raise Stopped(f"{_ending(child.returncode)}{last_output(errors)}")
    found, facts = files.parse_tensors(reply, "the reply of the process that tries a graph")
    if "error" in facts:
        kinds = (InputError, EnvironmentUnfitError, GateRefusedError, BundleRefusedError)
        raise next((kind for kind in kinds if kind.exit_code == facts["exit_code"]), SSDEdgeError)(facts["error"])
    return found


def _exchange(child: subprocess.Popen[bytes], request: bytes, most: int, deadline: float) -> bytes:
    """Send a request and return the reply; a thread each, so that a signal can interrupt this one.

    Raises:
        TimeoutError, subprocess.TimeoutExpired: The deadline has passed.
        Stopped: The reply is too long.
    """
    replies: list[bytes] = []

    def write() -> None:
        assert child.stdin is not None
        with contextlib.suppress(OSError), child.stdin:  # the child may have ended already
            child.stdin.write(request)

    def read() -> None:
        assert child.stdout is not None
        with child.stdout:
            replies.append(child.stdout.read(most + 1))

    threading.Thread(target=write, daemon=True).start()
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(max(0.0, deadline - time.monotonic()))
    if reader.is_alive():
        raise TimeoutError
    if len(replies[0]) > most:
        raise Stopped(f"gives more than {most // MIB:,} MiB and was stopped")
    child.wait(timeout=max(0.1, deadline - time.monotonic()))
    return replies[0]


def _ending(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was stopped by {signal.Signals(-code).name}"
    return f"ended its process with code {code}"


def last_output(errors: IO[bytes]) -> str:
    """Return the end of what a child wrote, in parentheses, or an empty string."""
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - 2000))
    text = " / ".join(errors.read().decode("utf-8", errors="replace").split("\n")[-4:]).strip(" /")
    return f" (last output: {text})" if text else ""


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends (Linux): a killed parent cannot clean up."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _limit(memory: int) -> None:
    """Limit the memory and the files of this process, and let the kernel end it before any other."""
    for kind, value in ((resource.RLIMIT_DATA, memory), (resource.RLIMIT_FSIZE, MIB), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(OSError, ValueError):  # a lower limit is set already
            resource.setrlimit(kind, (value, value))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _ran_out_of_memory(error: BaseException | None) -> bool:
    """Return True if an exception or one of its causes is about memory; ONNX Runtime has no type for it."""
    while error is not None:
        if isinstance(error, MemoryError) or "alloc" in str(error).lower():
            return True
        error = error.__cause__
    return False


def main() -> int:
    """Read a request, write its reply and return the exit code."""
    die_with_parent()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of native libraries must not mix with the reply
    arrays, request = files.parse_tensors(sys.stdin.buffer.read(), "the request")
    if request["parent"] != os.getppid():
        return 1  # the parent ended before `die_with_parent`
    _limit(request["memory"])
    module, _, name = request["function"].partition(":")
    try:
        reply = files.tensor_bytes(getattr(importlib.import_module(module), name)(arrays, request["options"]))
    except (SSDEdgeError, MemoryError) as error:
        if _ran_out_of_memory(error):
            return _OUT_OF_MEMORY
        reply = files.tensor_bytes({}, {"error": str(error), "exit_code": getattr(error, "exit_code", 1)})
    with replies:
        replies.write(reply)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # skips the teardown of libraries, a crash of which would hide the reply
