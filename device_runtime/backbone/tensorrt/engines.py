"""TensorRT engines: the gate for a graph (without a GPU), and the cache of what was built on this machine.

::

    ENGINES/<fingerprint>.plan   the engine as TensorRT serialised it, nothing before or behind it
    ENGINES/<fingerprint>.json   what it was built from and for, its size and sha256; written last
    ENGINES/timing-….cache       timings of kernels on this machine: a rebuild takes less time
    ENGINES/.lock                held while one is built

An engine runs only with the TensorRT, GPU and driver that it was built for: all that is in the fingerprint, and another
one is built when anything changes. Deserialising an engine is running it: none is taken from a bundle, the folder is
the user's alone, and the sha256 is compared before TensorRT sees a byte.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from device_runtime.backbone.interface import EngineRecord
from device_runtime.backbone.tensorrt.api import BATCHES, WORKSPACE, TensorRT
from device_runtime.backbone.tensorrt.build import HEARTBEAT, BuildRequest, Crashed, run_apart
from ssd_edge import files
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError, SSDEdgeError
from ssd_edge.system import file_lock

CACHE_VERSION = 1
KEEP = 4  # engines, the newest; each is of one backbone
TIMEOUT = 3600.0  # seconds
_LOCK_POLL = 0.2  # seconds
_OF_THE_GRAPH = ("onnx_sha256", "precision", "batches")  # facts that kernel timings do not depend on

log = logging.getLogger(__name__)

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class GpuFacts:
    """The properties of a GPU and its driver that an engine depends on.

    Attributes:
        name: Name of the device; the same for all Orin modules.
        capability: Compute capability, e.g. ``8.7``.
        multiprocessors: Number of multiprocessors.
        cuda: CUDA version of PyTorch.
        driver: CUDA version of the driver, e.g. ``12.6``; None if unknown.
    """

    name: str
    capability: str
    multiprocessors: int
    cuda: str | None
    driver: str | None


@dataclasses.dataclass(frozen=True)
class BuilderSettings:
    """The settings of TensorRT's builder."""

    workspace: int = WORKSPACE
    strongly_typed: bool = True
    tf32: bool = False


@dataclasses.dataclass(frozen=True)
class EngineFacts:
    """Everything that an engine depends on.

    Attributes:
        onnx_sha256: Digest of the backbone's file.
        precision: Precision that the bundle states.
        batches: Smallest, usual and largest batch.
        module: Import name of TensorRT.
        tensorrt: Version of TensorRT.
        gpu: The GPU; None for TensorRT-RTX, which builds without one.
        l4t: Contents of ``/etc/nv_tegra_release``; None if this is no Jetson.
        builder: Settings of the builder.
    """

    onnx_sha256: str
    precision: str
    batches: Sequence[int]
    module: str
    tensorrt: str
    gpu: GpuFacts | None
    l4t: str | None
    builder: BuilderSettings = BuilderSettings()

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        return {**dataclasses.asdict(self), "batches": list(self.batches)}


@dataclasses.dataclass(frozen=True)
class GraphCheck:
    """Result of building an engine from a graph without keeping it.

    Attributes:
        module: Import name of TensorRT.
        version: Version of TensorRT.
        bytes: Size of the engine.
        layers: Number of layers of the parsed network.
        input: Type of the input.
        seconds: Duration of parsing and building.
    """

    module: str
    version: str
    bytes: int
    layers: int
    input: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return dataclasses.asdict(self)


def check_graph(onnx: bytes, module: str = "tensorrt_rtx") -> GraphCheck:
    """Parse and build a graph strongly typed, as a device will; with TensorRT-RTX no GPU is needed.

    Args:
        onnx: the graph; a single file.
        module: import name of the TensorRT to ask.

    Raises:
        GateRefusedError: it is not taken; in the words of the parser or builder.
        EnvironmentUnfitError: that TensorRT cannot be imported, or needs a GPU and finds none.
    """
    api = TensorRT(module)
    built = api.build(onnx)
    return GraphCheck(module, api.version, len(built.plan), built.layers, built.input, built.seconds)


def gpu_facts() -> GpuFacts | None:
    """What an engine depends on of the GPU that PyTorch uses; None where it has none or cannot run on it."""
    try:
        import torch
    except (ImportError, OSError):
        return None
    try:
        if not torch.cuda.is_available():
            return None
        (torch.zeros(8, device="cuda") + 1).sum().item()  # a wheel without kernels for this board fails only here
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
    except RuntimeError as error:
        log.warning("PyTorch %s cannot use the GPU: %s", torch.__version__, str(error).splitlines()[0])
        return None
    capability = f"{found.major}.{found.minor}"
    return GpuFacts(found.name, capability, found.multi_processor_count, torch.version.cuda, _driver())


def _driver() -> str | None:
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else f"{version.value // 1000}.{version.value % 1000 // 10}"


def engine_facts(
    onnx_sha256: str,
    precision: str,
    gpu: GpuFacts | None,
    version: str,
    module: str = "tensorrt",
    root: Path = Path("/"),
) -> EngineFacts:
    """All that an engine is built from and for.

    Args:
        onnx_sha256: of the backbone's file.
        precision: that its bundle states.
        gpu: of `gpu_facts`.
        version: of TensorRT.
        module: its import name.
        root: of the file system; another one in tests.
    """
    try:
        l4t = (root / "etc/nv_tegra_release").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # no Jetson
        l4t = None
    return EngineFacts(onnx_sha256, precision, BATCHES, module, version, gpu, l4t)


def fingerprint(facts: EngineFacts) -> str:
    """Name of the engine that has these facts: hex sha256 of their canonical JSON and the cache's version."""
    return _digest(facts.to_dict())


def _digest(facts: Mapping[str, Any]) -> str:
    return files.sha256(files.json_bytes({"cache": CACHE_VERSION, "facts": facts}))


class EngineCache:
    """Engines that were built on this machine.

    Args:
        folder: where they lie; created with mode 0700 by the first build.
        command: of the process that builds; see `build_engine`.
    """

    def __init__(self, folder: str | Path, command: Sequence[str] | None = None) -> None:
        self.folder = Path(folder).absolute()
        self._command = list(command or (sys.executable, "-m", "device_runtime.backbone.tensorrt.build"))

    def get(self, facts: EngineFacts) -> Path | None:
        """The engine with these facts, if an intact one is there; a damaged one is removed.

        Raises:
            EnvironmentUnfitError: the folder belongs to another user, or others may write to it.
        """
        if not self._check_folder():
            return None
        reason = self._unusable(facts)
        if reason is None:
            return self._path(facts)
        if any(path.exists() for path in self._both(facts)):
            with self._try_lock() as locked:
                # while somebody builds, an unfinished engine is not a damaged one
                if locked and (reason := self._unusable(facts)) is not None:
                    log.warning("removed the TensorRT engine %s: %s", self._path(facts).name, reason)
                    self._remove(self._path(facts))
        return None

    def build(
        self, onnx: str | Path, facts: EngineFacts, say: Say = lambda text: None, timeout: float = TIMEOUT
    ) -> Path:
        """Build the engine with these facts in a process of its own; or take it, if another process just did.

        Args:
            onnx: the backbone's file.
            facts: of `engine_facts`.
            say: told every ten seconds that it goes on.
            timeout: seconds, waiting for another process's build included.

        Returns:
            The plan. Engines of the same backbone with other facts are removed, and so are the oldest of others.

        Raises:
            GateRefusedError: TensorRT does not take the graph.
            EnvironmentUnfitError: no usable GPU, not enough memory or disk, or it took too long; nothing is left of it.
            BundleRefusedError: the file is not the one of the facts.
        """
        deadline = time.monotonic() + timeout
        self.make_folder()
        with self._lock(say, deadline, timeout):
            plan = self._path(facts)
            if self._unusable(facts) is None:
                return plan
            timings = self._timings(facts)
            request = BuildRequest(
                onnx=str(Path(onnx).absolute()),
                onnx_sha256=facts.onnx_sha256,
                plan=str(plan),
                timing_cache=str(timings),
                module=facts.module,
                batches=list(facts.batches),
                workspace=facts.builder.workspace,
                parent=os.getpid(),
            )
            self._remove(plan)
            try:
                result = run_apart(self._command, request, say, deadline, timeout)
                record = EngineRecord.from_dict({**result, "facts": facts.to_dict(), "cache": CACHE_VERSION})
                files.write_json(plan.with_suffix(".json"), record.to_dict())
                if (reason := self._unusable(facts)) is not None:
                    raise EnvironmentUnfitError(f"the TensorRT engine {plan} was built, but {reason}; check the disk")
            except BaseException as error:
                self._remove(plan)
                if isinstance(error, Crashed):
                    timings.unlink(missing_ok=True)  # it may be what crashed it
                raise
            finally:
                self._tidy()
            self._prune(facts, plan, timings)
            return plan

    def record(self, facts: EngineFacts) -> EngineRecord:
        """What was noted when the engine with these facts was built: seconds, bytes, layers, warnings.

        Raises:
            InputError: there is none.
        """
        return EngineRecord.from_dict(files.read_json(self._path(facts).with_suffix(".json")))

    def _path(self, facts: EngineFacts) -> Path:
        return self.folder / f"{fingerprint(facts)}.plan"

    def _both(self, facts: EngineFacts) -> tuple[Path, Path]:
        plan = self._path(facts)
        return plan, plan.with_suffix(".json")

    def _timings(self, facts: EngineFacts) -> Path:
        machine = {name: value for name, value in facts.to_dict().items() if name not in _OF_THE_GRAPH}
        return self.folder / f"timing-{_digest(machine)[:16]}.cache"

    def _unusable(self, facts: EngineFacts) -> str | None:
        """Why there is no engine with these facts to use; None: there is."""
        plan, sidecar = self._both(facts)
        try:
            noted = EngineRecord.from_dict(files.read_json(sidecar))
            size, digest = plan.stat().st_size, files.sha256_file(plan)
        except (InputError, BundleRefusedError, OSError) as error:
            return f"it is not complete ({error})"
        if noted.facts != facts.to_dict():
            return "it was noted with other facts"
        if (size, digest) != (noted.bytes, noted.sha256):
            return f"it has {size} bytes and sha256 {digest}, but {noted.bytes} and {noted.sha256} were noted"
        return None

    def _check_folder(self) -> bool:
        """Whether it is there; refuses one in which others could put an engine."""
        try:
            found = os.lstat(self.folder)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise EnvironmentUnfitError(f"cannot look into {self.folder}: {error.strerror}") from error
        problem = None
        if not stat.S_ISDIR(found.st_mode):
            problem = "is not a folder"
        elif found.st_uid != os.geteuid():
            problem = f"belongs to user {found.st_uid}, but this runs as user {os.geteuid()}"
        elif found.st_mode & 0o022:
            problem = f"may be written by others (mode {stat.S_IMODE(found.st_mode):o}, but 700 is needed)"
        if problem is not None:
            raise EnvironmentUnfitError(f"the folder of TensorRT engines, {self.folder}, {problem}; remove it")
        return True

    def make_folder(self) -> None:
        """Make sure that it is there and that nobody else may write to it: an engine is a program.

        Raises:
            EnvironmentUnfitError: it cannot be made, belongs to another user, or others may write to it.
        """
        files.make_directory(self.folder.parent)
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.folder, 0o700)
        except OSError as error:
            raise EnvironmentUnfitError(f"cannot create {self.folder}: {error.strerror}; name another root") from error
        self._check_folder()

    def _try_lock(self) -> contextlib.AbstractContextManager[bool]:
        return file_lock(self.folder / ".lock")

    @contextlib.contextmanager
    def _lock(self, say: Say, deadline: float, timeout: float) -> Iterator[None]:
        beat = time.monotonic()
        while True:
            with self._try_lock() as locked:
                if locked:
                    yield
                    return
            now = time.monotonic()
            if now >= deadline:
                raise EnvironmentUnfitError(
                    f"another process has been building a TensorRT engine in {self.folder} for over {timeout:g} s; "
                    "wait for it, or stop it"
                )
            if now >= beat:
                say("another process is building a TensorRT engine; waiting for it")
                beat = now + HEARTBEAT
            time.sleep(_LOCK_POLL)

    def _tidy(self) -> None:
        """Remove what a killed build left half written; with the lock held."""
        for path in self.folder.glob(f"{files.TEMPORARY_PREFIX}*"):
            path.unlink(missing_ok=True)

    def _remove(self, plan: Path) -> None:
        # the sidecar first: without it a plan is nothing
        plan.with_suffix(".json").unlink(missing_ok=True)
        plan.unlink(missing_ok=True)

    def _prune(self, facts: EngineFacts, newest: Path, timings: Path) -> None:
        others = []
        for plan in self.folder.glob("*.plan"):
            if plan == newest:
                continue
            try:
                of_the_same = files.read_json(plan.with_suffix(".json"))["facts"]["onnx_sha256"] == facts.onnx_sha256
            except (SSDEdgeError, KeyError, TypeError):
                of_the_same = True  # not usable anyway
            if of_the_same:
                self._remove(plan)
            else:
                others.append((plan.stat().st_mtime, plan))
        for _, plan in sorted(others, reverse=True)[KEEP - 1 :]:
            self._remove(plan)
        for path in self.folder.glob("timing-*.cache"):
            if path != timings:
                path.unlink()
