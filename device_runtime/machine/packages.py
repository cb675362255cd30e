"""Checks of the packages that a device computes with; each package must run a small computation."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from types import ModuleType
from typing import Any

import numpy as np

from device_runtime.backbone.embedder import LADDER
from device_runtime.install import trust
from device_runtime.machine.checks import Check, Examined, Situation
from ssd_edge import ort, targets
from ssd_edge.errors import EnvironmentUnfitError, SSDEdgeError, first_line

OLDEST_TORCH, OLDEST_ONNXRUNTIME = "2.3", "1.17"  # as in pyproject.toml
# ONNX graph y = Conv(x, w), both inputs float32 (1, 1, 3, 3); a convolution, because it requires cuDNN.
CONVOLUTION = bytes.fromhex(
    "08083a6b0a0f0a01780a017712017922 04436f6e76 120174 5a1b0a017812160a14080112100a0208010a0208010a0208030a020803"
    "5a1b0a017712160a14080112100a0208010a0208010a0208030a020803"
    "621b0a017912160a14080112100a0208010a0208010a0208010a020801 42021012"
)


def check_packages(at: Situation) -> Examined:
    """Check the base dependencies."""
    found = []
    for module, name in (("numpy", "NumPy"), ("safetensors", "safetensors"), ("PIL", "Pillow")):
        package, problem = _import(module)
        if package is None:
            yield Check("packages", "unfit", f"{name} cannot be imported ({problem})", "pip install --upgrade ssd-edge")
        else:
            found.append(f"{name} {package.__version__}")
    yield Check("packages", "ok", ", ".join(found))


def check_torch(at: Situation) -> Examined:
    """Check that PyTorch computes on the CPU and shares memory with NumPy."""
    torch, problem = _import("torch")
    answers = at.bundle is None or "answers" in at.bundle.roles  # see `install.bundle`
    if torch is None and answers and importlib.util.find_spec("torch") is None:
        finding = "PyTorch is not installed: this machine can predict, but not learn"
        yield Check("torch", "warning", finding, at.fix("torch"))
        return
    if torch is None:
        finding = f"PyTorch, which the learner requires, cannot be imported ({problem})"
        yield Check("torch", "unfit", finding, at.fix("torch"))
        return
    version = str(torch.__version__)
    try:
        _compute(torch, "cpu")
        torch.from_numpy(np.ones(2, np.float32)).numpy()
    except Exception as error:  # a PyTorch built for NumPy 1 fails here with NumPy 2
        fix = "pip install 'numpy<2', if the message names NumPy; else " + at.fix("torch")
        yield Check("torch", "unfit", f"PyTorch {version} cannot compute on the CPU ({first_line(error)})", fix)
        return
    at.torch = torch
    old = not targets.within(version, (OLDEST_TORCH, None))
    finding = f"{version}, older than {OLDEST_TORCH}, the oldest that is supported" if old else version
    yield Check("torch", "warning" if old else "ok", finding, at.fix("torch") if old else "")


def check_gpu(at: Situation) -> Examined:
    """Check that PyTorch computes on the GPU."""
    torch = at.torch
    if torch is None:
        return
    if not torch.cuda.is_available():
        why = "PyTorch finds no usable CUDA GPU" if torch.version.cuda else "this PyTorch is built without CUDA"
        yield Check("gpu", at.loss, f"{why}; the learner runs on the CPU", at.fix("torch") if at.gpu_wanted else "")
        return
    name, capability = torch.cuda.get_device_name(0), ".".join(map(str, torch.cuda.get_device_capability(0)))
    found = f"{name}, compute capability {capability}, CUDA {torch.version.cuda}"
    try:
        _compute(torch, "cuda")
    except Exception as error:  # e.g. a wheel without kernels for this GPU, an old driver, no memory
        finding = f"{found}, but a kernel does not run ({first_line(error)}); the learner runs on the CPU"
        yield Check("gpu", "warning", finding, at.fix("torch") if at.board.jetson else "update the driver, or PyTorch")
        return
    at.capability = capability
    yield Check("gpu", "ok", f"{found}; a kernel ran")


def check_onnxruntime(at: Situation) -> Examined:
    """Check which providers of ONNX Runtime compute."""
    runtime, problem = _import("onnxruntime")
    if runtime is None:
        yield Check("onnxruntime", "note", f"cannot be imported ({problem})", at.fix("onnxruntime"))
        return
    available, ran = runtime.get_available_providers(), []
    for provider in (name for name in LADDER if name in available):
        reason = _convolve(runtime, provider)
        if reason:
            text = f"{provider} is listed, but cannot run ({reason})"
            yield Check("onnxruntime", "warning", text, at.fix("onnxruntime"))
        else:
            ran.append(provider)
    at.runners.extend(f"ONNX Runtime {name.removesuffix('ExecutionProvider')}" for name in ran)
    version = str(runtime.__version__)
    old = not targets.within(version, (OLDEST_ONNXRUNTIME, None))
    listed = ", ".join(name.removesuffix("ExecutionProvider") for name in available)
    finding = f"{version}; lists {listed}; ran: {', '.join(at.runners) or 'none'}"
    if old:
        finding += f"; older than {OLDEST_ONNXRUNTIME}, the oldest that is supported"
    yield Check("onnxruntime", "warning" if old else "ok", finding, at.fix("onnxruntime") if old else "")


def check_tensorrt(at: Situation) -> Examined:
    """Check that TensorRT can create a builder."""
    trt, problem = _import("tensorrt")
    if trt is None:
        yield Check("tensorrt", at.loss, f"cannot be imported ({problem})", at.fix("tensorrt"))
        return
    version = str(trt.__version__)
    usual = targets.get("jetson" if at.board.jetson else "generic-cuda")
    known = at.target if at.target and at.target.tensorrt else usual
    oldest, newest = known.tensorrt or (None, None)
    if not targets.within(version, (oldest, None)):
        finding = f"{version}, but {oldest} is the oldest supported version"
        yield Check("tensorrt", at.loss, finding, "install a newer JetPack" if at.board.jetson else at.fix("tensorrt"))
        return
    try:
        builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
    except Exception as error:  # without a GPU: TypeError, because a factory returned nullptr
        yield Check(
            "tensorrt",
            at.loss,
            f"{version}, but it cannot create a builder, e.g. for lack of a GPU ({first_line(error)})",
        )
        return
    del builder
    if not at.capability:
        finding = f"{version}, but it is not used: PyTorch, which allocates its memory, cannot use the GPU"
        yield Check("tensorrt", at.loss, finding, at.fix("torch") if at.board.jetson else "")
        return
    at.runners.insert(0, f"TensorRT {version}")
    if not targets.within(version, (oldest, newest)):
        yield Check("tensorrt", "warning", f"{version}; the target {known.name} supports {oldest} to {newest}")
    else:
        yield Check("tensorrt", "ok", f"{version}; created a builder")


def check_backbone(at: Situation) -> Examined:
    """Check that a runtime for the backbone was found."""
    if not at.runners:
        fix = at.fix("tensorrt" if at.gpu_wanted else "onnxruntime")
        yield Check("backbone", "unfit", "neither ONNX Runtime nor TensorRT can run a backbone on this machine", fix)
        return
    finding = f"can run with {', '.join(at.runners)}"
    precision, suited = at.bundle.manifest["backbone"]["precision"] if at.bundle else "", targets.get("cpu").precisions
    if precision and precision not in suited and at.runners == ["ONNX Runtime CPU"]:
        fix = f"deploy it with --precision {' or '.join(suited)}"
        yield Check(
            "backbone", "note", f"{finding}, which has few {precision} kernels: no faster than {suited[-1]}", fix
        )
    else:
        yield Check("backbone", "ok", finding)


def check_cryptography(at: Situation) -> Examined:
    """Check that signatures can be verified if a key is trusted."""
    package, problem = _import("cryptography")
    try:
        keys = len(trust.trusted(at.root) or ())
    except SSDEdgeError:  # the check of the signature reports it
        keys = 0
    if package is not None:
        yield Check("cryptography", "ok", str(package.__version__))
    elif keys:
        finding = f"cannot be imported ({problem}), but {keys} trusted key(s) in {at.root} require signatures"
        yield Check("cryptography", "unfit", finding, at.fix("cryptography"))
    else:
        yield Check("cryptography", "note", f"not installed; required only once a key is trusted ({problem})")


def _import(module: str) -> tuple[ModuleType | None, str]:
    """Import a module; return it, or None and the reason. Vendors' packages may raise any exception."""
    try:
        return ort.load() if module == "onnxruntime" else importlib.import_module(module), ""
    except EnvironmentUnfitError as error:
        return None, first_line(error.__cause__ or error)
    except Exception as error:
        return None, first_line(error)


def _compute(torch: Any, device: str) -> None:
    """Run a few kernels, because an available device may lack them.

    Raises:
        Exception: Any error of PyTorch, or RuntimeError for a wrong result.
    """
    values = (torch.zeros(8, device=device) + 1).cumsum(0).topk(2).values
    if values.sum().item() != 15.0:
        raise RuntimeError(f"{device} computes 8 + 7 = {values.sum().item()}")


def _convolve(runtime: Any, provider: str) -> str:
    """Return why a provider cannot run a convolution without another provider; empty if it can."""
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors are reported by the check, not on standard error
    if provider != "CPUExecutionProvider":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    ones = np.ones((1, 1, 3, 3), np.float32)
    try:
        # ONNX Runtime's fallback prints on standard output, where a caller may be writing JSON
        with contextlib.redirect_stdout(io.StringIO()):
            session = runtime.InferenceSession(CONVOLUTION, options, providers=[provider])
            result = session.run(None, {"x": ones * np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3), "w": ones})
    except Exception as error:  # ONNX Runtime raises its own types, which share no public base
        return first_line(error)
    if session.get_providers()[0] != provider:
        return f"it fell back to {session.get_providers()[0]}"
    return "" if float(result[0].item()) == 36.0 else f"it computes 0 + 1 + … + 8 = {float(result[0].item())}"
