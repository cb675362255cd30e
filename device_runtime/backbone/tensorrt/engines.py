"""TensorRT engines: a check of graphs that needs no GPU, and the cache of engines built on this machine.

::

    ENGINES/<fingerprint>.plan   engine as serialized by TensorRT
    ENGINES/<fingerprint>.json   its `EngineRecord`; written last
    ENGINES/timing-….cache       kernel timings of this machine, which make a rebuild faster
    ENGINES/.lock                locked during a build

An engine runs only with the TensorRT, GPU and driver that it was built for. The fingerprint covers all of them, so any
change causes a new build. Deserializing an engine executes it. Therefore engines never come from a bundle, only the
user can write to the folder, and the sha256 is verified before TensorRT reads the file.
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

CACHE_VERSION = 1
KEEP = 4  # newest engines that are kept, each of another backbone
TIMEOUT = 3600.0  # seconds
_LOCK_POLL = 0.2  # seconds
_OF_THE_GRAPH = ("onnx_sha256", "precision", "batches")  # facts that do not affect kernel timings

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
    """Parse and build a graph, strongly typed as on a device. TensorRT-RTX needs no GPU for this.

    Args:
        onnx: Contents of the ONNX file.
        module: Import name of TensorRT.

    Raises:
        GateRefusedError: TensorRT rejects the graph; the message has its reason.
        EnvironmentUnfitError: TensorRT cannot be imported, or finds no GPU and needs one.
    """
    api = TensorRT(module)
    built = api.build(onnx)
    return GraphCheck(module, api.version, len(built.plan), built.layers, built.input, built.seconds)


def gpu_facts() -> GpuFacts | None:
    """Return the facts of the GPU that PyTorch uses, or None if it has no GPU or cannot use it."""
    try:
        import torch
    except (ImportError, OSError):
        return None
    try:
        if not torch.cuda.is_available():
            return None
        (torch.zeros(8, device="cuda") + 1).sum().item()  # a wheel without kernels for this GPU fails here
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
    """Collect the facts that an engine on this machine depends on.

    Args:
        onnx_sha256: Digest of the backbone's file.
        precision: Precision that the bundle states.
        gpu: Result of `gpu_facts`.
        version: Version of TensorRT.
        module: Import name of TensorRT.
        root: Root of the file system to read.
    """
    try:
        l4t = (root / "etc/nv_tegra_release").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # not a Jetson
        l4t = None
    return EngineFacts(onnx_sha256, precision, BATCHES, module, version, gpu, l4t)


def fingerprint(facts: EngineFacts) -> str:
    """Return the file name of an engine: the hex sha256 of the facts' canonical JSON and the cache version."""
    return _digest(facts.to_dict())


def _digest(facts: Mapping[str, Any]) -> str:
    return files.sha256(files.json_bytes({"cache": CACHE_VERSION, "facts": facts}))


class EngineCache:
    """Cache of the engines that were built on this machine.

    Args:
        folder: Folder of the engines; created with mode 0700 by the first build.
        command: Command of the building process, see `build`.
    """

    def __init__(self, folder: str | Path, command: Sequence[str] | None = None) -> None:
        self.folder = Path(folder).absolute()
        self._tree = files.Tree(self.folder.parent)
        self._command = list(command or (sys.executable, "-m", "device_runtime.backbone.tensorrt.build"))

    def get(self, facts: EngineFacts) -> Path | None:
        """Return the path of an intact engine with these facts, or None; a damaged engine is removed.

        Raises:
            EnvironmentUnfitError: The folder belongs to another user, or others may write to it.
        """
        if not self._check_folder():
            return None
        reason = self._unusable(facts)
        if reason is None:
            return self._path(facts)
        if any(map(self._tree.status, self._both(facts))):
            with self._try_lock() as locked:
                # an unfinished engine of a running build is not a damaged one
                if locked and (reason := self._unusable(facts)) is not None:
                    log.warning("removed the TensorRT engine %s: %s", self._path(facts).name, reason)
                    self._remove(self._path(facts))
        return None

    def build(
        self, onnx: str | Path, facts: EngineFacts, say: Say = lambda text: None, timeout: float = TIMEOUT
    ) -> Path:
        """Build the engine with these facts in a separate process, unless another process has just built it.

        Engines of the same backbone with other facts are removed, and the oldest engines of other backbones, too.

        Args:
            onnx: The backbone's file.
            facts: Result of `engine_facts`.
            say: Called every ten seconds with a progress message.
            timeout: Timeout in seconds, which includes waiting for the build of another process.

        Returns:
            The path of the engine.

        Raises:
            GateRefusedError: TensorRT rejects the graph.
            EnvironmentUnfitError: There is no usable GPU or too little memory or disk space, or the build timed out.
            BundleRefusedError: The digest of the file is not the one of the facts.
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
                self._tree.write(plan.with_suffix(".json"), files.json_bytes(record.to_dict()))
                if (reason := self._unusable(facts)) is not None:
                    raise EnvironmentUnfitError(f"the TensorRT engine {plan} was built, but {reason}; check the disk")
            except BaseException as error:
                self._remove(plan)
                if isinstance(error, Crashed):
                    self._tree.remove(timings)  # it may have caused the crash
                raise
            finally:
                self._tidy()
            self._prune(facts, plan, timings)
            return plan

    def record(self, facts: EngineFacts) -> EngineRecord:
        """Return the record of the engine with these facts.

        Raises:
            InputError: There is no such engine.
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
        """Return why the engine with these facts cannot be used, or None if it can."""
        plan, sidecar = self._both(facts)
        try:
            record = EngineRecord.from_dict(files.read_json(sidecar))
            size, digest = plan.stat().st_size, files.sha256_file(plan)
        except (InputError, BundleRefusedError, OSError) as error:
            return f"it is not complete ({error})"
        if record.facts != facts.to_dict():
            return "its record has other facts"
        if (size, digest) != (record.bytes, record.sha256):
            return f"it has {size} bytes and sha256 {digest}, but its record has {record.bytes} and {record.sha256}"
        return None

    def _check_folder(self) -> bool:
        """Return True if the folder exists; raise an error if other users can write to it."""
        try:
            found = os.lstat(self.folder)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise EnvironmentUnfitError(f"cannot read {self.folder}: {error.strerror}") from error
        problem = None
        if not stat.S_ISDIR(found.st_mode):
            problem = "is not a folder"
        elif found.st_uid != os.geteuid():
            problem = f"belongs to user {found.st_uid}, but this runs as user {os.geteuid()}"
        elif found.st_mode & 0o022:
            problem = f"is writable by other users (mode {stat.S_IMODE(found.st_mode):o}, but 700 is required)"
        if problem is not None:
            raise EnvironmentUnfitError(f"the folder of TensorRT engines, {self.folder}, {problem}; remove it")
        return True

    def make_folder(self) -> None:
        """Create the folder if it does not exist and check that only this user can write to it.

        Raises:
            EnvironmentUnfitError: The folder cannot be created, belongs to another user, or others may write to it.
        """
        files.make_directory(self.folder.parent)
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.folder, 0o700)
        except OSError as error:
            raise EnvironmentUnfitError(
                f"cannot create {self.folder}: {error.strerror}; choose another root"
            ) from error
        self._check_folder()

    def _try_lock(self) -> contextlib.AbstractContextManager[bool]:
        return self._tree.lock(self.folder / ".lock")

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
        """Remove the temporary files of a killed build; the lock must be held."""
        for path in self._tree.entries(self.folder):
            if path.name.startswith(files.TEMPORARY_PREFIX):
                self._tree.remove(path)

    def _remove(self, plan: Path) -> None:
        # record first: a plan without its record is not used
        self._tree.remove(plan.with_suffix(".json"))
        self._tree.remove(plan)

    def _prune(self, facts: EngineFacts, newest: Path, timings: Path) -> None:
        others = []
        entries = self._tree.entries(self.folder)
        for plan in entries:
            if plan == newest or plan.suffix != ".plan":
                continue
            try:
                same_backbone = files.read_json(plan.with_suffix(".json"))["facts"]["onnx_sha256"] == facts.onnx_sha256
            except (SSDEdgeError, KeyError, TypeError):
                same_backbone = True  # it is not usable
            if same_backbone:
                self._remove(plan)
            else:
                others.append((plan.stat().st_mtime, plan))
        for _, plan in sorted(others, reverse=True)[KEEP - 1 :]:
            self._remove(plan)
        for path in entries:
            if path != timings and path.name.startswith("timing-"):
                self._tree.remove(path)
