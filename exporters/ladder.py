"""Choose the precision of a bundle: each candidate is measured on images before it is accepted.

A narrower graph gives different embeddings from those that the learner was trained on. Each precision is therefore
checked on test images of the run, if its data can still be read, and on synthetic images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from exporters import parity, precision
from ssd_edge import data, files, targets
from ssd_edge.backbones import onnx_file
from ssd_edge.errors import GateRefusedError, InputError, SSDEdgeError
from ssd_edge.learners import Learner
from ssd_edge.run.finished import FinishedRun
from ssd_edge.targets import Target

Log = Callable[[str], None]

AUTO = "auto"
TESTED = 50  # test images from which on answers decide about a precision, not embeddings
SYNTHETIC_IMAGES = 32
TEST_IMAGES = 1024  # of 32 × 32 pixels; fewer if they are larger
MIN_TEST_IMAGES = 256
CALIBRATION_IMAGES = 256


@dataclasses.dataclass(frozen=True)
class Samples:
    """Images for measuring and calibrating.

    Attributes:
        judged: Kind of images → uint8 ``(N, size, size, 3)``, and their learner rows ``(N,)`` if known.
        calibration: Calibration images, disjoint from `judged`, or the reason why there are none.
        source: Description of the calibration images.
    """

    judged: dict[str, tuple[np.ndarray, np.ndarray | None]]
    calibration: np.ndarray | str
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A graph that passed.

    Attributes:
        onnx: The model.
        precision: Name of its precision.
        report: JSON values for the manifest.
    """

    onnx: bytes
    precision: str
    report: dict[str, Any]


def samples(run: FinishedRun, folder: Path | None, log: Log) -> Samples:
    """Load the images for measuring and calibrating.

    Args:
        run: Its test images are used for measuring and, without `folder`, its training images for calibrating.
        folder: Calibration images of the user. If the run's data cannot be read, every fourth is used for measuring.
        log: Receives a message if the run's data cannot be read.

    Raises:
        InputError: The folder has too few readable images.
    """
    pixels = run.pixels
    judged: dict[str, tuple[np.ndarray, np.ndarray | None]] = {"synthetic": (synthetic(pixels.size), None)}
    calibration: np.ndarray | str
    try:
        dataset = data.load(run.config.data, run.config.run.seed)
        if dataset.fingerprint != run.record.get("identity", {}).get("data"):
            raise InputError(f"{dataset.name} has changed since the run")
        rows = np.array([run.registry.row(name) for name in dataset.classes])
        count = max(MIN_TEST_IMAGES, min(TEST_IMAGES, TEST_IMAGES * 32**2 // pixels.size**2))
        chosen = _spread(len(dataset.test), count)
        judged["test"] = dataset.test.load(chosen, pixels), rows[dataset.test_labels[chosen]]
        calibration = dataset.train.load(_spread(len(dataset.train), CALIBRATION_IMAGES), pixels)
        source = "training images of the run"
    except SSDEdgeError as error:
        log(f"parity on synthetic images only: the run's data cannot be used ({error})")
        calibration, source = f"the run's data cannot be used ({error})", ""
    if folder is not None:
        brought = precision.calibration_images(folder, pixels, CALIBRATION_IMAGES)
        source = "a folder of the user"
        if "test" in judged:
            calibration = brought
        else:
            held_out = np.arange(len(brought)) % 4 == 0
            judged["brought"], calibration = (brought[held_out], None), brought[~held_out]
    return Samples(judged, calibration, source)


def choose(
    onnx: bytes,
    reference: parity.Reference,
    learner: Learner | None,
    images: Samples,
    target: Target,
    wanted: str,
    log: Log,
) -> Choice:
    """Convert a graph to a precision and check that it computes what the run computed.

    Args:
        onnx: The exported graph. A user's own graph may be narrower than fp32 already and is then left unchanged.
        reference: Embeddings that the run was trained on.
        learner: Learner of the run, whose decisions are compared. None: skip this comparison.
        images: Result of `samples`.
        target: Target of the bundle.
        wanted: `AUTO` for the fastest precision that passes, or the name of one. Empty: the target's default, or the
            fastest slower one that passes.
        log: Receives the measurements.

    Raises:
        InputError: The target does not support the precision, or calibration images are missing.
        GateRefusedError: The precision does not pass. The message names one that does.
    """
    ladder = _Ladder(onnx, reference, learner, images, log)
    native = onnx_file.precision(onnx)
    if native != precision.FP32.name:
        if wanted not in ("", AUTO, native):
            raise InputError(f"the backbone is {native} itself and cannot be made {wanted}; leave --precision out")
        return ladder.step(native)
    if wanted not in ("", AUTO):
        targets.check_precision(target, wanted)
        try:
            return ladder.step(wanted)
        except GateRefusedError as error:
            slower = target.precisions[target.precisions.index(wanted) + 1 :]
            passing = [name for name in slower if ladder.passes(name)]
            advice = f"--precision {passing[0]} would pass" if passing else "no slower precision passes"
            raise GateRefusedError(f"{error}; {advice}; nothing was written") from error
    # By default nothing faster than the target's default is tried: int8 is converted and measured only if asked for.
    first = 0 if wanted == AUTO else target.precisions.index(target.default_precision)
    refused: dict[str, str] = {}
    for name in target.precisions[first:]:
        try:
            choice = ladder.step(name)
        except (GateRefusedError, InputError) as error:
            refused[name] = str(error)
            log(f"{name}: refused: {error}")
        else:
            if not refused:
                return choice
            log(f"the bundle is {name} instead of {next(iter(refused))}")
            return dataclasses.replace(choice, report={**choice.report, "refused": refused})
    raise GateRefusedError(f"no precision passes: {refused[target.precisions[-1]]}; nothing was written")


class _Ladder:
    """Precisions of one graph, measured on the same images; the reference is computed once."""

    def __init__(
        self, onnx: bytes, reference: parity.Reference, learner: Learner | None, images: Samples, log: Log
    ) -> None:
        self.onnx, self.learner, self.images, self.log = onnx, learner, images, log
        self.wanted = {kind: reference(pixels) for kind, (pixels, _) in images.judged.items()}
        self._found: dict[str, Choice | SSDEdgeError] = {}

    def step(self, name: str) -> Choice:
        """Return the graph in one precision, or raise as `choose` does; it is measured once."""
        if name not in self._found:
            try:
                self._found[name] = self._measured(name)
            except (GateRefusedError, InputError) as error:
                self._found[name] = error
        found = self._found[name]
        if isinstance(found, SSDEdgeError):
            raise found
        return found

    def _measured(self, name: str) -> Choice:
        native = onnx_file.precision(self.onnx)
        if name != native:
            # an export error smaller than the rounding of int8 would be invisible there
            self.step(precision.FP32.name)
        calibration = self.images.calibration if precision.get(name).calibrated else None
        if isinstance(calibration, str) and name != native:
            raise InputError(
                f"{name} needs images to calibrate with, but {calibration}; name some: --calibration FOLDER"
            )
        graph = precision.convert(self.onnx, name, calibration if isinstance(calibration, np.ndarray) else None)
        report: dict[str, Any] = {"precision": name}
        if isinstance(calibration, np.ndarray):
            report["calibration"] = {
                "images": len(calibration),
                "sha256": files.sha256(calibration.tobytes()),
                "source": self.images.source,
            }
        problems: list[str] = []
        remarks: list[str] = []
        for kind, (pixels, rows) in self.images.judged.items():

            def known(_: np.ndarray, embeddings: np.ndarray = self.wanted[kind]) -> np.ndarray:
                return embeddings

            measured = parity.measure(graph, known, pixels, self.learner, rows)
            report[kind] = measured
            # Rounding errors are larger on noise and say little about photographs, so prefer those if there are any.
            if kind != "synthetic" or name == precision.FP32.name or len(self.images.judged) == 1:
                found = parity.failures(measured, name)
                # What a device answers is what counts, if enough images with a known class say it.
                tested = "accuracy" in measured and len(pixels) >= TESTED and name != precision.FP32.name
                decisive = parity.failures(measured, name, answers_only=True) if tested else found
                problems += [f"{problem} on {kind} images" for problem in decisive]
                remarks += [f"{problem} on {kind} images" for problem in found if problem not in decisive]
            self.log(f"{name} on {measured['images']} {kind} images: {_summary(measured)}")
        if problems:
            raise GateRefusedError(f"the backbone in {name} does not compute what the run computed: {problems[0]}")
        if remarks:
            report["remarks"] = remarks
            self.log(f"warning: {name}: {remarks[0]}; the answers on test images agree, so this is accepted")
        return Choice(graph, name, report)

    def passes(self, name: str) -> bool:
        """Return True if `step` accepts this precision."""
        try:
            self.step(name)
        except (GateRefusedError, InputError):
            return False
        return True


def _summary(measured: dict[str, Any]) -> str:
    parts = [f"cosine {measured['min_cosine']:.6f}", f"largest difference {measured['max_difference']:.1e} σ"]
    if "agreement" in measured:
        parts.append(f"{measured['agreement']:.1%} of the decisions agree")
    if accuracy := measured.get("accuracy"):
        parts.append(f"accuracy {accuracy['reference']:.3f} → {accuracy['exported']:.3f}")
    return ", ".join(parts)


def synthetic(size: int, count: int = SYNTHETIC_IMAGES) -> np.ndarray:
    """Return seeded noise, half of it in coarse patches, as uint8 ``(count, size, size, 3)``."""
    generator = np.random.default_rng(0)
    half = count // 2
    fine = generator.integers(0, 256, (half, size, size, 3), dtype=np.uint8)
    patches = generator.integers(0, 256, (count - half, 4, 4, 3), dtype=np.uint8)
    index = np.arange(size) * 4 // size
    return np.concatenate([fine, patches[:, index][:, :, index]])


def _spread(length: int, count: int) -> np.ndarray:
    """Return at most `count` of `length` positions, evenly spaced."""
    return np.linspace(0, length - 1, min(count, length)).astype(np.int64)
