"""Measure `ssd-edge device serve` side by side with its embedder alone and with a minimal server of the same network.

Usage: python benchmarks/serve.py BUNDLE PHOTOGRAPHS [--rounds 40] [--seconds 60] [--clients 8] [--learns 20]
       [--parts start latency load] [--json FILE]

BUNDLE is a bundle with classes, PHOTOGRAPHS a folder with one subfolder per class (or the part ``train`` of one).

start: From starting the process to its first answer, five times, on a device whose classes are learned.
latency: One photograph after another, in turn to (a) the embedder in this process: the file decoded and embedded,
  (b) the service, as a body of ``POST /v1/predict`` on a connection that is kept, (c) a peer: Starlette, uvicorn,
  Pillow and ONNX Runtime in fifty lines, which decodes as usual, embeds, multiplies with a matrix and answers; all with
  one thread in ONNX Runtime. Resident memory of both servers at the end.
load: Clients that send photographs as fast as they are answered, first alone, then beside learns of twenty images each
  (more images of a known class). A wrong answer is one that differs from an earlier answer of the same generation to
  the same photograph; one that names a generation that was never committed is counted as well.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from shared import wait_for_quiet

from device_runtime.device import Device
from device_runtime.install.bundle import install
from ssd_edge import images
from ssd_edge.run.storage import environment
from ssd_edge.system import MIB, resident

STARTS, WARM, LEARN_IMAGES = 5, 20, 20
PEER = """
import io, sys
import numpy as np, onnxruntime, uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse
from starlette.routing import Route

path, port, size, classes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
matrix = None

def answer(body):
    global matrix
    image = Image.open(io.BytesIO(body)).convert("RGB")
    scale = size / 0.875 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))[None]
    (features,) = session.run(None, {session.get_inputs()[0].name: pixels})
    if matrix is None:
        matrix = np.random.default_rng(0).standard_normal((features.shape[1], classes)).astype(np.float32)
    scores = features @ matrix
    shares = np.exp(scores - scores.max())
    return {"label": int(scores.argmax()), "score": float((shares / shares.sum()).max())}

async def predict(request):
    return JSONResponse(await run_in_threadpool(answer, await request.body()))

uvicorn.run(Starlette(routes=[Route("/predict", predict, methods=["POST"])]), port=port, log_level="error", http="h11",
            loop="asyncio")
"""


class Server:
    """A server process, and requests to it.

    Args:
        command: Starts it.
        port: The port that it listens on.
    """

    def __init__(self, command: list[str], port: int) -> None:
        self.port, self.began = port, time.perf_counter()
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **threads}
        )

    def connect(self) -> http.client.HTTPConnection:
        """Return a connection, as soon as the server accepts one."""
        while self.process.poll() is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
            with contextlib.suppress(OSError):
                connection.connect()
                return connection
            time.sleep(0.01)
        raise SystemExit(f"the server ended with {self.process.returncode}")

    def ask(self, path: str, body: bytes = b"", kind: str = "image/jpeg") -> Any:
        """Return the answer to a single request, see `ask`."""
        with contextlib.closing(self.connect()) as connection:
            return ask(connection, path, body, kind)

    def generation(self) -> int:
        """Return the number of the current generation."""
        return int(self.ask("/v1/status")["generation"])

    def memory(self) -> float:
        """Return its resident memory in MiB."""
        return resident("VmRSS", Path("/proc") / str(self.process.pid)) / MIB

    def close(self) -> None:
        """End it."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


def ask(connection: http.client.HTTPConnection, path: str, body: bytes, kind: str = "image/jpeg") -> Any:
    """Return the answer to a request, parsed; raises `RuntimeError` for any status but 200 and 202."""
    connection.request("POST" if body else "GET", path, body or None, {"Content-Type": kind} if body else {})
    reply = connection.getresponse()
    text = reply.read()
    if reply.status not in (200, 202):
        raise RuntimeError(f"{path}: {reply.status} {text[:300]!r}")
    return json.loads(text)


def form(label: str, parts: list[bytes]) -> tuple[bytes, str]:
    """Return a form with a label and images, and its content type."""
    mark = uuid.uuid4().hex
    body = f'--{mark}\r\nContent-Disposition: form-data; name="label"\r\n\r\n{label}\r\n'.encode()
    for number, part in enumerate(parts):
        head = f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="{number}.jpg"\r\n'
        body += head.encode() + b"Content-Type: image/jpeg\r\n\r\n" + part + b"\r\n"
    return body + f"--{mark}--\r\n".encode(), f"multipart/form-data; boundary={mark}"


@contextlib.contextmanager
def service(root: Path) -> Iterator[Server]:
    """Serve a device."""
    port = free_port()
    server = Server(
        [sys.executable, "-m", "ssd_edge", "device", "serve", "--port", str(port), "--root", str(root)], port
    )
    try:
        yield server
    finally:
        server.close()


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def summary(seconds: list[float]) -> dict[str, float]:
    """Return milliseconds: the least, the median and the 99th percentile."""
    values = 1e3 * np.array(seconds)
    p50, p99 = np.percentile(values, [50, 99])
    return {"least": round(float(values.min()), 2), "p50": round(float(p50), 2), "p99": round(float(p99), 2)}


def starts(root: Path, photograph: bytes) -> dict[str, Any]:
    """Return the seconds from the start of the process to the first answer."""
    found = []
    for _ in range(STARTS):
        with service(root) as server:
            server.ask("/v1/predict", photograph)
            found.append(round(time.perf_counter() - server.began, 2))
    return {"seconds": found}


def latency(root: Path, photographs: list[bytes], rounds: int) -> dict[str, Any]:
    """Return the times of the embedder alone, of the service, and of a peer, which take turns."""
    times: dict[str, list[float]] = {"embedder": [], "service": [], "peer": []}
    with Device.open(root) as device, service(root) as server:
        form_of, backbone = device.bundle.pixels, root / "backbones" / f"{device.generation.backbone}.onnx"
        port = free_port()
        classes = str(len(device.classes))
        peer = Server([sys.executable, "-c", PEER, str(backbone), str(port), str(device.bundle.size), classes], port)
        to_service, to_peer = server.connect(), peer.connect()

        def embed(photograph: bytes) -> None:
            device.embedder.embed(images.decode(photograph, "photograph", form_of)[None])

        calls = {
            "embedder": embed,
            "service": lambda photograph: ask(to_service, "/v1/predict", photograph),
            "peer": lambda photograph: ask(to_peer, "/predict", photograph),
        }
        for number in range(-WARM, rounds):
            for name, call in calls.items():
                for photograph in photographs[:10] if number >= 0 else photographs[:1]:
                    began = time.perf_counter()
                    call(photograph)
                    if number >= 0:
                        times[name].append(time.perf_counter() - began)
        memory = {"service": round(server.memory()), "peer": round(peer.memory())}
        peer.close()
    found: dict[str, Any] = {name: summary(seconds) for name, seconds in times.items()}
    against = {
        name: {f"to {other}": round(found["service"][name] / found[other][name], 2) for other in ("embedder", "peer")}
        for name in ("least", "p50")
    }
    return {**found, "ratio": against, "memory_mb": memory}


class Crowd:
    """Clients that send photographs as fast as they are answered.

    Args:
        server: The service.
        photographs: What they send.
        clients: How many.
    """

    def __init__(self, server: Server, photographs: list[bytes], clients: int) -> None:
        self._server, self._photographs = server, photographs
        self._end = threading.Event()
        self.times: list[float] = []
        self.failed: list[str] = []
        self.answers: dict[tuple[int, int], set[str]] = {}
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._send, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _send(self, seed: int) -> None:
        rng, connection = random.Random(seed), self._server.connect()
        while not self._end.is_set():
            number = rng.randrange(len(self._photographs))
            began = time.perf_counter()
            try:
                found = ask(connection, "/v1/predict", self._photographs[number])
            except (RuntimeError, OSError, http.client.HTTPException) as error:
                with self._lock:
                    self.failed.append(str(error))
                connection = self._server.connect()
                continue
            took = time.perf_counter() - began
            (one,) = found["predictions"]
            answer = json.dumps([one["label"], one["nearest"], one["score"], one["generation"] == found["generation"]])
            with self._lock:
                self.times.append(took)
                self.answers.setdefault((found["generation"], number), set()).add(answer)

    def result(self, committed: set[int], seconds: float) -> dict[str, Any]:
        """Return times, failures and wrong answers."""
        torn = sum(len(found) > 1 or "false" in next(iter(found)).rsplit(",", 1)[1] for found in self.answers.values())
        stray = sum(generation not in committed for generation, _ in self.answers)
        return {
            **summary(self.times),
            "answers": len(self.times),
            "per_second": round(len(self.times) / seconds, 1),
            "failed": len(self.failed),
            "failures": self.failed[:3],
            "torn": torn,
            "of_no_generation": stray,
            "generations": len({generation for generation, _ in self.answers}),
        }


def load(
    root: Path, photographs: list[bytes], classes: dict[str, list[bytes]], seconds: float, clients: int, learns: int
) -> dict[str, Any]:
    """Return what many clients get, alone and beside learns."""
    with service(root) as server:
        for photograph in photographs[:WARM]:
            server.ask("/v1/predict", photograph)
        committed, found = {server.generation()}, {}
        before = server.memory()
        with Crowd(server, photographs, clients) as crowd:
            time.sleep(seconds)
        found["alone"] = crowd.result(committed, seconds)
        ends: dict[str, int] = {}
        took: list[float] = []
        began = time.perf_counter()
        with Crowd(server, photographs, clients) as crowd:
            names = sorted(classes)
            for number in range(learns):
                name = names[number % len(names)]
                start = (number // len(names)) * LEARN_IMAGES
                body, kind = form(name, classes[name][start : start + LEARN_IMAGES])
                job, asked = server.ask("/v1/learn", body, kind), time.perf_counter()
                while (job := server.ask(f"/v1/jobs/{job['id']}"))["state"] in ("waiting", "running"):
                    time.sleep(0.05)
                took.append(round(time.perf_counter() - asked, 1))
                ends[job["state"]] = ends.get(job["state"], 0) + 1
                committed.add(server.generation())
            time.sleep(max(0.0, seconds - (time.perf_counter() - began)))
        whole = time.perf_counter() - began
        found["beside learns"] = crowd.result(committed, whole)
        memory = {"before": round(before), "after": round(server.memory())}
    ratio = {name: round(found["beside learns"][name] / found["alone"][name], 2) for name in ("p50", "p99")}
    return {**found, "ratio": ratio, "learns": ends, "learn_seconds": took, "memory_mb": memory}


def main() -> None:
    """Print the results, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--learns", type=int, default=20)
    parser.add_argument(
        "--parts", nargs="+", choices=("start", "latency", "load"), default=["start", "latency", "load"]
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    folder = args.photographs / "train" if (args.photographs / "train").is_dir() else args.photographs
    classes = {
        one.name: [path.read_bytes() for path in sorted(one.iterdir())][:LEARN_IMAGES]
        for one in sorted(folder.iterdir())
        if one.is_dir()
    }
    every = [photograph for found in classes.values() for photograph in found]
    photographs = [every[number] for number in np.random.default_rng(0).permutation(len(every))[:200]]
    result: dict[str, Any] = {"command": f"python benchmarks/serve.py {args.bundle.name} {args.photographs.name}"}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "root"
        install(root, args.bundle)
        wait_for_quiet(30)
        result["load_average"] = round(os.getloadavg()[0], 2)
        if "start" in args.parts:
            result["start"] = starts(root, photographs[0])
            print(f"start: {result['start']}", flush=True)
        if "latency" in args.parts:
            result["latency"] = latency(root, photographs, args.rounds)
            print(f"latency: {json.dumps(result['latency'], indent=1)}", flush=True)
        if "load" in args.parts:
            result["load"] = load(root, photographs, classes, args.seconds, args.clients, args.learns)
            print(f"load: {json.dumps(result['load'], indent=1)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({**result, **environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
