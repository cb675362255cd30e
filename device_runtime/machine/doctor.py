"""Is this machine fit for SSD-Edge, or for one bundle? What is claimed to work is run, not only looked up.

A package that can be imported may still lack kernels for the GPU of this board, and ONNX Runtime lists providers that
fall back to the processor in silence: so PyTorch computes a few numbers on each device, and a tiny network goes
through each provider. The bundle's own backbone is not run: `installation.install` does that with its self-test.
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
SPARE_MB = 100  # free disk besides the bundle's: generations, journal, an engine
CLOCK_SET = 1_704_067_200  # 2024-01-01; a board without a clock battery starts in 1970


def examine(
    bundle: Bundle | None = None,
    root: Path | None = None,
    board: Board | None = None,
    *,
    now: float | None = None,
) -> list[Check]:
    """Examine this machine.

    Args:
        bundle: that is to run here; without one the machine alone is examined.
        root: the device's state; it need not exist yet. The default root, if None.
        board: this machine, if it is known already.
        now: seconds since 1970.

    Returns:
        The findings, in the order of `CHECKS`. A check that failed itself is a warning with the reason.
    """
    situation = Situation(
        board=board or describe(),
        root=Path(root) if root is not None else default_root(),
        bundle=bundle,
        now=time.time() if now is None else now,
    )
    if bundle is not None:
        with contextlib.suppress(InputError):  # a target of a newer version: `_bundle` says so
            situation.target = targets.get(bundle.manifest.get("target", ""))
    found: list[Check] = []
    for name, check in CHECKS.items():
        try:
            found.extend(check(situation))
        except Exception as error:  # drivers and vendors' packages raise anything; the other checks still count
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            found.append(Check(name, "warning", f"could not be examined ({reason})"))
    return found


def verdict(checks: list[Check]) -> str:
    """``fit``, or ``unfit: `` and the names of what makes it so."""
    wrong = dict.fromkeys(check.name for check in checks if check.state == "unfit")
    return f"unfit: {', '.join(wrong)}" if wrong else "fit"


def _machine(at: Situation) -> Examined:
    board = at.board
    parts = [board.model or board.processor, board.architecture, board.system, f"{board.cpus} CPUs"]
    yield Check("machine", "ok", ", ".join(part for part in parts if part))


def _python(at: Situation) -> Examined:
    version, target = at.board.python, at.target
    if not targets.within(version, (OLDEST_PYTHON, None)):
        yield Check("python", "unfit", f"{version}, but {OLDEST_PYTHON} is the oldest", "use a newer Python")
    elif target is not None and not targets.within(version, target.python):
        known = f"{target.python[0]} to {target.python[1]}"
        fix = f"use Python {known}: JetPack's packages are built for its own" if at.board.jetson else ""
        yield Check("python", "warning", f"{version}, but the target {target.name} knows {known}", fix)
    else:
        yield Check("python", "ok", version)


def _jetpack(at: Situation) -> Examined:
    board, oldest = at.board, _oldest(targets.get("jetson"))
    if not board.jetson:
        return
    if not board.l4t:
        fix = "in a container, mount /etc/nv_tegra_release from the host"
        yield Check("jetpack", "note", "the Jetson Linux release is not known here", fix)
        return
    found = f"L4T {board.l4t}, JetPack {board.jetpack or 'unknown'}"
    if targets.within(board.l4t, (oldest, None)):
        yield Check("jetpack", "ok", found)
        return
    state: State = "warning" if at.target and at.target.kind == "cpu" else "unfit"
    fix = f"install JetPack 6.1 (L4T {oldest}) or newer; a board that has none, like Xavier and Nano, is not supported"
    yield Check("jetpack", state, f"{found}, is not supported", fix)


def _bundle(at: Situation) -> Examined:
    if at.bundle is None:
        return
    board, target = at.board, at.target
    if target is None:
        name = at.bundle.manifest.get("target", "")
        told = f"'{name}' is not known here, only: {', '.join(targets.targets())}"
        yield Check("target", "warning", told, "upgrade SSD-Edge on this machine")
        return
    problem = _misplaced(at, target)
    strange = target.kind == "jetson" and board.jetson and board.model and target.board not in board.model
    if problem:
        yield Check("target", "unfit", *problem)
    elif strange and target.name != "jetson":  # makers of carriers write there what they like
        told = f"{target.name}, but which module this is cannot be told from: {board.model}"
        yield Check("target", "warning", told, "ssd-edge deploy --target jetson, which is for all of them")
    elif target.kind == "jetson" and not board.jetson:
        told = f"{target.name}, but this is no Jetson: what counts for it is not seen here, ONNX Runtime runs it"
        yield Check("target", "warning", told)
    elif target.kind == "cuda" and not at.capability:
        yield Check("target", "warning", f"{target.name}, but no GPU can be used here: ONNX Runtime runs it")
    else:
        yield Check("target", "ok", f"{target.name} ({target.title})")
    opset = at.bundle.manifest["backbone"].get("opset", 0)
    if opset > target.opset:
        told = f"{opset}, but the target {target.name} takes up to {target.opset}"
        yield Check("opset", "unfit", told, "deploy the run again with this version of SSD-Edge")


def _misplaced(at: Situation, target: targets.Target) -> tuple[str, str] | None:
    """Why a bundle for a Jetson is on the wrong one, and what to do; None if it is not."""
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
        told = f"{target.name} has compute capability {' or '.join(target.compute_capability)}, but this GPU"
        return f"{told} {at.capability}", "ssd-edge deploy --target cpu"
    return None


def _oldest(target: targets.Target) -> str | None:
    """The oldest Jetson Linux that a target knows."""
    return target.l4t[0] if target.l4t else None


def _signature(at: Situation) -> Examined:
    if at.bundle is None:
        return

    signature = getattr(at.bundle, "signature", None)
    if not trust.keys(at.root):
        told = "signed, but" if signature else "unsigned, and"
        yield Check("signature", "note", f"{told} no key is trusted in {at.root}: any valid bundle is taken")
        return
    try:
        identity = trust.check_signature(at.root, at.bundle)
    except EnvironmentUnfitError as error:
        yield Check("signature", "unfit", f"cannot be checked: {error}", at.fix("cryptography"))
    except SSDEdgeError as error:
        yield Check("signature", "unfit", str(error), "sign it with a key that is trusted here")
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
        yield Check("power mode", "note", f"nvpmodel does not say{heat}", "in a container: look on the host")


def _disk(at: Situation) -> Examined:
    size = sum(map(len, at.bundle.entries.values())) / MIB if at.bundle else 0
    needed, folder = 2 * size + SPARE_MB, nearest_folder(at.root)
    try:
        if not folder.is_dir():
            raise NotADirectoryError(20, f"{folder} is a file")
        _try_writing(folder)
    except OSError as error:
        fix = "name another --root, or make it writable for this user"
        yield Check("disk", "unfit", f"{at.root} cannot be written ({error.strerror})", fix)
        return
    free = disk_free(folder) // MIB
    told = f"{free:,} MiB free in {at.root}"
    if free < needed:
        fix = "free some space, or name another --root"
        yield Check("disk", "unfit", f"{told}, but {needed:,.0f} are needed (twice the bundle, and {SPARE_MB})", fix)
    else:
        yield Check("disk", "ok", f"{told}, writable")


def _memory(at: Situation) -> Examined:
    board = at.board
    if not board.memory_mb:
        yield Check("memory", "note", "this machine does not say how much it has")
        return
    told = f"{board.available_mb:,} of {board.memory_mb:,} MiB available"
    if at.bundle is None:
        yield Check("memory", "ok", told)
        return
    needed = estimate(at.bundle).total
    told += f"; the bundle needs roughly {needed:,.0f}, a GPU's share not counted"
    fix = "a smaller backbone or learner, or a larger board"
    if needed > board.memory_mb:
        yield Check("memory", "unfit", told, fix)
    elif needed > board.available_mb:
        yield Check("memory", "warning", told, "stop what else is running, or take " + fix)
    else:
        yield Check("memory", "ok", told)


def _clock(at: Situation) -> Examined:
    day = time.strftime("%Y-%m-%d", time.gmtime(at.now))
    if at.now < CLOCK_SET:
        told = f"it is not set ({day}); harmless: generations are counted, and their times are for people only"
        yield Check("clock", "note", told)
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
