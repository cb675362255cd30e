"""The doctor's checks on several machines, with stand-ins for their packages."""

from __future__ import annotations

import dataclasses
import errno
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from device_runtime.machine import doctor
from device_runtime.machine.board import Board, describe
from device_runtime.machine.checks import STATES, Check
from device_runtime.machine.doctor import examine, verdict
from device_runtime.machine.packages import CONVOLUTION
from ssd_edge import bundle as bundles
from ssd_edge import targets
from ssd_edge.bundle import signing
from ssd_edge.errors import EnvironmentUnfitError
from ssd_edge.system import MIB

JETPACK_6 = {"l4t": "36.4.3", "jetpack": "6.1 to 6.2", "python": "3.10.12", "power_mode": "15W"}
NANO = Board(model="NVIDIA Jetson Orin Nano Developer Kit", cpus=6, memory_mb=7620, available_mb=5000, **JETPACK_6)
AGX = dataclasses.replace(NANO, model="NVIDIA Jetson AGX Orin Developer Kit")
THOR = dataclasses.replace(
    NANO, model="NVIDIA Jetson AGX Thor Developer Kit", l4t="38.4.0", jetpack="7.1", python="3.12.3"
)
XAVIER = dataclasses.replace(NANO, model="NVIDIA Jetson Xavier NX Developer Kit", l4t="35.4.1", jetpack="5.1.2")
PC = Board(processor="AMD Ryzen", cpus=8, memory_mb=32000, available_mb=30000, python="3.11.7")


class StandInTorch:
    """A stand-in for PyTorch with a GPU, whose kernels raise `broken` if given."""

    def __init__(self, broken: Exception | None = None, capability: tuple[int, int] = (8, 7), gpu: bool = True) -> None:
        self.__version__ = "2.5.0a0+nv24.08"
        self.version = types.SimpleNamespace(cuda="12.6")
        self.cuda = types.SimpleNamespace(
            is_available=lambda: gpu,
            get_device_name=lambda number: "Orin",
            get_device_capability=lambda number: capability,
        )
        self._broken = broken
        self.from_numpy = torch.from_numpy

    def zeros(self, count: int, device: str) -> torch.Tensor:
        if device == "cuda" and self._broken is not None:
            raise self._broken
        return torch.zeros(count)


class StandInRuntime:
    """A stand-in for ONNX Runtime with GPU providers; `cuda` is the behavior of a CUDA session."""

    def __init__(self, cuda: str, version: str = "1.23.2") -> None:
        self.__version__ = version
        self.cuda = cuda
        self.requested: list[tuple[str, dict[str, str]]] = []
        self.SessionOptions = lambda: types.SimpleNamespace(
            entries=(entries := {}), add_session_config_entry=entries.__setitem__
        )

    def get_available_providers(self) -> list[str]:
        return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, model: bytes, options: Any, providers: list[str]) -> Any:
        self.requested.append((providers[0], options.entries))
        if providers == ["CUDAExecutionProvider"] and self.cuda == "raises":
            raise RuntimeError("libcudnn.so.9: cannot open shared object file\nsecond line")
        if providers == ["CUDAExecutionProvider"] and self.cuda == "falls back":
            print("EP Error … Falling back to ['CPUExecutionProvider']")
            providers = ["CPUExecutionProvider"]
        wrong = providers == ["CUDAExecutionProvider"] and self.cuda == "wrong"
        return types.SimpleNamespace(
            get_providers=lambda: providers,
            run=lambda names, given: [np.full((1, 1, 1, 1), 7.0 if wrong else (given["x"] * given["w"]).sum())],
        )


class StandInTensorRT:
    """TensorRT of a version; without a GPU making a builder fails as its binding does."""

    def __init__(self, version: str = "10.3.0", gpu: bool = True) -> None:
        self.__version__ = version
        self._gpu = gpu

    class Logger:
        INTERNAL_ERROR = 0

        def __init__(self, severity: int) -> None:
            assert severity == self.INTERNAL_ERROR

    def Builder(self, logger: Any) -> object:
        if not self._gpu:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return object()


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return ``packages(torch=…, tensorrt=None)``, which installs stand-ins; None for a missing package."""

    def put(**modules: Any) -> None:
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)

    put(tensorrt=None)
    return put


@pytest.fixture
def jetson(packages: Any) -> Any:
    """Install the packages of a Jetson where everything works."""
    packages(torch=StandInTorch(), onnxruntime=StandInRuntime("runs"), tensorrt=StandInTensorRT())
    return packages


def found(checks: list[Check], name: str, state: str) -> Check:
    """Return the only result with this name and state."""
    chosen = [check for check in checks if (check.name, check.state) == (name, state)]
    assert len(chosen) == 1, checks
    return chosen[0]


@pytest.fixture
def made(tiny_bundle: Any, tmp_path: Path) -> Any:
    """Return ``made(target="jetson", …)``, which writes a bundle and reads it from its file."""

    def make(**options: Any) -> bundles.Bundle:
        path = tmp_path / "made.ssdedge"
        bundles.write(path, tiny_bundle(**options))
        return bundles.read(path)

    return make


def test_this_machine_is_fit(tmp_path: Path) -> None:
    checks = examine(root=tmp_path / "not" / "there" / "yet")
    assert verdict(checks) == "fit"
    assert {check.state for check in checks} <= {"ok", "note"}
    assert "ran: ONNX Runtime CPU" in found(checks, "onnxruntime", "ok").found
    assert list(tmp_path.iterdir()) == []  # nothing is created or left behind


def test_convolution_is_valid_onnx() -> None:
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(onnx.load_from_string(CONVOLUTION), full_check=True)


def test_base_packages_only(packages: Any, tmp_path: Path) -> None:
    packages(torch=None, onnxruntime=None, tensorrt=None, cryptography=None)
    checks = examine(root=tmp_path, board=PC)
    assert verdict(checks) == "unfit: backbone"  # a device that only predicts needs no PyTorch
    assert "can predict, but not learn" in found(checks, "torch", "warning").found
    assert found(checks, "torch", "warning").fix == "pip install 'ssd-edge[device]'"
    assert found(checks, "backbone", "unfit").fix == "pip install 'ssd-edge[device]'"
    assert found(checks, "onnxruntime", "note")
    assert found(checks, "cryptography", "note")


def test_fixes_on_a_jetson_never_name_pypi(packages: Any, tmp_path: Path) -> None:
    packages(torch=None, onnxruntime=None, tensorrt=None, cryptography=None)
    checks = examine(root=tmp_path, board=NANO)
    for name, state in (("torch", "warning"), ("onnxruntime", "note"), ("tensorrt", "warning"), ("backbone", "unfit")):
        fix = found(checks, name, state).fix
        assert "pip install" not in fix
        assert "--system-site-packages" in fix


def test_a_jetson_where_everything_works(jetson: Any, tmp_path: Path, made: Any) -> None:
    for bundle in (None, made(target="jetson"), made(target="jetson-orin-nano"), made(target="cpu")):
        checks = examine(bundle, tmp_path, NANO)
        assert verdict(checks) == "fit"
        assert {check.state for check in checks} <= {"ok", "note"}, checks
    assert found(checks, "backbone", "ok").found == (
        "can run with TensorRT 10.3.0, ONNX Runtime CUDA, ONNX Runtime CPU"
    )
    assert "a kernel ran" in found(checks, "gpu", "ok").found
    assert found(checks, "power mode", "ok").found == "15W"


def test_fallback_is_disabled_for_gpu_providers_only(packages: Any, tmp_path: Path) -> None:
    runtime = StandInRuntime("runs")
    packages(onnxruntime=runtime)
    examine(root=tmp_path, board=PC)
    assert runtime.requested == [
        ("CUDAExecutionProvider", {"session.disable_cpu_ep_fallback": "1"}),
        ("CPUExecutionProvider", {}),
    ]


@pytest.mark.parametrize(
    ("cuda", "message"),
    [
        ("raises", "(libcudnn.so.9: cannot open shared object file)"),
        ("falls back", "it fell back to CPUExecutionProvider"),
        ("wrong", "it computes 0 + 1 + … + 8 = 7.0"),
    ],
)
def test_provider_that_is_listed_but_cannot_run(
    packages: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], cuda: str, message: str
) -> None:
    packages(onnxruntime=StandInRuntime(cuda))
    checks = examine(root=tmp_path, board=PC)
    assert message in found(checks, "onnxruntime", "warning").found
    assert found(checks, "backbone", "ok").found == "can run with ONNX Runtime CPU"
    assert verdict(checks) == "fit"
    assert capsys.readouterr().out == ""  # a caller may be writing JSON


def test_gpu_without_kernels_in_the_wheel(packages: Any, tmp_path: Path) -> None:
    broken = RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors …")
    packages(torch=StandInTorch(broken), onnxruntime=StandInRuntime("runs"), tensorrt=StandInTensorRT())
    checks = examine(root=tmp_path, board=NANO)
    check = found(checks, "gpu", "warning")
    assert "no kernel image" in check.found
    assert "the learner runs on the CPU" in check.found
    assert "NVIDIA's PyTorch" in check.fix
    assert "it is not used" in found(checks, "tensorrt", "warning").found
    assert "TensorRT" not in found(checks, "backbone", "ok").found
    assert verdict(checks) == "fit"


def test_gpu_with_wrong_results(packages: Any, tmp_path: Path) -> None:
    stand_in = StandInTorch()
    stand_in.zeros = lambda count, device: torch.zeros(count) + float(device == "cuda")
    packages(torch=stand_in)
    assert "cuda computes 8 + 7 = 30.0" in found(examine(root=tmp_path, board=NANO), "gpu", "warning").found


def test_jetson_whose_gpu_pytorch_cannot_use(packages: Any, tmp_path: Path, made: Any) -> None:
    packages(torch=StandInTorch(gpu=False))
    assert found(examine(root=tmp_path, board=NANO), "gpu", "warning").fix
    # a bundle for the CPU does not need the GPU
    assert found(examine(made(target="cpu"), tmp_path, NANO), "gpu", "note").fix == ""


def test_pytorch_that_cannot_compute(packages: Any, tmp_path: Path) -> None:
    stand_in = StandInTorch(gpu=False)

    def refuse(array: np.ndarray) -> None:
        raise RuntimeError("Numpy is not available")

    stand_in.from_numpy = refuse
    packages(torch=stand_in)
    check = found(checks := examine(root=tmp_path, board=PC), "torch", "unfit")
    assert "Numpy is not available" in check.found
    assert "numpy<2" in check.fix
    assert not [check for check in checks if check.name == "gpu"]


@pytest.mark.parametrize(
    ("tensorrt", "message"),
    [
        (StandInTensorRT(gpu=False), "cannot create a builder"),
        (StandInTensorRT("8.6.2"), "8.6.2, but 10.3 is the oldest"),
        (StandInTensorRT("12.1.0"), "supports 10.3 to 11.4"),
        (None, "cannot be imported"),
    ],
)
def test_tensorrt(jetson: Any, tmp_path: Path, tensorrt: Any, message: str) -> None:
    jetson(tensorrt=tensorrt)
    checks = examine(root=tmp_path, board=NANO)
    assert message in found(checks, "tensorrt", "warning").found
    assert verdict(checks) == "fit"


def test_tensorrt_without_its_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    assert "libnvinfer.so.10" in found(examine(root=tmp_path, board=PC), "tensorrt", "note").found


@pytest.mark.parametrize(("target", "state"), [("jetson", "ok"), ("orin-nx", "warning")])
def test_board_with_an_unknown_model_name_is_not_refused(
    jetson: Any, tmp_path: Path, made: Any, target: str, state: str
) -> None:
    board = dataclasses.replace(NANO, model="Acme Vision Box 3")
    found_here = found(examine(made(target=target), tmp_path, board), "target", state)
    assert state == "ok" or "cannot be identified from: Acme Vision Box 3" in found_here.found


@pytest.mark.parametrize(
    ("board", "target", "message", "fix"),
    [
        (NANO, "jetson-thor", "jetson-thor, but this is: NVIDIA Jetson Orin Nano", "--target jetson-orin-nano"),
        (THOR, "jetson-orin-nx", "jetson-orin-nx, but this is: NVIDIA Jetson AGX Thor", "--target jetson-thor"),
        (AGX, "jetson-orin-nano", "but this is: NVIDIA Jetson AGX Orin", "--target jetson-agx-orin"),
        (dataclasses.replace(THOR, l4t="38.1.0"), "thor", "needs L4T 38.2 or newer, but this is 38.1.0", "JetPack"),
    ],
)
def test_bundle_for_another_board_is_unfit(
    jetson: Any, tmp_path: Path, made: Any, board: Board, target: str, message: str, fix: str
) -> None:
    checks = examine(made(target=target), tmp_path, board)
    check = found(checks, "target", "unfit")
    assert message in check.found
    assert fix in check.fix
    assert verdict(checks) == "unfit: target"


def test_gpu_of_another_compute_capability_is_unfit(jetson: Any, tmp_path: Path, made: Any) -> None:
    jetson(torch=StandInTorch(capability=(7, 2)))
    check = found(examine(made(target="jetson"), tmp_path, NANO), "target", "unfit")
    assert "compute capability 8.7 or 11.0, but this GPU 7.2" in check.found


def test_jetson_bundle_on_a_pc_is_a_warning(packages: Any, tmp_path: Path, made: Any) -> None:
    checks = examine(made(target="jetson-thor"), tmp_path, PC)
    assert "this is not a Jetson" in found(checks, "target", "warning").found
    assert verdict(checks) == "fit"
    assert (
        "there is no usable GPU" in found(examine(made(target="generic-cuda"), tmp_path, PC), "target", "warning").found
    )


def test_unknown_target_is_a_warning(packages: Any, tmp_path: Path, made: Any) -> None:
    checks = examine(made(target="jetson-next"), tmp_path, PC)
    assert "'jetson-next' is unknown to this version" in found(checks, "target", "warning").found


def test_old_jetpack_is_unfit(jetson: Any, tmp_path: Path, made: Any) -> None:
    for bundle in (None, made(target="jetson")):
        checks = examine(bundle, tmp_path, XAVIER)
        check = found(checks, "jetpack", "unfit")
        assert "L4T 35.4.1, JetPack 5.1.2 is not supported" in check.found
        assert "JetPack 6.1" in check.fix
    assert verdict(examine(made(target="cpu"), tmp_path, XAVIER)) == "fit"


def test_a_jetson_in_a_container(jetson: Any, tmp_path: Path) -> None:
    board = dataclasses.replace(NANO, l4t="", jetpack="", power_mode="")
    checks = examine(root=tmp_path, board=board)
    assert "nv_tegra_release" in found(checks, "jetpack", "note").fix
    assert found(checks, "power mode", "note")


def test_python(packages: Any, tmp_path: Path, made: Any) -> None:
    old = dataclasses.replace(PC, python="3.8.10")
    assert verdict(examine(root=tmp_path, board=old)) == "unfit: python"
    other = dataclasses.replace(THOR, python="3.10.12")
    check = found(examine(made(target="jetson-thor"), tmp_path, other), "python", "warning")
    assert check.found == "3.10.12, but the target jetson-thor supports 3.12 to 3.12"
    assert "3.12" in check.fix


def test_fp16_without_a_gpu_is_noted(packages: Any, tmp_path: Path, made: Any) -> None:
    bundle = made(target="jetson")
    backbone = {**bundle.manifest["backbone"], "precision": "fp16"}
    bundle = dataclasses.replace(bundle, manifest={**bundle.manifest, "backbone": backbone})
    assert "fp16" in found(examine(bundle, tmp_path, PC), "backbone", "note").found


def test_opset_that_the_target_does_not_support(packages: Any, tmp_path: Path, made: Any) -> None:
    bundle = made(target="jetson")
    backbone = {**bundle.manifest["backbone"], "opset": 23}
    bundle = dataclasses.replace(bundle, manifest={**bundle.manifest, "backbone": backbone})
    check = found(examine(bundle, tmp_path, PC), "opset", "unfit")
    assert check.found == f"23, but the target jetson supports up to {targets.get('jetson').opset}"


def test_signatures(packages: Any, tmp_path: Path, made: Any) -> None:
    root = tmp_path / "root"
    assert "unsigned, and no key is trusted" in found(examine(made(), root, PC), "signature", "note").found
    private, public = signing.new_key(tmp_path, "mine")
    stranger, _ = signing.new_key(tmp_path, "other")
    (root / "trusted").mkdir(parents=True)
    identity = signing.key_id(signing.load_public(public))
    (root / "trusted" / f"{identity}.pub").write_bytes(public.read_bytes())
    assert identity in found(examine(made(sign=signing.signer(private)), root, PC), "signature", "ok").found
    for bundle in (made(), made(sign=signing.signer(stranger))):
        checks = examine(bundle, root, PC)
        assert found(checks, "signature", "unfit").fix
        assert verdict(checks) == "unfit: signature"


def test_trusted_key_without_cryptography(
    packages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Any
) -> None:
    def missing(data: bytes, path: str) -> None:
        raise EnvironmentUnfitError("the package 'cryptography' is needed")

    packages(cryptography=None)
    monkeypatch.setattr(signing, "parse_public", missing)
    (tmp_path / "trusted").mkdir()
    (tmp_path / "trusted" / "0123456789abcdef.pub").write_text("a key")
    checks = examine(made(), tmp_path, NANO)
    assert "1 trusted key(s)" in found(checks, "cryptography", "unfit").found
    assert "python3-cryptography" in found(checks, "signature", "unfit").fix


def test_full_disk_is_unfit(packages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Any) -> None:
    monkeypatch.setattr(doctor, "disk_free", lambda path: 99 * MIB)
    for bundle in (None, made()):
        checks = examine(bundle, tmp_path, PC)
        assert "99 MiB free" in found(checks, "disk", "unfit").found
        assert verdict(checks) == "unfit: disk"


def test_disk_must_hold_twice_the_bundle(
    packages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Any
) -> None:
    bundle = made()
    bundle = dataclasses.replace(bundle, entries={**bundle.entries, "big": bytes(20 * MIB)})
    monkeypatch.setattr(doctor, "disk_free", lambda path: 139 * MIB)
    assert "but 140 are required" in found(examine(bundle, tmp_path, PC), "disk", "unfit").found
    monkeypatch.setattr(doctor, "disk_free", lambda path: 141 * MIB)
    assert found(examine(bundle, tmp_path, PC), "disk", "ok")


def test_root_that_cannot_be_written(packages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file" not in found(examine(root=tmp_path / "new", board=PC), "disk", "ok").found
    assert "cannot be written" in found(examine(root=tmp_path / "file", board=PC), "disk", "unfit").found

    def refuse(folder: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(doctor, "_try_writing", refuse)
    assert "(Read-only file system)" in found(examine(root=tmp_path, board=PC), "disk", "unfit").found


def test_memory_against_the_estimate(packages: Any, tmp_path: Path, made: Any) -> None:
    bundle = made()
    small = dataclasses.replace(PC, memory_mb=200, available_mb=100)
    assert "the bundle needs roughly" in found(examine(bundle, tmp_path, small), "memory", "unfit").found
    busy = dataclasses.replace(PC, available_mb=100)
    assert found(examine(bundle, tmp_path, busy), "memory", "warning").fix
    assert found(examine(bundle, tmp_path, PC), "memory", "ok")
    assert found(examine(bundle, tmp_path, Board(python="3.11")), "memory", "note")


def test_unset_clock_is_harmless(packages: Any, tmp_path: Path) -> None:
    checks = examine(root=tmp_path, board=PC, now=120.0)
    assert "not set (1970-01-01)" in found(checks, "clock", "note").found
    assert verdict(checks) == "fit"


def test_failing_check_is_a_warning(packages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(at: Any) -> Any:
        raise ZeroDivisionError("a driver did\nthat")
        yield

    monkeypatch.setitem(doctor.CHECKS, "gpu", fail)
    checks = examine(root=tmp_path, board=PC)
    assert found(checks, "gpu", "warning").found == "could not be checked (ZeroDivisionError: a driver did that)"
    assert found(checks, "clock", "ok")


def test_states_are_documented_and_unfit_has_a_fix(jetson: Any, tmp_path: Path, made: Any) -> None:
    for board in (NANO, XAVIER, PC, describe()):
        for bundle in (None, made(target="jetson-thor")):
            checks = examine(bundle, tmp_path, board)
            assert {check.state for check in checks} <= set(STATES)
            assert all(check.fix for check in checks if check.state == "unfit")
