"""Costs of a bundle on this machine: latency, learning time, memory and sizes, and an estimate of its memory.

A percentile is the nearest rank: the value at position ⌈q/100 · n⌉ of n sorted values, which is always a measured
value. Times are wall-clock times (`time.perf_counter_ns`) from uint8 images in memory to NumPy arrays in memory. An
embedder returns only when its work is done, also on a GPU.

The module measures memory in a separate process, in which it runs as the main module, so that the caller's imports do
not count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from device_runtime.backbone import trial
from device_runtime.backbone.interface import BackboneSpec, DeviceEmbedder, EngineRecord
from device_runtime.machine.board import Board, default_root, describe
from ssd_edge import bundle as bundles
from ssd_edge import files, images, ort, targets
from ssd_edge.bundle import Bundle
from ssd_edge.errors import EnvironmentUnfitError, InputError
from ssd_edge.system import MIB, resident, usable_cores

if TYPE_CHECKING:
    from ssd_edge.learners import Learner

PERCENTILES = (50, 90, 99)
NEW_IMAGES = 20  # images of the class that is learned
REPEATS = 3  # repetitions of learning
PHOTO = (640, 480)
POOL = 8  # number of images, so that consecutive calls differ
VERSIONS = ("numpy", "torch", "onnxruntime", "tensorrt")
UNMEASURED = "without the GPU's share (CUDA context, TensorRT engine, workspace)"

# For `estimate`; measured on x86-64 with ONNX Runtime on the CPU, not on a board.
RUNTIME_MB = 300  # interpreter, NumPy, PyTorch and ONNX Runtime take 242 MiB; CUDA builds take more
BACKBONE_TIMES = 3  # file, weights and reordered weights, with fp16 stored as fp32
LEARNER_TIMES = 20  # peak while learning ÷ file size, 15 to 23 for ridge and slda
PSEUDO_SAMPLES, PSEUDO_BYTES = 60, 32  # samples per class and bytes per value, see retention
ACTIVATION_BATCH = 32  # images per call of the backbone
ACTIVATION_CHANNELS, LIVE_MAPS = 64, 3  # of the first layers, whose feature maps are largest
FULL_RESOLUTION = 64  # pixels; the first layer halves larger inputs

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Estimated peak memory of a device's process, in MiB, by cause.

    Attributes:
        runtime: Interpreter and libraries.
        bundle: The bundle's bytes, while it is installed.
        backbone: The backbone, with its reordered weights.
        activations: A batch of 32 images in layers of 64 channels, at half the resolution if the input is larger than
            64 pixels.
        learner: The learner, with the copies that learning makes.
        old_classes: The samples that measure the effect on the old classes.
        total: Their sum.
    """

    runtime: float
    bundle: float
    backbone: float
    activations: float
    learner: float
    old_classes: float
    total: float


@dataclasses.dataclass(frozen=True)
class TargetFit:
    """Comparison of a process with the memory budget of a target.

    Attributes:
        target: Name of the target.
        limit_mb: Memory budget of the target in MiB.
        needed_mb: Memory of the process in MiB.
        fits: True if the process stays within the budget.
        note: What the figure leaves out; empty if nothing.
    """

    target: str
    limit_mb: int
    needed_mb: float
    fits: bool
    note: str


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Resident memory of a process in MiB, libraries included, as it does a device's work.

    Attributes:
        imports: With interpreter, NumPy, PyTorch and ONNX Runtime loaded.
        loaded: With the bundle, its learner and its backbone loaded, too.
        predicted: After predicting one image.
        learned: After learning a class of 20 images, with the copies that learning makes and the estimate of its
            effect on the old classes.
        peak: Highest value at any time.
    """

    imports: float
    loaded: float
    predicted: float
    learned: float
    peak: float


@dataclasses.dataclass(frozen=True)
class Times:
    """Durations of a bundle's work on a machine.

    Attributes:
        calls: Number of timed calls.
        warm_up: Number of calls before them.
        batch: Images per call.
        threads: Threads of ``backbone`` and ``learner``.
        latency_ms: Percentiles ``p50``, ``p90`` and ``p99`` of ``decode`` (a 640 × 480 JPEG, resized), ``backbone`` (a
            call) and ``head`` (the learner's scores for one embedding).
        learn: ``images`` of the new class, ``seconds`` of each repetition and their ``median``.
    """

    calls: int
    warm_up: int
    batch: int
    threads: dict[str, int]
    latency_ms: dict[str, dict[str, float]]
    learn: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Profile:
    """Costs of a bundle on a machine.

    Attributes:
        bundle: Its ``name``, ``target``, ``release``, ``sha256``, ``precision``, ``learner``, ``classes`` (number),
            ``size`` and ``dim``.
        machine: The board as JSON values, with its ``title``.
        versions: Versions of Python and the packages that run a bundle.
        provider: Runtime of the backbone.
        engine: Record of the TensorRT engine; None without one.
        times: Durations.
        bytes: Sizes of ``bundle``, ``backbone``, ``learner`` (in the file) and ``learner_state`` (in use).
        memory_mb: Measured memory.
        estimate_mb: Estimated memory.
        fits: Comparison of the measured peak with each target.
    """

    bundle: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    provider: str
    engine: EngineRecord | None
    times: Times
    bytes: dict[str, int]
    memory_mb: Footprint
    estimate_mb: MemoryEstimate
    fits: list[TargetFit]

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as JSON values, with the attributes of `times` on the top level."""
        values = dataclasses.asdict(self)
        return {**values.pop("times"), **values}


def percentile(values: Sequence[float], q: float) -> float:
    """Return the q-th percentile of unsorted values by nearest rank.

    Raises:
        ValueError: There are no values, or q is not in 0..100.
    """
    if not len(values) or not 0 <= q <= 100:
        raise ValueError(f"the {q}-th percentile of {len(values)} values does not exist")
    return sorted(values)[max(1, math.ceil(q / 100 * len(values))) - 1]


def timed(call: Callable[[int], Any], calls: int, warm_up: int) -> dict[str, float]:
    """Return percentiles of the milliseconds per ``call(number)``, without the first `warm_up` calls."""
    taken = []
    for number in range(warm_up + calls):
        started = time.perf_counter_ns()
        call(number)
        taken.append((time.perf_counter_ns() - started) / 1e6)
    counted = taken[warm_up:]
    return {f"p{q}": round(percentile(counted, q), 4) for q in PERCENTILES}


def estimate(bundle: Bundle) -> MemoryEstimate:
    """Estimate the peak memory of a device's process with this bundle from sizes alone, without running it.

    The estimate finds bundles that are far too large. An unusual learner or network can need twice as much, and the
    memory of a GPU is not included.
    """
    backbone = bundle.manifest["backbone"]
    side = backbone["size"] / (1 if backbone["size"] <= FULL_RESOLUTION else 2)
    values = len(bundle.manifest["classes"]) * PSEUDO_SAMPLES * backbone["dim"]
    parts = {
        "runtime": float(RUNTIME_MB),
        "bundle": sum(map(len, bundle.entries.values())) / MIB,
        "backbone": BACKBONE_TIMES * len(bundle.read("backbone")) / MIB,
        "activations": ACTIVATION_BATCH * ACTIVATION_CHANNELS * LIVE_MAPS * side**2 * 4 / MIB,  # float32
        "learner": LEARNER_TIMES * len(bundle.read("learner")) / MIB,
        "old_classes": PSEUDO_BYTES * values / MIB,
    }
    return MemoryEstimate(
        **{name: round(value, 1) for name, value in parts.items()}, total=round(sum(parts.values()), 1)
    )


def fits(needed_mb: float) -> list[TargetFit]:
    """Compare an amount of memory in MiB with the budget of each target."""
    return [
        TargetFit(
            target=target.name,
            limit_mb=target.budget_mb,
            needed_mb=round(needed_mb, 1),
            fits=needed_mb <= target.budget_mb,
            note="" if target.kind == "cpu" else UNMEASURED,
        )
        for target in targets.targets().values()
    ]


def profile(
    path: str | Path,
    *,
    images_timed: int = 50,
    warm_up: int = 10,
    batch: int = 1,
    root: Path | None = None,
    board: Board | None = None,
    allow_control_flow: bool = False,
    say: Say = lambda text: None,
) -> Profile:
    """Measure a bundle on this machine, without changing the device's state.

    Args:
        path: The bundle.
        images_timed: Number of images, each embedded once in ⌈images_timed/batch⌉ timed calls.
        warm_up: Number of calls before the timed ones.
        batch: Images per call.
        root: Root of a device's state; None for the default root. If the bundle's backbone is installed there, its
            engine cache is used, otherwise a temporary one.
        board: Description of this machine; None to read it.
        allow_control_flow: As for `install`.
        say: Called with messages about long operations.

    Raises:
        InputError: The bundle does not exist, or a number is too small.
        BundleRefusedError: The bundle is damaged.
        EnvironmentUnfitError: A package is missing, or the backbone cannot run on this machine.
    """
    for name, value, least in (("--images", images_timed, 1), ("--warm-up", warm_up, 0), ("--batch", batch, 1)):
        if value < least:
            raise InputError(f"{name} must be at least {least}, but is {value}")
    opened = bundles.read(path, allow_control_flow)
    board = board or describe()
    trial.check(opened)
    with _store(opened, default_root() if root is None else root) as folder:
        embedder, learner = _load(opened, folder, say)
        times = _times(opened, embedder, learner, math.ceil(images_timed / batch), warm_up, batch)
        memory = _footprint_of_child(path, folder)
    manifest = opened.manifest
    return Profile(
        bundle={key: manifest.get(key) for key in ("name", "target", "release")}
        | {"sha256": opened.sha256, "precision": manifest["backbone"]["precision"]}
        | {"learner": learner.name, "classes": len(opened.registry), "size": embedder.size, "dim": embedder.dim},
        machine={"title": board.title, **board.to_dict()},
        versions={"python": platform.python_version(), **_versions()},
        provider=embedder.provider,
        engine=embedder.engine,
        times=times,
        bytes={
            "bundle": Path(path).stat().st_size,
            "backbone": len(opened.read("backbone")),
            "learner": len(opened.read("learner")),
            "learner_state": learner.memory_bytes(),
        },
        memory_mb=memory,
        estimate_mb=estimate(opened),
        fits=fits(memory.peak),
    )


def _times(opened: Bundle, embedder: DeviceEmbedder, learner: Learner, calls: int, warm_up: int, batch: int) -> Times:
    import torch

    from ssd_edge import learners

    size, dim = embedder.size, embedder.dim
    form = images.Pixels.from_dict(opened.manifest["backbone"])
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 256, (POOL + batch, size, size, 3), dtype=np.uint8)
    photo = _photo()
    embedded = torch.from_numpy(embedder.embed(pool[:POOL]))
    fresh = torch.from_numpy(rng.standard_normal((NEW_IMAGES, dim)).astype(np.float32))
    task = learners.Task(fresh, torch.full((NEW_IMAGES,), len(opened.registry)))
    seconds = []
    for _ in range(REPEATS):
        copy = learners.restore(*opened.tensors("learner"))
        started = time.perf_counter_ns()
        copy.learn(task)
        seconds.append(round((time.perf_counter_ns() - started) / 1e9, 4))
    latency = {
        "decode": timed(lambda number: images.decode(photo, "the photo", form), calls, warm_up),
        "backbone": timed(lambda number: embedder.embed(pool[number % POOL :][:batch]), calls, warm_up),
        "head": timed(lambda number: learner.scores(embedded[number % POOL][None]), calls, warm_up),
    }
    threads = {"backbone": usable_cores(), "learner": torch.get_num_threads()}
    learn = {"images": NEW_IMAGES, "seconds": seconds, "median": percentile(seconds, 50)}
    return Times(calls, warm_up, batch, threads, latency, learn)


def _photo() -> bytes:
    """Return a JPEG with structure at several scales, whose decoding time is typical of photographs."""
    from PIL import Image

    rng = np.random.default_rng(1)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(PHOTO)
    pixels = np.asarray(coarse) + rng.normal(0, 8, (PHOTO[1], PHOTO[0], 3))
    stream = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


@contextlib.contextmanager
def _store(opened: Bundle, root: Path) -> Iterator[Path]:
    """Yield a root with the bundle's backbone: the device's own if installed there, otherwise a temporary one."""
    from device_runtime.store.generations import Generations

    data = opened.read("backbone")
    if files.is_file(root / "backbones" / f"{files.sha256(data)}.onnx"):
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="ssd-edge-profile-") as folder:
        store = Generations(folder)
        with store.writer():
            store.add_backbone(data)
        yield Path(folder)


def _load(opened: Bundle, root: Path, say: Say) -> tuple[DeviceEmbedder, Learner]:
    """Open the embedder and the learner as the device does."""
    from device_runtime.backbone.embedder import open_embedder
    from device_runtime.learning.state import DeviceState
    from device_runtime.store.generations import Generations

    learner = DeviceState.of_bundle(opened).learner
    facts = {**opened.manifest["backbone"], "target": opened.manifest["target"]}
    spec = BackboneSpec.from_facts(files.sha256(opened.read("backbone")), facts)
    return open_embedder(Generations(root), spec, opened.tensors("probe"), say), learner


def _versions() -> dict[str, str]:
    """Return the versions of the packages that run a bundle; empty for a missing package."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = str((ort.load() if name == "onnxruntime" else importlib.import_module(name)).__version__)
        except (ImportError, OSError, AttributeError, EnvironmentUnfitError):
            found[name] = ""
    return found


def footprint(path: str | Path, root: Path) -> Footprint:
    """Measure the memory of this process while it does a device's work with a bundle.

    Args:
        path: The bundle.
        root: Root with the bundle's backbone.
    """
    import torch

    from device_runtime.learning.state import DeviceState
    from ssd_edge import learners
    from ssd_edge.learners import retention

    with contextlib.suppress(EnvironmentUnfitError):
        ort.load()
    found = {"imports": _resident("VmRSS")}
    opened = bundles.read(path, allow_control_flow=True)  # `profile` has tried it
    embedder, learner = _load(opened, root, lambda text: None)
    found["loaded"] = _resident("VmRSS")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (NEW_IMAGES, embedder.size, embedder.size, 3), dtype=np.uint8)
    learner.scores(torch.from_numpy(embedder.embed(pixels[:1])))
    found["predicted"] = _resident("VmRSS")
    rows = torch.full((NEW_IMAGES,), len(opened.registry))
    task = learners.Task(torch.from_numpy(embedder.embed(pixels)), rows)
    copies = [learners.restore(*opened.tensors("learner")) for _ in range(2)]  # the second for held-out images
    for copy in copies:
        copy.learn(task)
    if len(opened.registry):
        state = DeviceState.of_bundle(opened)
        retention.cost(learner, copies[0], state.statistics, state.record)
    found["learned"] = _resident("VmRSS")
    return Footprint(**found, peak=_resident("VmHWM"))


def _resident(field: str) -> float:
    return round(resident(field) / MIB, 1)


def _footprint_of_child(path: str | Path, root: Path) -> Footprint:
    command = [sys.executable, "-m", "device_runtime.machine.profile", str(Path(path).absolute()), str(root.absolute())]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    try:
        return Footprint(**json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError, TypeError) as error:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise EnvironmentUnfitError(
            f"the process that measures memory ended with code {done.returncode} ({reason}); a negative "
            "code is a signal, and -9 means that memory ran out"
        ) from error


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(footprint(sys.argv[1], Path(sys.argv[2])))))
