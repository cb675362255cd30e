"""Checks of whether this machine can run SSD-Edge, or one bundle.

An installed package may lack kernels for the GPU of this board, and ONNX Runtime lists providers that silently fall
back to the CPU. Therefore PyTorch computes a few numbers on each device, and each provider runs a tiny network. The
bundle's own backbone is not run; `install` does so in its self-test.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from device_runtime.install import trust
from device_runtime.machine import packages
from device_runtime.machine.board import Board, default_root, describe
from device_runtime.machine.checks import Check, Examined, Situation, State
from device_runtime.machine.profile import estimate
from ssd_edge import files, targets
from ssd_edge.bundle import Bundle
from ssd_edge.errors import EnvironmentUnfitError, InputError, SSDEdgeError
from ssd_edge.system import MIB, disk_free, nearest_folder

OLDEST_PYTHON = "3.10"
SPARE_MB = 100  # free MiB besides the bundle's size: generations, journal, an engine
CLOCK_SET = 1_704_067_200  # 2024-01-01; a board without a clock battery starts in 1970


def examine(
    bundle: Bundle | None = None,
    root: Path | None = None,
    board: Board | None = None,
    *,
    now: float | None = None,
) -> list[Check]:
    """Check this machine.

    Args:
        bundle: Bundle to be installed; without one only the machine is checked.
        root: Root of the device's state, which need not exist yet; None for the default root.
        board: Description of this machine; None to read it.
        now: Time in seconds since 1970; None for the current time.

    Returns:
        The results in the order of `CHECKS`. If a check itself fails, its result is a warning with the reason.
    """
    situation = Situation(
        board=board or describe(),
        root=Path(root) if root is not None else default_root(),
        bundle=bundle,
        now=time.time() if now is None else now,
    )
    if bundle is not None:
        with contextlib.suppress(InputError):  # a target of a newer version; `_bundle` reports it
            situation.target = targets.get(bundle.manifest.get("target", ""))
    results: list[Check] = []
    for name, check in CHECKS.items():
        try:
            results.extend(check(situation))
        except Exception as error:  # drivers and vendors' packages may raise any exception
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            results.append(Check(name, "warning", f"could not be checked ({reason})"))
    return results


def verdict(checks: list[Check]) -> str:
    """Return ``fit``, or ``unfit: `` and the names of the failed checks."""
    wrong = dict.fromkeys(check.name for check in checks if check.state == "unfit")
    return f"unfit: {', '.join(wrong)}" if wrong else "fit"


def _machine(at: Situation) -> Examined:
    board = at.board
    parts = [board.model or board.processor, board.architecture, board.system, f"{board.cpus} CPUs"]
    yield Check("machine", "ok", ", ".join(part for part in parts if part))


def _python(at: Situation) -> Examined:
    version, target = at.board.python, at.target
    if not targets.within(version, (OLDEST_PYTHON, None)):
        yield Check(
            "python", "unfit", f"{version}, but {OLDEST_PYTHON} is the oldest supported version", "use a newer Python"
        )
    elif target is not None and not targets.within(version, target.python):
        known = f"{target.python[0]} to {target.python[1]}"
        fix = f"use Python {known}: JetPack's packages are built for its own version" if at.board.jetson else ""
        yield Check("python", "warning", f"{version}, but the target {target.name} supports {known}", fix)
    else:
        yield Check("python", "ok", version)


def _jetpack(at: Situation) -> Examined:
    board, oldest = at.board, _oldest(targets.get("jetson"))
    if not board.jetson:
        return
    if not board.l4t:
        fix = "in a container, mount /etc/nv_tegra_release from the host"
        yield Check("jetpack", "note", "the Jetson Linux release is unknown", fix)
        return
    found = f"L4T {board.l4t}, JetPack {board.jetpack or 'unknown'}"
    if targets.within(board.l4t, (oldest, None)):
        yield Check("jetpack", "ok", found)
        return
    state: State = "warning" if at.target and at.target.kind == "cpu" else "unfit"
    fix = f"install JetPack 6.1 (L4T {oldest}) or newer; boards without one, such as Xavier and Nano, are not supported"
    yield Check("jetpack", state, f"{found} is not supported", fix)


def _bundle(at: Situation) -> Examined:
    if at.bundle is None:
        return
    board, target = at.board, at.target
    if target is None:
        name = at.bundle.manifest.get("target", "")
        finding = f"'{name}' is unknown to this version, which knows: {', '.join(targets.targets())}"
        yield Check("target", "warning", finding, "upgrade SSD-Edge on this machine")
        return
    problem = _misplaced(at, target)
    strange = target.kind == "jetson" and board.jetson and board.model and target.board not in board.model
    if problem:
        yield Check("target", "unfit", *problem)
    elif strange and target.name != "jetson":  # makers of carrier boards choose the model name freely
        finding = f"{target.name}, but the module cannot be identified from: {board.model}"
        yield Check("target", "warning", finding, "ssd-edge deploy --target jetson, which covers all modules")
    elif target.kind == "jetson" and not board.jetson:
        finding = (
            f"{target.name}, but this is not a Jetson: its requirements cannot be checked, and ONNX Runtime runs it"
        )
        yield Check("target", "warning", finding)
    elif target.kind == "cuda" and not at.capability:
        yield Check("target", "warning", f"{target.name}, but there is no usable GPU: ONNX Runtime runs it on the CPU")
    else:
        yield Check("target", "ok", f"{target.name} ({target.title})")
    opset = at.bundle.manifest["backbone"].get("opset", 0)
    if opset > target.opset:
        finding = f"{opset}, but the target {target.name} supports up to {target.opset}"
        yield Check("opset", "unfit", finding, "deploy the run again with this version of SSD-Edge")


def _misplaced(at: Situation, target: targets.Target) -> tuple[str, str] | None:
    """Return why a Jetson bundle does not fit this Jetson, and the fix; None if it fits."""
    board = at.board
    if target.kind != "jetson" or not board.jetson:
        return None
    others = (t.name for t in targets.targets().values() if t.kind == "jetson" and t.name != "jetson")
    right = next((name for name in others if targets.get(name).board in board.model), target.name)
    if target.name not in ("jetson", right):
        return f"{target.name}, but this is: {board.model}", f"ssd-edge deploy --target {right}"
    if board.l4t and not targets.within(board.l4t, target.l4t):
        return f"{target.name} needs L4T {_oldest(target)} or newer, but this is {board.l4t}", "install a newer JetPack"
    if at.capability and target.compute_capability and at.capability not in target.compute_capability:
        finding = f"{target.name} has compute capability {' or '.join(target.compute_capability)}, but this GPU"
        return f"{finding} {at.capability}", "ssd-edge deploy --target cpu"
    return None


def _oldest(target: targets.Target) -> str | None:
    """Return the oldest Jetson Linux release that a target supports."""
    return target.l4t[0] if target.l4t else None


def _signature(at: Situation) -> Examined:
    try:
        trust.trusted(at.root)
    except EnvironmentUnfitError as error:
        yield Check("signature", "unfit", f"cannot be checked: {error}", "run: ssd-edge device fsck")
        return
    if at.bundle is None:
        return
    signature = getattr(at.bundle, "signature", None)
    try:
        identity = trust.check_signature(at.root, at.bundle)
    except EnvironmentUnfitError as error:
        yield Check("signature", "unfit", f"cannot be checked: {error}", at.fix("cryptography"))
        return
    except SSDEdgeError as error:
        yield Check("signature", "unfit", str(error), "sign it with a key that this device trusts")
        return
    if identity is None:
        state = "signed, but" if signature else "unsigned, and"
        yield Check("signature", "note", f"{state} no key is trusted in {at.root}: any valid bundle is accepted")
    else:
        yield Check("signature", "ok", f"by the trusted key {identity}")


def _power(at: Situation) -> Examined:
    if not at.board.jetson:
        return
    hottest = max(at.board.temperatures.items(), key=lambda item: item[1], default=None)
    heat = f"; hottest zone {hottest[0]} {hottest[1]:.0f} °C" if hottest else ""
    if at.board.power_mode:
        yield Check("power mode", "ok", at.board.power_mode + heat)
    else:
        yield Check("power mode", "note", f"nvpmodel does not report it{heat}", "in a container: check on the host")


def _disk(at: Situation) -> Examined:
    size = sum(map(len, at.bundle.entries.values())) / MIB if at.bundle else 0
    needed = 2 * size + SPARE_MB
    try:
        _try_writing(nearest_folder(at.root))
        free = disk_free(at.root) // MIB
    except OSError as error:
        fix = "choose another --root, or make it writable for this user"
        yield Check("disk", "unfit", f"{at.root} cannot be written ({error.strerror})", fix)
        return
    finding = f"{free:,} MiB free in {at.root}"
    if free < needed:
        fix = "free some space, or choose another --root"
        yield Check(
            "disk", "unfit", f"{finding}, but {needed:,.0f} are required (twice the bundle plus {SPARE_MB})", fix
        )
    else:
        yield Check("disk", "ok", f"{finding}, writable")


def _memory(at: Situation) -> Examined:
    board = at.board
    if not board.memory_mb:
        yield Check("memory", "note", "the memory of this machine is unknown")
        return
    finding = f"{board.available_mb:,} of {board.memory_mb:,} MiB available"
    if at.bundle is None:
        yield Check("memory", "ok", finding)
        return
    needed = estimate(at.bundle).total
    finding += f"; the bundle needs roughly {needed:,.0f}, without a GPU's share"
    fix = "a smaller backbone or learner, or a larger board"
    if needed > board.memory_mb:
        yield Check("memory", "unfit", finding, "use " + fix)
    elif needed > board.available_mb:
        yield Check("memory", "warning", finding, "stop other programs, or use " + fix)
    else:
        yield Check("memory", "ok", finding)


def _clock(at: Situation) -> Examined:
    day = time.strftime("%Y-%m-%d", time.gmtime(at.now))
    if at.now < CLOCK_SET:
        finding = f"it is not set ({day}), which is harmless: generations are numbered, and times are for display only"
        yield Check("clock", "note", finding)
    else:
        yield Check("clock", "ok", day)


CHECKS: dict[str, Callable[[Situation], Examined]] = {
    "machine": _machine,
    "python": _python,
    "jetpack": _jetpack,
    "packages": packages.check_packages,
    "torch": packages.check_torch,
    "gpu": packages.check_gpu,
    "onnxruntime": packages.check_onnxruntime,
    "tensorrt": packages.check_tensorrt,
    "backbone": packages.check_backbone,
    "cryptography": packages.check_cryptography,
    "target": _bundle,
    "signature": _signature,
    "power mode": _power,
    "disk": _disk,
    "memory": _memory,
    "clock": _clock,
}


def _try_writing(folder: Path) -> None:
    """Create, sync and remove a file, as a commit does."""
    handle, name = tempfile.mkstemp(prefix=files.TEMPORARY_PREFIX, dir=folder)
    try:
        os.write(handle, b"doctor")
        os.fsync(handle)
    finally:
        os.close(handle)
        os.unlink(name)
