"""Processes of the command line without its imports: each is a fork of a process that has imported PyTorch.

A process of the command line spends most of its time on imports. `Launcher` starts this file as a process that only
imports, in a single thread. For each command it forks a child, which takes over the folder, environment, umask and
streams of the command and then runs ``python -m ssd_edge`` as its main program, to the usual end of the interpreter.

What the interpreter and the libraries read from the environment when they start is the launcher's, and its children
share one hash seed, so a test about these needs a real process: `run_real`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

# Not onnxruntime: its import is fast, but starts a thread, which a fork does not copy.
# The optimisers and the ONNX exporter import torch._dynamo, which takes as long as PyTorch itself.
IMPORTS = (
    "torch",
    "torch._dynamo",
    "onnxscript",
    "matplotlib.backends.backend_svg",
    "rich.progress",
    "ssd_edge.cli",
    "ssd_edge.learners",
)
SIZE = 4  # bytes of the length of a request
READ_AT_START = ("PYTHON", "OMP_", "MKL_", "OPENBLAS_", "KMP_", "MALLOC_", "LD_", "TORCH", "CUDA", "NUMBA", "LC_")


class Launcher:
    """A process that forks the processes of commands."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair()
        self._asking = threading.Lock()  # commands may run at the same time
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            environment = {
                "OMP_WAIT_POLICY": "PASSIVE",
                **os.environ,
            }  # as `ssd-edge device` sets it before its imports
            options = {"stdin": subprocess.DEVNULL, "env": environment, "pass_fds": [theirs.fileno()]}
            self._process = subprocess.Popen(command, **options)

    def run(
        self, args: list[str], cwd: Path, env: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, as `subprocess.run` with captured text.

        Raises:
            subprocess.TimeoutExpired: the command was killed after this time.
        """
        with self._asking:
            umask = os.umask(0)
            os.umask(umask)
        request = json.dumps({"args": args, "cwd": str(cwd), "env": dict(env), "umask": umask}).encode()
        receiver, sender = os.pipe()
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, os.fdopen(receiver, "rb", 0) as reply:
            fds = [out.fileno(), err.fileno(), sender]
            with self._asking:
                socket.send_fds(self._channel, [len(request).to_bytes(SIZE, "little")], fds)
                self._channel.sendall(request)
            os.close(sender)
            pid = int(reply.readline())
            if not select.select([reply], [], [], timeout)[0]:
                os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(args, timeout)
            code = os.waitstatus_to_exitcode(int(reply.readline()))
            streams = []
            for stream in (out, err):
                stream.seek(0)
                streams.append(stream.read().decode())
        return subprocess.CompletedProcess(args, code, *streams)

    def close(self) -> None:
        """Kill the launcher's process.

        The end of the channel is not enough: a process that a test forked may hold a copy of it.
        """
        self._channel.close()
        self._process.kill()
        self._process.wait()


def run_real(args: list[str], cwd: Path, env: Mapping[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a command in a new interpreter, with the arguments of `Launcher.run`."""
    command = [sys.executable, "-m", "ssd_edge", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=timeout, check=False)


def _serve(channel: socket.socket) -> None:
    """Fork a child for each request and return in the child; end the process when the launcher is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the monitors
    while True:
        head, fds, _, _ = socket.recv_fds(channel, SIZE, 3)
        if not head:
            os._exit(0)
        request = json.loads(channel.recv(int.from_bytes(head, "little"), socket.MSG_WAITALL))
        if os.fork() == 0:
            break
        for fd in fds:
            os.close(fd)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    channel.close()
    out, err, reply = fds
    if child := os.fork():  # this process is its monitor
        os.close(out)
        os.close(err)
        os.write(reply, b"%d\n" % child)
        os.write(reply, b"%d\n" % os.waitpid(child, 0)[1])
        os._exit(0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    for fd in fds:
        os.close(fd)
    os.umask(request["umask"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv[1:] = request["args"]
    sys.path[0] = request["cwd"]


if __name__ == "__main__":
    for name in IMPORTS:
        importlib.import_module(name)
    if os.fork() == 0:  # before a fork, OpenBLAS ends the threads that it started when NumPy was imported
        os._exit(0)
    os.wait()
    assert len(os.listdir("/proc/self/task")) == 1, "a fork copies only one thread"
    gc.collect()
    gc.freeze()  # a collection in a child does not copy the memory of the imports
    _serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_module("ssd_edge", run_name="__main__", alter_sys=True)
